"""What a layer looks like before its drafts are drawn, as a vector: the same code when logging and when deciding.

Everything comes from a `DraftContext`, so nothing here can see the drafts or the coins of the layer (design 5.4).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from controller.kernels import TOP, Packed, describe_context, describe_target
from decoding.errors import UserError
from decoding.sampling import Distribution, FloatArray, IntArray
from decoding.widths import DraftContext, LayerRecord, TargetContext

FloatVector = NDArray[np.float32]

NAMES = (
    "drafted",  # 0 at the layer drawn from the target
    "layer",
    "log_remaining",  # tokens that the beams may still grow by
    "parents",
    "weight_gap_second",  # best minus second best parent, in nats; GAP_LIMIT with one parent
    "weight_gap_last",
    "weights_entropy",  # of softmax(weights), in nats
    "joint_entropy",
    "joint_max",
    "joint_second",
    "joint_mass_2",
    "joint_mass_4",
    "joint_mass_8",
    "log_joint_support",
    "heaviest_parent_share",  # of the joint's _HEAD largest entries
    "parents_in_top_8",
    "width_above",  # draft width of the layer above; 0 at the first
    "widths_above",  # their sum
    "previous_layers",  # committed by the previous iteration; 0 at the first
    "previous_accepted_share",  # of its drafts
    "previous_passed",  # every layer passed
)
TARGET_NAMES = (
    "drafted",
    "layer",
    "log_remaining",
    "parents",
    "weight_gap_second",
    "weight_gap_last",
    "log_target_support",
    *(f"target_prob_{i}" for i in range(1, TOP + 1)),
    *(f"log_target_prob_{i}" for i in range(1, TOP + 1)),
    *(f"target_sibling_{i}" for i in range(2, TOP + 1)),  # 1 where it has the parent of the likeliest one
)
_HEAD = 64  # entries that are looked at one by one; the tail of a wide support enters as if it were uniform


class ContextFeatures:
    """Call it with a `DraftContext` to get its scalars, float32 [F], in the order of `names`.

    `of_target` gives those that are known once the layer's P is, float32 [G], in the order of `target_names`.
    """

    version = 2

    def __init__(self) -> None:
        self.names: list[str] = list(NAMES)
        self.target_names: list[str] = list(TARGET_NAMES)
        self._history: tuple[LayerRecord, ...] = ()  # that `_before` is of: all layers of an iteration have the same
        self._before = _previous(())

    def __call__(self, context: DraftContext) -> FloatVector:
        return describe_context(self.of_context(context))

    def of_target(self, context: TargetContext) -> FloatVector:
        """What P says, beside what is known of its beams: neither the drafts nor the coins."""
        return describe_target(known(context))

    def of_context(self, context: DraftContext) -> Packed:
        """What the features of a layer are computed from: a `kernels.Context`."""
        root, widths = context.root, context.widths
        if root.history is not self._history:
            self._history, self._before = root.history, _previous(root.history)
        probs, parents, support = _head(context.joint)
        layers, accepted, passed = self._before
        return (
            context.drafted,
            context.layer,
            root.remaining,
            context.weights,
            probs,
            parents,
            support,
            widths[-1] if widths else 0,
            sum(widths),
            layers,
            accepted,
            passed,
        )


def known(context: TargetContext) -> Packed:
    """What the features of a layer are computed from once its P is known: a `kernels.Target`."""
    draft = context.draft
    weights = draft.weights if context.weights is None else context.weights
    return draft.drafted, draft.layer, draft.root.remaining, weights, *_head(context.target)


def hidden_vectors(context: DraftContext, draft_size: int, target_size: int) -> tuple[FloatVector, FloatVector]:
    """The context's hidden vectors, zeros where unknown.

    Args:
        context: a layer before its drafts are drawn.
        draft_size, target_size: H_q and H_p, used where a vector is unknown.

    Returns:
        Draft [H_q] and target [H_p], float32.
    """
    draft, target = context.draft_hidden, context.root.target_hidden
    return (
        np.zeros(draft_size, np.float32) if draft is None else np.asarray(draft, np.float32),
        np.zeros(target_size, np.float32) if target is None else np.asarray(target, np.float32),
    )


def check_features(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Refuse feature names that differ, in content or order.

    Raises:
        UserError: which ones are missing, which ones are unknown here.
    """
    found, expected = list(found), list(expected)
    if found == expected:
        return
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    parts = ((missing, "without"), (unknown, "with the unknown"))
    how = " and ".join(f"{word} {', '.join(names)}" for names, word in parts if names) or "in another order"
    raise UserError(f"{what} other features than this code computes: {how}. Collect traces and train again.")


def _previous(history: tuple[LayerRecord, ...]) -> tuple[int, float, bool]:
    """How the iteration before went: layers, share of its drafts accepted, and whether all of them passed."""
    drafts = sum(record.draft_width for record in history)
    accepted = sum(record.accepted for record in history)
    return len(history), accepted / drafts if drafts else 0.0, bool(history) and all(r.passed for r in history)


def _head(joint: Distribution) -> tuple[FloatArray, IntArray, int]:
    """Probabilities and parents of the likeliest entries, in any order, and the number of all."""
    probs, support = joint.probs, len(joint.probs)
    if support <= _HEAD:
        return probs.copy(), joint.parents, support  # a copy as below: one kind of array, for which numba compiles
    head = np.argpartition(probs, -_HEAD)[-_HEAD:]
    return probs[head], joint.parents[head], support
