"""Cutting and drawing: P of design 5.1 against transformers' own warpers and torch.multinomial's law."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from decoding import DecodingConfig, UserError
from decoding.dice.sampling import Dice, Joint, draw, log_probabilities
from tests.decoding.stubs import chi_square_p, joint_distribution

NODES, WEIGHTS = [4, 9, 2], [-1.0, -0.2, -3.0]


def config(**changes: object) -> DecodingConfig:
    return DecodingConfig(**{"target_width": 2, **changes})  # type: ignore[arg-type]


def logits(seed: int = 0, beams: int = 3, vocabulary: int = 6) -> torch.Tensor:
    return 2 * torch.randn(beams, vocabulary, generator=torch.Generator().manual_seed(seed))


def as_dict(joint: Joint) -> dict[tuple[int, int], float]:
    return {(int(i), int(v)): float(p) for i, v, p in zip(joint.parents, joint.tokens, joint.probs, strict=True)}


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.7), (4, 0.8), (1, None), (None, 1e-12)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_per_beam_cut_is_transformers(top_k: int | None, top_p: float | None, temperature: float) -> None:
    """warp="beam": log-softmax of the scaled logits, masked by transformers' warpers, plus the beams' weights."""
    rows = logits()
    warpers = LogitsProcessorList()
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    scaled = TemperatureLogitsWarper(temperature)(None, rows).log_softmax(-1)
    scores = warpers(None, scaled) + torch.tensor(WEIGHTS)[:, None]
    expected = scores.flatten().softmax(0).reshape(scores.shape)
    joint = joint_distribution(
        log_probabilities(rows, temperature), NODES, WEIGHTS, config(warp="beam", top_k=top_k, top_p=top_p)
    )
    found = torch.zeros_like(expected)
    for (node, token), p in as_dict(joint).items():
        found[NODES.index(node), token] = p
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (5, None), (None, 0.6), (7, 0.9), (100, None)])
def test_joint_cut_is_a_cut_of_the_flat_distribution(top_k: int | None, top_p: float | None) -> None:
    """warp="joint": the warpers on one row of all (beam, token) pairs."""
    log_probs = log_probabilities(logits(), 1.0)
    flat = (log_probs + torch.tensor(WEIGHTS)[:, None]).flatten()[None].log_softmax(-1)
    if top_k is not None:
        flat = TopKLogitsWarper(top_k)(None, flat)
    if top_p is not None:
        flat = TopPLogitsWarper(top_p)(None, flat)
    expected = flat.softmax(-1).reshape(3, 6)
    joint = joint_distribution(log_probs, NODES, WEIGHTS, config(top_k=top_k, top_p=top_p))
    found = torch.zeros(3, 6)
    for (node, token), p in as_dict(joint).items():
        found[NODES.index(node), token] = p
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("warp", ["joint", "beam"])
def test_weights_are_true_and_uncut(warp: str) -> None:
    """The child's weight is s_i + log p(v | x_i), whatever was cut."""
    log_probs = log_probabilities(logits(), 0.7)
    joint = joint_distribution(log_probs, NODES, WEIGHTS, config(warp=warp, top_k=3, top_p=0.9))
    for node, token, weight in zip(joint.parents, joint.tokens, joint.weights, strict=True):
        row = NODES.index(node)
        assert weight == pytest.approx(WEIGHTS[row] + float(log_probs[row, token]), abs=1e-5)
    assert joint.probs.sum() == pytest.approx(1)
    assert (joint.probs > 0).all()


@pytest.mark.parametrize("warp", ["joint", "beam"])
def test_forbidden_tokens_and_very_light_beams_drop_out(warp: str) -> None:
    rows = logits(beams=2)
    rows[:, 0] = -torch.inf
    joint = joint_distribution(log_probabilities(rows, 1.0), [0, 1], [0.0, -2000.0], config(warp=warp))
    assert set(joint.parents.tolist()) == {0}
    assert 0 not in joint.tokens


@pytest.mark.parametrize("warp", ["joint", "beam"])
@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (3, None), (None, 0.9), (3, 0.9)])
@pytest.mark.parametrize("rows", [[0], [1], [0, 1, 2]])
def test_nan_names_the_model(warp: str, top_k: int | None, top_p: float | None, rows: list[int]) -> None:
    """One bad beam among good ones is enough, and no cut hides it."""
    values = logits()
    values[rows] = torch.nan
    with pytest.raises(UserError, match="draft model returned NaN"):
        joint_distribution(
            log_probabilities(values, 1.0), NODES, WEIGHTS, config(warp=warp, top_k=top_k, top_p=top_p), "draft"
        )


def test_draws_without_replacement_are_successive_draws() -> None:
    """P(x_1, x_2, x_3) = Π p(x_k) / (1 - Σ_{j<k} p(x_j))."""
    probs = np.array([0.4, 0.0, 0.3, 0.2, 0.1])
    expected = {}
    for order in permutations([0, 2, 3, 4], 3):
        chance, left = 1.0, 1.0
        for x in order:
            chance, left = chance * probs[x] / left, left - probs[x]
        expected[order] = chance
    dice = Dice(torch.Generator().manual_seed(0))
    counts = Counter(tuple(map(int, draw(probs, 3, False, dice))) for _ in range(4000))
    assert chi_square_p(counts, expected) > 1e-3  # fixed seed


@pytest.mark.parametrize("replacement", [False, True])
def test_single_draws_follow_the_probabilities(replacement: bool) -> None:
    probs = np.array([0.0, 0.5, 0.3, 0.0, 0.2, 0.0])
    dice = Dice(torch.Generator().manual_seed(1))
    counts = Counter(int(draw(probs, 1, replacement, dice)[0]) for _ in range(4000))
    assert chi_square_p(counts, {1: 0.5, 2: 0.3, 4: 0.2}) > 1e-3  # fixed seed


def test_draws_with_replacement_are_independent() -> None:
    probs = np.array([0.6, 0.4])
    dice = Dice(torch.Generator().manual_seed(2))
    counts = Counter(tuple(map(int, draw(probs, 2, True, dice))) for _ in range(4000))
    assert chi_square_p(counts, {(0, 0): 0.36, (0, 1): 0.24, (1, 0): 0.24, (1, 1): 0.16}) > 1e-3  # fixed seed


def test_draws_end_with_the_support() -> None:
    dice = Dice(torch.Generator().manual_seed(3))
    assert sorted(draw(np.array([0.5, 0.0, 0.5]), 9, False, dice).tolist()) == [0, 2]
    assert draw(np.array([0.0, 1.0]), 4, True, dice).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("number", [0.0, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("replacement", [False, True])
def test_extreme_numbers_never_draw_the_impossible(number: float, replacement: bool) -> None:
    class Loaded(Dice):
        def __init__(self) -> None:
            pass

        def uniform(self, count: int) -> np.ndarray:
            return np.full(count, number)

    picks = draw(np.array([0.0, 0.5, 0.5, 0.0]), 2, replacement, Loaded())
    assert set(picks.tolist()) <= {1, 2}


@pytest.mark.filterwarnings("error")
def test_vanishing_probabilities_are_drawn_last_and_the_impossible_never() -> None:
    """1 / 5e-324 overflows; it must still come before what has no probability at all."""
    picks = draw(np.array([0.0, 5e-324, 1.0]), 3, False, Dice(torch.Generator().manual_seed(0)))
    assert picks.tolist() == [2, 1]


def test_dice_are_reproducible_and_in_range() -> None:
    first, second = (Dice(torch.Generator().manual_seed(5)).uniform(1000) for _ in range(2))
    assert (first == second).all()
    assert first.dtype == np.float64
    assert ((first >= 0) & (first < 1)).all()
