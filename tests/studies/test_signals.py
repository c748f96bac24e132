"""Studies end on Ctrl-C and SIGTERM with a word and 130, as the commands do."""

from __future__ import annotations

import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from decoding import ModelPair

STUDIES = sorted(path.stem for path in (Path(__file__).parents[2] / "studies").glob("[!_]*.py"))


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("study", STUDIES)
def test_signals(
    study: str,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where they ask for the built-in pair, which all do first."""

    def stopped(*_: Any, **__: Any) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(ModelPair, "tiny", stopped)
    monkeypatch.setattr(
        sys, "argv", [study, *(["record", str(tmp_path / "it.json")] if study == "same_decoding" else [])]
    )
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            runpy.run_module(f"studies.{study}", run_name="__main__")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"
