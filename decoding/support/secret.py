"""Keys that never reach a log, a saved config, results or a tracker: known by their setting's name,
by the environment, or by their form.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from decoding.support.files import write_whole

HIDDEN = "***"
_WORDS = r"(?:token|\w+_token|secret|\w+_secret|\w*secret_\w*key|password|passwd|\w*api_?key|credentials?)"
_NAME = re.compile(rf"(?:^|[._+]){_WORDS}$", re.IGNORECASE)
_INSIDE = re.compile(rf"(?:^|(?<=[.+{{,\s'\"])){_WORDS}['\"]?\s*[:=]\s*(?P<value>[^,}}\s]+)", re.IGNORECASE)
_FORM = re.compile(r"\bhf_[A-Za-z0-9]{20,}|\bwandb_v\d_[A-Za-z0-9_]{20,}")
_LEAST = 8  # characters: shorter values stand in other words by chance


def is_secret(name: object) -> bool:
    """True if a setting or a variable of this name holds a key."""
    return bool(_NAME.search(str(name)))


def hide(text: str) -> str:
    """A text without keys of the environment, and without what looks like a key of the hub or of
    Weights & Biases.
    """
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= _LEAST:
            text = text.replace(value, HIDDEN)
    return _FORM.sub(HIDDEN, text)


def hide_argument(argument: str) -> str:
    """'pair.token=abc' -> 'pair.token=***', '+x={token: abc}' -> '+x={token: ***}'; anything else
    as it is.
    """
    key, equals, _ = argument.partition("=")
    if equals and is_secret(key) and " " not in key:
        return f"{key}={HIDDEN}"
    return hide(_INSIDE.sub(lambda found: found[0].removesuffix(found["value"]) + HIDDEN, argument))


def without_secrets(node: Any) -> Any:
    """A plain config without keys."""
    if isinstance(node, dict):
        return {
            key: HIDDEN if isinstance(value, str) and is_secret(key) else without_secrets(value)
            for key, value in node.items()
        }
    if isinstance(node, list):
        return [without_secrets(value) for value in node]
    return hide_argument(node) if isinstance(node, str) else node


def hide_in_file(path: Path) -> None:
    """Take keys out of a YAML file of settings or of overrides that Hydra wrote; it stays as it is
    where there are none.
    """
    found = OmegaConf.to_container(OmegaConf.load(path))
    clean = without_secrets(found)
    if clean != found:
        write_whole(path, OmegaConf.to_yaml(OmegaConf.create(clean)).encode())


@contextmanager
def hidden_in_logs() -> Iterator[None]:
    """Keep keys out of all log records, and settings by name out of Hydra's, for the length of a
    block.
    """
    before = logging.getLogRecordFactory()

    def record_of(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = before(*args, **kwargs)
        hider = hide_argument if record.name.startswith("hydra") else hide
        record.msg, record.args = hider(record.getMessage()), None
        return record

    logging.setLogRecordFactory(record_of)
    try:
        yield
    finally:
        logging.setLogRecordFactory(before)
