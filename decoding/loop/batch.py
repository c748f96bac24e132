"""Prompts decoded together: the passes of one model serve all that wait for it."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.config import DecodingConfig
from decoding.dice.sampling import entries_needed
from decoding.forest.late_scorer import LateScorer
from decoding.forest.node_scorer import ScorerOptions
from decoding.loop.known_rows import KnownRowsRun
from decoding.loop.noise_run import NoiseRun
from decoding.loop.processing import Rules
from decoding.loop.prompt_run import PromptRun, draft_config
from decoding.loop.rejection_run import RejectionRun
from decoding.loop.search import SearchRun, ends_counted, entries_searched
from decoding.pairs.pair import ModelPair, end_tokens
from decoding.policies.base import WidthPolicy
from decoding.results import DecodeResult, Recorder


class Batch:
    """Each prompt runs by itself until it needs a model; a pass serves all that wait for it.

    Args:
        pair, config, policy: as for DSBDDecoder.
        prompts, streams, recorders: token ids, random numbers and listener of each.
        size: prompts at a time.
        results: filled in as prompts are done.
        rules: of the caller, for each prompt.
    """

    def __init__(
        self,
        pair: ModelPair,
        config: DecodingConfig,
        policy: WidthPolicy,
        prompts: list[list[int]],
        streams: list[torch.Generator],
        recorders: list[Recorder | None],
        size: int,
        results: list[DecodeResult | None],
        rules: Sequence[Rules | None],
    ) -> None:
        self.config, self.policy, self.ends = config, policy, end_tokens(pair, config)
        self.prompts, self.streams, self.recorders = prompts, streams, recorders
        self.size, self.results, self.rules = size, results, rules
        self._runs: dict[int, PromptRun] = {}  # row -> the prompt in it
        given = [r for r in rules if r is not None]
        processed = config.min_new_tokens > 0 or any(r.processors is not None or r.keeps for r in given)
        self._serves = "target"  # the model whose scores are processed now
        self._make = run_type(config)
        top: int | None
        draft_top: int | None
        if config.mode == "beam_search":
            top = draft_top = entries_searched(config, ends_counted(config, self.ends), pair.vocab_size)
        else:
            top = entries_needed(config, pair.vocab_size)
            # Where the target's rows stay on the device, so do the draft's: proposals are made of both.
            draft_top = top and entries_needed(draft_config(config), pair.vocab_size)
        hidden = policy.needs_hidden or any(recorder.needs_hidden for recorder in recorders if recorder is not None)
        forest = config.draft_width * config.draft_depth
        kept = forest if issubclass(self._make, KnownRowsRun) else 0  # of the forest before
        options = ScorerOptions(
            rows=size,
            longest_prompt=max(map(len, prompts)),
            spare_slots=config.max_new_tokens + forest + kept + 2 * config.target_width,
            temperature=config.temperature,
            top=top,
            keep_hidden=hidden,
            process=self._process if processed else None,
            engine=pair.engine,
        )
        self.scorers = pair.scorers(options, drafting=config.draft_depth > 0, draft_top=draft_top)
        self._prefix = shared_prefix(prompts)
        if "draft" in self.scorers and not hidden:  # a policy may read the draft's states before it asks for a guess
            self.scorers["draft"] = LateScorer(self.scorers["draft"], self._prefix)
        self._opened: set[int] = set()  # rows that hold the shared prefix

    def close(self) -> None:
        """Give the KV buffers back."""
        for scorer in self.scorers.values():
            scorer.close()

    def free(self) -> None:
        """Let go of all KV buffers: they may hold NaN, which masks do not hide (0 * NaN), or memory is short."""
        for scorer in self.scorers.values():
            scorer.free()

    def decode(self) -> None:
        """Run to the end; `results` fills up."""
        queue = deque(range(len(self.prompts)))
        free = list(range(self.size))
        waiting: list[PromptRun] = []
        while queue or waiting:
            while queue and free:
                run = self._admit(queue.popleft(), heapq.heappop(free))  # the lowest row: fewer are read
                waiting += self._advance([run], free)
            # Drafts first: they are cheap, and the target's pass then serves as many prompts as can be.
            name = "draft" if any(run.request.model == "draft" for run in waiting) else "target"
            served = [run for run in waiting if run.request.model == name]
            if served:
                self._pass(name, served)
                waiting = [run for run in waiting if run.request.model != name] + self._advance(served, free)

    def _admit(self, index: int, row: int) -> PromptRun:
        """A prompt takes a free row: score its tokens, but those of a prefix that some row holds already."""
        prompt = self.prompts[index]
        stream = self.streams[index]
        run = self._runs[row] = self._make(
            index,
            row,
            len(prompt),
            self.config,
            self.policy.fork(stream.initial_seed()),
            self.ends,
            stream,
            self.recorders[index],
            self.scorers,
            self.rules[index],
        )
        source = row if row in self._opened else min(self._opened, default=None)
        shared = (source, self._prefix) if source is not None else None
        for name, scorer in self.scorers.items():
            self._serves = name
            with run.clock.phase("prompt"):
                scorer.open(row, prompt, run.forest, shared)
        self._opened.add(row)
        return run

    def _process(self, row: int, nodes: Sequence[int], logits: Tensor) -> Tensor:
        return self._runs[row].process(nodes, logits, self._serves == "target")

    def _pass(self, name: str, served: list[PromptRun]) -> None:
        """One pass for all; its seconds are split evenly."""
        self._serves, scorer = name, self.scorers[name]
        if isinstance(scorer, LateScorer):
            for run in served:
                with run.clock.phase("prompt"):
                    scorer.arrive(run.row)
        before, began = scorer.model_seconds, time.perf_counter()
        scorer.score({run.row: run.request.nodes for run in served})
        model = scorer.model_seconds - before
        other = time.perf_counter() - began - model
        for run in served:
            run.stats.seconds[name] += model / len(served)
            run.stats.seconds["other"] += other / len(served)

    def _advance(self, runs: list[PromptRun], free: list[int]) -> list[PromptRun]:
        """Let prompts go on to their next request; returns those that have one."""
        waiting = []
        for run in runs:
            if run.advance():
                waiting.append(run)
            else:
                self.results[run.index] = run.result
                for scorer in self.scorers.values():
                    scorer.close_row(run.row)
                heapq.heappush(free, run.row)
        return waiting


def run_type(config: DecodingConfig) -> type[PromptRun]:
    """What decodes a prompt under a config."""
    if config.mode == "beam_search":
        return SearchRun
    return NoiseRun if config.verification == "shared_noise" else RejectionRun


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; at most all but the last, which must be scored to go on from it."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # of sorted sequences the outer two differ first
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)
