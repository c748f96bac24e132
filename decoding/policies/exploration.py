"""Widths and depths at random, for comparison and for traces."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from decoding.config import DecodingConfig
from decoding.errors import UserError
from decoding.policies.base import DraftContext, Parents, RootContext, TargetContext, WidthPolicy
from decoding.support.checks import number, whole


@dataclass
class RandomWidth(WidthPolicy):
    """Widths and depth drawn at random: what a rule has to be better than.

    Most prompts have a limit on M of their own, small ones as often as large ones (log-uniform),
    and M is uniform below it: with M uniform over its whole range forests would seldom get past
    their first layer. Half of the iterations draft as deep as they
    may, half of the layers as wide as they may, and the layer that ends an iteration is as wide as
    it may be three times out of four; all else is uniform.

    Args:
        seed: of the policy's own stream, separate from the decoder's; a prompt's fork mixes in the
            prompt's seed.
        full_share: share of the prompts decoded at full width, so that every M is seen at every
            layer.
    """

    name = "random"
    family = "control"

    seed: int = 0
    full_share: float = 0.1

    def __post_init__(self) -> None:
        whole("seed", self.seed, least=0)
        number("full_share", self.full_share, least=0, most=1, hint="0.1 shows full widths now and then")
        self._random = np.random.default_rng(self.seed)
        self._full, self._most, self._depth = False, 1, 0  # of the prompt, of the iteration

    def fork(self, seed: int) -> RandomWidth:
        forked = copy.copy(self)
        forked._random = np.random.default_rng([self.seed, seed])
        return forked

    def reset(self, config: DecodingConfig) -> None:
        self._full = self._chance(self.full_share)
        least, most = config.min_width, config.target_width
        self._most = min(most, int(least * math.exp(self._random.random() * math.log((most + 1) / least))))
        self._depth = config.draft_depth

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        if layer == 1:
            deepest = context.config.draft_depth
            self._depth = deepest if self._chance(0.5) else int(self._random.integers(1, deepest + 1))
        return layer <= self._depth

    def draft_width(self, context: DraftContext) -> int:
        config = context.root.config
        wide = self._full or self._chance(0.5)
        return config.draft_width if wide else int(self._random.integers(1, config.draft_width + 1))

    def target_width(self, context: TargetContext) -> int:
        config = context.draft.root.config
        if self._full or (context.draft_width == 0 and self._chance(0.75)):
            return config.target_width
        return int(self._random.integers(config.min_width, self._most + 1))

    def _chance(self, share: float) -> bool:
        return bool(self._random.random() < share)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "seed": self.seed, "full_share": self.full_share}


@dataclass
class UniformWidth(WidthPolicy):
    """Each iteration's M drawn uniformly from a set of widths; with nothing drafted, beam sampling
    of a random width.

    The draw is a function of the seeds and of the iteration's number, so that it knows nothing of
    what was drafted, and drafts change nothing in it.

    Args:
        seed: of the draws; a prompt's fork mixes in the prompt's seed.
        widths: the set; None: all from the config's min_width to its target_width.
    """

    name = "uniform"
    family = "control"

    seed: int = 0
    widths: Sequence[int] | None = None

    def __post_init__(self) -> None:
        whole("seed", self.seed, least=0)
        if self.widths is not None:
            self.widths = tuple(whole("Each of widths", width, least=1) for width in self.widths)
            if not self.widths:
                raise UserError("widths is empty; give at least one, such as [1, 2, 4], or null for all.")
        self._seeds = [self.seed]

    def check(self, config: DecodingConfig) -> None:
        least, most = config.min_width, config.target_width
        if outside := [width for width in self.widths or () if not least <= width <= most]:
            raise UserError(
                f"UniformWidth(widths={list(self.widths or ())}) holds {outside[0]}, outside {least}..{most}, the "
                "range that the decoding config allows. Leave it out, or change decoding.min_width or "
                "decoding.target_width."
            )

    def fork(self, seed: int) -> UniformWidth:
        forked = copy.copy(self)
        forked._seeds = [self.seed, seed]
        return forked

    def target_width(self, context: TargetContext) -> int:
        config = context.draft.root.config
        widths = self.widths or range(config.min_width, config.target_width + 1)
        draw = np.random.default_rng([*self._seeds, context.draft.root.iteration])
        return widths[int(draw.integers(len(widths)))]

    def describe(self) -> dict[str, Any]:
        widths = None if self.widths is None else list(self.widths)
        return {"name": self.name, "seed": self.seed, "widths": widths}


class ExploringWidth(WidthPolicy):
    """Full target widths, and drafts whose number, depth and source are drawn at random.

    Half of the layers are as wide as they may be and half of the iterations as deep, so that most
    of what a controller may do later is seen; the draft's pass is left out now and then where the
    parents that need it hold little weight.

    Args:
        seed: of the policy's own stream, separate from the decoder's; a prompt's fork mixes in the
            prompt's seed.
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
