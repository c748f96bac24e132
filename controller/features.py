"""What a layer looks like, as numbers: their names, their order and their values, when logging and when deciding.

Everything comes from a `DraftContext`, so nothing here can see the drafts or the coins of the layer, or from a
`TargetContext`, which adds P (design 5.4). The fields of `Scalars` and `TargetScalars` name the numbers in order.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from decoding.dice.sampling import Distribution
from decoding.errors import UserError
from decoding.policies.base import DraftContext, LayerRecord, TargetContext
from decoding.support.arrays import FloatArray, FloatVector, IntArray
from decoding.support.compiled import compiled
from decoding.support.names import locate

Packed = tuple[Any, ...]  # the fields of a record
TOP = 10  # likeliest continuations of P that are looked at once it is known
GAP_LIMIT = 20.0  # nats that gaps between weights are cut at, and what they are with one beam
LEAST_LOG = -12.0  # log-probability of a continuation that is not there, and the least of those that are
_BUILT_IN = f"{__name__}.ContextFeatures"
_HEAD = 64  # entries that are looked at one by one; the tail of a wide support enters as if it were uniform


class Target(NamedTuple):
    """A layer once its P is known."""

    drafted: bool
    layer: int
    remaining: int  # tokens that the beams may still grow by
    weights: FloatArray  # [B] log-weights of the beams, best first
    probs: FloatArray  # [S] likeliest entries of P, in any order
    parents: IntArray  # [S] the beams that they continue
    support: int  # entries that P has in all


class Context(NamedTuple):
    """A layer before its drafts are drawn; the first seven as in `Target`, of the parents and of Q."""

    drafted: bool
    layer: int
    remaining: int
    weights: FloatArray
    probs: FloatArray
    parents: IntArray
    support: int
    above: int  # draft width of the layer above
    widths: int  # of all layers above together
    layers: int  # committed by the iteration before
    accepted: float  # share of its drafts
    passed: bool  # every layer of it


class Scalars(NamedTuple):
    """The features of a `Context`."""

    drafted: float  # 0 at the layer drawn from the target
    layer: float
    log_remaining: float  # tokens that the beams may still grow by
    parents: float
    weight_gap_second: float  # best minus second best parent, in nats; GAP_LIMIT with one parent
    weight_gap_last: float
    weights_entropy: float  # of softmax(weights), in nats
    joint_entropy: float  # the tail as if it were uniform
    joint_max: float
    joint_second: float
    joint_mass_2: float
    joint_mass_4: float
    joint_mass_8: float
    log_joint_support: float
    heaviest_parent_share: float  # of the joint's _HEAD largest entries
    parents_in_top_8: float
    width_above: float  # draft width of the layer above; 0 at the first
    widths_above: float  # their sum
    previous_layers: float  # committed by the previous iteration; 0 at the first
    previous_accepted_share: float  # of its drafts
    previous_passed: float  # every layer passed


class TargetScalars(NamedTuple):
    """The features of a `Target` that come before those of each of its TOP likeliest continuations."""

    drafted: float
    layer: float
    log_remaining: float
    parents: float
    weight_gap_second: float
    weight_gap_last: float
    log_target_support: float


NAMES = Scalars._fields
TARGET_NAMES = (
    *TargetScalars._fields,
    *(f"target_prob_{i}" for i in range(1, TOP + 1)),
    *(f"log_target_prob_{i}" for i in range(1, TOP + 1)),
    *(f"target_sibling_{i}" for i in range(2, TOP + 1)),  # 1 where it has the parent of the likeliest one
)


@compiled
def _gaps(weights: FloatArray) -> tuple[float, float]:
    """How far the second and the last beam are behind the best; [B] best first."""
    if len(weights) == 1:
        return GAP_LIMIT, GAP_LIMIT
    return min(weights[0] - weights[1], GAP_LIMIT), min(weights[0] - weights[-1], GAP_LIMIT)


@compiled
def _weights_entropy(weights: FloatArray) -> float:
    """Entropy of softmax(weights) in nats; [B] best first."""
    best, total, mean = weights[0], 0.0, 0.0
    for weight in weights:
        share = math.exp(weight - best)
        total += share
        if share > 0:
            mean += share * (weight - best)
    return math.log(total) - mean / total if len(weights) > 1 else 0.0


@compiled
def _heaviest_parent(probs: FloatArray, parents: IntArray) -> float:
    """The most probability that entries of one parent have together."""
    heaviest, share, last = 0.0, 0.0, -1
    for entry in np.argsort(parents, kind="mergesort"):
        share = share + probs[entry] if parents[entry] == last else probs[entry]
        last = parents[entry]
        heaviest = max(heaviest, share)
    return heaviest


@compiled
def _distinct(values: IntArray) -> int:
    """How many different values there are; a few."""
    distinct = 0
    for i in range(len(values)):
        new = True
        for j in range(i):
            if values[j] == values[i]:
                new = False
        distinct += new
    return distinct


@compiled
def describe_context(packed: Packed) -> FloatVector:
    """The `Scalars` of a `Context`; [F]."""
    context = Context(*packed)
    weights, probs, support = context.weights, context.probs, context.support
    second, last = _gaps(weights)
    order = np.argsort(-probs, kind="mergesort")
    mass_2 = mass_4 = mass_8 = entropy = mass = 0.0
    for place, entry in enumerate(order):
        prob = probs[entry]
        mass += prob
        entropy -= prob * math.log(prob) if prob > 0 else 0.0  # shares of a beam search may be too small for a float
        if place <= 1:
            mass_2 = mass
        if place <= 3:
            mass_4 = mass
        if place <= 7:
            mass_8 = mass
    tail = 1.0 - mass
    if support > len(probs) and tail > 0:
        entropy -= tail * math.log(tail / (support - len(probs)))
    joint_second = probs[order[1]] if len(order) > 1 else 0.0  # numba takes no condition among so many arguments
    scalars = Scalars(
        drafted=1.0 * context.drafted,
        layer=float(context.layer),
        log_remaining=math.log1p(context.remaining),
        parents=float(len(weights)),
        weight_gap_second=second,
        weight_gap_last=last,
        weights_entropy=_weights_entropy(weights),
        joint_entropy=entropy,
        joint_max=probs[order[0]],
        joint_second=joint_second,
        joint_mass_2=mass_2,
        joint_mass_4=mass_4,
        joint_mass_8=mass_8,
        log_joint_support=math.log(support),
        heaviest_parent_share=_heaviest_parent(probs, context.parents) / mass,
        parents_in_top_8=float(_distinct(context.parents[order[:8]])),
        width_above=float(context.above),
        widths_above=float(context.widths),
        previous_layers=float(context.layers),
        previous_accepted_share=float(context.accepted),
        previous_passed=1.0 * context.passed,
    )
    return np.array(scalars).astype(np.float32)


@compiled
def describe_target(packed: Packed) -> FloatVector:
    """The `TargetScalars` of a `Target`, and of its TOP likeliest continuations what TARGET_NAMES says; [G]."""
    target = Target(*packed)
    probs, parents = target.probs, target.parents
    second, last = _gaps(target.weights)
    scalars = TargetScalars(
        drafted=1.0 * target.drafted,
        layer=float(target.layer),
        log_remaining=math.log1p(target.remaining),
        parents=float(len(target.weights)),
        weight_gap_second=second,
        weight_gap_last=last,
        log_target_support=math.log(target.support),
    )
    likeliest, logs, siblings = np.zeros(TOP), np.full(TOP, LEAST_LOG), np.zeros(TOP)
    order = np.argsort(-probs, kind="mergesort")[:TOP]
    for place, entry in enumerate(order):
        likeliest[place] = probs[entry]
        logs[place] = max(math.log(probs[entry]), LEAST_LOG) if probs[entry] > 0 else LEAST_LOG
        siblings[place] = parents[entry] == parents[order[0]]
    return np.concatenate((np.array(scalars), likeliest, logs, siblings[1:])).astype(np.float32)


class ContextFeatures:
    """Call it with a `DraftContext` to get its scalars, float32 [F], in the order of `names`.

    `of_target` gives those that are known once the layer's P is, float32 [G], in the order of `target_names`. Features
    of your own are a class derived from this one, with a `version` of its own: `features=mine.Features` collects,
    trains and decodes with it (docs/controller.md).
    """

    version: int | str = 2

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
        """What the features of a layer are computed from: a `Context`."""
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
    """What the features of a layer are computed from once its P is known: a `Target`."""
    draft = context.draft
    weights = draft.weights if context.weights is None else context.weights
    return draft.drafted, draft.layer, draft.root.remaining, weights, *_head(context.target)


def describe_features(features: ContextFeatures, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a controller's config.json says of its features; `arguments` are what they were made with."""
    kind = type(features)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "arguments": dict(arguments),
        "version": features.version,
        "names": list(features.names),
        "target_names": list(features.target_names),
    }


def features_of(about: Mapping[str, Any], may_import: bool = False) -> ContextFeatures:
    """The features that a controller was trained with, by what `describe_features` said of them.

    A controller names a class, and never brings its code: the module must be one that this Python finds.

    Args:
        about: of the features.
        may_import: import the module; else it must be imported already, so that a controller from the hub cannot name
            a module that nobody asked for.

    Raises:
        UserError: a class that is not there, or is no features.
    """
    name = about.get("class", _BUILT_IN)
    if name == _BUILT_IN:
        return ContextFeatures()
    module = str(name).rpartition(".")[0]
    if not may_import and module not in sys.modules:
        raise UserError(
            f"The controller was trained with the features {name}, and no module is imported because a controller from "
            f"the hub names it. If you have {module} and trust it, import it first, or give features={name}()."
        )
    try:
        features = locate(name)(**about.get("arguments", {}))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"The controller was trained with the features {name}, which cannot be made here ({error}); put its module "
            "where Python finds it, beside the command or in PYTHONPATH."
        ) from error
    if not isinstance(features, ContextFeatures):
        raise UserError(f"The features {name} are none; derive them from controller.features.ContextFeatures.")
    return features


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
