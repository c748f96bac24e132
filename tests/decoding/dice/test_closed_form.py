"""Closed forms of the accepted count, with replacement, against the verification that they foretell."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from decoding.dice.closed_form import accept_probabilities, accepted_count_table
from decoding.dice.rejection import verify_layer
from decoding.dice.sampling import Dice, draw
from decoding.support.arrays import FloatArray
from tests.decoding.stubs import chi_square_p


def random_layer(size: int, seed: int) -> tuple[FloatArray, FloatArray]:
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.ones(size)), generator.dirichlet(np.ones(size))


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_accepted_counts_follow_the_renewal_table(seed: int) -> None:
    """P(K_w = k) of the table against the accepted counts of verify_layer on drafts drawn from Q."""
    p, q = random_layer(5, seed)
    width, draws = 4, 4000
    dice = Dice(torch.Generator().manual_seed(seed))
    table = accepted_count_table(accept_probabilities(p, q, width))
    counts: Counter[int] = Counter()
    for _ in range(draws):
        drafts = draw(q, width, True, dice)
        verdict = verify_layer(p, q, drafts, width, width, width, True, dice)
        counts[verdict.accepted] += 1
    assert chi_square_p(counts, dict(enumerate(table[width]))) > 1e-3  # three seeds, fixed
    twice = accepted_count_table(accept_probabilities(p, q, width, as_shipped=True))[width]
    assert chi_square_p(counts, dict(enumerate(twice))) < 1e-6, "as_shipped is not the distribution of the counts"


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_accept_probabilities_are_the_overlaps_of_the_residuals(seed: int) -> None:
    """α_{j+1} = Σ min(R_j, Q), with R_0 = P and R_{j+1} = norm((R_j - Q)+), one step after the other."""
    p, q = random_layer(6, seed)
    residual, expected = p, []
    for _ in range(5):
        expected.append(np.minimum(residual, q).sum())
        rest = np.maximum(residual - q, 0.0)
        residual = rest / rest.sum()
    assert accept_probabilities(p, q, 5) == pytest.approx(np.array(expected), abs=1e-9)


def test_accept_probabilities_at_the_edges() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
    assert accept_probabilities(p, p, 3).tolist() == [1, 1, 1]
    assert accept_probabilities(p, q, 3).tolist() == [0, 0, 0]
    assert accepted_count_table(np.zeros(3))[3].tolist() == [1, 0, 0, 0]
    assert accepted_count_table(np.ones(3))[3].tolist() == [0, 0, 0, 1]
    assert accepted_count_table(np.zeros(0)).tolist() == [[1]]


@pytest.mark.parametrize("as_shipped", [False, True])
def test_table_rows_are_distributions(as_shipped: bool) -> None:
    p, q = random_layer(7, 3)
    accept = accept_probabilities(p, q, 6, as_shipped=as_shipped)
    assert ((accept >= 0) & (accept <= 1)).all()
    table = accepted_count_table(accept)
    assert table.shape == (7, 7)
    assert table.sum(1) == pytest.approx(np.ones(7))
    assert (np.triu(table, 1) == 0).all(), "no more accepted than drafted"


def test_table_of_equal_probabilities_is_binomial() -> None:
    """If every draft is accepted with probability a whatever came before, K_w is binomial."""
    table = accepted_count_table(np.full(4, 0.3))
    assert table[4] == pytest.approx([0.7**4, 4 * 0.3 * 0.7**3, 6 * 0.09 * 0.49, 4 * 0.027 * 0.7, 0.3**4])


def test_as_shipped_differs_after_the_first_rejection_only() -> None:
    p, q = random_layer(5, 0)
    sound, shipped = accept_probabilities(p, q, 3), accept_probabilities(p, q, 3, as_shipped=True)
    assert sound[0] == pytest.approx(shipped[0])
    assert abs(sound[1:] - shipped[1:]).max() > 0.01
