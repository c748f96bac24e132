"""Speed, time by phase, memory and energy of methods side by side: `python -m decoding.bench`, conf/bench.yaml.

Writes bench.json and prints it as tables, and each number that one asks for in a line. Rows take turns over the same
prompts; what is timed is scored afterwards. A row that fails loses no other row, an interrupted run loses no finished
repeat.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from decoding.baselines import METHODS
from decoding.bench_report import SCHEMA_VERSION, headlines, summarise, tables
from decoding.config import DecodingConfig
from decoding.entry import entry_point
from decoding.errors import UserError
from decoding.files import json_bytes, write_whole
from decoding.interleave import BenchRow, Record, graph_counters, run_repeats, sentence, warm_up
from decoding.measure import OUT_OF_MEMORY, WIDTH_AXES, Row, log_probability
from decoding.pair import ModelPair
from decoding.profiling import profile_decoding
from decoding.progress import RunProgress
from decoding.provenance import provenance, to_plain
from decoding.roofline import kv_bytes_per_slot, roofline
from decoding.soak import soak
from decoding.tasks.base import Prompt, Task

RESULTS, TRACE = "bench.json", "trace.json"
_FLAGS: dict[str, tuple[type, ...]] = {  # DecodingConfig fields that this engine's rows may set
    "exact": (bool,),
    "surplus": (str,),
    "refill": (str,),
    "warp": (str,),
    "one_beam_cache": (bool,),
}
_FRACTIONS = ("threshold", "share", "gap", "scale", "stop_entropy")  # axes of METHODS that are no whole numbers
_KINDS: dict[str, tuple[type, ...]] = {**_FLAGS, "draft": (str,), **dict.fromkeys(_FRACTIONS, (int, float))}


@entry_point("bench")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run the bench that a config describes.

    Returns:
        What bench.json holds.

    Raises:
        KeyboardInterrupt: after what was measured before it has been written and printed.
    """
    rows = read_rows(OmegaConf.to_container(cfg.rows, resolve=True), instantiate(cfg.decoding))
    task: Task = instantiate(cfg.data)
    pair: ModelPair = instantiate(cfg.pair)
    prompts, warmup = read_prompts(cfg, task, pair, rows)
    transformers.logging.set_verbosity_error()  # generate() warns about its own arguments
    if cfg.profile:
        row_to_profile(rows, cfg.profile_row)  # a wrong name is refused now
    pairs = pairs_of(rows, pair)
    records = [
        Record(row, METHODS[row.method](pairs[row.draft], row.row.config, row.row.settings), pairs[row.draft])
        for row in rows
    ]
    bench = Bench(cfg, pair, task, prompts, records)
    interrupted = bench.measure(warmup)
    bench.finish(complete=not interrupted)
    if interrupted:
        raise KeyboardInterrupt
    return bench.results


# ---------------------------------------------------------------------------------------- rows, prompts


def read_rows(entries: Any, config: DecodingConfig) -> list[BenchRow]:
    """Rows as conf/bench.yaml writes them.

    Raises:
        UserError: an unknown method, or a setting that it does not take.
    """
    if not entries:
        raise UserError("rows is empty; give at least one, such as rows=[{method: beam_sample, target_width: 4}].")
    rows = [_read_row(f"rows[{i}]", entry, config) for i, entry in enumerate(entries)]
    names = [row.name for row in rows]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"rows[{i}] is rows[{names.index(name)}] again ({name}); remove one.")
    return rows


def _read_row(place: str, entry: Any, config: DecodingConfig) -> BenchRow:
    if not isinstance(entry, dict) or entry.get("method") not in METHODS:
        given = repr(entry.get("method")) if isinstance(entry, dict) else repr(entry)
        raise UserError(f"{place}.method is {given}; choose among {', '.join(METHODS)}.")
    name = entry["method"]
    method, ours = METHODS[name], not name.startswith("hf_")
    drafts = "draft_depth" in method.axes or name == "hf_assisted"
    allowed = [*method.axes, *(["draft"] if drafts else []), *((*_FLAGS, "batch_size") if ours else ())]
    settings = {key: value for key, value in entry.items() if key != "method"}
    for key, value in settings.items():
        if key not in allowed and not (key == "batch_size" and value == 1):
            takes = f"it takes {', '.join(allowed)}" if allowed else "it takes none"
            one = ", and decodes one prompt at a time" if key == "batch_size" else ""
            raise UserError(f"{place}.{key} is not a setting of {name}; {takes}{one}.")
        _check_kind(f"{place}.{key}", value, _KINDS.get(key, (int,)))
    batch_size = settings.pop("batch_size", 1)
    if batch_size < 1:
        raise UserError(f"{place}.batch_size is {batch_size}; give a whole number of at least 1.")
    draft = settings.pop("draft", None)
    flags = {key: settings.pop(key) for key in _FLAGS if key in settings}
    try:
        own_config = method.configure(config.with_changes(**flags), settings)
    except UserError as error:
        raise UserError(f"{place} ({name}): {error}") from error
    taken = {axis: getattr(own_config, axis) for axis in WIDTH_AXES if axis in method.axes}
    return BenchRow(Row(name, {**taken, **settings}, own_config), batch_size, flags, draft)


def pairs_of(rows: Sequence[BenchRow], pair: ModelPair) -> dict[str | None, ModelPair]:
    """The pair of each draft that rows name; under None the pair itself."""
    return {None: pair} | {draft: pair.with_draft(draft) for row in rows if (draft := row.draft) is not None}


def _check_kind(path: str, value: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        words = {bool: "true or false", str: "text", int: "a whole number", float: "a number"}[kinds[-1]]
        raise UserError(f"{path} is {value!r}; give {words}.")


def read_prompts(
    cfg: DictConfig, task: Task, pair: ModelPair, rows: Sequence[BenchRow]
) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to measure, and others to warm up with (the same where there are no others)."""
    counts = ("prompts.limit", "prompts.tokens", "prompts.warmup", "repeats", "bootstrap", "profile_tokens", "soak")
    for name in (*counts, "reference_width"):
        value, least = OmegaConf.select(cfg, name), 0 if name in ("prompts.warmup", "soak") else 1
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise UserError(f"{name} is {value!r}; give a whole number of at least {least}.")
    prompts = task.prompts(cfg.prompts.split, cfg.prompts.limit, pair.tokenizer)
    most, widest = max((row.batch_size, i) for i, row in enumerate(rows))
    if most > len(prompts):
        raise UserError(
            f"rows[{widest}].batch_size is {most} but there are {len(prompts)} prompts: its batch would never be full. "
            f"Set prompts.limit to {most} or more, or give rows without it, such as "
            "'rows=[{method: hf_beam_sample, target_width: 4}, {method: beam_sample, target_width: 6}]'."
        )
    try:
        warmup = task.prompts("val", max(cfg.prompts.warmup, most), pair.tokenizer)
    except UserError:
        warmup = prompts
    if cfg.prompts.tokens is not None:
        prompts, warmup = (lengthened(some, cfg.prompts.tokens) for some in (prompts, warmup))
    warmup = [warmup[i % len(warmup)] for i in range(max(cfg.prompts.warmup, most))] if cfg.prompts.warmup else []
    return prompts, warmup


def lengthened(prompts: Sequence[Prompt], length: int) -> list[Prompt]:
    """Prompts of exactly `length` tokens: those before a prompt stand in front of it, the excess is cut off there."""
    longer = []
    for i, prompt in enumerate(prompts):
        tokens, before = list(prompt.tokens), i
        while len(tokens) < length:
            before -= 1
            tokens = prompts[before % len(prompts)].tokens + tokens
        longer.append(Prompt(prompt.id, tokens[-length:], prompt.reference))
    return longer


# -------------------------------------------------------------------------------------------- measuring


class Bench:
    """One run: measured, scored, written."""

    def __init__(
        self, cfg: DictConfig, pair: ModelPair, task: Task, prompts: list[Prompt], records: list[Record]
    ) -> None:
        self.cfg, self.pair, self.prompts, self.records = cfg, pair, prompts, records
        self.directory = Path(cfg.output_dir)
        self.results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "complete": False,
            "provenance": {
                **provenance(),
                "pair": pair.describe(),
                "task": {**task.describe(), "split": cfg.prompts.split, "prompts": len(prompts)},
                "config": to_plain(cfg),
            },
            "rows": [],
            "graphs": {},
            "roofline": None,
            "profile": None,
            "soak": None,
        }

    def measure(self, warmup: Sequence[Prompt]) -> bool:
        """Warm up and decode all repeats, writing after each; whether Ctrl-C cut it short."""
        size = max(record.row.batch_size for record in self.records)
        turns = len(self.records) * (1 + self.cfg.repeats * math.ceil(len(self.prompts) / size))
        with RunProgress() as progress:
            bar = progress.add_task("turns", total=turns)

            def advance() -> None:
                progress.advance(bar)

            try:
                for record in self.records:
                    warm_up(record, warmup[: max(record.row.batch_size, self.cfg.prompts.warmup)])
                    advance()
                for _ in run_repeats(self.records, self.prompts, self.cfg.repeats, self.cfg.seed, size, advance):
                    self.write()
            except KeyboardInterrupt:
                progress.stop()
                print("interrupted: writing what was measured", file=sys.stderr)
                return True
        return False

    def finish(self, complete: bool) -> None:
        """Score what was decoded; after a complete run also roofline and profile; write and print."""
        self.results["graphs"] = graph_counters(self.pair)
        self._score()
        self.write()
        if complete:
            if self.cfg.roofline:
                self.results["roofline"] = self._guarded(self._roofline)
                self.write()
            if self.cfg.profile:
                self.results["profile"] = self._guarded(self._profile)
            if self.cfg.soak:
                self.results["soak"] = self._guarded(self._soak)
            self.results["complete"] = True
        path = self.write()
        console = Console(markup=False)  # brackets are intervals
        console = console if console.is_terminal else Console(width=160, markup=False)
        for table in tables(self.results):
            console.print(table)
            console.print()
        console.print("\n".join([*headlines(self.results), f"\n{RESULTS}: {path}"]), highlight=False, soft_wrap=True)

    def write(self) -> Path:
        """bench.json as it stands."""
        self.results["rows"] = summarise(
            self.records,
            [prompt.id for prompt in self.prompts],
            self.cfg.reference_width,
            kv_bytes_per_slot(self.pair.target),
            self.cfg.bootstrap,
            self.cfg.seed,
        )
        return write_whole(self.directory / RESULTS, json_bytes(self.results))

    def _score(self) -> None:
        for record in self.records:
            for turn in record.turns:
                for place, measurement in zip(turn.places, turn.measurements, strict=True):
                    tokens = self.prompts[place].tokens
                    try:
                        measurement.log_prob = log_probability(self.pair.target, tokens, measurement.tokens)
                    except torch.OutOfMemoryError:
                        self.results["unscored"] = OUT_OF_MEMORY
                        return

    def _roofline(self) -> dict[str, Any]:
        prompt, config = self.prompts[0].tokens, self.records[0].row.row.config
        room = len(prompt) if self.pair.context is None else self.pair.context - config.max_new_tokens
        return roofline(self.pair, prompt[:room], top=min(config.top_k or 1, self.pair.vocab_size))

    def _profile(self) -> dict[str, Any]:
        row = row_to_profile([record.row for record in self.records], self.cfg.profile_row)
        config = row.row.config.with_changes(max_new_tokens=self.cfg.profile_tokens)
        pair = next(record.pair for record in self.records if record.row is row)
        generate = METHODS[row.method](pair, config, row.row.settings)
        prompts = [prompt.tokens for prompt in self.prompts[: row.batch_size]]
        self.directory.mkdir(parents=True, exist_ok=True)
        found = profile_decoding(generate, prompts, self.cfg.seed, self.pair.device, self.directory / TRACE)
        return {"row": row.name, **found}

    def _soak(self) -> dict[str, Any]:
        record = self.records[-1]
        size = record.row.batch_size
        return {"row": record.row.name} | soak(
            record.generate, record.pair, self.prompts, self.cfg.soak, size, self.cfg.seed
        )

    def _guarded(self, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part's results, or its failure in a sentence: the rows are not lost for it."""
        try:
            return part()
        except (UserError, torch.OutOfMemoryError) as error:
            return {"error": sentence(error)}


def row_to_profile(rows: Sequence[BenchRow], wanted: str | int | None) -> BenchRow:
    """The row that profile_row names; by default the last that drafts, of batch_size 1 where there is one."""
    if wanted is None:
        alone = [row for row in rows if row.batch_size == 1] or rows
        return next((row for row in reversed(alone) if "draft_depth" in row.row.settings), alone[-1])
    if isinstance(wanted, int) and 0 <= wanted < len(rows):
        return rows[wanted]
    for row in rows:
        if wanted == row.name:
            return row
    names = "; ".join(row.name for row in rows)
    raise UserError(f"profile_row is {wanted!r}; give a place, 0 to {len(rows) - 1}, or one of: {names}.")


if __name__ == "__main__":
    main()
