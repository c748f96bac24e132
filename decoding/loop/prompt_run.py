"""One prompt's decoding: draft a forest, verify it, commit what was accepted. 2409.16560.

A `PromptRun` is a coroutine: it stops where it needs nodes scored, so that a batch can serve several in one pass. What
is proposed and what of it is kept are its subclasses' matter: `NoiseRun`, `RejectionRun`, `SearchRun`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from decoding.config import DecodingConfig
from decoding.dice.dense import DenseJoint, dense_joint
from decoding.dice.sampling import FloatArray, IntArray, Joint, compact_joint
from decoding.errors import UserError
from decoding.forest.node_scorer import NodeScorer, mean_hidden
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.loop.processing import Rules
from decoding.policies.base import (
    DraftContext,
    IterationRecord,
    LayerRecord,
    Parents,
    RootContext,
    TargetContext,
    WidthPolicy,
)
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
    beams: list[int]  # of each token, the place of its parent among the beams of its step


@dataclass(frozen=True)
class Proposal:
    """What a layer is drafted from."""

    joint: Joint | DenseJoint  # Q
    parents: list[Beam]  # those that Q continues


@dataclass(frozen=True)
class DraftedLayer:
    context: DraftContext
    proposal: Proposal
    picks: np.ndarray  # [w] entries of Q, in draw order
    nodes: list[int]  # [w] the drafts
    weights: list[float]  # [w] the draft's log-weights

    @property
    def joint(self) -> Joint | DenseJoint:
        """Q."""
        return self.proposal.joint


@dataclass(frozen=True)
class Request:
    """What a prompt waits for: nodes scored by one of the models."""

    model: str  # "target" or "draft"
    nodes: list[int]


class PromptRun(ABC):
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
        self.stream, self.recorder, self.rules = stream, recorder, rules
        self.forest = TokenForest()
        self.stats = DecodeStats(prompt_tokens=prompt_tokens)
        self.clock = _Clock(self.stats.seconds)
        self.target, self.draft = cast(ForestScorer, scorers["target"]), scorers.get("draft")
        self.beams = [Beam(0, 0.0)]
        self.pool: list[Hypothesis] = []  # ended on EOS, best first
        self.touched: list[int] = []  # nodes made or used in this iteration
        self._drawn: list[int] = []  # nodes of the last layer, in the order of its slots
        self._stopped: set[int] = set()  # nodes that a stopping criterion ended
        self._places: dict[int, int] = {}  # of the last layer's drafts, in draft order
        self._asked: list[int] = []  # nodes of each draft pass of this iteration
        self._told = 0  # tokens that the listener knows
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}  # node -> the target's scores and logits [V], if rules ask
        self._steps_of: list[dict[int, int]] = []  # of every step, beam -> its place
        self._scores: tuple[Tensor, ...] = ()  # of every step, [M, V]
        self._logits: tuple[Tensor, ...] = ()
        self.history: tuple[LayerRecord, ...] = ()
        self.done = False
        self.result: DecodeResult | None = None
        self.request = Request("target", [])
        self._draft_config = draft_config(config)
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

    def process(self, nodes: Sequence[int], logits: Tensor, of_target: bool) -> Tensor:
        """What the models' scores count as: log-probabilities, or what processors make of them; [N, V] both ways.

        As in transformers, processors see logits where one beam is kept and log-probabilities where several are, and
        what they return is not normalised again with several.
        """
        alone = self.config.target_width == 1
        scores = logits if alone else logits.log_softmax(-1)
        if self.rules is not None and self.rules.processors is not None:
            scores = self.rules.process([self.forest.path(node) for node in nodes], scores)
            if bool((scores.isnan() | (scores == torch.inf)).any()) and not bool(logits.isnan().any()):
                raise UserError(
                    "A logits processor made NaN or infinity of scores that were numbers; mend it, or leave it out (a "
                    "temperature or a penalty close to 0 overflows)."
                )
        early = [i for i, node in enumerate(nodes) if self.forest.depths[node] < self.config.min_new_tokens]
        if early and self.eos:
            scores = scores.clone()
            rows = torch.tensor(early, device=scores.device)[:, None]
            scores[rows, torch.tensor(sorted(self.eos), device=scores.device)] = -torch.inf
        if of_target and self.rules is not None and self.rules.keeps:
            self._rows.update(zip(nodes, zip(scores, logits, strict=True), strict=True))
        if not alone:
            return scores
        possible = (scores > -torch.inf).any(-1, keepdim=True)  # not where all that a draft knows is forbidden
        return torch.where(possible, scores.log_softmax(-1), scores)

    def _decode(self) -> Generator[Request]:
        self._start()
        self.policy.reset(self.config)
        while not self.done:
            yield from self._iterate()
        self.result = self._finish()

    @abstractmethod
    def _start(self) -> None:
        """Take from the stream what the rule needs, before the first iteration."""

    # One iteration: draft, verify, commit.

    def _iterate(self) -> Generator[Request]:
        seconds_before = self._seconds()
        committed_before = self.stats.new_tokens
        root = self._root_context()
        layers = (yield from self._draft_forest(root)) if self.draft is not None else []
        touched = [node for layer in layers for node in layer.nodes]
        contexts, layers = [layer.context for layer in layers], self._sent(layers)
        drafted = [node for layer in layers for node in layer.nodes]
        if self.recorder is not None:
            weighted = [list(zip(layer.nodes, layer.weights, strict=True)) for layer in layers]
            self.recorder.drafted(self.forest, [(beam.node, beam.weight) for beam in self.beams], weighted, contexts)
        wanted = dict.fromkeys([beam.node for beam in self.beams] + [n for n in drafted if not self._ended(n)])
        scored = sum(not self.target.cache.holds(self.row, node) for node in wanted)
        yield Request("target", list(wanted))
        roots, drafts = len(self.beams), tuple(len(layer.nodes) for layer in layers)
        self.touched += [beam.node for beam in self.beams] + touched
        self.history = tuple(self._verify_forest(root, layers))
        self._prune()
        self._tell()
        self.stats.iterations += 1
        tokens, seconds = self.stats.new_tokens - committed_before, self._seconds() - seconds_before
        record = IterationRecord(self.history, tokens, seconds, roots, drafts, scored, tuple(self._asked))
        self._asked.clear()
        self.stats.records.append(record)
        with self.clock.phase("policy"):
            self.policy.observe(record)

    def _seconds(self) -> float:
        """Spent so far, but for the prompt, which the draft reads in the iteration that first asks it."""
        return self.stats.total_seconds - self.stats.seconds["prompt"]

    def _root_context(self) -> RootContext:
        best, weights = self.beams[0].node, np.array([beam.weight for beam in self.beams])
        known = np.array([self.target.knows(self.row, beam.node) for beam in self.beams])
        scored = best if self.target.cache.holds(self.row, best) else self.forest.parents[best]
        return RootContext(
            config=self.config,
            iteration=self.stats.iterations,
            remaining=self.config.max_new_tokens - self.stats.new_tokens,
            weights=weights,
            history=self.history,
            unknown_share=Parents(tuple(beam.node for beam in self.beams), weights, known).unknown_share,
            target_hidden=mean_hidden(self.target, self.row, [scored]),
        )

    def _draft_forest(self, root: RootContext) -> Generator[Request, None, list[DraftedLayer]]:
        """Propose up to γ layers; the last token before max_new_tokens is never drafted.

        Where there is nothing to propose for any beam, nothing further is drafted: known before the layer is drawn.
        """
        layers: list[DraftedLayer] = []
        beams = self.beams
        self._places = {}
        widths: tuple[int, ...] = ()
        for layer in range(1, min(self.config.draft_depth, root.remaining - 1) + 1):
            with self.clock.phase("policy"):
                further = self.policy.draft_further(root, layer, widths)
            if not further or not beams:
                break
            proposal = yield from self._proposal(root, layer, beams)
            if proposal is None:
                break
            drafted = self._draft_layer(root, layer, proposal, widths)
            layers.append(drafted)
            self._places = {node: place for place, node in enumerate(drafted.nodes)}
            weights = dict(zip(drafted.nodes, drafted.weights, strict=True))
            beams = best_first(Beam(node, weight) for node, weight in weights.items() if not self._ended(node))
            widths = (*widths, len(drafted.picks))
        return layers

    def _proposal(self, root: RootContext, layer: int, beams: list[Beam]) -> Generator[Request, None, Proposal | None]:
        """Q after `beams`; None where it has nothing to propose."""
        nodes, scorer = [beam.node for beam in beams], cast(NodeScorer, self.draft)
        self._asked.append(len(nodes))
        yield Request("draft", nodes)
        if not scorer.proposes(self.row, nodes):
            return None
        return Proposal(self._joint(scorer, beams, "draft"), beams)

    def _draft_layer(self, root: RootContext, layer: int, proposal: Proposal, widths: tuple[int, ...]) -> DraftedLayer:
        """Draw a layer's drafts from Q, as many as the policy wants."""
        context = self._draft_context(root, layer, proposal, widths)
        picks = self._chosen(context, proposal)
        drafts = proposal.joint.entries(picks)
        nodes = [self.forest.child(parent, token) for parent, token, _ in drafts]
        return DraftedLayer(context, proposal, picks, nodes, [weight for _, _, weight in drafts])

    def _draft_context(
        self, root: RootContext, layer: int, proposal: Proposal, widths: tuple[int, ...]
    ) -> DraftContext:
        hidden = mean_hidden(cast(NodeScorer, self.draft), self.row, [beam.node for beam in proposal.parents])
        weights = np.array([beam.weight for beam in proposal.parents])
        return DraftContext(root, layer, weights, proposal.joint, True, widths, draft_hidden=hidden)

    def _chosen(self, context: DraftContext, proposal: Proposal) -> IntArray:
        """Entries of Q to draft, as many as the policy wants."""
        with self.clock.phase("policy"):
            width = clip(self.policy.draft_width(context), 1, self.config.draft_width)
        return self._propose(proposal, width)

    def _sent(self, layers: list[DraftedLayer]) -> list[DraftedLayer]:
        """What the policy has the target score of them."""
        return layers

    @abstractmethod
    def _propose(self, proposal: Proposal, width: int) -> IntArray:
        """Entries of Q to draft, in order."""

    def _joint(self, scorer: NodeScorer, beams: list[Beam], name: str) -> Joint | DenseJoint:
        """The joint distribution of one model after scored beams."""
        nodes = [beam.node for beam in beams]
        config = self._draft_config if name == "draft" else self.config
        if scorer.top is None:
            weights = [beam.weight for beam in beams]
            return dense_joint(scorer.log_probs(self.row, nodes), nodes, weights, config, name)
        return self._compact(*scorer.tops(self.row, nodes), beams, config, name)

    def _compact(
        self,
        values: FloatArray,  # [B, K] log-probabilities
        tokens: IntArray,  # [B, K]
        beams: list[Beam],  # B
        config: DecodingConfig,
        name: str,
    ) -> Joint:
        """The joint distribution after some beams, from the likeliest tokens of each."""
        nodes, weights = [beam.node for beam in beams], [beam.weight for beam in beams]
        return compact_joint(values, tokens, nodes, weights, config, name)

    def _verify_forest(self, root: RootContext, layers: list[DraftedLayer]) -> list[LayerRecord]:
        """Judge layer after layer; after the last one that passes, take one more from the target."""
        records: list[LayerRecord] = []
        for layer in layers:
            with self.clock.phase("verify"):
                self._note_step()
                target = self._joint(self.target, self.beams, "target")
            weights = np.array([beam.weight for beam in self.beams])
            # M may depend on P and Q, not on the layer's noise; where there is no choice of M, no copy is made.
            chosen = self.config.min_width < self.config.target_width
            seen = replace(layer.context, noise=None, candidates=None) if chosen else layer.context
            context = TargetContext(seen, target, len(layer.picks), tuple(records), weights)
            record = self._commit_drafted(context, target, layer)
            expected = self.policy.expected_count(context)  # told, not decided by: no time of the policy's
            records.append(record if expected is None else replace(record, expected=expected))
            if self.done or not records[-1].passed:
                return records
        widths = tuple(len(layer.picks) for layer in layers)
        while len(records) == len(layers) or self._all_known():
            with self.clock.phase("verify"):
                self._note_step()
                target = self._joint(self.target, self.beams, "target")
            weights = np.array([beam.weight for beam in self.beams])
            draft_context = DraftContext(root, len(records) + 1, weights, target, drafted=False, widths=widths)
            records.append(self._commit_drawn(TargetContext(draft_context, target, 0, tuple(records)), target))
            if self.done:
                break
        return records

    def _note_step(self) -> None:
        """Keep what rules ask for of the step that follows: which beams it goes on from, and the target's rows there.

        As in transformers, the first step has the prompt's row for each beam; beams that do not exist have -inf.
        """
        if self.rules is None:
            return
        self._steps_of.append({beam.node: place for place, beam in enumerate(self.beams)})
        if not self.rules.keeps:
            return
        width = self.config.target_width
        rows = [self._rows[beam.node] for beam in self.beams]
        rows = rows * width if len(self._steps_of) == 1 else rows
        scores, logits = (torch.stack(kind) for kind in zip(*rows, strict=True))
        missing = scores.new_full((width - len(rows), scores.shape[1]), -torch.inf)
        if self.rules.scores:
            self._scores += (torch.cat([scores, missing]),)
        if self.rules.logits:
            self._logits += (torch.cat([logits, missing]),)

    def _all_known(self) -> bool:
        """Whether a further layer can be taken from the target without a pass."""
        return False

    def _target_width(self, context: TargetContext) -> int:
        with self.clock.phase("policy"):
            return clip(self.policy.target_width(context), self.config.min_width, self.config.target_width)

    @abstractmethod
    def _commit_drafted(self, context: TargetContext, target: Joint | DenseJoint, layer: DraftedLayer) -> LayerRecord:
        """Verify one layer and go on with what is kept of it."""

    @abstractmethod
    def _commit_drawn(self, context: TargetContext, target: Joint | DenseJoint) -> LayerRecord:
        """Take a layer from the target itself."""

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
        self.touched += [beam.node for beam in drawn]
        self._mark_stopped([beam.node for beam in drawn])
        return self._settle(drawn)

    def _settle(self, drawn: list[Beam]) -> list[tuple[int, float]]:
        """Make nodes of a layer, of which it is known whether they end, the beams; as `_commit`."""
        self._drawn = [beam.node for beam in drawn]
        beams = best_first(drawn)
        self.beams = [beam for beam in beams if not self._ended(beam.node)]
        self.stats.new_tokens += 1
        ended = [self._hypothesis(beam, True) for beam in beams if self._ended(beam.node)]
        if ended:
            self.pool = sorted(self.pool + ended, key=lambda h: -h.score)[: self.config.target_width]
        self.done = self._is_done()
        return [(beam.node, beam.weight) for beam in beams]

    def _hypothesis(self, beam: Beam, finished: bool) -> Hypothesis:
        tokens = self.forest.path(beam.node)
        beams, node = [], beam.node
        for places in reversed(self._steps_of):
            node = self.forest.parents[node]
            beams.append(places[node])
        return Hypothesis(
            tokens, beam.weight / len(tokens) ** self.config.length_penalty, finished, beam.node, beams[::-1]
        )

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
            scores = self._scores if self.rules.scores else None
            stops = self.rules.stops([self.forest.path(node) for node in nodes], self.target.device, scores)
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

    def _prune(self) -> list[int]:
        """Free what leads to no beam; returns the nodes that died."""
        if self.config.one_beam_cache and not self.done:
            self.beams = self.beams[:1]
        live = self._living()
        dead = self.forest.release(list(set(self.touched)), set(live))
        self.target.forget(self.row, dead, live)
        if self.draft is not None:
            self.draft.forget(self.row, dead, live)
        self.touched = live  # they may die before they are used again
        self._rows = {node: self._rows[node] for node in live if node in self._rows}
        return dead

    def _living(self) -> list[int]:
        """Nodes whose paths stay."""
        return [beam.node for beam in self.beams]

    def _hypotheses(self) -> list[Hypothesis]:
        """What may be returned; beams that still grow only where max_new_tokens cut them off.

        Where the pool decided that decoding ends, they do not compete with it, as in transformers.
        """
        if self.stats.new_tokens < self.config.max_new_tokens:
            return self.pool
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
        return DecodeResult(
            [h.tokens for h in best],
            [h.score for h in best],
            [h.finished for h in best],
            self.stats,
            [h.beams for h in best],
            self._scores,
            self._logits,
        )


def draft_config(config: DecodingConfig) -> DecodingConfig:
    """The settings that Q is made with: its cut may be wider than P's."""
    cut = config.draft_cut(config.draft_width)
    return config if cut == config.top_k else config.with_changes(top_k=cut, draft_top_k=None)


def best_first(beams: Iterable[Beam]) -> list[Beam]:
    return sorted(beams, key=lambda beam: -beam.weight)


def clip(width: int, least: int, most: int) -> int:
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
