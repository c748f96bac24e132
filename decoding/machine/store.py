"""Tables of what passes cost, kept on disk between runs: a JSON file for each machine, pair and way
of measuring.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch

from decoding.cost_table import BUSY, LatencyTable
from decoding.engine.placement import dtype_of
from decoding.errors import UserError
from decoding.pairs.pair import ModelPair
from decoding.support.files import cache_root, json_bytes, write_whole
from decoding.support.provenance import library_versions, machine

SCHEMA_VERSION = 1
LONGEST_AGE = timedelta(days=30)  # drivers, clocks and neighbours change
_measured: dict[Path, LatencyTable] = {}  # in this process


def device_name(pair: ModelPair) -> str:
    """The GPU that the target lives on, or the CPU and its threads."""
    if pair.device.type == "cuda":
        return torch.cuda.get_device_name(pair.device)
    return f"{machine()['cpu']}, {torch.get_num_threads()} threads"


def cache_key(pair: ModelPair, **settings: Any) -> dict[str, Any]:
    """All that decides the cost of a pair's passes, and how it was measured (`settings`);
    JSON-able.
    """
    about, versions = machine(), library_versions()
    models = pair.models
    return {
        "schema_version": SCHEMA_VERSION,
        "device": device_name(pair),
        "cpu": about["cpu"],  # it launches what a GPU runs
        "torch_threads": about["torch_threads"],
        "pair": pair.fingerprint,
        "attention": [getattr(model.config, "_attn_implementation", None) for model in models.values()],
        "dtypes": [str(dtype_of(model)) for model in models.values()],
        "engine": pair.engine,
        "draft": pair.draft_name,
        "versions": {name: versions.get(name) for name in ("torch", "transformers")},
        **settings,
    }


def entry_file(key: dict[str, Any], cache_dir: str | Path | None = None) -> Path:
    """The file of the table with that key; `cache_dir` None: latency/ in `cache_root`."""
    directory = cache_root() / "latency" if cache_dir is None else Path(cache_dir).expanduser()
    return directory / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"


def kept_or(
    measure: Callable[[], LatencyTable], key: dict[str, Any], cache_dir: str | Path | None, fresh: bool
) -> LatencyTable:
    """The table that is kept under a key, in this process or on disk; else what `measure` gives,
    which is then kept.

    Args:
        measure: makes the table.
        key: of `cache_key`.
        cache_dir: as in `entry_file`; a table that was measured while the machine was busy is not
            written there.
        fresh: measure again, whatever is kept.
    """
    file = entry_file(key, cache_dir)
    if not fresh and file in _measured:
        return _measured[file]
    table = None if fresh else _read(file, key)
    if table is None:
        table = measure()
        quiet = table.spread is None or table.spread <= BUSY
        if quiet and _write(file, key, table):
            table = replace(table, file=file)
    _measured[file] = table
    return table


def _read(file: Path, key: dict[str, Any]) -> LatencyTable | None:
    """The table of a file; None if it has another key, is damaged, or older than LONGEST_AGE."""
    with suppress(OSError, ValueError, KeyError, TypeError, UserError):
        entry = json.loads(file.read_bytes())
        age = datetime.now(UTC) - datetime.fromisoformat(entry["table"]["measured"])
        if entry["key"] == key and abs(age) <= LONGEST_AGE:
            return replace(LatencyTable.from_dict(entry["table"]), file=file)
    return None


def _write(file: Path, key: dict[str, Any], table: LatencyTable) -> bool:
    """Keep a table on disk; False where the directory cannot be written to."""
    try:
        write_whole(file, json_bytes({"key": key, "table": table.to_dict()}))
    except OSError:
        return False
    return True


def timestamp() -> str:
    """The time at which a table is measured, as it says it: UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
