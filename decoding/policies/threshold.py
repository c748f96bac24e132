"""The paper's rules for M, by the closed form of K_w, the number of drafts that are accepted
(2409.16560, section 3.3): a threshold on the chance that a layer passes, and the mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from decoding.dice.closed_form import accept_probabilities, accepted_count_table
from decoding.dice.rejection import align
from decoding.policies.base import DRAFT_DEPTH, DRAFT_WIDTH, SURPLUS, Knob, TargetContext, WidthPolicy
from decoding.support.arrays import FloatArray
from decoding.support.checks import number


class CountedWidth(WidthPolicy, ABC):
    """M by a rule on the closed form of K_w: exact with replacement, an approximation without.

    It sees P, Q and w, and no draft. At the layer that ends an iteration nothing can be rejected,
    so M is the widest.
    """

    as_shipped: bool = False

    @abstractmethod
    def asked(self, counts: FloatArray) -> int:
        """M by the rule, 0 or more; the config limits it.

        Args:
            counts: P(K_w = k) for k = 0..w, [w + 1].
        """

    def target_width(self, context: TargetContext) -> int:
        config = context.draft.root.config
        if context.draft_width == 0:
            self._expected = 0.0
            return config.target_width
        both = align(context.target, context.draft.joint)
        accept = accept_probabilities(both.p, both.q, context.draft_width, as_shipped=self.as_shipped)
        counts = accepted_count_table(accept)[-1]
        asked = self.asked(counts)
        # The paper's rule looks at no draft after the M-th that it took, unless the rest is kept.
        capped = config.verification == "rejection" and config.surplus == "drop"
        most = min(max(asked, config.min_width), config.target_width) if capped else config.target_width
        self._expected = float(counts @ np.minimum(np.arange(len(counts)), most))
        return asked

    def expected_count(self, context: TargetContext) -> float | None:
        return self._expected


@dataclass
class ThresholdWidth(CountedWidth):
    """The paper's rule: the largest M with P(K_w >= M) >= threshold (2409.16560, section 3.3).

    Args:
        threshold: in (0, 1]; higher asks for fewer beams.
        as_shipped: reproduce the widths of the published code, which subtracts Q twice in the
            residual. For comparison only; the verification stays exact either way.
    """

    name = "threshold"
    knobs = (DRAFT_WIDTH, DRAFT_DEPTH, Knob("threshold", grid=(0.5, 0.7, 0.9), axis="thresholds"), SURPLUS)

    threshold: float = 0.9
    as_shipped: bool = False

    def __post_init__(self) -> None:
        number("threshold", self.threshold, above=0, most=1, hint="the paper uses 0.7 to 0.9")

    def asked(self, counts: FloatArray) -> int:
        at_least = counts[::-1].cumsum()[::-1]  # [w + 1] P(K_w >= k)
        return int(np.flatnonzero(at_least >= self.threshold - 1e-12)[-1])

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "threshold": self.threshold, "as_shipped": self.as_shipped}


class ExpectedWidth(CountedWidth):
    """The largest M that is no more than the mean of K_w: floor(E[K_w]), at least the config's
    min_width.
    """

    name = "expected"
    knobs = (DRAFT_WIDTH, DRAFT_DEPTH, SURPLUS)

    def asked(self, counts: FloatArray) -> int:
        return int(counts @ np.arange(len(counts)) + 1e-9)
