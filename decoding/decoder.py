"""DSBDDecoder: draft a forest, verify it in one target pass, commit what was accepted. 2409.16560.

`beam_sample` is the same engine without a draft model: each iteration draws one layer from the target.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from decoding.acceptance import Aligned, LayerVerdict, align, verify_layer
from decoding.config import DecodingConfig
from decoding.errors import UserError
from decoding.forest import TokenForest
from decoding.pair import ModelPair, check_prompt, end_tokens
from decoding.sampling import Dice, Joint, draw, joint_distribution
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

PHASES = ("draft", "target", "verify", "policy", "other")
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
    parents: np.ndarray  # [w] node of each draft's parent, in draw order
    tokens: np.ndarray  # [w]


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
        recorder: Recorder | None = None,
    ) -> list[DecodeResult]:
        """Continue each prompt.

        Args:
            prompts: lists of token ids or 1-D tensors, or one 2-D tensor.
            generator: random stream; one per prompt makes a prompt's result independent of its neighbours.
            recorder: is told of every layer; one prompt at a time.

        Returns:
            One DecodeResult per prompt, with config.num_return_sequences hypotheses where there are as many.

        Raises:
            UserError: a prompt that the models cannot take, or NaN logits.
        """
        rows = as_token_lists(prompts)
        for i, row in enumerate(rows):
            check_prompt(self.pair, row, self.config, i)
        results = []
        for row, stream in zip(rows, _streams(generator, len(rows)), strict=True):
            run = _PromptRun(self.pair, self.config, self.policy, row, Dice(stream), recorder)
            try:
                results.append(run.decode())
            finally:
                run.close()
        return results


def beam_sample(
    target: torch.nn.Module,
    prompts: Prompts,
    config: DecodingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> list[DecodeResult]:
    """Beam sampling with the target alone, on the same engine and with the same semantics as DSBDDecoder.

    Args, Returns, Raises: as `DSBDDecoder.generate`; drafting settings are ignored.
    """
    pair = ModelPair(target=target, draft=None, tokenizer=None)
    return DSBDDecoder(pair, config.with_changes(draft_depth=0)).generate(prompts, generator)


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


def _streams(generator: torch.Generator | Sequence[torch.Generator] | None, count: int) -> Iterator[torch.Generator]:
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if isinstance(generator, torch.Generator):
        return iter([generator] * count)
    if len(generator) != count:
        raise UserError(f"{len(generator)} generators for {count} prompts; give one generator, or one for each prompt.")
    return iter(generator)


class _PromptRun:
    """The state of one prompt while it is decoded."""

    def __init__(
        self,
        pair: ModelPair,
        config: DecodingConfig,
        policy: WidthPolicy,
        prompt: list[int],
        dice: Dice,
        recorder: Recorder | None,
    ) -> None:
        self.config, self.policy, self.dice, self.recorder = config, policy, dice, recorder
        self.eos = end_tokens(pair, config)
        self.forest = TokenForest()
        self.stats = DecodeStats(prompt_tokens=len(prompt))
        self.clock = _Clock(self.stats.seconds, next(pair.target.parameters()).device)
        spare = config.max_new_tokens + config.draft_width * config.draft_depth + 2 * config.target_width
        needs_hidden = policy.needs_hidden or recorder is not None

        def scorer(model: torch.nn.Module) -> ForestScorer:
            return ForestScorer(model, prompt, self.forest, spare, config.temperature, needs_hidden)

        self.target = scorer(pair.target)
        self.draft = scorer(pair.draft) if pair.draft is not None and config.draft_depth > 0 else None
        self.beams = [Beam(0, 0.0)]
        self.pool: list[_Hypothesis] = []  # ended on EOS, best first
        self.touched: list[int] = []  # nodes made or used in this iteration
        self.history: tuple[LayerRecord, ...] = ()
        self.done = False

    def close(self) -> None:
        """Take hooks off the models."""
        for scorer in (self.target, self.draft):
            if scorer is not None:
                scorer.close()

    def decode(self) -> DecodeResult:
        """Run to the end."""
        self.clock.start()
        self.policy.reset(self.config)
        with self.clock.phase("target"):
            self.target.prefill()
        if self.draft is not None:
            with self.clock.phase("draft"):
                self.draft.prefill()
        while not self.done:
            self._iterate()
        result = self._finish()
        self.clock.stop()
        return result

    # One iteration: draft, verify, commit.

    def _iterate(self) -> None:
        before = dict(self.stats.seconds)
        began = time.perf_counter()
        committed_before = self.stats.new_tokens
        root = self._root_context()
        layers = self._draft_forest(root) if self.draft is not None else []
        drafted = [child for layer in layers for child in self._children(layer)]
        with self.clock.phase("target"):
            self.target.score(
                list(dict.fromkeys([beam.node for beam in self.beams] + [n for n in drafted if not self._ended(n)]))
            )
        forest_nodes = len(set(drafted))
        self.touched += [beam.node for beam in self.beams] + drafted
        self.history = tuple(self._verify_forest(root, layers))
        self._prune()
        self.stats.iterations += 1
        record = IterationRecord(self.history, self.stats.new_tokens - committed_before, time.perf_counter() - began)
        with self.clock.phase("policy"):
            self.policy.observe(record)
        if self.recorder is not None:
            self.recorder.iteration(
                {name: self.stats.seconds[name] - before[name] for name in PHASES} | {"iteration": record.seconds},
                forest_nodes,
            )

    def _root_context(self) -> RootContext:
        hidden = None
        if self.policy.needs_hidden or self.recorder is not None:
            best = self.beams[0].node
            scored = best if self.target.cache.holds(best) else self.forest.parents[best]
            hidden = self.target.hidden([scored])
        return RootContext(
            config=self.config,
            iteration=self.stats.iterations,
            remaining=self.config.max_new_tokens - self.stats.new_tokens,
            weights=np.array([beam.weight for beam in self.beams]),
            history=self.history,
            target_hidden=hidden,
        )

    def _draft_forest(self, root: RootContext) -> list[_DraftedLayer]:
        """Draw up to γ layers from the draft model; the last token before max_new_tokens is never drafted."""
        assert self.draft is not None
        layers: list[_DraftedLayer] = []
        beams = self.beams
        widths: tuple[int, ...] = ()
        for layer in range(1, min(self.config.draft_depth, root.remaining - 1) + 1):
            with self.clock.phase("policy"):
                further = self.policy.draft_further(root, layer, widths)
            if not further or not beams:
                break
            nodes = [beam.node for beam in beams]
            with self.clock.phase("draft"):
                self.draft.score(nodes)
                joint = self._joint(self.draft, beams, "draft")
                hidden = self.draft.hidden(nodes)
            context = DraftContext(
                root, layer, np.array([beam.weight for beam in beams]), joint, True, widths, draft_hidden=hidden
            )
            with self.clock.phase("policy"):
                width = _clip(self.policy.draft_width(context), 1, self.config.draft_width)
            with self.clock.phase("draft"):
                picks = draw(joint.probs, width, self.config.replacement, self.dice)
                layers.append(_DraftedLayer(context, joint.parents[picks], joint.tokens[picks]))
                beams = self._grow(layers[-1], joint.weights[picks])
            widths = (*widths, len(picks))
        return layers

    def _grow(self, layer: _DraftedLayer, weights: np.ndarray) -> list[Beam]:
        """The drafts of a layer as beams with draft weights, best first; those that ended do not grow."""
        by_node = dict(zip(self._children(layer), weights.tolist(), strict=True))
        return _best_first(Beam(node, weight) for node, weight in by_node.items() if not self._ended(node))

    def _children(self, layer: _DraftedLayer) -> list[int]:
        return [
            self.forest.child(parent, token)
            for parent, token in zip(layer.parents.tolist(), layer.tokens.tolist(), strict=True)
        ]

    def _joint(self, scorer: ForestScorer, beams: list[Beam], name: str) -> Joint:
        nodes = [beam.node for beam in beams]
        return joint_distribution(scorer.log_probs(nodes), nodes, [beam.weight for beam in beams], self.config, name)

    def _verify_forest(self, root: RootContext, layers: list[_DraftedLayer]) -> list[LayerRecord]:
        """Judge layer after layer; after the last one that passes, draw one more from the target."""
        records: list[LayerRecord] = []
        for layer in layers:
            with self.clock.phase("verify"):
                target = self._joint(self.target, self.beams, "target")
            context = TargetContext(layer.context, target, len(layer.tokens), tuple(records))
            records.append(self._commit_drafted(context, layer))
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
            widths=tuple(len(layer.tokens) for layer in layers),
            draft_hidden=None,
        )
        records.append(self._commit_drawn(TargetContext(draft_context, target, 0, tuple(records))))
        return records

    def _target_width(self, context: TargetContext) -> int:
        with self.clock.phase("policy"):
            return _clip(self.policy.target_width(context), self.config.min_width, self.config.target_width)

    def _commit_drafted(self, context: TargetContext, layer: _DraftedLayer) -> LayerRecord:
        """Verify one layer and go on with its slots."""
        config = self.config
        width = self._target_width(context)
        with self.clock.phase("verify"):
            both = align(context.target, context.draft.joint)
            verdict = verify_layer(
                both.p,
                both.q,
                both.find(layer.parents, layer.tokens),
                target_width=width,
                limit=config.target_width if config.surplus == "keep" else width,
                refill=config.target_width if config.refill == "full" else width,
                replacement=config.replacement,
                dice=self.dice,
                shadow=self.recorder.shadow if self.recorder is not None else None,
            )
            kept = self._commit(_slots(both, verdict.slots, context.target))
        record = LayerRecord(context.draft.layer, context.draft_width, width, verdict.accepted, verdict.passed)
        self._log(LayerEvent(context, record, verdict, kept))
        return record

    def _commit_drawn(self, context: TargetContext) -> LayerRecord:
        """Draw a layer from the target itself."""
        width = self._target_width(context)
        with self.clock.phase("verify"):
            target = context.target
            picks = draw(target.probs, width, self.config.replacement, self.dice)
            children = [
                (int(target.parents[i]), int(target.tokens[i]), float(target.weights[i])) for i in dict.fromkeys(picks)
            ]
            kept = self._commit(children)
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
        self.target.forget(dead, live)
        if self.draft is not None:
            self.draft.forget(dead, live)
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
        self.stats.target_calls = self.target.calls
        self.stats.draft_calls = self.draft.calls if self.draft is not None else 0
        self.stats.kv_slots_peak = self.target.cache.slots_peak
        self.stats.kv_slots_end = self.target.cache.slots_used
        best = best[: self.config.num_return_sequences]
        return DecodeResult([h.tokens for h in best], [h.score for h in best], [h.finished for h in best], self.stats)


def _slots(both: Aligned, slots: list[int], target: Joint) -> list[tuple[int, int, float]]:
    """Verified slots as (parent, token, target weight); equal draws once."""
    weight_of = dict(
        zip(zip(target.parents.tolist(), target.tokens.tolist(), strict=True), target.weights.tolist(), strict=True)
    )
    return [
        (parent, token, weight_of[parent, token]) for parent, token in both.nodes_and_tokens(list(dict.fromkeys(slots)))
    ]


def _best_first(beams: Iterator[Beam]) -> list[Beam]:
    return sorted(beams, key=lambda beam: -beam.weight)


def _clip(width: int, least: int, most: int) -> int:
    return max(least, min(int(width), most))


class _Clock:
    """Wall seconds by phase; what no phase claims is "other". Waits for the device before it reads the clock."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds, self._device = seconds, device
        self._began = 0.0

    def start(self) -> None:
        self._began = self._now()

    def stop(self) -> None:
        total = self._now() - self._began
        self.seconds["other"] = max(0.0, total - sum(self.seconds[name] for name in PHASES if name != "other"))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        began = self._now()
        try:
            yield
        finally:
            self.seconds[name] += self._now() - began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
