"""One prompt decoded by the paper's rule: coins accept drafts, a residual fills the slots left open. 2409.16560."""

from __future__ import annotations

from typing import Any

from decoding.dice.acceptance import LayerVerdict, align, verify_layer
from decoding.dice.dense import DenseJoint, draw_dense, verify_dense
from decoding.dice.sampling import Dice, IntArray, Joint, draw
from decoding.loop.prompt_run import DraftedLayer, PromptRun, Proposal
from decoding.policies.base import LayerRecord, TargetContext
from decoding.results import LayerEvent


class RejectionRun(PromptRun):
    """The state of one prompt while it is decoded with `verification="rejection"`."""

    def _start(self) -> None:
        self.dice = Dice(self.stream)

    def _propose(self, proposal: Proposal, width: int) -> IntArray:
        return draw_entries(proposal.joint, width, self.config.replacement, self.dice)

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
