"""The verdict on a layer: is the first M of the selection among the drafts? One rule for all selections. Design 5.2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NEVER = -1  # need_j where no number of the drafts that were ranked would do


@dataclass(frozen=True)
class Verdict:
    """What became of one layer."""

    accepted: int  # K: places of the selection, from its first on, that need no further pass
    passed: bool


def judge(growing_places: Sequence[int], known: Sequence[bool], size: int, target_width: int) -> Verdict:
    """Judge a layer.

    Args:
        growing_places: places of the selection whose beams go on, ascending; what ended needs nothing.
        known: whether the target has scored each of these beams: they were drafted, now or earlier.
        size: places of the selection.
        target_width: M.
    """
    accepted = next((place for place, is_known in zip(growing_places, known, strict=True) if not is_known), size)
    return Verdict(accepted, accepted >= min(target_width, size))


def needs(growing_places: Sequence[int], ranks: Sequence[int], size: int) -> list[int]:
    """need_1..need_size: how many drafts, in draft order, hold the first j of the selection.

    Args:
        growing_places: as for `judge`.
        ranks: of each of these beams in the order of drafts, from 1; 0 where it needs no draft, NEVER beyond what was
            ranked.
        size: places of the selection.
    """
    need, worst = [], 0
    rank_at = dict(zip(growing_places, ranks, strict=True))
    for place in range(size):
        rank = rank_at.get(place, 0)
        worst = NEVER if NEVER in (rank, worst) else max(worst, rank)
        need.append(worst)
    return need
