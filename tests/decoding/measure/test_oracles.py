"""Yardsticks: ranks found by looking ahead, against a slow search of one's own; seconds, against recorded layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from decoding import DecodingConfig, DSBDDecoder, ModelPair, RandomWidth, UserError, WidthPolicy
from decoding.measure.methods import METHODS
from decoding.measure.oracles import SurvivorOracle, hindsight_seconds, modelled_seconds
from decoding.measure.transformers_generate import hf_generate
from decoding.policies.base import IterationRecord, LayerRecord, TargetContext
from decoding.policies.fixed import FixedWidth
from decoding.results import DecodeStats, LayerEvent, Recorder
from tests.decoding.policies.test_bandit import Costs
from tests.decoding.stubs import Reference, llama_pair, random_pair, seeded

PROMPT = [1, 2, 3]
CONFIG = DecodingConfig(target_width=3, draft_width=4, draft_depth=2, max_new_tokens=10, top_k=5, eos_token_id=-1)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return llama_pair()


class Slow(SurvivorOracle):
    """Checks every M against a continuation of each candidate, token by token, without batches or caches."""

    asked: list[int]

    def reset(self, config: DecodingConfig) -> None:
        super().reset(config)
        self.asked = []
        self.reference = Reference(self.pair.target, self.prompt, config)

    def target_width(self, context: TargetContext) -> int:
        config, target, found = context.draft.root.config, context.target, super().target_width(context)
        scores = []
        for entry in np.argsort(-target.weights, kind="stable")[: self.candidates].tolist():
            path = (*self._forest.path(int(target.parents[entry])), int(target.tokens[entry]))
            total, ends = float(target.weights[entry]), self._ends.tolist()
            assert total == pytest.approx(self.reference.weight(path), abs=1e-4)
            for _ in range(min(self.lookahead, config.max_new_tokens - len(path))):
                if path[-1] in ends:
                    break
                log_p = self.reference.log_p(path).copy()
                if len(path) < config.min_new_tokens:
                    log_p[ends] = -np.inf
                    log_p -= np.log(np.exp(log_p).sum())
                total, path = total + log_p.max(), (*path, int(log_p.argmax()))
            scores.append(total / len(path) ** config.length_penalty)
        assert scores[found - 1] == pytest.approx(max(scores), abs=1e-4)
        self.asked.append(found)
        return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5, "top_k": None},
        {"eos_token_id": [0, 1], "length_penalty": 0.5},
        {"eos_token_id": [0, 1, 2], "min_new_tokens": 4},
    ],
    ids=str,
)
def test_m_is_the_rank_of_the_candidate_that_goes_on_best(pair: ModelPair, changes: dict[str, Any]) -> None:
    config, asked = CONFIG.with_changes(verification="rejection", **changes), []
    for seed in range(3):
        oracle = Slow(pair, PROMPT, lookahead=3, candidates=6)
        (result,) = DSBDDecoder(pair, config, oracle).generate([PROMPT], seeded(seed), recorder=oracle)
        assert result.stats.target_widths == [min(m, config.target_width) for m in oracle.asked]
        asked += oracle.asked
    assert len(set(asked)) > 1


def test_looking_one_token_ahead_at_the_end_changes_nothing(pair: ModelPair) -> None:
    """The last layer has no future, so its heaviest candidate wins; and without any lookahead left M is 1."""
    (result,) = SurvivorOracle.make(pair, CONFIG.with_changes(max_new_tokens=1))([PROMPT], seeded())
    assert result.stats.target_widths == [1]


def test_the_method_decodes_prompts_one_by_one_and_its_lookahead_takes_no_time(pair: ModelPair) -> None:
    generate = METHODS["oracle_survivor"](pair, CONFIG)
    prompts = [PROMPT, [4, 5]]
    results = generate(prompts, [seeded(1), seeded(2)])
    assert [r.sequences for r in generate([[4, 5]], [seeded(2)])] == [results[1].sequences]
    for result in results:
        assert result.stats.new_tokens == 10
        assert 0 <= result.stats.seconds["policy"] < result.stats.total_seconds / 2
        assert 0 < hindsight_seconds(result.stats, Costs()) <= modelled_seconds(result.stats, Costs())
    assert SurvivorOracle(pair, PROMPT).describe() == {"name": "oracle_survivor", "lookahead": 8, "candidates": 10}


@pytest.mark.parametrize("options", [{"lookahead": 0}, {"candidates": True}])
def test_counts_are_checked(pair: ModelPair, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"is .*; give a whole number of at least 1"):
        SurvivorOracle(pair, PROMPT, **options)


class Listener(Recorder):
    """Keeps every iteration's layers, as the decoder recorded them."""

    def __init__(self) -> None:
        self.iterations: list[list[LayerRecord]] = []

    def drafted(self, *_: object) -> None:
        self.iterations.append([])

    def layer(self, event: LayerEvent) -> None:
        self.iterations[-1].append(event.record)

    @property
    def passed(self) -> list[int]:
        return [sum(layer.draft_width > 0 and layer.passed for layer in layers) for layers in self.iterations]


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "exact": {"exact": True},
    "rejection": {"verification": "rejection"},
    "replacement": {"verification": "rejection", "replacement": True},
    "ends": {"eos_token_id": [0, 1], "early_stopping": True},
    "nothing drafted": {"draft_depth": 0},
    "search": {"mode": "beam_search", "top_k": None},
    "few to accept": {"top_p": 0.5, "top_k": None, "exact": True},  # P holds fewer than M now and then
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", [FixedWidth(), RandomWidth(full_share=0.0)], ids=["fixed", "random"])
def test_hindsight_charges_the_layers_that_the_decoder_saw_pass(case: str, policy: WidthPolicy) -> None:
    config = CONFIG.with_changes(max_new_tokens=12, **CASES[case])
    pair = random_pair(6, closeness=0.7)
    listeners = [Listener() for _ in range(12)]
    prompts = [[i % 6] for i in range(len(listeners))]
    results = DSBDDecoder(pair, config, policy).generate(prompts, seeded(), listeners)
    for result, listener in zip(results, listeners, strict=True):
        stats = result.stats
        assert [list(record.layers) for record in stats.records] == listener.iterations
        assert stats.iterations == len(stats.records)
        assert stats.new_tokens == len(stats.layers) == sum(record.tokens for record in stats.records)
        seconds = sum(
            by_hand(Costs(), roots, widths[:passed])
            for roots, widths, passed in zip(stats.roots, stats.forests, listener.passed, strict=True)
        )
        assert hindsight_seconds(stats, Costs()) == pytest.approx(seconds)
        assert seconds <= modelled_seconds(stats, Costs()) + 1e-9
    if case == "few to accept" and policy.name == "fixed":
        layers = [layer for result in results for layer in result.stats.layers]
        assert any(layer.passed and 0 < layer.accepted < layer.target_width for layer in layers)


def by_hand(costs: Costs, roots: int, widths: list[int]) -> float:
    seconds, above = costs.host_cost(len(widths)) + costs.target_cost(roots + sum(widths)), roots
    for width in widths:
        seconds, above = seconds + costs.draft_cost(above), width
    return seconds


def test_seconds_by_hand() -> None:
    """Two iterations: of the first only layer 1 of 2 passed, the second ends the prompt with a layer that passed."""
    failed = (LayerRecord(1, 4, 2, 2, True), LayerRecord(2, 4, 2, 1, False))
    stats = DecodeStats(
        records=[
            IterationRecord(failed, 2, 0.5, roots=1, drafts=(4, 4)),
            IterationRecord((LayerRecord(1, 3, 2, 2, True),), 1, 0.5, roots=2, drafts=(3,)),
        ]
    )
    costs = Costs()
    first = (0.1 + 0.01) + (0.1 + 0.04) + (1 + 0.09) + 3 * 0.05
    second = (0.1 + 0.02) + (1 + 0.05) + 2 * 0.05
    assert modelled_seconds(stats, costs) == pytest.approx(first + second)
    first = (0.1 + 0.01) + (1 + 0.05) + 2 * 0.05
    assert hindsight_seconds(stats, costs) == pytest.approx(first + second)


def test_a_layer_that_passed_with_less_than_m_was_not_in_vain() -> None:
    """P held one entry: accepted 1 of M = 2, and yet a layer drawn from the target follows within the iteration."""
    layers = (LayerRecord(1, 2, 2, 1, True), LayerRecord(2, 0, 2, 0, True))
    stats = DecodeStats(records=[IterationRecord(layers, 2, 0.5, roots=1, drafts=(2,))])
    assert hindsight_seconds(stats, Costs()) == modelled_seconds(stats, Costs())


@pytest.mark.parametrize("seconds", [modelled_seconds, hindsight_seconds])
def test_stats_without_records_are_refused(pair: ModelPair, seconds: Callable[..., float]) -> None:
    (result,) = hf_generate(pair, [PROMPT], CONFIG, seeded(), num_beams=2)
    with pytest.raises(UserError, match="give those of DSBDDecoder or beam_sample"):
        seconds(result.stats, Costs())
