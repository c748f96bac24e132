"""How much faster learned widths are than others at the same quality, with paired bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Families whose settings someone would tune; beam sampling is a fixed width that drafts nothing.
HAND_SET = ("beam_sample", "fixed", "threshold", "mass", "gap", "entropy")
LAST = "+last"  # of families that have a width of its own for the layer that ends an iteration
STOP = "+stop"  # of those that draft no further where the draft is unsure
OURS = "learned"


def family_of(method: str, settings: Mapping[str, Any]) -> str:
    """The family that a row is compared in."""
    asked = {LAST: "final_width", STOP: "stop_entropy"}
    return method + "".join(suffix for suffix, name in asked.items() if settings.get(name) is not None)


def speed_at(speeds: FloatArray, qualities: FloatArray, quality: float) -> float:
    """Speed of a family at a quality: along its undominated settings, linear in between.

    Args:
        speeds, qualities: of its settings, [N] each.
        quality: asked for. Above the family's best, that setting's speed counts, though it is worse: generous to it.
    """
    order = np.lexsort((qualities, speeds))[::-1]  # fastest first
    kept: list[int] = []
    for j in order.tolist():
        if not kept or qualities[j] > qualities[kept[-1]]:
            kept.append(j)
    return float(np.interp(quality, qualities[kept], speeds[kept]))


def comparisons(
    methods: Sequence[str],
    references: Mapping[str, int],
    speeds: tuple[FloatArray, FloatArray],
    qualities: tuple[FloatArray, FloatArray],
    hindsight: FloatArray | None = None,
    ours: str = OURS,
) -> list[dict[str, Any]]:
    """Learned widths against every other family, at the quality of each reference row.

    Args:
        methods: family of each row, [N].
        references: row index by the reference's name; its own quality is where speeds are compared.
        speeds, qualities: values [N], and the same under each resample of the prompts [N, B].
        hindsight: [N] speeds with layers that failed not drafted; the best of these at a quality is the oracle.
        ours: the family that is compared.

    Returns:
        One entry per reference that the learned rows reach: its name, quality, the learned speed, and per family
        ratio, low and high of learned over it (95% over resamples); "hand-set" is all of HAND_SET as one family, and
        where some of them have a last width or stop by entropy, "hand-set, plain" those that do neither. With
        hindsight also the oracle's speed and the share of the way to it from the fastest hand-set one.
    """
    families = {name: [i for i, method in enumerate(methods) if method == name] for name in dict.fromkeys(methods)}
    if ours not in families:
        return []
    mine, found = families[ours], []
    drawn = speeds[1].shape[1]
    for name, row in references.items():
        quality = float(qualities[0][row])
        if quality > qualities[0][mine].max():
            continue
        at = {family: _at(members, speeds, qualities, row) for family, members in families.items()}
        rivals = {family: value for family, value in at.items() if family != ours}
        hand = [family for family in families if family.split("+")[0] in HAND_SET]
        plain = [family for family in hand if family in HAND_SET]
        for together, members in (("hand-set, plain", plain), ("hand-set", hand)):
            if members and (members is hand or len(members) < len(hand)):
                pooled = [i for family in members for i in families[family]]
                rivals = {together: _at(pooled, speeds, qualities, row), **rivals}
        speed, draws = at[ours]
        reached = qualities[1][row] <= qualities[1][mine].max(axis=0)  # [B]
        ratios = {}
        for family, (value, resampled) in rivals.items():
            ratio = draws[reached] / resampled[reached]
            low, high = np.percentile(ratio, [2.5, 97.5]) if reached.any() else (math.nan, math.nan)
            ratios[family] = {"ratio": speed / value, "low": float(low), "high": float(high)}
        entry = {"reference": name, "quality": quality, "speed": speed, "over": ratios, "resamples": int(reached.sum())}
        if hindsight is not None and hand:
            known = np.isfinite(hindsight)
            oracle = speed_at(hindsight[known], qualities[0][known], quality)
            gap = oracle - rivals["hand-set"][0]
            entry |= {"oracle": oracle, "gap_closed": (speed - rivals["hand-set"][0]) / gap if gap > 0 else math.nan}
        found.append(entry | {"of": drawn})
    return found


def _at(
    members: Sequence[int], speeds: tuple[FloatArray, FloatArray], qualities: tuple[FloatArray, FloatArray], row: int
) -> tuple[float, FloatArray]:
    """A family's speed at a row's quality, and under each resample [B]."""
    value = speed_at(speeds[0][members], qualities[0][members], float(qualities[0][row]))
    columns = range(speeds[1].shape[1])
    draws = [speed_at(speeds[1][members, b], qualities[1][members, b], float(qualities[1][row, b])) for b in columns]
    return value, np.array(draws)


def undominated(points: Sequence[tuple[float, float]], keep: int) -> list[int]:
    """Indices of (speed, quality) that no other beats in both, at most `keep`, evenly along the quality; fast first."""
    best, front = -math.inf, []
    for j in sorted(range(len(points)), key=lambda j: (-points[j][0], -points[j][1])):
        if points[j][1] > best:
            best = points[j][1]
            front.append(j)
    if len(front) <= keep:
        return front
    marks = np.linspace(points[front[0]][1], points[front[-1]][1], keep)
    nearest = [min(front, key=lambda j: abs(points[j][1] - mark)) for mark in marks]
    return list(dict.fromkeys(nearest))
