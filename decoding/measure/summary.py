"""Summaries of measurements: ratios of sums over the prompts, with paired bootstrap intervals, in
JSON-able dicts.

docs/formats.md lists the metrics. The same resamples of the prompts serve all rows, so that two
rows' ratio is paired.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from decoding.cost_table import Costs
from decoding.measure.compare import OURS, comparisons, curve_of
from decoding.measure.oracles import hindsight_seconds, modelled_seconds
from decoding.measure.rows import REFERENCES
from decoding.measure.turns import Measurement, Record
from decoding.policies.base import LayerRecord
from decoding.results import PHASES, DecodeStats
from decoding.support.arrays import FloatArray

Share = tuple[float, float]  # numerator and denominator of a prompt; a summary is the ratio of their sums
Ratio = Callable[[Measurement], Share]
_NOTHING = (0.0, 0.0)


class Estimate(NamedTuple):
    """A metric of a row: on all prompts, under each resample of them, and in each repeat."""

    value: float  # NaN where no prompt has it
    draws: FloatArray  # [B]
    repeats: list[float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: value, the central 95% of the resamples and, where there are several, the
        repeats' values.
        """
        low, high = np.nanpercentile(self.draws, [2.5, 97.5])
        bounds = {"value": self.value, "low": float(low), "high": float(high)}
        return bounds | ({"repeats": self.repeats} if len(self.repeats) > 1 else {})


# ------------------------------------------------------------------------------------------ metrics


def _seconds(phase: str) -> Ratio:
    return lambda m: (m.stats.seconds.get(phase, 0.0), 1)


def _drafted(m: Measurement) -> list[LayerRecord]:
    """Layers that something was drafted for; of a policy that says E[K], those that it says it of."""
    layers = [layer for layer in m.stats.layers if layer.draft_width]
    return [layer for layer in layers if layer.expected is not None] or layers


def _mean(values: Iterable[float | None]) -> Share:
    known = [value for value in values if value is not None]
    return sum(known), len(known)


def _milliseconds(phase: str) -> Ratio:
    """A phase's share of an iteration; transformers' methods have no phases."""
    return lambda m: (1000 * m.stats.seconds.get(phase, 0.0), m.stats.iterations) if m.stats.records else _NOTHING


def _iteration_seconds(stats: DecodeStats) -> float:
    return stats.total_seconds - stats.seconds.get("prompt", 0.0)


def overhead(stats: DecodeStats) -> Share:
    """Time of iterations that is in neither model; zeros where no phase but "other" is known."""
    models = stats.seconds.get("target", 0.0) + stats.seconds.get("draft", 0.0)
    return (_iteration_seconds(stats) - models, _iteration_seconds(stats)) if models > 0 else _NOTHING


def _task_metric(name: str) -> Ratio:
    return lambda m: (m.metrics.get(name, 0.0), name in m.metrics)


RATIOS: dict[str, Ratio] = {
    "tokens_per_second": lambda m: (m.stats.new_tokens, m.wall_seconds),
    "block_efficiency": lambda m: (m.stats.new_tokens, m.stats.iterations),
    "log_prob": lambda m: (m.log_prob, len(m.tokens)),
    "cut_share": lambda m: (not m.finished, 1),
    "target_width": lambda m: (sum(m.stats.target_widths), len(m.stats.target_widths)),
    "depth": lambda m: (sum(map(len, m.stats.forests)), len(m.stats.forests)),
    "draft_width": lambda m: (sum(m.stats.draft_widths), sum(w > 0 for w in m.stats.draft_widths)),
    "accepted_share": lambda m: (sum(m.stats.accepted), sum(m.stats.draft_widths)),
    "expected_count": lambda m: _mean(layer.expected for layer in _drafted(m)),
    "accepted_count": lambda m: _mean(layer.accepted for layer in _drafted(m)),
    "target_calls": lambda m: (m.stats.target_calls, 1),
    "kv_slots_peak": lambda m: (m.stats.kv_slots_peak, 1),
    "kv_slots_end": lambda m: (m.stats.kv_slots_end, 1),
    "kv_slots_per_token": lambda m: (m.stats.kv_slots_end, m.stats.prompt_tokens + m.stats.new_tokens),
    "kv_slots_peak_per_token": lambda m: (m.stats.kv_slots_peak, m.stats.prompt_tokens + m.stats.new_tokens),
    "joules_per_token": lambda m: _NOTHING if m.joules is None else (m.joules, m.stats.new_tokens),
    **{f"{phase}_seconds": _seconds(phase) for phase in PHASES},
    "iteration_milliseconds": lambda m: (1000 * _iteration_seconds(m.stats), m.stats.iterations),
    **{f"{phase}_milliseconds": _milliseconds(phase) for phase in PHASES if phase != "prompt"},
    "prompt_milliseconds": lambda m: (1000 * m.stats.seconds.get("prompt", 0.0), bool(m.stats.records)),
    "overhead_share": lambda m: overhead(m.stats),
}


def _modelled(costs: Costs, hindsight: bool = False) -> Ratio:
    """Tokens against modelled seconds, the policy's own measured ones included; or against those in
    hindsight.

    By a table of joules the policy costs nothing: what it draws is not known. An oracle takes no
    time either.
    """
    in_seconds = getattr(costs, "unit", "seconds") == "seconds"

    def share(m: Measurement) -> Share:
        if not m.stats.records:
            return _NOTHING  # not of this engine
        if hindsight:
            return m.stats.new_tokens, hindsight_seconds(m.stats, costs)
        policy = m.stats.seconds["policy"] if in_seconds else 0.0
        return m.stats.new_tokens, modelled_seconds(m.stats, costs) + policy

    return share


# ---------------------------------------------------------------------------------------- summaries


def summarise(
    records: Sequence[Record],
    resamples: int = 1000,
    seed: int = 0,
    costs: Mapping[str, Costs] | None = None,
    reference: tuple[str, int] | None = None,
    kv_bytes_per_slot: int | None = None,
) -> list[dict[str, Any]]:
    """One JSON-able dict per row that measured something: name, settings, summary, histograms,
    measurements.

    Args:
        records: measured and scored, with the same prompts in the same order in every row and
            repeat.
        resamples: of the bootstrap over prompts.
        costs: tables by name; each adds `<name>_tokens_per_second` and `<name>_hindsight`,
            modelled.
        reference: method and target width of a row; adds `speedup_over_reference` and
            `log_prob_over_reference`.
        kv_bytes_per_slot: of the target; adds `kv_megabytes`, of the longest prompt at its peak.

    Returns:
        What docs/formats.md says of `rows`; metrics that no prompt has are absent from a summary.
    """
    records = [record for record in records if record.repeats and record.repeats[0]]
    if not records:
        return []
    draws = _draws(records, resamples, seed)
    bases: dict[tuple[str, int], Record] = {}
    for record in records:
        bases.setdefault((record.row.method.name, record.row.config.target_width), record)
    tables = costs or {}
    return [
        {
            **_about(record),
            "summary": {
                name: estimate.to_dict()
                for name, estimate in _estimates(record, draws, bases, reference, tables, kv_bytes_per_slot).items()
                if not math.isnan(estimate.value)
            },
        }
        for record in records
    ]


def _about(record: Record) -> dict[str, Any]:
    """A row without its summary."""
    row, measured = record.row, [m for repeat in record.repeats for m in repeat]
    return {
        "name": row.name,
        "method": row.method.name,
        "family": row.method.family,
        "settings": dict(row.settings),
        "draft": row.draft,
        "batch_size": record.batch_size,
        "config": vars(row.config).copy(),
        "error": record.error,
        "repeats": len(record.repeats),
        "graphs": record.counters,
        "counts": {
            "target_width": _histogram(m.stats.target_widths for m in measured),
            "draft_width": _histogram(m.stats.draft_widths for m in measured),
            "accepted": _histogram(m.stats.accepted for m in measured),
        },
        "prompts": [{"repeat": i, **m.to_dict()} for i, repeat in enumerate(record.repeats) for m in repeat],
    }


def _estimates(
    record: Record,
    draws: NDArray[np.int64],  # [B, N]
    bases: Mapping[tuple[str, int], Record],
    reference: tuple[str, int] | None,
    costs: Mapping[str, Costs],
    kv_bytes_per_slot: int | None,
) -> dict[str, Estimate]:
    """Every metric of a row, NaN where no prompt has it."""
    ratios = dict(RATIOS)
    for name, table in costs.items():
        ratios[f"{name}_tokens_per_second"] = _modelled(table)
        ratios[f"{name}_hindsight"] = _modelled(table, hindsight=True)
    for name in sorted({name for repeat in record.repeats for m in repeat for name in m.metrics}):
        ratios[name] = _task_metric(name)
    found = {name: estimate(record.repeats, ratio, draws) for name, ratio in ratios.items()}
    for method in REFERENCES:
        if base := bases.get((method, record.row.config.target_width)):
            found[f"speedup_over_{method}"] = _over(record, base, "tokens_per_second", np.divide, draws)
    if reference is not None and reference in bases:
        base = bases[reference]
        found["speedup_over_reference"] = _over(record, base, "tokens_per_second", np.divide, draws)
        found["log_prob_over_reference"] = _over(record, base, "log_prob", np.subtract, draws)
    if kv_bytes_per_slot is not None:
        peak = max(m.stats.kv_slots_peak for repeat in record.repeats for m in repeat) * kv_bytes_per_slot / 1e6
        found["kv_megabytes"] = Estimate(peak, np.full(len(draws), peak), [])
    return found


def _over(record: Record, base: Record, name: str, how: Callable[..., Any], draws: NDArray[np.int64]) -> Estimate:
    """A metric against another row's, prompt by prompt and repeat by repeat, in the repeats that
    both have.
    """
    common = min(len(record.repeats), len(base.repeats))
    ours, theirs = (estimate(some.repeats[:common], RATIOS[name], draws) for some in (record, base))
    each = [float(how(a, b)) for a, b in zip(ours.repeats, theirs.repeats, strict=True)]
    return Estimate(float(how(ours.value, theirs.value)), how(ours.draws, theirs.draws), each)


def estimate(repeats: Sequence[Sequence[Measurement]], ratio: Ratio, draws: NDArray[np.int64]) -> Estimate:
    """Ratio of sums over prompts and repeats, and over each resample of the prompts; NaN where the
    denominator is 0.

    Args:
        draws: [B, N] prompts of each resample.
    """
    shares = np.array([[ratio(m) for m in prompts] for prompts in repeats], dtype=np.float64)  # [R, N, 2]
    pooled = shares.sum(axis=0)
    resampled = pooled[draws].sum(axis=1)  # [B, 2]
    below = np.where(resampled[:, 1] == 0, np.nan, resampled[:, 1])
    return Estimate(_divided(pooled.sum(0)), resampled[:, 0] / below, [_divided(each.sum(0)) for each in shares])


def _divided(share: FloatArray) -> float:
    return float(share[0] / share[1]) if share[1] else math.nan


def _draws(records: Sequence[Record], resamples: int, seed: int) -> NDArray[np.int64]:
    """[B, N] prompts of each resample, the same for all rows."""
    count = len(records[0].repeats[0])
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _histogram(lists: Iterable[Sequence[int]]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(chain.from_iterable(lists)).items())}


# -------------------------------------------------------------------------------------- comparisons


def compare_records(
    records: Sequence[Record], resamples: int, seed: int, costs: Costs | None, ours: str = OURS
) -> list[dict[str, Any]]:
    """`decoding.measure.compare.comparisons` of the learned rows at the qualities of this engine's
    beam sampling.

    Args:
        records, resamples, seed: as for `summarise`.
        costs: compare speeds by this table; None: by the clock.
        ours: method of the rows that are compared.
    """
    draws = _draws([record for record in records if record.repeats], resamples, seed)
    modelled = [record for record in records if record.repeats and record.repeats[0][0].stats.records]
    records = [record for record in records if record.repeats] if costs is None else modelled

    def values(ratio: Ratio) -> tuple[FloatArray, FloatArray]:
        found = [estimate(record.repeats, ratio, draws) for record in records]
        return np.array([each.value for each in found]), np.array([each.draws for each in found])

    speed = RATIOS["tokens_per_second"] if costs is None else _modelled(costs)
    rows = [record.row for record in records]
    references = {row.name: i for i, row in enumerate(rows) if row.method.name == "beam_sample"}
    hindsight = None if costs is None else values(_modelled(costs, hindsight=True))[0]
    return comparisons(
        [curve_of(row.method.name, row.settings) for row in rows],
        {row.method.name for row in rows if row.method.family == "hand-set"},
        references,
        values(speed),
        values(RATIOS["log_prob"]),
        hindsight,
        ours,
    )
