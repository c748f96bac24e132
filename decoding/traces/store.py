"""Traces in Parquet shards beside a manifest: written whole or not at all, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from decoding.errors import UserError, reading
from decoding.support.files import inside, write_whole
from decoding.traces.schema import SCHEMA_VERSION, TRACE_FEATURES, Column

MANIFEST = "manifest.json"
_AGAIN = "Delete the directory to collect the traces again."


def write_shard(
    directory: Path, name: str, rows: list[dict[str, Any]], about: dict[str, Any], further: Sequence[Column] = ()
) -> dict[str, Any]:
    """Write rows as one Parquet file, under a temporary name until it is whole.

    Args:
        about: `trace_key` and `feature_names`, written into the file's metadata.
        further: columns of one's own, beside those of every row.

    Returns:
        The shard's entry for the manifest.
    """
    features = Features({**TRACE_FEATURES, **{column.name: column.type for column in further}})
    columns = {column: [row[column] for row in rows] for column in features}
    table = Dataset.from_dict(columns, features=features).data.table
    metadata = {
        **(table.schema.metadata or {}),
        b"dsbd": json.dumps(about | {"schema_version": SCHEMA_VERSION}).encode(),
    }
    target = directory / name
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        pq.write_table(table.replace_schema_metadata(metadata), partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return {"file": name, "rows": len(rows), "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, under a temporary name until it is whole."""
    write_whole(directory / MANIFEST, json.dumps(manifest, indent=2, default=str).encode() + b"\n")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a trace directory, or None if there is none.

    Raises:
        UserError: it is not a manifest of this schema.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a trace manifest ({type(error).__name__}). Delete the directory to collect the traces "
            "again."
        ) from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}; this code reads version {SCHEMA_VERSION}. Collect the traces again."
        )
    return manifest


def load_traces(directory: str | Path) -> tuple[Dataset, dict[str, Any]]:
    """Read all shards of a trace directory.

    Returns:
        The rows, and the manifest.

    Raises:
        UserError: the directory, a shard or the manifest is missing, truncated, changed or foreign.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(
            f"{directory} holds no {MANIFEST}: no traces were logged there. Run python -m decoding.collect, or point "
            "collect.traces_dir elsewhere."
        )
    if not manifest.get("complete"):
        raise UserError(
            f"The traces in {directory} are incomplete ({manifest.get('rows', 0)} rows so far). Run python -m "
            "decoding.collect with the same settings: it goes on where it stopped."
        )
    with reading(directory / MANIFEST, _AGAIN):
        key = manifest["trace_key"]
        tables = [_read_shard(inside(directory, entry["file"]), entry, key) for entry in manifest["shards"]]
        if not tables:
            raise UserError(f"The traces in {directory} hold no rows. Raise collect.train_prompts and collect again.")
        return Dataset(pa.concat_tables(tables)), manifest


def _read_shard(path: Path, entry: dict[str, Any], trace_key: str) -> pa.Table:
    if not path.exists():
        raise UserError(f"The trace shard {path} is named in the manifest but missing. {_AGAIN}")
    content = path.read_bytes()
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"The trace shard {path} cannot be read; it may be truncated ({error}). {_AGAIN}") from error
    about = json.loads((table.schema.metadata or {}).get(b"dsbd", b"{}"))
    if about.get("trace_key") != trace_key:
        raise UserError(f"The trace shard {path} belongs to another collection than its manifest. {_AGAIN}")
    if table.num_rows != entry["rows"]:
        raise UserError(
            f"The trace shard {path} holds {table.num_rows} rows; its manifest says {entry['rows']}. {_AGAIN}"
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise UserError(f"The trace shard {path} was changed since it was written. {_AGAIN}")
    return table
