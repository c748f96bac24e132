"""Races, selections and verdicts on numbers that can be checked by hand, and against a race written a second time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from decoding import UserError
from decoding.config import DecodingConfig
from decoding.dice.dense import dense_joint
from decoding.dice.noise import PathNoise
from decoding.dice.sampling import log_probabilities
from decoding.dice.selection import choose, draft_order, run_race, smallest
from decoding.dice.verdict import NEVER, Verdict, judge, needs
from decoding.forest.tree import TokenForest
from tests.decoding.stubs import joint_distribution

VOCABULARY = 50


def some_noise(beams: int = 3) -> tuple[PathNoise, list[int]]:
    forest = TokenForest()
    return PathNoise(3, forest, VOCABULARY), [forest.child(0, token) for token in range(beams)]


@pytest.mark.parametrize("cuts", [{}, {"top_k": 12}, {"top_p": 0.7}, {"top_k": 9, "warp": "beam"}], ids=str)
@pytest.mark.parametrize("count", [1, 4, 500])
def test_a_race_is_won_by_the_smallest_keys_on_the_host_and_on_the_device(cuts: dict, count: int) -> None:  # type: ignore[type-arg]
    config = DecodingConfig(target_width=1, draft_width=1, **cuts)
    log_probs = log_probabilities(torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1)), 0.7)
    noise, nodes = some_noise()
    host = joint_distribution(log_probs, nodes, [0.0, -1.0, -0.5], config)
    device = dense_joint(log_probs, nodes, [0.0, -1.0, -0.5], config)
    if cuts.get("warp") == "beam":  # rows come to the host cut, and are masked on the device
        assert len(host) == len(device) == 27
    drawn = noise.of(host.parents, host.tokens)
    wanted = sorted(range(len(host)), key=lambda i: drawn[i] / host.probs[i])[:count]
    for joint in (host, device):
        race = run_race(joint, noise, count)
        assert race.tokens.tolist() == host.tokens[wanted].tolist()
        assert race.parents.tolist() == host.parents[wanted].tolist()
        assert np.allclose(race.weights, host.weights[wanted], rtol=0, atol=1e-6)
        assert np.allclose(race.keys, (drawn / host.probs)[wanted], rtol=1e-6)
        entries = joint.entries(race.picks)
        assert [entry[:2] for entry in entries] == list(zip(race.parents, race.tokens, strict=True))


def test_nan_is_reported() -> None:
    noise, nodes = some_noise(1)
    broken = torch.full((1, VOCABULARY), torch.nan)
    with pytest.raises(UserError, match="draft model returned NaN"):
        run_race(dense_joint(broken, nodes, [0.0], DecodingConfig(), "draft"), noise, 4)


@pytest.mark.parametrize("size", [3, 512, 513, 4000])
def test_smallest_keeps_the_order_of_equal_keys(size: int) -> None:
    keys = np.random.default_rng(size).integers(0, 40, size).astype(np.float64)
    keys[0] = np.inf
    for count in (1, 2, 100, size, 2 * size):
        assert smallest(keys, count).tolist() == np.argsort(keys, kind="stable")[:count].tolist()


def test_without_oversampling_the_draws_are_the_selection() -> None:
    choice = choose([-1.0, -5.0, -2.0, -0.5], [False, True, False, False], 3, 1)
    assert (choice.growing, choice.growing_places) == ([0, 2], [0, 2])
    assert (choice.ended, choice.size) == ([1], 3)
    assert choice.first(2) == ([0], [1])
    assert choice.first(3) == ([0, 2], [1])


def test_with_oversampling_the_likeliest_go_on_and_the_first_drawn_end() -> None:
    """Drawn in this order: what ended fourth is beyond the first two, though it is the heaviest of all."""
    weights, hits = [-3.0, -4.0, -1.0, -0.1], [False, True, False, True]
    choice = choose(weights, hits, 2, 2)
    assert (choice.growing, choice.growing_places) == ([2, 0], [0, 1])
    assert (choice.ended, choice.ended_places, choice.size) == ([1], [1], 2)
    assert choice.first(1) == ([2], [])


def test_drafts_follow_the_selection() -> None:
    noise, nodes = some_noise()
    log_probs = log_probabilities(torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(2)), 1.0)
    race = run_race(joint_distribution(log_probs, nodes, [0.0, -1.0, -2.0], DecodingConfig()), noise, 20)
    live = race.tokens % 5 > 0
    assert draft_order(race, live, 3, 1).tolist() == np.flatnonzero(live).tolist()
    order = draft_order(race, live, 3, 2).tolist()
    first = sorted((place for place in range(6) if live[place]), key=lambda place: -race.weights[place])
    assert order == first + [place for place in range(6, 20) if live[place]]


def test_a_verdict_counts_up_to_the_first_that_is_unknown() -> None:
    """Places 0 and 2 go on, 1 has ended: it needs nothing."""
    assert judge([0, 2], [True, True], 3, 3) == Verdict(3, True)
    assert judge([0, 2], [True, False], 3, 2) == Verdict(2, True)
    assert judge([0, 2], [True, False], 3, 3) == Verdict(2, False)
    assert judge([0, 2], [False, True], 3, 1) == Verdict(0, False)
    assert judge([], [], 2, 4) == Verdict(2, True)


def test_needs_grow_and_stop_at_what_was_not_ranked() -> None:
    assert needs([0, 2, 3], [2, 1, 7], 4) == [2, 2, 2, 7]
    assert needs([0, 1, 2], [0, NEVER, 3], 3) == [0, NEVER, NEVER]
    assert needs([], [], 2) == [0, 0]
