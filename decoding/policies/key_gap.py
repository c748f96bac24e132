"""KeyGapWidth: a hand-set rule for shared noise. Drafts are followed as long as their keys say that
layers may pass.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from decoding.config import DecodingConfig
from decoding.errors import UserError
from decoding.policies.base import (
    DRAFT_DEPTH,
    DRAFT_WIDTH,
    LEAST_SHARE,
    SKIP,
    TARGET_WIDTH,
    DraftContext,
    Knob,
    Parents,
    RootContext,
    WidthPolicy,
)
from decoding.support.checks import number

_EVEN = 1.5  # nats between keys at which a layer passes about every other time


class KeyGapWidth(WidthPolicy):
    """Asks for equal widths at every layer, and for as many layers as are likely to pass by the
    keys of their drafts.

    The nearer the first candidate that is not drafted is to the last one that Q alone would select,
    the likelier the target's selection holds something that was not drafted. With g nats between
    the keys of the two, a layer is taken to pass with the chance 1 / (1 + exp(1.5 - g)). All
    target_width beams are asked for.

    Args:
        doubt: a further layer is drafted while the layers so far all pass with a chance of at least
            exp(-doubt).
        least_share: of the parents' weight; where those that the target has not scored hold less,
            the others propose alone and the draft's pass is left out.
    """

    name = "key_gap"
    knobs = (
        *(TARGET_WIDTH, DRAFT_WIDTH, DRAFT_DEPTH),
        Knob("doubt", grid=(0.3, 0.6, 1.2, 2.0), axis="doubts", of_drafts=True),
        SKIP,
    )
    needs_candidates = True

    def __init__(self, doubt: float = 1.0, least_share: float = LEAST_SHARE) -> None:
        self.doubt = number("doubt", doubt, least=0)
        self.least_share = number("least_share", least_share, least=0)
        self._doubt = 0.0  # that all layers drafted so far pass

    def check(self, config: DecodingConfig) -> None:
        if config.verification != "shared_noise" or config.mode != "beam_sample":
            raise UserError(
                f"KeyGapWidth goes by shared noise; mode is {config.mode!r} and verification {config.verification!r}. "
                "Set mode='beam_sample' and verification='shared_noise', or take another policy."
            )

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        if layer == 1:
            self._doubt = 0.0
        return self._doubt <= self.doubt

    def ask_draft(self, context: RootContext, layer: int, parents: Parents) -> bool:
        return parents.unknown_share >= self.least_share

    def draft_width(self, context: DraftContext) -> int:
        config, found = context.root.config, context.candidates
        assert found is not None
        if len(found) > config.draft_width:
            gap = math.log(found.keys[config.draft_width] / found.keys[config.target_width - 1])
            self._doubt += float(np.logaddexp(0.0, _EVEN - gap))
        return config.draft_width

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "doubt": self.doubt, "least_share": self.least_share}
