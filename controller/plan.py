"""Plans: predictions and a latency table -> w, M and depth, by expected reward against ρ times seconds.

The reward of a committed layer is `1 - width_value * L(k)`: a token, less the price of what is lost by keeping only its
first k slots; L is the mean of nats of the final best hypothesis and of the chance that it is lost, so that
`width_value` is what a nat is worth in tokens, and what the whole of it is. A layer that is reached is committed
whether it passes or not; passing lets the next one be committed as well, and those below it be reached. What is
maximised is the long-run reward per second, so time costs ρ, that very rate, tracked on line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from controller.experience import Outlook
from controller.features import Packed
from controller.host import HostNet, LateWeights, foresee, late_loss
from decoding.config import DecodingConfig
from decoding.cost_table import Costs
from decoding.dice.closed_form import accept_probabilities, accepted_count_table, matched
from decoding.policies.base import LayerRecord
from decoding.support.arrays import FloatArray, FloatVector
from decoding.support.compiled import compiled

_TABLE = 512  # node counts whose seconds are looked up; larger forests count as this


class Planner:
    """Decides widths and depth by expected reward against ρ times seconds.

    Args:
        costs: seconds of the passes.
        width_value: price of a unit of loss, in tokens; the quality / speed knob, >= 0.
    """

    def __init__(self, costs: Costs, width_value: float) -> None:
        self.costs, self.width_value = costs, width_value
        nodes = range(_TABLE)
        self._table = CostTable(
            np.array([costs.draft_cost(n) for n in nodes], dtype=float),
            np.array([costs.target_cost(n) for n in nodes], dtype=float),
            float(costs.host_cost(1) - costs.host_cost(0)),
        )
        self._packed = tuple(self._table)

    def widths(
        self,
        host: HostNet,
        features: FloatVector,
        hidden: tuple[FloatVector, FloatVector],
        config: DecodingConfig,
        outlook: Outlook,
        rate: float,
        reach: float,
        layer: int,
        deepest: int,
        nodes: int,
        support: int,
    ) -> Decision:
        """The best (w, M) of a layer, by what is known before its drafts are drawn.

        Args:
            host: its early heads are asked.
            features: of the layer, [F].
            hidden: the draft's and the target's hidden vector, empty where not used.
            outlook: of the layers below.
            rate: ρ.
            reach: probability that the layer is reached.
            layer, deepest: the layer, from 1, and the last one that may be drafted.
            nodes: nodes that the target will score without this layer.
            support: entries of Q: no more drafts of the layer exist, but with replacement.
        """
        most = config.draft_width if config.replacement else support
        return plan_features(
            features,
            *hidden,
            host.early,
            outlook.prospect,
            self._packed,
            rules_of(config),
            self.width_value,
            rate,
            reach,
            layer,
            deepest,
            nodes,
            max(config.min_width, min(config.draft_width, most)),
        )

    def seconds(self, widths: Sequence[int], roots: int) -> float:
        """`cost_table.iteration_seconds` from this planner's own tables."""
        draft, target = self._table.draft, self._table.target
        above, last, spent = roots, _TABLE - 1, self.costs.host_cost(len(widths))
        for width in widths:
            spent += draft[min(above, last)]
            above = width
        return float(spent + target[min(roots + sum(widths), last)])

    def bearable_width(
        self, host: HostNet, features: FloatVector, config: DecodingConfig, further: float
    ) -> tuple[int, FloatArray]:
        """The best M of a layer that is reached, where it `settles_alone`, with the late loss that it is set by.

        More than w is a choice too: the layer cannot pass, and is filled as the config says.

        Args:
            host: its late heads are asked.
            features: of the layer with its P, [G].
            further: of its plan. Which layers were drafted below since then may not count (design 5.4).
        """
        return judge_bearable(features, host.late, self.width_value, further, config.min_width, config.target_width)

    def counted_width(
        self,
        host: HostNet,
        features: FloatVector,
        joints: tuple[Packed, Packed],
        draft_width: int,
        config: DecodingConfig,
        further: float,
    ) -> tuple[int, FloatArray]:
        """The best M of a layer that is reached, where P(K_w >= M) matters, with the late loss that it is set by.

        Args:
            host, features, further: as for `bearable_width`.
            joints: P and Q, whose P(K_w >= M) has a closed form; each its parents, tokens and probabilities.
            draft_width: w.
        """
        return judge_counted(features, *joints, draft_width, host.late, self.width_value, further, rules_of(config))

    def final_width(
        self, host: HostNet, features: FloatVector, config: DecodingConfig, rate: float
    ) -> tuple[int, FloatArray]:
        """M of the layer that the target draws, with the late loss that it is set by.

        What is lost counts against carrying M beams into the next iteration.
        """
        ends, rate = (config.min_width, config.target_width), _carried(rate, config)
        place = self.width_value, rate, self._packed, config.draft_depth > 0, *ends
        return judge_final(features, host.late, *place)

    def worth_drafting(
        self,
        outlook: Outlook,
        rate: float,
        reach: float,
        layer: int,
        deepest: int,
        parents: int,
        nodes: int,
        width: int,
    ) -> bool:
        """Whether one more layer pays, with those that could follow it.

        Args:
            outlook, rate, reach, layer, deepest, nodes: as for `widths`.
            parents: nodes that the draft pass scores.
            width: likely draft width.
        """
        place = rate, reach, layer, deepest, parents, nodes, width
        return worth_drafting(outlook.prospect, self._packed, *place)


def settles_alone(config: DecodingConfig) -> bool:
    """Whether M can be set without knowing P(K_w >= M): all that is accepted goes on, or all slots are filled.

    Then M only says with which counts a layer passes, and each count speaks for itself.
    """
    return config.surplus == "keep" and config.refill == "full"


def rules_of(config: DecodingConfig) -> Packed:
    """What compiled plans need to know of a config: `Rules`."""
    return config.min_width, config.target_width, config.surplus == "keep", config.refill == "full"


def kept_width(record: LayerRecord, config: DecodingConfig) -> int:
    """Beams that a committed layer kept, finished ones included, as far as M and the coins tell."""
    if record.draft_width == 0:
        return record.target_width
    if not record.passed:
        return config.target_width if config.refill == "full" else record.target_width
    return min(record.accepted, config.target_width) if config.surplus == "keep" else record.target_width


def _carried(rate: float, config: DecodingConfig) -> float:
    """ρ of beams that the next iteration starts with: nothing where it starts with one."""
    return 0.0 if config.one_beam_cache else rate


# Compiled: what one layer's decision takes. Records come as plain tuples.


class Rules(NamedTuple):
    """Which M there are, and how many beams go on."""

    least: int
    most: int  # the config's target_width
    keep: bool  # accepted drafts beyond M go on, up to `most`; else M beams
    full: bool  # a failed layer is filled to `most`; else to its own M


class CostTable(NamedTuple):
    """Seconds by nodes, up to the longest forest; the last entry counts beyond."""

    draft: FloatArray
    target: FloatArray
    layer: float  # the host's, of a drafted layer


class Prospect(NamedTuple):
    """What is known of layers that nobody has looked at."""

    passing: FloatArray  # [layers] probability to pass once reached
    start: float  # the same of layers beyond these
    earned: float  # mean reward of a committed layer
    left: float  # share of what a pass brings that is left after its loss
    correction: float  # of promised probabilities to pass, by experience


@compiled
def ahead(
    prospect: Prospect, costs: CostTable, layer: int, deepest: int, nodes: int, width: int, parents: int
) -> tuple[FloatArray, FloatArray]:
    """Drafting from `layer` down to each depth: A_d, the reward to be had once the layer above has passed, and B_d,
    the seconds that it takes; the first entries are 0, for not at all."""
    count, last = max(deepest - layer + 1, 0), len(costs.target) - 1
    gained, spent = np.zeros(count + 1), np.zeros(count + 1)
    passed = prospect.left * prospect.earned
    scored = costs.target[min(nodes, last)]
    seconds = costs.layer + costs.draft[min(parents, last)]
    for d in range(count):
        known = layer - 1 + d < len(prospect.passing)
        passed *= prospect.passing[layer - 1 + d] if known else prospect.start
        nodes += width
        after = costs.target[min(nodes, last)]
        gained[d + 1] = gained[d] + passed
        spent[d + 1] = spent[d] + seconds + after - scored
        scored, seconds = after, costs.layer + costs.draft[min(width, last)]
    return gained, spent


@compiled
def best_depth(likely: float, gained: FloatArray, rate: float, spent: FloatArray) -> tuple[int, float]:
    """The d at which likely · A_d - rate · B_d is largest, the shallowest of equals, and what it is; see `ahead`."""
    chosen, best = 0, -math.inf
    for d in range(len(gained)):
        net = likely * gained[d] - rate * spent[d]
        if net > best:
            chosen, best = d, net
    return chosen, best


@compiled
def worth_drafting(
    prospect: Packed,
    costs: Packed,
    rate: float,
    reach: float,
    layer: int,
    deepest: int,
    parents: int,
    nodes: int,
    width: int,
) -> bool:
    """See `Planner.worth_drafting`; of a `Prospect` and a `CostTable`."""
    gained, spent = ahead(Prospect(*prospect), CostTable(*costs), layer, deepest, nodes, width, parents)
    return bool(best_depth(reach, gained, rate, spent)[1] > 0)


class Decision(NamedTuple):
    """A layer's decision before its drafts are drawn."""

    draft_width: int  # w
    target_width: int  # M, as far as it is known by then
    passing: float  # P(K_w >= M)
    further: float  # reward that a pass brings: of the next layer, and of those planned below it
    onward: float  # probability that this layer and all above it pass
    deeper: bool  # whether the next layer is to be drafted too


@compiled
def kept_loss(at_least: FloatArray, loss: FloatArray, rules: Rules) -> FloatArray:
    """Mean of L over the beams that go on, at every M from the least; [counts] P(K >= k), [R + 1] -> [most + 1]."""
    counts = len(at_least)
    lost, going = np.zeros(rules.most + 1), 0.0  # going: Σ P(K = k) L(k) over k >= M, all of which go on
    for k in range(max(counts - 1, rules.most), rules.least - 1, -1):
        chance = at_least[k] if k < counts else 0.0
        going += (chance - (at_least[k + 1] if k + 1 < counts else 0.0)) * loss[min(k, rules.most)]
        if k <= rules.most:
            passed = going if rules.keep else chance * loss[k]
            lost[k] = passed + (1.0 - chance) * loss[rules.most if rules.full else k]
    return lost


@compiled
def plan_widths(
    at_least: FloatArray,
    loss: FloatArray,
    prospect: Prospect,
    costs: CostTable,
    rules: Rules,
    width_value: float,
    rate: float,
    reach: float,
    layer: int,
    deepest: int,
    nodes: int,
    widest: int,
) -> Decision:
    """See `Planner.widths`; [W + 1, W + 1] P(K_w >= M), [R + 1] L(k)."""
    last = len(costs.target) - 1
    gained, spent = ahead(prospect, costs, layer + 1, deepest, nodes + widest, widest, rules.least)
    w, m, below, best = rules.least, rules.least, 0, -math.inf
    for width in range(rules.least, widest + 1):
        if width > rules.least:  # what is drafted below begins with a pass over this layer
            spent[1:] += costs.draft[width] - costs.draft[width - 1]
        seconds = costs.target[min(nodes + width, last)] - costs.target[min(nodes, last)]
        lost = kept_loss(at_least[width], loss, rules)
        for asked in range(rules.least, min(width, rules.most) + 1):
            chance = min(1.0, at_least[width, asked] * prospect.correction)
            depth, more = best_depth(reach * chance, gained, rate, spent)
            net = reach * (chance * prospect.earned - width_value * lost[asked]) - rate * seconds + more
            if net > best:
                w, m, below, best = width, asked, depth, net
    promised = float(at_least[w, m])
    onward = reach * min(1.0, promised * prospect.correction)
    gains, seconds_below = ahead(prospect, costs, layer + 1, deepest, nodes + w, w, w)
    deeper = best_depth(onward, gains, rate, seconds_below)[1] > 0
    return Decision(w, m, promised, prospect.earned + gained[below], onward, bool(deeper))


@compiled
def plan_features(
    features: FloatVector,
    draft_hidden: FloatVector,
    target_hidden: FloatVector,
    weights: Packed,
    prospect: Packed,
    costs: Packed,
    rules: Packed,
    width_value: float,
    rate: float,
    reach: float,
    layer: int,
    deepest: int,
    nodes: int,
    widest: int,
) -> Decision:
    """`plan_widths` of a layer by what `foresee` says of its features [F], in one call.

    Of `EarlyWeights`, a `Prospect`, a `CostTable` and `Rules`.
    """
    choice = Rules(*rules)
    at_least, loss = foresee(features, draft_hidden, target_hidden, weights, choice.most)
    known = Prospect(*prospect), CostTable(*costs), choice
    return plan_widths(at_least, loss, *known, width_value, rate, reach, layer, deepest, nodes, widest)


@compiled
def least_bearable(loss: FloatArray, width_value: float, brought: float, least: int, most: int) -> int:
    """The smallest M whose loss a pass outweighs, `most` where none does; loss is [R + 1] L(k)."""
    for width in range(least, most + 1):
        if width_value * (loss[width] - loss[most]) <= brought:
            return width
    return most


@compiled
def best_width(loss: FloatArray, at_least: FloatArray, width_value: float, brought: float, rules: Packed) -> int:
    """The M whose passes bring most, less what is lost with the beams that go on; of `Rules`.

    Args:
        loss: [R + 1] L(k).
        at_least: [w + 1] P(K_w >= M). More than w may be asked for: the layer cannot pass, and is filled.
        brought: by a pass.
    """
    choice = Rules(*rules)
    lost = kept_loss(at_least, loss, choice)
    chosen, best = choice.least, -math.inf
    for asked in range(choice.least, choice.most + 1):
        net = (at_least[asked] * brought if asked < len(at_least) else 0.0) - width_value * lost[asked]
        if net > best:
            chosen, best = asked, net
    return chosen


@compiled
def cheapest_width(
    loss: FloatArray, width_value: float, rate: float, costs: Packed, drafts: bool, least: int, most: int
) -> int:
    """M of the layer that the target draws: what is lost, against carrying M beams into the next iteration."""
    chosen, best, table = least, math.inf, CostTable(*costs)
    for width in range(least, most + 1):
        seconds = table.target[width] + (table.draft[width] if drafts else 0.0)
        price = width_value * loss[width] + rate * seconds
        if price < best:
            chosen, best = width, price
    return chosen


_matched = compiled(matched)
_accept_probabilities, _accepted_count_table = compiled(accept_probabilities), compiled(accepted_count_table)


@compiled
def passing_chances(target_joint: Packed, draft_joint: Packed, draft_width: int) -> FloatArray:
    """P(K_w >= M) of P and Q in closed form; each is its parents, tokens and probabilities; [w + 1]."""
    shared = _matched(target_joint, draft_joint)
    counts = _accepted_count_table(_accept_probabilities(target_joint[2], shared, draft_width))[draft_width]
    at_least = np.minimum(counts[::-1].cumsum()[::-1], 1.0)
    at_least[0] = 1.0
    return at_least


# M of a layer in one call, with the L(k) that it was set by; of its features [G], P known, and `LateWeights`.


@compiled
def judge_bearable(
    features: FloatVector, weights: Packed, width_value: float, brought: float, least: int, most: int
) -> tuple[int, FloatArray]:
    """M where each count speaks for itself; see `least_bearable`."""
    loss = late_loss(features, LateWeights(*weights), most)
    return least_bearable(loss, width_value, brought, least, most), loss


@compiled
def judge_counted(
    features: FloatVector,
    target_joint: Packed,
    draft_joint: Packed,
    draft_width: int,
    weights: Packed,
    width_value: float,
    brought: float,
    rules: Packed,
) -> tuple[int, FloatArray]:
    """M where P(K_w >= M) matters, by `passing_chances` of P and Q; see `best_width` and `Rules`."""
    loss = late_loss(features, LateWeights(*weights), rules[1])
    at_least = passing_chances(target_joint, draft_joint, draft_width)
    return best_width(loss, at_least, width_value, brought, rules), loss


@compiled
def judge_final(
    features: FloatVector,
    weights: Packed,
    width_value: float,
    rate: float,
    costs: Packed,
    drafts: bool,
    least: int,
    most: int,
) -> tuple[int, FloatArray]:
    """M of the layer that the target draws; see `cheapest_width`."""
    loss = late_loss(features, LateWeights(*weights), most)
    return cheapest_width(loss, width_value, rate, costs, drafts, least, most), loss
