"""What to draft: expected tokens against seconds, at the price of a second, ρ, the long-run rate of tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from decoding.cost_table import Costs
from decoding.support.arrays import FloatArray
from decoding.support.compiled import compiled

NODES = 512  # passes beyond cost what so many nodes do
# Tokens that things are worth, tuned on validation prompts of the built-in pair:
HOPE = 1.0  # a layer that passes, with those that follow it
REUSE = 0.1  # a layer whose drafts are all selected, whether it is reached or not: the next iteration knows them
KEPT = 0.5  # share of a draft's worth that it has where its layer is not reached
SKIP = 20.0  # a layer that fails for want of the draft: what would have been drafted below it is lost too
SCORED = -1.0  # in place of the worth of a draft that the target has scored
LEAST_CHANCE = 0.0003  # of a candidate that is worth a place


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


@compiled
def worth(chance, reach):  # type: ignore[no-untyped-def]
    """Tokens that a draft is worth, by its chance to be selected and the chance that its layer is reached."""
    return chance * (KEPT + (1.0 - KEPT) * reach)


@compiled
def sent(values, nodes, costs, rate):  # type: ignore[no-untyped-def]
    """Which drafts of a forest go to the target, [N]: the best for what their nodes cost, and what is scored already.

    Args:
        values: [N] tokens that each is worth, or SCORED.
        nodes, costs, rate: as for `best_count`.
    """
    order = np.argsort(-values, kind="mergesort")
    scored = values == SCORED
    count = best_count(values[order[: len(values) - scored.sum()]], nodes, costs, rate)
    scored[order[:count]] = True
    return scored


@compiled
def share_of(weights, log_chances, known):  # type: ignore[no-untyped-def]
    """The share of what will be selected that is below parents that the target has not scored, and their number.

    Args:
        weights: [B] of the parents.
        log_chances: [B] log π of the parents; empty for input beams.
        known: [B].
    """
    greatest, unknown, total, count = weights.max(), 0.0, 0.0, 0
    for place in range(len(weights)):
        share = math.exp(weights[place] - greatest + (log_chances[place] if len(log_chances) else 0.0))
        total += share
        if not known[place]:
            unknown += share
            count += 1
    return unknown / total, count


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

    def beams(self, chances: Sequence[float], width_value: float, least: int) -> int:
        """How many beams to ask of a layer, M.

        A text loses with 1/M: beam sampling of 1, 4 and 8 beams gives the built-in pair's -1.28, -0.38 and -0.28 nats
        a token, and -0.08 - 1.2 / M gives -1.28, -0.38 and -0.23.

        Args:
            chances: [R] that the layer passes with M = 1..R.
            width_value: tokens that a layer of very many beams in place of one is worth.
            least: M.
        """
        widths = range(least, len(chances) + 1)
        return max(widths, key=lambda width: (HOPE * chances[width - 1] - width_value / width, width))
