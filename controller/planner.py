"""Planner: predictions and a latency table -> w, M and depth. Numpy only; design section 8.

A layer that is reached is committed whether it passes or not, and a pass lets one more layer be committed. So the
expected worth of a layer is `reach * (P(K_w >= M) + width_value * S(M))`, in tokens, with S(M) the probability that the
final best hypothesis descends from one of the layer's M best beams. Time costs ρ, long-run tokens per second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from decoding.config import DecodingConfig
from decoding.sampling import FloatArray


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


def iteration_seconds(costs: Costs, widths: Sequence[int], roots: int) -> float:
    """Modelled seconds of an iteration: a draft pass per layer over the nodes above it, one target pass over all.

    Args:
        widths: draft widths of its layers.
        roots: input beams.
    """
    above = [roots, *widths[:-1]] if widths else []
    return sum(costs.draft_seconds(nodes) for nodes in above) + costs.target_seconds(roots + sum(widths))


class Throughput:
    """ρ, long-run tokens per second: exponential means of tokens and of seconds per iteration, divided.

    Args:
        tokens, seconds: of a typical iteration, to start from.
        memory: iterations after which a weight has fallen to 1/e.
    """

    def __init__(self, tokens: float, seconds: float, memory: float = 50.0) -> None:
        self.tokens, self.seconds = tokens, seconds
        self._keep = float(np.exp(-1.0 / memory))

    @classmethod
    def expected(cls, costs: Costs, config: DecodingConfig, passing: float = 0.6) -> Throughput:
        """The table's own estimate: the config's widest forest, every layer passing with probability `passing`."""
        depth = config.draft_depth
        tokens = sum(passing**layer for layer in range(depth + 1))
        return cls(tokens, iteration_seconds(costs, [config.draft_width] * depth, config.target_width))

    @property
    def rate(self) -> float:
        """ρ in tokens per second."""
        return self.tokens / self.seconds

    def update(self, tokens: float, seconds: float) -> None:
        """An iteration ended."""
        if seconds > 0:
            self.tokens = self._keep * self.tokens + (1 - self._keep) * tokens
            self.seconds = self._keep * self.seconds + (1 - self._keep) * seconds


class Planner:
    """Decides widths and depth by expected tokens against ρ times seconds.

    Args:
        costs: seconds of the passes.
        width_value: worth of a unit of survivor probability, in tokens; the quality / speed knob, 0 or more.
        survivors: what earns S: "asked", the M that must be accepted, or "kept", the beams that go on under the
            config's `surplus` and `refill` (with their defaults even a small M keeps more).
    """

    def __init__(self, costs: Costs, width_value: float = 1.0, survivors: str = "asked") -> None:
        self.costs, self.width_value, self.survivors = costs, width_value, survivors

    def widths(
        self,
        prediction: Prediction,
        config: DecodingConfig,
        rate: float,
        reach: float,
        nodes: int,
        last: bool,
        support: int,
    ) -> Plan:
        """The best (w, M) of a layer.

        Args:
            rate: ρ.
            reach: probability that the layer is reached.
            nodes: nodes that the target will score without this layer.
            last: no layer can be drafted below this one, so that its drafts cost no draft pass.
            support: size of Q's support; more drafts than that do not exist.
        """
        most = max(config.min_width, min(config.draft_width, support))
        widths = np.arange(config.min_width, most + 1)  # w
        asked = np.arange(config.min_width, config.target_width + 1)  # M
        at_least = prediction.at_least[widths]  # [w, W + 1]
        worth = at_least[:, np.minimum(asked, at_least.shape[1] - 1)] + self.width_value * self._survivors(
            prediction, at_least, config
        )  # [w, M]
        worth = np.where(asked <= widths[:, None], worth, -np.inf)
        seconds = np.array([self._width_seconds(int(w), nodes, last) for w in widths])
        gain = reach * worth - rate * seconds[:, None]
        row, column = np.unravel_index(int(gain.argmax()), gain.shape)
        w, m = int(widths[row]), int(asked[column])
        return Plan(w, m, float(prediction.at_least[w, m]))

    def target_width(
        self, prediction: Prediction, at_least: FloatArray, config: DecodingConfig, draft_width: int
    ) -> int:
        """The best M of a layer whose draft width is settled; `at_least` [w + 1] is P(K_w >= M)."""
        most = max(config.min_width, min(config.target_width, draft_width))
        asked = np.arange(config.min_width, most + 1)
        row = np.zeros((1, config.target_width + 1 + draft_width))
        row[0, : len(at_least)] = at_least
        worth = row[0, asked] + self.width_value * self._survivors(prediction, row, config)[0, : len(asked)]
        return int(asked[int(worth.argmax())])

    def final_width(self, prediction: Prediction, config: DecodingConfig, rate: float) -> int:
        """M of the layer that the target draws: survivors against carrying M beams into the next iteration."""
        asked = np.arange(config.min_width, config.target_width + 1)
        carry = [self.costs.draft_seconds(int(m)) + self.costs.target_seconds(int(m)) for m in asked]
        return int(asked[int((self.width_value * prediction.survivors[asked] - rate * np.array(carry)).argmax())])

    def worth_drafting(self, rate: float, reach: float, passing: float, parents: int, nodes: int, width: int) -> bool:
        """Whether one more layer pays: `reach * passing` further tokens against its draft pass and target nodes.

        Args:
            rate: ρ.
            reach: probability that the layer is reached.
            passing: probability that it then passes, as far as is known before it is looked at.
            parents: nodes that the draft pass scores.
            nodes: nodes that the target will score without the layer.
            width: likely draft width.
        """
        return reach * passing > rate * (self.costs.draft_seconds(parents) + self._target_seconds(nodes, width))

    def _survivors(self, prediction: Prediction, at_least: FloatArray, config: DecodingConfig) -> FloatArray:
        """S of the beams that M earns; [w, M] or broadcast to it, M from min_width to target_width."""
        asked = np.arange(config.min_width, config.target_width + 1)
        if self.survivors == "asked":
            return prediction.survivors[asked][None, :]
        accepted = np.arange(at_least.shape[1])[:, None]  # k
        surplus = np.minimum(accepted, config.target_width) if config.surplus == "keep" else asked
        kept = np.where(accepted >= asked, surplus, config.target_width if config.refill == "full" else asked)  # [k, M]
        counts = at_least - np.append(at_least[:, 1:], np.zeros((len(at_least), 1)), axis=1)  # [w, k] P(K_w = k)
        return counts @ prediction.survivors[kept]

    def _width_seconds(self, width: int, nodes: int, last: bool) -> float:
        """Seconds that depend on w: the target scores w more nodes, and a draft pass below them starts from w."""
        below = 0.0 if last else self.costs.draft_seconds(width) - self.costs.draft_seconds(1)
        return self._target_seconds(nodes, width) + below

    def _target_seconds(self, nodes: int, width: int) -> float:
        return self.costs.target_seconds(nodes + width) - self.costs.target_seconds(nodes)
