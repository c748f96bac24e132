"""What an iteration costs by a table: the passes that it consists of, and the host."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Protocol


class Costs(Protocol):
    """Seconds, or joules, of passes over a number of nodes and of the host; a `LatencyTable` is one."""

    def draft_seconds(self, nodes: float) -> float:
        """Of a draft pass over so many nodes."""
        ...

    def target_seconds(self, nodes: float) -> float:
        """Of a target pass over so many nodes."""
        ...

    def host_seconds(self, layers: int) -> float:
        """Of all else in an iteration that drafts so many layers."""
        ...


def costs_digest(costs: Costs) -> str:
    """Hash of what a table says, in hex; equal for tables that give equal costs, whoever measured them and when."""
    nodes = [*range(1, 257), 512, 1024, 4096]
    said = [[costs.draft_seconds(n), costs.target_seconds(n)] for n in nodes], [costs.host_seconds(n) for n in (0, 1)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def iteration_seconds(costs: Costs, widths: Sequence[int], roots: int) -> float:
    """Modelled seconds of an iteration: a draft pass per layer over the nodes above it, one target pass over all.

    Args:
        widths: drafts of each layer that was drafted.
        roots: input beams.
    """
    above = [roots, *widths[:-1]] if widths else []
    passes = sum(costs.draft_seconds(nodes) for nodes in above) + costs.target_seconds(roots + sum(widths))
    return passes + costs.host_seconds(len(widths))
