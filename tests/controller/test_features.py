"""Features: order, values, purity, and what a wide support does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from controller.features import ContextFeatures, check_features, hidden_vectors
from decoding.errors import UserError
from decoding.sampling import Joint
from tests.controller.synthetic import H_P, H_Q, draft_context


def named(context) -> dict[str, float]:
    features = ContextFeatures()
    return dict(zip(features.names, features(context).tolist(), strict=True))


def test_values_of_a_known_context() -> None:
    probs = np.array([0.1, 0.5, 0.25, 0.15])
    known = Joint(np.array([7, 9, 9, 7]), np.arange(4), probs, np.log(probs))
    values = named(dataclasses.replace(draft_context(layer=2), joint=known, weights=np.array([0.0, np.log(0.5)])))
    assert values["drafted"] == 1 and values["layer"] == 2 and values["parents"] == 2
    assert values["weight_gap_second"] == pytest.approx(np.log(2))
    assert values["weights_entropy"] == pytest.approx(-(2 / 3) * np.log(2 / 3) - np.log(1 / 3) / 3)
    assert values["joint_entropy"] == pytest.approx(-(probs * np.log(probs)).sum())
    assert [values[f"joint_mass_{n}"] for n in (2, 4, 8)] == pytest.approx([0.75, 1.0, 1.0])
    assert values["joint_max"] == 0.5 and values["joint_second"] == 0.25
    assert values["heaviest_parent_share"] == pytest.approx(0.75)
    assert values["parents_in_top_8"] == 2 and values["width_above"] == 5 and values["widths_above"] == 5
    assert values["previous_layers"] == 2 and values["previous_accepted_share"] == 0.5
    assert values["previous_passed"] == 1


def test_same_context_same_bits_and_float32() -> None:
    features = ContextFeatures()
    first, second = features(draft_context(3)), features(draft_context(3))
    assert first.dtype == np.float32 and first.shape == (len(features.names),)
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("support", [1, 2, 63, 65, 5000])
def test_any_support_is_finite(support: int) -> None:
    probs = np.full(support, 1.0 / support)
    wide = Joint(np.zeros(support, np.int64), np.arange(support), probs, np.log(probs))
    context = dataclasses.replace(draft_context(history=()), joint=wide, weights=np.array([0.0]))
    assert np.isfinite(ContextFeatures()(context)).all()
    assert named(context)["joint_entropy"] == pytest.approx(
        np.log(support), abs=1e-5
    )  # uniform: the tail rule is exact


def test_hidden_vectors_are_zero_where_unknown() -> None:
    draft, target = hidden_vectors(draft_context(hidden=False), H_Q, H_P)
    assert draft.shape == (H_Q,) and target.shape == (H_P,) and not draft.any() and not target.any()
    draft, target = hidden_vectors(draft_context(), H_Q, H_P)
    assert draft.any() and target.any()


def test_check_features_names_the_difference() -> None:
    check_features(["a", "b"], ["a", "b"], "These have")
    with pytest.raises(UserError, match="without b and with the unknown c"):
        check_features(["a", "c"], ["a", "b"], "These have")
    with pytest.raises(UserError, match="another order"):
        check_features(["b", "a"], ["a", "b"], "These have")
