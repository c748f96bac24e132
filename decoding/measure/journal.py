"""Turns that an evaluation has taken, a line each: a run that was stopped or killed goes on from
there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from decoding.errors import UserError
from decoding.machine.meter import Reading
from decoding.policies.base import IterationRecord, LayerRecord
from decoding.results import DecodeStats
from decoding.support.files import write_whole
from decoding.support.in_use import LOCK
from decoding.tasks.base import Prompt

PAGE = "progress.md"
Counters = dict[str, Counter[str]]


@dataclasses.dataclass
class Measurement:
    """One prompt decoded by one row."""

    prompt_id: str
    wall_seconds: float
    joules: float | None
    stats: DecodeStats
    tokens: list[int]  # best hypothesis
    finished: bool
    log_prob: float = float("nan")  # of `tokens` under the target at temperature 1, summed; NaN until it is scored
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    text: str | None = None
    readings: list[Reading] = dataclasses.field(default_factory=list)  # of the turn, with the first of its prompts

    def to_dict(self) -> dict[str, Any]:
        """The measurement as results.json holds it, JSON-able; readings have a file of their own."""
        told = vars(self) | {"stats": self.stats.to_dict()}
        return {name: value for name, value in told.items() if name != "readings"}

    @classmethod
    def restored(cls, told: Mapping[str, Any]) -> Measurement:
        """A measurement again from `dataclasses.asdict` of it, by way of JSON."""
        records = [_iteration(record) for record in told["stats"]["records"]]
        readings = [Reading(*reading) for reading in told["readings"]]
        return cls(**{**told, "readings": readings, "stats": DecodeStats(**{**told["stats"], "records": records})})


class Journal:
    """Turns by row, repeat and prompts, in a file that is named after everything they depend on.

    Each line is whole or left out: it begins with a digest of itself. A run with other settings has
    a file of its own beside it.

    Args:
        directory: of the run; made with the first turn.
        about: whatever the measurements depend on, JSON-able.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:12]
        self._directory, self.path = directory, directory / f"unfinished-{key}.jsonl"
        self._turns: dict[str, tuple[list[Measurement], Counters]] = {}
        if not self.path.exists():
            self._take_over()
        if self.path.exists():
            self._read()
            print(f"Going on from {len(self._turns)} turns that are in {self.path}.", file=sys.stderr)
        elif found := next(directory.glob("unfinished-*.jsonl"), None):
            print(
                f"{found} is of other settings, code or prompts: it stays, and this run begins anew.", file=sys.stderr
            )

    def recall(self, turn: Sequence[Any], prompts: Sequence[Prompt]) -> tuple[list[Measurement], Counters] | None:
        """Recall what a turn gave in an earlier run, and the row's counters after it; None if it is
        still to take.
        """
        return self._turns.get(_name(turn, prompts))

    def add(self, turn: Sequence[Any], prompts: Sequence[Prompt], found: list[Measurement], counters: Counters) -> None:
        """Keep what a turn gave.

        Raises:
            UserError: it cannot be written.
        """
        told = {
            "turn": _name(turn, prompts),
            "measured": [dataclasses.asdict(measurement) for measurement in found],
            "counters": counters,
        }
        line = json.dumps(told, default=lambda value: value.item()).encode()  # NumPy's numbers
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab") as file:
                file.write(_digest(line) + b" " + line + b"\n")
        except OSError as error:
            raise UserError(
                f"{self.path} cannot be written ({error.strerror}). Make room, or give another directory; the same "
                "command goes on from what is there."
            ) from error

    def tell(self, done: int, prompts: int) -> None:
        """Write on a page how many prompts all rows have decoded."""
        page = f"{done} of {prompts} prompts are in.\n\nThe same command goes on from there.\n"
        write_whole(self._directory / PAGE, page.encode())

    def close(self) -> None:
        """The results are written: forget the turns."""
        for path in (self.path, self._directory / PAGE):
            path.unlink(missing_ok=True)

    def _take_over(self) -> None:
        """Move the turns of a dead run with the same settings, in the folder beside, to this one's."""
        for path in sorted(self._directory.parent.glob(f"*/{self.path.name}")):
            try:
                with FileLock(path.parent / LOCK, blocking=False):
                    self._directory.mkdir(parents=True, exist_ok=True)
                    os.replace(path, self.path)
                    (path.parent / PAGE).unlink(missing_ok=True)
                return
            except (Timeout, OSError):  # it is alive, or somebody else's
                continue

    def _read(self) -> None:
        """Read the lines that are whole; drop others, such as one that a kill cut short."""
        lines = self.path.read_bytes().split(b"\n")
        whole = [line for line in lines if line[:16] == _digest(line[17:])]
        for line in whole:
            told = json.loads(line[17:])
            counters = {model: Counter(counts) for model, counts in told["counters"].items()}
            self._turns[told["turn"]] = [Measurement.restored(each) for each in told["measured"]], counters
        write_whole(self.path, b"".join(line + b"\n" for line in whole))


def _name(turn: Sequence[Any], prompts: Sequence[Prompt]) -> str:
    return json.dumps([*turn, [prompt.id for prompt in prompts]])


def _digest(line: bytes) -> bytes:
    return hashlib.sha256(line).hexdigest()[:16].encode()


def _iteration(told: Mapping[str, Any]) -> IterationRecord:
    """A record with tuples where JSON has lists."""
    layers = tuple(LayerRecord(**layer) for layer in told["layers"])
    tuples = {name: tuple(told[name]) for name in ("drafts", "draft_passes")}
    return IterationRecord(**{**told, **tuples, "layers": layers})
