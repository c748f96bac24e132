"""Plots of results: quality against speed, and how well a controller is calibrated."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from decoding.measure.compare import LAST, OURS, STOP, curve_of, curve_of_row, undominated
from decoding.support.arrays import FloatArray
from decoding.support.checks import choice

FORMATS = ("png", "svg", "pdf")
_LABELLED = 12  # rows of a plot that can all have labels
_MARKERS = "osD^vPX*<>hd"
_LINES = {"": "-", LAST: "--", STOP: ":", LAST + STOP: "-."}


def plot_frontier(rows: Sequence[Mapping[str, Any]], speed: str = "tokens_per_second") -> Figure:
    """Quality (log-probability per token) against tokens/s: one curve per method through its best
    rows.

    Curves with a last width are dashed, those that stop by entropy dotted, in the colour of those
    that do neither. Where there are many rows, only learned ones and beam sampling are labelled;
    rows far below the others are left out, and counted.

    Args:
        rows: those without the metric, or without a quality, are left out.
        speed: metric of the horizontal axis.
    """
    rows = [row for row in rows if {speed, "log_prob"} <= row["summary"].keys()]
    points = np.array([_point(row, speed) for row in rows])  # [N, 6] x, y, and errors below and above
    curves = [curve_of_row(row) for row in rows]
    extras = [curve_of("", row["settings"]) for row in rows]
    plain = [curve.replace(extra, "", 1) for curve, extra in zip(curves, extras, strict=True)]  # one colour each
    colour_of = {name: i for i, name in enumerate(dict.fromkeys(plain))}
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"]
    for curve in dict.fromkeys(curves):
        members = [j for j, name in enumerate(curves) if name == curve]
        i, extra, own = colour_of[plain[members[0]]], extras[members[0]], points[members]
        style: dict[str, Any] = {"color": colours(i % 10), "marker": _MARKERS[i % len(_MARKERS)]}
        style |= {"mfc": "white"} if extra else {}
        best = undominated([(x, y) for x, y in own[:, :2].tolist()], len(own))
        errors: dict[str, Any] = {"xerr": own[:, 2:4].T, "yerr": own[:, 4:6].T, "elinewidth": 0.8, "capsize": 0}
        axes.errorbar(own[:, 0], own[:, 1], **errors, **style, ls="none", ms=5, alpha=0.45)
        axes.plot(own[best, 0], own[best, 1], **style, ms=6, lw=1.4, ls=_LINES[extra], label=curve)
        if len(rows) <= _LABELLED or rows[members[0]]["method"].startswith((OURS, "beam_sample")):
            _annotate(axes, [rows[members[j]] for j in best], own[best], style["color"])
    _leave_out_the_worst(axes, points[:, 1])
    modelled = "" if speed == "tokens_per_second" else "modelled "
    axes.set_xlabel(f"{modelled}tokens per second (faster to the right)")
    axes.set_ylabel("log-probability per token (better above)")
    axes.set_title("Quality against speed; bars: 95% bootstrap intervals over prompts", fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _leave_out_the_worst(axes: Axes, quality: FloatArray) -> None:
    """End the axis where rows that are far worse than most would squeeze all others together; [N]."""
    best, middle = quality.max(), np.median(quality)
    lowest = best - 5 * (best - middle)
    below = int((quality < lowest).sum())
    if below:
        axes.set_ylim(bottom=lowest)
        axes.text(0.01, 0.01, f"{below} more below", transform=axes.transAxes, fontsize=7, color="gray")


_CURVES = {
    "candidate": "candidate selected",
    "after": "P(need_j <= w), drafted",
    "before": "P(need_j <= w), ahead",
}
_CURVES_IN_A_ROW = 5


def calibration_curves(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The reliability bins that a controller was saved with, by title; empty where it has none."""
    bins = provenance.get("reliability")
    complete = isinstance(bins, Mapping) and {"predicted", "observed", "rows"} <= set(bins)
    if not complete or bins is None:
        return {}
    curves = bins.get("curves", {"candidate": bins})
    return {title: curves[name] for name, title in _CURVES.items() if name in curves}


def plot_calibration(calibration: Mapping[str, Any]) -> Figure:
    """Reliability of each predicted probability: observed share against prediction, dots by how
    many there are.
    """
    across = min(len(calibration), _CURVES_IN_A_ROW)
    down = -(-len(calibration) // across)
    figure = Figure(figsize=(4.2 * across, 4.4 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    for axes in panels[len(calibration) :]:
        axes.set_axis_off()
    for axes, (name, curve) in zip(panels, calibration.items(), strict=False):
        predicted = np.array(curve["predicted"], dtype=np.float64)
        observed = np.array(curve["observed"], dtype=np.float64)
        count = np.array(curve["rows"], dtype=np.float64)
        filled = (count > 0) & np.isfinite(predicted) & np.isfinite(observed)
        predicted, observed, count = predicted[filled], observed[filled], count[filled]
        axes.plot([0, 1], [0, 1], color="grey", lw=1, ls="--")
        error = np.sqrt(observed * (1 - observed) / count)
        axes.errorbar(predicted, observed, yerr=error, color="tab:blue", lw=1.2, elinewidth=0.8)
        axes.scatter(predicted, observed, s=12 + 120 * count / count.max(initial=1), color="tab:blue", alpha=0.6, lw=0)
        gap = float((count * abs(predicted - observed)).sum() / max(count.sum(), 1))
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted", ylabel="observed", aspect="equal")
        axes.set_title(f"{name}: calibration error {gap:.3f}", fontsize=10)
        axes.grid(alpha=0.25)
    return figure


def _point(row: Mapping[str, Any], speed: str) -> list[float]:
    x, y = row["summary"][speed], row["summary"]["log_prob"]
    bounds = [(v["value"] - v["low"], v["high"] - v["value"]) for v in (x, y)]
    return [x["value"], y["value"], *(max(0.0, b) for pair in bounds for b in pair)]


def _annotate(axes: Axes, members: Sequence[Mapping[str, Any]], points: FloatArray, colour: Any) -> None:
    """The settings beside each point of a curve."""
    for row, point in zip(members, points, strict=True):
        name = row["name"].removeprefix(f"{row.get('run')}: ").removeprefix(row["method"])
        axes.annotate(name.strip(), point[:2], xytext=(4, 4), textcoords="offset points", fontsize=6, color=colour)


def drawn(figure: Figure, form: str = "png") -> bytes:
    """A figure as a file of one of `FORMATS`.

    Raises:
        UserError: another format.
    """
    choice("format", form, FORMATS)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, dpi=150)
    return buffer.getvalue()
