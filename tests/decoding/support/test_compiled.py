"""Machine code is made again when any file that it comes from has changed."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest

from decoding.support.compiled import _stamp


def test_a_stamp_is_of_all_files_that_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below, above = tmp_path / "stamp_below.py", tmp_path / "stamp_above.py"
    below.write_text("from typing import NamedTuple\nclass Row(NamedTuple):\n    x: int\ndef inner(x):\n    return x\n")
    above.write_text(
        "from stamp_below import Row, inner\n"
        "def alone(x):\n    return x\n"
        "def outer(x):\n    return alone(inner(x))\n"
        "def record(x):\n    return Row(x)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("stamp_above")
    functions = module.alone, module.outer, module.record
    before = [_stamp(function) for function in functions]
    assert [len(stamp) for stamp in before] == [1, 2, 2]
    os.utime(below, ns=(0, 0))
    after = [_stamp(function) for function in functions]
    assert [old == new for old, new in zip(before, after, strict=True)] == [True, False, False]
