"""One prompt decoded by shared noise: the draft guesses the target's draws with the target's own dice. Design 5.2.

A step's selection is a function of P and of the noise of its continuations. Nothing that was drafted is in it, so with
target_width beams at every layer the tokens are those of `beam_sample` with the same seed. What the target has scored
below the beams stays: those parents propose by P itself, without the draft, and are not scored again.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from decoding.dice.dense import DenseJoint, dense_joint
from decoding.dice.noise import PathNoise, seed_of
from decoding.dice.sampling import FloatArray, IntArray, Joint, compact_joint
from decoding.dice.selection import Choice, Race, choose, draft_order, run_race
from decoding.dice.verdict import NEVER, judge, needs
from decoding.forest.node_scorer import NodeScorer, mean_hidden
from decoding.loop.prompt_run import Beam, DraftedLayer, PromptRun, Proposal, Request, best_first
from decoding.policies.base import Candidates, DraftContext, LayerRecord, Parents, RootContext, TargetContext
from decoding.results import LayerEvent

RANKED = 64  # candidates that a policy sees and a trace holds, at most
_LEAST_RANKED = 128  # entries of Q that are put in order, at least; and at least twice the widest draft


@dataclass(frozen=True)
class Guess(Proposal):
    """A proposal of both models, and the race on it."""

    known: list[bool]  # of each parent: Q's entries are P's
    certain: bool  # Q is P: the selection is known, and nothing else is worth a draft
    race: Race


@dataclass(frozen=True)
class Step:
    """What the target and the noise make of a layer, whatever was drafted."""

    candidates: list[Beam]  # in the order in which they were drawn
    choice: Choice


class NoiseRun(PromptRun):
    """The state of one prompt while it is decoded with `verification="shared_noise"`."""

    def _start(self) -> None:
        self.noise = PathNoise(seed_of(self.stream), self.forest, self.target.vocabulary_size)

    # Proposals.

    def _proposal(self, root: RootContext, layer: int, beams: list[Beam]) -> Generator[Request, None, Guess | None]:
        """Q after `beams`: the target's rows where they are known, the draft's for the others.

        Where there are known ones and the policy has the draft's pass left out, or the draft has nothing to say, they
        propose alone.
        """
        scorer = cast(NodeScorer, self.draft)
        known = [beam for beam in beams if self.target.knows(self.row, beam.node)]
        unknown = [beam for beam in beams if not self.target.knows(self.row, beam.node)]
        asked = bool(unknown)
        if known and unknown:
            with self.clock.phase("policy"):
                asked = self.policy.ask_draft(root, layer, self._parents(beams))
        if asked:
            nodes = [beam.node for beam in unknown]
            self._asked.append(len(nodes))
            yield Request("draft", nodes)
            asked = scorer.proposes(self.row, nodes)
        if not known and not asked:
            return None
        # A forest's first parents are the beams themselves: where all are known, so is what the target will select.
        return self._guess(known, unknown if asked else [], certain=layer == 1 and not unknown)

    def _guess(self, known: list[Beam], unknown: list[Beam], certain: bool) -> Guess:
        """Q of the target's rows at `known` parents and the draft's at `unknown` ones."""
        if certain:
            joint = self._joint(self.target, known, "target")
        elif not known:
            joint = self._joint(cast(NodeScorer, self.draft), unknown, "draft")
        else:
            joint = self._mixed(known, unknown)
        config = self.config
        count = max(_LEAST_RANKED, 2 * config.draft_width, config.oversample * config.target_width)
        parents = best_first([*known, *unknown])
        of_target = {beam.node for beam in known}
        is_known = [beam.node in of_target for beam in parents]
        return Guess(joint, parents, is_known, certain, run_race(joint, self.noise, count))

    def _mixed(self, known: list[Beam], unknown: list[Beam]) -> Joint | DenseJoint:
        parts = [(self.target, known), (cast(NodeScorer, self.draft), unknown)]
        rows = [(scorer, [beam.node for beam in beams]) for scorer, beams in parts if beams]
        nodes = [beam.node for beam in (*known, *unknown)]
        weights = [beam.weight for beam in (*known, *unknown)]
        if self.target.top is None:
            log_probs = torch.cat([scorer.log_probs(self.row, of_scorer) for scorer, of_scorer in rows])
            return dense_joint(log_probs, nodes, weights, self._draft_config, "draft")
        values, tokens = _stacked([scorer.tops(self.row, of_scorer) for scorer, of_scorer in rows])
        broken = "target" if np.isnan(values[: len(known)]).any() else "draft"  # if any is
        return compact_joint(values, tokens, nodes, weights, self._draft_config, broken)

    def _draft_context(
        self, root: RootContext, layer: int, proposal: Proposal, widths: tuple[int, ...]
    ) -> DraftContext:
        assert isinstance(proposal, Guess)
        parents = proposal.parents
        nodes = [beam.node for beam in parents]
        seen = self.policy.chooses or self.policy.needs_candidates or self.recorder is not None
        return DraftContext(
            root,
            layer,
            np.array([beam.weight for beam in parents]),
            proposal.joint,
            widths=widths,
            draft_hidden=mean_hidden(cast(NodeScorer, self.draft), self.row, nodes),
            known=np.array(proposal.known),
            parents=tuple(nodes),
            places=self._places_of(parents),
            candidates=self._candidates(proposal) if seen else None,
            noise=proposal.race.noise,
        )

    def _parents(self, beams: list[Beam]) -> Parents:
        known = np.array([self.target.knows(self.row, beam.node) for beam in beams])
        nodes, weights = tuple(beam.node for beam in beams), np.array([beam.weight for beam in beams])
        return Parents(nodes, weights, known, self._places_of(beams))

    def _places_of(self, beams: list[Beam]) -> tuple[int, ...]:
        return tuple(self._places[beam.node] for beam in beams) if self._places else ()

    def _candidates(self, guess: Guess) -> Candidates:
        """What could be drafted, in order, with the widest cut of Q."""
        race, forest = guess.race, self.forest
        order = self._draft_order(guess, self.config.draft_width)
        order = order[: self.config.target_width if guess.certain else RANKED]
        known = {beam.node for beam, is_known in zip(guess.parents, guess.known, strict=True) if is_known}
        scored = np.zeros(len(order), dtype=np.bool_)
        for i, (parent, token) in enumerate(
            zip(race.parents[order].tolist(), race.tokens[order].tolist(), strict=True)
        ):
            if parent in known:  # a node is scored after its parent
                node = forest.find(parent, token)
                scored[i] = node is not None and self.target.knows(self.row, node)
        parents, row_of = race.parents[order], {beam.node: row for row, beam in enumerate(guess.parents)}
        rows = np.array([row_of[node] for node in parents.tolist()], dtype=np.int64)
        of_race = race.picks[order], race.keys[order], race.probs[order]
        return Candidates(*of_race, parents, rows, race.tokens[order], scored)

    def _chosen(self, context: DraftContext, proposal: Proposal) -> IntArray:
        if not self.policy.chooses:
            return super()._chosen(context, proposal)
        assert context.candidates is not None
        with self.clock.phase("policy"):
            places = self.policy.choose(context)[: self.config.draft_width]
        return context.candidates.entries[places if len(places) else [0]]

    def _sent(self, layers: list[DraftedLayer]) -> list[DraftedLayer]:
        if not self.policy.chooses or not layers:
            return layers
        with self.clock.phase("policy"):
            masks = self.policy.send([layer.context for layer in layers])
        sent, above = [], {beam.node for beam in self.beams}
        for layer, mask in zip(layers, masks, strict=True):
            stay = [i for i, node in enumerate(layer.nodes) if mask[i] and self.forest.parents[node] in above]
            if not stay:
                break
            nodes, weights = [layer.nodes[i] for i in stay], [layer.weights[i] for i in stay]
            sent.append(replace(layer, picks=layer.picks[stay], nodes=nodes, weights=weights))
            above = set(nodes)
        return sent

    def _propose(self, proposal: Proposal, width: int) -> IntArray:
        """The first of Q's own selection, by the noise that the target's will be made with."""
        assert isinstance(proposal, Guess)
        most = min(width, self.config.target_width) if proposal.certain else width
        return proposal.race.picks[self._draft_order(proposal, width)[:most]]

    def _draft_order(self, guess: Guess, width: int) -> IntArray:
        """Places of the race on Q in the order in which they are drafted; what cannot be continued needs no pass."""
        config, race, joint = self.config, guess.race, guess.joint
        live = ~np.isin(race.tokens, list(self.eos)) if self.eos else np.ones(len(race), dtype=bool)
        cut = config.draft_cut(width)
        if not guess.certain and isinstance(joint, Joint) and config.warp == "joint" and cut and cut < len(joint):
            live &= joint.probs[race.picks] >= np.partition(joint.probs, -cut)[-cut]  # Q was cut for the widest draft
        return draft_order(race, live, config.target_width, config.oversample)

    # Steps.

    def _step(self, target: Joint | DenseJoint) -> Step:
        """The selection, by P and the noise alone."""
        config = self.config
        race = run_race(target, self.noise, config.oversample * config.target_width)
        weights = race.weights.tolist()
        children = zip(race.parents.tolist(), race.tokens.tolist(), weights, strict=True)
        candidates = [Beam(self.forest.child(parent, token), weight) for parent, token, weight in children]
        nodes = [beam.node for beam in candidates]
        self.touched += nodes
        self._mark_stopped(nodes)
        hits = [self._ended(node) for node in nodes]
        if config.oversample > 1 and self.stats.new_tokens + 1 >= config.max_new_tokens:
            hits = [True] * len(nodes)  # as in transformers: the last token ends all, and the first drawn count
        return Step(candidates, choose(weights, hits, config.target_width, config.oversample))

    def _commit_drafted(self, context: TargetContext, target: Joint | DenseJoint, layer: DraftedLayer) -> LayerRecord:
        """Go on while the first M of the selection need no further pass."""
        config = self.config
        width = self._target_width(context)
        with self.clock.phase("verify"):
            step = self._step(target)
            choice = step.choice
            known = [self.target.knows(self.row, step.candidates[i].node) for i in choice.growing]
            verdict = judge(choice.growing_places, known, choice.size, width)
            growing, ended = choice.first(width)
            if verdict.passed and config.surplus == "keep":
                growing = [i for i, is_known in zip(choice.growing, known, strict=True) if is_known]
                ended = choice.ended
            elif not verdict.passed and config.refill == "full":
                growing, ended = choice.growing, choice.ended
            kept = self._keep(step, growing, ended)
        record = LayerRecord(context.draft.layer, context.draft_width, width, verdict.accepted, verdict.passed)
        need = self._needs(step, layer, known) if self.recorder is not None else []
        self._log(LayerEvent(context, record, None, kept, self._drawn, need))
        return record

    def _commit_drawn(self, context: TargetContext, target: Joint | DenseJoint) -> LayerRecord:
        """Take a layer that nothing was drafted for."""
        width = self._target_width(context)
        with self.clock.phase("verify"):
            step = self._step(target)
            kept = self._keep(step, *step.choice.first(width))
        record = LayerRecord(context.draft.layer, 0, width, 0, True)
        self._log(LayerEvent(context, record, None, kept, self._drawn))
        return record

    def _keep(self, step: Step, growing: list[int], ended: list[int]) -> list[tuple[int, float]]:
        """Go on with some candidates; those kept in the order of draws where that is the order of the selection."""
        kept = [*growing, *ended]
        return self._settle([step.candidates[i] for i in (sorted(kept) if self.config.oversample == 1 else kept)])

    def _needs(self, step: Step, layer: DraftedLayer, known: list[bool]) -> list[int]:
        """How many drafts hold the first j of the selection; what earlier passes have scored needs none."""
        guess = cast(Guess, layer.proposal)
        order, forest, drafted = self._draft_order(guess, self.config.draft_width), self.forest, set(layer.nodes)
        ranked = zip(guess.race.parents[order].tolist(), guess.race.tokens[order].tolist(), strict=True)
        rank_of = {child: rank for rank, child in enumerate(ranked, 1)}
        ranks = []
        for i, is_known in zip(step.choice.growing, known, strict=True):
            node = step.candidates[i].node
            rank = rank_of.get((forest.parents[node], forest.tokens[node]), NEVER)
            ranks.append(0 if is_known and node not in drafted else rank)
        return needs(step.choice.growing_places, ranks, step.choice.size)

    def _all_known(self) -> bool:
        return all(self.target.knows(self.row, beam.node) for beam in self.beams)

    # What stays.

    def _living(self) -> list[int]:
        """Beams, and what the target has scored below them."""
        living = dict.fromkeys(beam.node for beam in self.beams)
        for node in sorted(self.target.known(self.row)):  # parents are older than their children
            if self.forest.parents[node] in living:
                living[node] = None
        return list(living)

    def _prune(self) -> list[int]:
        dead = super()._prune()
        self.noise.forget(dead)
        return dead


def _stacked(tables: list[tuple[FloatArray, IntArray]]) -> tuple[FloatArray, IntArray]:
    """Rows of likeliest tokens of several scorers as one table; -inf where one has fewer columns."""
    width = max(values.shape[1] for values, _ in tables)
    count = sum(len(values) for values, _ in tables)
    all_values, all_tokens = np.full((count, width), -np.inf), np.zeros((count, width), dtype=np.int64)
    first = 0
    for values, tokens in tables:
        rows, columns = values.shape
        all_values[first : first + rows, :columns], all_tokens[first : first + rows, :columns] = values, tokens
        first += rows
    return all_values, all_tokens
