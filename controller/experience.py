"""What a policy learns on line: what iterations earn and take, with drafts and without, and whether drafts pay."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

_WINDOW = 15  # iterations of what is done, with which a look at what is not done is compared
_LEAST = 8  # of them, at least
_LOOKS = 15  # looks that count
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


class Relation:
    """How much longer than the table says an iteration without drafts takes, over the same of one with drafts.

    By pairs that lie side by side: a look at what is not done, and the iterations before it. So it does not matter what
    else the machine does from one hour to the next; and medians do not see that a first pass of its size, which
    captures a CUDA graph, takes a hundred times as long.
    """

    def __init__(self) -> None:
        self._drafts, self._away = True, False  # what is done; whether the iteration before was a look
        self._recent: deque[float] = deque(maxlen=_WINDOW)
        self._found: deque[float] = deque(maxlen=_LOOKS)
        self.value = 1.0

    def saw(self, ratio: float, drafted: bool) -> None:
        """An iteration took `ratio` times what the table says."""
        if drafted == self._drafts:
            self._recent.append(ratio)
            self._away = False
            return
        if len(self._recent) >= _LEAST:
            usual = median(self._recent)
            self._found.append(usual / ratio if drafted else ratio / usual)
            self.value = median(self._found)
        if self._away:  # the second in a row: this is done from now on
            self._drafts = drafted
            self._recent.clear()
        self._away = not self._away


class Experience:
    """Tokens and seconds of iterations, in the units of the table or of the clock.

    Args:
        plain: seconds of an iteration without drafts, by the table.
        expected: tokens per iteration with drafts, before any was seen.
        wall: what iterations took is what the clock says; the table's seconds count as so much longer.
    """

    def __init__(self, plain: float, expected: float = 2.0, wall: bool = False) -> None:
        self._plain, self._expected, self._wall = plain, expected, wall
        self._tokens, self._told, self._without_told = Mean(), Mean(), Mean()  # with drafts; seconds by the table
        self._relation = Relation()
        self._seen = self._since = 0
        self._every = 16

    def rate(self) -> float:
        """ρ: tokens that a second of the table is worth, where drafts add it."""
        if not self._seen:
            return self._expected / (1.5 * self._plain)
        return max(self._tokens.value / self._told.value, 1.0 / self._without_seconds()) * self._stretch()

    def drafts(self) -> bool:
        """Whether the next iteration drafts: where that pays, and now and then to see whether it does."""
        if self._seen < _TRIES:
            return True
        self._since += 1
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
        (self._told if drafted else self._without_told).saw(told)
        self._relation.saw(took / told, drafted)
        if drafted:
            self._tokens.saw(tokens)
            self._seen += 1

    def _pays(self) -> bool:
        return self._tokens.value / self._told.value > 1.0 / self._without_seconds()

    def _without_seconds(self) -> float:
        """Of an iteration without drafts, in seconds that are as long as those of one with drafts by the table."""
        return (self._without_told.value or self._plain) * self._relation.value

    def _stretch(self) -> float:
        """Such seconds for a second of the table that drafts add."""
        more = self._told.value - self._without_told.value
        if not self._without_told.weight or more <= 0:
            return 1.0
        return min(max((self._told.value - self._without_seconds()) / more, 0.25), 4.0)
