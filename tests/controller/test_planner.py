"""Planner: choices by hand, and the directions in which they must move."""

from __future__ import annotations

import numpy as np
import pytest

from controller.counts import count_table, tails
from controller.planner import Outlook, Plan, Planner, Prediction, Throughput, UnitCosts, iteration_seconds
from decoding.sampling import FloatArray
from tests.controller.synthetic import CONFIG

FREE = UnitCosts(0.0, 1.0, 0.0)  # widths cost nothing


def prediction(accept: float = 0.6, survivors: tuple[float, ...] = (0.6, 0.2, 0.1, 0.1)) -> Prediction:
    table = count_table(np.full((CONFIG.draft_width, CONFIG.draft_width), accept))
    return Prediction(tails(table), np.append(0.0, np.cumsum(survivors)))


def plan(planner: Planner, predicted: Prediction, rate: float = 1.0, reach: float = 1.0, support: int = 10) -> Plan:
    return planner.widths(predicted, CONFIG, Outlook(), rate, reach, 1, 3, nodes=8, support=support)


def random_predictions(count: int) -> list[Prediction]:
    rng = np.random.default_rng(0)
    return [
        Prediction(tails(count_table(rng.random((6, 6)))), np.append(0.0, np.cumsum(rng.dirichlet(np.ones(4)))))
        for _ in range(count)
    ]


def test_free_widths_are_wide_and_dear_ones_narrow() -> None:
    assert plan(Planner(FREE), prediction()).draft_width == CONFIG.draft_width
    assert plan(Planner(UnitCosts(0.25, 1.0, 5.0)), prediction()).draft_width == 1


def test_chosen_pair_is_the_best_of_all_pairs() -> None:
    """Against the expected reward of every pair, written out: this layer, the next, and the best depth below."""
    costs, rate, reach, start = UnitCosts(), 1.3, 0.8, 0.6
    for survivors in ("asked", "kept"):
        for predicted in random_predictions(20):
            chosen = plan(Planner(costs, 0.7, survivors), predicted, rate, reach)

            def gain(w: int, m: int, predicted: Prediction = predicted, survivors: str = survivors) -> float:
                at_least = predicted.at_least[w]
                value = predicted.survivors[m]
                if survivors == "kept":  # surplus="keep", refill="full"
                    chances = at_least - np.append(at_least[1:], 0)
                    kept = [min(k, 4) if k >= m else 4 for k in range(len(chances))]
                    value = sum(p * predicted.survivors[c] for p, c in zip(chances, kept, strict=True))
                seconds = costs.target_seconds(8 + w) - costs.target_seconds(8)
                seconds += costs.draft_seconds(w) - costs.draft_seconds(1)
                # Layers 2 and 3 would be as wide as can be; each passes with 0.6 and lets one more be committed.
                layer = costs.draft_seconds(6) + 6 * costs.per_node
                deeper = [0.0]
                deeper += [reach * at_least[m] * start - rate * layer]
                deeper += [deeper[1] + reach * at_least[m] * start**2 - rate * layer]
                return reach * (at_least[m] + 0.7 * value) - rate * seconds + max(deeper)

            best = max(gain(w, m) for w in range(1, 7) for m in range(1, min(w, 4) + 1))
            assert gain(chosen.draft_width, chosen.target_width) == pytest.approx(best)
            assert chosen.passing == predicted.at_least[chosen.draft_width, chosen.target_width]


def test_what_a_pass_brings_counts_the_layers_planned_below() -> None:
    """A cheap draft is followed to the end: 1 + 0.6 + 0.36 layers; a dear one is not."""
    cheap, dear = (
        plan(Planner(UnitCosts(base, 1.0, 0.0)), prediction(accept=1.0), rate=0.5).further for base in (0.01, 5.0)
    )
    assert cheap == pytest.approx(1 + 0.6 + 0.36) and dear == 1.0


def test_outlook_learns_how_often_layers_pass_and_what_they_earn() -> None:
    outlook = Outlook()
    other = outlook.copy()
    for _ in range(200):
        outlook.saw(2, 0.9)
        outlook.was_paid(0.4)
    assert outlook.passing(2) == pytest.approx(0.9) and outlook.passing(1) == outlook.passing(3) == 0.6
    assert outlook.earned == pytest.approx(0.4)
    assert other.passing(2) == 0.6 and other.earned == 1.0
    before = outlook.passing(1)
    outlook.hope(1)
    assert before < outlook.passing(1) < 1


def test_more_width_value_never_asks_for_less() -> None:
    for predicted in random_predictions(30):
        asked = [plan(Planner(UnitCosts(), value), predicted).target_width for value in (0.0, 0.3, 1.0, 3.0, 30.0)]
        assert asked == sorted(asked)
        assert asked[0] == 1  # speed alone
        final = [Planner(UnitCosts(), value).final_width(predicted, CONFIG, 1.0) for value in (0.0, 0.3, 1.0, 3.0, 1e4)]
        assert final == sorted(final) and final[-1] == CONFIG.target_width
        at_least: FloatArray = predicted.at_least[5, :6]
        widths = [Planner(FREE, v).target_width(predicted, at_least, CONFIG, 5) for v in (0.0, 0.5, 2.0, 50.0)]
        assert widths == sorted(widths)


@pytest.mark.parametrize(("survivors", "value"), [("asked", 1.0), ("kept", 10.0)])
def test_width_is_spent_where_it_is_worth_something(survivors: str, value: float) -> None:
    sure, unsure = prediction(survivors=(0.97, 0.01, 0.01, 0.01)), prediction(survivors=(0.25, 0.25, 0.25, 0.25))
    planner = Planner(UnitCosts(), value, survivors)
    assert plan(planner, sure).target_width < plan(planner, unsure).target_width
    planner = Planner(UnitCosts(), 1.0)
    assert planner.final_width(sure, CONFIG, 1.0) < planner.final_width(unsure, CONFIG, 1.0)


def test_support_and_settled_width_limit_what_is_asked() -> None:
    assert plan(Planner(FREE, 100.0), prediction(), support=2).target_width == 2
    predicted = prediction()
    assert Planner(FREE, 100.0).target_width(predicted, predicted.at_least[2, :3], CONFIG, 2) == 2
    narrow = CONFIG.with_changes(min_width=3)
    assert Planner(FREE, 0.0).target_width(predicted, predicted.at_least[5, :6], narrow, 5) == 3
    assert Planner(FREE, 0.0).widths(predicted, narrow, Outlook(), 1.0, 1.0, 1, 3, 8, 10).target_width == 3


def test_cheaper_passes_never_draft_fewer_layers() -> None:
    def layers(costs: UnitCosts, rate: float) -> int:
        planner, outlook, depth = Planner(costs), Outlook(passing=0.8), 0
        while depth < 20 and planner.worth_drafting(outlook, rate, 0.8**depth, depth + 1, 20, 4, 4 + 4 * depth, 4):
            depth += 1
        return depth

    depths = [layers(UnitCosts(base, 1.0, 0.01), 0.8) for base in (0.8, 0.4, 0.2, 0.1, 0.05)]
    assert depths == sorted(depths) and depths[0] < depths[-1]
    prices = [layers(UnitCosts(), rate) for rate in (0.2, 0.5, 1.0, 2.0)]
    assert prices == sorted(prices, reverse=True)


def test_throughput_starts_at_the_table_and_follows_what_happens() -> None:
    costs = UnitCosts()
    expected = Throughput.expected(costs, CONFIG)
    seconds = costs.draft_seconds(4) + 2 * costs.draft_seconds(6) + costs.target_seconds(4 + 18)
    assert expected.rate == pytest.approx((1 + 0.6 + 0.36 + 0.216) / seconds)
    assert iteration_seconds(costs, [], 4) == costs.target_seconds(4)
    for _ in range(1000):
        expected.update(3, 2.0)
    assert expected.rate == pytest.approx(1.5, rel=1e-6)
    rate = expected.rate
    expected.update(3, 0.0)  # a clock that stands still says nothing
    assert expected.rate == rate
