"""What the network sees: names, order and values, of layers and of candidates. The same code logs and decides."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from decoding.errors import UserError
from decoding.policies.base import DraftContext, RootContext
from decoding.support.arrays import FloatVector
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
_LEAST = 1e-12
_BUILT_IN = "controller.features.ContextFeatures"


class ContextFeatures:
    """Computes the columns of a row of traces, and what a policy gives the network.

    A class of one's own derives from it, and adds numbers of a layer and their names behind these.
    """

    version = VERSION
    names: ClassVar[list[str]] = list(LAYER)
    candidate_names: ClassVar[list[str]] = list(CANDIDATE)

    def of_layer(self, context: DraftContext) -> FloatVector:
        """What is known of a layer as a whole, [F] float32."""
        return layer_features(context)

    def of_candidates(self, context: DraftContext) -> FloatVector:
        """What is known of each candidate by itself, [C, G] float32."""
        return candidate_features(context)


def root_features(root: RootContext) -> list[float]:
    """The part of a layer's features that the whole iteration shares."""
    shares = _shares(root.weights)
    drafted = [layer for layer in root.history if layer.draft_width]
    passed = sum(layer.passed for layer in drafted) / len(drafted) if drafted else 0.5
    return [
        float(np.log(len(shares))),
        float(-(shares * np.log(np.maximum(shares, _LEAST))).sum()),
        passed,
        float(np.log(max(len(root.history), 1))),
    ]


def layer_features(context: DraftContext) -> FloatVector:
    """[F]; see LAYER."""
    assert context.candidates is not None and context.known is not None
    q, shares = context.candidates.probs, _shares(context.weights)
    return np.array(
        [
            context.layer,
            *root_features(context.root),
            np.log(len(shares)),
            shares[context.known].sum(),
            -(q * np.log(np.maximum(q, _LEAST))).sum(),
            q.sum(),
        ],
        dtype=np.float32,
    )


def candidate_features(context: DraftContext) -> FloatVector:
    """[C, G]; see CANDIDATE."""
    found = context.candidates
    assert found is not None and context.known is not None
    columns = (
        np.log(np.maximum(found.probs, _LEAST)),
        np.log(np.maximum(found.keys, _LEAST)),
        np.log(np.maximum(_shares(context.weights), _LEAST))[found.rows],
        context.known[found.rows],
        found.scored,
    )
    return np.stack(columns, axis=1).astype(np.float32)


def _shares(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    shares = np.exp(weights - weights.max())
    return shares / shares.sum()


def class_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a controller says of the class of its features and its arguments; of the built-in class nothing.

    Args:
        config: of the features, with `_target_`.
    """
    if config["_target_"] == _BUILT_IN:
        return {}
    return {"class": config["_target_"], "arguments": {key: value for key, value in config.items() if key[0] != "_"}}


def features_of(about: Mapping[str, Any], may_import: bool = False) -> ContextFeatures:
    """The features that a controller was trained with.

    A controller names a class, and never brings its code: the module must be one that this Python finds.

    Args:
        about: of the features, with what `class_of` said.
        may_import: import the module; else it must be imported already, so that a controller from the hub cannot name
            a module that nobody asked for.

    Raises:
        UserError: a class that is not there, or is no features.
    """
    name = str(about.get("class", _BUILT_IN))
    if name == _BUILT_IN:
        return ContextFeatures()
    module = name.rpartition(".")[0]
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
