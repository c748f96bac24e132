"""DSBDDecoder: draft a forest, verify it in one target pass, commit what was accepted. 2409.16560.

`beam_sample` is the same engine without a draft model: each iteration draws one layer from the target.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from decoding.acceptance import LayerVerdict, align, verify_layer
from decoding.config import DecodingConfig
from decoding.dense import DenseJoint, dense_joint, draw_dense, verify_dense
from decoding.errors import UserError
from decoding.forest import TokenForest
from decoding.pair import ModelPair, check_prompt, end_tokens
from decoding.sampling import Dice, IntArray, Joint, compact_joint, draw, entries_needed
from decoding.scorer import ForestScorer
from decoding.widths import (
    DraftContext,
    FixedWidth,
    IterationRecord,
    LayerRecord,
    RootContext,
    TargetContext,
    WidthPolicy,
)

PHASES = ("prompt", "draft", "target", "verify", "policy", "other")  # prompt: both models' passes over it
Prompts = Sequence[Sequence[int] | Tensor] | Tensor


@dataclass
class DecodeStats:
    """What decoding one prompt took. Lists have one entry per committed layer."""

    prompt_tokens: int = 0
    new_tokens: int = 0  # layers committed: the length of the longest hypothesis
    iterations: int = 0
    target_calls: int = 0  # the prompt's own pass not counted
    draft_calls: int = 0
    target_widths: list[int] = field(default_factory=list)
    draft_widths: list[int] = field(default_factory=list)  # 0 at a layer drawn from the target
    accepted: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    kv_slots_peak: int = 0  # of the target's cache
    kv_slots_end: int = 0

    @property
    def total_seconds(self) -> float:
        """Wall seconds, all phases."""
        return sum(self.seconds.values())

    @property
    def block_efficiency(self) -> float:
        """Tokens committed per iteration, that is per target call."""
        return self.new_tokens / max(self.iterations, 1)


@dataclass
class DecodeResult:
    """The hypotheses of one prompt, best first."""

    sequences: list[list[int]]  # continuations without the prompt; EOS included where it ended one
    scores: list[float]  # accumulated log-weight / length ** length_penalty
    finished: list[bool]  # ended on EOS
    stats: DecodeStats


class Recorder(Protocol):
    """Listens to a decoding run, for traces."""

    shadow: Dice | None

    def layer(self, event: LayerEvent) -> None:
        """A layer was committed."""

    def iteration(self, seconds: dict[str, float], forest_nodes: int) -> None:
        """An iteration ended."""

    def end(self, best_path: list[int]) -> None:
        """The prompt is done; `best_path` are the nodes of the best hypothesis, by depth from 1."""


@dataclass(frozen=True)
class LayerEvent:
    """One committed layer, as a recorder sees it."""

    context: TargetContext
    record: LayerRecord
    verdict: LayerVerdict | None  # None at a layer drawn from the target
    kept: list[tuple[int, float]]  # nodes with weights, best first, finished ones included


@dataclass(frozen=True)
class Beam:
    """A hypothesis that still grows."""

    node: int
    weight: float


@dataclass(frozen=True)
class _Hypothesis:
    tokens: list[int]
    score: float
    finished: bool
    node: int


@dataclass(frozen=True)
class _DraftedLayer:
    context: DraftContext
    joint: Joint | DenseJoint  # Q
    picks: np.ndarray  # [w] entries of Q, in draw order
    nodes: list[int]  # [w] the drafts


class DSBDDecoder:
    """Dynamic-width speculative beam decoding.

    Args:
        pair: the models.
        config: what to decode.
        policy: decides widths and depth; FixedWidth() asks for the config's widest.

    Raises:
        UserError: the policy cannot work with the config.
    """

    def __init__(
        self, pair: ModelPair, config: DecodingConfig | None = None, policy: WidthPolicy | None = None
    ) -> None:
        self.pair, self.config, self.policy = pair, config or DecodingConfig(), policy or FixedWidth()
        if self.config.mode != "beam_sample":
            raise UserError(
                f"mode={self.config.mode!r} is not implemented yet; use mode='beam_sample', or transformers' "
                "generate(num_beams=..., do_sample=False)."
            )
        self.policy.check(self.config)
        self.policy.check_pair(pair)
        pair.check_forest_passes()

    @torch.inference_mode()
    def generate(
        self,
        prompts: Prompts,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        recorder: Recorder | Sequence[Recorder] | None = None,
        batch_size: int | None = None,
    ) -> list[DecodeResult]:
        """Continue each prompt.

        A prompt's result depends on its own random stream alone, not on its neighbours: every prompt has its own
        forest and its own copy of the policy (`WidthPolicy.fork`).

        Args:
            prompts: lists of token ids or 1-D tensors, or one 2-D tensor.
            generator: random stream, from which each prompt's own is derived with its tokens (and, of equal prompts,
                which of them it is); or one for each prompt.
            recorder: is told of every layer; one for each prompt, unless there is only one.
            batch_size: prompts decoded at a time, the next when one is done; None: all.

        Returns:
            One DecodeResult per prompt, with config.num_return_sequences hypotheses where there are as many.

        Raises:
            UserError: a prompt that the models cannot take, or NaN logits.
            OutOfDeviceMemory: a UserError that holds the results of the prompts that were done.
        """
        rows = as_token_lists(prompts)
        for i, row in enumerate(rows):
            check_prompt(self.pair, row, self.config, i)
        whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
        if batch_size is not None and not (whole and batch_size >= 1):
            raise UserError(f"batch_size is {batch_size!r}; give a whole number of at least 1, or None for all.")
        if not rows:
            return []
        recorders = _one_each(recorder, len(rows))
        streams = _streams(generator, rows)
        size = min(batch_size or len(rows), len(rows))
        results: list[DecodeResult | None] = [None] * len(rows)
        try:
            batch = _Batch(self, rows, streams, recorders, size, results)
            try:
                batch.decode()
            except (UserError, torch.OutOfMemoryError):
                batch.free()
                raise
            finally:
                batch.close()
        except torch.OutOfMemoryError as error:
            raise OutOfDeviceMemory(self.config, size, results) from error.with_traceback(None)  # frees its tensors
        return [result for result in results if result is not None]


class OutOfDeviceMemory(UserError):
    """The device's memory did not suffice; `finished` holds the results of the prompts that were done, by index."""

    def __init__(self, config: DecodingConfig, batch_size: int, results: Sequence[DecodeResult | None]) -> None:
        self.finished = {i: result for i, result in enumerate(results) if result is not None}
        lower = f"batch_size ({batch_size})" if batch_size > 1 else f"max_new_tokens ({config.max_new_tokens})"
        super().__init__(
            f"The device ran out of memory; {len(self.finished)} of {len(results)} prompts were done. Lower {lower}, "
            f"target_width ({config.target_width}) or draft_width ({config.draft_width})."
        )


def beam_sample(
    target: torch.nn.Module,
    prompts: Prompts,
    config: DecodingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    batch_size: int | None = None,
    engine: str = "auto",
) -> list[DecodeResult]:
    """Beam sampling with the target alone, on the same engine and with the same semantics as DSBDDecoder.

    Args, Returns, Raises: as `DSBDDecoder.generate`; drafting settings are ignored. `engine` as for `ModelPair`.
    """
    pair = ModelPair(target=target, draft=None, tokenizer=None, engine=engine)
    return DSBDDecoder(pair, config.with_changes(draft_depth=0)).generate(prompts, generator, batch_size=batch_size)


def as_token_lists(prompts: Prompts) -> list[list[int]]:
    """Prompts in any accepted form -> one list of token ids each."""
    if isinstance(prompts, Tensor):
        if prompts.ndim != 2:
            raise UserError(
                f"prompts is a tensor of {prompts.ndim} dimension(s); give a 2-D tensor [prompts, tokens], or a list "
                "of token lists."
            )
        return [[int(t) for t in row] for row in prompts]
    if isinstance(prompts, str) or any(isinstance(p, str) for p in prompts):
        raise UserError("prompts holds text; give token ids, for instance tokenizer(text)['input_ids'].")
    if any(isinstance(p, int) for p in prompts):
        raise UserError("prompts is one list of token ids; give a list of such lists: [prompt].")
    return [[int(t) for t in row] for row in prompts]


def _streams(
    generator: torch.Generator | Sequence[torch.Generator] | None, rows: list[list[int]]
) -> list[torch.Generator]:
    """A random stream for each prompt."""
    if generator is not None and not isinstance(generator, torch.Generator):
        if len(generator) != len(rows):
            raise UserError(
                f"{len(generator)} generators for {len(rows)} prompts; give one generator, or one for each prompt."
            )
        return list(generator)
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    base = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
    seen: Counter[tuple[int, ...]] = Counter()
    streams = []
    for row in rows:
        copy = seen[tuple(row)]
        seen[tuple(row)] += 1
        digest = hashlib.sha256(f"{base} {copy} {row}".encode()).digest()
        streams.append(torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
    return streams


def _one_each(recorder: Recorder | Sequence[Recorder] | None, count: int) -> list[Recorder | None]:
    if recorder is None:
        return [None] * count
    recorders = list(recorder) if isinstance(recorder, Sequence) else [recorder]
    if len(recorders) != count:
        raise UserError(f"{len(recorders)} recorders for {count} prompts; give one for each prompt.")
    return list(recorders)


@dataclass(frozen=True)
class _Request:
    """What a prompt waits for: nodes scored by one of the models."""

    model: str  # "target" or "draft"
    nodes: list[int]


class _Batch:
    """Prompts decoded together: each runs by itself until it needs a model; passes serve all that wait for one."""

    def __init__(
        self,
        decoder: DSBDDecoder,
        prompts: list[list[int]],
        streams: list[torch.Generator],
        recorders: list[Recorder | None],
        size: int,
        results: list[DecodeResult | None],
    ) -> None:
        self.decoder, self.prompts, self.streams, self.recorders = decoder, prompts, streams, recorders
        self.size, self.results = size, results
        pair, config, policy = decoder.pair, decoder.config, decoder.policy
        hidden = policy.needs_hidden or any(recorder is not None for recorder in recorders)
        spare = config.max_new_tokens + config.draft_width * config.draft_depth + 2 * config.target_width

        def scorer(model: torch.nn.Module) -> ForestScorer:
            return ForestScorer(
                model,
                rows=size,
                longest_prompt=max(map(len, prompts)),
                spare_slots=spare,
                temperature=config.temperature,
                top=entries_needed(config, pair.vocab_size),
                keep_hidden=hidden,
                engine=pair.engine,
            )

        self.scorers = {"target": scorer(pair.target)}
        if pair.draft is not None and config.draft_depth > 0:
            self.scorers["draft"] = scorer(pair.draft)
        self._prefix = shared_prefix(prompts)
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
        waiting: list[_PromptRun] = []
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

    def _admit(self, index: int, row: int) -> _PromptRun:
        """A prompt takes a free row: score its tokens, but those of a prefix that some row holds already."""
        prompt = self.prompts[index]
        run = _PromptRun(self, index, row)
        source = row if row in self._opened else min(self._opened, default=None)
        shared = (source, self._prefix) if source is not None else None
        for scorer in self.scorers.values():
            with run.clock.phase("prompt"):
                scorer.open(row, prompt, run.forest, shared)
        self._opened.add(row)
        return run

    def _pass(self, name: str, served: list[_PromptRun]) -> None:
        """One pass for all; its seconds are split evenly."""
        scorer = self.scorers[name]
        before, began = scorer.model_seconds, time.perf_counter()
        scorer.score({run.row: run.request.nodes for run in served})
        model = scorer.model_seconds - before
        other = time.perf_counter() - began - model
        for run in served:
            run.stats.seconds[name] += model / len(served)
            run.stats.seconds["other"] += other / len(served)

    def _advance(self, runs: list[_PromptRun], free: list[int]) -> list[_PromptRun]:
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


def shared_prefix(prompts: Sequence[list[int]]) -> int:
    """How many tokens all prompts begin with; at most all but the last, which must be scored to go on from it."""
    if len(prompts) < 2:
        return 0
    first, last = min(prompts), max(prompts)  # of sorted sequences the outer two differ first
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


class _PromptRun:
    """The state of one prompt while it is decoded."""

    def __init__(self, batch: _Batch, index: int, row: int) -> None:
        pair, config, policy = batch.decoder.pair, batch.decoder.config, batch.decoder.policy
        stream = batch.streams[index]
        self.index, self.row, self.config = index, row, config
        self.dice, self.recorder = Dice(stream), batch.recorders[index]
        self.policy = policy.fork(stream.initial_seed())
        self.eos = end_tokens(pair, config)
        self.forest = TokenForest()
        self.stats = DecodeStats(prompt_tokens=len(batch.prompts[index]))
        self.clock = _Clock(self.stats.seconds)
        self.target = batch.scorers["target"]
        self.draft = batch.scorers.get("draft")
        self.beams = [Beam(0, 0.0)]
        self.pool: list[_Hypothesis] = []  # ended on EOS, best first
        self.touched: list[int] = []  # nodes made or used in this iteration
        self.history: tuple[LayerRecord, ...] = ()
        self.done = False
        self.result: DecodeResult | None = None
        self.request = _Request("target", [])
        self._steps = self._decode()

    def advance(self) -> bool:
        """Go on until a model is needed; False when the prompt is done. What no phase claims is "other" time."""
        claimed, began = self.clock.claimed, time.perf_counter()
        try:
            self.request = next(self._steps)
            return True
        except StopIteration:
            return False
        finally:
            self.stats.seconds["other"] += time.perf_counter() - began - (self.clock.claimed - claimed)

    def _decode(self) -> Generator[_Request]:
        self.policy.reset(self.config)
        while not self.done:
            yield from self._iterate()
        self.result = self._finish()

    # One iteration: draft, verify, commit.

    def _iterate(self) -> Generator[_Request]:
        before = dict(self.stats.seconds)
        committed_before = self.stats.new_tokens
        root = self._root_context()
        layers = (yield from self._draft_forest(root, self.draft)) if self.draft is not None else []
        drafted = [node for layer in layers for node in layer.nodes]
        wanted = dict.fromkeys([beam.node for beam in self.beams] + [n for n in drafted if not self._ended(n)])
        yield _Request("target", list(wanted))
        forest_nodes = len(set(drafted))
        self.touched += [beam.node for beam in self.beams] + drafted
        self.history = tuple(self._verify_forest(root, layers))
        self._prune()
        self.stats.iterations += 1
        spent = {name: self.stats.seconds[name] - before[name] for name in PHASES}
        record = IterationRecord(self.history, self.stats.new_tokens - committed_before, sum(spent.values()))
        with self.clock.phase("policy"):
            self.policy.observe(record)
        if self.recorder is not None:
            self.recorder.iteration(spent | {"iteration": record.seconds}, forest_nodes)

    def _root_context(self) -> RootContext:
        hidden = None
        if self.policy.needs_hidden or self.recorder is not None:
            best = self.beams[0].node
            scored = best if self.target.cache.holds(self.row, best) else self.forest.parents[best]
            hidden = self.target.hidden(self.row, [scored])
        return RootContext(
            config=self.config,
            iteration=self.stats.iterations,
            remaining=self.config.max_new_tokens - self.stats.new_tokens,
            weights=np.array([beam.weight for beam in self.beams]),
            history=self.history,
            target_hidden=hidden,
        )

    def _draft_forest(self, root: RootContext, scorer: ForestScorer) -> Generator[_Request, None, list[_DraftedLayer]]:
        """Draw up to γ layers from the draft model; the last token before max_new_tokens is never drafted."""
        layers: list[_DraftedLayer] = []
        beams = self.beams
        widths: tuple[int, ...] = ()
        for layer in range(1, min(self.config.draft_depth, root.remaining - 1) + 1):
            with self.clock.phase("policy"):
                further = self.policy.draft_further(root, layer, widths)
            if not further or not beams:
                break
            nodes = [beam.node for beam in beams]
            yield _Request("draft", nodes)
            joint = self._joint(scorer, beams, "draft")
            hidden = scorer.hidden(self.row, nodes)
            context = DraftContext(
                root, layer, np.array([beam.weight for beam in beams]), joint, True, widths, draft_hidden=hidden
            )
            with self.clock.phase("policy"):
                width = _clip(self.policy.draft_width(context), 1, self.config.draft_width)
            picks = draw_entries(joint, width, self.config.replacement, self.dice)
            drafts = joint.entries(picks)
            nodes = [self.forest.child(parent, token) for parent, token, _ in drafts]
            layers.append(_DraftedLayer(context, joint, picks, nodes))
            weights = {node: weight for node, (_, _, weight) in zip(nodes, drafts, strict=True)}
            beams = _best_first(Beam(node, weight) for node, weight in weights.items() if not self._ended(node))
            widths = (*widths, len(picks))
        return layers

    def _joint(self, scorer: ForestScorer, beams: list[Beam], name: str) -> Joint | DenseJoint:
        nodes, weights = [beam.node for beam in beams], [beam.weight for beam in beams]
        if scorer.top is None:
            return dense_joint(scorer.log_probs(self.row, nodes), nodes, weights, self.config, name)
        return compact_joint(*scorer.tops(self.row, nodes), nodes, weights, self.config, name)

    def _verify_forest(self, root: RootContext, layers: list[_DraftedLayer]) -> list[LayerRecord]:
        """Judge layer after layer; after the last one that passes, draw one more from the target."""
        records: list[LayerRecord] = []
        for layer in layers:
            with self.clock.phase("verify"):
                target = self._joint(self.target, self.beams, "target")
            context = TargetContext(layer.context, target, len(layer.picks), tuple(records))
            records.append(self._commit_drafted(context, target, layer))
            if self.done or not records[-1].passed:
                return records
        with self.clock.phase("verify"):
            target = self._joint(self.target, self.beams, "target")
        draft_context = DraftContext(
            root,
            len(layers) + 1,
            np.array([beam.weight for beam in self.beams]),
            target,
            drafted=False,
            widths=tuple(len(layer.picks) for layer in layers),
            draft_hidden=None,
        )
        records.append(self._commit_drawn(TargetContext(draft_context, target, 0, tuple(records)), target))
        return records

    def _target_width(self, context: TargetContext) -> int:
        with self.clock.phase("policy"):
            return _clip(self.policy.target_width(context), self.config.min_width, self.config.target_width)

    def _commit_drafted(self, context: TargetContext, target: Joint | DenseJoint, layer: _DraftedLayer) -> LayerRecord:
        """Verify one layer and go on with its slots."""
        config = self.config
        width = self._target_width(context)
        with self.clock.phase("verify"):
            verdict, slots = judge_layer(
                target,
                layer.joint,
                layer.picks,
                target_width=width,
                limit=config.target_width if config.surplus == "keep" else width,
                refill=config.target_width if config.refill == "full" else width,
                replacement=config.replacement,
                dice=self.dice,
                shadow=self.recorder.shadow if self.recorder is not None else None,
            )
            kept = self._commit(slots)
        record = LayerRecord(context.draft.layer, context.draft_width, width, verdict.accepted, verdict.passed)
        self._log(LayerEvent(context, record, verdict, kept))
        return record

    def _commit_drawn(self, context: TargetContext, target: Joint | DenseJoint) -> LayerRecord:
        """Draw a layer from the target itself."""
        width = self._target_width(context)
        with self.clock.phase("verify"):
            picks = draw_entries(target, width, self.config.replacement, self.dice)
            kept = self._commit(target.entries(list(dict.fromkeys(picks.tolist()))))
        record = LayerRecord(context.draft.layer, 0, width, 0, True)
        self._log(LayerEvent(context, record, None, kept))
        return record

    def _log(self, event: LayerEvent) -> None:
        self.stats.target_widths.append(event.record.target_width)
        self.stats.draft_widths.append(event.record.draft_width)
        self.stats.accepted.append(event.record.accepted)
        if self.recorder is not None:
            self.recorder.layer(event)

    # Hypotheses: shared by every width and by beam sampling itself.

    def _commit(self, children: list[tuple[int, int, float]]) -> list[tuple[int, float]]:
        """Make (parent, token, weight) children the beams; those that ended move to the pool.

        Returns:
            All children as (node, weight), best first.
        """
        beams = _best_first(Beam(self.forest.child(parent, token), weight) for parent, token, weight in children)
        self.touched += [beam.node for beam in beams]
        self.beams = [beam for beam in beams if not self._ended(beam.node)]
        self.stats.new_tokens += 1
        ended = [self._hypothesis(beam, True) for beam in beams if self._ended(beam.node)]
        if ended:
            self.pool = sorted(self.pool + ended, key=lambda h: -h.score)[: self.config.target_width]
        self.done = self._is_done()
        return [(beam.node, beam.weight) for beam in beams]

    def _hypothesis(self, beam: Beam, finished: bool) -> _Hypothesis:
        tokens = self.forest.path(beam.node)
        return _Hypothesis(tokens, beam.weight / len(tokens) ** self.config.length_penalty, finished, beam.node)

    def _is_done(self) -> bool:
        """The stopping rule of transformers' beam search, with target_width hypotheses in the pool."""
        config = self.config
        if not self.beams or self.stats.new_tokens >= config.max_new_tokens:
            return True
        if len(self.pool) < config.target_width:
            return False
        if config.early_stopping is True:
            return True
        longest = config.early_stopping == "never" and config.length_penalty > 0
        length = config.max_new_tokens if longest else self.stats.new_tokens
        return self.pool[-1].score >= self.beams[0].weight / length**config.length_penalty

    def _ended(self, node: int) -> bool:
        return self.forest.tokens[node] in self.eos

    def _prune(self) -> None:
        """Free what leads to no beam."""
        if self.config.one_beam_cache and not self.done:
            self.beams = self.beams[:1]
        live = [beam.node for beam in self.beams]
        dead = self.forest.release(list(set(self.touched)), set(live))
        self.target.forget(self.row, dead, live)
        if self.draft is not None:
            self.draft.forget(self.row, dead, live)
        self.touched = []

    def _finish(self) -> DecodeResult:
        growing = [self._hypothesis(beam, False) for beam in self.beams]
        best = sorted(self.pool + growing, key=lambda h: -h.score)
        if self.recorder is not None:
            node, path = best[0].node, []
            while node > 0:
                path.append(node)
                node = self.forest.parents[node]
            self.recorder.end(path[::-1])
        self.stats.target_calls = self.target.calls(self.row)
        self.stats.draft_calls = self.draft.calls(self.row) if self.draft is not None else 0
        self.stats.kv_slots_peak = self.target.cache.slots_peak(self.row)
        self.stats.kv_slots_end = self.target.cache.slots_used(self.row)
        best = best[: self.config.num_return_sequences]
        return DecodeResult([h.tokens for h in best], [h.score for h in best], [h.finished for h in best], self.stats)


def draw_entries(joint: Joint | DenseJoint, count: int, replacement: bool, dice: Dice) -> IntArray:
    """Entries of a joint distribution, in draw order; see `draw`."""
    if isinstance(joint, DenseJoint):
        return draw_dense(joint, count, replacement, dice)
    return draw(joint.probs, count, replacement, dice)


def judge_layer(
    target: Joint | DenseJoint, draft: Joint | DenseJoint, picks: IntArray, **rule: Any
) -> tuple[LayerVerdict, list[tuple[int, int, float]]]:
    """Verify drafts, which are entries `picks` of Q; `rule` as for `verify_layer`.

    Returns:
        The verdict, and its slots as (parent node, token, the target's weight), equal draws once.
    """
    if isinstance(target, DenseJoint) and isinstance(draft, DenseJoint):
        verdict = verify_dense(target, draft, picks, **rule)
        return verdict, target.entries(dict.fromkeys(verdict.slots))
    assert isinstance(target, Joint) and isinstance(draft, Joint)  # both models have one vocabulary and one config
    both = align(target, draft)
    verdict = verify_layer(both.p, both.q, both.of_draft[picks], **rule)
    return verdict, target.entries(both.in_target(list(dict.fromkeys(verdict.slots))))


def _best_first(beams: Iterable[Beam]) -> list[Beam]:
    return sorted(beams, key=lambda beam: -beam.weight)


def _clip(width: int, least: int, most: int) -> int:
    return max(least, min(int(width), most))


class _Clock:
    """Seconds by phase. Passes end with their results on the host, so that no clock has to wait for a device."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.claimed = 0.0

        self._phase, self._began = "other", 0.0

    def phase(self, name: str) -> _Clock:
        """`with clock.phase(name):` adds the time of the block to a phase; blocks do not nest."""
        self._phase = name
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = time.perf_counter() - self._began
        self.seconds[self._phase] += spent
        self.claimed += spent
