"""Speed, time by phase, memory and energy of methods side by side: `python -m decoding.bench`,
conf/bench.yaml.

Writes bench.json (docs/formats.md) and prints it as tables, and each number that one asks for in a
line. Rows take turns over the same prompts; what is timed is scored afterwards. A row that fails
loses no other row, an interrupted run loses no finished repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from decoding.errors import UserError
from decoding.measure.headlines import REFERENCE
from decoding.measure.profiling import profile_decoding
from decoding.measure.results_file import BENCH, SCHEMA_VERSION, write_results
from decoding.measure.roofline import kv_bytes_per_slot, roofline
from decoding.measure.rows import Row, read_rows
from decoding.measure.soak import soak
from decoding.measure.summary import summarise
from decoding.measure.turns import (
    Record,
    decode_all,
    graph_counters,
    keep_whole,
    leave_out,
    left_out,
    make_records,
    read_prompts,
    score_all,
    sentence,
    stopped_sentence,
    write_energy,
)
from decoding.pairs.pair import ModelPair, check_lengths
from decoding.report import show
from decoding.support.entry import entry_point
from decoding.support.provenance import run_provenance
from decoding.support.settings import check_counts, check_seconds
from decoding.tasks.base import Prompt, Task, check_files

TRACE = "trace.json"
_LEAST = {"prompts.limit": 1, "prompts.tokens": 1, "prompts.warmup": 0, "repeats": 1, "bootstrap": 1}
_LEAST |= {"profile_tokens": 1, "soak": 0, "reference_width": 1}


@entry_point("bench")
def main(cfg: DictConfig) -> dict[str, Any]:
    """Run the bench that a config describes.

    Returns:
        What bench.json holds.

    Raises:
        KeyboardInterrupt: after what was measured before it has been written and printed.
    """
    rows = read_rows(OmegaConf.to_container(cfg.rows, resolve=True), instantiate(cfg.decoding))
    check_counts(cfg, _LEAST)
    check_seconds(cfg.max_seconds)
    if cfg.profile:
        row_to_profile(rows, cfg.profile_row)  # a wrong name is refused now
    for row in rows:
        row.check()
    task: Task = instantiate(cfg.data)
    check_files(task, [cfg.prompts.split])
    pair: ModelPair = instantiate(cfg.pair)
    prompts, warmup = read_prompts(cfg.prompts, task, pair)
    check_batches(rows, prompts)
    if cfg.prompts.tokens is not None:
        prompts, warmup = (lengthened(some, cfg.prompts.tokens) for some in (prompts, warmup))
    check_lengths(pair, prompts, rows[0].config)
    bench = Bench(cfg, pair, task, prompts, make_records(rows, pair))
    interrupted = decode_all(
        bench.records, prompts, warmup, cfg.seed, cfg.repeats, bench.write, cfg.max_seconds, strict=cfg.strict
    )
    bench.finish(complete=not interrupted)
    if interrupted:
        raise KeyboardInterrupt
    return bench.results


def check_batches(rows: Sequence[Row], prompts: Sequence[Prompt]) -> None:
    """Refuse a batch that would never be full."""
    most, widest = max((row.batch_size or 1, i) for i, row in enumerate(rows))
    if most > len(prompts):
        raise UserError(
            f"rows[{widest}].batch_size is {most} but there are {len(prompts)} prompts: its batch would never be full. "
            f"Set prompts.limit to {most} or more, or give rows without it, such as "
            "'rows=[{method: hf_beam_sample, target_width: 4}, {method: beam_sample, target_width: 6}]'."
        )


def lengthened(prompts: Sequence[Prompt], length: int) -> list[Prompt]:
    """Prompts of exactly `length` tokens: those before a prompt stand in front of it, the excess is
    cut off there.
    """
    longer = []
    for i, prompt in enumerate(prompts):
        tokens, before = list(prompt.tokens), i
        while len(tokens) < length:
            before -= 1
            tokens = prompts[before % len(prompts)].tokens + tokens
        longer.append(Prompt(prompt.id, tokens[-length:], prompt.reference))
    return longer


# ---------------------------------------------------------------------------------------- measuring


class Bench:
    """One run: measured, scored, written."""

    def __init__(
        self, cfg: DictConfig, pair: ModelPair, task: Task, prompts: list[Prompt], records: list[Record]
    ) -> None:
        self.cfg, self.pair, self.task, self.records = cfg, pair, task, records
        self.asked = self.prompts = prompts  # those of the config, and those that all rows can decode
        self.directory = Path(cfg.output_dir)
        self.results: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "complete": False,
            "provenance": run_provenance(cfg, pair, task, len(prompts)),
            "failed": {},
            "rows": [],
            "graphs": {},
            "roofline": None,
            "profile": None,
            "soak": None,
            "unscored": None,
            "stopped": None,
            "prompts": [],
            "skipped": [],
        }

    def finish(self, complete: bool) -> None:
        """Score what was decoded; after a complete run also roofline and profile; write and print."""
        able = leave_out(self.records, self.prompts)
        kept = keep_whole(self.records, len(able))
        self.results["unscored"] = score_all(self.records, able, self.pair, self.task)
        self.prompts = leave_out(self.records, able[:kept])
        count, rest = len(self.prompts), able[kept:]
        self.results["provenance"]["task"]["prompts"] = count
        self.results["prompts"] = [prompt.to_dict() for prompt in self.prompts]
        self.results["skipped"] = left_out(self.asked, [*self.prompts, *rest])
        stopped = stopped_sentence(count, count + len(rest), self.cfg.max_seconds)
        self.results["stopped"] = stopped if complete else None
        self.results["graphs"] = graph_counters(self.pair)
        self.write()
        if complete and self.prompts:
            if self.cfg.roofline:
                self.results["roofline"] = self._guarded(self._roofline)
                self.write()
            if self.cfg.profile:
                self.results["profile"] = self._guarded(self._profile)
            if self.cfg.soak:
                self.results["soak"] = self._guarded(self._soak)
            self.results["complete"] = True
        show({"": self.results}, {BENCH: self.write()})

    def write(self) -> Path:
        """Write bench.json as far as the run has come."""
        self.prompts = leave_out(self.records, self.prompts)
        self.results["failed"] = {record.row.name: record.error for record in self.records if record.error is not None}
        self.results["rows"] = summarise(
            self.records,
            self.cfg.bootstrap,
            self.cfg.seed,
            reference=(REFERENCE, self.cfg.reference_width),
            kv_bytes_per_slot=kv_bytes_per_slot(self.pair.target),
        )
        write_energy(self.directory, self.records)
        return write_results(self.directory / BENCH, self.results)

    def _roofline(self) -> dict[str, Any]:
        prompt, config = self.prompts[0].tokens, self.records[0].row.config
        longest = len(prompt) if self.pair.context is None else self.pair.context - config.max_new_tokens
        return roofline(self.pair, prompt[:longest], top=min(config.top_k or 1, self.pair.vocab_size))

    def _profile(self) -> dict[str, Any]:
        row = row_to_profile([record.row for record in self.records], self.cfg.profile_row)
        config = row.config.with_changes(max_new_tokens=self.cfg.profile_tokens)
        pair = next(record.pair for record in self.records if record.row is row)
        generate = replace(row, config=config).build(pair)
        prompts = [prompt.tokens for prompt in self.prompts[: row.batch_size]]
        self.directory.mkdir(parents=True, exist_ok=True)
        found = profile_decoding(generate, prompts, self.cfg.seed, self.pair.device, self.directory / TRACE)
        return {"row": row.name, **found}

    def _soak(self) -> dict[str, Any]:
        record = self.records[-1]
        return {"row": record.row.name} | soak(
            record.generate, record.pair, self.prompts, self.cfg.soak, record.batch_size, self.cfg.seed
        )

    def _guarded(self, part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A part's results, or its failure in a sentence: the rows are not lost for it."""
        try:
            return part()
        except (UserError, torch.OutOfMemoryError) as error:
            return {"error": sentence(error)}


def row_to_profile(rows: Sequence[Row], wanted: str | int | None) -> Row:
    """The row that profile_row names; by default the last that drafts, one of batch_size 1 first."""
    if wanted is None:
        alone = [row for row in rows if row.batch_size == 1] or rows
        return next((row for row in reversed(alone) if "draft_depth" in row.settings), alone[-1])
    if isinstance(wanted, int) and 0 <= wanted < len(rows):
        return rows[wanted]
    for row in rows:
        if wanted == row.name:
            return row
    names = "; ".join(row.name for row in rows)
    raise UserError(f"profile_row is {wanted!r}; give the number of a row, 0 to {len(rows) - 1}, or one of: {names}.")


if __name__ == "__main__":
    main()
