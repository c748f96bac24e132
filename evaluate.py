"""Evaluate methods side by side on the same prompts: results.json, results.md, frontier.png,
calibration.png.

    python evaluate.py controller=<directory> policies=[fixed,threshold,learned] pair=...
    python evaluate.py policies=[fixed,mine.HalfWidth] grid.fraction=[0.25,0.5]

conf/evaluate.yaml has every setting; docs/formats.md describes results.json.
"""

from __future__ import annotations

import decoding.support.early  # noqa: F401  # before what takes seconds to import

# isort: split
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console

from controller import LearnedWidth
from controller.checkpoint import load_controller, weights_sha256
from controller.tracking import log_evaluation, tracked
from decoding import DecodingConfig, ModelPair, UserError
from decoding.cost_table import LatencyTable
from decoding.machine.choose import cost_table
from decoding.machine.seconds import measure_seconds
from decoding.measure.compare import curve_of, undominated
from decoding.measure.journal import Journal
from decoding.measure.methods import METHODS, Method, find_method, policy_method
from decoding.measure.oracles import modelled_seconds
from decoding.measure.pages import tuning_lines
from decoding.measure.plots import calibration_curves
from decoding.measure.results_file import SCHEMA_VERSION
from decoding.measure.rows import Row, make_rows
from decoding.measure.summary import compare_records, summarise
from decoding.measure.turns import (
    Record,
    decode_all,
    keep_whole,
    leave_out,
    left_out,
    make_records,
    read_prompts,
    score_all,
    stopped_sentence,
    write_energy,
)
from decoding.pairs.pair import check_lengths
from decoding.report import show, write_report
from decoding.support.entry import entry_point
from decoding.support.provenance import code_sha256, library_versions, machine, run_provenance, to_plain
from decoding.support.settings import check_counts, check_seconds
from decoding.tasks.base import Prompt, Task, check_files

LEARNED = {"learned": "modelled", "learned_also": "also"}  # methods by the table of cost that they plan with
_LEAST = {"batch_size": 1, "bootstrap": 1, "prompts.limit": 1, "prompts.warmup": 0}
_LEAST |= {"tune.prompts": 1, "tune.batch_size": 1, "tune.keep": 1}
Tables = dict[str, LatencyTable]


@entry_point("evaluate", renames={"controller": "controller_path"}, open_nodes=("grid",))
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run the evaluation that a config describes.

    Returns:
        What results.json holds.

    Raises:
        UserError: all rows failed, or what was asked for cannot be.
        KeyboardInterrupt: after what all rows had measured before it, if anything, has been scored
            and written. The same command goes on from there.
    """
    tables: Tables = {}  # filled once the pair is there
    rows, candidates = read_rows(cfg, METHODS | learned_methods(cfg, tables))
    trained = {name: load_controller(path)[1] for name, path in controllers_of(cfg).items()}
    task: Task = instantiate(cfg.data)
    check_unmeasured(cfg, task)
    with tracked(cfg) as logger:
        pair: ModelPair = instantiate(cfg.pair)
        prompts, warmup = read_prompts(cfg.prompts, task, pair)
        check_lengths(pair, prompts, rows[0].config)
        tables |= cost_tables(cfg, pair, any(row.method.name.partition(":")[0] in LEARNED for row in rows))
        journal = Journal(Path(cfg.output_dir), depends_on(cfg, pair, prompts))
        kept, tuned = tune(cfg, candidates, pair, task, tables, journal) if candidates and tables else ([], None)
        records = make_records([*rows, *kept], pair, cfg.batch_size)
        interrupted = decode_all(
            records, prompts, warmup, cfg.seed, max_seconds=cfg.max_seconds, journal=journal, strict=cfg.strict
        )
        able = leave_out(records, prompts)
        count = keep_whole(records, len(able))
        if interrupted and not count:
            raise KeyboardInterrupt
        unscored = score_all(records, able, pair, task)
        scored, rest = leave_out(records, able[:count]), able[count:]
        if all(record.error is not None for record in records):
            raise UserError(records[0].error)
        if not scored:
            if interrupted:
                raise KeyboardInterrupt
            raise UserError("Each prompt makes a model return NaN in one row or another; try dtype=float32.")
        results = {
            **summary_of(cfg, records, tables),
            "schema_version": SCHEMA_VERSION,
            "provenance": run_provenance(cfg, pair, task, len(scored)) | provenance_of(cfg, tables),
            "complete": not interrupted,
            "stopped": stopped_sentence(len(scored), len(scored) + len(rest), cfg.max_seconds, interrupted),
            "unscored": unscored,
            "prompts": [prompt.to_dict() for prompt in scored],
            "skipped": left_out(prompts, [*scored, *rest]),
            "tuned": tuned,
            "calibration": calibrations(trained),
        }
        files = write_report(Path(cfg.output_dir), results) | write_energy(Path(cfg.output_dir), records)
        log_evaluation(logger, results, files)
    if not interrupted:
        journal.close()
    show({"": results}, files)
    if not results["complete"]:
        raise KeyboardInterrupt
    return results


def summary_of(cfg: DictConfig, records: Sequence[Record], tables: Tables) -> dict[str, Any]:
    """Rows, comparisons by the clock and by each table, and the rows that failed."""
    first = next(iter(controllers_of(cfg)), "")
    by: dict[str, tuple[LatencyTable | None, str]] = {"clock": (None, f"learned{first}")}
    by |= {name: (tables[name], f"{method}{first}") for method, name in LEARNED.items() if name in tables}
    return {
        "rows": summarise(records, cfg.bootstrap, cfg.seed, tables),
        "comparisons": {
            name: compare_records(records, cfg.bootstrap, cfg.seed, table, ours) for name, (table, ours) in by.items()
        },
        "failed": {record.row.name: record.error for record in records if record.error is not None},
    }


def depends_on(cfg: DictConfig, pair: ModelPair, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Whatever measurements depend on: where they differ, a run does not go on from another."""
    config = to_plain(cfg)
    for name in ("output_dir", "paths", "logger", "bootstrap"):
        config.pop(name, None)
    return {
        "config": config,
        "pair": pair.fingerprint,
        "controller": provenance_of(cfg, {})["controller_sha256"],
        "prompts": [(prompt.id, prompt.tokens) for prompt in prompts],
        "code": code_sha256(config),
        "versions": library_versions(),
        "machine": machine(),
    }


def provenance_of(cfg: DictConfig, tables: Tables) -> dict[str, Any]:
    """The controller and the tables of cost that an evaluation was of."""
    paths = list(controllers_of(cfg).values())
    digests = [weights_sha256(path) for path in paths]
    return {
        "controller": paths if len(paths) > 1 else next(iter(paths), None),
        "controller_sha256": digests if len(paths) > 1 else next(iter(digests), None),
        "latency": tables["modelled"].to_dict() if "modelled" in tables else None,
        "also": tables["also"].to_dict() if "also" in tables else None,
    }


# --------------------------------------------------------------------------------------------- rows


def read_rows(cfg: DictConfig, methods: Mapping[str, Method]) -> tuple[list[Row], list[Row]]:
    """The rows that a config asks for, and the settings to tune; what cannot be is refused, before
    a model is loaded.

    Raises:
        UserError: unknown names, settings that cannot be, or learned rows without a controller.
    """
    check_counts(cfg, _LEAST)
    check_seconds(cfg.max_seconds)
    names, config = chosen_policies(cfg), instantiate(cfg.decoding)
    references = of_each(cfg.references, controllers_of(cfg))
    rows = make_rows(names, config, grid_of(cfg, config, names, methods), references, methods)
    candidates = tuning_rows(cfg, methods, config)
    for row in [*rows, *candidates]:
        row.check()
    return rows, candidates


def controllers_of(cfg: DictConfig) -> dict[str, str]:
    """The controllers' paths, by what stands behind the names of their methods.

    That is "" for a single one; of several it is `:` and the part of its path that tells it from
    the others.
    """
    given = to_plain(cfg)["controller_path"]
    paths = [] if given is None else given if isinstance(given, list) else [given]
    named = all(isinstance(path, str) and path for path in paths)
    if given == [] or not named or len({Path(path) for path in paths}) < len(paths):
        raise UserError(f"controller is {given!r}; give a directory or a hub id, or a list of different ones.")
    if len(paths) < 2:
        return dict.fromkeys([""], *paths) if paths else {}
    return dict(zip((f":{name}" for name in told_apart(paths)), paths, strict=True))


def told_apart(paths: Sequence[str]) -> list[str]:
    """A short name for each of several paths: the last part in which they differ, or as many parts
    as it takes.
    """
    parts = [Path(path).parts for path in paths]
    while len({each[-1:] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    for count in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w./-]", "_", "/".join(each[-count:])) for each in parts]
        if all(names) and len({*names}) == len(names):
            return names
    return [str(place) for place in range(1, len(paths) + 1)]


def of_each(names: Sequence[str], controllers: Mapping[str, str]) -> list[str]:
    """Names of methods; where there are several controllers, each learned one stands for all."""
    more = list(controllers) or [""]
    return [f"{name}{which}" for name in names for which in (more if name in LEARNED else [""])]


def learned_methods(cfg: DictConfig, tables: Tables) -> dict[str, Method]:
    """DSBDDecoder with each of the config's controllers, planning for the device of `latency` and
    for that of `latency@also`.

    Args:
        tables: of cost; a row is built when they are there, and checked before.
    """

    def method(name: str, which: str, path: str) -> Method:
        def make(**arguments: Any) -> LearnedWidth:
            costs = tables.get(LEARNED[name])
            given = {key: value for key, value in cfg.learned.items() if key != "objective"}
            if costs is not None:
                given["clock"] = given.get("clock") or ("table" if costs.measured is None else None)
            return LearnedWidth.load(path, **{**given, "latency": costs, **arguments})

        return policy_method(LearnedWidth, f"{name}{which}", make)

    found = [method(name, which, path) for name in LEARNED for which, path in (controllers_of(cfg) or {"": ""}).items()]
    return {each.name: each for each in found}


def chosen_policies(cfg: DictConfig) -> list[str]:
    """The rows' methods by name, in the order of the table."""
    has_controller = cfg.controller_path is not None
    names = ["speculative", "fixed", "threshold"] + ["learned"] * has_controller
    if cfg.policies is not None:
        names = [cfg.policies] if isinstance(cfg.policies, str) else list(cfg.policies)
    if "learned" in names and cfg.get("also"):
        names.append("learned_also")
    for name in LEARNED:
        if name in {*names, *cfg.references} and not has_controller:
            raise UserError(
                f"policies or references hold {name!r}, which needs a trained controller: give controller=<directory>, "
                "as printed at the end of train.py."
            )
    if "learned_also" in {*names, *cfg.references} and not cfg.get("also"):
        raise UserError("'learned_also' plans for a second device: give it as latency@also=<a config of conf/latency>.")
    return of_each(names, controllers_of(cfg))


def grid_of(
    cfg: DictConfig, config: DecodingConfig, names: Sequence[str], methods: Mapping[str, Method]
) -> dict[str, Any]:
    """The axes of `grid`; without widths, 1, 2, 4 and so on up to the config's target_width.

    A knob of the chosen methods that `grid` says nothing of has its own grid.
    """
    grid: dict[str, Any] = to_plain(cfg.grid)
    if grid["widths"] is None:
        doubled = [1 << i for i in range(config.target_width.bit_length())]
        grid["widths"] = sorted({*doubled, config.target_width})
    knobs = [knob for name in names for knob in find_method(name, methods).knobs]
    return {knob.on_axis: None for knob in knobs} | grid


def tuning_rows(cfg: DictConfig, methods: Mapping[str, Method], config: DecodingConfig) -> list[Row]:
    """All settings of `tune.grids`."""
    rows: list[Row] = []
    for axes in to_plain(cfg.tune)["grids"]:
        if not isinstance(axes, dict) or not isinstance(axes.get("policies"), list):
            raise UserError(f"tune.grids holds {axes!r}; give each as {{policies: [...], <axis of grid>: [...]}}.")
        rows += make_rows(of_each(axes.pop("policies"), controllers_of(cfg)), config, axes, (), methods)
    return rows


def check_unmeasured(cfg: DictConfig, task: Task) -> None:
    """Refuse files, splits and tables that cannot be read, before a model is loaded."""
    check_files(task, [cfg.prompts.split, *([cfg.tune.split] if cfg.tune.grids else [])])
    for node in (cfg.latency, cfg.get("also")):
        if node and not node.get("_partial_"):
            instantiate(node)


def calibrations(trained: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Calibration curves of all controllers by title; of several, each with its name."""
    found = {which: calibration_curves(about) for which, about in trained.items()}
    return {
        f"{title}, learned{which}" if len(found) > 1 else title: curve
        for which, curves in found.items()
        for title, curve in curves.items()
    }


# ---------------------------------------------------------------------------------------- measuring


def cost_tables(cfg: DictConfig, pair: ModelPair, uses_learned: bool) -> Tables:
    """Tables of cost for this device ("modelled") and, where the config names a second one, for
    that ("also").

    None where nobody asks: no learned rows, nothing to tune, and no other device than this one.
    """
    asked = uses_learned or cfg.tune.grids or cfg.get("also") or not cfg.latency.get("_partial_")
    if pair.draft is None or not asked:
        return {}
    objective, given = cfg.learned.objective, instantiate(cfg.latency)
    if objective == "joules" and getattr(given, "func", None) is measure_seconds:
        given = None  # measured, in the objective's unit
    tables = {"modelled": cost_table(pair, given, objective)}
    return tables | ({"also": cost_table(pair, instantiate(cfg.also))} if cfg.get("also") else {})


def tune(
    cfg: DictConfig, rows: Sequence[Row], pair: ModelPair, task: Task, tables: Tables, journal: Journal
) -> tuple[list[Row], dict[str, Any]]:
    """Hand-set settings worth measuring: undominated on other prompts, on any device.

    Returns:
        The kept rows; and split, prompts, grid (name, speeds by the table of each device, log_prob,
        kept).

    Raises:
        UserError: a row failed.
    """
    about = cfg.tune
    prompts = task.prompts(about.split, about.prompts, pair.tokenizer)
    records = make_records(rows, pair, about.batch_size)
    if decode_all(records, prompts, (), cfg.seed, journal=journal, stage="tune", strict=cfg.strict):
        raise KeyboardInterrupt
    score_all(records, prompts := leave_out(records, prompts), pair, task)
    prompts = leave_out(records, prompts)
    for record in records:
        if record.error is not None:
            raise UserError(record.error)
    speeds: dict[str, list[float]] = {name: [] for name in tables}
    qualities: list[float] = []
    for found in (record.repeats[0] for record in records):
        tokens = sum(m.stats.new_tokens for m in found)
        for name, table in tables.items():
            speeds[name].append(tokens / sum(modelled_seconds(m.stats, table) for m in found))
        qualities.append(sum(m.log_prob for m in found) / sum(len(m.tokens) for m in found))
    kept = set()
    curves = [curve_of(row.method.name, row.settings) for row in rows]
    for name in dict.fromkeys(curves):
        members = [i for i, curve in enumerate(curves) if curve == name]
        for speed in speeds.values():
            kept |= {members[j] for j in undominated([(speed[i], qualities[i]) for i in members], about.keep)}
    tried = [
        {"name": row.name, "log_prob": qualities[i], "kept": i in kept, "speeds": {n: s[i] for n, s in speeds.items()}}
        for i, row in enumerate(rows)
    ]
    console = Console(stderr=True)
    console.print(f"Hand-set settings on {len(prompts)} prompts of split {about.split}, tokens/s by the tables:")
    for line in tuning_lines({"grid": tried}):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return [rows[i] for i in sorted(kept)], {"split": about.split, "prompts": len(prompts), "grid": tried}


if __name__ == "__main__":
    main()
