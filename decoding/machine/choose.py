"""The table of costs to plan with: measured here, kept, modelled or given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from decoding.cost_table import UNITS, LatencyTable
from decoding.errors import UserError
from decoding.machine.joules import measure_joules
from decoding.machine.seconds import measure_seconds
from decoding.pairs.pair import ModelPair
from decoding.support.checks import choice

Given: TypeAlias = LatencyTable | Mapping[str, Any] | str | Path | Callable[[ModelPair], LatencyTable]


def cost_table(pair: ModelPair, latency: Given | None = None, objective: str | None = None) -> LatencyTable:
    """The table of costs of passes and of the host, in the unit of an objective.

    Args:
        pair: whose passes, where they are measured.
        latency: a table, its `to_dict`, the JSON file of that, or a function of the pair that gives
            one, as conf/latency/measured.yaml builds; None: measured here in the objective's unit,
            or kept since.
        objective: "seconds" or "joules"; None: whatever the table is in, seconds where it is
            measured.

    Raises:
        UserError: a table that cannot be read, or that is in another unit than the objective; what
            cannot be measured.
    """
    if objective is not None:
        choice("objective", objective, UNITS)
    if latency is None:
        return measure_joules(pair) if objective == "joules" else measure_seconds(pair)
    if isinstance(latency, str | Path):
        table = LatencyTable.load(latency)
    elif isinstance(latency, Mapping):
        table = LatencyTable.from_dict(latency)
    elif isinstance(latency, LatencyTable):
        table = latency
    elif callable(latency):
        table = latency(pair)
    else:
        raise UserError(
            f"latency is {latency!r}; give a LatencyTable, its to_dict(), a JSON file of that, or null to measure one."
        )
    if objective not in (None, table.unit):
        raise UserError(
            f"objective is {objective!r}, but the latency table is in {table.unit}; give a table in {objective}, "
            "such as python -m decoding.latency makes."
        )
    return table
