"""The paper's rule for M: a threshold on the chance that a layer passes (2409.16560, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from decoding.dice.closed_form import accept_probabilities, accepted_count_table
from decoding.dice.rejection import align
from decoding.policies.base import DRAFT_DEPTH, DRAFT_WIDTH, SURPLUS, Knob, TargetContext, WidthPolicy
from decoding.support.checks import number


@dataclass
class ThresholdWidth(WidthPolicy):
    """The paper's rule: the largest M with P(K_w >= M) >= threshold (2409.16560, section 3.3).

    K_w is taken from the closed form of design 5.3, which is exact with replacement and an
    approximation without. At the layer that ends an iteration nothing can be rejected, so M is the
    widest.

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

    def target_width(self, context: TargetContext) -> int:
        config = context.draft.root.config
        if context.draft_width == 0:
            return config.target_width
        both = align(context.target, context.draft.joint)
        accept = accept_probabilities(both.p, both.q, context.draft_width, as_shipped=self.as_shipped)
        counts = accepted_count_table(accept)[-1]  # [w + 1] P(K_w = k)
        at_least = counts[::-1].cumsum()[::-1]  # [w + 1] P(K_w >= k)
        passing = np.flatnonzero(at_least >= self.threshold - 1e-12)
        return int(passing[-1])

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "threshold": self.threshold, "as_shipped": self.as_shipped}
