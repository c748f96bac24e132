"""Files that are whole or not there."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from decoding.support.files import json_bytes, write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_whole(tmp_path / "new" / "x", b"old")
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, b"new")
    assert [(p.name, p.read_bytes()) for p in path.parent.iterdir()] == [("x", b"old")]


def test_json_has_no_nan() -> None:
    content = json_bytes({"a": math.nan, "b": [math.inf, 1.5, "é"], 3: (None, True)})
    assert json.loads(content) == {"a": None, "b": [None, 1.5, "é"], "3": [None, True]}
    assert content.endswith(b"}\n")


def test_lists_of_hydra_are_json() -> None:
    node = OmegaConf.create({"categories": ["writing", {"share": math.inf}]})
    assert json.loads(json_bytes({"task": node, "list": node.categories})) == {
        "task": {"categories": ["writing", {"share": None}]},
        "list": ["writing", {"share": None}],
    }
