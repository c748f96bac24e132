"""Planner: predictions and a latency table -> w, M and depth. Design section 8.

The reward of a committed layer is `1 - width_value * L(k)`: a token, less the price of what is lost by keeping only its
first k slots; L is the mean of nats of the final best hypothesis and of the chance that it is lost, so that
`width_value` is what a nat is worth in tokens, and what the whole of it is. A layer that is reached is committed
whether it passes or not; passing lets the next one be committed as well, and those below it be reached. What is
maximised is the long-run reward per second, so time costs ρ, that very rate, tracked on line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from controller import kernels
from controller.kernels import Context, CostTable, Decision, FloatVector, Packed
from controller.network import HostNet
from decoding.config import DecodingConfig
from decoding.pricing import Costs, iteration_seconds
from decoding.sampling import FloatArray
from decoding.widths import LayerRecord

_LEAST_REWARD = 0.05  # of an iteration, where ρ is concerned
_SUPPORT = Context._fields.index("support")
_HOPE = 0.05  # least weight of a layer that was not drafted, as if it had passed
_SPIKE = 2.0  # times what an iteration should take, beyond which the clock saw something else
_STRANGEST = 5.0  # times the table's, as far as its seconds can be from the clock's
_TABLE = 512  # node counts whose seconds are looked up; larger forests count as this


@dataclass(frozen=True)
class UnitCosts:
    """Costs in units of one target pass, for when nothing has been measured."""

    draft_base: float = 0.25
    target_base: float = 1.0
    per_node: float = 0.01

    def draft_seconds(self, nodes: float) -> float:
        """Affine in the nodes."""
        return self.draft_base + self.per_node * nodes

    def target_seconds(self, nodes: float) -> float:
        """Affine in the nodes."""
        return self.target_base + self.per_node * nodes

    def host_seconds(self, layers: int) -> float:
        """None."""
        return 0.0


class Throughput:
    """ρ, long-run reward per second: exponential means of the reward and the seconds of an iteration, divided.

    Args:
        reward, seconds: of a typical iteration, to start from.
        memory: iterations after which a weight has fallen to 1/e.
    """

    def __init__(self, reward: float, seconds: float, memory: float = 50.0) -> None:
        self.reward, self.seconds = reward, seconds
        self._keep = float(np.exp(-1.0 / memory))

    @classmethod
    def expected(cls, costs: Costs, config: DecodingConfig, passing: float = 0.6) -> Throughput:
        """The table's own estimate: the config's widest forest, every layer passing with probability `passing`."""
        depth = config.draft_depth
        tokens = sum(passing**layer for layer in range(depth + 1))
        seconds = iteration_seconds(costs, [config.draft_width] * depth, config.target_width)
        return cls(tokens, seconds)

    @property
    def rate(self) -> float:
        """ρ; time costs something even where rewards are losses."""
        return max(self.reward, _LEAST_REWARD) / self.seconds

    def update(self, reward: float, seconds: float) -> None:
        """An iteration ended; seconds in the units of the table."""
        if seconds > 0:
            self.reward = self._keep * self.reward + (1 - self._keep) * reward
            self.seconds = self._keep * self.seconds + (1 - self._keep) * seconds


class Pace:
    """How much dearer nodes and layers are here than the table says, against an iteration of one beam and no drafts.

    A table is measured apart and on a quiet machine: wide passes suffer more than narrow ones from whoever else uses
    the processor, and a policy takes time too. Wall seconds are fitted as

        seconds = scale * (plain + added) + excess * added,

    plain and added by the table: one beam without drafts, and what there was beyond it. Least squares of seconds /
    plain, exponentially forgotten; a ridge holds `excess` at 0 until iterations of different sizes tell it.

    Args:
        memory: iterations after which a weight has fallen to 1/e.
        ridge: in iterations that add as much as there is without.
    """

    def __init__(self, memory: float = 200.0, ridge: float = 0.5) -> None:
        self.of_added = 1.0  # (scale + excess) / scale
        self._scale = self._excess = 0.0
        self._keep, self._ridge = math.exp(-1.0 / memory), ridge
        self._whole = self._both = self._added = 0.0  # sums of squares and products of 1 + share and share
        self._whole_took = self._added_took = 0.0  # their products with what the clock said

    def saw(self, plain: float, added: float, seconds: float) -> None:
        """An iteration ended."""
        if plain <= 0 or seconds <= 0:
            return
        share, took = added / plain, seconds / plain
        expected = self._scale * (1 + share) + self._excess * share
        if expected > 0:
            took = min(took, _SPIKE * expected)
        sums = self._whole, self._both, self._added, self._whole_took, self._added_took
        new = (1 + share) ** 2, (1 + share) * share, share**2, (1 + share) * took, share * took
        self._whole, self._both, self._added, self._whole_took, self._added_took = (
            self._keep * old + term for old, term in zip(sums, new, strict=True)
        )
        squares = self._added + self._ridge
        determinant = self._whole * squares - self._both**2  # > 0: Cauchy-Schwarz, and the ridge
        self._scale = (squares * self._whole_took - self._both * self._added_took) / determinant
        self._excess = (self._whole * self._added_took - self._both * self._whole_took) / determinant
        if self._scale > 0:
            self.of_added = min(max(1.0 + self._excess / self._scale, 1 / _STRANGEST), _STRANGEST)


class Outlook:
    """What is known of layers before they are looked at: how often each depth passed, and what a layer earned.

    Args:
        passing: of layers that were never drafted.
        memory: layers after which a weight has fallen to 1/e.
    """

    def __init__(self, passing: float = 0.6, memory: float = 100.0) -> None:
        self._earned = 1.0
        self.left = 1.0  # share of what a pass brings that is left after what it loses
        self._passing, self._tries = np.empty(0), 0
        self._start, self._keep = passing, float(np.exp(-1.0 / memory))
        self._passed, self._promised = passing, passing

    def passing(self, layer: int) -> float:
        """Probability that a layer, from 1, passes once it is reached."""
        return float(self._passing[layer - 1]) if layer <= len(self._passing) else self._start

    @property
    def prospect(self) -> Packed:
        """The same for the kernels: a `kernels.Prospect`."""
        return self._passing, self._start, self.earned, self.left, self.correction

    @property
    def correction(self) -> float:
        """Of predicted probabilities to pass, by experience: M may be set by more than was known then."""
        return self._passed / self._promised

    def saw(self, layer: int, passed: float, predicted: float | None = None) -> None:
        """A layer was reached and passed, 1, or failed, 0."""
        self._think(layer, passed, 1 - self._keep)
        self._tries += layer == 1
        if predicted is not None:
            self._passed += (1 - self._keep) * (passed - self._passed)
            self._promised += (1 - self._keep) * (predicted - self._promised)

    def hope(self) -> None:
        """Nothing was drafted: think better of the first layer, so that it is tried again.

        Much better while little is known, later a little only: where drafting does not pay, it is then tried in about
        _HOPE (1 - p) / (p - q) of the iterations, q being how often the layer passes and p how often it would have to.
        """
        weight = max(_HOPE, 1.0 / (1 + self._tries))
        self._think(1, 1.0, weight * (1 - self._keep))

    def _think(self, layer: int, passed: float, weight: float) -> None:
        if len(self._passing) < layer:
            self._passing = np.append(self._passing, np.full(layer - len(self._passing), self._start))
        self._passing[layer - 1] += weight * (passed - self._passing[layer - 1])

    def lost(self, share: float) -> None:
        """A layer passed, and lost this share of what that brings."""
        self.left += (1 - self._keep) * (max(0.0, 1.0 - share) - self.left)

    def was_paid(self, reward: float) -> None:
        """A committed layer earned this."""
        self._earned += (1 - self._keep) * (reward - self._earned)

    @property
    def earned(self) -> float:
        """Mean reward of a committed layer; something is hoped for even where rewards are losses."""
        return max(self._earned, _LEAST_REWARD)


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
            np.array([costs.draft_seconds(n) for n in nodes], dtype=float),
            np.array([costs.target_seconds(n) for n in nodes], dtype=float),
            float(costs.host_seconds(1) - costs.host_seconds(0)),
        )
        self._packed = tuple(self._table)

    def widths(
        self,
        host: HostNet,
        context: Packed,
        hidden: tuple[FloatVector, FloatVector],
        config: DecodingConfig,
        outlook: Outlook,
        rate: float,
        reach: float,
        deepest: int,
        nodes: int,
    ) -> Decision:
        """The best (w, M) of a layer, by what is known before its drafts are drawn.

        Args:
            host: its early heads are asked.
            context, hidden: the layer; the draft's and the target's hidden vector, empty where not used.
            outlook: of the layers below.
            rate: ρ.
            reach: probability that the layer is reached.
            deepest: the last layer that may be drafted.
            nodes: nodes that the target will score without this layer.
        """
        return kernels.plan_context(
            context,
            *hidden,
            host.early,
            outlook.prospect,
            self._packed,
            rules_of(config),
            self.width_value,
            rate,
            reach,
            deepest,
            nodes,
            _widest(context, config),
        )

    def seconds(self, widths: Sequence[int], roots: int) -> float:
        """`pricing.iteration_seconds` from this planner's own tables."""
        draft, target = self._table.draft, self._table.target
        above, last, spent = roots, _TABLE - 1, self.costs.host_seconds(len(widths))
        for width in widths:
            spent += draft[min(above, last)]
            above = width
        return float(spent + target[min(roots + sum(widths), last)])

    def bearable_width(
        self, host: HostNet, target: Packed, config: DecodingConfig, further: float
    ) -> tuple[int, FloatArray]:
        """The best M of a layer that is reached, where it `settles_alone`, with the late loss that it is set by.

        More than w is a choice too: the layer cannot pass, and is filled as the config says.

        Args:
            host: its late heads are asked.
            target: the layer with its P.
            further: of its plan. Which layers were drafted below since then may not count (design 5.4).
        """
        return kernels.judge_bearable(
            target, host.late, self.width_value, further, config.min_width, config.target_width
        )

    def counted_width(
        self,
        host: HostNet,
        target: Packed,
        joints: tuple[Packed, Packed],
        draft_width: int,
        config: DecodingConfig,
        further: float,
    ) -> tuple[int, FloatArray]:
        """The best M of a layer that is reached, where P(K_w >= M) matters, with the late loss that it is set by.

        Args:
            host, target, further: as for `bearable_width`.
            joints: P and Q, whose P(K_w >= M) has a closed form; each its parents, tokens and probabilities.
            draft_width: w.
        """
        return kernels.judge_counted(
            target, *joints, draft_width, host.late, self.width_value, further, rules_of(config)
        )

    def final_width(self, host: HostNet, target: Packed, config: DecodingConfig, rate: float) -> tuple[int, FloatArray]:
        """M of the layer that the target draws, with the late loss that it is set by.

        What is lost counts against carrying M beams into the next iteration.
        """
        ends, rate = (config.min_width, config.target_width), _carried(rate, config)
        place = self.width_value, rate, self._packed, config.draft_depth > 0, *ends
        return kernels.judge_final(target, host.late, *place)

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
        return kernels.worth_drafting(outlook.prospect, self._packed, *place)


def settles_alone(config: DecodingConfig) -> bool:
    """Whether M can be set without knowing P(K_w >= M): all that is accepted goes on, or all slots are filled.

    Then M only says with which counts a layer passes, and each count speaks for itself.
    """
    return config.surplus == "keep" and config.refill == "full"


def rules_of(config: DecodingConfig) -> Packed:
    """What the kernels need to know of a config: `kernels.Rules`."""
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


def _widest(context: Packed, config: DecodingConfig) -> int:
    """The most drafts of a layer: more than Q's support do not exist."""
    support = config.draft_width if config.replacement else context[_SUPPORT]
    return max(config.min_width, min(config.draft_width, support))
