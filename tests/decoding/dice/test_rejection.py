"""Verification of one layer, by integrating over all drafts and all coins."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from decoding import DecodingConfig, DSBDDecoder
from decoding.dice.rejection import LayerVerdict, align, verify_layer
from decoding.dice.sampling import Dice, FloatArray, Joint, draw
from tests.small_pair import small_pair

Slots = tuple[int, ...]


class ScriptedDice(Dice):
    """Deals the given numbers, then zeros."""

    def __init__(self, numbers: list[float]) -> None:
        self._numbers = iter(numbers)

    def uniform(self, count: int) -> FloatArray:
        return np.array([next(self._numbers, 0.0) for _ in range(count)])


def successive_draws(probs: FloatArray, count: int, replacement: bool) -> dict[Slots, float]:
    """Distribution of `count` draws in order, by the definition of design 5.2 and 5.3."""
    now: dict[Slots, float] = {(): 1.0}
    for _ in range(count if replacement else min(count, np.count_nonzero(probs))):
        after = {}
        for drawn, chance in now.items():
            left = 1.0 if replacement else 1.0 - sum(probs[x] for x in drawn)
            for x in np.flatnonzero(probs):
                if replacement or x not in drawn:
                    after[(*drawn, int(x))] = chance * probs[x] / left
        now = after
    return now


def pieces(outcome: Callable[[float], int]) -> Iterator[tuple[float, float, int]]:
    """Cut [0, 1) where a piecewise constant, monotone outcome changes: (from, to, outcome), by bisection to 2^-53."""

    def cut(low: float, high: float, at_low: int, at_high: int) -> Iterator[tuple[float, float, int]]:
        middle = (low + high) / 2
        if at_low == at_high:
            yield low, high, at_low
        elif high - low < 2e-16 or middle in (low, high):
            yield low, middle, at_low
            yield middle, high, at_high
        else:
            at_middle = outcome(middle)
            yield from cut(low, middle, at_low, at_middle)
            yield from cut(middle, high, at_middle, at_high)

    yield from cut(0.0, 1.0, outcome(0.0), outcome(np.nextafter(1.0, 0.0)))


def integrate(verify: Callable[[Dice], LayerVerdict], drafts: int) -> dict[Slots, float]:
    """Distribution of the slots over all numbers that may be rolled: one coin a draft, then one number a refill.

    Nothing of the rule is repeated here: each number's pieces are found by bisection on what changes with it (a bit, or
    a slot), given the numbers before it.
    """
    out: dict[Slots, float] = defaultdict(float)

    def explore(script: list[float], chance: float) -> None:
        verdict = verify(ScriptedDice(script))
        position = len(script)
        refills = len(verdict.slots) - verdict.accepted
        if position >= drafts + refills:
            out[tuple(verdict.slots)] += chance
            return

        def outcome(number: float) -> int:
            rolled = verify(ScriptedDice([*script, number]))
            if position >= drafts:
                return rolled.slots[rolled.accepted + position - drafts]
            return int(not rolled.bits[position]) if position < len(rolled.bits) else -1  # -1: not judged any more

        parts = list(pieces(outcome))
        for value in {value for _, _, value in parts}:
            share = sum(high - low for low, high, v in parts if v == value)
            _, inside = max((high - low, (low + high) / 2) for low, high, v in parts if v == value)
            explore([*script, inside], chance * share)

    explore([], 1.0)
    return out


def slots_distribution(p: FloatArray, q: FloatArray, width: int, verify: Callable[..., LayerVerdict], **rule: object):
    """Distribution of the first M slots of a layer over all drafts and all coins."""
    total: dict[Slots, float] = defaultdict(float)
    for drafts, chance in successive_draws(q, width, bool(rule["replacement"])).items():
        found = integrate(lambda dice, d=drafts: verify(p, q, np.array(d), dice=dice, **rule), len(drafts))
        for slots, share in found.items():
            total[slots[: int(rule["target_width"])]] += chance * share
    return total


LAYERS = {
    "P and Q everywhere": ([0.5, 0.3, 0.2], [0.2, 0.3, 0.5]),
    "equal": ([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
    "dead entries (P = 0)": ([0.6, 0.4, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]),
    "Q on a part": ([0.4, 0.35, 0.25], [0.9, 0.1, 0.0]),
    "supports that overlap": ([0.7, 0.3, 0.0], [0.0, 0.25, 0.75]),
    "supports apart": ([0.7, 0.3, 0.0], [0.0, 0.0, 1.0]),
    "one outcome": ([1.0, 0.0], [0.5, 0.5]),
    "four": ([0.5, 0.3, 0.15, 0.05], [0.1, 0.15, 0.25, 0.5]),
}
WIDTHS = [(w, m) for w in (1, 2, 3, 4) for m in (1, 2, 3, 4)]


def check_slots(layer: str, width: int, target_width: int, replacement: bool, extra: int = 0) -> None:
    p, q = (np.array(x) for x in LAYERS[layer])
    rule = dict(
        target_width=target_width, limit=target_width + extra, refill=target_width + extra, replacement=replacement
    )
    found = slots_distribution(p, q, width, verify_layer, **rule)
    expected = successive_draws(p, target_width, replacement)
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)
    assert set(found) <= set(expected)
    for slots, chance in expected.items():
        assert found.get(slots, 0.0) == pytest.approx(chance, abs=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("width", "target_width"), WIDTHS)
def test_slots_are_successive_draws_from_p_without_replacement(layer: str, width: int, target_width: int) -> None:
    """Design 5.2: summed over all drafts and coins, the first M slots are M draws from P without replacement.

    Slot k with history h is drawn from T = P(· | not in h). Writing a_i for the mass that draft i accepts,
    Σ_i Π_{j<i}(1 - a_j) min(R_i, Q_i)(x) + Π_j(1 - a_j) R_{w+1}(x) = T(x) for every x, since
    R_i = min(R_i, Q_i) + (1 - a_i) R_{i+1}. The coins' thresholds come from bisection, accurate to about 1e-16 each.
    """
    check_slots(layer, width, target_width, replacement=False)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("width", "target_width"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3)])
def test_slots_are_successive_draws_from_p_with_replacement(layer: str, width: int, target_width: int) -> None:
    """Design 5.3: as above with T = P throughout; M independent draws."""
    check_slots(layer, width, target_width, replacement=True)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("width", "target_width"), [(2, 1), (3, 1), (3, 2), (4, 2)])
def test_surplus_and_refill_leave_the_first_slots_exact(layer: str, width: int, target_width: int) -> None:
    """surplus="keep", refill="full": more slots than M may be filled; the first M are exact all the same."""
    check_slots(layer, width, target_width, replacement=False, extra=1)


def test_the_integral_catches_a_width_that_follows_the_coins() -> None:
    """Stopping at M = 1 once the first draft was rejected, else at 2, is not a draw of either width."""
    p, q = (np.array(x) for x in LAYERS["P and Q everywhere"])

    def greedy(p: FloatArray, q: FloatArray, drafts: np.ndarray, dice: Dice, **_: object) -> LayerVerdict:
        verdict = verify_layer(p, q, drafts, 1, 2, 2, False, dice)
        return verdict if verdict.accepted else LayerVerdict(verdict.slots[:1], 0, False, verdict.bits)

    found = slots_distribution(p, q, 2, greedy, target_width=2, replacement=False)
    expected = successive_draws(p, 2, replacement=False)
    pairs = sum(found.get(slots, 0.0) for slots in expected)
    assert max(abs(found.get(slots, 0.0) / pairs - chance) for slots, chance in expected.items()) > 0.01


def random_layer(size: int, seed: int) -> tuple[FloatArray, FloatArray]:
    generator = np.random.default_rng(seed)
    return generator.dirichlet(np.ones(size)), generator.dirichlet(np.ones(size))


# Bits and probabilities for traces.


@pytest.mark.parametrize("replacement", [False, True])
def test_shadow_judges_every_draft_and_changes_no_slot(replacement: bool) -> None:
    p, q = random_layer(6, 4)
    for seed in range(50):
        dice, same = (Dice(torch.Generator().manual_seed(seed)) for _ in range(2))
        drafts = draw(q, 5, replacement, dice)
        assert (draw(q, 5, replacement, same) == drafts).all()
        plain = verify_layer(p, q, drafts, 2, 2, 2, replacement, dice)
        shadowed = verify_layer(
            p, q, drafts, 2, 2, 2, replacement, same, shadow=Dice(torch.Generator().manual_seed(seed + 100))
        )
        assert shadowed.slots == plain.slots
        assert (shadowed.accepted, shadowed.passed) == (plain.accepted, plain.passed)
        assert shadowed.bits[: len(plain.bits)] == plain.bits
        assert len(shadowed.bits) == len(shadowed.probabilities) == 5


@pytest.mark.parametrize("replacement", [False, True])
def test_bits_are_calibrated_by_their_probabilities(replacement: bool) -> None:
    """E[bit_i | history] = a_i = Σ min(R, Q_i): the sum of bit_i - a_i has mean 0 and variance Σ a_i (1 - a_i)."""
    p, q = random_layer(6, 5)
    dice, shadow = Dice(torch.Generator().manual_seed(0)), Dice(torch.Generator().manual_seed(1))
    surprise, variance = np.zeros(4), np.zeros(4)
    for _ in range(1500):
        verdict = verify_layer(p, q, draw(q, 4, replacement, dice), 1, 1, 1, replacement, dice, shadow)
        chance = np.array(verdict.probabilities)
        surprise += verdict.bits - chance
        variance += chance * (1 - chance)
    assert (abs(surprise) < 4 * np.sqrt(variance)).all()  # 4 sigma, 8 numbers, fixed seeds


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("faint", [1e-100, 1e-199, 1e-250, 1e-310])
def test_what_a_cold_draft_hardly_has_is_judged_by_its_shares(faint: float) -> None:
    """After draft 0, which has all but traces of Q, Q_1 is (0, 1/3, 2/3) and R is (0, .2, .8): 1 passes by .6."""
    p, q = np.array([0.5, 0.1, 0.4]), np.array([1.0, faint, 2 * faint])
    for coin, accepted in ((0.59, True), (0.61, False)):
        dice = ScriptedDice([0.9, coin])
        verdict = verify_layer(p, q, np.array([0, 1]), 2, 2, 2, False, dice)
        assert verdict.bits == [False, accepted], (coin, verdict)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("temperature", [1e-6, 5e-4, 1.5e-3, 1e4])
@pytest.mark.parametrize("verification", ["rejection", "shared_noise"])
def test_cold_and_hot_drafts_raise_no_warning(verification: str, temperature: float) -> None:
    """At the two in the middle a draft has traces of a token that floats hardly hold, once another one is gone."""
    config = DecodingConfig(
        target_width=4,
        draft_width=8,
        max_new_tokens=8,
        temperature=temperature,
        top_k=None,
        verification=verification,
        eos_token_id=-1,
    )
    (result,) = DSBDDecoder(small_pair(), config).generate([[5, 6, 7]], torch.Generator().manual_seed(0))
    assert len(result.sequences[0]) == 8


def test_verdict_counts_and_limits() -> None:
    """Equal P and Q accept everything: surplus up to the limit, no refill."""
    p = np.array([0.4, 0.3, 0.2, 0.1])
    dice = Dice(torch.Generator().manual_seed(0))
    drafts = np.array([2, 0, 3, 1])
    kept = verify_layer(p, p, drafts, 1, 3, 3, False, dice)
    assert (kept.slots, kept.accepted, kept.passed) == ([2, 0, 3], 3, True)
    dropped = verify_layer(p, p, drafts, 1, 1, 3, False, dice)
    assert (dropped.slots, dropped.accepted, dropped.passed) == ([2], 1, True)


def test_a_layer_that_fails_is_refilled_from_p() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.0, 0.0, 1.0])
    dice = Dice(torch.Generator().manual_seed(0))
    verdict = verify_layer(p, q, np.array([2]), 1, 3, 3, False, dice)
    assert sorted(verdict.slots) == [0, 1], "the support ends the refill"
    assert (verdict.accepted, verdict.passed, verdict.bits) == (0, False, [False])


def test_align_puts_both_on_the_union() -> None:
    def joint(parents: list[int], tokens: list[int], probs: list[float]) -> Joint:
        return Joint(np.array(parents), np.array(tokens), np.array(probs), np.log(probs))

    both = align(joint([3, 5], [7, 0], [0.75, 0.25]), joint([5, 4, 3], [0, 1, 2], [0.5, 0.25, 0.25]))
    assert both.p.tolist() == [0, 0.75, 0, 0.25]  # (3, 2), (3, 7), (4, 1), (5, 0)
    assert both.q.tolist() == [0.25, 0, 0.25, 0.5]
    assert both.of_target.tolist() == [1, 3]
    assert both.of_draft.tolist() == [3, 2, 0]
    assert both.in_target([3, 1]).tolist() == [1, 0]
