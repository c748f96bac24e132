"""RunProgress: a bar on a terminal, lines in a log."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from decoding.support import progress
from decoding.support.progress import RunProgress


def run(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """What nine of ten steps of 25 seconds print."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with RunProgress(console) as bar:
        monkeypatch.setattr(bar, "get_time", lambda: now[0])
        task = bar.add_task("decoding", total=10)
        for _ in range(9):
            now[0] += 25.0
            bar.advance(task)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = run(False, monkeypatch).splitlines()
    assert lines[0].startswith("decoding: 3 of 10 in 0:01:15") and lines[0].endswith("about 0:02:55 left")
    assert [line.split()[1] for line in lines] == ["3", "6", "9"]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run(True, monkeypatch)
    assert "━" in shown and "9/10" in shown and "about" not in shown
