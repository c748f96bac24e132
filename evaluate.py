"""Evaluate methods side by side on the same prompts: results.json, results.md, frontier.png, calibration.png.

    python evaluate.py controller=<directory> policies=[fixed,threshold,learned] pair=...

conf/evaluate.yaml has every setting; docs/results.md describes results.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from controller import LearnedWidth
from controller.compare import family_of, undominated
from controller.knob import warn_of_shared_prompts
from controller.network import load_controller, weights_sha256
from controller.report import (
    calibration_curves,
    compare_rows,
    comparison_lines,
    console_table,
    summarise,
    tuning_lines,
    write_report,
)
from controller.tracking import log_evaluation, tracked
from decoding import DecodingConfig, ModelPair, UserError, WidthPolicy
from decoding.baselines import METHODS, Generate, Method, Settings, policy_method
from decoding.costs import cost_table
from decoding.entry import entry_point
from decoding.latency import LatencyTable
from decoding.measure import Measurement, Row, make_rows, run_rows, score
from decoding.oracles import modelled_seconds
from decoding.progress import RunProgress
from decoding.provenance import provenance, to_plain
from decoding.results_file import SCHEMA_VERSION
from decoding.tasks.base import Prompt, Task

_MEASURES_SECONDS = "decoding.latency.LatencyTable.measure"
# Learned widths that plan for the device of `latency`, and for that of `latency@also`.
LEARNED_AXES = dict.fromkeys(("learned", "learned_also"), Method(lambda *_: NotImplemented, ("width_value",)))


@entry_point("evaluate", renames={"controller": "controller_path"})
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run the evaluation that a config describes.

    Returns:
        What results.json holds.

    Raises:
        KeyboardInterrupt: after what all rows had measured before it has been scored and written.
    """
    methods = dict(METHODS)
    # Before anything is loaded: settings that cannot be are refused.
    check_counts(cfg)
    chosen, config = chosen_policies(cfg), instantiate(cfg.decoding)
    rows = make_rows(chosen, methods | LEARNED_AXES, config, grid_of(cfg, config), cfg.references)
    candidates = tuning_rows(cfg, methods, config)
    trained = load_controller(cfg.controller_path)[1] if cfg.controller_path is not None else {}
    weights = weights_sha256(cfg.controller_path) if cfg.controller_path is not None else None
    task: Task = instantiate(cfg.data)
    with tracked(cfg) as logger:
        pair: ModelPair = instantiate(cfg.pair)
        prompts, warmup = read_prompts(cfg, task, pair)
        if cfg.learned.results is not None and cfg.controller_path is not None:
            warn_of_shared_prompts(cfg.learned.results, task.describe(), [prompt.id for prompt in prompts])
        costs = cost_tables(cfg, pair, any(row.method in LEARNED_AXES for row in rows))
        for name, table in zip(LEARNED_AXES, costs.values(), strict=False):
            methods[name] = learned_method(cfg.controller_path, cfg.learned, table)
        calls = [methods[row.method](pair, row.config, row.settings) for row in rows]
        tuned = tune(cfg, candidates, methods, pair, task, costs) if candidates and costs else None
        found = tuned.pop("rows") if tuned is not None else []
        calls += [methods[row.method](pair, row.config, row.settings) for row in found]
        rows, measured, failed = decode_and_score(
            rows + found, calls, prompts, warmup, pair, task, cfg.seed, cfg.batch_size
        )
        complete = len(measured[0]) == len(prompts)
        by: dict[str, tuple[LatencyTable | None, str]] = {"clock": (None, "learned")}
        by |= {name: (table, learned) for (name, table), learned in zip(costs.items(), LEARNED_AXES, strict=False)}
        results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "provenance": {
                **provenance(),
                "pair": pair.describe(),
                "task": {**task.describe(), "split": cfg.prompts.split, "prompts": len(measured[0])},
                "controller": cfg.controller_path,
                "controller_sha256": weights,
                "latency": costs["modelled"].to_dict() if "modelled" in costs else None,
                "also": costs["also"].to_dict() if "also" in costs else None,
                "config": to_plain(cfg),
            },
            "complete": complete,
            "failed": failed,
            "tuned": tuned,
            "comparisons": {
                name: compare_rows(rows, measured, cfg.bootstrap, cfg.seed, table, learned)
                for name, (table, learned) in by.items()
            },
            "rows": summarise(rows, measured, cfg.bootstrap, cfg.seed, costs),
        }
        files = write_report(Path(cfg.output_dir), results, calibration_curves(trained))
        log_evaluation(logger, results, files)
    show(results, files)
    if not complete:
        raise KeyboardInterrupt
    return results


def show(results: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Print the table, the comparisons and where everything is."""
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(console_table(results["rows"]))
    for line in comparison_lines(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for name, sentence in results["failed"].items():
        console.print(f"{name} failed: {sentence}", highlight=False, soft_wrap=True)
    console.print(
        "\n".join(["", *(f"{name}: {path}" for name, path in files.items())]), highlight=False, soft_wrap=True
    )


def learned_method(path: str | None, options: Mapping[str, Any], costs: LatencyTable) -> Method:
    """DSBDDecoder with the controller saved at `path`, planning with a table; `options` of LearnedWidth."""

    def make(pair: ModelPair, config: DecodingConfig, settings: Settings) -> WidthPolicy:
        assert path is not None  # chosen_policies refuses
        clock = options.get("clock") or ("table" if costs.measured is None else None)
        given = {key: value for key, value in options.items() if key != "objective"}
        given |= {"latency": costs, "clock": clock, **settings}
        return LearnedWidth.load(path, pair=pair, **given)

    return policy_method(make, ("width_value",))


def cost_tables(cfg: DictConfig, pair: ModelPair, uses_learned: bool) -> dict[str, LatencyTable]:
    """What passes cost here ("modelled") and, where the config names a second device, there ("also").

    None where nobody asks: no learned rows, nothing to tune, and no other device than this one.
    """
    asked = uses_learned or cfg.tune.grids or cfg.get("also") or not cfg.latency.get("_partial_")
    if pair.draft is None or not asked:
        return {}
    objective = cfg.learned.objective
    measures_seconds = cfg.latency.get("_target_") == _MEASURES_SECONDS  # what it does by default
    given = None if objective == "joules" and measures_seconds else instantiate(cfg.latency)
    tables = {"modelled": cost_table(pair, given, objective)}
    return tables | ({"also": cost_table(pair, instantiate(cfg.also))} if cfg.get("also") else {})


def check_counts(cfg: DictConfig) -> None:
    """Refuse counts that cannot be."""
    least = {"batch_size": 1, "bootstrap": 1, "prompts.limit": 1, "prompts.warmup": 0}
    least |= {"tune.prompts": 1, "tune.batch_size": 1, "tune.keep": 1}
    for name, smallest in least.items():
        value = OmegaConf.select(cfg, name)
        if value is None and name.startswith("prompts."):
            continue  # all there are; none
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise UserError(f"{name} is {value!r}; give a whole number of at least {smallest}.")
    choices = ("results", "min_logprob_drop", "target_tokens_per_second")
    choosing = [name for name in choices if cfg.learned[name] is not None]
    if choosing and cfg.grid.width_values:
        raise UserError(
            f"learned.{choosing[0]} chooses a width_value, and grid.width_values={to_plain(cfg.grid.width_values)} "
            "gives some; give grid.width_values=[] to have it chosen."
        )


def grid_of(cfg: DictConfig, config: DecodingConfig) -> dict[str, Any]:
    """The axes of `grid`; without widths, 1, 2, 4 and so on up to the config's target_width."""
    grid: dict[str, Any] = to_plain(cfg.grid)
    if grid["widths"] is None:
        doubled = [1 << i for i in range(config.target_width.bit_length())]
        grid["widths"] = sorted({*doubled, config.target_width})
    return grid


def tuning_rows(cfg: DictConfig, methods: Mapping[str, Method], config: DecodingConfig) -> list[Row]:
    """All settings of `tune.grids`."""
    rows: list[Row] = []
    for axes in to_plain(cfg.tune)["grids"]:
        if not isinstance(axes, dict) or not isinstance(axes.get("policies"), list):
            raise UserError(f"tune.grids holds {axes!r}; give each as {{policies: [...], <axis of grid>: [...]}}.")
        rows += make_rows(axes.pop("policies"), methods, config, axes, references=())
    return rows


def tune(
    cfg: DictConfig,
    rows: Sequence[Row],
    methods: Mapping[str, Method],
    pair: ModelPair,
    task: Task,
    costs: Mapping[str, LatencyTable],
) -> dict[str, Any]:
    """Hand-set settings worth measuring: those that are undominated on other prompts, on any device.

    Returns:
        split, prompts, grid (name, speeds by the table of each device, log_prob, kept), and rows: the kept ones.
    """
    about = cfg.tune
    prompts = task.prompts(about.split, about.prompts, pair.tokenizer)
    speeds: dict[str, list[float]] = {name: [] for name in costs}
    qualities: list[float] = []
    with RunProgress() as progress:
        bar = progress.add_task("tuning", total=len(rows))
        for row in rows:
            call = methods[row.method](pair, row.config, row.settings)
            (found,) = run_rows([row], [call], prompts, [], cfg.seed, pair.device, batch_size=about.batch_size)
            if len(found) < len(prompts):
                raise KeyboardInterrupt
            for measurement, prompt in zip(found, prompts, strict=True):
                score(measurement, prompt, pair, task)
            tokens = sum(m.stats.new_tokens for m in found)
            for name, table in costs.items():
                speeds[name].append(tokens / sum(modelled_seconds(m.stats, table) for m in found))
            qualities.append(sum(m.log_prob for m in found) / sum(len(m.tokens) for m in found))
            progress.advance(bar)
    kept = set()
    families = [family_of(row.method, row.settings) for row in rows]
    for name in dict.fromkeys(families):
        members = [i for i, family in enumerate(families) if family == name]
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
    chosen = [rows[i] for i in sorted(kept)]
    return {"split": about.split, "prompts": len(prompts), "grid": tried, "rows": chosen}


def chosen_policies(cfg: DictConfig) -> list[str]:
    """The rows' methods by name, in the order of the table."""
    has_controller = cfg.controller_path is not None
    names = ["speculative", "fixed", "threshold"] + ["learned"] * has_controller
    if cfg.policies is not None:
        names = [cfg.policies] if isinstance(cfg.policies, str) else list(cfg.policies)
    if "learned" in names and cfg.get("also"):
        names.append("learned_also")
    for name in LEARNED_AXES:
        if name in {*names, *cfg.references} and not has_controller:
            raise UserError(
                f"policies or references hold {name!r}, which needs a trained controller: give controller=<directory>, "
                "as printed at the end of train.py."
            )
    if "learned_also" in {*names, *cfg.references} and not cfg.get("also"):
        raise UserError("'learned_also' plans for a second device: give it as latency@also=<a config of conf/latency>.")
    return names


def read_prompts(cfg: DictConfig, task: Task, pair: ModelPair) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to measure, and others to warm up with (the same where there are no others)."""
    prompts = task.prompts(cfg.prompts.split, cfg.prompts.limit, pair.tokenizer)
    if not cfg.prompts.warmup:
        return prompts, []
    try:
        return prompts, task.prompts("val", cfg.prompts.warmup, pair.tokenizer)
    except UserError:
        return prompts, prompts[: cfg.prompts.warmup]


def decode_and_score(
    rows: Sequence[Row],
    calls: Sequence[Generate],
    prompts: Sequence[Prompt],
    warmup: Sequence[Prompt],
    pair: ModelPair,
    task: Task,
    seed: int,
    batch_size: int,
) -> tuple[list[Row], list[list[Measurement]], dict[str, str]]:
    """Time all rows, then score what they gave, so that scoring disturbs no clock.

    Returns:
        The rows that memory sufficed for; their measurements, [rows][prompts], after Ctrl-C of the first prompts alone;
        and of the others a sentence by name.

    Raises:
        UserError: it sufficed for none.
        KeyboardInterrupt: before all rows have measured a prompt.
    """
    failed: dict[int, str] = {}
    transformers.logging.set_verbosity_error()  # generate() warns about its own arguments
    with RunProgress() as progress:
        decoding = progress.add_task("decoding", total=len(rows) * (len(prompts) + len(warmup)))
        scoring = progress.add_task("scoring", total=len(rows) * len(prompts))
        measured = run_rows(
            rows, calls, prompts, warmup, seed, pair.device, lambda _: progress.advance(decoding), batch_size, failed
        )
        if len(failed) == len(rows):
            raise UserError(failed[0])
        kept = [i for i in range(len(rows)) if i not in failed]
        if (done := len(measured[kept[0]])) < len(prompts):
            console = progress.console
            console.print(f"interrupted: writing what {done} of {len(prompts)} prompts gave", highlight=False)
        for row in (measured[i] for i in kept):
            for measurement, prompt in zip(row, prompts[:done], strict=True):
                score(measurement, prompt, pair, task)
                progress.advance(scoring)
    return [rows[i] for i in kept], [measured[i] for i in kept], {rows[i].name: why for i, why in failed.items()}


if __name__ == "__main__":
    main()
