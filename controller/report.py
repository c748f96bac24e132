"""From measurements to what one reads: summaries with bootstrap intervals, results.json, results.md and plots.

The format of results.json is described in docs/results.md.
"""

from __future__ import annotations

import functools
import io
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table

from controller.compare import LAST, OURS, STOP, comparisons, family_of, undominated
from decoding.files import write_whole
from decoding.measure import REFERENCE_METHODS, Measurement, Row
from decoding.oracles import hindsight_seconds, modelled_seconds
from decoding.pricing import Costs
from decoding.results import PHASES
from decoding.results_file import RESULTS, write_results
from decoding.sampling import FloatArray

FRONTIER, CALIBRATION, TABLE = "frontier.png", "calibration.png", "results.md"
FRONTIER_ALSO = "frontier_also.png"
_LABELLED = 12  # rows of a plot that can all have labels

Share = tuple[float, float]  # numerator and denominator of a prompt; a summary is the ratio of their sums


# ------------------------------------------------------------------------------------------ summaries


def _phase_seconds(phase: str) -> Callable[[Measurement], Share]:
    return lambda m: (m.stats.seconds.get(phase, 0.0), 1)


def _task_metric(name: str) -> Callable[[Measurement], Share]:
    return lambda m: (m.metrics.get(name, 0.0), name in m.metrics)


_RATIOS: dict[str, Callable[[Measurement], Share]] = {
    "tokens_per_second": lambda m: (m.stats.new_tokens, m.wall_seconds),
    "block_efficiency": lambda m: (m.stats.new_tokens, m.stats.iterations),
    "log_prob": lambda m: (m.log_prob, len(m.tokens)),
    "target_width": lambda m: (sum(m.stats.target_widths), len(m.stats.target_widths)),
    "depth": lambda m: (sum(map(len, m.stats.forests)), len(m.stats.forests)),
    "draft_width": lambda m: (sum(m.stats.draft_widths), sum(w > 0 for w in m.stats.draft_widths)),
    "accepted_share": lambda m: (sum(m.stats.accepted), sum(m.stats.draft_widths)),
    "target_calls": lambda m: (m.stats.target_calls, 1),
    "kv_slots_peak": lambda m: (m.stats.kv_slots_peak, 1),
    "kv_slots_end": lambda m: (m.stats.kv_slots_end, 1),
    "kv_slots_per_token": lambda m: (m.stats.kv_slots_end, m.stats.prompt_tokens + m.stats.new_tokens),
    "joules_per_token": lambda m: (0, 0) if m.joules is None else (m.joules, m.stats.new_tokens),
    **{f"{phase}_seconds": _phase_seconds(phase) for phase in PHASES},
}


def _modelled(costs: Costs, hindsight: bool = False) -> Callable[[Measurement], Share]:
    """Tokens against modelled seconds, the policy's own measured ones included; or against those in hindsight.

    By a table of joules the policy costs nothing: what it draws is not known. An oracle takes no time either.
    """
    in_seconds = getattr(costs, "unit", "seconds") == "seconds"

    def share(m: Measurement) -> Share:
        if not m.stats.records:
            return 0.0, 0.0  # not of this engine
        if hindsight:
            return m.stats.new_tokens, hindsight_seconds(m.stats, costs)
        policy = m.stats.seconds["policy"] if in_seconds else 0.0
        return m.stats.new_tokens, modelled_seconds(m.stats, costs) + policy

    return share


def summarise(
    rows: Sequence[Row],
    measured: Sequence[Sequence[Measurement]],
    resamples: int = 1000,
    seed: int = 0,
    costs: Mapping[str, Costs] | None = None,
) -> list[dict[str, Any]]:
    """One JSON-able dict per row: name, settings, summary, histograms, and every prompt's measurement.

    Args:
        rows, measured: from decoding.measure; the same prompts in the same order in every row.
        resamples: of the bootstrap over prompts; the same for all rows, so that ratios of two rows are paired.
        costs: tables by name; each adds `<name>_tokens_per_second` and `<name>_hindsight`, modelled.

    Returns:
        [{"name", "method", "settings", "config", "summary": {metric: {"value", "low", "high"}}, "counts", "prompts"}];
        low and high bound the central 95%; metrics that no prompt has are absent.
    """
    count = len(measured[0])
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))  # [B, N]
    speeds = {}
    for row, prompts in zip(rows, measured, strict=True):
        if row.method in REFERENCE_METHODS:
            speeds[row.method, row.config.target_width] = _ratio(prompts, _RATIOS["tokens_per_second"], draws)
    return [_summary(row, prompts, draws, speeds, costs or {}) for row, prompts in zip(rows, measured, strict=True)]


def compare_rows(
    rows: Sequence[Row],
    measured: Sequence[Sequence[Measurement]],
    resamples: int,
    seed: int,
    costs: Costs | None,
    ours: str = OURS,
) -> list[dict[str, Any]]:
    """`controller.compare.comparisons` of the learned rows at the qualities of this engine's beam sampling.

    Args:
        rows, measured, resamples, seed: as for `summarise`.
        costs: compare speeds by this table; None: by the clock.
        ours: method of the rows that are compared.
    """
    count = len(measured[0])
    draws = np.random.default_rng(seed).integers(count, size=(resamples, count))  # [B, N]
    ours_alone = [i for i, row in enumerate(rows) if costs is None or measured[i][0].stats.records]
    rows, measured = [rows[i] for i in ours_alone], [measured[i] for i in ours_alone]

    def values(ratio: Callable[[Row], Callable[[Measurement], Share]]) -> tuple[FloatArray, FloatArray]:
        found = [_ratio(m, ratio(row), draws) for row, m in zip(rows, measured, strict=True)]
        return np.array([value for value, _ in found]), np.array([drawn for _, drawn in found])

    speed = _RATIOS["tokens_per_second"] if costs is None else _modelled(costs)
    references = {row.name: i for i, row in enumerate(rows) if row.method == "beam_sample"}
    hindsight = None if costs is None else values(lambda row: _modelled(costs, hindsight=True))[0]
    return comparisons(
        [family_of(row.method, row.settings) for row in rows],
        references,
        values(lambda row: speed),
        values(lambda row: _RATIOS["log_prob"]),
        hindsight,
        ours,
    )


def _summary(
    row: Row,
    prompts: Sequence[Measurement],
    draws: NDArray[np.int64],
    speeds: Mapping[tuple[str, int], tuple[float, FloatArray]],
    costs: Mapping[str, Costs],
) -> dict[str, Any]:
    ratios = dict(_RATIOS)
    for name, table in costs.items():
        ratios[f"{name}_tokens_per_second"] = _modelled(table)
        ratios[f"{name}_hindsight"] = _modelled(table, hindsight=True)
    for name in sorted({name for m in prompts for name in m.metrics}):
        ratios[name] = _task_metric(name)
    values = {name: _ratio(prompts, ratio, draws) for name, ratio in ratios.items()}
    speed, speed_draws = values["tokens_per_second"]
    for method in REFERENCE_METHODS:
        if (method, row.config.target_width) in speeds:
            base, base_draws = speeds[method, row.config.target_width]
            values[f"speedup_over_{method}"] = speed / base, speed_draws / base_draws
    return {
        "name": row.name,
        "method": row.method,
        "settings": dict(row.settings),
        "config": vars(row.config).copy(),
        "summary": {name: _interval(*value) for name, value in values.items() if not math.isnan(value[0])},
        "counts": {
            name: _histogram(getattr(m.stats, field) for m in prompts)
            for name, field in (
                ("target_width", "target_widths"),
                ("draft_width", "draft_widths"),
                ("accepted", "accepted"),
            )
        },
        "prompts": [m.to_dict() for m in prompts],
    }


def _ratio(
    prompts: Sequence[Measurement], ratio: Callable[[Measurement], Share], draws: NDArray[np.int64]
) -> tuple[float, FloatArray]:
    """Ratio of sums over the prompts, and over each resample [B]; NaN where the denominator is 0."""
    shares = np.array([ratio(m) for m in prompts], dtype=np.float64)  # [N, 2]
    resampled = shares[draws].sum(axis=1)  # [B, 2]
    top, bottom = shares.sum(axis=0)
    below = np.where(resampled[:, 1] == 0, np.nan, resampled[:, 1])
    return float(top / bottom) if bottom else math.nan, resampled[:, 0] / below


def _interval(value: float, resampled: FloatArray) -> dict[str, float]:
    low, high = np.nanpercentile(resampled, [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def _histogram(lists: Any) -> dict[str, int]:
    counts = Counter(value for values in lists for value in values)
    return {str(value): counts[value] for value in sorted(counts)}


# ---------------------------------------------------------------------------------------------- files


def write_report(
    directory: Path, results: Mapping[str, Any], calibration: Mapping[str, Any] | None = None
) -> dict[str, Path]:
    """Write results.json, results.md, frontier.png and, where there is something to show, calibration.png.

    The numbers are written first, so that nothing that a plot may meet can lose them.

    Args:
        results: {"schema_version", "provenance", "rows"}; rows from `summarise`.
        calibration: of the controller, from `calibration_curves`.

    Returns:
        Path of each file by its name.
    """
    written = {RESULTS: write_results(directory, results)}
    files: dict[str, Callable[[], bytes]] = {
        TABLE: lambda: results_page(results, with_calibration=bool(calibration)).encode(),
        **{
            name: functools.partial(_frontier_png, results["rows"], speed) for name, speed in frontiers(results).items()
        },
    }
    if calibration:
        files[CALIBRATION] = lambda: _png(plot_calibration(calibration))
    return written | {name: write_whole(directory / name, content()) for name, content in files.items()}


_CURVES = {
    "count": "P(K_w >= M)",
    "count_w1_2": "P(K_w >= M), w 1-2",
    "count_w3_5": "P(K_w >= M), w 3-5",
    "count_w6_up": "P(K_w >= M), w 6 and up",
    "count_layer1": "P(K_w >= M), layer 1",
    "count_layer2": "P(K_w >= M), layer 2",
    "count_layer3_up": "P(K_w >= M), layer 3 and up",
    "survivor": "best among k slots",
    "late_survivor": "the same, P known",
}
_CURVES_IN_A_ROW = 5


def frontiers(results: Mapping[str, Any]) -> dict[str, str]:
    """The plots of quality against speed that results call for: the metric of speed by file name."""
    source = results["provenance"]
    latency = source.get("latency")
    modelled = latency is not None and latency.get("measured") is None
    plots = {FRONTIER: "modelled_tokens_per_second" if modelled else "tokens_per_second"}
    plots |= {FRONTIER_ALSO: "also_tokens_per_second"} if source.get("also") else {}
    return {name: speed for name, speed in plots.items() if any(speed in row["summary"] for row in results["rows"])}


def calibration_curves(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The reliability bins that a controller was saved with, by title; empty where it has none."""
    bins = provenance.get("reliability")
    known = isinstance(bins, Mapping) and {"predicted", "observed", "rows"} <= set(bins)
    if not known or bins is None:
        return {}
    curves = bins.get("curves", {"count": bins})
    return {title: curves[name] for name, title in _CURVES.items() if name in curves}


# --------------------------------------------------------------------------------------------- tables

_Column = tuple[str, str, str]  # heading, metric, format of a value
_COLUMNS: tuple[_Column, ...] = (
    ("tokens/s", "tokens_per_second", ".0f"),
    ("x beam_sample", "speedup_over_beam_sample", ".2f"),
    ("x transformers", "speedup_over_hf_beam_sample", ".2f"),
    ("modelled", "modelled_tokens_per_second", ".0f"),
    ("also", "also_tokens_per_second", ".0f"),
    ("log-prob", "log_prob", ".3f"),
    ("block eff.", "block_efficiency", ".2f"),
    ("mean M", "target_width", ".1f"),
    ("mean w", "draft_width", ".1f"),
    ("depth", "depth", ".1f"),
)
_MORE_COLUMNS: tuple[_Column, ...] = (
    ("accepted", "accepted_share", ".2f"),
    ("KV slots", "kv_slots_end", ".0f"),
    ("KV / length", "kv_slots_per_token", ".2f"),
    ("J/token", "joules_per_token", ".2f"),
)
_EXPLANATION = """\
Same prompts and seeds for all rows, interleaved; brackets are 95% bootstrap intervals over prompts. Speed-ups compare
with beam sampling of the same target width on this engine and with transformers' `generate`. log-prob: mean
log-probability per token of the best returned text under the target at temperature 1, higher is better. block eff.:
tokens committed per iteration. M, w, depth: target and draft width, layers drafted an iteration. modelled, also:
tokens/s by the cost tables of `latency` and `latency@also`, with the policy's own measured time. KV slots: of the
target's cache at the end. Seconds are per prompt."""


def console_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The results in short, for the terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("row", no_wrap=True)
    columns = _present(rows, [*_COLUMNS, *_task_columns(rows)])
    for heading, _, _ in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["name"], *(_cell(row, column, interval=False) for column in columns))
    return table


def results_page(results: Mapping[str, Any], with_calibration: bool = False) -> str:
    """results.md: the table, the plots, where it came from."""
    rows, source = results["rows"], results["provenance"]
    columns = _present(rows, [*_COLUMNS, *_task_columns(rows), *_MORE_COLUMNS])
    phases = _present(rows, [(f"{phase} s", f"{phase}_seconds", ".3f") for phase in PHASES])
    with_interval = {"tokens_per_second", "log_prob", "speedup_over_beam_sample", "speedup_over_hf_beam_sample"}
    machine = source["machine"]
    where = ", ".join(
        str(part) for part in (machine["gpu"], machine["cpu"], f"{machine['cores']} cores", machine["system"]) if part
    )
    lines = [
        f"# {source['pair']['name']} on {source['task']['name']}: {len(rows[0]['prompts'])} prompts",
        "",
        f"`python {' '.join(source['argv'])}`, {source['date']}, {where}, torch {source['versions'].get('torch')}, "
        f"commit {_short(source['git_sha'])}.",
        "",
        *([f"**{source['pair']['note']}**", ""] if source["pair"].get("note") else []),
        *_markdown(
            ["row", *(heading for heading, _, _ in columns)],
            [[row["name"], *(_cell(row, c, c[1] in with_interval) for c in columns)] for row in rows],
        ),
        "",
        _EXPLANATION,
        "",
        *_markdown(
            ["row", *(heading for heading, _, _ in phases)],
            [[row["name"], *(_cell(row, c, interval=False) for c in phases)] for row in rows],
        ),
        "",
        *comparison_lines(results),
        *(f"![Quality against speed]({name})" for name in frontiers(results)),
    ]
    for name, sentence in (results.get("failed") or {}).items():
        lines += ["", f"{name} failed: {sentence}"]
    if results.get("tuned"):
        about = results["tuned"]
        chosen = f"Hand-set settings were chosen on {about['prompts']} prompts of split {about['split']}"
        lines += ["", f"{chosen}; tokens/s by the tables of latency (modelled) and latency@also:"]
        lines += ["", *tuning_lines(about)]
    if with_calibration:
        lines += ["", f"![Calibration of the controller]({CALIBRATION})"]
    return "\n".join(lines) + "\n"


def _short(sha: str | None) -> str:
    """A commit's first digits, and whether there were changes besides."""
    commit, dirty, _ = (sha or "unknown").partition("-dirty")
    return commit[:12] + dirty


_COMPARED = {"clock": "by the clock", "modelled": "by the table of latency", "also": "by the table of latency@also"}


def comparison_lines(results: Mapping[str, Any]) -> list[str]:
    """Markdown: learned widths against each family at the quality of each beam sampling."""
    lines = []
    for by, entries in (results.get("comparisons") or {}).items():
        if not entries:
            continue
        families = list(dict.fromkeys(family for entry in entries for family in entry["over"]))
        with_oracle = any("oracle" in entry for entry in entries)
        head = ["at the quality of", "log-prob", "learned tokens/s", *(f"x {family}" for family in families)]
        body = [
            [
                _reference_cell(entry),
                f"{entry['quality']:.3f}",
                f"{entry['speed']:.0f}",
                *(_ratio_cell(entry["over"].get(family)) for family in families),
                *([f"{entry['oracle']:.0f}", f"{entry['gap_closed']:.0%}"] if "oracle" in entry else []),
            ]
            for entry in entries
        ]
        head += ["oracle depth", "of the gap"] if with_oracle else []
        lines += [f"Learned widths against the others, {_COMPARED[by]}:", "", *_markdown(head, body), ""]
    if lines:
        lines += [
            "Speeds at a quality lie on each family's undominated settings, linear in between; where a family does not "
            "reach the quality, its best setting counts. hand-set: beam sampling and all rules as one family, among "
            "these rows, which were tuned only if tune.grids says so; +last: with a final_width; +stop: with a "
            "stop_entropy; plain: with neither. "
            "oracle depth, not achievable: the best row had no layer been drafted that then failed, and had deciding "
            "taken no time. Intervals are over the resamples in which learned rows reach the quality.",
            "",
        ]
    return lines


def _reference_cell(entry: Mapping[str, Any]) -> str:
    """Its name, and the resamples that intervals are over where learned rows did not reach its quality in all."""
    some = f" ({entry['resamples']} of {entry['of']} resamples)" if entry["resamples"] < entry["of"] else ""
    return f"{entry['reference']}{some}"


def _ratio_cell(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"


def tuning_lines(tuned: Mapping[str, Any]) -> list[str]:
    """Markdown: the grid of hand-set settings on the validation prompts, and which went on."""
    devices = list(tuned["grid"][0]["speeds"]) if tuned["grid"] else []
    body = [
        [
            point["name"],
            *(f"{point['speeds'][device]:.0f}" for device in devices),
            f"{point['log_prob']:.3f}",
            "yes" if point["kept"] else "",
        ]
        for point in tuned["grid"]
    ]
    return _markdown(["setting", *devices, "log-prob", "kept"], body)


def frontier_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Headings and values of the frontier, for a tracker's table."""
    columns = _present(rows, [*_COLUMNS, *_task_columns(rows), *_MORE_COLUMNS])
    values = [[row["summary"].get(metric, {}).get("value") for _, metric, _ in columns] for row in rows]
    return ["row", "method", *(metric for _, metric, _ in columns)], [
        [row["name"], row["method"], *value] for row, value in zip(rows, values, strict=True)
    ]


def _task_columns(rows: Sequence[Mapping[str, Any]]) -> list[_Column]:
    names = sorted({name for row in rows for prompt in row["prompts"] for name in prompt["metrics"]})
    return [(name.replace("_", " "), name, ".3f") for name in names]


def _present(rows: Sequence[Mapping[str, Any]], columns: Sequence[_Column]) -> list[_Column]:
    return [column for column in columns if any(column[1] in row["summary"] for row in rows)]


def _cell(row: Mapping[str, Any], column: _Column, interval: bool) -> str:
    _, metric, form = column
    if metric not in row["summary"]:
        return "-"
    value = row["summary"][metric]
    bounds = f" [{value['low']:{form}}, {value['high']:{form}}]" if interval else ""
    return f"{value['value']:{form}}{bounds}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]


# ---------------------------------------------------------------------------------------------- plots

_MARKERS = "osD^vPX*<>hd"
_LINES = {"": "-", LAST: "--", STOP: ":", LAST + STOP: "-."}


def plot_frontier(rows: Sequence[Mapping[str, Any]], speed: str = "tokens_per_second") -> Figure:
    """Quality (log-probability per token) against tokens/s: one curve per family through its best rows.

    Families with a last width are dashed, those that stop by entropy dotted, in the colour of those that do neither.
    Where there are many rows, only learned ones and beam sampling are labelled; rows far below the others are left out,
    and counted.

    Args:
        rows: those without the metric are left out.
        speed: metric of the horizontal axis.
    """
    rows = [row for row in rows if speed in row["summary"]]
    points = np.array([_point(row, speed) for row in rows])  # [N, 6] x, y, and errors below and above
    families = [family_of(row["method"], row["settings"]) for row in rows]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10"]
    for family in dict.fromkeys(families):
        method, _, extras = family.partition("+")
        i, style_of_line = methods.index(method), _LINES["+" + extras if extras else ""]
        members = [j for j, name in enumerate(families) if name == family]
        own = points[members]
        style: dict[str, Any] = {"color": colours(i % 10), "marker": _MARKERS[i % len(_MARKERS)]}
        style |= {"mfc": "white"} if extras else {}
        best = undominated([(x, y) for x, y in own[:, :2].tolist()], len(own))
        errors: dict[str, Any] = {"xerr": own[:, 2:4].T, "yerr": own[:, 4:6].T, "elinewidth": 0.8, "capsize": 0}
        axes.errorbar(own[:, 0], own[:, 1], **errors, **style, ls="none", ms=5, alpha=0.45)
        axes.plot(own[best, 0], own[best, 1], **style, ms=6, lw=1.4, ls=style_of_line, label=family)
        if len(rows) <= _LABELLED or methods[i].startswith((OURS, "beam_sample")):
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


def plot_calibration(calibration: Mapping[str, Any]) -> Figure:
    """Reliability of each predicted probability: observed share against prediction, dots by how many there are."""
    across = min(len(calibration), _CURVES_IN_A_ROW)
    down = -(-len(calibration) // across)
    figure = Figure(figsize=(4.2 * across, 4.4 * down), layout="constrained")
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes in places[len(calibration) :]:
        axes.set_axis_off()
    for axes, (name, curve) in zip(places, calibration.items(), strict=False):
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


def _annotate(axes: Axes, family: Sequence[Mapping[str, Any]], points: FloatArray, colour: Any) -> None:
    """The settings beside each point of a curve; of learned ones the width_value alone."""
    for row, point in zip(family, points, strict=True):
        value = row["settings"].get("width_value")
        text = row["name"].removeprefix(row["method"]).strip() if value is None else f"{value:g}"
        axes.annotate(text, point[:2], xytext=(4, 4), textcoords="offset points", fontsize=6, color=colour)


def _frontier_png(rows: Sequence[Mapping[str, Any]], speed: str) -> bytes:
    return _png(plot_frontier(rows, speed))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()
