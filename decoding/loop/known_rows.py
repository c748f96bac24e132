"""One prompt that goes on from rows the target has scored: they are neither scored nor guessed again. Design 5.2.

What has been scored below the beams stays from one iteration to the next. Those parents propose by P itself, without
the draft, and where they hold nearly everything the draft's pass is left out. Drafts go by keys: E / P in `NoiseRun`,
and in `SearchRun`, where nothing is drawn, by weight.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch

from decoding.dice.dense import DenseJoint, dense_joint
from decoding.dice.sampling import FloatArray, IntArray, Joint
from decoding.dice.selection import Race, draft_order
from decoding.forest.node_scorer import NodeScorer, mean_hidden
from decoding.loop.prompt_run import Beam, DraftedLayer, PromptRun, Proposal, Request, best_first
from decoding.policies.base import Candidates, DraftContext, Parents, RootContext

RANKED = 64  # candidates that a policy sees and a trace holds, at most


@dataclass(frozen=True)
class Guess(Proposal):
    """A proposal of both models, and the race on it."""

    known: list[bool]  # of each parent: Q's entries are P's
    certain: bool  # Q is P: the selection is known, and nothing else is worth a draft
    race: Race


class KnownRowsRun(PromptRun):
    """The state of one prompt while it is decoded with known rows."""

    @abstractmethod
    def _race(self, joint: Joint | DenseJoint) -> Race:
        """The first entries of Q in the order in which the selection would take them."""

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
        if not asked and not (known and self.target.proposes(self.row, [beam.node for beam in known])):
            return None
        # A forest's first parents are the beams themselves: where all are known, so is what the target will select.
        guess = self._guess(known, unknown if asked else [], certain=layer == 1 and not unknown)
        # All of Q may end there, as an n-gram that nothing but EOS ever followed: then there is no draft to choose.
        drafts = not self.policy.chooses or len(self._draft_order(guess, self.config.draft_width))
        return guess if drafts else None

    def _guess(self, known: list[Beam], unknown: list[Beam], certain: bool) -> Guess:
        """Q of the target's rows at `known` parents and the draft's at `unknown` ones."""
        if certain:
            joint = self._joint(self.target, known, "target")
        elif not known:
            joint = self._joint(cast(NodeScorer, self.draft), unknown, "draft")
        else:
            joint = self._mixed(known, unknown)
        parents = best_first([*known, *unknown])
        of_target = {beam.node for beam in known}
        is_known = [beam.node in of_target for beam in parents]
        return Guess(joint, parents, is_known, certain, self._race(joint))

    def _mixed(self, known: list[Beam], unknown: list[Beam]) -> Joint | DenseJoint:
        parts = [(self.target, known), (cast(NodeScorer, self.draft), unknown)]
        rows = [(scorer, [beam.node for beam in beams]) for scorer, beams in parts if beams]
        if self.target.top is None:
            nodes, weights = zip(*((beam.node, beam.weight) for beam in (*known, *unknown)), strict=True)
            log_probs = torch.cat([scorer.log_probs(self.row, of_scorer) for scorer, of_scorer in rows])
            return dense_joint(log_probs, nodes, weights, self._draft_config, "draft")
        values, tokens = _stacked([scorer.tops(self.row, of_scorer) for scorer, of_scorer in rows])
        broken = "target" if np.isnan(values[: len(known)]).any() else "draft"  # if any is
        return self._compact(values, tokens, [*known, *unknown], self._draft_config, broken)

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
        """The first of Q's own selection, by the keys that the target's will be made by."""
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

    # What stays.

    def _all_known(self) -> bool:
        return all(self.target.knows(self.row, beam.node) for beam in self.beams)

    def _living(self) -> list[int]:
        """Beams, and what the target has scored below them."""
        living = dict.fromkeys(beam.node for beam in self.beams)
        for node in sorted(self.target.known(self.row)):  # parents are older than their children
            if self.forest.parents[node] in living:
                living[node] = None
        return list(living)


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
