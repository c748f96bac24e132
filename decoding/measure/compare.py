"""Rows against each other at the same quality: learned widths over others with paired intervals,
and who is fastest.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from decoding.support.arrays import FloatArray

LAST = "+last"  # of curves that have a width of its own for the layer that ends an iteration
STOP = "+stop"  # of those that draft no further where the draft is unsure
OURS = "learned"


def curve_of(method: str, settings: Mapping[str, Any]) -> str:
    """The curve of speed against quality that a row is a point of: its method, and which width and
    stop it sets.
    """
    asked = {LAST: "final_width", STOP: "stop_entropy"}
    return method + "".join(suffix for suffix, name in asked.items() if settings.get(name) is not None)


def curve_of_row(row: Mapping[str, Any]) -> str:
    """The curve of a row of results, with its draft, its batch and, where several runs are joined,
    the run's label.
    """
    run = f"{row['run']}: " if "run" in row else ""
    draft = f" draft={row['draft']}" if row.get("draft") is not None else ""
    return run + curve_of(row["method"], row["settings"]) + draft + "".join(row["name"].partition(", batch ")[1:])


def speed_at(speeds: FloatArray, qualities: FloatArray, quality: float) -> float:
    """Speed of a curve at a quality: along its undominated settings, linear in between.

    Args:
        speeds, qualities: of its settings, [N] each.
        quality: asked for. Above the curve's best, that setting's speed counts, though it is worse:
            generous to it.
    """
    order = np.lexsort((qualities, speeds))[::-1]  # fastest first
    kept: list[int] = []
    for j in order.tolist():
        if not kept or qualities[j] > qualities[kept[-1]]:
            kept.append(j)
    return float(np.interp(quality, qualities[kept], speeds[kept]))


def comparisons(
    curves: Sequence[str],
    hand_set: Collection[str],
    references: Mapping[str, int],
    speeds: tuple[FloatArray, FloatArray],
    qualities: tuple[FloatArray, FloatArray],
    hindsight: FloatArray | None = None,
    ours: str = OURS,
) -> list[dict[str, Any]]:
    """Learned widths against every other curve, at the quality of each reference row.

    Args:
        curves: curve of each row, [N].
        hand_set: methods whose settings someone would tune.
        references: row index by the reference's name; its own quality is where speeds are compared.
        speeds, qualities: values [N], and the same under each resample of the prompts [N, B].
        hindsight: [N] speeds with layers that failed not drafted; the best of these at a quality is
            the oracle.
        ours: the curve that is compared.

    Returns:
        One entry per reference that the learned rows reach: its name, quality, the learned speed,
        and per curve ratio, low and high of learned over it (95% over resamples); "hand-set" is all
        rows of `hand_set` as one curve, and where some of them have a last width or stop by
        entropy, "hand-set, plain" those that do neither. With hindsight also the oracle's speed and
        the share of the way to it from the fastest hand-set one.
    """
    members = {curve: [i for i, name in enumerate(curves) if name == curve] for curve in dict.fromkeys(curves)}
    if ours not in members:
        return []
    hand = [i for i, curve in enumerate(curves) if curve.partition("+")[0] in hand_set]
    plain = [i for i in hand if "+" not in curves[i]]
    pooled = {"hand-set": hand} | ({"hand-set, plain": plain} if len(plain) < len(hand) else {})
    rivals = {name: rows for name, rows in pooled.items() if rows}
    rivals |= {curve: rows for curve, rows in members.items() if curve != ours}
    best = qualities[1][members[ours]].max(axis=0)  # [B]
    found = []
    for name, row in references.items():
        quality = float(qualities[0][row])
        if quality > qualities[0][members[ours]].max():
            continue
        speed, draws = _at(members[ours], speeds, qualities, row)
        reached = qualities[1][row] <= best  # [B]
        at = {rival: _at(rows, speeds, qualities, row) for rival, rows in rivals.items()}
        entry = {
            "reference": name,
            "quality": quality,
            "speed": speed,
            "over": {rival: _ratio(speed, draws[reached], there[0], there[1][reached]) for rival, there in at.items()},
            "resamples": int(reached.sum()),
        }
        if hindsight is not None and hand:
            known = np.isfinite(hindsight)
            oracle = speed_at(hindsight[known], qualities[0][known], quality)
            gap = oracle - at["hand-set"][0]
            entry |= {"oracle": oracle, "gap_closed": (speed - at["hand-set"][0]) / gap if gap > 0 else math.nan}
        found.append(entry | {"of": len(best)})
    return found


def _ratio(ours: float, our_draws: FloatArray, theirs: float, their_draws: FloatArray) -> dict[str, float]:
    """Ratio of two speeds, and its central 95% over resamples, of which there may be none."""
    low, high = np.percentile(our_draws / their_draws, [2.5, 97.5]) if len(our_draws) else (math.nan, math.nan)
    return {"ratio": ours / theirs, "low": float(low), "high": float(high)}


def _at(
    members: Sequence[int], speeds: tuple[FloatArray, FloatArray], qualities: tuple[FloatArray, FloatArray], row: int
) -> tuple[float, FloatArray]:
    """A curve's speed at a row's quality, and under each resample [B]."""
    value = speed_at(speeds[0][members], qualities[0][members], float(qualities[0][row]))
    columns = range(speeds[1].shape[1])
    draws = [speed_at(speeds[1][members, b], qualities[1][members, b], float(qualities[1][row, b])) for b in columns]
    return value, np.array(draws)


def undominated(points: Sequence[tuple[float, float]], keep: int) -> list[int]:
    """Indices of (speed, quality) that no other beats in both, at most `keep`, evenly along the
    quality; fast first.
    """
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


def fastest_at(rows: Sequence[Mapping[str, Any]], quality: float, speed: str) -> Mapping[str, Any] | None:
    """The fastest of results' rows whose log-probability per token is at least `quality`; None:
    none reaches it.
    """
    measured = [row for row in rows if {speed, "log_prob"} <= row["summary"].keys()]
    able = [row for row in measured if row["summary"]["log_prob"]["value"] >= quality]
    return max(able, key=lambda row: row["summary"][speed]["value"], default=None)
