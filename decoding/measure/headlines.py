"""The findings of a bench: its tables, and a line for each number that one asks for.

Speeds are medians over repeats with their range, log-probabilities have their 95% interval over
prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from decoding.measure.methods import PEERS
from decoding.measure.pages import Column, console_table, plain_table, remark_lines, spread
from decoding.results import PHASES

REFERENCE = "hf_beam_sample"
_SPEED = (
    Column("tokens/s", "tokens_per_second", ".0f", "repeats"),
    Column(f"x {REFERENCE}", "speedup_over_reference", ".2f", "repeats"),
    Column("log-prob", "log_prob", ".3f", "prompts"),
    Column("tokens/iter.", "block_efficiency", ".2f"),
    Column("KV / length", "kv_slots_per_token", ".2f"),
    Column("at its peak", "kv_slots_peak_per_token", ".2f"),
    Column("KV MB", "kv_megabytes", ".1f"),
    Column("J/token", "joules_per_token", ".3g", "repeats"),
)
_PHASES = (
    Column("all", "iteration_milliseconds", ".2f", "repeats"),
    *(Column(phase, f"{phase}_milliseconds", ".2f") for phase in PHASES if phase != "prompt"),
    Column("in neither model", "overhead_share", ".1%", "repeats"),
    Column("prompt, ms", "prompt_milliseconds", ".1f"),
)

Node = Mapping[str, Any]


# ------------------------------------------------------------------------------------------- tables


def tables(results: Node) -> Iterator[Table]:
    """Everything that bench.json holds, for the terminal."""
    yield console_table(results["rows"], _SPEED)
    yield console_table(results["rows"], _PHASES, "ms per iteration")
    if _was_measured(results["roofline"]):
        yield _roofline_table(results["roofline"])
    if _was_measured(results["profile"]):
        yield _operator_table(results["profile"], "operators", "host operator")
        if results["profile"]["kernels"]:
            yield _operator_table(results["profile"], "kernels", "GPU kernel")


def _roofline_table(found: Node) -> Table:
    table = plain_table("target pass, nodes", "MB to read", "bound ms", "pass ms", "with slots, masks", "bound / pass")
    for measured in found["passes"]:
        table.add_row(
            str(measured["nodes"]),
            f"{measured['bytes'] / 1e6:,.1f}",
            f"{1000 * measured['bound_seconds']:.2f}",
            f"{1000 * measured['pass_seconds']:.2f}",
            f"{1000 * measured['score_seconds']:.2f}",
            f"{measured['share']:.0%}",
        )
    return table


def _operator_table(found: Node, key: str, heading: str) -> Table:
    table = plain_table(heading, "calls", "ms", "share")
    for operator in found[key]:
        name = operator["name"] if len(operator["name"]) <= 80 else operator["name"][:77] + "..."
        table.add_row(name, f"{operator['calls']:,}", f"{1000 * operator['seconds']:.1f}", f"{operator['share']:.1%}")
    return table


# ---------------------------------------------------------------------------------------- headlines


def headlines(results: Node) -> list[str]:
    """A line for each number that the rows at hand can tell."""
    rows = results["rows"]
    repeats = max((row["repeats"] for row in rows), default=0)
    lines = [] if results["complete"] else [f"Not complete: {repeats} repeats were measured."]
    lines += remark_lines(results)
    if rows:
        prompts = results["provenance"]["task"]["prompts"]
        lines.append(
            f"{prompts} prompts, {repeats} repeats: medians [least, greatest]; log-prob: per token of the best text, "
            "under the target, with its 95% interval over prompts; KV of the target, per prompt. With one repeat all "
            "intervals are over prompts."
        )
    note = results["provenance"]["pair"].get("note")
    lines += [f"Note on the pair: {note}"] if note else []
    return [
        *lines,
        *_speed_lines(rows),
        *_batch_lines(rows),
        *_graph_lines(results),
        *_roofline_lines(results["roofline"]),
        *_profile_lines(results["profile"]),
        *_soak_lines(results["soak"]),
    ]


def _speed_lines(rows: Sequence[Node]) -> list[str]:
    """The fastest row of this engine, at batch 1, that is as likely as the reference."""
    compared = [row for row in rows if row["batch_size"] == 1 and "log_prob_over_reference" in row["summary"]]
    engine = [row for row in compared if row["family"] not in PEERS]
    if not engine:
        return []

    def fastest(some: Sequence[Node]) -> str:
        if not some:
            return "none"
        row = max(some, key=lambda row: row["summary"]["speedup_over_reference"]["value"])
        found = row["summary"]
        return (
            f"{row['name']}: {spread(found['speedup_over_reference'], '.2f')} x {REFERENCE}, "
            f"log-prob {found['log_prob']['value']:.3f} "
            f"(difference {spread(found['log_prob_over_reference'], '+.3f', 'prompts')})"
        )

    as_likely = [row for row in engine if row["summary"]["log_prob_over_reference"]["value"] >= 0]
    alike = [row for row in engine if row["summary"]["log_prob_over_reference"]["high"] >= 0]
    return [
        f"Fastest that is at least as likely as {REFERENCE}: {fastest(as_likely)}",
        f"Fastest whose 95% interval does not lie below it: {fastest(alike)}",
        f"Fastest of all: {fastest(engine)}",
    ]


def _batch_lines(rows: Sequence[Node]) -> list[str]:
    """Lines on batched rows against their twins at batch 1, repeat by repeat."""
    single = {row["name"]: _speeds(row) for row in rows}
    lines = []
    for row in rows:
        alone, batched, size = row["name"].partition(", batch ")
        if batched and alone in single:
            ratios = [ours / theirs for ours, theirs in zip(_speeds(row), single[alone], strict=False)]
            ratio = {"value": ratios[0], "repeats": ratios}
            lines.append(f"Batch {size} over batch 1, {alone}: {spread(ratio, '.2f')} x the tokens/s")
    return lines


def _speeds(row: Node) -> list[float]:
    found = row["summary"]["tokens_per_second"]
    return list(found.get("repeats", [found["value"]]))


def _graph_lines(results: Node) -> list[str]:
    """Captures within turns are shapes that had not come up while warming up, or whose buffer had
    been given up.
    """
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


def _soak_lines(found: Node | None) -> list[str]:
    if not _was_measured(found):
        return [f"Memory over many prompts: {found['error']}"] if found else []
    assert found is not None
    first, last = found["resident_megabytes"][0], found["resident_megabytes"][-1]
    kv, prompts = found["kv_megabytes"], found["prompts"]
    return [
        f"Memory ({found['row']}): peak resident {first:.0f} MB after {prompts[0]:,} prompts, {last:.0f} MB after "
        f"{prompts[-1]:,}; KV buffers {kv[0]:.1f} and {kv[-1]:.1f} MB.{_tenths(found)}"
    ]


def _tenths(soak: Node) -> str:
    """The sentence on speed at the start and at the end; none of results that are older."""
    prompts, seconds = soak["prompts"], soak.get("seconds")
    if not seconds or len(prompts) < 2:
        return ""
    first, last = prompts[0] / seconds[0], (prompts[-1] - prompts[-2]) / seconds[-1]
    return f" {first:.1f} prompts a second in the first part of {len(prompts)}, {last:.1f} in the last."


def _was_measured(part: Node | None) -> bool:
    return part is not None and "error" not in part
