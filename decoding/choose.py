"""Which table of costs to plan with: measured, kept, modelled or given. And the command that shows it.

python -m decoding.latency pair=...              seconds, measured or kept
python -m decoding.latency pair=... latency=joules
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from hydra.utils import instantiate
from omegaconf import DictConfig

from decoding.energy import measure_joules
from decoding.entry import entry_point
from decoding.errors import UserError
from decoding.files import json_bytes, write_whole
from decoding.latency import BUSY, UNITS, LatencyTable
from decoding.pair import ModelPair

Given: TypeAlias = LatencyTable | Mapping[str, Any] | str | Path | Callable[[ModelPair], LatencyTable]


def cost_table(pair: ModelPair, latency: Given | None = None, objective: str | None = None) -> LatencyTable:
    """What passes and the host cost, in the unit of an objective.

    Args:
        pair: whose passes, where they are measured.
        latency: a table, its `to_dict`, the JSON file of that, or a function of the pair that gives one, as
            conf/latency/measured.yaml builds; None: measured here in the objective's unit, or kept since.
        objective: "seconds" or "joules"; None: whatever the table is in, seconds where it is measured.

    Raises:
        UserError: a table that cannot be read, or that is in another unit than the objective; what cannot be measured.
    """
    if objective not in (None, *UNITS):
        raise UserError(f"objective is {objective!r}; choose one of {', '.join(UNITS)}.")
    if latency is None:
        return measure_joules(pair) if objective == "joules" else LatencyTable.measure(pair)
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


@entry_point("latency")
def main(cfg: DictConfig) -> LatencyTable:
    """Print the table that conf/latency.yaml describes, write it where `output` says, and return it."""
    made = instantiate(cfg.latency)
    table: LatencyTable = made(instantiate(cfg.pair)) if callable(made) else made  # a modelled one needs no pair
    print(described(table))
    if cfg.output is not None:
        path = Path(cfg.output)
        try:
            write_whole(path, json_bytes(table.to_dict()))
        except OSError as error:
            raise UserError(
                f"output is {str(path)!r}, which cannot be written ({error}); give another file."
            ) from error
        print(f"table: {path}")
    return table


def described(table: LatencyTable) -> str:
    """A table in a few lines of text."""
    scale, unit = (1000, "ms") if table.unit == "seconds" else (1, "joules")
    about = [table.device, f"measured {table.measured}" if table.measured else "not measured here"]
    about += [] if table.spread is None else [f"passes spread by {table.spread:.0%}"]
    lines = ["; ".join(about), "", f"{'nodes':>5}  {f'target {unit}':>14}  {f'draft {unit}':>14}"]
    for nodes, target, draft in zip(table.nodes, table.target, table.draft, strict=True):
        lines.append(f"{nodes:>5}  {scale * target:>14.4g}  {scale * draft:>14.4g}")
    iteration, layer = scale * table.iteration, scale * table.layer
    lines += ["", f"host: {iteration:.3g} {unit} an iteration, {layer:.3g} {unit} a drafted layer"]
    if table.file is not None:
        lines.append(f"kept in {table.file}")
    elif table.spread is not None and table.spread > BUSY:
        lines.append("not kept: the machine was busy, measure again when it is not")
    return "\n".join(lines)
