"""Results as one reads them: tables for the terminal and for results.md, and the sentences around
them.

Everything here is made from what results.json holds (docs/formats.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from decoding.measure.verdict_words import verdict_lines
from decoding.results import PHASES

Node = Mapping[str, Any]
Runs = Mapping[str, Node]  # results by the label of their run; a single one needs none: ""


class Column(NamedTuple):
    """A column of a table of rows."""

    heading: str
    metric: str
    form: str  # of a value
    spread: str = ""  # shown with it: over "prompts", 95% of the bootstrap; over "repeats", least and greatest


COLUMNS = (
    Column("tokens/s", "tokens_per_second", ".0f", "prompts"),
    Column("x beam_sample", "speedup_over_beam_sample", ".2f", "prompts"),
    Column("x transformers", "speedup_over_hf_beam_sample", ".2f", "prompts"),
    Column("modelled", "modelled_tokens_per_second", ".0f"),
    Column("also", "also_tokens_per_second", ".0f"),
    Column("log-prob", "log_prob", ".3f", "prompts"),
    Column("cut", "cut_share", ".2f"),
    Column("block eff.", "block_efficiency", ".2f"),
    Column("mean M", "target_width", ".1f"),
    Column("mean w", "draft_width", ".1f"),
    Column("depth", "depth", ".1f"),
)
_MORE_COLUMNS = (
    Column("accepted", "accepted_share", ".2f"),
    Column("E[K]", "expected_count", ".2f"),
    Column("K", "accepted_count", ".2f"),
    Column("KV slots", "kv_slots_end", ".0f"),
    Column("KV / length", "kv_slots_per_token", ".2f"),
    Column("J/token", "joules_per_token", ".2f"),
)
_EXPLANATION = """\
Same prompts and seeds for all rows, interleaved; brackets are 95% bootstrap intervals over prompts. Speed-ups compare
with beam sampling of the same target width on this engine and with transformers' `generate`. log-prob: mean
log-probability per token of the best returned text under the target at temperature 1, higher is better. cut: share of
the best texts that max_new_tokens cut off. block eff.: tokens committed per iteration. M, w, depth: target and draft
width, layers drafted an iteration. K: drafts of a layer that were accepted, mean; E[K]: as the policy expected.
modelled, also: tokens/s by the cost tables of
`latency` and `latency@also`, with the policy's own measured time. KV slots: of the
target's cache at the end. Seconds are per prompt."""


def joined_rows(runs: Runs) -> list[Node]:
    """The rows of all runs, one run after another; of several, each row's `run` and name have the
    label of its run.
    """
    return [
        {**row, "run": label, "name": f"{label}: {row['name']}"} if label else row
        for label, results in runs.items()
        for row in results["rows"]
    ]


# ------------------------------------------------------------------------------------------- tables


def console_table(rows: Sequence[Node], columns: Sequence[Column] | None = None, first: str = "row") -> Table:
    """Rows for the terminal; without columns, the results in short and without intervals."""
    short = [column._replace(spread="") for column in (*COLUMNS, *_task_columns(rows))]
    columns = present(rows, short) if columns is None else columns
    table = plain_table(first, *(column.heading for column in columns))
    for row in rows:
        table.add_row(row["name"], *(cell(row, column) for column in columns))
    return table


def plain_table(first: str, *headings: str) -> Table:
    """A table without lines, its first column to the left."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def results_page(runs: Runs, plots: Mapping[str, str] | None = None) -> str:
    """results.md: where the rows came from, tables, comparisons, plots.

    Args:
        plots: title of each by its file's name.
    """
    rows = joined_rows(runs)
    columns = present(rows, [*COLUMNS, *_task_columns(rows), *_MORE_COLUMNS])
    phases = present(rows, [Column(f"{phase} s", f"{phase}_seconds", ".3f") for phase in PHASES])
    tables = [
        markdown(["row", *(c.heading for c in some)], [[row["name"], *(cell(row, c) for c in some)] for row in rows])
        for some in (columns, phases)
    ]
    lines = [line for label, results in runs.items() for line in _source_lines(label, results)]
    lines += [*tables[0], "", _EXPLANATION, "", *tables[1], ""]
    for label, results in runs.items():
        lines += _run_lines(label, results)
    for name, title in (plots or {}).items():
        lines += [f"![{title}]({name})", ""]
    return "\n".join(lines).rstrip() + "\n"


def _source_lines(label: str, results: Node) -> list[str]:
    """Lines on the origin of a run's rows."""
    source = results["provenance"]
    prompts = len(results["rows"][0]["prompts"]) if results["rows"] else 0
    notes = [source[part].get("note") for part in ("pair", "task")]
    return [
        f"# {label + ': ' if label else ''}{source['pair']['name']} on {source['task']['name']}: {prompts} prompts",
        "",
        f"`python {' '.join(source['argv'])}`, {source['date']}, {machine_of(results)}, torch "
        f"{source['versions'].get('torch')}, commit {_short(source['git_sha'])}.",
        "",
        *(line for note in notes if note for line in (f"**{note}**", "")),
    ]


def machine_of(results: Node) -> str:
    """The machine that a run was timed on, in words."""
    about = results["provenance"]["machine"]
    parts = (about["gpu"], about["cpu"], f"{about['cores']} cores", about["system"])
    return ", ".join(str(part) for part in parts if part)


def _run_lines(label: str, results: Node) -> list[str]:
    """Lines on a run beside its rows: comparisons, what it lost, tuning."""
    lines = list(comparison_lines(results))
    for remark in [*remark_lines(results), *verdict_lines(results)]:
        lines += [remark, ""]
    if about := results.get("tuned"):
        chosen = f"Hand-set settings were chosen on {about['prompts']} prompts of split {about['split']}"
        lines += [
            f"{chosen}; tokens/s by the tables of latency (modelled) and latency@also:",
            "",
            *tuning_lines(about),
            "",
        ]
    return [f"## {label}", "", *lines] if label and lines else lines


def remark_lines(results: Node) -> list[str]:
    """Lines on what is missing from a run, and why."""
    lines = [f"{name} failed: {sentence}" for name, sentence in results["failed"].items()]
    lines += [results["stopped"]] if results.get("stopped") else []
    if skipped := results.get("skipped"):
        names = ", ".join(f"{each['id']}" + (f" ({each['where']})" if each["where"] else "") for each in skipped)
        lines.append(f"Passed over, since a model returned NaN there: {names}.")
    return lines + ([f"Log-probabilities are missing: {results['unscored']}"] if results["unscored"] else [])


def _short(sha: str | None) -> str:
    """A commit's first digits, and whether there were changes besides."""
    commit, dirty, _ = (sha or "unknown").partition("-dirty")
    return commit[:12] + dirty


_COMPARED = {"clock": "by the clock", "modelled": "by the table of latency", "also": "by the table of latency@also"}


def comparison_lines(results: Mapping[str, Any]) -> list[str]:
    """Markdown: learned widths against each curve at the quality of each beam sampling."""
    lines = []
    for by, entries in (results.get("comparisons") or {}).items():
        if not entries:
            continue
        curves = list(dict.fromkeys(curve for entry in entries for curve in entry["over"]))
        with_oracle = any("oracle" in entry for entry in entries)
        head = ["at the quality of", "log-prob", "learned tokens/s", *(f"x {curve}" for curve in curves)]
        body = [
            [
                _reference_cell(entry),
                f"{entry['quality']:.3f}",
                f"{entry['speed']:.0f}",
                *(_ratio_cell(entry["over"].get(curve)) for curve in curves),
                *([f"{entry['oracle']:.0f}", f"{entry['gap_closed']:.0%}"] if "oracle" in entry else []),
            ]
            for entry in entries
        ]
        head += ["oracle depth", "of the gap"] if with_oracle else []
        lines += [f"Learned widths against the others, {_COMPARED[by]}:", "", *markdown(head, body), ""]
    if lines:
        lines += [
            "Speeds at a quality lie on each curve's undominated settings, linear in between; where a curve does not "
            "reach the quality, its best setting counts. hand-set: beam sampling and all rules as one curve, among "
            "these rows, which were tuned only if tune.grids says so; +last: with a final_width; +stop: with a "
            "stop_entropy; plain: with neither. "
            "oracle depth, not achievable: the best row had no layer been drafted that then failed, and had deciding "
            "taken no time. Intervals are over the resamples in which learned rows reach the quality.",
            "",
        ]
    return lines


def _reference_cell(entry: Mapping[str, Any]) -> str:
    """Its name, and the resamples that intervals are over where learned rows did not reach its
    quality in all.
    """
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
    return markdown(["setting", *devices, "log-prob", "kept"], body)


def frontier_rows(rows: Sequence[Node]) -> tuple[list[str], list[list[Any]]]:
    """Headings and values of the frontier, for a tracker's table."""
    columns = present(rows, [*COLUMNS, *_task_columns(rows), *_MORE_COLUMNS])
    values = [[row["summary"].get(column.metric, {}).get("value") for column in columns] for row in rows]
    return ["row", "method", *(column.metric for column in columns)], [
        [row["name"], row["method"], *value] for row, value in zip(rows, values, strict=True)
    ]


def _task_columns(rows: Sequence[Node]) -> list[Column]:
    names = sorted({name for row in rows for prompt in row.get("prompts", []) for name in prompt["metrics"]})
    return [Column(name.replace("_", " "), name, ".3f") for name in names]


def present(rows: Sequence[Node], columns: Sequence[Column]) -> list[Column]:
    """The columns that some row has a value in."""
    return [column for column in columns if any(column.metric in row["summary"] for row in rows)]


def cell(row: Node, column: Column) -> str:
    """A row's value in a column, with the spread that the column shows; "-" where it has none."""
    found = row["summary"].get(column.metric)
    return "-" if found is None else spread(found, column.form, column.spread)


def spread(found: Node, form: str, over: str = "repeats") -> str:
    """A value in words: with its interval over "prompts", as the median and range of its "repeats",
    or alone ("").
    """
    repeats = [value for value in found.get("repeats", []) if value is not None]
    if over == "repeats" and repeats:
        return f"{np.median(repeats):{form}} [{min(repeats):{form}}, {max(repeats):{form}}]"
    bounds = f" [{found['low']:{form}}, {found['high']:{form}}]" if over else ""
    return f"{found['value']:{form}}{bounds}"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A table, its first column to the left."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *body)]
