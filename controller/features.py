"""What a layer looks like before its drafts are drawn, as a vector: the same code when logging and when deciding.

Everything comes from a `DraftContext`, so nothing here can see the drafts or the coins of the layer (design 5.4).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from decoding.errors import UserError
from decoding.sampling import Distribution
from decoding.widths import DraftContext

FloatVector = NDArray[np.float32]

NAMES = (
    "drafted",  # 0 at the layer drawn from the target
    "layer",
    "log_remaining",  # tokens that the beams may still grow by
    "parents",
    "weight_gap_second",  # best minus second best parent, in nats; _GAP_LIMIT with one parent
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
_GAP_LIMIT = 20.0
_HEAD = 64  # entries that are looked at one by one; the tail of a wide support enters as if it were uniform


class ContextFeatures:
    """Call it with a `DraftContext` to get its scalars, float32 [F], in the order of `names`; some 15 microseconds."""

    version = 1

    def __init__(self) -> None:
        self.names: list[str] = list(NAMES)

    def __call__(self, context: DraftContext) -> FloatVector:
        root, widths, history = context.root, context.widths, context.root.history
        drafts = sum(record.draft_width for record in history)
        values = (
            float(context.drafted),
            context.layer,
            math.log1p(root.remaining),
            *_weight_scalars(context.weights.tolist()),
            *_joint_scalars(context.joint),
            widths[-1] if widths else 0,
            sum(widths),
            len(history),
            sum(record.accepted for record in history) / drafts if drafts else 0.0,
            float(bool(history) and all(record.passed for record in history)),
        )
        return np.array(values, dtype=np.float32)


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


def _weight_scalars(weights: list[float]) -> tuple[float, float, float, float]:
    """Number, two gaps and entropy of B log-weights, best first; plain Python beats numpy at these sizes."""
    best, count = weights[0], len(weights)
    shares = [math.exp(weight - best) for weight in weights]
    total = sum(shares)
    entropy = math.log(total) - sum(s * (w - best) for s, w in zip(shares, weights, strict=True) if s > 0) / total
    if count == 1:
        return 1.0, _GAP_LIMIT, _GAP_LIMIT, 0.0
    return float(count), min(best - weights[1], _GAP_LIMIT), min(best - weights[-1], _GAP_LIMIT), entropy


def _joint_scalars(joint: Distribution) -> tuple[float, ...]:
    """Shape of a joint distribution: entropy, head masses, support, and how its mass falls on the parents."""
    probs, support = joint.probs, len(joint.probs)
    head = np.argpartition(probs, -_HEAD)[-_HEAD:] if support > _HEAD else np.arange(support)
    order = head[np.argsort(-probs[head], kind="stable")]
    top = probs[order]  # [min(S, _HEAD)] largest first
    mass = np.cumsum(top)
    entropy = -float(top @ np.log(top))
    tail = 1.0 - float(mass[-1])
    if support > _HEAD and tail > 0:
        entropy -= tail * math.log(tail / (support - _HEAD))
    parents = joint.parents[order].tolist()
    shares: dict[int, float] = {}
    for parent, share in zip(parents, top.tolist(), strict=True):
        shares[parent] = shares.get(parent, 0.0) + share
    last = len(mass) - 1
    return (
        entropy,
        float(top[0]),
        float(top[1]) if last else 0.0,
        float(mass[min(1, last)]),
        float(mass[min(3, last)]),
        float(mass[min(7, last)]),
        math.log(support),
        max(shares.values()) / float(mass[-1]),
        float(len(set(parents[:8]))),
    )
