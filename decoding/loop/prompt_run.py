"""One prompt's decoding: draft a forest, verify it, commit what was accepted. 2409.16560.

A `PromptRun` is a coroutine: it stops where it needs nodes scored, so that a batch can serve several in one pass.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from decoding.config import DecodingConfig
from decoding.dice.acceptance import LayerVerdict, align, verify_layer
from decoding.dice.dense import DenseJoint, dense_joint, draw_dense, verify_dense
from decoding.dice.sampling import Dice, IntArray, Joint, compact_joint, draw
from decoding.forest.node_scorer import NodeScorer, mean_hidden
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.loop.processing import Rules
from decoding.policies.base import DraftContext, IterationRecord, LayerRecord, RootContext, TargetContext, WidthPolicy
from decoding.results import DecodeResult, DecodeStats, LayerEvent, Recorder


@dataclass(frozen=True)
class Beam:
    """A hypothesis that still grows."""

    node: int
    weight: float


@dataclass(frozen=True)
class Hypothesis:
    tokens: list[int]
    score: float
    finished: bool
    node: int


@dataclass(frozen=True)
class DraftedLayer:
    context: DraftContext
    joint: Joint | DenseJoint  # Q
    picks: np.ndarray  # [w] entries of Q, in draw order
    nodes: list[int]  # [w] the drafts


@dataclass(frozen=True)
class Request:
    """What a prompt waits for: nodes scored by one of the models."""

    model: str  # "target" or "draft"
    nodes: list[int]


class PromptRun:
    """The state of one prompt while it is decoded.

    Args:
        index: of the prompt among those of the call.
        row: that it holds in the scorers.
        prompt_tokens: its length.
        config, policy: what to decode; the policy decides for this prompt alone.
        ends: token ids that end a hypothesis.
        stream: its random numbers.
        recorder: is told of every layer.
        scorers: of the "target", and of the "draft" where there is one.
        rules: of the caller, for this prompt.
    """

    def __init__(
        self,
        index: int,
        row: int,
        prompt_tokens: int,
        config: DecodingConfig,
        policy: WidthPolicy,
        ends: frozenset[int],
        stream: torch.Generator,
        recorder: Recorder | None,
        scorers: Mapping[str, NodeScorer],
        rules: Rules | None = None,
    ) -> None:
        self.index, self.row, self.config, self.policy, self.eos = index, row, config, policy, ends
        self.dice, self.recorder, self.rules = Dice(stream), recorder, rules
        self.forest = TokenForest()
        self.stats = DecodeStats(prompt_tokens=prompt_tokens)
        self.clock = _Clock(self.stats.seconds)
        self.target, self.draft = cast(ForestScorer, scorers["target"]), scorers.get("draft")
        self.beams = [Beam(0, 0.0)]
        self.pool: list[Hypothesis] = []  # ended on EOS, best first
        self.touched: list[int] = []  # nodes made or used in this iteration
        self._drawn: list[int] = []  # nodes of the last layer, in the order of its slots
        self._stopped: set[int] = set()  # nodes that a stopping criterion ended
        self._told = 0  # tokens that the listener knows
        self.history: tuple[LayerRecord, ...] = ()
        self.done = False
        self.result: DecodeResult | None = None
        self.request = Request("target", [])
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

    def process(self, nodes: Sequence[int], logits: Tensor) -> Tensor:
        """What the models' scores count as: log-probabilities, or what processors make of them; [N, V] both ways.

        As in transformers, processors see logits where one beam is kept and log-probabilities where several are, and
        what they return is not normalised again with several.
        """
        alone = self.config.target_width == 1
        scores = logits if alone else logits.log_softmax(-1)
        if self.rules is not None and self.rules.processors is not None:
            scores = self.rules.process([self.forest.path(node) for node in nodes], scores)
        early = [i for i, node in enumerate(nodes) if self.forest.depths[node] < self.config.min_new_tokens]
        if early and self.eos:
            scores = scores.clone()
            rows = torch.tensor(early, device=scores.device)[:, None]
            scores[rows, torch.tensor(sorted(self.eos), device=scores.device)] = -torch.inf
        if not alone:
            return scores
        possible = (scores > -torch.inf).any(-1, keepdim=True)  # not where all that a draft knows is forbidden
        return torch.where(possible, scores.log_softmax(-1), scores)

    def _decode(self) -> Generator[Request]:
        self.policy.reset(self.config)
        while not self.done:
            yield from self._iterate()
        self.result = self._finish()

    # One iteration: draft, verify, commit.

    def _iterate(self) -> Generator[Request]:
        seconds_before = self.stats.total_seconds
        committed_before = self.stats.new_tokens
        root = self._root_context()
        layers = (yield from self._draft_forest(root, self.draft)) if self.draft is not None else []
        drafted = [node for layer in layers for node in layer.nodes]
        if self.recorder is not None:
            self.recorder.drafted(self.forest, [(beam.node, beam.weight) for beam in self.beams], _weighted(layers))
        wanted = dict.fromkeys([beam.node for beam in self.beams] + [n for n in drafted if not self._ended(n)])
        yield Request("target", list(wanted))
        roots, drafts = len(self.beams), tuple(len(layer.nodes) for layer in layers)
        self.touched += [beam.node for beam in self.beams] + drafted
        self.history = tuple(self._verify_forest(root, layers))
        self._prune()
        self._tell()
        self.stats.iterations += 1
        tokens, seconds = self.stats.new_tokens - committed_before, self.stats.total_seconds - seconds_before
        record = IterationRecord(self.history, tokens, seconds, roots, drafts)
        self.stats.records.append(record)
        with self.clock.phase("policy"):
            self.policy.observe(record)

    def _root_context(self) -> RootContext:
        best = self.beams[0].node
        scored = best if self.target.cache.holds(self.row, best) else self.forest.parents[best]
        return RootContext(
            config=self.config,
            iteration=self.stats.iterations,
            remaining=self.config.max_new_tokens - self.stats.new_tokens,
            weights=np.array([beam.weight for beam in self.beams]),
            history=self.history,
            target_hidden=mean_hidden(self.target, self.row, [scored]),
        )

    def _draft_forest(self, root: RootContext, scorer: NodeScorer) -> Generator[Request, None, list[DraftedLayer]]:
        """Draw up to γ layers from the draft; the last token before max_new_tokens is never drafted.

        Where it has nothing to propose for any beam, nothing further is drafted: known before the layer is drawn.
        """
        layers: list[DraftedLayer] = []
        beams = self.beams
        widths: tuple[int, ...] = ()
        for layer in range(1, min(self.config.draft_depth, root.remaining - 1) + 1):
            with self.clock.phase("policy"):
                further = self.policy.draft_further(root, layer, widths)
            if not further or not beams:
                break
            nodes = [beam.node for beam in beams]
            yield Request("draft", nodes)
            if not scorer.proposes(self.row, nodes):
                break
            joint = self._joint(scorer, beams, "draft")
            hidden = mean_hidden(scorer, self.row, nodes)
            context = DraftContext(
                root, layer, np.array([beam.weight for beam in beams]), joint, True, widths, draft_hidden=hidden
            )
            with self.clock.phase("policy"):
                width = _clip(self.policy.draft_width(context), 1, self.config.draft_width)
            picks = self._propose(joint, width)
            drafts = joint.entries(picks)
            nodes = [self.forest.child(parent, token) for parent, token, _ in drafts]
            layers.append(DraftedLayer(context, joint, picks, nodes))
            weights = {node: weight for node, (_, _, weight) in zip(nodes, drafts, strict=True)}
            beams = _best_first(Beam(node, weight) for node, weight in weights.items() if not self._ended(node))
            widths = (*widths, len(picks))
        return layers

    def _propose(self, joint: Joint | DenseJoint, width: int) -> IntArray:
        """Entries of Q to draft, in order."""
        return draw_entries(joint, width, self.config.replacement, self.dice)

    def _joint(self, scorer: NodeScorer, beams: list[Beam], name: str) -> Joint | DenseJoint:
        nodes, weights = [beam.node for beam in beams], [beam.weight for beam in beams]
        if scorer.top is None:
            return dense_joint(scorer.log_probs(self.row, nodes), nodes, weights, self.config, name)
        return compact_joint(*scorer.tops(self.row, nodes), nodes, weights, self.config, name)

    def _verify_forest(self, root: RootContext, layers: list[DraftedLayer]) -> list[LayerRecord]:
        """Judge layer after layer; after the last one that passes, draw one more from the target."""
        records: list[LayerRecord] = []
        for layer in layers:
            with self.clock.phase("verify"):
                target = self._joint(self.target, self.beams, "target")
            weights = np.array([beam.weight for beam in self.beams])
            context = TargetContext(layer.context, target, len(layer.picks), tuple(records), weights)
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

    def _commit_drafted(self, context: TargetContext, target: Joint | DenseJoint, layer: DraftedLayer) -> LayerRecord:
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
        self._log(LayerEvent(context, record, verdict, kept, self._drawn))
        return record

    def _commit_drawn(self, context: TargetContext, target: Joint | DenseJoint) -> LayerRecord:
        """Draw a layer from the target itself."""
        width = self._target_width(context)
        with self.clock.phase("verify"):
            picks = draw_entries(target, width, self.config.replacement, self.dice)
            kept = self._commit(target.entries(list(dict.fromkeys(picks.tolist()))))
        record = LayerRecord(context.draft.layer, 0, width, 0, True)
        self._log(LayerEvent(context, record, None, kept, self._drawn))
        return record

    def _log(self, event: LayerEvent) -> None:
        if self.recorder is not None:
            self.recorder.layer(event)

    # Hypotheses: shared by every width and by beam sampling itself.

    def _commit(self, children: list[tuple[int, int, float]]) -> list[tuple[int, float]]:
        """Make (parent, token, weight) children the beams; those that ended move to the pool.

        Returns:
            All children as (node, weight), best first.
        """
        drawn = [Beam(self.forest.child(parent, token), weight) for parent, token, weight in children]
        self._drawn = [beam.node for beam in drawn]
        beams = _best_first(drawn)
        self.touched += [beam.node for beam in beams]
        self._mark_stopped([beam.node for beam in beams])
        self.beams = [beam for beam in beams if not self._ended(beam.node)]
        self.stats.new_tokens += 1
        ended = [self._hypothesis(beam, True) for beam in beams if self._ended(beam.node)]
        if ended:
            self.pool = sorted(self.pool + ended, key=lambda h: -h.score)[: self.config.target_width]
        self.done = self._is_done()
        return [(beam.node, beam.weight) for beam in beams]

    def _hypothesis(self, beam: Beam, finished: bool) -> Hypothesis:
        tokens = self.forest.path(beam.node)
        return Hypothesis(tokens, beam.weight / len(tokens) ** self.config.length_penalty, finished, beam.node)

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
        return self.forest.tokens[node] in self.eos or node in self._stopped

    def _mark_stopped(self, nodes: Sequence[int]) -> None:
        """Ask the caller's stopping criteria about nodes of one layer."""
        if self.rules is not None and self.rules.criteria is not None:
            stops = self.rules.stops([self.forest.path(node) for node in nodes], self.target.device)
            self._stopped.update(node for node, stop in zip(nodes, stops, strict=True) if stop)

    def _tell(self) -> None:
        """Tell the listener which further tokens all hypotheses share."""
        if self.rules is None or self.rules.listener is None:
            return
        paths = [self.forest.path(beam.node) for beam in self.beams] + [ended.tokens for ended in self.pool]
        if paths:
            first, last = min(paths), max(paths)  # of sorted sequences the outer two differ first
            shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
            self._tell_up_to(first[:shared])

    def _tell_up_to(self, tokens: list[int]) -> None:
        if self.rules is not None and self.rules.listener is not None and len(tokens) > self._told:
            self.rules.listener(tokens[self._told :])
            self._told = len(tokens)

    def _prune(self) -> None:
        """Free what leads to no beam."""
        if self.config.one_beam_cache and not self.done:
            self.beams = self.beams[:1]
        live = self._living()
        dead = self.forest.release(list(set(self.touched)), set(live))
        self.target.forget(self.row, dead, live)
        if self.draft is not None:
            self.draft.forget(self.row, dead, live)
        self.touched = []

    def _living(self) -> list[int]:
        """Nodes whose paths stay."""
        return [beam.node for beam in self.beams]

    def _hypotheses(self) -> list[Hypothesis]:
        """What may be returned."""
        return self.pool + [self._hypothesis(beam, False) for beam in self.beams]

    def _finish(self) -> DecodeResult:
        best = sorted(self._hypotheses(), key=lambda h: -h.score)
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
        self._tell_up_to(best[0].tokens)
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


def _weighted(layers: Iterable[DraftedLayer]) -> list[list[tuple[int, float]]]:
    """Each layer's drafts as (node, the draft's weight), in draw order."""
    entries = [layer.joint.entries(layer.picks) for layer in layers]
    return [
        [(node, weight) for node, (_, _, weight) in zip(layer.nodes, drafts, strict=True)]
        for layer, drafts in zip(layers, entries, strict=True)
    ]


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
