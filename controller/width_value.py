"""The knob by what it should give: a `width_value` for a speed, or for a loss of quality, from an evaluation's results.

The learned rows of a results.json, sorted by width_value, are a curve: larger values are better and slower. Rows are
noisy, so quality is made never to fall along the curve and speed never to rise (running maximum and minimum). Between
two rows both are linear in the logarithm of width_value, in the value itself where one of the two is 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from decoding.arrays import FloatArray
from decoding.checks import number
from decoding.errors import UserError
from decoding.results_file import Results, name_of, read_results

_REFERENCE = "beam_sample"
_ROUNDING = 1e-9  # nats


def choose_width_value(
    results: Results,
    *,
    min_logprob_drop: float | None = None,
    target_tokens_per_second: float | None = None,
    speed: str = "tokens_per_second",
    weights: str | None = None,
) -> float:
    """The `width_value` that reaches a speed with the best quality, or keeps a quality at the highest speed.

    Exactly one of the two targets is given. Speeds hold for the machine, the pair and the settings of the evaluation.

    Args:
        results: path of a results.json that evaluate.py wrote with learned rows at several `grid.width_values`, or
            what it holds.
        min_logprob_drop: by how many nats per token the log-probability may lie below that of beam_sample with the
            learned rows' target_width; 0 or more. The smallest value that loses no more is chosen.
        target_tokens_per_second: that must be reached, above 0. The value of the best quality that does is chosen, the
            smaller one of equals.
        speed: the summary metric that is meant by speed.
        weights: `weights_sha256` of the controller that the value is for; results of another are refused. None: of
            whichever controller the results are.

    Returns:
        A value within those of the table.

    Raises:
        UserError: both targets or none, no such results, results of another controller, no rows to read the answer
            from, or out of the table's reach.
    """
    _check_targets(min_logprob_drop, target_tokens_per_second)
    found = read_results(results)
    rows = found["rows"]
    learned = [row for row in rows if row["method"] == "learned" and "width_value" in row["settings"]]
    if not learned:
        raise UserError(
            "The results hold no learned row with a width_value; run evaluate.py with controller=<directory> "
            "policies=[learned] grid.width_values=[0,1,3,10,30]."
        )
    measured = found.get("provenance", {}).get("controller_sha256")
    if weights is not None and measured != weights:
        raise UserError(
            f"{name_of(results)} are of a controller whose weights have the sha256 {measured or '(not recorded)'}; "
            f"this one's have {weights}. Evaluate this controller with several grid.width_values, or give width_value."
        )
    if target_tokens_per_second is not None:
        return _fast_enough(_curve(learned, speed), target_tokens_per_second)
    assert min_logprob_drop is not None
    return _good_enough(_curve(learned, None), _reference(rows, learned), min_logprob_drop)


def warn_of_shared_prompts(results: Results, task: Mapping[str, Any], prompt_ids: Sequence[str]) -> None:
    """Warn where a width_value chosen from results is to be measured on prompts of theirs: it was fitted to them.

    Args:
        results: that `choose_width_value` reads.
        task: `Task.describe()` of the prompts to come; ids mean the same prompts in one task only, or in one file.
        prompt_ids: of the prompts to come.

    Raises:
        UserError: no such results.
    """
    found = read_results(results)
    then = found.get("provenance", {}).get("task", {})
    measured = {prompt["prompt_id"] for row in found["rows"] for prompt in row.get("prompts", [])}
    shared = sum(name in measured for name in prompt_ids)
    if shared and all(then.get(key) == task.get(key) for key in ("name", "sha256")):
        warnings.warn(
            f"{name_of(results)} were measured on {shared} of the {len(prompt_ids)} prompts that are measured now "
            f"(split {then.get('split')} of {task.get('name')}), and width_value is chosen by them: the speed and "
            "quality of the learned row are fitted to these prompts. Choose it by an evaluation of others, such as "
            "prompts.split=val.",
            stacklevel=2,
        )


class _Curve(NamedTuple):
    """What the learned rows say, by increasing width_value; [N] each."""

    values: list[float]
    quality: FloatArray  # never falls
    speed: FloatArray  # never rises


def _curve(learned: Sequence[Mapping[str, Any]], speed: str | None) -> _Curve:
    """The learned rows, one point for each width_value; speeds are 0 where none are asked for."""
    points: dict[float, list[tuple[float, float]]] = {}
    for row in learned:
        point = _metric(row, "log_prob"), _metric(row, speed) if speed is not None else 0.0
        points.setdefault(float(row["settings"]["width_value"]), []).append(point)
    values = sorted(points)
    means = np.array([np.mean(points[value], axis=0) for value in values])  # [N, 2]
    return _Curve(values, np.maximum.accumulate(means[:, 0]), np.minimum.accumulate(means[:, 1]))


def _fast_enough(curve: _Curve, least: float) -> float:
    """The value of the best quality among those of at least that speed."""
    values, quality, speed = curve
    if least > speed[0]:
        raise UserError(
            f"target_tokens_per_second is {least:g}; the table's learned rows reach {speed[-1]:.4g} to {speed[0]:.4g}. "
            "Lower it, or evaluate smaller width_values."
        )
    i = int(np.flatnonzero(speed >= least)[-1])
    best = quality[i]
    if i + 1 < len(values):
        best += (speed[i] - least) / (speed[i] - speed[i + 1]) * (quality[i + 1] - quality[i])
    return _first_of_quality(curve, float(best))


def _good_enough(curve: _Curve, reference: float, drop: float) -> float:
    """The smallest value whose quality lies at most `drop` below the reference."""
    low, high = (float(reference - quality) for quality in (curve.quality[-1], curve.quality[0]))
    if low > drop + _ROUNDING:
        raise UserError(
            f"min_logprob_drop is {drop:g}; the table's learned rows lie {low:.4g} to {high:.4g} nats per token below "
            f"{_REFERENCE}. Raise it, or evaluate larger width_values."
        )
    return _first_of_quality(curve, reference - drop)


def _first_of_quality(curve: _Curve, least: float) -> float:
    """The smallest value of at least that quality, which the curve reaches."""
    values, quality, _ = curve
    i = min(int(np.searchsorted(quality, least)), len(values) - 1)  # rounding may ask for a hair more than the last
    if i == 0:
        return values[0]
    share = min(1.0, float((least - quality[i - 1]) / (quality[i] - quality[i - 1])))
    low, high = values[i - 1], values[i]
    return low + share * (high - low) if low == 0 else low * (high / low) ** share


def _reference(rows: Sequence[Mapping[str, Any]], learned: Sequence[Mapping[str, Any]]) -> float:
    """Log-probability per token of beam sampling at the learned rows' target width."""
    widths = sorted({row["config"]["target_width"] for row in learned})
    if len(widths) > 1:
        raise UserError(
            f"The learned rows have the target widths {', '.join(map(str, widths))}, and so several references; "
            "evaluate them at one."
        )
    for row in rows:
        if row["method"] == _REFERENCE and row["config"]["target_width"] == widths[0]:
            return _metric(row, "log_prob")
    raise UserError(
        f"The results hold no {_REFERENCE} row of target_width {widths[0]} to measure the drop from; evaluate.py "
        "always adds one, so give what it wrote."
    )


def _metric(row: Mapping[str, Any], name: str) -> float:
    summary = row["summary"]
    value = summary.get(name, {}).get("value")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"The row {row.get('name')!r} has no {name}; its metrics are {', '.join(sorted(summary))}.")
    return float(value)


def _check_targets(drop: Any, speed: Any) -> None:
    if (drop is None) == (speed is None):
        raise UserError(
            f"min_logprob_drop is {drop!r} and target_tokens_per_second is {speed!r}; give one of the two, a number."
        )
    if drop is not None:
        number("min_logprob_drop", drop, least=0, hint="nats per token; 0.01 to 0.1 are worth trying")
    if speed is not None:
        number("target_tokens_per_second", speed, above=0)
