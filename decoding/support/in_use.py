"""Directories that one run at a time writes into."""

from __future__ import annotations

import functools
import getpass
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from decoding.errors import UserError

# A lock of the system, which goes with its process, and the name of who holds it.
LOCK, OWNER = ".lock", ".in_use"
_UNFINISHED = re.compile(r"\.\d+\.(tmp|partial)$")  # by the number of the process that was writing it


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory, which is made, while this one writes into it.

    A run that was killed leaves its name behind, but no lock: that is said, and the next goes on.
    Files that it had not written to the end are removed.

    Raises:
        UserError: another run is at work there, or nothing can be written there.
    """
    lock, owner = FileLock(directory / LOCK), directory / OWNER
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
        if owner.exists():
            print(f"warning: {_described(owner)} ended in {directory} without a word; going on there.", file=sys.stderr)
        owner.write_text(json.dumps(_this_process()))
        for path in directory.iterdir():
            if _UNFINISHED.search(path.name):
                path.unlink(missing_ok=True)
    except Timeout:
        raise UserError(
            f"{directory} is in use by {_described(owner)}; wait for its end, or give another directory."
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(f"{directory} cannot be written ({error.strerror}); give another directory.") from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


@functools.cache  # Hydra asks anew for each job of a sweep
def fresh_folder(wanted: str) -> str:
    """Make a folder that no other run has; the one wanted, or one with -2, -3, ... behind it."""
    for number in range(1, sys.maxsize):
        folder = wanted if number == 1 else f"{wanted}-{number}"
        try:
            os.makedirs(folder)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{folder} cannot be made ({error.strerror}); give another hydra.run.dir.") from error
        return folder
    raise AssertionError


def _this_process() -> dict[str, str]:
    """Describe who runs this, where and since when."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"user": user, "host": socket.gethostname(), "process": str(os.getpid()), "since": began}


def _described(owner: Path) -> str:
    """Say who holds a directory, as far as it can be read."""
    try:
        about = json.loads(owner.read_text())
        return f"process {about['process']} of {about['user']} on {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is just being written
        return "another process"
