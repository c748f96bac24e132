"""What a policy learns on line: what iterations earn and take, with drafts and without, and whether drafts pay."""

from __future__ import annotations

import math
from collections import deque

_WINDOW = 31  # iterations whose lower quartile tells how the clock compares with the table
_TRIES = 24  # iterations with drafts before they are judged
_RARELY = 256  # iterations between looks at what is not done, at most


class Mean:
    """An exponential mean that is right from its first value on.

    Args:
        memory: values after which a weight has fallen to 1/e.
    """

    def __init__(self, memory: float = 100.0) -> None:
        self._keep, self._sum, self.weight = math.exp(-1.0 / memory), 0.0, 0.0

    def saw(self, value: float) -> None:
        """A value."""
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self.weight = self._keep * self.weight + (1 - self._keep)

    @property
    def value(self) -> float:
        """The mean; 0 before the first value."""
        return self._sum / self.weight if self.weight else 0.0


class LowerQuartile:
    """A quarter of the last values lie below; 0 before the first. A machine that is busy for a moment, or captures a
    CUDA graph, makes an iteration take a hundred times as long, and most of the first iterations of a run.
    """

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self.value = 0.0

    def saw(self, value: float) -> None:
        """A value."""
        self._last.append(value)
        self.value = sorted(self._last)[len(self._last) // 4]


class Experience:
    """Tokens and seconds of iterations, in the units of the table or of the clock.

    Args:
        plain: seconds of an iteration without drafts, by the table.
        expected: tokens per iteration with drafts, before any was seen.
        wall: what iterations took is what the clock says; the table's seconds count as so much longer.
    """

    def __init__(self, plain: float, expected: float = 2.0, wall: bool = False) -> None:
        self._plain, self._expected, self._wall = plain, expected, wall
        self._tokens, self._told, self._ratio = Mean(), Mean(), LowerQuartile()  # with drafts; seconds by the table
        self._without_told, self._without_ratio = Mean(), LowerQuartile()  # of those without; ratios: clock over table
        self._seen = self._since = 0
        self._every = 16

    def rate(self) -> float:
        """ρ: tokens that a second of the table is worth, where drafts add it."""
        if not self._seen:
            return self._expected / (1.5 * self._plain)
        return max(self._tokens.value / self._seconds(), 1.0 / self._without_seconds()) * self._stretch()

    def drafts(self) -> bool:
        """Whether the next iteration drafts: where that pays, and now and then to see whether it does."""
        self._since += 1
        if self._seen < _TRIES:
            return True
        pays = self._pays()
        if self._since < self._every:
            return pays
        self._since, self._every = 0, min(2 * self._every, _RARELY)
        return not pays or not self._wall  # the table knows what an iteration without drafts takes

    def saw(self, tokens: int, told: float, seconds: float, drafted: bool) -> None:
        """An iteration ended.

        Args:
            tokens: that it committed.
            told: seconds by the table.
            seconds: by the clock.
            drafted: whether it drafted anything.
        """
        took = seconds if self._wall else told
        if took <= 0 or told <= 0:  # the first token after the prompt's own pass
            return
        by_table, ratio = (self._told, self._ratio) if drafted else (self._without_told, self._without_ratio)
        by_table.saw(told)
        ratio.saw(took / told)
        if drafted:
            self._tokens.saw(tokens)
            self._seen += 1

    def _pays(self) -> bool:
        return self._tokens.value / self._seconds() > 1.0 / self._without_seconds()

    def _seconds(self) -> float:
        """Of an iteration with drafts."""
        return self._told.value * self._ratio.value

    def _without_seconds(self) -> float:
        """Of an iteration without drafts; by the table, at the scale of those with, before one was seen."""
        if not self._without_told.weight:
            return self._plain * (self._ratio.value or 1.0)
        return self._without_told.value * self._without_ratio.value

    def _stretch(self) -> float:
        """Seconds of the clock for a second of the table that drafts add."""
        scale, more = self._ratio.value or 1.0, self._told.value - self._without_told.value
        if not self._wall or not self._without_told.weight or more <= 0:
            return scale
        return min(max((self._seconds() - self._without_seconds()) / more, scale / 4), 4 * scale)
