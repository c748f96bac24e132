"""One prompt decoded by the paper's rule: coins accept drafts, a residual fills the slots left open. 2409.16560."""

from __future__ import annotations

from typing import Any, cast

from decoding.dice.dense import DenseJoint
from decoding.dice.rejection import LayerVerdict, align, verify_layer
from decoding.dice.sampling import Dice, IntArray, Joint, draw
from decoding.forest.node_scorer import NodeScorer
from decoding.loop.prompt_run import Beam, DraftedLayer, PromptRun, Proposal
from decoding.policies.base import LayerRecord, TargetContext
from decoding.results import LayerEvent


class RejectionRun(PromptRun):
    """The state of one prompt while it is decoded with `verification="rejection"`."""

    def _start(self) -> None:
        self.dice = Dice(self.stream)

    def _joint(self, scorer: NodeScorer, beams: list[Beam], name: str) -> Joint:
        """Always on the host, where the rule is: without a cut, that is the whole vocabulary of every beam."""
        joint = super()._joint(scorer, beams, name)
        return joint.compact() if isinstance(joint, DenseJoint) else joint

    def _propose(self, proposal: Proposal, width: int) -> IntArray:
        joint = cast(Joint, proposal.joint)
        return draw(joint.probs, width, self.config.replacement, self.dice)

    def _commit_drafted(self, context: TargetContext, target: Joint | DenseJoint, layer: DraftedLayer) -> LayerRecord:
        """Verify one layer and go on with its slots."""
        config = self.config
        width = self._target_width(context)
        with self.clock.phase("verify"):
            verdict, slots = judge_layer(
                cast(Joint, target),
                cast(Joint, layer.joint),
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
            picks = draw(cast(Joint, target).probs, width, self.config.replacement, self.dice)
            kept = self._commit(target.entries(list(dict.fromkeys(picks.tolist()))))
        record = LayerRecord(context.draft.layer, 0, width, 0, True)
        self._log(LayerEvent(context, record, None, kept, self._drawn))
        return record


def judge_layer(
    target: Joint, draft: Joint, picks: IntArray, **rule: Any
) -> tuple[LayerVerdict, list[tuple[int, int, float]]]:
    """Verify drafts, which are entries `picks` of Q; `rule` as for `verify_layer`.

    Returns:
        The verdict, and its slots as (parent node, token, the target's weight), equal draws once.
    """
    both = align(target, draft)
    verdict = verify_layer(both.p, both.q, both.of_draft[picks], **rule)
    return verdict, target.entries(both.in_target(list(dict.fromkeys(verdict.slots))))
