"""The command that shows what a pass costs by the number of nodes scored, and what the host adds.

    python -m decoding.latency pair=... [output=table.json]     seconds, measured or kept
    python -m decoding.latency pair=... latency=joules          joules, on an NVIDIA GPU

conf/latency.yaml has every setting.
"""

from __future__ import annotations

from pathlib import Path

from hydra.utils import instantiate
from omegaconf import DictConfig

from decoding import cost_table
from decoding.cost_table import BUSY
from decoding.errors import UserError
from decoding.machine.seconds import measure_seconds
from decoding.support.entry import entry_point
from decoding.support.files import json_bytes, write_whole


class LatencyTable:
    """Ways to a `decoding.cost_table.LatencyTable`, by the names that configs know."""

    load = staticmethod(cost_table.LatencyTable.load)
    measure = staticmethod(measure_seconds)


@entry_point("latency")
def main(cfg: DictConfig) -> cost_table.LatencyTable:
    """Print the table that conf/latency.yaml describes, write it to `output`, and return it."""
    made = instantiate(cfg.latency)
    table: cost_table.LatencyTable = (
        made(instantiate(cfg.pair)) if callable(made) else made
    )  # a modelled one needs no pair
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


def described(table: cost_table.LatencyTable) -> str:
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


if __name__ == "__main__":
    main()
