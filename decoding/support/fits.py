"""Fits that Ctrl-C and SIGTERM may end, and the checkpoints that they go on from."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from decoding.errors import UserError
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


def read_fit(path: str | Path, again: str) -> dict[str, Any]:
    """The checkpoint of a fit of Lightning, looked at before anything else is done.

    Args:
        again: what to do about one that is none; the end of the sentence.

    Raises:
        UserError: missing, unreadable, or not a training checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no checkpoint at {path}. {again}")
    try:
        checkpoint = load_whole(path)
    except Exception as error:  # whatever a damaged file leads to
        raise UserError(f"{path} cannot be read as a checkpoint ({type(error).__name__}). {again}") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "epoch", "optimizer_states", "loops"} <= set(checkpoint):
        raise UserError(f"{path} is not a training checkpoint of this project. {again}")
    return checkpoint


def load_whole(path: str | Path) -> Any:
    """Load what `torch.save` wrote, its checksums compared: torch itself does not look at them.

    Raises:
        BadZipFile, or whatever else damaged content leads to.
    """
    with ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise BadZipFile(damaged)
    return torch.load(path, map_location="cpu", weights_only=True)
