"""ExploringWidth: drafts at random, to log traces by which a controller learns."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from decoding.config import DecodingConfig
from decoding.errors import UserError
from decoding.widths import DraftContext, Parents, RootContext, WidthPolicy


class ExploringWidth(WidthPolicy):
    """Full target widths, and drafts whose number, depth and source are drawn at random.

    Half of the layers are as wide as they may be and half of the iterations as deep, so that most of what a controller
    may do later is seen; the draft's pass is left out now and then where the parents that need it hold little weight.

    Args:
        seed: of the policy's own stream, separate from the decoder's; a prompt's fork mixes in the prompt's seed.
    """

    name = "exploring"

    def __init__(self, seed: int = 0) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise UserError(f"seed is {seed!r}; give a whole number of 0 or more.")
        self.seed = seed
        self._random = np.random.default_rng(seed)
        self._depth = 0  # of this iteration

    def check(self, config: DecodingConfig) -> None:
        if config.verification != "shared_noise" or config.mode != "beam_sample":
            raise UserError(
                "ExploringWidth logs traces of shared noise: set decoding.mode=beam_sample and "
                "decoding.verification=shared_noise."
            )

    def fork(self, seed: int) -> ExploringWidth:
        forked = copy.copy(self)
        forked._random = np.random.default_rng([self.seed, seed])
        return forked

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        if layer == 1:
            deepest = context.config.draft_depth
            self._depth = deepest if self._random.random() < 0.5 else int(self._random.integers(1, deepest + 1))
        return layer <= self._depth

    def ask_draft(self, context: RootContext, layer: int, parents: Parents) -> bool:
        return parents.unknown_share > 0.3 * self._random.random() ** 2

    def draft_width(self, context: DraftContext) -> int:
        config = context.root.config
        if self._random.random() < 0.5:
            return config.draft_width
        return int(self._random.integers(config.target_width, config.draft_width + 1))

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed}
