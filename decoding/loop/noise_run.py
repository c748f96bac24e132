"""One prompt decoded by shared noise: the draft guesses the target's draws with the target's own dice. Design 5.2.

A step's selection is a function of P and of the noise of its continuations. Nothing that was drafted is in it, so with
target_width beams at every layer the tokens are those of `beam_sample` with the same seed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from decoding.dice.dense import DenseJoint
from decoding.dice.noise import PathNoise, seed_of
from decoding.dice.sampling import Joint
from decoding.dice.selection import Choice, Race, choose, run_race
from decoding.dice.verdict import NEVER, judge, needs
from decoding.loop.known_rows import Guess, KnownRowsRun
from decoding.loop.prompt_run import Beam, DraftedLayer
from decoding.policies.base import LayerRecord, TargetContext
from decoding.results import LayerEvent

_LEAST_RANKED = 128  # entries of Q that are put in order, at least; and at least twice the widest draft


@dataclass(frozen=True)
class Step:
    """What the target and the noise make of a layer, whatever was drafted."""

    candidates: list[Beam]  # in the order in which they were drawn
    choice: Choice


class NoiseRun(KnownRowsRun):
    """The state of one prompt while it is decoded with `verification="shared_noise"`."""

    def _start(self) -> None:
        self.noise = PathNoise(seed_of(self.stream), self.forest, self.target.vocabulary_size)

    def _race(self, joint: Joint | DenseJoint) -> Race:
        config = self.config
        count = max(_LEAST_RANKED, 2 * config.draft_width, config.oversample * config.target_width)
        return run_race(joint, self.noise, count)

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

    def _prune(self) -> list[int]:
        dead = super()._prune()
        self.noise.forget(dead)
        return dead
