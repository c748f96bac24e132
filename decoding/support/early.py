"""Ctrl-C and SIGTERM while a command of this project still imports: a word, and exit code 130.

The packages that hold commands, and train.py and evaluate.py, import this first; what they import
then takes seconds. Programs of anybody else, which import the packages too, are left alone.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

_PACKAGES, _SCRIPTS = ("controller", "decoding", "studies"), ("evaluate.py", "train.py")
_ROOT = Path(__file__).resolve().parents[2]
_BEFORE: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


def begun() -> None:
    """The command has begun, and handles signals by itself."""
    for number, before in _BEFORE.items():
        if signal.getsignal(number) is _end:
            signal.signal(number, before)


def _end(*_: object) -> None:
    """End at once: an exception could be caught, or worded anew, by the library being imported."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def _is_command() -> bool:
    """True if the program that is running is a command of this project, and no worker of one."""
    if multiprocessing.parent_process() is not None:
        return False
    if sys.argv[:1] == ["-m"]:  # its package is imported before the module is found
        pairs = itertools.pairwise(sys.orig_argv)
        module = next((word for option, word in pairs if option[:1] == "-" and option[-1] == "m"), "")
        return module.partition(".")[0] in _PACKAGES
    file = getattr(sys.modules["__main__"], "__file__", None)
    return file is not None and Path(file).resolve() in [_ROOT / name for name in _SCRIPTS]


if _is_command():
    for number, before in _BEFORE.items():
        if signal.getsignal(number) is before:  # whoever ignores it, as nohup does, goes on to
            signal.signal(number, _end)
