"""What to draft: expected tokens against seconds, at the price of a second, ρ, the long-run rate of tokens."""

from __future__ import annotations

import numpy as np

from decoding.cost_table import Costs
from decoding.support.arrays import FloatArray, FloatVector
from decoding.support.compiled import compiled

NODES = 512  # passes beyond cost what so many nodes do
# Tokens that things are worth, tuned on validation prompts of the built-in pair:
HOPE = 1.5  # a layer that passes, with those that follow it
REUSE = 0.15  # a layer whose drafts are all selected, whether it is reached or not: the next iteration knows them
KEPT = 0.5  # share of a draft's worth that it has where its layer is not reached
SKIP = 6.0  # a layer that fails for want of the draft: what would have been drafted below it is lost too
LEAST_CHANCE = 0.003  # of a candidate that is worth a place


@compiled
def best_count(values, first, costs, rate):  # type: ignore[no-untyped-def]
    """How many of some nodes to send, k: the greatest of the sum of the first k values less ρ times the seconds.

    Args:
        values: [N] tokens that each is worth, falling.
        first: nodes that the pass has anyway.
        costs: [NODES] seconds of a pass by its nodes.
        rate: ρ.
    """
    last = len(costs) - 1
    total, best, count = 0.0, 0.0, 0
    for place in range(len(values)):
        total += values[place] - rate * (costs[min(first + place + 1, last)] - costs[min(first + place, last)])
        if total > best:
            best, count = total, place + 1
    return count


class Plan:
    """Prices of nodes, passes and layers on one device.

    Args:
        costs: of the device.
    """

    def __init__(self, costs: Costs) -> None:
        nodes = range(NODES)
        self.draft: FloatArray = np.array([costs.draft_cost(n) if n else 0.0 for n in nodes], dtype=np.float64)
        self.target: FloatArray = np.array([costs.target_cost(n) if n else 0.0 for n in nodes], dtype=np.float64)
        self.iteration = float(costs.host_cost(0))
        self.layer = float(costs.host_cost(1)) - self.iteration
        # A candidate is scored by the target and, where a further layer is drafted, by the draft too.
        self.both: FloatArray = self.target + np.maximum(self.draft - self.draft[1], 0.0)

    def seconds(self, target_nodes: int, draft_passes: tuple[int, ...], layers: int) -> float:
        """What an iteration costs."""
        last = NODES - 1
        spent = self.iteration + self.layer * layers + float(self.target[min(target_nodes, last)])
        return spent + sum(float(self.draft[min(nodes, last)]) for nodes in draft_passes)

    def plain_seconds(self, roots: int) -> float:
        """What an iteration costs that drafts nothing: one token."""
        return self.seconds(roots, (), 0)

    def goes_deeper(self, chance: float, covered: float, draft_nodes: int, rate: float) -> bool:
        """Whether to draft a further layer.

        Args:
            chance: that it is reached and passes.
            covered: share of the selection above that is expected among its parents.
            draft_nodes: parents that need a draft pass.
            rate: ρ.
        """
        worth = HOPE * chance + REUSE * covered
        return worth >= rate * (float(self.draft[min(draft_nodes, NODES - 1)]) + self.layer)

    def asks_draft(self, reach: float, share: float, target_width: int, nodes: int, rate: float) -> bool:
        """Whether to run the draft for parents that hold a share of what will be selected.

        Without it the layer can only pass if the whole selection comes from the others.
        """
        lost = reach * (1.0 - (1.0 - share) ** target_width)
        return lost * SKIP >= rate * float(self.draft[min(nodes, NODES - 1)])

    def worth(self, chances: FloatVector, reach: float) -> FloatVector:
        """Tokens that drafts are worth, by their chances to be selected and the chance that their layer is reached."""
        return chances * np.float32(KEPT + (1.0 - KEPT) * reach)

    def count(self, values: FloatArray | FloatVector, nodes: int, rate: float, both: bool = False) -> int:
        """How many of the fresh drafts of falling worth to send; `both`: a draft pass over them may follow."""
        return int(best_count(values.astype(np.float64), nodes, self.both if both else self.target, rate))
