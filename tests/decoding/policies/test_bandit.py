"""BanditWidth: finds the arm that pays, tries the others on, forgets, and decodes; what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from decoding import BanditWidth, DecodingConfig, DSBDDecoder, FixedWidth, UserError
from decoding.cost_table import iteration_seconds
from decoding.policies.bandit import Arm
from decoding.policies.base import IterationRecord, LayerRecord, RootContext
from tests.decoding.policies.test_widths import FLAT, context
from tests.decoding.stubs import random_pair

CONFIG = DecodingConfig(target_width=2, draft_width=4, draft_depth=3, max_new_tokens=12, eos_token_id=-1)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Affine; a target pass over nothing takes a second."""

    draft: float = 0.1
    per_node: float = 0.01
    host: float = 0.05

    def draft_cost(self, nodes: float) -> float:
        return self.draft + self.per_node * nodes

    def target_cost(self, nodes: float) -> float:
        return 1.0 + self.per_node * nodes

    def host_cost(self, layers: int) -> float:
        return self.host * (1 + layers)


def started(config: DecodingConfig = CONFIG, **options: Any) -> BanditWidth:
    policy = BanditWidth(**options)
    policy.check(config)
    policy.reset(config)
    return policy


def decide(policy: BanditWidth, config: DecodingConfig = CONFIG, remaining: int = 100) -> Arm:
    """What one iteration drafts, asked for as the decoder does."""
    root = RootContext(config, 0, remaining, np.zeros(2))
    widths: tuple[int, ...] = ()
    for layer in range(1, min(config.draft_depth, remaining - 1) + 1):
        if not policy.draft_further(root, layer, widths):
            break
        draft = dataclasses.replace(context(FLAT, FLAT, config=config).draft, root=root, widths=widths)
        widths = (*widths, policy.draft_width(draft))
    assert len(set(widths)) <= 1
    return Arm(widths[0] if widths else 0, len(widths))


def play(
    policy: BanditWidth, passing: float, iterations: int, seed: int = 0, costs: Costs | None = None
) -> list[tuple[Arm, int, float]]:
    """Iterations whose layers pass with a probability that grows with w; seconds of Costs, times noise."""
    random, costs, played = np.random.default_rng(seed), costs or Costs(), []
    for _ in range(iterations):
        arm = decide(policy)
        good = passing + 0.1 * (arm.draft_width == CONFIG.draft_width)
        tokens = 1
        while tokens <= arm.draft_depth and random.random() < good:
            tokens += 1
        seconds = iteration_seconds(costs, [arm.draft_width] * arm.draft_depth, 2) * random.lognormal(0.0, 0.1)
        layers = tuple(LayerRecord(i + 1, arm.draft_width, 2, 2, True) for i in range(tokens))
        policy.observe(IterationRecord(layers, tokens, seconds))
        played.append((arm, tokens, seconds))
    return played


def shares(played: list[tuple[Arm, int, float]]) -> dict[Arm, float]:
    arms = [arm for arm, _, _ in played]
    return {arm: arms.count(arm) / len(arms) for arm in set(arms)}


def test_default_arms_come_from_the_config() -> None:
    assert BanditWidth().arms(CONFIG) == ((0, 0), (2, 1), (4, 1), (2, 2), (4, 2), (2, 3), (4, 3))
    assert BanditWidth(target_width=1).arms(CONFIG)[:3] == ((0, 0), (1, 1), (4, 1))
    assert BanditWidth().arms(CONFIG.with_changes(draft_depth=0)) == ((0, 0),)
    assert BanditWidth().arms(CONFIG.with_changes(draft_width=2, draft_depth=8)) == (
        (0, 0),
        *((2, d) for d in (1, 2, 4, 8)),
    )


@pytest.mark.parametrize(("passing", "best"), [(0.85, Arm(4, 3)), (0.0, Arm(0, 0))])
def test_the_arm_that_pays_is_found(passing: float, best: Arm) -> None:
    """Where drafts pass, deep and wide; where none does (0.1 at most), nothing drafted."""
    policy = started()
    played = play(policy, passing, 600)
    assert len({arm for arm, _, _ in played[:7]}) == 7, "each is tried once"
    assert max(late := shares(played[300:]), key=lambda arm: late[arm]) == best
    rates = policy.rates(CONFIG)
    assert max(rates, key=lambda arm: rates[arm]) == best


def test_no_arm_starves_and_spikes_of_the_clock_are_forgiven() -> None:
    """Each arm's first try takes 50 times too long, as where something is compiled, and so does one try in 50 later."""
    policy, seconds = started(memory=300.0), 50 * iteration_seconds(Costs(), [4, 4, 4], 2)
    for _ in range(7):
        decide(policy)
        policy.observe(IterationRecord((), 1, seconds))
    assert policy.rates(CONFIG) == {}
    played = []
    for seed in range(20):
        played += play(policy, 0.85, 50, seed)
        decide(policy)
        policy.observe(IterationRecord((), 1, seconds))
    assert {arm for arm, _, _ in played[100:]} == set(policy.arms(CONFIG))
    best = sum(0.95**layer for layer in range(4)) / iteration_seconds(Costs(), [4, 4, 4], 2)
    assert sum(n for _, n, _ in played[500:]) / sum(s for _, _, s in played[500:]) > 0.9 * best


def test_prompts_decoded_together_try_different_arms() -> None:
    policy = started(latency=Costs())
    forks = [policy.fork(i) for i in range(9)]
    for fork in forks:
        fork.reset(CONFIG)
    arms = [decide(fork) for fork in forks]
    assert tuple(arms[:7]) == policy.arms(CONFIG) and arms[7:] == arms[:2]
    for fork in forks:
        fork.observe(IterationRecord((), 1, 1.0))
    assert set(policy.rates(CONFIG)) == set(policy.arms(CONFIG))


def test_what_pays_may_change() -> None:
    policy = started(memory=100.0)
    first, second = play(policy, 0.85, 400), play(policy, 0.0, 400)
    assert sum(arm.draft_depth > 1 for arm, _, _ in first[200:]) > 140
    late = shares(second[200:])
    assert max(late, key=lambda arm: late[arm]) == Arm(0, 0)


def test_exploration_spreads() -> None:
    few, many = (shares(play(started(exploration=c), 0.85, 400)) for c in (0.05, 2.0))
    assert max(few.values()) > max(many.values()) and min(many.values()) > 0.03


def test_without_memory_it_is_ucb1() -> None:
    """The choice after every iteration is the arm of the highest index, worked out from all that was seen."""
    policy = started(memory=None, exploration=0.5, latency=Costs())
    played = [
        (a, t, iteration_seconds(Costs(), [a.draft_width] * a.draft_depth, 2)) for a, t, _ in play(policy, 0.6, 60)
    ]
    arms = policy.arms(CONFIG)
    for n in range(len(arms), 60):
        sums = {arm: np.array([(1, t, s) for a, t, s in played[:n] if a == arm]).sum(0) for arm in arms}
        rate = sum(s[1] for s in sums.values()) / sum(s[2] for s in sums.values())
        index = {a: t / s + 0.5 * rate * np.sqrt(2 * np.log(n) / pulls) for a, (pulls, t, s) in sums.items()}
        assert played[n][0] == max(index, key=lambda arm: index[arm])


def test_near_the_end_only_arms_that_fit_are_chosen() -> None:
    policy = started()
    seen = set()
    for _ in range(5):
        seen.add(decide(policy, remaining=2))
        policy.observe(IterationRecord((), 1, 1.0))
    assert seen == {Arm(0, 0), Arm(2, 1), Arm(4, 1)}
    deep = started(arms=[(4, 2), (4, 3)])
    assert decide(deep, remaining=2) == Arm(4, 1), "none fits: the shallowest is cut short"
    deep.observe(IterationRecord((), 1, 1.0))
    assert deep.rates(CONFIG) == {}, "and not counted"
    assert decide(deep, remaining=1) == Arm(0, 0)
    deep.observe(IterationRecord((), 1, 1.0))
    assert deep.rates(CONFIG) == {}


def test_a_table_counts_what_was_drafted_and_no_clock() -> None:
    """Roots, the drafts that there were (FLAT has 4 continuations), and the host."""
    policy = started(arms=[(4, 2)], latency=Costs())
    assert decide(policy) == Arm(4, 2)
    policy.observe(IterationRecord((), 2, 1e6))
    draft, target, host = 2 * 0.1 + 0.01 * (2 + 4), 1 + 0.01 * (2 + 4 + 4), 0.05 * 3
    assert policy.rates(CONFIG) == {Arm(4, 2): pytest.approx(2 / (draft + target + host))}
    wide = CONFIG.with_changes(draft_width=6)
    policy = started(wide, arms=[(6, 1)], latency=Costs())
    decide(policy, wide)
    policy.observe(IterationRecord((), 1, 1e6))
    assert policy.rates(wide) == {Arm(6, 1): pytest.approx(1 / (0.12 + 1.06 + 0.1))}


def decoded(policy: BanditWidth, prompts: list[list[int]], config: DecodingConfig = CONFIG) -> list[list[list[int]]]:
    results = DSBDDecoder(random_pair(8), config, policy).generate(prompts, torch.Generator().manual_seed(0))
    for result in results:
        assert [len(sequence) for sequence in result.sequences] == [12]
        assert set(result.stats.target_widths) == {policy.asked_width or config.target_width}
        assert {len(set(forest[1:])) for forest in result.stats.forests} <= {0, 1}
    return [result.stats.forests for result in results]


def test_by_a_table_seeds_fix_the_widths_and_prompts_teach_each_other() -> None:
    first = decoded(BanditWidth(latency=Costs()), [[1], [2], [3]])
    assert decoded(BanditWidth(latency=Costs()), [[1], [2], [3]]) == first
    policy = BanditWidth(latency=Costs())
    alone = decoded(policy, [[1]])
    assert decoded(policy, [[1]]) != alone, "what the first call taught remains"
    apart = BanditWidth(latency=Costs(), share=False)
    assert decoded(apart, [[1]]) == decoded(apart, [[1]]) == alone
    assert apart.rates(CONFIG) == {}, "its forks keep what they learn"


def test_all_arms_are_played_by_the_clock_too() -> None:
    policy = BanditWidth(target_width=1)
    forests = decoded(policy, [[i % 8] for i in range(6)])
    assert any([] in each for each in forests) and any(len(f) == 3 for each in forests for f in each)
    assert set(policy.rates(CONFIG)) == set(policy.arms(CONFIG))
    assert policy.describe()["clock"] == "wall" and policy.describe()["target_width"] == 1


def test_one_arm_is_fixed_width() -> None:
    """Token for token, whatever the clock says."""
    pair, prompts = random_pair(8), [[1], [2]]
    policies = (BanditWidth(arms=[[3, 2]]), FixedWidth(draft_width=3, draft_depth=2))
    both = [DSBDDecoder(pair, CONFIG, p).generate(prompts, torch.Generator().manual_seed(0)) for p in policies]
    assert [r.sequences for r in both[0]] == [r.sequences for r in both[1]]
    assert [r.stats.forests for r in both[0]] == [r.stats.forests for r in both[1]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target_width": 3}, r"BanditWidth\(target_width=3\) is outside 1..2"),
        ({"target_width": 1.5}, "target_width is 1.5"),
        ({"arms": [(5, 1)]}, r"The arm \(5, 1\) is not possible: draft widths are 2..4"),
        ({"arms": [(1, 1)]}, r"The arm \(1, 1\) is not possible"),
        ({"arms": [(4, 4)]}, r"depths 0..3"),
        ({"arms": []}, "arms is empty"),
        ({"arms": [4]}, "arms holds 4; give pairs"),
        ({"arms": "4,1"}, "arms holds '4,1'; give pairs"),
        ({"arms": [(4, 1.0)]}, "arms holds"),
        ({"exploration": -1}, "exploration is -1"),
        ({"exploration": float("nan")}, "exploration is nan"),
        ({"memory": 0}, "memory is 0"),
        ({"latency": 3}, "latency is 'int' without draft_cost, target_cost, host_cost"),
    ],
    ids=str,
)
def test_nonsense_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        DSBDDecoder(random_pair(4), CONFIG, BanditWidth(**options))
