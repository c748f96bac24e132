"""Command lines without Hydra: a signal or a mistake is a word and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from decoding.errors import UserError
from decoding.support.plain import plain_command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_130(number: signal.Signals, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, plain_command():
        signal.raise_signal(number)
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_mistakes_end_with_2_and_bugs_keep_their_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped, plain_command():
        raise UserError("Give less.")
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: Give less.\n"
    with pytest.raises(ZeroDivisionError), plain_command():
        _ = 1 / 0


@pytest.mark.slow
def test_the_recipe_of_the_built_in_pair_ends_on_sigterm(tmp_path: Path) -> None:
    """With a word, and without a pair that is not whole."""
    command = [sys.executable, "-u", "-m", "decoding.tiny", "--out", str(tmp_path / "pair")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None and "training tokens" in run.stdout.readline()
        time.sleep(0.5)
        run.send_signal(signal.SIGTERM)
        _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err.rstrip().endswith("interrupted") and "Traceback" not in err
    assert not (tmp_path / "pair").exists()
