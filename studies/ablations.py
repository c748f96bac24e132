"""Compare controllers of different settings: python -m studies.ablations outputs/ablation.

Prints Markdown (docs/ablations.md): what each controller found under the folder scores on
validation rows, and, of the results of evaluate.py found there, how fast its widths are without any
clock: the policy's own time is left out.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from decoding.cost_table import LatencyTable, iteration_seconds
from decoding.errors import UserError
from decoding.measure.compare import speed_at
from decoding.measure.pages import markdown
from decoding.support.arrays import FloatArray

RESAMPLES = 2000
_REFERENCE, _OURS = "beam_sample", "learned"
_METRICS = ("count_explained", "late_regret_nll", "late_survivor_nll", "regret_nll", "survivor_nll")
_CONSTANTS = {"late_regret_nll": "regret_nll", "late_survivor_nll": "survivor_nll"}  # what a late head starts from


def main(arguments: Sequence[str]) -> None:
    """Print both tables.

    Raises:
        UserError: not one folder, or nothing in it.
    """
    if len(arguments) != 1:
        raise UserError(f"{len(arguments)} folders were given; give one, such as outputs/ablation.")
    folder = Path(arguments[0])
    trained = {path.parts[-3]: _read(path)["provenance"] for path in sorted(folder.glob("*/controller/config.json"))}
    evaluated = {path.parts[-2]: _read(path) for path in sorted(folder.glob("*/results.json"))}
    if not trained and not evaluated:
        raise UserError(
            f"{folder} has neither */controller nor */results.json. Run the commands of docs/ablations.md first."
        )
    for lines in (training_table(trained), decision_table(evaluated)):
        print("\n".join([*lines, ""]))


def training_table(trained: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Markdown: validation metrics of each calibrated controller, and what the constants score.

    Args:
        trained: provenance of each, by name.
    """
    head = ["controller", "train rows", "seconds", *_METRICS]
    body = []
    for name, about in trained.items():
        training, metrics = about.get("training", {}), about.get("metrics", {})
        values = [_number(metrics.get(f"val/{metric}")) for metric in _METRICS]
        body.append([name, str(training.get("rows", "-")), str(training.get("seconds", "-")), *values])
    for about in list(trained.values())[:1]:
        rates = [about.get("metrics", {}).get(f"val/{_CONSTANTS.get(name, name)}_constant") for name in _METRICS]
        body.append(["constant", "-", "-", *(_number(rate) for rate in rates)])
    return markdown(head, body) if body else []


def decision_table(evaluated: Mapping[str, Mapping[str, Any]], seed: int = 0) -> list[str]:
    """Markdown: tokens per modelled second of learned widths at the log-probability of the
    narrowest beam sampling.

    Args:
        evaluated: what results.json holds, by name. A row's speed is read off its learned rows,
            linear in between. Those that cannot stand beside the first that can be in the table are
            named below it.
        seed: of the resamples.
    """
    able = [name for name, results in evaluated.items() if _has_what_it_takes(results)]
    names = [name for name in able if _about(evaluated[name]) == _about(evaluated[able[0]])]
    if omitted := [name for name in evaluated if name not in names]:
        reason = "learned widths, beam sampling and a modelled device are needed, all on the same prompts"
        omitted = ["", f"Left out: {', '.join(omitted)} ({reason})."]
    if not names:
        return omitted[1:]
    count = len(evaluated[names[0]]["rows"][0]["prompts"])
    draws = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))  # [B, P] the same for all
    draws = np.concatenate([np.arange(count)[None], draws])
    speeds = {name: _speeds(evaluated[name], draws) for name in names}
    body = []
    for name, found in speeds.items():
        ratio = found / speeds[names[0]]
        cells = [_with_interval(found, ".0f"), _with_interval(ratio, ".3f")]
        body.append([name, ", ".join(f"{value:g}" for value in _width_values(evaluated[name])), *cells])
    return markdown(["evaluation", "width values", "tokens/s", f"x {names[0]}"], body) + omitted


def _speeds(results: Mapping[str, Any], draws: NDArray[np.int64]) -> FloatArray:
    """Speed of the learned rows at the reference's quality, on all prompts and under each resample;
    [B + 1].

    NaN where they do not reach it.
    """
    table = LatencyTable.from_dict(results["provenance"]["latency"])
    references = [row for row in results["rows"] if row["method"] == _REFERENCE]
    reference = min(references, key=lambda row: row["config"]["target_width"])
    ours = [row for row in results["rows"] if row["method"] == _OURS]
    asked = _quality(reference, draws)  # [B + 1]
    quality = np.stack([_quality(row, draws) for row in ours])  # [rows, B + 1]
    seconds = [np.array([_seconds(prompt["stats"], table) for prompt in row["prompts"]]) for row in ours]
    tokens = [np.array([prompt["stats"]["new_tokens"] for prompt in row["prompts"]]) for row in ours]
    speed = np.stack([t[draws].sum(1) / s[draws].sum(1) for t, s in zip(tokens, seconds, strict=True)])
    reached = quality.max(axis=0) >= asked  # elsewhere there is no speed at that quality
    at = [speed_at(speed[:, b], quality[:, b], asked[b]) for b in range(len(draws))]
    return np.where(reached, at, np.nan)


def _quality(row: Mapping[str, Any], draws: NDArray[np.int64]) -> FloatArray:
    """Log-probability per token under each resample; [B + 1]."""
    log_prob = np.array([prompt["log_prob"] for prompt in row["prompts"]])
    tokens = np.array([len(prompt["tokens"]) for prompt in row["prompts"]])
    per_token: FloatArray = log_prob[draws].sum(1) / tokens[draws].sum(1)
    return per_token


def _seconds(stats: Mapping[str, Any], table: LatencyTable) -> float:
    pairs = zip(stats["roots"], stats["forests"], strict=True)
    return sum(iteration_seconds(table, forest, roots) for roots, forest in pairs)


def _has_what_it_takes(results: Mapping[str, Any]) -> bool:
    return bool(results["provenance"].get("latency")) and {_REFERENCE, _OURS} <= {r["method"] for r in results["rows"]}


def _about(results: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The modelled device, and the prompts."""
    return results["provenance"]["latency"], [prompt["prompt_id"] for prompt in results["rows"][0]["prompts"]]


def _width_values(results: Mapping[str, Any]) -> list[float]:
    settings = (row["settings"] for row in results["rows"] if row["method"] == _OURS)
    return [about["width_value"] for about in settings if "width_value" in about]  # else the controller's own


def _with_interval(values: FloatArray, form: str) -> str:
    """A value and 95% over the resamples that have one; [B + 1], of which the first is the value itself."""
    if not math.isfinite(values[0]):
        return "-"
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return f"{values[0]:{form}} [{low:{form}}, {high:{form}}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Make it again, or move it out of the folder.") from error
    return content


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
