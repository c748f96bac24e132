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
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from controller import LearnedWidth
from controller.network import load_controller
from controller.report import SCHEMA_VERSION, calibration_curves, console_table, summarise, write_report
from controller.tracking import log_evaluation, tracked
from decoding import DecodingConfig, ModelPair, UserError, WidthPolicy
from decoding.baselines import METHODS, Generate, Method, Settings, policy_method
from decoding.entry import entry_point
from decoding.latency import LatencyTable
from decoding.measure import Measurement, Row, make_rows, run_rows, score
from decoding.provenance import provenance, to_plain
from decoding.tasks.base import Prompt, Task


@entry_point("evaluate", renames={"controller": "controller_path"})
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run the evaluation that a config describes.

    Returns:
        What results.json holds.
    """
    methods = {**METHODS, "learned": learned_method(cfg.controller_path, cfg.learned)}
    rows = make_rows(chosen_policies(cfg), methods, instantiate(cfg.decoding), to_plain(cfg.grid))
    trained = load_controller(cfg.controller_path)[1] if cfg.controller_path is not None else {}
    task: Task = instantiate(cfg.data)
    pair: ModelPair = instantiate(cfg.pair)
    calls = [methods[row.method](pair, row.config, row.settings) for row in rows]
    prompts, warmup = read_prompts(cfg, task, pair)
    with tracked(cfg) as run:
        rows, measured, failed = decode_and_score(rows, calls, prompts, warmup, pair, task, cfg.seed, cfg.batch_size)
        results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "provenance": {
                **provenance(),
                "pair": pair.describe(),
                "task": {**task.describe(), "split": cfg.prompts.split, "prompts": len(prompts)},
                "controller": cfg.controller_path,
                "latency": LatencyTable.measure(pair).to_dict() if uses_measured_latency(cfg, rows) else None,
                "config": to_plain(cfg),
            },
            "failed": failed,
            "rows": summarise(rows, measured, cfg.bootstrap, cfg.seed),
        }
        files = write_report(Path(cfg.output_dir), results, calibration_curves(trained))
        log_evaluation(run, results, files)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(console_table(results["rows"]))
    for name, sentence in failed.items():
        console.print(f"{name} failed: {sentence}", highlight=False, soft_wrap=True)
    console.print(
        "\n".join(["", *(f"{name}: {path}" for name, path in files.items())]), highlight=False, soft_wrap=True
    )
    return results


def learned_method(path: str | None, options: Mapping[str, Any]) -> Method:
    """DSBDDecoder with the controller saved at `path`; `options` of LearnedWidth, its latency measured if not given."""

    def make(pair: ModelPair, config: DecodingConfig, settings: Settings) -> WidthPolicy:
        assert path is not None  # chosen_policies refuses
        latency = options.get("latency") or LatencyTable.measure(pair)
        return LearnedWidth.load(path, pair=pair, **{**options, "latency": latency}, **settings)

    return policy_method(make, ("width_value",))


def uses_measured_latency(cfg: DictConfig, rows: Sequence[Row]) -> bool:
    """Whether learned rows plan with a latency table of this run."""
    return cfg.learned.latency is None and any(row.method == "learned" for row in rows)


def chosen_policies(cfg: DictConfig) -> list[str]:
    """The rows' methods by name, in the order of the table."""
    has_controller = cfg.controller_path is not None
    if cfg.policies is None:
        return ["speculative", "fixed", "threshold"] + ["learned"] * has_controller
    names = [cfg.policies] if isinstance(cfg.policies, str) else list(cfg.policies)
    if "learned" in names and not has_controller:
        raise UserError(
            "policies holds 'learned', which needs a trained controller: give controller=<directory>, as printed at "
            "the end of train.py."
        )
    return names


def read_prompts(cfg: DictConfig, task: Task, pair: ModelPair) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to measure, and others to warm up with (the same where there are no others)."""
    if cfg.batch_size < 1:
        raise UserError(f"batch_size is {cfg.batch_size}; give a whole number of at least 1.")
    for name in ("limit", "warmup"):
        least = 1 if name == "limit" else 0
        if cfg.prompts[name] is not None and cfg.prompts[name] < least:
            raise UserError(f"prompts.{name} is {cfg.prompts[name]}; give a whole number of at least {least}.")
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
        The rows that memory sufficed for; their measurements, [rows][prompts]; and of the others a sentence by name.

    Raises:
        UserError: it sufficed for none.
    """
    failed: dict[int, str] = {}
    transformers.logging.set_verbosity_error()  # generate() warns about its own arguments
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        decoding = progress.add_task("decoding", total=len(rows) * (len(prompts) + len(warmup)))
        scoring = progress.add_task("scoring", total=len(rows) * len(prompts))
        measured = run_rows(
            rows, calls, prompts, warmup, seed, pair.device, lambda _: progress.advance(decoding), batch_size, failed
        )
        if len(failed) == len(rows):
            raise UserError(failed[0])
        kept = [i for i in range(len(rows)) if i not in failed]
        for row in (measured[i] for i in kept):
            for measurement, prompt in zip(row, prompts, strict=True):
                score(measurement, prompt, pair, task)
                progress.advance(scoring)
    return [rows[i] for i in kept], [measured[i] for i in kept], {rows[i].name: why for i, why in failed.items()}


if __name__ == "__main__":
    main()
