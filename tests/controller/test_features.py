"""Features: order, values, purity, and what a wide support does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from controller.features import ContextFeatures, check_features, hidden_vectors
from decoding.dice.sampling import Joint
from decoding.errors import UserError
from decoding.policies.base import LayerRecord, TargetContext
from decoding.policies.hand_set import entropy
from tests.controller.synthetic import H_P, H_Q, draft_context, joint, target_context


def named(context) -> dict[str, float]:
    features = ContextFeatures()
    return dict(zip(features.names, features(context).tolist(), strict=True))


def of_target(context: TargetContext) -> dict[str, float]:
    features = ContextFeatures()
    values = features.of_target(context)
    assert values.dtype == np.float32 and values.shape == (len(features.target_names),)
    assert np.isfinite(values).all()
    return dict(zip(features.target_names, values.tolist(), strict=True))


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


def test_shares_that_underflowed_are_finite() -> None:
    """Beam search shows entries whose share no float can hold."""
    probs = np.array([1.0, 0.0, 0.0])
    known = Joint(np.zeros(3, np.int64), np.arange(3), probs, np.array([0.0, -800.0, -1e9]))
    context = dataclasses.replace(draft_context(), joint=known)
    assert named(context)["joint_entropy"] == 0 and entropy(known) == 0
    values = of_target(dataclasses.replace(target_context(context, 2), target=known))
    assert values["target_prob_1"] == 1 and np.isfinite(list(values.values())).all()


@pytest.mark.parametrize("support", [1, 2, 63, 65, 5000])
def test_any_support_is_finite(support: int) -> None:
    probs = np.full(support, 1.0 / support)
    wide = Joint(np.zeros(support, np.int64), np.arange(support), probs, np.log(probs))
    context = dataclasses.replace(draft_context(history=()), joint=wide, weights=np.array([0.0]))
    assert np.isfinite(ContextFeatures()(context)).all()
    assert named(context)["joint_entropy"] == pytest.approx(
        np.log(support), abs=1e-5
    )  # uniform: the tail rule is exact


def test_values_of_a_known_target() -> None:
    probs = np.array([0.1, 0.5, 0.25, 0.15])
    known = Joint(np.array([7, 9, 7, 9]), np.arange(4), probs, np.log(probs))
    context = TargetContext(draft_context(layer=2), known, 5, weights=np.array([0.0, -1.5, -30.0]))
    values = of_target(context)
    assert values["drafted"] == 1 and values["layer"] == 2 and values["parents"] == 3
    assert values["log_remaining"] == pytest.approx(np.log(41))
    assert values["weight_gap_second"] == 1.5 and values["weight_gap_last"] == 20.0
    assert values["log_target_support"] == pytest.approx(np.log(4))
    assert [values[f"target_prob_{i}"] for i in range(1, 6)] == pytest.approx([0.5, 0.25, 0.15, 0.1, 0.0])
    logs = [*np.log([0.5, 0.25, 0.15, 0.1]), -12.0]
    assert [values[f"log_target_prob_{i}"] for i in range(1, 6)] == pytest.approx(logs)
    assert [values[f"target_sibling_{i}"] for i in range(2, 6)] == [0, 1, 0, 0]  # of parent 9, as the likeliest


def test_one_parent_and_weights_of_the_draft_where_there_are_no_others() -> None:
    draft = dataclasses.replace(draft_context(), weights=np.array([-2.0]))
    values = of_target(TargetContext(draft, joint(np.random.default_rng(0), parents=1), 4))
    assert values["parents"] == 1 and values["weight_gap_second"] == values["weight_gap_last"] == 20.0
    assert all(values[f"target_sibling_{i}"] == 1 for i in range(2, 11))
    several = of_target(TargetContext(draft_context(), joint(np.random.default_rng(0)), 4))
    assert several["parents"] == 3 and several["weight_gap_second"] == pytest.approx(0.8)


@pytest.mark.parametrize("support", [1, 2, 9, 10, 11, 64, 65, 5000])
def test_the_likeliest_continuations_are_the_same_however_wide_the_support(support: int) -> None:
    rng = np.random.default_rng(support)
    wide = joint(rng, support, parents=4)
    values = of_target(TargetContext(draft_context(), wide, 4))
    order = np.argsort(-wide.probs)[:10]
    expected = np.append(wide.probs[order], np.zeros(10 - len(order)))
    assert [values[f"target_prob_{i}"] for i in range(1, 11)] == pytest.approx(expected.tolist())
    siblings = [float(wide.parents[i] == wide.parents[order[0]]) for i in order[1:]] + [0.0] * (10 - len(order))
    assert [values[f"target_sibling_{i}"] for i in range(2, 11)] == siblings[:9]
    assert values["log_target_support"] == pytest.approx(np.log(support))


def test_tiny_probabilities_stay_finite() -> None:
    probs = np.array([1.0, 1e-300, 1e-9])
    known = Joint(np.zeros(3, np.int64), np.arange(3), probs, np.log(probs))
    values = of_target(TargetContext(draft_context(), known, 4))
    assert [values[f"log_target_prob_{i}"] for i in (1, 2, 3, 4)] == [0.0, -12.0, -12.0, -12.0]


def test_what_is_known_of_p_says_nothing_of_drafts_coins_or_deeper_layers() -> None:
    """Another Q, other weights of the drafts above, widths, records, hidden states: the same bytes."""
    features, context = ContextFeatures(), target_context(draft_context(3, layer=2), 5)
    expected = features.of_target(context).tobytes()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        other = draft_context(seed, layer=2, hidden=bool(seed % 2), history=(LayerRecord(1, seed, 1, seed, False),))
        root = dataclasses.replace(other.root, weights=rng.normal(size=2), iteration=seed)
        draft = dataclasses.replace(
            other, root=root, weights=rng.normal(size=4), joint=joint(rng, 30), widths=(int(rng.integers(1, 6)),)
        )
        changed = dataclasses.replace(
            context, draft=draft, draft_width=seed, committed=(LayerRecord(1, 5, 2, seed, True),)
        )
        assert features.of_target(changed).tobytes() == expected
    for changed in (  # and what it is to depend on changes it
        dataclasses.replace(context, target=joint(np.random.default_rng(9))),
        dataclasses.replace(context, weights=np.array([-1.0, -1.5, -3.0])),
        dataclasses.replace(context, draft=draft_context(3, layer=3)),
        dataclasses.replace(context, draft=draft_context(3, layer=2, drafted=False)),
    ):
        assert features.of_target(changed).tobytes() != expected


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
