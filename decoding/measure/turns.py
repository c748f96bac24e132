"""Rows that take turns over the same prompts and seeds, by the clock; then what the target says of
their texts.

Nothing is averaged here: a `Measurement` is one prompt decoded by one row, once.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from decoding.decoder import OutOfDeviceMemory
from decoding.dice.sampling import NotNumbers
from decoding.engine.placement import device_of
from decoding.engine.runner import runner_of
from decoding.errors import UserError
from decoding.machine.meter import EnergyMeter
from decoding.measure.journal import Journal, Measurement
from decoding.measure.methods import Generate
from decoding.measure.rows import Row
from decoding.pairs.pair import ModelPair
from decoding.support.clock import now
from decoding.support.files import write_whole
from decoding.support.progress import RunProgress
from decoding.tasks.base import Prompt, Task, stable_hash

OUT_OF_MEMORY = (
    "The device ran out of memory: lower batch_size, target_width, draft_width, max_new_tokens or the length of the "
    "prompts."
)
ENERGY = "energy.jsonl"
_COUNTERS = ("captures", "replays", "eager")


@dataclass
class Record:
    """A row with what was measured of it."""

    row: Row
    generate: Generate
    pair: ModelPair  # that it decodes with
    batch_size: int = 1
    repeats: list[list[Measurement]] = field(default_factory=list)  # prompts in order; the last may not be whole
    counters: dict[str, Counter[str]] = field(default_factory=dict)  # of CUDA graphs in its turns, by model
    error: str | None = None  # a row that failed takes no further turns
    unable: dict[str, None] = field(default_factory=dict)  # ids of prompts at which a model returned NaN


def make_records(rows: Sequence[Row], pair: ModelPair, batch_size: int = 1) -> list[Record]:
    """Every row built, with the pair that it decodes with.

    Args:
        batch_size: of rows that have none of their own, and whose methods decode prompts together.

    Raises:
        UserError: a policy that cannot work with its row's config, or with the pair.
    """
    pairs = {None: pair} | {row.draft: pair.with_draft(row.draft) for row in rows if row.draft is not None}
    sizes = [row.batch_size or (batch_size if row.method.batches else 1) for row in rows]
    return [
        Record(row, row.build(pairs[row.draft]), pairs[row.draft], size) for row, size in zip(rows, sizes, strict=True)
    ]


def read_prompts(about: Any, task: Task, pair: ModelPair) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to measure, and others to warm up with: of split val, or the same where there are no
    others.

    Args:
        about: split, limit and warmup, as in the `prompts` of a config.
    """
    prompts = task.prompts(about.split, about.limit, pair.tokenizer)
    if not about.warmup:
        return prompts, []
    try:
        return prompts, task.prompts("val", about.warmup, pair.tokenizer)
    except UserError:
        return prompts, prompts[: about.warmup]


# -------------------------------------------------------------------------------------------- turns


def decode_all(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    warmup: Sequence[Prompt],
    seed: int,
    repeats: int = 1,
    repeated: Callable[[], object] = lambda: None,
    max_seconds: float | None = None,
    journal: Journal | None = None,
    stage: str = "measure",
    strict: bool = False,
) -> bool:
    """Warm up and take all turns, with a bar; whether Ctrl-C cut it short.

    Args:
        warmup: prompts that are decoded first and not measured.
        repeated: called after each repeat.
        max_seconds: after which no row takes a further turn; None: all turns are taken.
        journal: of the turns that were taken, by this run or an earlier one.
        stage: name of these turns in the journal.
        strict: stop at a prompt that makes a model return NaN; else it is passed over, and told of.

    Raises:
        NotNumbers: there is such a prompt, and `strict`.
    """
    transformers.logging.set_verbosity_error()  # generate() warns about its own arguments
    with RunProgress() as progress:
        bar = progress.add_task("decoding", total=len(records) * (len(warmup) + repeats * len(prompts)))

        def advance(count: int) -> None:
            progress.advance(bar, count)

        try:
            warm_up(records, warmup, seed, advance)
            for _ in take_turns(records, prompts, seed, repeats, advance, max_seconds, journal, stage, strict):
                repeated()
        except KeyboardInterrupt:
            progress.stop()
            print("interrupted: going on with what was measured", file=sys.stderr)
            return True
    return False


def warm_up(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    seed: int,
    advance: Callable[[int], None] = lambda prompts: None,
) -> None:
    """Decode prompts by every row without measuring; a row with a batch size fills a batch, with
    some of them twice.
    """
    for record in records if prompts else ():
        count = max(len(prompts), record.row.batch_size or 1)
        group = [prompts[i % len(prompts)] for i in range(count)]
        _take_turn(record, group, seed, EnergyMeter("cpu"))
        record.counters.clear()  # what is captured now is not captured while timing
        record.unable.clear()
        advance(len(prompts))


def take_turns(
    records: Sequence[Record],
    prompts: Sequence[Prompt],
    seed: int,
    repeats: int = 1,
    advance: Callable[[int], None] = lambda prompts: None,
    max_seconds: float | None = None,
    journal: Journal | None = None,
    stage: str = "measure",
    strict: bool = False,
) -> Iterator[int]:
    """Every row decodes all prompts, a batch of the largest row in a turn: machine drift hits all
    rows alike.

    The order of the rows rotates from turn to turn. A prompt has the same seed in all rows, another
    in each repeat.

    Args:
        records: get the measurements, not yet scored. One that fails takes no further turns, and
            says why.
        advance: called with the number of prompts after each turn.
        max_seconds: after which no group of prompts is begun.
        journal, stage, strict: as for `decode_all`.

    Yields:
        Each repeat that is done.

    Raises:
        NotNumbers: as `decode_all`.
    """
    until = math.inf if max_seconds is None else time.monotonic() + max_seconds
    meter = EnergyMeter(records[0].pair.device)  # all have one target
    size = max(record.batch_size for record in records)
    names = _told_apart([record.row.name for record in records])
    turn = 0
    for repeat in range(repeats):
        for record in records:
            if record.error is None:
                record.repeats.append([])
        for group in _groups(prompts, size):
            if time.monotonic() > until:
                return
            for j in range(len(records)):
                place = (turn + j) % len(records)
                record, key = records[place], (stage, names[place], repeat)
                known = journal.recall(key, group) if journal is not None else None
                if record.error is None and known is not None:
                    measured, record.counters = known
                    record.repeats[-1] += measured
                    record.unable |= dict.fromkeys(_ids(group) - {each.prompt_id for each in measured})
                elif record.error is None:
                    measured = _take_turn(record, group, seed + repeat, meter, strict)
                    record.repeats[-1] += measured
                    if record.error is not None:
                        record.repeats.pop()  # it was not finished
                    elif journal is not None:
                        journal.add(key, group, measured, record.counters)
                advance(len(group))
            turn += 1
            if journal is not None:
                journal.tell(min(turn * size, len(prompts)), len(prompts))
        yield repeat


def _take_turn(
    record: Record, prompts: Sequence[Prompt], seed: int, meter: EnergyMeter, strict: bool = False
) -> list[Measurement]:
    """Decode by one row what it is able to; nothing if it failed, which the record then says."""
    before, measured = graph_counters(record.pair), []
    try:
        with meter:  # one window a turn: the counter moves in steps
            for group in _groups([p for p in prompts if p.id not in record.unable], record.batch_size):
                measured += _measured(record, group, seed, strict)
    except (UserError, torch.OutOfMemoryError) as error:
        if strict and isinstance(error, NotNumbers):
            raise
        record.error = sentence(error)
        print(f"{record.row.name} failed: {record.error}", file=sys.stderr)
        if record.pair.device.type == "cuda":
            torch.cuda.empty_cache()
        return []
    if meter.joules is not None and measured:
        total = sum(measurement.wall_seconds for measurement in measured)
        for measurement in measured:
            measurement.joules = meter.joules * measurement.wall_seconds / total
        measured[0].readings = meter.readings
    _add_counters(record.counters, before, graph_counters(record.pair))
    return measured


def _measured(record: Record, prompts: Sequence[Prompt], seed: int, strict: bool) -> list[Measurement]:
    """Decode prompts together, without those that make a model return NaN, and in halves where the
    device's memory does not suffice for a batch that no row asked for.
    """
    try:
        return measure(record.generate, prompts, seed, record.pair.device)
    except NotNumbers as error:
        if strict:
            raise
        if len(prompts) == 1:
            record.unable[prompts[0].id] = None
            print(f"{prompts[0].place} is passed over, {record.row.name}: {error}", file=sys.stderr)
            return []
        size = 1  # a prompt's tokens do not depend on who is decoded beside
    except (OutOfDeviceMemory, torch.OutOfMemoryError):
        size = len(prompts) // 2
        if not size or record.row.batch_size is not None:
            raise
        record.batch_size = size
        print(
            f"{record.row.name}: the device ran out of memory with {len(prompts)} prompts at a time; going on with "
            f"{size}.",
            file=sys.stderr,
        )
    measured: list[Measurement] = []
    for half in _groups(prompts, size):
        for group in _groups(half, record.batch_size):  # it may have become less on the way
            measured += _measured(record, group, seed, strict)
    return measured


def measure(generate: Generate, prompts: Sequence[Prompt], seed: int, device: torch.device) -> list[Measurement]:
    """Decode prompts together, by the clock; seconds are split as the stats' seconds are."""
    streams = [prompt_stream(seed, prompt) for prompt in prompts]
    began = now(device)
    results = generate([prompt.tokens for prompt in prompts], streams)
    seconds = now(device) - began
    claimed = sum(result.stats.total_seconds for result in results)
    measured = []
    for prompt, result in zip(prompts, results, strict=True):
        share = seconds * result.stats.total_seconds / claimed
        tokens, finished = list(result.sequences[0]), result.finished[0]
        measured.append(Measurement(prompt.id, share, None, result.stats, tokens, finished))
    return measured


def prompt_stream(seed: int, prompt: Prompt) -> torch.Generator:
    """The random stream of a prompt, the same for all rows."""
    return torch.Generator().manual_seed(stable_hash(f"{seed} {prompt.id}") % 2**62)


def leave_out(records: Sequence[Record], prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that no row was unable to decode; the others are taken out of all rows.

    A row that was unable to decode more than half of its prompts has failed instead, and says so.
    """
    for record in records:
        seen = {found.prompt_id for repeat in record.repeats for found in repeat} | record.unable.keys()
        if record.error is None and 2 * len(record.unable) > len(seen):
            record.repeats.clear()
            record.error = (
                f"{len(record.unable)} of {len(seen)} prompts make a model return NaN, {next(iter(record.unable))!r} "
                "first; check the weights and try dtype=float32."
            )
            print(f"{record.row.name} failed: {record.error}", file=sys.stderr)
    out = {name for record in records if record.error is None for name in record.unable}
    kept = [prompt for prompt in prompts if prompt.id not in out]
    ids = _ids(kept)
    for record in records:
        for repeat in record.repeats:
            for found, after in itertools.pairwise(repeat):
                if found.prompt_id not in ids and not after.readings:
                    after.readings = found.readings  # of the turn that both were in
            repeat[:] = [found for found in repeat if found.prompt_id in ids]
    return kept


def left_out(prompts: Sequence[Prompt], kept: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The prompts that were passed over, as results.json holds them."""
    ids = _ids(kept)
    return [{"id": prompt.id, "where": prompt.where} for prompt in prompts if prompt.id not in ids]


def keep_whole(records: Sequence[Record], count: int) -> int:
    """Forget the unfinished repeat of an interrupted run; of the first one keep the prompts that
    all rows decoded.

    Args:
        count: prompts of a repeat.

    Returns:
        Prompts that are left of each repeat: `count`, or fewer where not even the first repeat is
        whole; 0: none.
    """
    alive = [record for record in records if record.error is None]
    kept = min((len(record.repeats[0]) if record.repeats else 0 for record in alive), default=count)
    for record in records:
        enough = [repeat[:kept] for repeat in record.repeats if len(repeat) >= max(kept, 1)]
        record.repeats = enough if kept == count else enough[:1] if kept else []
    return kept


def write_energy(directory: Path, records: Sequence[Record]) -> dict[str, Path]:
    """Write the readings that joules were computed from, a JSON object a line and turn, into
    energy.jsonl; nothing where there are none.

    Returns:
        Path of the file by its name.
    """
    lines = []
    for record in records:
        for repeat, measured in enumerate(record.repeats):
            first = [i for i, measurement in enumerate(measured) if measurement.readings]
            for i, end in zip(first, [*first[1:], len(measured)], strict=False):  # none without readings
                ids = [measurement.prompt_id for measurement in measured[i:end]]
                readings = [reading._asdict() for reading in measured[i].readings]
                lines.append({"row": record.row.name, "repeat": repeat, "prompts": ids, "readings": readings})
    if not lines:
        return {}
    return {ENERGY: write_whole(directory / ENERGY, "".join(json.dumps(line) + "\n" for line in lines).encode())}


def stopped_sentence(kept: int, prompts: int, max_seconds: float | None, interrupted: bool = False) -> str | None:
    """The sentence on a run that `max_seconds` or someone ended; None where nothing did."""
    if interrupted:
        return f"The run was interrupted: {kept} of {prompts} prompts are in; the same command goes on from there."
    if max_seconds is None or kept == prompts:
        return None
    return f"max_seconds ({max_seconds:g}) ended the run: all rows decoded the first {kept} of {prompts} prompts."


def sentence(error: BaseException) -> str:
    """The sentence that tells the user of a failure."""
    return str(error) if isinstance(error, UserError) else OUT_OF_MEMORY


def graph_counters(pair: ModelPair) -> dict[str, dict[str, int]]:
    """Captures, replays and eager passes so far of each model that runs as CUDA graphs."""
    counters = {}
    for role, model in pair.models.items():
        forward = runner_of(model, pair.engine).forward
        if all(hasattr(forward, name) for name in _COUNTERS):
            counters[role] = {name: int(getattr(forward, name)) for name in _COUNTERS}
    return counters


def _add_counters(
    total: dict[str, Counter[str]], before: Mapping[str, dict[str, int]], after: Mapping[str, dict[str, int]]
) -> None:
    for role in before.keys() & after.keys():
        sums = total.setdefault(role, Counter())
        sums.update(after[role])
        sums.subtract(before[role])


def _told_apart(names: Sequence[str]) -> list[str]:
    """Names, with a number behind one that was there before."""
    return [name if name not in names[:i] else f"{name} #{names[:i].count(name)}" for i, name in enumerate(names)]


def _ids(prompts: Sequence[Prompt]) -> set[str]:
    return {prompt.id for prompt in prompts}


def _groups(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    """Consecutive runs of `size`; the last may be shorter."""
    return [prompts[first : first + size] for first in range(0, len(prompts), size)]


# ------------------------------------------------------------------------------------------ scoring


def score_all(records: Sequence[Record], prompts: Sequence[Prompt], pair: ModelPair, task: Task) -> str | None:
    """Fill in what the target and the task say of every text, of those that are the same once;
    after all timing, so that it disturbs no clock. A row is unable to decode a prompt whose text
    has a log-probability of NaN.

    Returns:
        None, or a sentence where the device's memory did not suffice for it.
    """
    repeats = [(record, repeat) for record in records for repeat in record.repeats]
    scored: dict[tuple[Any, ...], Measurement] = {}
    with RunProgress() as progress:
        bar = progress.add_task("scoring", total=sum(len(repeat) for _, repeat in repeats))
        try:
            for record, repeat in repeats:
                for measurement, prompt in zip(repeat, prompts, strict=False):  # an interrupted run has fewer
                    key = prompt.id, measurement.finished, *measurement.tokens
                    if key not in scored:
                        evaluate_text(measurement, prompt, pair, task)
                    same = scored.setdefault(key, measurement)
                    measurement.log_prob, measurement.text, measurement.metrics = same.log_prob, same.text, same.metrics
                    if math.isnan(measurement.log_prob):
                        record.unable[prompt.id] = None
                    progress.advance(bar)
        except torch.OutOfMemoryError:
            return OUT_OF_MEMORY
    return None


def evaluate_text(measurement: Measurement, prompt: Prompt, pair: ModelPair, task: Task) -> None:
    """Fill in a measurement's log-probability under the target, text and metrics."""
    measurement.log_prob = log_probability(pair.target, prompt.tokens, measurement.tokens)
    if pair.tokenizer is not None:
        text = pair.tokenizer.decode(measurement.tokens, skip_special_tokens=True)
        measurement.text = text
        measurement.metrics = task.metrics(text, prompt, measurement.finished)


@torch.inference_mode()
def log_probability(model: torch.nn.Module, prompt: list[int], continuation: list[int]) -> float:
    """log p(continuation | prompt) at temperature 1, natural logarithm, teacher forced in one pass."""
    device = device_of(model)
    ids = torch.tensor([[*prompt, *continuation]], device=device)  # [1, T]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()  # [new, V]
    picked = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])  # [new, 1]
    return float(picked.double().sum())
