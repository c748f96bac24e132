"""Signals and mistakes in command lines, those without Hydra too."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from decoding.errors import UserError, one_line
from decoding.support import early


@contextmanager
def plain_command() -> Iterator[None]:
    """Make a mistake `error: ...` with exit code 2, Ctrl-C and SIGTERM `interrupted` with 130."""
    try:
        with terminated_as_interrupted():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except UserError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        raise SystemExit(2) from None


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Make SIGTERM (timeout, SLURM, Kubernetes) what Ctrl-C is, so that what was done is kept.

    Lightning, which would end a fit on it with exit code 0, calls a handler that it finds.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    early.begun()
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
