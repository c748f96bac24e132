"""Rows that take turns over the same prompts, each in batches of its own size; a row that fails loses no other."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from decoding.baselines import Generate
from decoding.errors import UserError
from decoding.measure import OUT_OF_MEMORY, Measurement, Row, measure
from decoding.meter import EnergyMeter
from decoding.pair import ModelPair
from decoding.runner import runner_of
from decoding.tasks.base import Prompt

_COUNTERS = ("captures", "replays", "eager")


@dataclass(frozen=True)
class BenchRow:
    """A method with settings, and how many prompts it decodes together."""

    row: Row
    batch_size: int
    flags: Mapping[str, Any]
    draft: str | None = None  # instead of the pair's own

    @property
    def method(self) -> str:
        """Key of METHODS."""
        return self.row.method

    @property
    def alone(self) -> str:
        """The name without the batch size: rows that share it differ by nothing else."""
        words = [key if value is True else f"{key}={value}" for key, value in self.flags.items()]
        words += [f"draft={self.draft}"] if self.draft is not None else []
        return " ".join([self.row.name, *words])

    @property
    def name(self) -> str:
        """Such as `fixed M=2/4 w=6 γ=2 exact, batch 8`."""
        return self.alone + (f", batch {self.batch_size}" if self.batch_size > 1 else "")


@dataclass
class Turn:
    """A row's turn: some prompts decoded, in groups of its batch size."""

    repeat: int
    places: list[int]  # of the prompts
    measurements: list[Measurement]
    joules: float | None  # of the whole turn
    counters: dict[str, dict[str, int]]  # of CUDA graphs, by model


@dataclass
class Record:
    """A row with what was measured of it."""

    row: BenchRow
    generate: Generate
    pair: ModelPair  # that it decodes with
    turns: list[Turn] = field(default_factory=list)
    error: str | None = None  # a row that failed takes no further turns


def warm_up(record: Record, prompts: Sequence[Prompt]) -> None:
    """Decode prompts without measuring."""
    turn = take_turn(record, prompts, list(range(len(prompts))), 0, 0, EnergyMeter("cpu"))
    if turn is None:
        print(f"{record.row.name} failed: {record.error}", file=sys.stderr)


def run_repeats(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    repeats: int,
    seed: int,
    size: int,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Every row decodes all prompts, `size` of them in a turn; machine drift hits all rows alike.

    The order of the rows rotates from turn to turn. Equal prompts of a repeat have equal seeds in all rows.

    Yields:
        Each repeat that is done.
    """
    meter = EnergyMeter(records[0].pair.device)  # all have one target
    rounds = 0
    for repeat in range(repeats):
        for places in chunks(range(len(prompts)), size):
            for j in range(len(records)):
                record = records[(rounds + j) % len(records)]
                if record.error is None:
                    turn = take_turn(record, [prompts[i] for i in places], list(places), repeat, seed + repeat, meter)
                    if turn is not None:
                        record.turns.append(turn)
                    else:
                        print(f"{record.row.name} failed: {record.error}", file=sys.stderr)
                advance()
            rounds += 1
        yield repeat


def take_turn(
    record: Record,
    prompts: Sequence[Prompt],
    places: list[int],
    repeat: int,
    seed: int,
    meter: EnergyMeter,
) -> Turn | None:
    """Decode by one row; None if it failed, which the record then says."""
    pair = record.pair
    before, measurements, silent = graph_counters(pair), [], EnergyMeter("cpu")
    try:
        with meter:  # one window a turn: the counter moves in steps
            for group in chunks(prompts, record.row.batch_size):
                measurements += measure(record.generate, group, seed, pair.device, silent)
    except (UserError, torch.OutOfMemoryError) as error:
        record.error = sentence(error)
        if pair.device.type == "cuda":
            torch.cuda.empty_cache()
        return None
    for measurement in measurements:
        measurement.log_prob = math.nan  # until it is scored
    after = graph_counters(pair)
    counters = {
        role: {name: after[role][name] - counts.get(name, 0) for name in _COUNTERS}
        for role, counts in before.items()
        if role in after
    }
    return Turn(repeat, places, measurements, meter.joules, counters)


def graph_counters(pair: ModelPair) -> dict[str, dict[str, Any]]:
    """Captures, replays and eager passes so far of each model that runs as CUDA graphs."""
    counters = {}
    for role, model in pair.models.items():
        forward = runner_of(model, pair.engine).forward
        if all(hasattr(forward, name) for name in _COUNTERS):
            counters[role] = {name: int(getattr(forward, name)) for name in _COUNTERS}
    return counters


def chunks(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive runs of `size`; the last may be shorter."""
    return [items[first : first + size] for first in range(0, len(items), size)]


def sentence(error: BaseException) -> str:
    """What to tell the user of a failure."""
    return str(error) if isinstance(error, UserError) else OUT_OF_MEMORY
