"""What a policy learns on line: what iterations earn and take, how deep layers pass, how far the table is off."""

from __future__ import annotations

import math

import numpy as np

from controller.features import Packed
from decoding.config import DecodingConfig
from decoding.cost_table import Costs, iteration_seconds

_LEAST_REWARD = 0.05  # of an iteration, where ρ is concerned
_HOPE = 0.05  # least weight of a layer that was not drafted, as if it had passed
_SPIKE = 2.0  # times what an iteration should take, beyond which the clock saw something else
_STRANGEST = 5.0  # times the table's, as far as its seconds can be from the clock's


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
        """The same as a plan takes it: a `plan.Prospect`."""
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
