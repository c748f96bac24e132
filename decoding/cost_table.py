"""Costs of passes: the table of one device and pair, and the cost of an iteration by it. Data and
arithmetic only.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from decoding.errors import UserError
from decoding.support.checks import choice, is_number, is_whole, number

NODE_COUNTS = (1, 2, 4, 8, 16, 32)  # sizes of the passes that are measured or modelled
UNITS = ("seconds", "joules")
BUSY = 0.25  # spread above which a table serves this process only: something else was running


class Costs(Protocol):
    """Seconds or joules of passes and of the host; a `LatencyTable` is one."""

    def draft_cost(self, nodes: float) -> float:
        """Cost of a draft pass that scores `nodes` nodes."""
        ...

    def target_cost(self, nodes: float) -> float:
        """Cost of a target pass that scores `nodes` nodes."""
        ...

    def host_cost(self, layers: int) -> float:
        """Cost of all else in an iteration that drafts `layers` layers."""
        ...


@dataclass(frozen=True)
class LatencyTable:
    """Costs of one pass of each model at `nodes` scored nodes (linear in between, extrapolated
    beyond), and of the host.

    A pass costs what its number of nodes costs, whatever tree they form: the mask decides who sees
    whom, not what is computed (8 nodes below one beam, or 4 with a child each: the same within 1%
    on a CPU).

    Args:
        nodes: increasing, two or more.
        target, draft: cost of a pass at each of `nodes`.
        device: in words.
        iteration: the host's cost of an iteration that drafts nothing: slots and masks, joints,
            draws, bookkeeping.
        layer: the host's cost that each drafted layer adds: joints of both models, draws,
            verification.
        unit: "seconds" or "joules".
        spread: interquartile range of repeated passes over their median, at a typical size; None:
            not known.
        measured: date (UTC, ISO 8601); None: not measured here.
        file: where the table is kept; not part of what it says.

    Raises:
        UserError: numbers that no passes can have.
    """

    nodes: tuple[int, ...]
    target: tuple[float, ...]
    draft: tuple[float, ...]
    device: str = "cpu"
    iteration: float = 0.0
    layer: float = 0.0
    unit: str = "seconds"
    spread: float | None = None
    measured: str | None = None
    file: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        nodes = self.nodes
        counts = all(is_whole(n) and n >= 1 for n in nodes)
        if not counts or len(nodes) < 2 or any(a >= b for a, b in itertools.pairwise(nodes)):
            raise UserError(
                f"nodes of a latency table is {list(nodes)}; give two or more whole numbers from 1 on, increasing."
            )
        for name in ("target", "draft"):
            costs = getattr(self, name)
            if len(costs) != len(nodes) or not all(is_number(cost) and cost > 0 for cost in costs):
                raise UserError(
                    f"{name} of a latency table is {list(costs)}; give {len(nodes)} numbers above 0, one for each of "
                    "nodes."
                )
        for name in ("iteration", "layer"):
            number(f"{name} of a latency table", getattr(self, name), least=0)
        choice("unit of a latency table", self.unit, UNITS)

    def target_cost(self, nodes: float) -> float:
        """Cost of a target pass that scores `nodes` nodes."""
        return self._at(self.target, nodes)

    def draft_cost(self, nodes: float) -> float:
        """Cost of a draft pass that scores `nodes` nodes."""
        return self._at(self.draft, nodes)

    def host_cost(self, layers: int) -> float:
        """Cost of the host in an iteration that drafts `layers` layers, a policy's own aside."""
        return self.iteration + self.layer * layers

    def _at(self, costs: tuple[float, ...], nodes: float) -> float:
        if nodes <= 0:
            return 0.0
        if nodes > self.nodes[-1]:
            slope = (costs[-1] - costs[-2]) / (self.nodes[-1] - self.nodes[-2])
            return costs[-1] + max(0.0, slope) * (nodes - self.nodes[-1])
        return float(np.interp(nodes, self.nodes, costs))

    def to_dict(self) -> dict[str, Any]:
        """The table as a JSON-able mapping, without where it is kept."""
        table = asdict(replace(self, file=None))
        del table["file"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in table.items()}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> LatencyTable:
        """The inverse of `to_dict`; nodes, target and draft suffice.

        Raises:
            UserError: names that are missing or unknown, or numbers that no passes can have.
        """
        names = [part.name for part in fields(cls) if part.name != "file"]
        if not isinstance(table, Mapping):
            raise UserError(f"A latency table is {table!r}; give a mapping of {', '.join(names)}.")
        wrong = [f"{name} is unknown" for name in table if name not in names]
        wrong += [f"{name} is missing" for name in ("nodes", "target", "draft") if name not in table]
        for name in ("nodes", "target", "draft"):
            if name in table and (isinstance(table[name], str) or not isinstance(table[name], Sequence)):
                wrong.append(f"{name} is no list")
        if wrong:
            raise UserError(f"A latency table takes {', '.join(names)}; {', '.join(wrong)}.")
        lists = {name: tuple(table[name]) for name in ("nodes", "target", "draft")}
        return cls(**{**table, **lists})

    @classmethod
    def load(cls, path: str | Path) -> LatencyTable:
        """A table from a JSON file of its `to_dict`, as `python -m decoding.latency output=...`
        writes.

        Raises:
            UserError: no such file, or not such a table.
        """
        try:
            table = json.loads(Path(path).expanduser().read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"The latency table {str(path)!r} cannot be read ({error}); give a JSON file that "
                "python -m decoding.latency output=<file> wrote."
            ) from error
        return replace(cls.from_dict(table), file=Path(path))


@dataclass(frozen=True)
class UnitCosts:
    """Costs in units of one target pass, for when nothing has been measured."""

    draft_base: float = 0.25
    target_base: float = 1.0
    per_node: float = 0.01

    def draft_cost(self, nodes: float) -> float:
        """Cost of a draft pass, affine in `nodes`."""
        return self.draft_base + self.per_node * nodes

    def target_cost(self, nodes: float) -> float:
        """Cost of a target pass, affine in `nodes`."""
        return self.target_base + self.per_node * nodes

    def host_cost(self, layers: int) -> float:
        """Cost of the host, which is nothing here."""
        return 0.0


def costs_digest(costs: Costs) -> str:
    """Hash of what a table says, in hex; equal for tables that give equal costs, whoever measured
    them and when.
    """
    nodes = [*range(1, 257), 512, 1024, 4096]
    said = [[costs.draft_cost(n), costs.target_cost(n)] for n in nodes], [costs.host_cost(n) for n in (0, 1)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def iteration_seconds(costs: Costs, widths: Sequence[int], roots: int) -> float:
    """Cost of an iteration: a draft pass per layer over the nodes above it, one target pass over
    all, the host.

    Args:
        widths: drafts of each layer that was drafted.
        roots: input beams.
    """
    above = [roots, *widths[:-1]] if widths else []
    passes = sum(costs.draft_cost(nodes) for nodes in above) + costs.target_cost(roots + sum(widths))
    return passes + costs.host_cost(len(widths))
