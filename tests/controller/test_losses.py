"""The count table and both likelihoods against enumeration, simulation, and each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from controller.losses import (
    bernoulli_nll,
    censored,
    count_nll,
    count_table,
    knows_survivor,
    regret_nll,
    regret_steps,
    survivor_nll,
    tails,
)
from controller.metrics import regret_rates, survivor_rates
from decoding.closed_form import accepted_count_table

WIDTH = 5


def random_accept(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def enumerate_counts(accept: np.ndarray, drafts: int) -> np.ndarray:
    """P(K_m = k) from all 2^m outcomes."""
    counts = np.zeros(WIDTH + 1)
    for bits in itertools.product((0, 1), repeat=drafts):
        probability, k = 1.0, 0
        for i, bit in enumerate(bits):
            probability *= accept[i, k] if bit else 1 - accept[i, k]
            k += bit
        counts[k] += probability
    return counts


def test_table_equals_enumeration() -> None:
    accept = random_accept(0, 3)
    table = count_table(accept)
    assert table.shape == (3, WIDTH + 1, WIDTH + 1)
    for row, drafts in itertools.product(range(3), range(WIDTH + 1)):
        np.testing.assert_allclose(table[row, drafts], enumerate_counts(accept[row].numpy(), drafts), atol=1e-12)
    np.testing.assert_allclose(tails(table)[..., 0], 1.0, atol=1e-12)


def test_table_equals_simulation() -> None:
    probabilities, draws = random_accept(1), 100_000
    accept = probabilities.numpy()
    coins, k = np.random.default_rng(0).random((draws, WIDTH)), np.zeros(draws, dtype=int)
    for i in range(WIDTH):
        k += coins[:, i] < accept[i, k]
    seen = np.bincount(k, minlength=WIDTH + 1) / draws
    # Five standard errors of a proportion from 100k draws are below 0.008.
    np.testing.assert_allclose(count_table(probabilities)[WIDTH], seen, atol=0.008)


def test_wider_never_accepts_less_whatever_the_network_says() -> None:
    at_least = tails(count_table(random_accept(2, 50)))
    assert (at_least[:, 1:] - at_least[:, :-1] >= -1e-12).all()  # more drafts
    assert (at_least[..., 1:] - at_least[..., :-1] <= 1e-12).all()  # more asked


def test_table_agrees_with_the_closed_form_with_replacement() -> None:
    """a[i, k] that depend on rejections in a row only are outside this table; equal ones are inside both."""
    np.testing.assert_allclose(
        count_table(torch.full((WIDTH, WIDTH), 0.3, dtype=torch.float64)),
        accepted_count_table(np.full(WIDTH, 0.3)),
        atol=1e-12,
    )


def test_table_has_a_gradient() -> None:
    accept = random_accept(3).requires_grad_()
    tails(count_table(accept))[WIDTH, 2].backward()
    assert accept.grad is not None and torch.isfinite(accept.grad).all()
    assert (accept.grad[torch.triu(torch.ones(WIDTH, WIDTH), 1).bool()] == 0).all()  # k > i is never reached


def test_count_likelihood_is_a_distribution_over_bits() -> None:
    logits = torch.randn(1, WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    bits = torch.tensor(list(itertools.product((False, True), repeat=WIDTH)))
    nll = count_nll(logits.expand(len(bits), -1, -1), bits).sum(-1)
    assert torch.exp(-nll).sum().item() == pytest.approx(1.0, abs=1e-5)
    accept, k, probability = logits[0].sigmoid(), 0, 1.0
    for i, bit in enumerate(bits[13].tolist()):
        probability *= accept[i, k].item() if bit else 1 - accept[i, k].item()
        k += bit
    assert torch.exp(-nll[13]).item() == pytest.approx(probability, rel=1e-4)


def test_soft_labels_have_the_same_expectation_and_less_variance() -> None:
    truth, draws = random_accept(4).float(), 20_000
    logits = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1))
    generator, k = torch.Generator().manual_seed(2), torch.zeros(draws, dtype=torch.long)
    bits, labels = [], []
    for i in range(WIDTH):
        labels.append(truth[i, k])
        bits.append(torch.rand(draws, generator=generator) < labels[-1])
        k = k + bits[-1]
    stacked, soft = torch.stack(bits, 1), torch.stack(labels, 1)
    hard_nll = count_nll(logits.expand(draws, -1, -1), stacked).sum(-1)
    soft_nll = count_nll(logits.expand(draws, -1, -1), stacked, soft).sum(-1)
    # Five standard errors of the difference of means.
    assert abs((hard_nll - soft_nll).mean()) < 5 * (hard_nll - soft_nll).std() / draws**0.5
    assert soft_nll.var() < hard_nll.var()


def test_survivor_likelihood_ignores_slots_that_were_not_kept() -> None:
    logits, slot, kept = torch.tensor([[1.0, 0.5, -2.0, 3.0]]), torch.tensor([2]), torch.tensor([2])
    expected = -torch.tensor([1.0, 0.5]).log_softmax(-1)[1]
    assert survivor_nll(logits, slot, kept).item() == pytest.approx(expected.item())
    assert survivor_nll(logits, torch.tensor([1]), torch.tensor([1])).item() == 0.0
    known = knows_survivor(torch.tensor([0, 1, 2, 1]), torch.tensor([4, 1, 4, 2]))
    assert known.tolist() == [False, False, True, True]


def test_censoring_does_not_bias_the_survivor_rates() -> None:
    truth = torch.tensor([0.4, 0.1, 0.2, 0.3])
    generator, rows = torch.Generator().manual_seed(0), 40_000
    kept = torch.randint(1, 5, (rows,), generator=generator)
    shares = truth * (torch.arange(1, 5) <= kept[:, None])  # what is not kept cannot survive
    slot = torch.multinomial(shares, 1, generator=generator)[:, 0] + 1
    fitted = survivor_rates({"survivor_slot": slot, "kept_width": kept}, 4)
    torch.testing.assert_close(fitted, truth, atol=0.015, rtol=0)  # five standard errors of the least seen slot
    naive = torch.bincount(slot, minlength=5)[1:] / rows
    assert (naive - truth).abs().max() > 0.1  # leaving the censoring out is caught by the same comparison
    logits = torch.zeros(4, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = survivor_nll(logits.expand(rows, -1), slot, kept).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(logits.softmax(-1).detach(), fitted, atol=2e-3, rtol=0)  # the same maximum


def test_bernoulli_nll_survives_rounding() -> None:
    assert torch.isfinite(bernoulli_nll(torch.tensor([0.0, 1.0, 1.0000001]), torch.tensor([True, False, True]))).all()


def test_censored_shares_are_those_of_the_slots_that_were_kept() -> None:
    logits = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    kept = torch.arange(50) % 5 + 1
    shares = censored(logits, kept).exp()
    for row, c in enumerate(kept.tolist()):
        expected = logits[row, :c].softmax(-1)
        torch.testing.assert_close(shares[row], torch.cat([expected, torch.zeros(5 - c)]))


def test_regret_steps_by_hand() -> None:
    """Slot 3 is the best: with the first slot 2 nats are lost, with two 0.5; what lies past c is not read."""
    deficits = torch.tensor([[2.0, 0.5, 0.0, 1.0], [2.0, 0.5, 0.0, -9.0], [0.0, 3.0, 1.0, 2.0], [1.0, 0.0, 0.0, 0.0]])
    slot, kept = torch.tensor([3, 3, 1, 0]), torch.tensor([4, 3, 2, 4])
    steps, seen = regret_steps(deficits, slot, kept)
    assert steps.tolist() == [[1.5, 0.5, 0.0], [1.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert seen.tolist() == [[True] * 3, [True, True, False], [True, False, False], [False] * 3]


def test_regret_steps_add_up_to_what_is_lost_with_the_other_slots() -> None:
    rng = np.random.default_rng(0)
    for width in (1, 2, 5):
        kept = rng.integers(1, width + 1, 200)
        deficits = rng.exponential(size=(200, width))
        slot = np.array([int(rng.integers(1, c + 1)) for c in kept])
        deficits[np.arange(200), slot - 1] = 0.0
        steps, seen = regret_steps(*(torch.from_numpy(values) for values in (deficits, slot, kept)))
        assert steps.shape == seen.shape == (200, width - 1) and (steps >= 0).all()
        assert seen.sum(-1).tolist() == (kept - 1).tolist()
        for row, c in enumerate(kept):
            for k in range(1, c + 1):
                lost = min(deficits[row, :k]) - min(deficits[row, :c])
                assert steps[row, k - 1 :].sum().item() == pytest.approx(lost)
                assert (lost == 0) == (slot[row] <= k)


def test_regret_likelihood_is_least_at_the_mean() -> None:
    """Poisson deviance is proper for the mean whatever the law, here one that is nothing like Poisson's."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(5000, dtype=torch.float64, generator=generator) ** 8 * 30
    steps[torch.rand(5000, generator=generator) < 0.7] = 0.0
    logs = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    best = logs[torch.stack([regret_nll(o, steps).mean() for o in logs]).argmin()]
    assert best.exp().item() == pytest.approx(steps.mean().item(), rel=5e-3)  # the grid's step is 4e-3
    free = torch.zeros((), dtype=torch.float64, requires_grad=True)
    regret_nll(steps.mean().log() + free, steps).mean().backward()
    assert free.grad is not None and abs(free.grad) < 1e-12


def test_regret_rates_are_means_over_the_rows_that_saw_a_step() -> None:
    deficits = torch.tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 7.0], [9.0, 2.0, 0.0]]).repeat(1000, 1)
    slot, kept = torch.tensor([2, 2, 3]).repeat(1000), torch.tensor([2, 2, 3]).repeat(1000)
    rates = regret_rates({"slot_deficits": deficits, "survivor_slot": slot, "kept_width": kept})
    assert rates.tolist() == pytest.approx([(1 + 3 + 7) / 3, 2.0], rel=2e-3)  # a row of 0.1 is added to each
