"""Files that are whole or not there, and the folder for what may be made again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decoding.errors import UserError


def cache_root() -> Path:
    """The directory that DSBD_CACHE names; without it dsbd/ in XDG_CACHE_HOME, or in ~/.cache."""
    own = os.environ.get("DSBD_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    base = shared if os.path.isabs(shared) else os.path.expanduser("~/.cache")  # the standard ignores relative ones
    return Path(base) / "dsbd"


def write_whole(path: Path, content: bytes) -> Path:
    """Write to a temporary name beside the file, then rename: the file is never half there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def inside(folder: Path, name: Any) -> Path:
    """The path of a file that a manifest or a row of data names, in the folder that it lies in.

    Raises:
        UserError: the name leads out of the folder.
    """
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise UserError(f"{name!r} is no name of a file in {folder}; take data whose files lie beside one another.")
    return folder / name


def json_bytes(results: Any) -> bytes:
    """Results as JSON; NaN and infinities, which it has not, become null."""
    return json.dumps(_finite(results), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {str(key): _finite(value) for key, value in node.items()}
    if isinstance(node, Sequence) and not isinstance(node, str | bytes):  # Hydra's lists too
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
