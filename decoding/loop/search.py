"""Deterministic beam search over a drafted forest: the steps of transformers' beam search, taken from fewer passes.

The draft model proposes its likeliest (beam, token) pairs; one target pass scores them; a step is then taken from the
target's log-probabilities as long as the beams that it leads to have been scored. What the draft proposes decides how
many steps a pass serves, never which beams they keep: shared noise without the noise. Design sections 5.2 and 5.7.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from decoding.config import DecodingConfig
from decoding.dice.dense import DenseJoint
from decoding.dice.sampling import FloatArray, IntArray, Joint, NotNumbers, nan_message, nothing_left_message
from decoding.dice.selection import Race
from decoding.dice.verdict import judge
from decoding.errors import UserError
from decoding.loop.known_rows import KnownRowsRun
from decoding.loop.prompt_run import Beam, DraftedLayer, Hypothesis
from decoding.policies.base import LayerRecord, TargetContext
from decoding.results import LayerEvent

_TIES = 8  # entries of a row looked at: greedy search takes the first of equal ones, so they must be seen


def candidates_per_beam(ends: int) -> int:
    """Continuations looked at for each beam kept, with so many EOS tokens: as many live ones as beams always remain."""
    return max(2, 1 + ends)


def ends_counted(config: DecodingConfig, ends: Collection[int]) -> int:
    """How many EOS tokens a search counts: all that a list holds, even twice or where they cannot occur."""
    return len(config.eos_token_id) if isinstance(config.eos_token_id, list) else len(ends)


def entries_searched(config: DecodingConfig, ends: int, vocabulary: int) -> int:
    """How many of a node's likeliest tokens a step, or a proposal, may have to look at."""
    return min(max(candidates_per_beam(ends) * config.target_width, config.draft_width + ends, _TIES), vocabulary)


class SearchRun(KnownRowsRun):
    """The state of one prompt while it is searched.

    With M = target_width at every layer, the hypotheses are those of `generate(num_beams=M, do_sample=False)`. Weights
    are summed in float64 from float32 log-probabilities; of equal weights the better parent's child comes first, then
    the lower token id. Where transformers' float32 sums tie or differ by rounding alone, it may keep another beam.
    """

    def _start(self) -> None:
        """Nothing is drawn."""

    @property
    def candidates(self) -> int:
        """Continuations looked at for each beam kept."""
        return candidates_per_beam(ends_counted(self.config, self.eos))

    def _compact(
        self, values: FloatArray, tokens: IntArray, beams: list[Beam], config: DecodingConfig, name: str
    ) -> Joint:
        nodes, weights = [beam.node for beam in beams], [beam.weight for beam in beams]
        count = config.draft_width + len(self.eos) * len(beams)  # so many live ones are among them
        return ranked_joint(values, tokens, nodes, weights, max(count, self.candidates * config.target_width), name)

    def _race(self, joint: Joint | DenseJoint) -> Race:
        """The entries as they stand, best first: with E = 1 the smallest key is the greatest weight."""
        assert isinstance(joint, Joint), "a search ranks on the host"
        with np.errstate(divide="ignore"):  # a share that is too small for a float
            keys = 1 / joint.probs
        return Race(np.arange(len(joint)), keys, joint.probs, joint.parents, joint.tokens, joint.weights)

    def _commit_drafted(self, context: TargetContext, target: Joint | DenseJoint, layer: DraftedLayer) -> LayerRecord:
        """Take a step; it goes on while the best M live continuations, in their order, need no further pass."""
        config = self.config
        width = self._target_width(context)
        with self.clock.phase("verify"):
            ranking, hits = self._ranked(target)
            live = [beam.node for beam, hit in zip(ranking, hits, strict=True) if not hit]
            known = [self.target.knows(self.row, node) for node in live]
            verdict = judge(range(len(live)), known, len(live), width)
            kept = width
            if verdict.passed and config.surplus == "keep":
                kept = max(width, min(verdict.accepted, config.target_width))
            elif not verdict.passed and config.refill == "full":
                kept = config.target_width
            children = self._step(ranking, hits, kept)
        record = LayerRecord(context.draft.layer, context.draft_width, width, verdict.accepted, verdict.passed)
        self._log(LayerEvent(context, record, None, children))
        return record

    def _commit_drawn(self, context: TargetContext, target: Joint | DenseJoint) -> LayerRecord:
        """Take a step that nothing was drafted for."""
        width = self._target_width(context)
        with self.clock.phase("verify"):
            children = self._step(*self._ranked(target), width)
        record = LayerRecord(context.draft.layer, 0, width, 0, True)
        self._log(LayerEvent(context, record, None, children))
        return record

    def _ranked(self, target: Joint | DenseJoint) -> tuple[list[Beam], list[bool]]:
        """All continuations that count, best first, and which of them end."""
        entries = target.entries(list(range(len(target))))
        ranking = [Beam(self.forest.child(parent, token), weight) for parent, token, weight in entries]
        self.touched += [beam.node for beam in ranking]
        self._mark_stopped([beam.node for beam in ranking])
        last = self.stats.new_tokens + 1 >= self.config.max_new_tokens
        return ranking, [last or self._ended(beam.node) for beam in ranking]

    def _step(self, ranking: list[Beam], hits: list[bool], width: int) -> list[tuple[int, float]]:
        """A step of beam search with `width` beams: hypotheses end only among the best `width` continuations.

        Returns:
            What goes on or ended, as (node, weight), best first.
        """
        ranking, hits = ranking[: (most := self.candidates * width)], hits[:most]
        self.stats.new_tokens += 1
        ended = [beam for beam, hit in zip(ranking[:width], hits[:width], strict=True) if hit]
        fresh = [self._hypothesis(beam, self._ended(beam.node)) for beam in ended]
        self.pool = sorted(self.pool + fresh, key=lambda h: -h.score)[: self.config.target_width]
        self.beams = [beam for beam, hit in zip(ranking, hits, strict=True) if not hit][:width]
        self.done = self._is_done()
        kept = {beam.node for beam in (*self.beams, *ended)}
        return [(beam.node, beam.weight) for beam in ranking if beam.node in kept]

    def _is_done(self) -> bool:
        return (self.config.target_width == 1 and bool(self.pool)) or super()._is_done()  # one beam: greedy search

    def _living(self) -> list[int]:
        """Beams, those that max_new_tokens has just ended among them: they count as slots used, as in sampling."""
        return super()._living() + [ended.node for ended in self.pool if not ended.finished]

    def _hypotheses(self) -> list[Hypothesis]:
        """What ended, max_new_tokens included; beams that still grow only where nothing did."""
        found = self.pool or super()._hypotheses()
        if not found:
            raise UserError(nothing_left_message("target"))
        return found


def ranked_joint(
    values: FloatArray,  # [B, K] log-probabilities
    tokens: IntArray,  # [B, K]
    nodes: Sequence[int],  # B nodes
    weights: Sequence[float],  # B log-weights, best first
    count: int,
    model_name: str = "model",
) -> Joint:
    """The `count` likeliest entries of the joint distribution, best first; `probs` are their shares of each other.

    Raises:
        UserError: the model returned NaN.
    """
    if np.isnan(values.max()):
        raise NotNumbers(nan_message(model_name))
    score = (values + np.asarray(weights, dtype=np.float64)[:, None]).ravel()
    rows = np.arange(len(nodes)).repeat(values.shape[1])
    order = np.lexsort((tokens.ravel(), rows, -score))[:count]
    order = order[score[order] > -np.inf]
    share = np.exp(score[order] - score[order].max(initial=-np.inf))
    probs = share / share.sum() if len(order) else share
    probs.flags.writeable = False  # policies are shown this very array
    return Joint(np.asarray(nodes, dtype=np.int64)[rows[order]], tokens.ravel()[order], probs, score[order])
