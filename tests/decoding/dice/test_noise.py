"""Shared noise is a fixed function of (seed, path, token), uniform and independent as far as tests can tell; a hash
that ignores the parent is caught by the same tests.

All inputs are fixed, so nothing is flaky. There are about 40 p-values; the smallest is expected near 0.02.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch

from decoding.dice import noise
from decoding.dice.noise import BITS, PathNoise, root_hash, seed_of
from decoding.forest.tree import TokenForest
from tests.decoding.stubs import chi_square_tail

PASS, CAUGHT = 1e-3, 1e-6
SIDE = 256  # numbers along each axis of a table


def path_hash(seed: int, path: list[int]) -> int:
    """As a forest has it that holds this path."""
    forest, node = TokenForest(), 0
    for token in path:
        node = forest.child(node, token)
    return int(PathNoise(seed, forest, SIDE).hashes([node])[0])


def rows_of(parents: list[int], tokens: int = SIDE) -> np.ndarray:
    """E after each of some paths by their hashes, [parents, tokens]."""
    grid = noise.child_hashes(np.array(parents)[:, None], noise.token_codes(np.arange(tokens))[None])
    return noise.exponentials(grid)


def chain(tokens: int, seed: int = 5) -> list[int]:
    """Hashes of the paths 7, 7 7, 7 7 7, ..."""
    hashes = [root_hash(seed)]
    for _ in range(tokens - 1):
        hashes.append(int(noise.child_hashes(np.array(hashes[-1:]), noise.token_codes(np.array([7])))[0]))
    return hashes


# Tables of U whose neighbours, along either axis, differ in one thing only.
TABLES: dict[str, Callable[[], np.ndarray]] = {
    "seeds": lambda: rows_of([root_hash(seed) for seed in range(SIDE)]),
    "seeds far apart": lambda: rows_of([root_hash(seed << 48) for seed in range(SIDE)]),
    "prompts": lambda: rows_of([root_hash(seed_of(torch.Generator().manual_seed(s))) for s in range(SIDE)]),
    "siblings": lambda: rows_of([path_hash(5, [1, 2, token]) for token in range(SIDE)]),
    "cousins": lambda: rows_of([path_hash(5, [token, 2]) for token in range(SIDE)]),
    "depths": lambda: rows_of(chain(SIDE)),
    "tokens of a large vocabulary": lambda: rows_of([root_hash(5)], SIDE * SIDE).reshape(SIDE, SIDE),
}


def uniformity_p(u: np.ndarray) -> float:
    """Chi-square of 1,024 equal bins."""
    counts = np.bincount((u.ravel() * 1024).astype(int), minlength=1024)
    mean = u.size / 1024
    return chi_square_tail(float(((counts - mean) ** 2 / mean).sum()), 1023)


def kolmogorov_p(u: np.ndarray) -> float:
    """P(the greatest distance from the uniform distribution function is as large), by its limit."""
    ordered, n = np.sort(u.ravel()), u.size
    steps = np.arange(n + 1) / n
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()) * np.sqrt(n)
    return float(min(1.0, 2 * sum((-1) ** (k - 1) * np.exp(-2 * (k * distance) ** 2) for k in range(1, 50))))


def independence_p(a: np.ndarray, b: np.ndarray) -> float:
    """Chi-square of pairs in 16 x 16 equal cells."""
    cells = (a.ravel() * 16).astype(int) * 16 + (b.ravel() * 16).astype(int)
    counts, mean = np.bincount(cells, minlength=256), a.size / 256
    return chi_square_tail(float(((counts - mean) ** 2 / mean).sum()), 255)


def smallest_p(table: np.ndarray) -> float:
    """Of all tests on one table; the number of tests is made up for."""
    u = np.exp(-table)
    pairs = [(u[:-1], u[1:]), (u[:, :-1], u[:, 1:]), (u[:-2], u[2:]), (u[:-1, :-1], u[1:, 1:]), (u, u.T)]
    apart = ~np.eye(SIDE, dtype=bool)
    tests = [uniformity_p(u), kolmogorov_p(u)]
    tests += [independence_p(a[apart], b[apart]) if a is u else independence_p(a, b) for a, b in pairs]
    return min(1.0, len(tests) * min(tests))


@pytest.mark.parametrize("name", TABLES)
def test_noise_is_uniform_and_independent_of_what_is_near(name: str) -> None:
    assert smallest_p(TABLES[name]()) > PASS


@pytest.mark.parametrize("name", ["seeds", "siblings", "depths"])
def test_a_hash_that_ignores_the_parent_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = noise.child_hashes
    monkeypatch.setattr(noise, "child_hashes", lambda parents, codes: honest(np.zeros_like(parents), codes))
    assert smallest_p(TABLES[name]()) < CAUGHT


@pytest.mark.parametrize("name", ["seeds", "siblings"])
def test_a_sum_in_place_of_a_mixer_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and parents are added, and nothing is finalised but the words of tokens."""
    monkeypatch.setattr(noise, "child_hashes", lambda parents, codes: parents + codes)
    monkeypatch.setattr(noise, "token_codes", lambda tokens: tokens * (1 << 20))
    monkeypatch.setattr(noise, "_finalised", lambda words, rounds: words)
    assert smallest_p(TABLES[name]()) < CAUGHT


@pytest.mark.parametrize("bit", [0, 1, 17, 31, 32, 47, 63])
@pytest.mark.parametrize("of", ["seed", "token", "parent"])
def test_every_bit_reaches_every_other(of: str, bit: int) -> None:
    """Flipping one bit of the input flips each of the 52 bits of U in half of all cases."""
    count = 4000
    words = np.random.default_rng(bit).integers(-(2**63), 2**63 - 1, count)
    flipped = words ^ np.int64(-(2**63) if bit == 63 else 1 << bit)
    if of == "seed":
        pair = [np.array([root_hash(int(seed)) for seed in some[:500]]) for some in (words, flipped)]
        pair = [noise.child_hashes(some, noise.token_codes(np.full(len(some), 3))) for some in pair]
    elif of == "token":
        pair = [noise.child_hashes(np.full(count, root_hash(1)), noise.token_codes(some)) for some in (words, flipped)]
    else:
        pair = [noise.child_hashes(some, noise.token_codes(np.full(count, 3))) for some in (words, flipped)]
    changed = noise._numerators(pair[0]) ^ noise._numerators(pair[1])
    share = np.array([((changed >> at) & 1).mean() for at in range(BITS)])
    assert np.abs(share - 0.5).max() < 5 * 0.5 / np.sqrt(len(changed))  # 52 binomials: 5 sigma is 3e-5 by chance


def test_numbers_lie_strictly_between_zero_and_one_and_never_tie_by_rounding() -> None:
    """The ends of the range, and the words next to them."""
    for k in (0, 1, 2**BITS - 2, 2**BITS - 1):
        u = (np.array([k]) + 0.5) * 2.0**-BITS
        assert 0 < u[0] < 1
        assert np.isfinite(-np.log(u[0])) and -np.log(u[0]) > 0
    for k, after in pairwise([0, 1, 2]):
        assert (k + 0.5) * 2.0**-BITS < (after + 0.5) * 2.0**-BITS
        assert (2.0**BITS - 1 - after + 0.5) * 2.0**-BITS < (2.0**BITS - 1 - k + 0.5) * 2.0**-BITS


def test_exponentials_have_their_moments() -> None:
    numbers = rows_of([root_hash(seed) for seed in range(300)], 1000)
    assert numbers.mean() == pytest.approx(1, abs=5 / np.sqrt(numbers.size))
    assert (numbers**2).mean() == pytest.approx(2, abs=5 * np.sqrt(20 / numbers.size))


def test_numpy_and_torch_have_the_same_numbers() -> None:
    """The same words and U; their logarithms may differ in the last place."""
    parents = np.array([root_hash(seed) for seed in range(4)])
    vocabulary = 50_000
    hosts = noise.child_hashes(parents[:, None], noise.token_codes(np.arange(vocabulary))[None])
    devices = noise.child_hashes(torch.from_numpy(parents)[:, None], noise.token_codes(torch.arange(vocabulary))[None])
    assert np.array_equal(hosts, devices.numpy())
    words = noise._numerators(hosts)
    assert np.array_equal(words, noise._numerators(devices).numpy())
    assert words.min() >= 0 and words.max() < 2**BITS
    grid = noise.exponential_grid(parents, vocabulary, torch.device("cpu")).numpy()
    assert np.allclose(grid, noise.exponentials(hosts), rtol=1e-15, atol=0)


@pytest.mark.gpu
def test_a_gpu_has_the_same_numbers() -> None:
    parents = np.array([root_hash(seed) for seed in range(4)])
    here, there = (noise.exponential_grid(parents, 50_000, torch.device(name)).cpu() for name in ("cpu", "cuda"))
    assert torch.allclose(here, there, rtol=1e-15, atol=0)


def test_known_numbers() -> None:
    """SplitMix64 of seed 0, as its authors print it; and that no later change moves the noise of a seed."""
    assert [int(code) % (1 << 64) for code in noise.token_codes(np.arange(2))] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]
    assert path_hash(0, [1, 2, 3]) != path_hash(0, [3, 2, 1]) != path_hash(0, [2, 1, 3])
    assert path_hash(3, [5]) != path_hash(5, [3])


def test_hashes_do_not_collide() -> None:
    """Siblings cannot, and of 3 million others a pair is expected to with chance 3e-7."""
    parents = np.array(
        [root_hash(seed) for seed in range(100)] + chain(50, 200) + [path_hash(1, [t]) for t in range(50)]
    )
    grid = noise.child_hashes(parents[:, None], noise.token_codes(np.arange(15_000))[None])
    assert (np.diff(np.sort(grid, axis=None)) > 0).all()


def test_seeds_come_from_the_stream() -> None:
    first, second = (torch.Generator().manual_seed(3) for _ in range(2))
    assert seed_of(first) == seed_of(second) != seed_of(first)


def test_a_forest_forgets_dead_nodes_and_knows_them_again() -> None:
    forest = TokenForest()
    node = forest.child(forest.child(0, 4), 2)
    paths = PathNoise(1, forest, 5)
    before = paths.of(np.array([node, 0]), np.array([3, 3]))
    assert np.allclose(paths.grid(np.array([node, 0]), torch.device("cpu"))[:, 3].numpy(), before, rtol=1e-15)
    paths.forget([node])
    assert np.array_equal(paths.of(np.array([node, 0]), np.array([3, 3])), before)
