"""DecodingConfig: what to decode, and the checks that refuse what cannot work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from decoding.errors import UserError

_CHOICES = {
    "mode": ("beam_sample", "beam_search"),
    "warp": ("joint", "beam"),
    "verification": ("rejection", "shared_noise"),
    "surplus": ("keep", "drop"),
    "refill": ("full", "width"),
    "early_stopping": (True, False, "never"),
}
_COUNTS = (
    *("target_width", "draft_width", "draft_depth", "min_width"),
    *("max_new_tokens", "min_new_tokens", "num_return_sequences", "oversample"),
)
_MOST = 2**31 - 1  # of all counts
_STEEPEST = 30  # length penalty: _MOST to its power is a number that floats hold
_FROM_ZERO = ("draft_depth", "min_new_tokens")
# How many of Q's entries are worth a race for so many drafts: Q misses what P has if it is cut as narrowly, and a tail
# that is never selected takes drafts from what is. (widest draft width, entries); beyond the last 80.
_DRAFT_CUTS = ((8, 20), (24, 40), (40, 60))
_WIDEST_CUT = 80


@dataclass(frozen=True)
class DecodingConfig:
    """Settings of one decoding run; every field has the meaning it has in the README's table.

    `exact=True` is shorthand for `surplus="drop", refill="width"`: what is kept and returned then follows
    beam sampling of the chosen widths. With the defaults the first M beams of a layer are exact draws and
    further beams may be added, never substituted.

    Args:
        mode: "beam_sample" draws from the joint distribution; "beam_search" keeps its likeliest entries, as
            `generate(num_beams=target_width, do_sample=False)` of transformers does: token for token where every layer
            keeps target_width beams. temperature, top_k, top_p, warp, oversample, draft_top_k, verification and
            replacement do not apply to it.
        target_width: widest M, the beams kept after a layer.
        draft_width: widest w, the beams drafted per layer; at least `target_width`.
        draft_depth: deepest forest, in layers per iteration; 0 decodes with the target alone.
        min_width: least M that a policy may ask for.
        max_new_tokens: continuation length at which every beam stops, in tokens.
        min_new_tokens: no hypothesis ends on EOS before it has so many tokens.
        temperature: divides the logits of both models; > 0.
        top_k, top_p: cut the distribution (None: whole vocabulary); see `warp`.
        warp: cut the "joint" distribution over (beam, token), or each "beam"'s row as transformers does.
        oversample: a step draws so many times target_width continuations and keeps the likeliest target_width of
            them; 1 keeps what is drawn (the paper), 2 is what transformers does with one EOS token or none.
        draft_top_k: cuts the draft's distribution, which may be any; at least `top_k`. None: where there is a top_k, 20
            for draft widths up to 8, 40 up to 24, 60 up to 40 and 80 beyond, and never less than top_k
            (verification="rejection": top_k itself).
        verification: "shared_noise" (default): target and draft roll the same dice, so that with target_width beams
            at every layer the tokens are those of `beam_sample` with the same seed, up to rounding; "rejection": the
            paper's rule, equal in distribution.
        replacement: draw a layer's beams with replacement; equal draws are one beam. For verification="rejection" only.
        surplus: "keep" accepted drafts beyond M (up to target_width) or "drop" them.
        refill: a failed layer is filled to target_width ("full") or to its own M ("width").
        one_beam_cache: only the best beam enters the next iteration (2409.16560, section 3.4).
        length_penalty, early_stopping: as in transformers' beam search.
        eos_token_id: a token id, several, None (the model's own) or -1 (never stop). Ids that cannot occur end nothing;
            a search counts all that a list holds, as transformers does, for the candidates it looks at.
        num_return_sequences: hypotheses returned per prompt; at most target_width.

    Raises:
        UserError: a value is not allowed; the message says which ones are.
    """

    mode: str = "beam_sample"
    target_width: int = 4
    draft_width: int = 6
    draft_depth: int = 3
    min_width: int = 1
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    warp: str = "joint"
    oversample: int = 1
    draft_top_k: int | None = None
    verification: str = "shared_noise"
    replacement: bool = False
    surplus: str = "keep"
    refill: str = "full"
    exact: bool = False
    one_beam_cache: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    eos_token_id: int | list[int] | None = None
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        if self.exact:
            object.__setattr__(self, "surplus", "drop")
            object.__setattr__(self, "refill", "width")
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if not any(value is a if isinstance(a, bool) else value == a for a in allowed):
                raise UserError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}.")
        for name in _COUNTS:
            self._check_count(name, least=0 if name in _FROM_ZERO else 1)
        for name in ("top_k", "draft_top_k"):
            if getattr(self, name) is not None:
                self._check_count(name, least=1)
        self._check_numbers()
        self._check_end_tokens()
        self._check_widths()
        self._check_search()
        self._check_draws()

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= _MOST:
            most = "" if not isinstance(value, int) or value < least else f" and at most {_MOST}"
            raise UserError(f"{name} is {value!r}; give a whole number of at least {least}{most}.")

    def _check_numbers(self) -> None:
        if not _is_number(self.temperature) or self.temperature <= 0:
            raise UserError(
                f"temperature is {self.temperature!r}; give a number above 0 (1 leaves the model as it is; "
                "for the most likely tokens use a small one such as 0.1)."
            )
        if self.top_p is not None and (not _is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise UserError(f"top_p is {self.top_p!r}; give a number in (0, 1], or null for no cut.")
        if not _is_number(self.length_penalty) or abs(self.length_penalty) > _STEEPEST:
            raise UserError(
                f"length_penalty is {self.length_penalty!r}; give a number from -{_STEEPEST} to {_STEEPEST} (1 is the "
                "default)."
            )

        for name in ("temperature", "top_p", "length_penalty"):
            if getattr(self, name) is not None:  # whole ones too; what is beyond floats was refused
                object.__setattr__(self, name, float(getattr(self, name)))

    def _check_end_tokens(self) -> None:
        ids = self.eos_token_id
        if isinstance(ids, Iterable) and not isinstance(ids, str):
            ids = list(ids)  # also what Hydra passes for a list
            object.__setattr__(self, "eos_token_id", ids)
        for id_ in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if isinstance(id_, bool) or not isinstance(id_, int):
                raise UserError(
                    f"eos_token_id is {self.eos_token_id!r}; give a token id, a list of them, null for the model's "
                    "own, or -1 to never stop."
                )

    def _check_widths(self) -> None:
        if self.draft_depth and self.draft_width < self.target_width:
            raise UserError(
                f"draft_width ({self.draft_width}) is less than target_width ({self.target_width}): a layer could "
                "never pass. Raise draft_width or lower target_width."
            )
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens ({self.min_new_tokens}) is more than max_new_tokens ({self.max_new_tokens}). Lower it "
                "or raise max_new_tokens."
            )
        if self.min_width > self.target_width:
            raise UserError(
                f"min_width ({self.min_width}) is more than target_width ({self.target_width}), the widest M. "
                "Lower min_width or raise target_width."
            )
        if self.num_return_sequences > self.target_width:
            raise UserError(
                f"num_return_sequences ({self.num_return_sequences}) is more than target_width ({self.target_width}): "
                "there are never more beams than that. Lower it or raise target_width."
            )
        if self.warp == "joint" and self.top_k is not None and self.top_k < self.target_width:
            raise UserError(
                f"top_k ({self.top_k}) is less than target_width ({self.target_width}) and warp is 'joint': the cut "
                "would leave fewer continuations than beams. Raise top_k, lower target_width, or set warp=beam."
            )

    def _check_search(self) -> None:
        """Beam search draws nothing: refuse what shapes draws."""
        usual = {"temperature": 1.0, "top_k": None, "top_p": None, "replacement": False}
        usual |= {"oversample": 1, "draft_top_k": None}
        for name, value in usual.items() if self.mode == "beam_search" else ():
            if getattr(self, name) != value:
                raise UserError(
                    f"{name} is {getattr(self, name)!r} and mode is 'beam_search', which draws nothing: leave {name} "
                    f"at {value!r} (on the command line decoding=beam_search does), or use mode='beam_sample'."
                )

    def _check_draws(self) -> None:
        """Refuse what the rule of verification cannot do."""
        if self.mode == "beam_search":
            return
        if self.verification == "rejection" and self.oversample > 1:
            raise UserError(
                f"oversample is {self.oversample} and verification is 'rejection', which keeps what it draws: set "
                "oversample=1, or verification=shared_noise."
            )
        if self.verification == "shared_noise" and self.replacement:
            raise UserError(
                "replacement is True and verification is 'shared_noise', which draws without: set replacement=False, "
                "or verification=rejection."
            )
        draws = self.oversample * self.target_width
        if self.draft_top_k is not None and self.warp == "joint" and self.draft_top_k < draws:
            raise UserError(
                f"draft_top_k ({self.draft_top_k}) is less than oversample * target_width ({draws}): the draft could "
                "not propose a layer. Raise draft_top_k, or leave it out for a cut that grows with the draft width."
            )
        if self.top_k is None:
            return
        if self.draft_top_k is not None and self.draft_top_k < self.top_k:
            raise UserError(
                f"draft_top_k ({self.draft_top_k}) is less than top_k ({self.top_k}): the draft could not propose what "
                "the target may draw. Raise draft_top_k, or leave it out for a cut that grows with the draft width."
            )
        if self.warp == "joint" and self.oversample > 1 and self.top_k < draws:
            raise UserError(
                f"top_k ({self.top_k}) is less than oversample * target_width ({draws}) and warp is 'joint': the cut "
                "would leave fewer continuations than are drawn. Raise top_k, lower oversample, or set warp=beam."
            )

    def draft_cut(self, width: int) -> int | None:
        """Entries that top-k leaves of Q where `width` are drafted; None: all."""
        if self.draft_top_k is not None:
            return self.draft_top_k
        if self.top_k is None or self.verification == "rejection":
            return self.top_k
        grown = next((entries for widest, entries in _DRAFT_CUTS if width <= widest), _WIDEST_CUT)
        return max(self.top_k, grown)

    def with_changes(self, **changes: Any) -> DecodingConfig:
        """A checked copy with some fields changed."""
        return replace(self, **changes)


def _is_number(value: object) -> bool:
    """True if a value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
