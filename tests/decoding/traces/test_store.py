"""Shards and manifests: what was written comes back, and what is damaged, foreign or not whole is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from decoding import UserError
from decoding.traces import load_traces
from decoding.traces.schema import TRACE_FEATURES
from decoding.traces.store import MANIFEST, write_shard
from tests.controller.synthetic import rows, write_traces

SHARD = "traces-00000.parquet"


def test_written_rows_are_read_back(tmp_path: Path) -> None:
    table, manifest = load_traces(write_traces(tmp_path))
    assert set(table.column_names) == set(TRACE_FEATURES) and len(table) == manifest["rows"] == len(rows())
    for found, written in zip(table, rows(), strict=True):
        for name, value in found.items():
            np.testing.assert_array_equal(value, written[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([MANIFEST, SHARD])


def test_a_shard_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", fails)
    with pytest.raises(OSError, match="No space left"):
        write_shard(tmp_path, SHARD, list(rows()), {})
    assert not list(tmp_path.iterdir())


HARMS = {
    "missing": "is named in the manifest but missing",
    "truncated": "cannot be read; it may be truncated",
    "foreign": "belongs to another collection",
    "short": "holds 1 rows; its manifest says",
    "changed": "was changed since it was written",
    "no manifest": "holds no manifest.json",
    "no JSON": r"is not a trace manifest \(JSONDecodeError\)",
    "another JSON": r"is not a trace manifest \(KeyError\)",
    "schema": "has schema version 99",
    "incomplete": "are incomplete",
    "nothing": "hold no rows",
}


def damage(harm: str, directory: Path) -> None:
    """Do harm to traces that are whole."""
    shard, file = directory / SHARD, directory / MANIFEST
    manifest, table = json.loads(file.read_text()), pq.read_table(shard)
    layer = pa.array([0] * table.num_rows, table.schema.field("layer").type)
    harms = {
        "missing": shard.unlink,
        "truncated": lambda: shard.write_bytes(shard.read_bytes()[:-100]),
        "foreign": lambda: pq.write_table(table.replace_schema_metadata({b"dsbd": b'{"trace_key": "other"}'}), shard),
        "short": lambda: pq.write_table(table[:1], shard),
        "changed": lambda: pq.write_table(table.set_column(table.column_names.index("layer"), "layer", layer), shard),
        "no manifest": file.unlink,
        "no JSON": lambda: file.write_text("{"),
        "another JSON": lambda: file.write_text("{}"),
        "schema": lambda: file.write_text(json.dumps(manifest | {"schema_version": 99})),
        "incomplete": lambda: file.write_text(json.dumps(manifest | {"complete": False})),
        "nothing": lambda: file.write_text(json.dumps(manifest | {"shards": []})),
    }
    harms[harm]()


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_traces_are_refused(harm: str, tmp_path: Path) -> None:
    directory = write_traces(tmp_path)
    damage(harm, directory)
    with pytest.raises(UserError, match=HARMS[harm]) as caught:
        load_traces(directory)
    assert str(directory) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
