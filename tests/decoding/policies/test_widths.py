"""Policies: what each asks for, how the decoder clips it, what is refused."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from decoding import (
    DecodingConfig,
    DSBDDecoder,
    ExpectedWidth,
    FixedWidth,
    RandomWidth,
    ThresholdWidth,
    UniformWidth,
    UserError,
    WidthPolicy,
)
from decoding.dice.closed_form import accept_probabilities, accepted_count_table
from decoding.dice.sampling import Joint
from decoding.policies.base import DraftContext, IterationRecord, RootContext, TargetContext
from tests.decoding.stubs import chi_square_p, random_pair

CONFIG = DecodingConfig(target_width=4, draft_width=6, draft_depth=3, max_new_tokens=8, eos_token_id=-1)


def joint(probs: list[float]) -> Joint:
    tokens = np.arange(len(probs))
    return Joint(np.zeros_like(tokens), tokens, np.array(probs), np.log(probs))


def context(p: list[float], q: list[float], width: int = 6, config: DecodingConfig = CONFIG) -> TargetContext:
    root = RootContext(config, 0, 8, np.zeros(1))
    return TargetContext(DraftContext(root, 1, np.zeros(1), joint(q), drafted=width > 0), joint(p), width)


FLAT, STEEP = [0.25] * 4, [0.97, 0.01, 0.01, 0.01]


def test_the_base_asks_for_the_widest() -> None:
    policy = WidthPolicy()
    assert policy.target_width(context(FLAT, FLAT)) == 4
    assert policy.draft_width(context(FLAT, FLAT).draft) == 6
    assert policy.draft_further(context(FLAT, FLAT).draft.root, 3, (6, 6))


def test_fixed_takes_what_it_is_given_and_the_rest_from_the_config() -> None:
    policy = FixedWidth(target_width=2, draft_depth=1)
    policy.check(CONFIG)
    assert policy.target_width(context(FLAT, FLAT)) == 2
    assert policy.draft_width(context(FLAT, FLAT).draft) == 6
    assert [policy.draft_further(context(FLAT, FLAT).draft.root, layer, ()) for layer in (1, 2)] == [True, False]
    assert policy.describe() == {
        "name": "fixed",
        "target_width": 2,
        "draft_width": None,
        "draft_depth": 1,
        "final_width": None,
        "least_share": 0.01,
    }


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"target_width": 5}, r"FixedWidth\(target_width=5\) is outside 1..4"),
        ({"target_width": 0}, r"FixedWidth\(target_width=0\) is outside 1..4"),
        ({"draft_width": 7}, r"FixedWidth\(draft_width=7\) is outside 1..6"),
        ({"draft_depth": 4}, r"FixedWidth\(draft_depth=4\) is outside 0..3"),
        ({"draft_width": 2}, r"FixedWidth: draft_width \(2\) is less than target_width \(4\)"),
    ],
    ids=str,
)
def test_fixed_refuses_what_the_config_does_not_allow(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DSBDDecoder(random_pair(4), CONFIG, FixedWidth(**fields))


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9, 1.0])
@pytest.mark.parametrize(("p", "q"), [(FLAT, STEEP), (STEEP, FLAT), (FLAT, [0.4, 0.3, 0.2, 0.1])])
def test_threshold_is_the_largest_width_that_passes_often_enough(
    threshold: float, p: list[float], q: list[float]
) -> None:
    """M = max{k : P(K_w >= k) >= threshold}, with P(K_w = k) of design 5.3."""
    counts = accepted_count_table(accept_probabilities(np.array(p), np.array(q), 6))[6]
    expected = max(k for k in range(7) if counts[k:].sum() >= threshold - 1e-9)
    assert ThresholdWidth(threshold).target_width(context(p, q)) == expected


def test_threshold_edges() -> None:
    assert ThresholdWidth(0.9).target_width(context(FLAT, FLAT)) == 6, "clipped by the decoder, not by the policy"
    assert ThresholdWidth(0.9).target_width(context(STEEP, FLAT, width=0)) == 4, "nothing drafted, nothing rejected"
    root = context(FLAT, STEEP)
    widths = [ThresholdWidth(t).target_width(root) for t in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert widths == sorted(widths, reverse=True)


def test_as_shipped_gives_other_widths_somewhere() -> None:
    random = np.random.default_rng(0)
    pairs = [(random.dirichlet(np.ones(4)).tolist(), random.dirichlet(np.ones(4)).tolist()) for _ in range(30)]
    sound = [ThresholdWidth(0.7).target_width(context(p, q)) for p, q in pairs]
    shipped = [ThresholdWidth(0.7, as_shipped=True).target_width(context(p, q)) for p, q in pairs]
    assert sound != shipped


@pytest.mark.parametrize("threshold", [0, 1.2, -0.5, True, float("nan"), "0.9"])
def test_threshold_refuses_what_is_no_probability(threshold: float) -> None:
    with pytest.raises(UserError, match=r"threshold is .*; give a number in \(0, 1\]"):
        ThresholdWidth(threshold)


@pytest.mark.parametrize(("p", "q"), [(FLAT, STEEP), (STEEP, FLAT), (FLAT, FLAT)])
@pytest.mark.parametrize("width", [1, 3, 6])
def test_expected_is_the_mean_count_rounded_down(p: list[float], q: list[float], width: int) -> None:
    counts = accepted_count_table(accept_probabilities(np.array(p), np.array(q), width))[width]
    mean = sum(k * count for k, count in enumerate(counts.tolist()))
    policy, seen = ExpectedWidth(), context(p, q, width=width)
    assert policy.target_width(seen) == math.floor(mean + 1e-9)
    within = sum(min(k, 4) * count for k, count in enumerate(counts.tolist()))
    assert policy.expected_count(seen) == pytest.approx(within)
    if q is p:
        assert mean == pytest.approx(width), "every draft of P itself is accepted"
    assert policy.target_width(context(p, q, width=0)) == 4, "nothing drafted, nothing rejected"


def counts_of(policy: WidthPolicy, **changes: Any) -> tuple[float, float, float]:
    """Mean K, mean E[K], and the standard error of the mean of K, over drafted layers."""
    config = CONFIG.with_changes(
        target_width=3, draft_width=4, draft_depth=1, verification="rejection", replacement=True, **changes
    )
    prompts, stream = [[1], [2], [3]] * 300, torch.Generator().manual_seed(0)
    results = DSBDDecoder(random_pair(8, closeness=0.5), config, policy).generate(prompts, stream)
    layers = [layer for result in results for layer in result.stats.layers if layer.draft_width]
    accepted = np.array([layer.accepted for layer in layers])
    assert all(layer.expected is None for result in results for layer in result.stats.layers if not layer.draft_width)
    error = accepted.std() / math.sqrt(len(accepted))
    return float(accepted.mean()), float(np.mean([layer.expected for layer in layers])), float(error)


@pytest.mark.parametrize("changes", [{}, {"surplus": "drop"}], ids=str)
def test_the_expected_count_is_the_mean_of_those_accepted(changes: dict[str, Any]) -> None:
    """With replacement the closed form is exact: within four standard errors. The published code's is not."""
    for policy in (ExpectedWidth(), ThresholdWidth(0.7)):
        accepted, expected, error = counts_of(policy, **changes)
        assert abs(accepted - expected) < 4 * error < 0.1
    accepted, expected, error = counts_of(ThresholdWidth(0.7, as_shipped=True), **changes)
    assert abs(accepted - expected) > 6 * error


def test_policies_that_do_not_say_what_they_expect_have_none() -> None:
    (result,) = DSBDDecoder(random_pair(8), CONFIG, FixedWidth()).generate([[1]], torch.Generator().manual_seed(0))
    assert set(result.stats.expected) == {None}
    assert len(result.stats.expected) == len(result.stats.accepted)


def at_iteration(number: int, p: list[float] = FLAT, width: int = 6, config: DecodingConfig = CONFIG) -> TargetContext:
    seen = context(p, p, width, config)
    root = replace(seen.draft.root, iteration=number)
    return replace(seen, draft=replace(seen.draft, root=root))


@pytest.mark.parametrize("widths", [None, (1, 2, 4)])
def test_uniform_draws_each_width_of_its_set_as_often(widths: tuple[int, ...] | None) -> None:
    policy = UniformWidth(seed=2, widths=widths)
    drawn = Counter(policy.fork(seed).target_width(at_iteration(i)) for seed in range(40) for i in range(40))
    allowed = widths or (1, 2, 3, 4)
    assert chi_square_p(drawn, {width: 1 / len(allowed) for width in allowed}) > 1e-4
    lopsided = Counter({width: drawn[width] + 200 * (width == 4) for width in drawn})
    assert chi_square_p(lopsided, {width: 1 / len(allowed) for width in allowed}) < 1e-4


def test_uniform_knows_the_seeds_and_the_iteration_and_nothing_else() -> None:
    def widths(policy: WidthPolicy, *seen: Any) -> list[int]:
        return [policy.target_width(at_iteration(i, *seen)) for i in range(30)]

    first = widths(UniformWidth(seed=1).fork(7))
    assert first == widths(UniformWidth(seed=1).fork(7), STEEP, 0), "other P, nothing drafted"
    policy = UniformWidth(seed=1).fork(7)
    assert [policy.target_width(at_iteration(i)) for i in reversed(range(30))] == first[::-1], "in any order"
    assert first != widths(UniformWidth(seed=1).fork(8)) and first != widths(UniformWidth(seed=2).fork(7))


def test_a_random_width_alone_is_beam_sampling_of_that_width() -> None:
    """No draft, widths by the prompt's seed: beams kept at each step are those that were drawn for it."""
    pair, config = random_pair(8), CONFIG.with_changes(draft_depth=0, max_new_tokens=12)
    policy = UniformWidth(widths=[1, 4])

    def widths(count: int, seed: int = 0) -> list[list[int]]:
        results = DSBDDecoder(pair, config, policy).generate([[1]] * count, torch.Generator().manual_seed(seed))
        assert all(record.layers[0].draft_width == 0 for result in results for record in result.stats.records)
        assert all(result.stats.draft_calls == 0 for result in results)
        for result in results:
            kept = zip(result.stats.target_widths, result.stats.roots[1:], strict=False)
            assert all(beams <= width for width, beams in kept)
        return [result.stats.target_widths for result in results]

    found = widths(6)
    assert {width for prompt in found for width in prompt} == {1, 4}
    assert widths(6) == found and widths(6, seed=1) != found
    assert len({tuple(prompt) for prompt in found}) > 1, "prompts have draws of their own"


@pytest.mark.parametrize(("options", "message"), [
    ({"widths": []}, "widths is empty; give at least one"),
    ({"widths": [0]}, "Each of widths is 0; give a whole number of at least 1"),
    ({"seed": -1}, "seed is -1; give a whole number"),
    ({"widths": [2, 5]}, r"UniformWidth\(widths=\[2, 5\]\) holds 5, outside 1..4"),
])  # fmt: skip
def test_uniform_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        UniformWidth(**options).check(CONFIG)


@pytest.mark.parametrize(("options", "message"), [
    ({"full_share": 10}, r"full_share is 10; give a number in \[0, 1\]"),
    ({"full_share": "0.1"}, "full_share is '0.1'"),
    ({"seed": -1}, "seed is -1; give a whole number"),
    ({"seed": None}, "seed is None"),
])  # fmt: skip
def test_random_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RandomWidth(**options)


def test_random_covers_its_range_and_is_reproducible() -> None:
    policy, twin = RandomWidth(seed=1, full_share=0.0), RandomWidth(seed=1, full_share=0.0)
    config = CONFIG.with_changes(min_width=2)
    wide = context(FLAT, FLAT, config=config)

    def prompts(policy: RandomWidth) -> list[list[tuple[int, int]]]:
        drawn = []
        for _ in range(40):
            policy.reset(config)
            drawn.append([(policy.draft_width(wide.draft), policy.target_width(wide)) for _ in range(20)])
        return drawn

    drawn = prompts(policy)
    assert drawn == prompts(twin)
    assert {w for prompt in drawn for w, _ in prompt} == set(range(1, 7))
    assert {m for prompt in drawn for _, m in prompt} == {2, 3, 4}
    narrow = sum(all(m == 2 for _, m in prompt) for prompt in drawn)
    assert 5 <= narrow <= 30  # log(3/2) / log(5/2) of the prompts ask for no more than the least: 44%


def test_random_drafts_deep_half_of_the_time() -> None:
    policy, depths = RandomWidth(seed=1, full_share=0.0), []
    for _ in range(400):
        policy.reset(CONFIG)
        root, depth = context(FLAT, FLAT).draft.root, 0
        while depth < CONFIG.draft_depth and policy.draft_further(root, depth + 1, (1,) * depth):
            depth += 1
        depths.append(depth)
    assert set(depths) == set(range(1, CONFIG.draft_depth + 1))
    assert abs(depths.count(CONFIG.draft_depth) / 400 - (0.5 + 0.5 / CONFIG.draft_depth)) < 0.1


def test_random_forks_follow_their_own_seeds() -> None:
    """A prompt's widths depend on the policy's seed and the prompt's, not on what other forks have drawn."""

    def widths(policy: RandomWidth) -> list[int]:
        policy.reset(CONFIG)
        return [policy.draft_width(context(FLAT, FLAT).draft) for _ in range(50)]

    policy = RandomWidth(seed=1, full_share=0.0)
    first, second = policy.fork(7), policy.fork(8)
    drawn = widths(first)
    assert widths(second) != drawn
    assert widths(policy.fork(7)) == drawn
    assert widths(RandomWidth(seed=1, full_share=0.0).fork(7)) == drawn
    assert widths(RandomWidth(seed=2, full_share=0.0).fork(7)) != drawn


def test_random_decodes_its_full_share_at_full_width() -> None:
    policy = RandomWidth(full_share=1.0)
    policy.reset(CONFIG)
    assert policy.draft_width(context(FLAT, FLAT).draft) == 6
    assert policy.target_width(context(FLAT, FLAT)) == 4


class Greedy(WidthPolicy):
    """Asks for more, or less, than there is; its forks, one for each prompt, tell the same lists."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.resets: list[WidthPolicy] = []
        self.seen: list[IterationRecord] = []

    def reset(self, config: DecodingConfig) -> None:
        self.resets.append(self)

    def draft_width(self, context: DraftContext) -> int:
        return self.value

    def target_width(self, context: TargetContext) -> int:
        return self.value

    def observe(self, record: IterationRecord) -> None:
        self.seen.append(record)


@pytest.mark.parametrize(("value", "widths", "drafts"), [(100, {4}, {6}), (-3, {2}, {1})])
def test_the_decoder_clips_what_a_policy_asks_for(value: int, widths: set[int], drafts: set[int]) -> None:
    config = CONFIG.with_changes(min_width=2, verification="rejection")  # drafts all that it is asked for
    policy = Greedy(value)
    results = DSBDDecoder(random_pair(8), config, policy).generate([[1], [2]], torch.Generator().manual_seed(0))
    for result in results:
        assert set(result.stats.target_widths) == widths
        assert set(result.stats.draft_widths) - {0} == drafts
    assert len({id(fork) for fork in policy.resets} - {id(policy)}) == len(policy.resets) == 2
    assert sum(record.tokens for record in policy.seen) == 16
    assert all(len(record.layers) == record.tokens and record.seconds > 0 for record in policy.seen)
    for record in policy.seen:
        assert [layer.layer for layer in record.layers] == list(range(1, record.tokens + 1))
        assert all(layer.passed for layer in record.layers[:-1])
        drawn = record.layers[-1]
        assert (drawn.draft_width == 0) == (drawn.passed and drawn.accepted == 0)
