"""What the bench found: summaries with spreads, bench.json, tables, and a line for each number that one asks for.

Speeds are medians over repeats with their range; log-probabilities are means with standard errors over prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from decoding.interleave import Record
from decoding.measure import Measurement
from decoding.profiling import overhead_share
from decoding.results import PHASES

SCHEMA_VERSION = 1
REFERENCE = "hf_beam_sample"
ITERATION_PHASES = tuple(phase for phase in PHASES if phase != "prompt")  # a prompt's own passes are no iterations

FloatArray = NDArray[np.float64]
Repeats = dict[int, list[Measurement]]  # by repeat, prompts in order
Node = Mapping[str, Any]


# ------------------------------------------------------------------------------------------- summaries


def summarise(
    records: Sequence[Record],
    prompt_ids: Sequence[str],
    reference_width: int,
    kv_bytes_per_slot: int,
    resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """One JSON-able dict per row; only repeats in which a row decoded all prompts count.

    Args:
        reference_width: speed-ups are over hf_beam_sample of this target width, repeat by repeat.
        kv_bytes_per_slot: of the target.
        resamples: of the bootstrap over prompts.

    Returns:
        name, method, settings, batch_size, config, error (None or a sentence), repeats, graphs (captures, replays and
        eager passes in the row's turns), prompts, and summary; see `_METRICS` for what it holds. A spread is
        {median, low, high, repeats}, low and high being the least and the greatest.
    """
    draws = np.random.default_rng(seed).integers(len(prompt_ids), size=(resamples, len(prompt_ids)))  # [B, N]
    complete = [_complete_repeats(record, len(prompt_ids)) for record in records]
    reference: Repeats = {}
    for record, repeats in zip(records, complete, strict=True):
        if record.row.method == REFERENCE and record.row.row.config.target_width == reference_width:
            reference = repeats
    return [
        {
            "name": record.row.name,
            "alone": record.row.alone,
            "method": record.row.method,
            "settings": {
                **record.row.row.settings,
                **record.row.flags,
                **({"draft": record.row.draft} if record.row.draft is not None else {}),
            },
            "target_width": record.row.row.config.target_width,
            "batch_size": record.row.batch_size,
            "config": vars(record.row.row.config).copy(),
            "error": record.error,
            "repeats": len(repeats),
            "graphs": _sum_counters(record),
            "summary": _summary(record, repeats, reference, kv_bytes_per_slot, draws) if repeats else {},
            "prompts": [_prompt(repeat, measurement) for repeat, some in repeats.items() for measurement in some],
        }
        for record, repeats in zip(records, complete, strict=True)
    ]


def _complete_repeats(record: Record, count: int) -> Repeats:
    found: dict[int, dict[int, Measurement]] = {}
    for turn in record.turns:
        found.setdefault(turn.repeat, {}).update(zip(turn.places, turn.measurements, strict=True))
    return {repeat: [some[i] for i in range(count)] for repeat, some in found.items() if len(some) == count}


def _sum_counters(record: Record) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for turn in record.turns:
        for role, counts in turn.counters.items():
            sums = total.setdefault(role, dict.fromkeys(counts, 0))
            for name, count in counts.items():
                sums[name] += count
    return total


def _tokens_per_second(some: Sequence[Measurement]) -> float:
    """Layers committed (the longest hypothesis) a second of wall time, the prompts' own passes included."""
    return sum(m.stats.new_tokens for m in some) / sum(m.wall_seconds for m in some)


def _per_iteration(phase: str) -> Callable[[Sequence[Measurement]], float]:
    return lambda some: (
        1000 * sum(m.stats.seconds.get(phase, 0.0) for m in some) / sum(m.stats.iterations for m in some)
    )


def _milliseconds(some: Sequence[Measurement]) -> float:
    spent = sum(m.stats.total_seconds - m.stats.seconds.get("prompt", 0.0) for m in some)
    return 1000 * spent / sum(m.stats.iterations for m in some)


def _prompt_milliseconds(some: Sequence[Measurement]) -> float | None:
    known = [m.stats.seconds["prompt"] for m in some if "prompt" in m.stats.seconds]
    return 1000 * sum(known) / len(known) if known else None


def _slots_per_token(name: str) -> Callable[[Sequence[Measurement]], float]:
    return lambda some: (
        sum(getattr(m.stats, name) for m in some) / sum(m.stats.prompt_tokens + m.stats.new_tokens for m in some)
    )


_METRICS: dict[str, Callable[[Sequence[Measurement]], float | None]] = {
    "tokens_per_second": _tokens_per_second,
    "tokens_per_iteration": lambda some: sum(m.stats.new_tokens for m in some) / sum(m.stats.iterations for m in some),
    "milliseconds": _milliseconds,  # of an iteration; with a batch, this prompt's share of it
    **{f"{phase}_milliseconds": _per_iteration(phase) for phase in ITERATION_PHASES},
    "prompt_milliseconds": _prompt_milliseconds,  # of a prompt's own passes; part of the iterations where unknown
    "overhead_share": lambda some: overhead_share([m.stats.seconds for m in some]),  # in neither model
    "kv_slots_per_token": _slots_per_token("kv_slots_end"),  # over prompt and continuation
    "kv_slots_peak_per_token": _slots_per_token("kv_slots_peak"),
}


def _summary(
    record: Record, repeats: Repeats, reference: Repeats, kv_bytes_per_slot: int, draws: NDArray[np.int64]
) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name, metric in _METRICS.items():
        values = [metric(some) for some in repeats.values()]
        known = [value for value in values if value is not None]
        if known:
            summary[name] = spread(known)
    if record.row.method.startswith("hf_"):  # all of its time is "other"
        for phase in PHASES:
            summary.pop(f"{phase}_milliseconds", None)
    both = [repeat for repeat in repeats if repeat in reference]
    if both:
        ratios = [_tokens_per_second(repeats[r]) / _tokens_per_second(reference[r]) for r in both]
        summary["speedup"] = spread(ratios)
        same, base = ({r: some[r] for r in both} for some in (repeats, reference))
        summary["log_prob_difference"] = _difference(same, base, draws)
    value, resampled = _log_prob(repeats, draws)
    summary["log_prob"] = {"value": value, "standard_error": float(resampled.std())}
    slots = max(m.stats.kv_slots_peak for some in repeats.values() for m in some)
    summary["kv_bytes"] = slots * kv_bytes_per_slot  # of the longest prompt, at its peak
    summary["joules_per_token"] = _joules_per_token(record, repeats)
    return summary


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range."""
    return {"median": float(np.median(values)), "low": min(values), "high": max(values), "repeats": list(values)}


def _log_prob(repeats: Repeats, draws: NDArray[np.int64]) -> tuple[float, FloatArray]:
    """Log-probability per token of the best hypotheses under the target, and of each resample of the prompts, [B]."""
    shares = np.array([[(m.log_prob, len(m.tokens)) for m in some] for some in repeats.values()], dtype=np.float64).sum(
        0
    )  # [N, 2]
    total, resampled = shares.sum(0), shares[draws].sum(1)  # [2], [B, 2]
    return float(total[0] / total[1]), resampled[:, 0] / resampled[:, 1]


def _difference(repeats: Repeats, reference: Repeats, draws: NDArray[np.int64]) -> dict[str, float]:
    """Log-probability per token over the reference's, with the central 95% of the bootstrap over prompts."""
    (value, resampled), (base, base_resampled) = _log_prob(repeats, draws), _log_prob(reference, draws)
    low, high = np.percentile(resampled - base_resampled, [2.5, 97.5])
    return {"value": value - base, "low": float(low), "high": float(high)}


def _joules_per_token(record: Record, repeats: Repeats) -> dict[str, Any] | None:
    joules: dict[int, float] = {}
    for turn in record.turns:
        if turn.joules is None:
            return None
        joules[turn.repeat] = joules.get(turn.repeat, 0.0) + turn.joules
    return spread([joules[r] / sum(m.stats.new_tokens for m in some) for r, some in repeats.items()])


def _prompt(repeat: int, measurement: Measurement) -> dict[str, Any]:
    stats = measurement.stats
    return {
        "prompt_id": measurement.prompt_id,
        "repeat": repeat,
        "wall_seconds": measurement.wall_seconds,
        "seconds": dict(stats.seconds),
        "prompt_tokens": stats.prompt_tokens,
        "new_tokens": stats.new_tokens,
        "iterations": stats.iterations,
        "target_calls": stats.target_calls,
        "draft_calls": stats.draft_calls,
        "kv_slots_peak": stats.kv_slots_peak,
        "kv_slots_end": stats.kv_slots_end,
        "tokens": len(measurement.tokens),
        "finished": measurement.finished,
        "log_prob": measurement.log_prob,
    }


# ---------------------------------------------------------------------------------------------- tables


def tables(results: Node) -> Iterator[Table]:
    """Everything that bench.json holds, for the terminal."""
    rows = results["rows"]
    yield _speed_table(rows)
    yield _phase_table(rows)
    if _known(results["roofline"]):
        yield _roofline_table(results["roofline"])
    if _known(results["profile"]):
        yield _operator_table(results["profile"], "operators", "host operator")
        if results["profile"]["kernels"]:
            yield _operator_table(results["profile"], "kernels", "GPU kernel")


def _speed_table(rows: Sequence[Node]) -> Table:
    table = _table("row", "tokens/s", f"x {REFERENCE}", "log-prob", "tokens/iter.", "KV / length", "KV MB", "J/token")
    for row in rows:
        found = row["summary"]
        if not found:
            table.add_row(row["name"], "failed" if row["error"] else "not run", *["-"] * 6)
            continue
        table.add_row(
            row["name"] + (" (failed later)" if row["error"] else ""),
            _spread(found["tokens_per_second"], ".0f"),
            _spread(found.get("speedup"), ".2f"),
            f"{found['log_prob']['value']:.3f} ±{found['log_prob']['standard_error']:.3f}",
            _median(found["tokens_per_iteration"], ".2f"),
            _median(found["kv_slots_per_token"], ".2f"),
            f"{found['kv_bytes'] / 1e6:.1f}",
            _spread(found["joules_per_token"], ".3g"),
        )
    return table


def _phase_table(rows: Sequence[Node]) -> Table:
    table = _table("ms per iteration", "all", *ITERATION_PHASES, "in neither model", "prompt, ms")
    for row in rows:
        found = row["summary"]
        if found:
            phases = [_median(found.get(f"{phase}_milliseconds"), ".2f") for phase in ITERATION_PHASES]
            overhead = _spread(found.get("overhead_share"), ".1%")
            prompt = _median(found.get("prompt_milliseconds"), ".1f")
            table.add_row(row["name"], _spread(found["milliseconds"], ".2f"), *phases, overhead, prompt)
    return table


def _roofline_table(found: Node) -> Table:
    table = _table("target pass, nodes", "MB to read", "bound ms", "pass ms", "with slots, masks", "bound / pass")
    for row in found["passes"]:
        table.add_row(
            str(row["nodes"]),
            f"{row['bytes'] / 1e6:,.1f}",
            f"{1000 * row['bound_seconds']:.2f}",
            f"{1000 * row['pass_seconds']:.2f}",
            f"{1000 * row['score_seconds']:.2f}",
            f"{row['share']:.0%}",
        )
    return table


def _soak_lines(found: Node | None) -> list[str]:
    if not _known(found):
        return [f"Memory over many prompts: {found['error']}"] if found else []
    assert found is not None
    first, last = found["resident_megabytes"][0], found["resident_megabytes"][-1]
    kv, prompts = found["kv_megabytes"], found["prompts"]
    return [
        f"Memory ({found['row']}): peak resident {first:.0f} MB after {prompts[0]:,} prompts, {last:.0f} MB after "
        f"{prompts[-1]:,}; KV buffers {kv[0]:.1f} and {kv[-1]:.1f} MB."
    ]


def _operator_table(found: Node, key: str, heading: str) -> Table:
    table = _table(heading, "calls", "ms", "share")
    for row in found[key]:
        name = row["name"] if len(row["name"]) <= 80 else row["name"][:77] + "..."
        table.add_row(name, f"{row['calls']:,}", f"{1000 * row['seconds']:.1f}", f"{row['share']:.1%}")
    return table


def _table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _spread(found: Node | None, form: str) -> str:
    if found is None:
        return "-"
    return f"{found['median']:{form}} [{found['low']:{form}}, {found['high']:{form}}]"


def _median(found: Node | None, form: str) -> str:
    return "-" if found is None else f"{found['median']:{form}}"


# --------------------------------------------------------------------------------------------- headlines


def headlines(results: Node) -> list[str]:
    """A line for each number that the rows at hand can tell."""
    rows = [row for row in results["rows"] if row["summary"]]
    repeats = max((row["repeats"] for row in rows), default=0)
    lines = [] if results["complete"] else [f"Not complete: {repeats} repeats were measured."]
    lines += [f"{row['name']} failed: {row['error']}" for row in results["rows"] if row["error"]]
    if rows:
        prompts = results["provenance"]["task"]["prompts"]
        lines.append(
            f"{prompts} prompts, {repeats} repeats: medians [least, greatest]; log-prob: per token of the best text, "
            "under the target, ± its standard error over prompts; KV of the target, per prompt."
        )
    note = results["provenance"]["pair"].get("note")
    lines += [f"Note on the pair: {note}"] if note else []
    unscored = results.get("unscored")
    lines += [f"Log-probabilities are missing: {unscored}"] if unscored else []
    return [
        *lines,
        *_speed_lines(rows),
        *_batch_lines(rows),
        *_overhead_lines(rows),
        *_slot_lines(rows),
        *_energy_lines(rows),
        *_graph_lines(results),
        *_roofline_lines(results["roofline"]),
        *_profile_lines(results["profile"]),
        *_soak_lines(results["soak"]),
    ]


def _speed_lines(rows: Sequence[Node]) -> list[str]:
    """The fastest row of this engine, at batch 1, that is as likely as the reference."""
    compared = [r for r in rows if r["batch_size"] == 1 and "speedup" in r["summary"]]
    engine = [r for r in compared if not r["method"].startswith("hf_")]
    if not engine:
        return []

    def told(row: Node) -> str:
        found, gap = row["summary"], row["summary"]["log_prob_difference"]
        return (
            f"{row['name']}: {_spread(found['speedup'], '.2f')} x {REFERENCE}, "
            f"log-prob {found['log_prob']['value']:.3f} "
            f"(difference {gap['value']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}])"
        )

    def fastest(some: Sequence[Node]) -> str:
        return told(max(some, key=lambda r: r["summary"]["speedup"]["median"])) if some else "none"

    as_likely = [r for r in engine if r["summary"]["log_prob_difference"]["value"] >= 0]
    alike = [r for r in engine if r["summary"]["log_prob_difference"]["high"] >= 0]
    return [
        f"Fastest that is at least as likely as {REFERENCE}: {fastest(as_likely)}",
        f"Fastest whose 95% interval does not lie below it: {fastest(alike)}",
        f"Fastest of all: {fastest(engine)}",
    ]


def _batch_lines(rows: Sequence[Node]) -> list[str]:
    """Batched rows against the same at batch 1, repeat by repeat."""
    single = {r["alone"]: r["summary"]["tokens_per_second"]["repeats"] for r in rows if r["batch_size"] == 1}
    lines = []
    for row in rows:
        if row["batch_size"] > 1 and row["alone"] in single:
            pairs = zip(row["summary"]["tokens_per_second"]["repeats"], single[row["alone"]], strict=False)
            ratio = spread([batched / alone for batched, alone in pairs])
            lines.append(
                f"Batch {row['batch_size']} over batch 1, {row['alone']}: {_spread(ratio, '.2f')} x the tokens/s"
            )
    return lines


def _overhead_lines(rows: Sequence[Node]) -> list[str]:
    told = [
        f"{row['name']} {_median(row['summary']['overhead_share'], '.1%')}"
        for row in rows
        if "overhead_share" in row["summary"]
    ]
    apart = any("prompt_milliseconds" in row["summary"] for row in rows)
    of = "an iteration" if apart else "an iteration, the prompts' own passes included"
    return [f"Time in neither model, share of {of}: {'; '.join(told)}"] if told else []


def _slot_lines(rows: Sequence[Node]) -> list[str]:
    """At the widest rows of this engine."""
    engine = [r for r in rows if not r["method"].startswith("hf_")]
    widest = max((r["target_width"] for r in engine), default=1)
    told = [
        f"{row['name']} {_median(row['summary']['kv_slots_per_token'], '.2f')} at the end, "
        f"{_median(row['summary']['kv_slots_peak_per_token'], '.2f')} at its peak"
        for row in engine
        if row["target_width"] == widest
    ]
    return [f"KV slots over sequence length at width {widest}: {'; '.join(told)}"] if told else []


def _energy_lines(rows: Sequence[Node]) -> list[str]:
    told = [
        f"{row['name']} {_median(row['summary']['joules_per_token'], '.3g')}"
        for row in rows
        if row["summary"]["joules_per_token"]
    ]
    return [f"Joules per token: {'; '.join(told)}"] if told else ["Joules per token: no NVML counter on this device."]


def _graph_lines(results: Node) -> list[str]:
    """Captures within turns are shapes that had not come up while warming up, or whose buffer had been given up."""
    lines = []
    for role, counts in results["graphs"].items():
        timed = [(row["name"], row["graphs"].get(role, {}).get("captures", 0)) for row in results["rows"]]
        within = "; ".join(f"{name} {captures}" for name, captures in timed if captures)
        lines.append(
            f"CUDA graphs of the {role}: {counts['captures']:,} captured, {counts['replays']:,} replays, "
            f"{counts['eager']:,} eager; captured while timing: {within or 'none'}"
        )
    return lines or ["CUDA graphs: none on this device or with this engine."]


def _roofline_lines(found: Node | None) -> list[str]:
    if found is None:
        return []
    if "error" in found:
        return [f"Roofline failed: {found['error']}"]
    speed, kind = found["bandwidth"]["bytes_per_second"] / 1e9, found["bandwidth"]["operation"]
    shares = [row["share"] for row in found["passes"]]
    lines = [
        f"Target pass: {min(shares):.0%} to {max(shares):.0%} of the bandwidth bound over 1 to "
        f"{found['passes'][-1]['nodes']} nodes behind {found['context_tokens']} tokens, at {speed:,.1f} GB/s ({kind}); "
        f"weights {found['weight_bytes'] / 1e6:,.1f} MB, KV {found['kv_bytes_per_slot'] / 1e3:,.1f} kB a slot"
    ]
    if found["in_cache"]:
        lines.append(
            f"All that a pass reads fits the last-level cache ({found['cache_bytes'] / 1e6:.0f} MB) and need not come "
            "from memory: its bandwidth is no bound here; what takes the time is arithmetic and calls."
        )
    return lines


def _profile_lines(found: Node | None) -> list[str]:
    if found is None:
        return []
    if "error" in found:
        return [f"Profile failed: {found['error']}"]
    share = "unknown" if found["overhead_share"] is None else f"{found['overhead_share']:.1%}"
    return [
        f"Profiled: {found['row']}, {found['iterations']} iterations, time in neither model {share} (without the "
        f"profiler); trace: {found['trace']}"
    ]


def _known(part: Node | None) -> bool:
    return part is not None and "error" not in part
