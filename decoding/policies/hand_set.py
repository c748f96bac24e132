"""Width rules by hand, each on one signal that the learned widths go by as well: P's mass, its
weights, Q's entropy.

They are what to try before training anything, and what learned widths are compared with.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from decoding.config import DecodingConfig
from decoding.dice.sampling import Distribution
from decoding.policies.base import (
    DRAFT_DEPTH,
    DRAFT_WIDTH,
    FINAL_WIDTH,
    SURPLUS,
    DraftContext,
    Knob,
    RootContext,
    TargetContext,
    WidthPolicy,
    check_final_width,
)
from decoding.support.checks import number


def _knobs(own: Knob) -> tuple[Knob, ...]:
    """A rule's own knob among those that all of them have."""
    stop = Knob("stop_entropy", "stop", axis="stop_entropies", of_drafts=True)
    return (DRAFT_WIDTH, DRAFT_DEPTH, own, FINAL_WIDTH, stop, SURPLUS)


@dataclass
class HandSetWidth(WidthPolicy, ABC):
    """M by a rule of `asked`; the draft as wide as it may be, and as deep, or until it is unsure.

    Args:
        final_width: M of the layer that ends an iteration, where nothing can be rejected: more
            beams there cost what they cost to carry, and no pass. None: by the rule, too.
        stop_entropy: nats. A layer whose draft had more entropy than this is the last to be
            drafted; the first one always is drafted. None: as deep as the config allows.

    Raises:
        UserError: stop_entropy is no number of at least 0.
    """

    final_width: int | None = field(default=None, kw_only=True)
    stop_entropy: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.stop_entropy is not None:
            number("stop_entropy", self.stop_entropy, least=0, hint="0.5 to 2 are worth trying")
        self._entropy = 0.0  # of the last layer that was drafted

    def check(self, config: DecodingConfig) -> None:
        check_final_width(self.final_width, config)

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        return layer == 1 or self.stop_entropy is None or self._entropy <= self.stop_entropy

    def draft_width(self, context: DraftContext) -> int:
        if self.stop_entropy is not None:
            self._entropy = entropy(context.joint)
        return super().draft_width(context)

    def target_width(self, context: TargetContext) -> int:
        if context.draft_width == 0 and self.final_width is not None:
            return self.final_width
        return min(self.asked(context), context.draft.root.config.target_width)

    @abstractmethod
    def asked(self, context: TargetContext) -> int:
        """M by the rule, 1 or more; the config's target_width limits it."""

    def describe(self) -> dict[str, Any]:
        return {"name": self.name} | {setting.name: getattr(self, setting.name) for setting in fields(self)}


@dataclass
class MassWidth(HandSetWidth):
    """Asks for beams where the target is undecided: the smallest M whose likeliest continuations
    hold a share of P.

    P alone decides, so that M may follow it (design 5.4), at the layer that ends an iteration too.
    With `surplus="keep"` it is the strongest of the hand-set rules.

    Args:
        share: of P's mass, in (0, 1]; higher asks for more beams.
        final_width, stop_entropy: see `HandSetWidth`.
    """

    name = "mass"
    knobs = _knobs(Knob("share", grid=(0.6, 0.8, 0.95), axis="shares"))

    share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        number("share", self.share, above=0, most=1, hint="0.6 to 0.95 are worth trying")

    def asked(self, context: TargetContext) -> int:
        held = np.sort(context.target.probs)[::-1][: context.draft.root.config.target_width].cumsum()
        return int(np.searchsorted(held, self.share - 1e-12)) + 1


@dataclass
class GapWidth(HandSetWidth):
    """Asks for as many beams as there are continuations within a gap of the best one's weight.

    Relative threshold pruning (1702.01806) as a width: a clear winner is followed alone. P alone
    decides.

    Args:
        gap: nats, 0 or more; higher asks for more beams.
        final_width, stop_entropy: see `HandSetWidth`.
    """

    name = "gap"
    knobs = _knobs(Knob("gap", grid=(0.5, 1.5, 3), axis="gaps"))

    gap: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number("gap", self.gap, least=0, hint="nats; 0.5 to 3 are worth trying")

    def asked(self, context: TargetContext) -> int:
        probs = context.target.probs
        return int((probs >= probs.max(initial=0.0) * math.exp(-self.gap) * (1 - 1e-12)).sum())


@dataclass
class EntropyWidth(HandSetWidth):
    """Asks for beams where the draft is undecided: a multiple of exp(entropy of Q), rounded up.

    exp(entropy) is how many equally likely continuations would be as undecided. Known before the
    layer is drawn; at the layer that ends an iteration the target's P takes Q's place.

    Args:
        scale: beams for each of these continuations, above 0; higher asks for more beams.
        final_width, stop_entropy: see `HandSetWidth`.
    """

    name = "entropy"
    knobs = _knobs(Knob("scale", grid=(0.3, 0.6, 1), axis="scales"))

    scale: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        number("scale", self.scale, above=0, hint="0.2 to 1 are worth trying")

    def asked(self, context: TargetContext) -> int:
        return max(1, math.ceil(self.scale * math.exp(entropy(context.draft.joint)) - 1e-9))


def entropy(joint: Distribution) -> float:
    """Entropy of a joint distribution in nats; 0 where one entry holds everything."""
    probs = joint.probs[joint.probs > 0]  # shares of a beam search may be too small for a float
    return float(-(probs * np.log(probs)).sum())
