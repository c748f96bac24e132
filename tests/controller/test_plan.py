"""Decisions on small cases, each against a search of all; and whether drafting is found to pay."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from controller import plan
from controller.experience import Experience, Mean
from controller.plan import HOPE, REUSE, SCORED, Plan, best_count, sent, share_of
from decoding.cost_table import LatencyTable
from decoding.support.compiled import COMPILED

TABLE = LatencyTable((1, 4, 8, 16), (1.0, 1.0, 1.4, 3.0), (0.2, 0.2, 0.3, 0.5), iteration=0.1, layer=0.05)


@pytest.mark.parametrize("nodes", [0, 3, 7])
@pytest.mark.parametrize("rate", [0.2, 1.0, 5.0])
def test_sends_the_drafts_that_are_worth_most(nodes: int, rate: float) -> None:
    for seed in range(20):
        values = np.sort(np.random.default_rng(seed).random(8) ** 2)[::-1]
        best = max(
            (sum(chosen) - rate * (TABLE.target_cost(nodes + len(chosen)) - TABLE.target_cost(nodes)), -len(chosen))
            for size in range(9)
            for chosen in itertools.combinations(values, size)
        )
        count = best_count(values, nodes, Plan(TABLE).target, rate)
        worth = values[:count].sum() - rate * (TABLE.target_cost(nodes + count) - TABLE.target_cost(nodes))
        assert worth == pytest.approx(best[0])


def test_free_nodes_are_all_sent_and_dear_ones_are_not() -> None:
    free = LatencyTable((1, 64, 128), (1.0, 1.0, 2.0), (0.2, 0.2, 0.2))
    values = np.full(100, 0.001)
    assert best_count(values, 4, Plan(free).target, 1.5) == 60
    assert best_count(values, 64, Plan(free).target, 1.5) == 0
    assert best_count(np.full(5, 0.5), 64, Plan(free).target, 1.5) == 5


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.4, 5.0])
def test_a_forest_sends_what_is_worth_most_and_all_that_is_scored(rate: float) -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        values, scored = draw.random(9), draw.random(9) < 0.3
        fresh = np.flatnonzero(~scored)
        sets = [chosen for size in range(len(fresh) + 1) for chosen in itertools.combinations(fresh, size)]
        worth = {
            chosen: values[list(chosen)].sum() - rate * (TABLE.target_cost(2 + len(chosen)) - TABLE.target_cost(2))
            for chosen in sets
        }
        stays = sent(np.where(scored, SCORED, values), 2, Plan(TABLE).target, rate)
        assert stays[scored].all()
        assert worth[tuple(np.flatnonzero(stays & ~scored))] == pytest.approx(max(worth.values()), abs=1e-6)


def test_the_share_below_parents_that_the_target_has_not_scored() -> None:
    weights, above, known = np.log([0.5, 0.3, 0.2]), np.log([0.5, 1.0, 0.1]), np.array([True, False, False])
    nothing = np.zeros(0, np.float32)
    assert share_of(weights, nothing, known) == (pytest.approx(0.5), 2)
    assert share_of(weights - 900, above.astype(np.float32), known) == (pytest.approx(0.32 / 0.57), 2)
    assert share_of(weights, nothing, np.ones(3, dtype=bool)) == (0.0, 0)


def test_goes_deeper_where_a_layer_gives_more_than_it_takes() -> None:
    ours = Plan(TABLE)
    for chance, covered, nodes, rate in itertools.product((0.05, 0.2, 0.5), (0.0, 0.8), (0, 4, 16), (0.5, 2.0)):
        cost = (TABLE.draft_cost(nodes) if nodes else 0.0) + 0.05
        expected = chance * HOPE + covered * REUSE >= rate * cost
        assert ours.goes_deeper(chance, covered, nodes, rate) == expected


def test_leaves_out_the_draft_where_the_unknown_hold_little() -> None:
    ours = Plan(TABLE)
    assert not ours.asks_draft(1.0, 0.0, 4, 2, rate=1.0)
    assert ours.asks_draft(1.0, 0.5, 4, 2, rate=1.0)
    shares = [share for share in np.linspace(0, 1, 101) if ours.asks_draft(0.8, share, 4, 2, rate=1.0)]
    assert shares == [share for share in np.linspace(0, 1, 101) if share >= shares[0]]
    assert ours.asks_draft(1.0, 0.1, 8, 2, rate=1.0) >= ours.asks_draft(1.0, 0.1, 1, 2, rate=1.0)


def test_seconds_are_those_of_the_table() -> None:
    expected = 0.1 + 2 * 0.05 + TABLE.target_cost(9) + TABLE.draft_cost(4) + TABLE.draft_cost(12)
    assert Plan(TABLE).seconds(9, (4, 12), 2) == pytest.approx(expected)


@pytest.mark.skipif(not COMPILED, reason="numba is not installed, or disabled")
def test_compiled_and_plain_count_the_same() -> None:
    for seed in range(20):
        values = np.sort(np.random.default_rng(seed).random(30))[::-1].copy()
        assert plan.best_count(values, 5, Plan(TABLE).target, 2.0) == plan.best_count.py_func(
            values, 5, Plan(TABLE).target, 2.0
        )


def test_a_mean_is_right_from_its_first_value_on() -> None:
    mean = Mean(memory=10)
    mean.saw(3.0)
    assert mean.value == pytest.approx(3.0)
    for _ in range(100):
        mean.saw(5.0)
    assert mean.value == pytest.approx(5.0, abs=0.01)


@pytest.mark.parametrize("wall", [False, True])
@pytest.mark.parametrize(("tokens", "seconds"), [(2.5, 1.7), (1.5, 1.9)])
def test_drafts_where_that_pays(wall: bool, tokens: float, seconds: float) -> None:
    """By the clock everything takes three times what the table says, and what drafts add twice as much again."""
    ours, drafted, took = Experience(1.0, wall=wall), [], 0.0
    clock = 3.0 * (1 + 2 * (seconds - 1)) if wall else seconds
    for _ in range(3000):
        drafts = ours.drafts()
        ours.saw(int(tokens * 2) // 2 if drafts else 1, seconds if drafts else 1.0, clock if drafts else 3.0, drafts)
        drafted.append(drafts)
        took += clock if drafts else 3.0 if wall else 1.0
    pays = int(tokens) / clock > 1 / (3.0 if wall else 1.0)
    share = float(np.mean(drafted[500:]))
    assert share > 0.98 if pays else share < 0.02


def test_the_price_of_a_second_is_that_of_what_drafts_add() -> None:
    ours = Experience(1.0, wall=True)
    for i in range(400):
        drafts = bool(i % 2)
        ours.saw(3 if drafts else 1, 2.0 if drafts else 1.0, 7.0 if drafts else 3.0, drafts)
    # 3 tokens in 7 seconds; one second of the table that drafts add takes 4 by the clock.
    assert ours.rate() == pytest.approx(3 / 7 * 4, rel=0.01)


@pytest.mark.parametrize("gain", [0.8, 1.25])
def test_moments_in_which_the_machine_was_busy_decide_nothing(gain: float) -> None:
    """For some 35 iterations in 400 all takes half as long again: what is remembered of one kind is not set against
    what the other takes in another moment. Drafts give 1.5 tokens.
    """
    for seed in range(5):
        ours, drafted, draw, busy = Experience(1.0, wall=True), [], np.random.default_rng(seed), 0
        for i in range(6000):
            if not busy and draw.random() < 1 / 400:
                busy = int(draw.integers(17, 70))
            drafts = ours.drafts()
            took = (1.5 if busy else 1.0) * (1.5 / gain if drafts else 1.0) * draw.uniform(0.95, 1.3)
            ours.saw(1 + i % 2 if drafts else 1, 1.25 if drafts else 1.0, took, drafts)
            drafted.append(drafts)
            busy = max(busy - 1, 0)
        share = float(np.mean(drafted[500:]))
        assert share > 0.95 if gain > 1 else share < 0.05


def test_iterations_that_capture_graphs_do_not_stop_drafting_for_good() -> None:
    """On a GPU the first passes of every size take a hundred times as long; a mean believes them for a long time."""
    ours, drafted = Experience(1.0, wall=True), []
    for i in range(400):
        drafts = ours.drafts()
        captures = i < 24 and i % 3 > 0  # two of three of those before drafts are judged
        ours.saw(5 if drafts else 2, 1.5 if drafts else 1.0, 150.0 if captures else 2.0 if drafts else 1.0, drafts)
        drafted.append(drafts)
    assert np.mean(drafted) > 0.9
