"""Planner: predictions and a latency table -> w, M and depth. Numpy only; design section 8.

The reward of a committed layer is `1 - width_value * (1 - S(kept))`: a token, less the price of losing the beam that
the final best hypothesis descends from; S(k) is the probability that it is one of the layer's k best. A layer that is
reached is committed whether it passes or not; passing lets the next one be committed as well, and those below it be
reached. What is maximised is the long-run reward per second, so time costs ρ, that very rate, tracked on line.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from decoding.config import DecodingConfig
from decoding.sampling import FloatArray, IntArray

_TABLE = 512  # node counts whose seconds are looked up; larger forests count as this


class Costs(Protocol):
    """Seconds of one pass of each model over a number of nodes; `decoding.latency.LatencyTable` is one."""

    def draft_seconds(self, nodes: float) -> float:
        """Of the draft model."""
        ...

    def target_seconds(self, nodes: float) -> float:
        """Of the target model."""
        ...


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


@dataclass(frozen=True)
class Prediction:
    """What a network says of one layer."""

    at_least: FloatArray  # [W + 1, W + 1] P(K_w >= M) at [w, M]
    survivors: FloatArray  # [R + 1] S(M) = P(survivor rank <= M), S(0) = 0


@dataclass(frozen=True)
class Plan:
    """A layer's decision before its drafts are drawn."""

    draft_width: int  # w
    target_width: int  # M
    passing: float  # P(K_w >= M)
    further: float = 1.0  # reward that a pass brings: of the next layer, and of those planned below it


def iteration_seconds(costs: Costs, widths: Sequence[int], roots: int) -> float:
    """Modelled seconds of an iteration: a draft pass per layer over the nodes above it, one target pass over all.

    Args:
        widths: draft widths of its layers.
        roots: input beams.
    """
    above = [roots, *widths[:-1]] if widths else []
    return sum(costs.draft_seconds(nodes) for nodes in above) + costs.target_seconds(roots + sum(widths))


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
        """ρ."""
        return self.reward / self.seconds

    def update(self, reward: float, seconds: float) -> None:
        """An iteration ended."""
        if seconds > 0:
            self.reward = self._keep * self.reward + (1 - self._keep) * reward
            self.seconds = self._keep * self.seconds + (1 - self._keep) * seconds


class Outlook:
    """What is known of layers before they are looked at: how often each depth passed, and what a layer earned.

    Args:
        passing: of layers that were never drafted.
        memory: share of the old estimate that a new one leaves.
    """

    def __init__(self, passing: float = 0.6, memory: float = 0.9) -> None:
        self.earned = 1.0  # reward of a committed layer
        self._passing: list[float] = []
        self._start, self._keep = passing, memory

    def copy(self) -> Outlook:
        """One that learns by itself."""
        fresh = copy.copy(self)
        fresh._passing = [*self._passing]
        return fresh

    def passing(self, layer: int) -> float:
        """Probability that a layer, from 1, passes once it is reached."""
        return self._passing[layer - 1] if layer <= len(self._passing) else self._start

    def saw(self, layer: int, passing: float) -> None:
        """A layer was planned to pass with this probability."""
        while len(self._passing) < layer:
            self._passing.append(self._start)
        self._passing[layer - 1] += (1 - self._keep) * (passing - self._passing[layer - 1])

    def hope(self, layer: int) -> None:
        """A layer was not drafted: think a little better of it, so that it is tried again."""
        self.saw(layer, 1.0)

    def was_paid(self, reward: float) -> None:
        """A committed layer earned this."""
        self.earned += (1 - self._keep) * (reward - self.earned)


class Planner:
    """Decides widths and depth by expected reward against ρ times seconds.

    Args:
        costs: seconds of the passes.
        width_value: price of losing the final best hypothesis's ancestor, in tokens; the quality / speed knob, >= 0.
        survivors: what earns S: "kept", the beams that go on under the config's `surplus` and `refill` (with their
            defaults even a small M keeps more), or "asked", the M that must be accepted.
    """

    def __init__(self, costs: Costs, width_value: float = 10.0, survivors: str = "kept") -> None:
        self.costs, self.width_value, self.survivors = costs, width_value, survivors
        nodes = range(_TABLE)
        self._draft = np.array([costs.draft_seconds(n) for n in nodes])
        self._target = np.array([costs.target_seconds(n) for n in nodes])

    def widths(
        self,
        prediction: Prediction,
        config: DecodingConfig,
        outlook: Outlook,
        rate: float,
        reach: float,
        layer: int,
        deepest: int,
        nodes: int,
        support: int,
    ) -> Plan:
        """The best (w, M) of a layer.

        Args:
            outlook: of the layers below.
            rate: ρ.
            reach: probability that the layer is reached.
            layer, deepest: its depth, from 1, and that of the last layer that may be drafted.
            nodes: nodes that the target will score without this layer.
            support: size of Q's support; more drafts than that do not exist.
        """
        least, most = config.min_width, max(config.min_width, min(config.draft_width, support))
        widths, asked, impossible = _choices(least, most, config.target_width)
        at_least = prediction.at_least[least : most + 1]  # [w, W + 1]
        passing = at_least[:, np.minimum(asked, at_least.shape[1] - 1)]  # [w, M]
        earned = self.width_value * self._survivors(prediction, at_least, config)  # [w, M] or broadcast to it
        seconds = self._scored(nodes, widths) + (self._draft[widths] - self._draft[1] if layer < deepest else 0.0)
        gain = reach * (passing * outlook.earned + earned) - rate * seconds[:, None]
        net, gained = self._below(outlook, rate, reach * passing, layer + 1, deepest, nodes + most, most)
        gain += net
        gain[impossible] = -np.inf
        row, column = divmod(int(gain.argmax()), len(asked))
        w, m = int(widths[row]), int(asked[column])
        return Plan(w, m, float(prediction.at_least[w, m]), outlook.earned + float(gained[row, column]))

    def target_width(
        self,
        prediction: Prediction,
        at_least: FloatArray,
        config: DecodingConfig,
        draft_width: int,
        further: float = 1.0,
    ) -> int:
        """The best M of a layer that is reached and whose draft width is settled.

        Args:
            at_least: [w + 1] P(K_w >= M).
            further: of its plan. Which layers were drafted below since then may not count (design 5.4).
        """
        most = max(config.min_width, min(config.target_width, draft_width))
        asked = np.arange(config.min_width, most + 1)
        row = np.zeros((1, config.target_width + 1 + draft_width))
        row[0, : len(at_least)] = at_least
        worth = row[0, asked] * further
        worth = worth + self.width_value * self._survivors(prediction, row, config)[0, : len(asked)]
        return int(asked[int(worth.argmax())])

    def final_width(self, prediction: Prediction, config: DecodingConfig, rate: float) -> int:
        """M of the layer that the target draws: survivors against carrying M beams into the next iteration."""
        asked = np.arange(config.min_width, config.target_width + 1)
        carry = self._target[asked] + (self._draft[asked] if config.draft_depth else 0.0)
        return int(asked[int((self.width_value * prediction.survivors[asked] - rate * carry).argmax())])

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
        net, _ = self._below(outlook, rate, np.array([reach]), layer, deepest, nodes, width, parents)
        return bool(net[0] > 0)

    def _below(
        self,
        outlook: Outlook,
        rate: float,
        reach: FloatArray,
        layer: int,
        deepest: int,
        nodes: int,
        width: int,
        parents: int | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """Drafting from `layer` down as deep as it pays: max over depths d of reach * A_d - B_d, 0 for not at all.

        Returns:
            That, and A_d: the reward to be had once the layer above has passed; both in the shape of `reach`.
        """
        best, ahead = np.zeros_like(reach), np.zeros_like(reach)
        gained, spent, passed = 0.0, 0.0, 1.0
        for below in range(layer, deepest + 1):
            passed *= outlook.passing(below)
            gained += passed * outlook.earned
            above = width if parents is None or below > layer else parents
            spent += (
                self._at(self._draft, above) + self._at(self._target, nodes + width) - self._at(self._target, nodes)
            )
            nodes += width
            net = reach * gained - rate * spent
            ahead = np.where(net > best, gained, ahead)
            best = np.maximum(best, net)
        return best, ahead

    def _scored(self, nodes: int, widths: IntArray) -> FloatArray:
        """Seconds that the target takes for w nodes more; [w] both ways."""
        index = np.minimum(nodes + widths, _TABLE - 1)
        return self._target[index] - self._at(self._target, nodes)

    def _at(self, seconds: FloatArray, nodes: int) -> float:
        return float(seconds[min(nodes, _TABLE - 1)])

    def _survivors(self, prediction: Prediction, at_least: FloatArray, config: DecodingConfig) -> FloatArray:
        """S of the beams that M earns; [w, M] or broadcast to it, M from min_width to target_width."""
        if self.survivors == "asked":
            return prediction.survivors[None, config.min_width : config.target_width + 1]
        kept = _kept(at_least.shape[1], config.min_width, config.target_width, config.surplus, config.refill)
        counts = at_least.copy()  # [w, k] P(K_w = k)
        counts[:, :-1] -= at_least[:, 1:]
        return counts @ prediction.survivors[kept]


@functools.lru_cache(64)
def _choices(least: int, most: int, target_width: int) -> tuple[IntArray, IntArray, NDArray[np.bool_]]:
    """Draft widths [w], target widths [M], and which pairs cannot be, since M drafts must be there; [w, M]."""
    widths, asked = np.arange(least, most + 1), np.arange(least, target_width + 1)
    return widths, asked, asked > widths[:, None]


@functools.lru_cache(64)
def _kept(counts: int, least: int, most: int, surplus: str, refill: str) -> IntArray:
    """Beams that go on when k drafts were accepted and M were asked for; [k, M]."""
    asked, accepted = np.arange(least, most + 1), np.arange(counts)[:, None]
    passed = np.minimum(accepted, most) if surplus == "keep" else asked
    return np.where(accepted >= asked, passed, most if refill == "full" else asked)
