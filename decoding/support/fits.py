"""Fits that Ctrl-C and SIGTERM may end."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from decoding.support.secret import hide_argument


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


def this_job(*settings: str) -> str:
    """Say by which command the running job goes on with more settings: the same one, or in a sweep,
    whose jobs differ, that of this job alone.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return " ".join(["the same command", *(["with", *settings] if settings else [])])
    given = {setting.partition("=")[0] for setting in settings}
    own = [override for override in HydraConfig.get().overrides.task if override.partition("=")[0] not in given]
    alone = shlex.join([hide_argument(override) for override in own] + list(settings))
    return f"for this job of the sweep, the command without -m and with these settings alone, {alone or '(none)'},"
