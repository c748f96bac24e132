"""The results of an evaluation or a bench as a file: its version, written and read. docs/formats.md
has the fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from decoding.errors import UserError
from decoding.support.files import json_bytes, write_whole

SCHEMA_VERSION = 2
RESULTS, BENCH = "results.json", "bench.json"
Results = str | Path | Mapping[str, Any]  # the path of a results.json, or what it holds


def write_results(path: Path, results: Mapping[str, Any]) -> Path:
    """Write results, with a checksum of the rest as the last entry; returns the path."""
    return write_whole(path, json_bytes({**results, "sha256": _digest(results)}))


def _digest(results: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of all entries but this one."""
    return hashlib.sha256(json_bytes({name: v for name, v in results.items() if name != "sha256"})).hexdigest()


def read_results(results: Results) -> Mapping[str, Any]:
    """Read a results.json.

    Args:
        results: its path, or what it holds, which is checked all the same.

    Raises:
        UserError: it cannot be read, is of another version, was changed since it was written, or
            has no rows as evaluate.py writes them.
    """
    where, of_file = name_of(results), isinstance(results, str | Path)
    if isinstance(results, str | Path):
        try:
            results = json.loads(Path(results).expanduser().read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{where} cannot be read ({error}); give the results.json of an evaluation.") from error
    version = results.get("schema_version") if isinstance(results, Mapping) else None
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{where} have the schema version {version!r}; this code reads {SCHEMA_VERSION}. Give the results.json of "
            "an evaluation, and evaluate again where it is of another version."
        )
    assert isinstance(results, Mapping)
    rows = results.get("rows")
    parts = ("settings", "config", "summary")
    whole = isinstance(rows, list) and all(
        isinstance(row, Mapping) and "method" in row and all(isinstance(row.get(part), Mapping) for part in parts)
        for row in rows
    )
    if whole and of_file and results.get("sha256", digest := _digest(results)) != digest:
        raise UserError(
            f"{where} were changed since they were written, or are damaged; evaluate again, or take the entry sha256 "
            "out of what you changed yourself."
        )
    if not whole:
        raise UserError(
            f"{where} hold no rows with method, settings, config and summary; give what evaluate.py wrote, unchanged."
        )
    return results


def name_of(results: Results) -> str:
    """The name of these results in a sentence that goes on with a plural verb."""
    return f"The results {str(results)!r}" if isinstance(results, str | Path) else "The results"
