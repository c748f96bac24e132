"""Plans: choices by hand and by trying all of them, and the directions in which they must move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from controller.experience import Outlook, Pace, Throughput
from controller.features import NAMES, TARGET_NAMES
from controller.host import EarlyWeights, LateWeights, foresee
from controller.losses import count_table, tails
from controller.plan import (
    Decision,
    Planner,
    best_width,
    kept_width,
    least_bearable,
    rules_of,
    settles_alone,
)
from decoding import DecodingConfig, DSBDDecoder, RandomWidth
from decoding.arrays import FloatArray, FloatVector
from decoding.cost_table import UnitCosts, iteration_seconds
from decoding.results import LayerEvent
from tests.controller.synthetic import CONFIG
from tests.decoding.stubs import random_pair

FREE = UnitCosts(0.0, 1.0, 0.0)  # widths cost nothing
RULES = [(surplus, refill) for surplus in ("keep", "drop") for refill in ("full", "width")]
rules = pytest.mark.parametrize(("surplus", "refill"), RULES)


def losses(survivors: tuple[float, ...]) -> FloatArray:
    """L(k): what is left of the survivors beyond slot k, L(0) = L(1)."""
    lost = 1.0 - np.cumsum(survivors)
    return np.concatenate([lost[:1], lost[:-1], [0.0]])


def random_losses(rng: np.random.Generator, ranks: int) -> FloatArray:
    """Never increasing, nothing lost with all slots; some steps are nothing too."""
    steps = rng.exponential(size=ranks - 1) * (rng.random(ranks - 1) < 0.8)
    lost = np.append(steps[::-1].cumsum()[::-1], 0.0)
    return np.append(lost[0], lost)


NO_HIDDEN = np.zeros(0, np.float32)
FEATURES, TARGET_FEATURES = (np.zeros(len(names), np.float32) for names in (NAMES, TARGET_NAMES))


class Saying:
    """A host network that says the same of every layer: that all that is lost is in nats, which count half."""

    def __init__(self, accept: FloatArray, loss: FloatArray) -> None:
        self.at_least = tails(count_table(torch.from_numpy(accept))).numpy()  # [W + 1, W + 1]
        self.loss = loss  # [R + 1]
        with np.errstate(divide="ignore"):
            logits, steps = np.log(accept) - np.log1p(-accept), np.log(2 * (loss[1:-1] - loss[2:]))
            survivors = np.log(np.eye(1, len(loss) - 1)[0])  # the best line is in the first slot
        biases = logits, np.append(survivors, steps)

        def nothing(*shape: int) -> FloatVector:
            return np.zeros(shape, np.float32)

        features, late_features = len(NAMES), len(TARGET_NAMES)
        layers = (nothing(features, 2), nothing(2)), (nothing(2, 2), nothing(2))
        accept_bias, quality_bias = (bias.astype(np.float32) for bias in biases)
        sizes = accept_bias.size, quality_bias.size
        heads = nothing(2, sizes[0]), accept_bias, nothing(2, sizes[1]), quality_bias
        none = nothing(0, 0)
        self.early = tuple(EarlyWeights(nothing(features), nothing(features), none, none, layers, *heads))
        late = (
            (nothing(late_features, 2), nothing(2)),
            (nothing(2, 2), nothing(2)),
            (nothing(2, sizes[1]), quality_bias),
        )
        self.late = tuple(LateWeights(nothing(late_features), nothing(late_features), late))


def prediction(accept: float = 0.6, survivors: tuple[float, ...] = (0.6, 0.2, 0.1, 0.1)) -> Saying:
    return Saying(np.full((CONFIG.draft_width, CONFIG.draft_width), accept), losses(survivors))


def plan(
    planner: Planner,
    host: Any,
    rate: float = 1.0,
    reach: float = 1.0,
    support: int = 10,
    config: DecodingConfig = CONFIG,
    outlook: Outlook | None = None,
) -> Decision:
    place = rate, reach, 1, 3, 8, support
    return planner.widths(host, FEATURES, (NO_HIDDEN, NO_HIDDEN), config, outlook or Outlook(), *place)


def final_width(planner: Planner, host: Any, config: DecodingConfig = CONFIG, rate: float = 1.0) -> int:
    return planner.final_width(host, TARGET_FEATURES, config, rate)[0]


def random_predictions(count: int) -> list[Saying]:
    rng = np.random.default_rng(0)
    return [Saying(rng.random((6, 6)), random_losses(rng, 4)) for _ in range(count)]


def kept_beams(accepted: int, asked: int, config: DecodingConfig) -> int:
    """Design 5.2, surplus and refill: how many beams go on."""
    if accepted >= asked:
        return min(accepted, config.target_width) if config.surplus == "keep" else asked
    return config.target_width if config.refill == "full" else asked


def worth(
    asked: int, counts: FloatArray, loss: FloatArray, further: float, width_value: float, config: DecodingConfig
) -> float:
    """Expected worth of asking for so many: what a pass brings, less the price of what is lost with the beams kept."""
    return sum(
        float(chance) * (further * (accepted >= asked) - width_value * loss[kept_beams(accepted, asked, config)])
        for accepted, chance in enumerate(counts)
    )


def below(
    costs: UnitCosts,
    outlook: Outlook,
    rate: float,
    reach: float,
    layers: range,
    nodes: int,
    width: int,
    parents: int | None = None,
) -> tuple[float, float]:
    """The best depth to go on to: what that gains in all, and the reward that it promises once reached.

    The first of the layers continues `parents` nodes, as many as the others if it is not said.
    """
    parents = width if parents is None else parents
    best, promised, gained, passed, seconds = 0.0, 0.0, 0.0, 1.0, 0.0
    for layer in layers:
        passed *= outlook.passing(layer)
        gained += passed * outlook.left * outlook.earned
        seconds += costs.draft_cost(parents) + costs.target_cost(nodes + width) - costs.target_cost(nodes)
        nodes, parents = nodes + width, width
        if reach * gained - rate * seconds > best:
            best, promised = reach * gained - rate * seconds, gained
    return best, promised


def some_outlook(rng: np.random.Generator) -> Outlook:
    outlook = Outlook()
    for _ in range(100):
        outlook.saw(int(rng.integers(1, 4)), float(rng.random() < 0.7), rng.random())
        outlook.lost(rng.random() / 2)
        outlook.was_paid(rng.random())
    return outlook


def test_a_host_says_what_it_is_made_to_say() -> None:
    for host in random_predictions(10):
        at_least, early = foresee(FEATURES, NO_HIDDEN, NO_HIDDEN, host.early, CONFIG.target_width)
        late = Planner(FREE, 1.0).final_width(host, TARGET_FEATURES, CONFIG, 1.0)[1]
        np.testing.assert_allclose(at_least, host.at_least, atol=1e-6)
        np.testing.assert_allclose([early, late], [host.loss] * 2, atol=1e-6)


def test_free_widths_are_wide_and_dear_ones_narrow() -> None:
    assert plan(Planner(FREE, 1.0), prediction()).draft_width == CONFIG.draft_width
    assert plan(Planner(UnitCosts(0.25, 1.0, 5.0), 1.0), prediction()).draft_width == 1


@pytest.mark.parametrize(("changes", "support", "widest"), [
    ({}, 10, 6), ({}, 4, 4), ({}, 1, 1), ({"min_width": 3}, 2, 3), ({"replacement": True}, 2, 6),
])  # fmt: skip
def test_no_more_is_drafted_than_there_is(changes: dict[str, Any], support: int, widest: int) -> None:
    """Free drafts: as many as Q has entries and the config allows, but no fewer than min_width."""
    assert (
        plan(Planner(FREE, 1.0), prediction(), config=CONFIG.with_changes(**changes), support=support).draft_width
        == widest
    )


@rules
def test_chosen_pair_is_the_best_of_all_pairs(surplus: str, refill: str) -> None:
    """Against the expected reward of every pair, written out: this layer, the next, and the best depth below."""
    config, rng = CONFIG.with_changes(surplus=surplus, refill=refill), np.random.default_rng(1)
    costs, pairs = UnitCosts(), set()
    for predicted in random_predictions(40):
        outlook, rate, reach = some_outlook(rng), rng.uniform(0.3, 2.0), rng.uniform(0.3, 1.0)
        value = float(rng.exponential())
        chosen = plan(Planner(costs, value), predicted, rate, reach, config=config, outlook=outlook)

        def gain(
            w: int,
            m: int,
            predicted: Saying = predicted,
            outlook: Outlook = outlook,
            rate: float = rate,
            reach: float = reach,
            value: float = value,
        ) -> tuple[float, float]:
            at_least = predicted.at_least[w]
            counts = at_least - np.append(at_least[1:], 0)
            passing = min(1.0, at_least[m] * outlook.correction)
            now = worth(m, counts, predicted.loss, outlook.earned, value, config)
            now += (passing - at_least[m]) * outlook.earned
            seconds = costs.target_cost(8 + w) - costs.target_cost(8)
            # Layers 2 and 3 would be as wide as can be.
            more, promised = below(costs, outlook, rate, reach * passing, range(2, 4), 8 + 6, 6, w)
            return reach * now - rate * seconds + more, promised

        best = max(gain(w, m)[0] for w in range(1, 7) for m in range(1, min(w, 4) + 1))
        found, promised = gain(chosen.draft_width, chosen.target_width)
        assert found == pytest.approx(best)
        assert chosen.passing == pytest.approx(predicted.at_least[chosen.draft_width, chosen.target_width], abs=1e-6)
        assert chosen.further == pytest.approx(outlook.earned + promised)
        pairs.add((chosen.draft_width, chosen.target_width))
    assert len(pairs) > 5


@dataclass(frozen=True)
class Case:
    """A settled draft width, with all that M may follow."""

    config: DecodingConfig
    draft_width: int
    counts: FloatArray  # [w + 1]
    loss: FloatArray
    further: float
    width_value: float

    def choose(self, alone: bool) -> int:
        config, price = self.config, (self.width_value, self.further)
        if alone:
            return least_bearable(self.loss, *price, config.min_width, config.target_width)
        at_least = tails(torch.from_numpy(self.counts)).numpy()
        return best_width(self.loss, at_least, *price, rules_of(config))

    def short_of_best(self, asked: int) -> float:
        """Worth lost by asking for so many, beside the best that may be asked."""
        found = {
            m: worth(m, self.counts, self.loss, self.further, self.width_value, self.config)
            for m in range(self.config.min_width, self.config.target_width + 1)
        }
        return max(found.values()) - found[asked]


def random_case(rng: np.random.Generator, surplus: str, refill: str, unused: int = 0) -> Case:
    """Of any widths; `unused`: how many slots more the controller was trained for."""
    most, width = int(rng.integers(1, 7)), int(rng.integers(1, 10))
    config = DecodingConfig(
        target_width=most,
        draft_width=max(most, width),
        min_width=int(rng.integers(1, most + 1)),
        surplus=surplus,
        refill=refill,
    )
    counts = rng.dirichlet(np.full(width + 1, 0.4))
    counts[rng.random(width + 1) < 0.2] = 0.0
    counts = counts / counts.sum() if counts.any() else np.eye(width + 1)[0]
    return Case(
        config,
        width,
        counts,
        random_losses(rng, most + unused),
        further=float(rng.uniform(0.2, 4.0)),
        width_value=float(rng.exponential(2.0)) * (rng.random() < 0.95),
    )


@rules
def test_target_width_is_the_best_of_all(surplus: str, refill: str) -> None:
    rng = np.random.default_rng(3)
    for unused in (0, 0, 2):
        cases = [random_case(rng, surplus, refill, unused) for _ in range(500)]
        assert max(case.short_of_best(case.choose(alone=False)) for case in cases) < 1e-9
        assert len({case.choose(alone=False) for case in cases}) == 6


@pytest.mark.parametrize("unused", [0, 2])
def test_each_count_speaks_for_itself_where_all_that_is_accepted_goes_on(unused: int) -> None:
    """surplus="keep", refill="full": the best M does not depend on the distribution of the accepted count.

    The worth of M is Σ over k >= M of P(K = k) (further - value · L(k)), and these terms change sign once; with 0 for
    a failure, which keeps all the slots there are.
    """
    rng = np.random.default_rng(4)
    cases = [random_case(rng, "keep", "full", unused) for _ in range(3000)]
    assert all(settles_alone(case.config) for case in cases)
    assert max(case.short_of_best(case.choose(alone=True)) for case in cases) < 1e-9
    assert len({case.choose(alone=True) for case in cases}) == 6


@pytest.mark.parametrize(("surplus", "refill"), RULES[1:])
def test_counts_do_not_speak_for_themselves_elsewhere(surplus: str, refill: str) -> None:
    """The same comparison finds a fault where M decides how many beams are kept."""
    rng = np.random.default_rng(4)
    cases = [random_case(rng, surplus, refill) for _ in range(500)]
    assert not any(settles_alone(case.config) for case in cases)
    short = [case.short_of_best(case.choose(alone=True)) for case in cases]
    assert np.mean(np.array(short) > 1e-3) > 0.05


def test_an_exact_config_does_not_settle_alone() -> None:
    assert settles_alone(DecodingConfig()) and not settles_alone(DecodingConfig(exact=True))


def test_final_width_is_the_best_of_all() -> None:
    rng, seen = np.random.default_rng(5), set()
    for _ in range(300):
        costs = UnitCosts(*rng.exponential(size=3) * (1, 1, 0.1))
        most = int(rng.integers(1, 7))
        depth = int(rng.integers(0, 3))
        config = CONFIG.with_changes(
            target_width=most, min_width=int(rng.integers(1, most + 1)), draft_depth=depth, draft_width=8
        )
        loss, rate, value = random_losses(rng, most + int(rng.integers(3))), rng.exponential(), rng.exponential()
        host = Saying(np.full((1, 1), 0.5), loss)
        price = {
            m: value * loss[m] + rate * (costs.target_cost(m) + (costs.draft_cost(m) if depth else 0.0))
            for m in range(config.min_width, most + 1)
        }
        chosen = final_width(Planner(costs, value), host, config, rate)
        assert price[chosen] == pytest.approx(min(price.values()))
        seen.add(chosen)
        free = final_width(Planner(costs, value), host, config.with_changes(one_beam_cache=True), rate)
        assert loss[free] == loss[config.min_width : most + 1].min()  # one beam goes on, whatever M is
    assert seen == set(range(1, 7))


def test_what_a_pass_brings_counts_the_layers_planned_below() -> None:
    """A cheap draft is followed to the end: 1 + 0.6 + 0.36 layers; a dear one is not."""
    cheap, dear = (
        plan(Planner(UnitCosts(base, 1.0, 0.0), 0.0), prediction(accept=1.0), rate=0.5).further for base in (0.01, 5.0)
    )
    assert cheap == pytest.approx(1 + 0.6 + 0.36) and dear == 1.0


def test_outlook_learns_how_often_layers_pass_and_what_they_earn_and_lose() -> None:
    outlook = Outlook()
    for _ in range(800):
        outlook.saw(2, 0.9)
        outlook.was_paid(0.4)
        outlook.lost(0.25)
    assert outlook.passing(2) == pytest.approx(0.9, abs=1e-3) and outlook.passing(1) == outlook.passing(3) == 0.6
    assert outlook.earned == pytest.approx(0.4, abs=2e-3)
    assert outlook.left == pytest.approx(0.75, abs=1e-3)
    before = outlook.passing(1)
    outlook.hope()
    assert before < outlook.passing(1) < 1
    for _ in range(800):
        outlook.lost(7.0)  # more than all of it
    assert 0 <= outlook.left < 0.01


def test_outlook_corrects_predictions_by_how_they_did() -> None:
    outlook = Outlook()
    assert outlook.correction == 1.0  # nothing is known yet
    outlook.saw(1, 1.0)
    outlook.hope()
    assert outlook.correction == 1.0  # nothing was predicted
    for _ in range(800):
        outlook.saw(1, 0.4, predicted=0.8)  # mean 0.4 where twice that was promised
    assert outlook.correction == pytest.approx(0.5, rel=1e-2)
    for _ in range(800):
        outlook.saw(2, 0.9, predicted=0.3)
    assert outlook.correction == pytest.approx(3.0, rel=1e-2)


def test_a_layer_that_does_not_pay_is_tried_now_and_then() -> None:
    """As often as `hope` says: where q of the tries pass and p would have to, 0.05 (1 - p) / (p - q)."""
    rng, outlook, tries, needed, passes = np.random.default_rng(0), Outlook(), [], 0.75, 0.6
    for _ in range(8000):
        tries.append(outlook.passing(1) > needed)
        if tries[-1]:
            outlook.saw(1, float(rng.random() < passes))
        else:
            outlook.hope()
    share = np.mean(tries[2000:])
    assert 0.5 < share / (0.05 * (1 - needed) / (needed - passes)) < 2


def test_a_longer_memory_changes_its_mind_later() -> None:
    minds = []
    for memory in (5.0, 50.0, 500.0):
        outlook = Outlook(passing=0.5, memory=memory)
        for _ in range(20):
            outlook.saw(1, 1.0)
        minds.append(outlook.passing(1))
    assert minds == sorted(minds, reverse=True) and minds[0] > 0.95 and minds[-1] < 0.55


def test_more_width_value_never_asks_for_less() -> None:
    values = (0.0, 0.3, 1.0, 3.0, 30.0, 1e4)
    for predicted in random_predictions(30):
        asked = [plan(Planner(UnitCosts(), value), predicted).target_width for value in values]
        assert asked == sorted(asked)
        assert asked[0] == 1  # speed alone
        final = [final_width(Planner(UnitCosts(), value), predicted) for value in values]
        assert final == sorted(final) and predicted.loss[final[-1]] == 0.0


@pytest.mark.parametrize(("surplus", "refill", "alone"), [(*rule, False) for rule in RULES] + [("keep", "full", True)])
def test_more_width_value_never_asks_for_less_of_a_settled_width(surplus: str, refill: str, alone: bool) -> None:
    rng, moved = np.random.default_rng(6), 0
    for _ in range(200):
        case = random_case(rng, surplus, refill)
        asked = []
        for value in (0.0, 0.1, 0.5, 2.0, 10.0, 1e5):
            again = Case(case.config, case.draft_width, case.counts, case.loss, case.further, value)
            asked.append(again.choose(alone))
        # Choices of equal worth may swap by rounding; ties that matter are between widths that lose the same.
        assert all(b >= a or case.loss[a] == case.loss[b] for a, b in pairwise(asked))
        assert asked[0] == case.config.min_width
        moved += asked[-1] > asked[0]
    assert moved > 50


def test_what_comes_further_is_worth_asking_for_less() -> None:
    rng = np.random.default_rng(7)
    for _ in range(200):
        loss, value = random_losses(rng, CONFIG.target_width), rng.exponential()
        ends = CONFIG.min_width, CONFIG.target_width
        asked = [least_bearable(loss, value, further, *ends) for further in (3.0, 1.0, 0.3, 0.01, 0.0)]
        assert asked == sorted(asked) and loss[asked[-1]] == 0


def test_width_is_spent_where_it_is_worth_something() -> None:
    sure, unsure = prediction(survivors=(0.97, 0.01, 0.01, 0.01)), prediction(survivors=(0.25, 0.25, 0.25, 0.25))
    planner = Planner(UnitCosts(), 4.0)
    assert plan(planner, sure).target_width < plan(planner, unsure).target_width
    narrow, wide = (planner.bearable_width(host, TARGET_FEATURES, CONFIG, 1.0)[0] for host in (sure, unsure))
    assert (narrow, wide) == (1, 3)  # 4 · 0.03 <= 1; 4 · 0.5 > 1 >= 4 · 0.25
    planner = Planner(UnitCosts(), 1.0)
    assert final_width(planner, sure) < final_width(planner, unsure)


def test_support_and_settled_width_limit_what_is_asked() -> None:
    assert plan(Planner(FREE, 100.0), prediction(), support=2).target_width == 2
    predicted = prediction()
    narrow = CONFIG.with_changes(min_width=3)

    def asked(width: int, value: float, config: DecodingConfig) -> list[int]:
        """By the counts, and where it settles alone."""
        at_least, ends = predicted.at_least[width, : width + 1], (config.min_width, config.target_width)
        counted = best_width(predicted.loss, at_least, value, 1.0, rules_of(config))
        return [counted, least_bearable(predicted.loss, value, 1.0, *ends)]

    assert min(asked(2, 100.0, CONFIG)) > 2  # more than there are: such a layer had better fail
    assert asked(5, 0.0, narrow) == asked(1, 0.0, narrow) == [3, 3]
    assert plan(Planner(FREE, 0.0), predicted, config=narrow).target_width == 3


def test_cheaper_passes_never_draft_fewer_layers() -> None:
    def layers(costs: UnitCosts, rate: float) -> int:
        planner, outlook, depth = Planner(costs, 1.0), Outlook(passing=0.8), 0
        while depth < 20 and planner.worth_drafting(outlook, rate, 0.8**depth, depth + 1, 20, 4, 4 + 4 * depth, 4):
            depth += 1
        return depth

    depths = [layers(UnitCosts(base, 1.0, 0.01), 0.8) for base in (0.8, 0.4, 0.2, 0.1, 0.05)]
    assert depths == sorted(depths) and depths[0] < depths[-1]
    prices = [layers(UnitCosts(), rate) for rate in (0.2, 0.5, 1.0, 2.0)]
    assert prices == sorted(prices, reverse=True)


def test_a_further_layer_pays_if_any_depth_that_begins_with_it_does() -> None:
    rng, answers, costs = np.random.default_rng(8), [], UnitCosts()
    for _ in range(200):
        outlook, rate, reach = some_outlook(rng), rng.uniform(0.05, 1.5), rng.uniform(0.2, 1.0)
        expected = below(costs, outlook, rate, reach, range(2, 4), 12, 5)[0] > 0
        assert Planner(costs, 1.0).worth_drafting(outlook, rate, reach, 2, 3, 5, 12, 5) == expected
        answers.append(expected)
    assert 20 < sum(answers) < 180
    assert not Planner(FREE, 1.0).worth_drafting(Outlook(), 1.0, 1.0, 1, 0, 4, 4, 6)  # none may be drafted


def test_throughput_starts_at_the_table_and_follows_what_happens() -> None:
    costs = UnitCosts()
    expected = Throughput.expected(costs, CONFIG)
    seconds = costs.draft_cost(4) + 2 * costs.draft_cost(6) + costs.target_cost(4 + 18)
    assert expected.rate == pytest.approx((1 + 0.6 + 0.36 + 0.216) / seconds)
    assert iteration_seconds(costs, [], 4) == costs.target_cost(4)
    for _ in range(1000):
        expected.update(3, 2.0)
    assert expected.rate == pytest.approx(1.5, rel=1e-6)
    rate = expected.rate
    expected.update(3, 0.0)  # a clock that stands still says nothing
    assert expected.rate == rate
    for _ in range(1000):
        expected.update(-10.0, 2.0)  # losses only
    assert 0 < expected.rate < 0.05


def paced(true: float, shares: Sequence[float], scale: float = 2.0, noise: float = 0.1, spikes: bool = False) -> float:
    """What is learned of a device on which what is added takes `true` times what the rest does, against the table."""
    rng, pace = np.random.default_rng(0), Pace()
    for i in range(400):
        plain, added = 0.003, 0.003 * shares[i % len(shares)]
        seconds = scale * (plain + true * added) * rng.lognormal(0.0, noise)
        pace.saw(plain, added, 40 * seconds if spikes and rng.random() < 0.03 else seconds)
    return pace.of_added


@pytest.mark.parametrize("true", [0.6, 1.0, 1.8])
@pytest.mark.parametrize("spikes", [False, True])
def test_the_clock_tells_what_nodes_and_layers_add(true: float, spikes: bool) -> None:
    shares = [0.0, 0.5, 0.2, 0.9, 1.4]
    assert paced(true, shares, spikes=spikes) == pytest.approx(true, rel=0.1)
    assert paced(true, shares, scale=0.01, spikes=spikes) == pytest.approx(
        true, rel=0.1
    )  # whatever the machine's speed


def test_iterations_of_one_size_say_nothing_of_what_more_would_take() -> None:
    assert paced(2.5, [0.6]) == pytest.approx(1.0, abs=0.05)
    assert paced(2.5, [0.0]) == 1.0


def test_a_pace_stays_within_reason() -> None:
    assert paced(100.0, [0.0, 1.0]) == 5.0 and paced(0.0, [0.0, 5.0], noise=0.0) == pytest.approx(0.2)
    pace = Pace()
    for seconds in (0.0, -1.0):
        pace.saw(0.003, 0.001, seconds)  # a clock that stands still says nothing
    pace.saw(0.0, 0.0, 1.0)  # nor does a table without costs
    assert pace.of_added == 1.0


class Keeping:
    """A recorder that compares what a layer kept with what its record says it did."""

    shadow = None
    needs_hidden = False

    def __init__(self, config: DecodingConfig) -> None:
        self.config = config
        self.seen: set[tuple[bool, bool, bool]] = set()  # drafted, passed, fewer beams kept than M or the widest

    def drafted(self, *forest: object) -> None:
        pass

    def layer(self, event: LayerEvent) -> None:
        record, kept = event.record, len(event.kept)
        said = kept_width(record, self.config)
        if record.draft_width:
            assert said == kept_beams(record.accepted, record.target_width, self.config)
        assert said >= kept if self.config.replacement else said == kept  # equal draws are one beam
        self.seen.add((record.draft_width > 0, record.passed, kept < self.config.target_width))

    def end(self, best_path: list[int]) -> None:
        pass


@rules
@pytest.mark.parametrize("changes", [{}, {"replacement": True}, {"eos_token_id": 1}], ids=str)
def test_kept_width_is_what_the_decoder_keeps(surplus: str, refill: str, changes: dict[str, Any]) -> None:
    options = {"eos_token_id": -1, "surplus": surplus, "refill": refill} | changes
    config = DecodingConfig(target_width=4, draft_width=6, draft_depth=3, max_new_tokens=10, **options)
    recorder = Keeping(config)
    decoder = DSBDDecoder(random_pair(7, seed=1, closeness=0.6), config, RandomWidth(full_share=0.0))
    decoder.generate([[1, 2]] * 25, torch.Generator().manual_seed(0), [recorder] * 25)
    drafted = {(passed, fewer) for was_drafted, passed, fewer in recorder.seen if was_drafted}
    assert {passed for passed, _ in drafted} == {True, False}
    assert (True, True) in drafted  # a pass with fewer beams than the widest
    if not config.replacement:
        assert ((False, True) in drafted) == (refill == "width")
