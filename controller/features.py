"""What the network sees: names, order and values, of layers and of candidates. The same code logs and decides."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from decoding.errors import UserError
from decoding.policies.base import DraftContext, RootContext
from decoding.support.arrays import FloatVector
from decoding.support.compiled import compiled
from decoding.support.names import locate

VERSION = 3
LAYER = (
    "layer",  # from 1
    "roots",  # log of the input beams
    "root_entropy",  # of their weights, nats
    "last_passed",  # drafted layers of the iteration before that passed, as a share of those drafted; 0.5 at first
    "last_layers",  # log of the layers that it committed; 0 at first
    "parents",  # log of their number
    "known_share",  # of their weight, with those that the target has scored
    "entropy",  # of the candidates' part of Q, nats
    "covered",  # Q's mass on candidates
)
CANDIDATE = (
    "log_q",  # log Q
    "log_key",  # log of E / Q
    "log_share",  # log of the parent's share of the parents' weight
    "known",  # 1: the parent's row is the target's
    "scored",  # 1: the target has scored the candidate itself
)
# What the network derives other numbers from, whatever else it sees; found by name.
OF_LAYER = ("roots", "root_entropy", "last_passed", "last_layers", "known_share")
OF_CANDIDATE = ("log_q", "log_key", "scored")
_LEAST = 1e-12
_BUILT_IN = f"{__name__}.ContextFeatures"
_METHODS = "of_layer", "of_candidates"


class ContextFeatures:
    """Computes the columns of a row of traces, and what a policy gives the network.

    Features of your own are a class derived from this one, with a `version` of its own: `features=mine.Features`
    collects, trains and decodes with it (docs/extending.md).
    """

    version: ClassVar[int | str] = VERSION
    names: ClassVar[list[str]] = list(LAYER)
    candidate_names: ClassVar[list[str]] = list(CANDIDATE)

    def of_layer(self, context: DraftContext) -> FloatVector:
        """What is known of a layer as a whole, [F] float32."""
        return layer_features(context)

    def of_candidates(self, context: DraftContext) -> FloatVector:
        """What is known of each candidate by itself, [C, G] float32."""
        return candidate_features(context)


def root_features(root: RootContext) -> tuple[float, float, float, float]:
    """The part of a layer's features that the whole iteration shares."""
    drafted = passed = 0
    for layer in root.history:
        if layer.draft_width:
            drafted, passed = drafted + 1, passed + layer.passed
    share = passed / drafted if drafted else 0.5
    return math.log(len(root.weights)), _entropy(root.weights), share, math.log(max(len(root.history), 1))


def layer_features(context: DraftContext) -> FloatVector:
    """[F]; see LAYER."""
    assert context.candidates is not None and context.known is not None
    made: FloatVector = _of_layer(
        context.layer, root_features(context.root), context.weights, context.known, context.candidates.probs
    )
    return made


def candidate_features(context: DraftContext) -> FloatVector:
    """[C, G]; see CANDIDATE."""
    found = context.candidates
    assert found is not None and context.known is not None
    of = found.probs, found.keys, found.rows, found.scored
    made: FloatVector = _of_candidates(*of, context.weights, context.known)
    return made


@compiled
def _shares(weights):  # type: ignore[no-untyped-def]
    shares = np.exp(weights - weights.max())
    return shares / shares.sum()


@compiled
def _entropy(weights):  # type: ignore[no-untyped-def]
    """Nats."""
    shares = _shares(weights)
    return -(shares * np.log(np.maximum(shares, _LEAST))).sum()


@compiled
def _of_layer(layer, root, weights, known, probs):  # type: ignore[no-untyped-def]
    made = np.empty(5 + len(root), np.float32)
    made[0] = layer
    for place in range(len(root)):
        made[1 + place] = root[place]
    made[-4] = math.log(len(weights))
    made[-3] = (_shares(weights) * known).sum()
    made[-2] = -(probs * np.log(np.maximum(probs, _LEAST))).sum()
    made[-1] = probs.sum()
    return made


@compiled
def _of_candidates(probs, keys, rows, scored, weights, known):  # type: ignore[no-untyped-def]
    made = np.empty((len(probs), 5), np.float32)
    shares = np.log(np.maximum(_shares(weights), _LEAST))
    for place in range(len(probs)):
        row = rows[place]
        made[place, 0] = math.log(max(probs[place], _LEAST))
        made[place, 1] = math.log(max(keys[place], _LEAST))
        made[place, 2] = shares[row]
        made[place, 3] = known[row]
        made[place, 4] = scored[place]
    return made


def _computes(kind: Any) -> bool:
    """Whether it is a class of features."""
    return isinstance(kind, type) and all(callable(getattr(kind, name, None)) for name in _METHODS)


def describe_features(features: ContextFeatures, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What a controller's config.json says of its features; `arguments` are what they were made with."""
    kind = type(features)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "arguments": dict(arguments),
        "version": features.version,
        "names": list(features.names),
        "candidate_names": list(features.candidate_names),
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
    name = str(about.get("class", _BUILT_IN))
    if name == _BUILT_IN:
        return ContextFeatures()
    module = name.rpartition(".")[0]
    if not may_import and sys.modules.get(module) is None:
        raise UserError(
            f"The controller was trained with the features {name}, and no module is imported because a controller from "
            f"the hub names it. If you have {module} and trust it, import it first, or give features={name}()."
        )
    try:
        kind = locate(name)
        if not _computes(kind):  # before it is called: a config.json may name any function
            raise UserError(f"The features {name} are none; derive them from controller.features.ContextFeatures.")
        made: ContextFeatures = kind(**about.get("arguments", {}))
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"The controller was trained with the features {name}, which cannot be made here ({error}); put its module "
            "where Python finds it, beside the command or in PYTHONPATH."
        ) from error
    check_columns(made)
    return made


def check_columns(features: ContextFeatures) -> None:
    """Refuse what is no features, or lacks a column that the network derives others from.

    Raises:
        UserError: what is missing.
    """
    asked = ("version", "names", "candidate_names", *_METHODS)
    if lacking := [name for name in asked if not hasattr(features, name)]:
        raise UserError(
            f"The features {type(features).__name__} are none, without {', '.join(lacking)}; derive them from "
            "controller.features.ContextFeatures."
        )
    places(features.names, OF_LAYER)
    places(features.candidate_names, OF_CANDIDATE)


def places(names: Sequence[str], needed: Iterable[str]) -> list[int]:
    """Where the needed columns are among the features.

    Raises:
        UserError: some are not there.
    """
    if lacking := [name for name in needed if name not in names]:
        raise UserError(
            f"The features are without {', '.join(lacking)}, which the network needs beside whatever else it sees; "
            "keep these columns of controller.features.ContextFeatures under their names."
        )
    return [list(names).index(name) for name in needed]


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
