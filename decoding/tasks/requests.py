"""Everyday requests to an assistant, written for this project: a chat task that needs no download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from decoding.tasks.base import JsonlTask


@dataclass
class RequestsTask(JsonlTask):
    """The 120 requests beside this file, each one turn of a user; none has a reference."""

    path: str = str(Path(__file__).with_suffix(".jsonl"))
    chat: bool = True

    name = "requests"
