"""A policy with one width for every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from decoding.config import DecodingConfig
from decoding.errors import UserError
from decoding.policies.base import (
    ASKED_WIDTH,
    DRAFT_DEPTH,
    DRAFT_WIDTH,
    FINAL_WIDTH,
    LEAST_SHARE,
    SKIP,
    SURPLUS,
    TARGET_WIDTH,
    DraftContext,
    Parents,
    RootContext,
    TargetContext,
    WidthPolicy,
    check_final_width,
)
from decoding.support.checks import number


@dataclass
class FixedWidth(WidthPolicy):
    """Asks for equal widths at every layer; what is None comes from the config.

    Args:
        target_width, draft_width, draft_depth: M, w and γ; at most the config's.
        final_width: M of the layer that ends an iteration, where nothing can be rejected: more
            beams there cost what they cost to carry, and no pass. None: M.
        least_share: of the parents' weight; where those that the target has not scored hold less,
            the others propose alone and the draft's pass is left out; not under the paper's rule.
    """

    name = "fixed"
    knobs = (TARGET_WIDTH, DRAFT_WIDTH, DRAFT_DEPTH, ASKED_WIDTH, FINAL_WIDTH, SKIP, SURPLUS)

    fixed_target_width: int | None
    fixed_draft_width: int | None
    fixed_draft_depth: int | None
    final_width: int | None
    least_share: float

    def __init__(
        self,
        target_width: int | None = None,
        draft_width: int | None = None,
        draft_depth: int | None = None,
        final_width: int | None = None,
        least_share: float = LEAST_SHARE,
    ) -> None:
        self.fixed_target_width, self.fixed_draft_width, self.fixed_draft_depth = target_width, draft_width, draft_depth
        self.final_width, self.least_share = final_width, number("least_share", least_share, least=0)

    def check(self, config: DecodingConfig) -> None:
        check_final_width(self.final_width, config)
        for name in ("target_width", "draft_width", "draft_depth"):
            value, limit = getattr(self, f"fixed_{name}"), getattr(config, name)
            least = 0 if name == "draft_depth" else 1
            if value is not None and not least <= value <= limit:
                raise UserError(
                    f"FixedWidth({name}={value}) is outside {least}..{limit}, the range that the decoding config "
                    f"allows. Lower it or raise decoding.{name}."
                )
        if self.fixed_target_width is not None and self.fixed_target_width < config.min_width:
            raise UserError(
                f"FixedWidth(target_width={self.fixed_target_width}) is less than min_width ({config.min_width}). "
                "Raise it or lower decoding.min_width."
            )
        asked = self.fixed_target_width or config.target_width
        drafted = self.fixed_draft_width or config.draft_width
        if config.draft_depth and self.fixed_draft_depth != 0 and drafted < asked:
            raise UserError(
                f"FixedWidth: draft_width ({drafted}) is less than target_width ({asked}): a layer could never pass. "
                "Raise draft_width or lower target_width."
            )

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        return self.fixed_draft_depth is None or layer <= self.fixed_draft_depth

    def ask_draft(self, context: RootContext, layer: int, parents: Parents) -> bool:
        return parents.unknown_share >= self.least_share

    def draft_width(self, context: DraftContext) -> int:
        return self.fixed_draft_width or context.root.config.draft_width

    def target_width(self, context: TargetContext) -> int:
        if context.draft_width == 0 and self.final_width is not None:
            return self.final_width
        return self.fixed_target_width or context.draft.root.config.target_width

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "target_width": self.fixed_target_width,
            "draft_width": self.fixed_draft_width,
            "draft_depth": self.fixed_draft_depth,
            "final_width": self.final_width,
            "least_share": self.least_share,
        }
