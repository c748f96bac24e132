"""Read results again: tables, plots, and the fastest row at a quality, of one run or of several
side by side.

    python -m decoding.report outputs/evaluate/.../results.json
    python -m decoding.report a/results.json b/results.json out=plots format=svg quality=-0.35

A row belongs to one run: nothing is averaged over runs, and no speed of one is divided by that of
another.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from rich.console import Console

from decoding.errors import UserError
from decoding.measure.compare import fastest_at
from decoding.measure.headlines import headlines, tables
from decoding.measure.pages import (
    Node,
    Runs,
    comparison_lines,
    console_table,
    joined_rows,
    machine_of,
    remark_lines,
    results_page,
    spread,
)
from decoding.measure.plots import FORMATS, drawn, plot_calibration, plot_frontier
from decoding.measure.results_file import RESULTS, read_results, write_results
from decoding.measure.rows import REFERENCES
from decoding.measure.verdict_words import verdict_lines
from decoding.support.checks import choice
from decoding.support.files import write_whole
from decoding.support.plain import plain_command

FRONTIER, FRONTIER_ALSO, CALIBRATION, TABLE = "frontier", "frontier_also", "calibration", "results.md"
_USAGE = (
    "python -m decoding.report results.json [results.json ...] [out=DIRECTORY] [format=png|svg|pdf] "
    "[quality=LOG-PROBABILITY or a row's name] [speed=METRIC]"
)
_FIELDS = {"complete", "failed", "unscored", "provenance"}
_PROVENANCE = {"argv", "git_sha", "versions", "machine", "date", "pair", "task"}


# -------------------------------------------------------------------------------------------- files


def write_report(directory: Path, results: Node) -> dict[str, Path]:
    """Write results.json, then what is drawn from it; returns the path of each file by its name.

    The numbers are written first, so that nothing that a plot may meet can lose them.
    """
    written = {RESULTS: write_results(directory / RESULTS, results)}
    return written | write_pages(directory, {"": results})


def write_pages(directory: Path, runs: Runs, form: str = "png") -> dict[str, Path]:
    """Write results.md, the frontiers and, where there is something to show, the calibration of the
    controller.

    Args:
        runs: results by the label of their run.
        form: of the plots, one of `decoding.measure.plots.FORMATS`.

    Returns:
        Path of each file by its name.
    """
    rows = joined_rows(runs)
    figures: dict[str, tuple[str, Callable[[], Figure]]] = {}
    for stem, speed in frontiers(runs).items():
        figures[f"{stem}.{form}"] = ("Quality against speed", partial(plot_frontier, rows, speed))
    for label, results in runs.items():
        if curves := results.get("calibration"):
            stem = f"{CALIBRATION}_{label}" if label else CALIBRATION
            title = f"Calibration of the controller{' of ' + label if label else ''}"
            figures[f"{stem.replace(os.sep, '_')}.{form}"] = (title, partial(plot_calibration, curves))
    page = results_page(runs, {name: title for name, (title, _) in figures.items()})
    files = {TABLE: write_whole(directory / TABLE, page.encode())}
    for stem in {FRONTIER, FRONTIER_ALSO, CALIBRATION} - {Path(name).stem for name in figures}:
        for other in FORMATS:  # of an earlier run in this folder
            (directory / f"{stem}.{other}").unlink(missing_ok=True)
    return files | {name: write_whole(directory / name, drawn(figure(), form)) for name, (_, figure) in figures.items()}


def frontiers(runs: Runs) -> dict[str, str]:
    """Plots of quality against speed that results call for: the metric of speed by file stem."""
    sources = [results["provenance"] for results in runs.values()]
    tables = [source.get("latency") for source in sources]
    modelled = all(table is not None and table.get("measured") is None for table in tables)
    plots = {FRONTIER: "modelled_tokens_per_second" if modelled else "tokens_per_second"}
    plots |= {FRONTIER_ALSO: "also_tokens_per_second"} if any(source.get("also") for source in sources) else {}
    shown = {metric for row in joined_rows(runs) if "log_prob" in row["summary"] for metric in row["summary"]}
    return {stem: speed for stem, speed in plots.items() if speed in shown}


# ------------------------------------------------------------------------------------- command line


class Arguments(NamedTuple):
    """Arguments of a command line."""

    files: list[str]
    out: str | None = None
    format: str = "png"
    quality: str | None = None
    speed: str = "tokens_per_second"


def read_arguments(words: Sequence[str]) -> Arguments:
    """Files, and options as name=value.

    Raises:
        UserError: no file, an unknown option, or a format that there is not.
    """
    options = [name for name in Arguments._fields if name != "files"]
    given, files = {}, []
    for word in words:
        name, equals, value = word.partition("=")
        if equals and name in options:
            given[name] = value
        elif equals and not Path(word).exists():
            raise UserError(f"{name} is not an option of the report; choose among {', '.join(options)}.")
        else:
            files.append(word)
    if not files:
        raise UserError(f"No results were given: {_USAGE}.")
    found = Arguments(files, **given)
    choice("format", found.format, FORMATS)
    return found


def read_runs(files: Sequence[str]) -> dict[str, Node]:
    """Results by the label of their run: its folder, as much of the path as tells them apart.

    Raises:
        UserError: a file that is missing, damaged, of another version, given twice, or no results
            at all.
    """
    runs = [_read(file) for file in files]
    if len(runs) == 1:
        return {"": runs[0]}
    paths = [Path(file).expanduser().resolve() for file in files]
    if len(set(paths)) < len(paths):
        twice = next(file for file, path in zip(files, paths, strict=True) if paths.count(path) > 1)
        raise UserError(f"{twice} was given twice; give each file once.")
    return dict(zip(_labels(paths), runs, strict=True))


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that differ; of the files' where two lie in one
    folder.
    """
    folders = [path.parent.parts for path in paths]
    parts = folders if len(set(folders)) == len(paths) else [path.parts for path in paths]
    longest = max(map(len, parts))
    depth = next(depth for depth in range(1, longest + 1) if len({ends[-depth:] for ends in parts}) == len(paths))
    return ["/".join(ends[-depth:]) for ends in parts]


def _read(file: str) -> Node:
    results = read_results(file)
    source = results.get("provenance")
    if not (results.keys() >= _FIELDS and isinstance(source, Mapping) and source.keys() >= _PROVENANCE):
        raise UserError(
            f"The results {file!r} do not say where they came from; give what evaluate.py or the bench wrote."
        )
    return results


def command_line(words: Sequence[str]) -> None:
    """Print what the files hold and, where `out` says so, write the page and the plots again.

    Raises:
        UserError: files or options that cannot be.
    """
    given = read_arguments(words)
    runs = read_runs(given.files)
    winners = winner_lines(runs, given.quality, given.speed)  # a wrong name is refused before anything is written
    files = write_pages(Path(given.out), runs, given.format) if given.out is not None else {}
    show(runs, files, winners)


def show(runs: Runs, files: Mapping[str, Path], winners: Sequence[str] = ()) -> None:
    """Print the tables of results, the sentences about them, and where everything is.

    Args:
        runs: results by the label of their run.
        files: path by name.
        winners: further sentences.
    """
    console = Console(markup=False, highlight=False)  # brackets are intervals
    console = console if console.is_terminal else Console(markup=False, highlight=False, width=160)
    for label, results in runs.items():
        if label:
            console.print(f"{label}: {machine_of(results)}, {results['provenance']['date']}")
    of_bench = len(runs) == 1 and "roofline" in runs.get("", {})
    for table in tables(runs[""]) if of_bench else [console_table(joined_rows(runs))]:
        console.print(table)
        console.print()
    for label, results in runs.items():
        of_evaluation = [*comparison_lines(results), *remark_lines(results)]
        lines = headlines(results) if "roofline" in results else of_evaluation
        lines = [*lines, *verdict_lines(results)]
        for line in [label, *lines] if label and lines else lines:
            console.print(line, soft_wrap=True)
    for line in [*winners, *(f"{name}: {path}" for name, path in files.items())]:
        console.print(line, soft_wrap=True)


def winner_lines(runs: Runs, quality: str | None = None, speed: str = "tokens_per_second") -> list[str]:
    """The fastest row of each run that is at least as likely as asked for, in a sentence each.

    Args:
        quality: a log-probability per token, or the name of a row whose own is meant; None: that of
            every reference row of the run.
        speed: the metric that is meant by speed.

    Raises:
        UserError: a name that no run has, or a metric that no row has.
    """
    rows = joined_rows(runs)
    metrics = sorted({name for row in rows for name in row["summary"] if name.endswith("tokens_per_second")})
    if rows:
        choice("speed", speed, metrics)
    lines = []
    for label, results in runs.items():
        for name, value in _qualities(results["rows"], quality).items():
            row = fastest_at(results["rows"], value, speed)
            told = "no row reaches it" if row is None else _told(row, speed)
            run = f"{label}, at" if label else "At"
            lines.append(f"{run} the log-probability per token {value:.3f}{name}: {told}")
    if quality is not None and not lines:
        names = "; ".join(row["name"] for results in runs.values() for row in results["rows"])
        raise UserError(f"quality is {quality!r}; give a log-probability per token, such as -0.35, or a row: {names}.")
    if len({machine_of(results) for results in runs.values()}) > 1:
        lines.append("These runs were timed on different machines: compare their speeds within a run only.")
    elif len(runs) > 1:
        lines.append(
            "These runs did not take turns: compare their speeds within a run, where all rows met the same load."
        )
    return lines


def _qualities(rows: Sequence[Node], quality: str | None) -> dict[str, float]:
    """The qualities that are asked for, by whose they are."""
    measured = [row for row in rows if "log_prob" in row["summary"]]
    if quality is None:
        asked = [row for row in measured if row["method"] in REFERENCES]
    else:
        try:
            value = float(quality)
        except ValueError:
            value = math.nan
        if math.isfinite(value):
            return {"": value}
        asked = [row for row in measured if row["name"] == quality]
    return {f" of {row['name']}": row["summary"]["log_prob"]["value"] for row in asked}


def _told(row: Node, speed: str) -> str:
    summary: Mapping[str, Any] = row["summary"]
    return (
        f"{row['name']} is fastest, {spread(summary[speed], '.0f', 'prompts')} tokens/s at "
        f"{spread(summary['log_prob'], '.3f', 'prompts')}"
    )


def main() -> None:
    """Run on `sys.argv`; a user's mistake is one sentence and exit code 2."""
    with plain_command():
        command_line(sys.argv[1:])


if __name__ == "__main__":
    main()
