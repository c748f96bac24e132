"""Fits that Ctrl-C and SIGTERM may end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(what_is_kept: Callable[[], str]) -> Iterator[None]:
    """Let Ctrl-C out of a fit of Lightning as KeyboardInterrupt, and say what is kept.

    Lightning would exit with code 1, and ignore every further Ctrl-C.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as stop:
        if not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        print(what_is_kept(), file=sys.stderr)
        raise KeyboardInterrupt from None
