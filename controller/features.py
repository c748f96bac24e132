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
from decoding.widths import DraftContext, TargetContext

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
_TOP = 10  # likeliest continuations of P that are looked at once it is known
TARGET_NAMES = (
    "drafted",
    "layer",
    "log_remaining",
    "parents",
    "weight_gap_second",
    "weight_gap_last",
    "log_target_support",
    *(f"target_prob_{i}" for i in range(1, _TOP + 1)),
    *(f"log_target_prob_{i}" for i in range(1, _TOP + 1)),
    *(f"target_sibling_{i}" for i in range(2, _TOP + 1)),  # 1 where it has the parent of the likeliest one
)
_GAP_LIMIT = 20.0
_LEAST_LOG = -12.0  # log-probability of a continuation that is not there
_FIRST = TARGET_NAMES.index("target_prob_1")
_HEAD = 64  # entries that are looked at one by one; the tail of a wide support enters as if it were uniform


class ContextFeatures:
    """Call it with a `DraftContext` to get its scalars, float32 [F], in the order of `names`; some 15 microseconds.

    `of_target` gives those that are known once the layer's P is, float32 [G], in the order of `target_names`.
    """

    version = 2

    def __init__(self) -> None:
        self.names: list[str] = list(NAMES)
        self.target_names: list[str] = list(TARGET_NAMES)

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

    def of_target(self, context: TargetContext) -> FloatVector:
        """What P says, beside what is known of its beams: neither the drafts nor the coins."""
        draft, target = context.draft, context.target
        weights = (draft.weights if context.weights is None else context.weights).tolist()
        best, several = weights[0], len(weights) > 1
        values = np.zeros(len(TARGET_NAMES), dtype=np.float32)
        values[:_FIRST] = (
            float(draft.drafted),
            draft.layer,
            math.log1p(draft.root.remaining),
            len(weights),
            min(best - weights[1], _GAP_LIMIT) if several else _GAP_LIMIT,
            min(best - weights[-1], _GAP_LIMIT) if several else _GAP_LIMIT,
            math.log(len(target)),
        )
        probs = target.probs
        order = np.argpartition(probs, -_TOP)[-_TOP:] if len(probs) > _HEAD else np.arange(len(probs))
        order = order[np.argsort(-probs[order], kind="stable")[:_TOP]]
        top, parents = probs[order], target.parents[order]
        count = len(top)
        values[_FIRST : _FIRST + count] = top
        logs = values[_FIRST + _TOP : _FIRST + 2 * _TOP]
        logs.fill(_LEAST_LOG)
        np.maximum(np.log(top), _LEAST_LOG, out=logs[:count], casting="same_kind")
        values[_FIRST + 2 * _TOP : _FIRST + 2 * _TOP + count - 1] = parents[1:] == parents[0]
        return values


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
