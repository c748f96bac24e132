"""Policies: what each asks for, how the decoder clips it, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from decoding import (
    DecodingConfig,
    DSBDDecoder,
    FixedWidth,
    RandomWidth,
    ThresholdWidth,
    UserError,
    WidthPolicy,
)
from decoding.dice.closed_form import accept_probabilities, accepted_count_table
from decoding.dice.sampling import Joint
from decoding.policies.base import DraftContext, IterationRecord, RootContext, TargetContext
from tests.decoding.stubs import random_pair

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
