"""Ctrl-C and SIGTERM while a command imports: a word and 130; programs of others keep their own signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Runs before the program: whoever imports a certain module meets a signal there.
SITE = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["SIGNAL_AT"] and sys.meta_path[0] is self:
            del sys.meta_path[0]
            os.kill(os.getpid(), int(os.environ["SIGNAL"]))

sys.meta_path.insert(0, Finder())
"""
COMMANDS = [
    *(["-m", f"decoding.{name}"] for name in ("bench", "collect", "generate", "latency", "report", "tiny")),
    ["-m", "decoding.train_draft"],
    ["-m", "controller.publish", "a", "b/c"],
    *(["-m", f"studies.{name}"] for name in ("draft_kinds", "equal_tokens", "sixteen_bits")),
    ["train.py"],
    ["evaluate.py"],
]


def run(tmp_path: Path, command: list[str], module: str, number: int) -> tuple[int, str]:
    """Exit status and what is said on standard error, of a command that meets a signal in an import."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "SIGNAL_AT": module, "SIGNAL": str(number)}
    ran = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )
    return ran.returncode, ran.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_a_signal_during_imports_is_a_word(tmp_path: Path, command: list[str]) -> None:
    assert run(tmp_path, command, "torch", signal.SIGINT) == (130, "interrupted\n")


@pytest.mark.parametrize("module", ["torch", "lightning", "decoding.collect"])
def test_sigterm_and_later_imports(tmp_path: Path, module: str) -> None:
    assert run(tmp_path, ["train.py"], module, signal.SIGTERM) == (130, "interrupted\n")


def test_programs_of_others_keep_their_signals(tmp_path: Path) -> None:
    """A script, a module, and code that import the packages: Python's own ending."""
    (tmp_path / "mine.py").write_text("import decoding, controller")
    for command in (["-m", "mine", "decoding.bench"], ["-c", "import decoding"], [str(tmp_path / "mine.py")]):
        status, said = run(tmp_path, command, "torch", signal.SIGINT)
        assert status == -signal.SIGINT and said.rstrip().endswith("KeyboardInterrupt"), command


def test_whoever_ignores_a_signal_goes_on_to(tmp_path: Path) -> None:
    """As with nohup, and behind & in a script."""
    (tmp_path / "sitecustomize.py").write_text("import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)" + SITE)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths, "SIGNAL_AT": "torch", "SIGNAL": str(int(signal.SIGINT))}
    command = [sys.executable, "-m", "controller.publish", "--help"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "owner/name" in ran.stdout, ran.stderr
