"""LearnedWidth in the real decoder: every setting runs, what it learns is what happened, and the output stays exact."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from controller import LearnedWidth, WidthNet
from controller.experience import Throughput
from controller.features import ContextFeatures
from decoding import DecodeResult, DecodingConfig, DSBDDecoder, ModelPair
from decoding.cost_table import UnitCosts, iteration_seconds
from decoding.forest import TokenForest
from decoding.results import LayerEvent
from decoding.widths import TargetContext
from tests.controller.test_policy import network, provenance
from tests.decoding.stubs import Beams, Reference, chi_square_p, llama_pair, random_pair
from tests.decoding.test_exactness import CAUGHT, PASS, PROMPT, SlotRecorder, decode_often, leak_drafts, settings

PROMPTS = [[1, 2], [3], [2, 0, 1]]
CHEAP = UnitCosts(0.02, 1.0, 0.002)  # drafts hardly cost anything: forests are deep


def learned(pair: ModelPair, kind: type[LearnedWidth] = LearnedWidth, **options: Any) -> LearnedWidth:
    """An untrained controller that was made for this pair."""
    net = options.pop("net", None) or network(hidden=False)
    options = {"latency": CHEAP, "clock": "table"} | options
    return kind(net, provenance(pair=pair.describe(), decoding={}), **options)


def net_of_llamas() -> WidthNet:
    """An untrained network that looks at the hidden states of a `llama_pair`."""
    features = ContextFeatures()
    torch.manual_seed(0)
    return WidthNet(len(features.names), 6, 4, 16, 16, len(features.target_names)).eval()


def config_of(**changes: Any) -> DecodingConfig:
    fields = dict(target_width=4, draft_width=6, draft_depth=3, max_new_tokens=9, eos_token_id=-1)
    return DecodingConfig(**fields | changes)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"exact": True},
    {"replacement": True},
    {"replacement": True, "exact": True},
    {"surplus": "keep", "refill": "width"},
    {"surplus": "drop", "refill": "full"},
    {"target_width": 1},
    {"target_width": 1, "draft_width": 1, "exact": True},
    {"draft_depth": 0},
    {"draft_depth": 0, "draft_width": 1},
    {"max_new_tokens": 1},
    {"max_new_tokens": 2},
    {"eos_token_id": [1, 2]},
    {"eos_token_id": [1, 2], "exact": True, "early_stopping": True},
    {"min_width": 3},
    {"min_width": 4, "exact": True},
    {"one_beam_cache": True},
    {"top_k": 4},
    {"top_p": 0.3, "warp": "beam"},
    {"top_k": 1, "warp": "beam", "exact": True},
    {"mode": "beam_search"},
    {"mode": "beam_search", "exact": True, "eos_token_id": 1},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=str)
def test_every_setting_decodes_and_learns(changes: dict[str, Any]) -> None:
    pair, config = random_pair(6, seed=1, closeness=0.7), config_of(**changes)
    for value in (0.5, 1.5, 5.0):
        policy = learned(pair, width_value=value)
        outlook = policy.outlook
        results = DSBDDecoder(pair, config, policy).generate(PROMPTS, torch.Generator().manual_seed(0))
        for result in results:
            stats = result.stats
            assert all(config.min_width <= m <= config.target_width for m in stats.target_widths)
            assert all(0 <= w <= config.draft_width for w in stats.draft_widths)
            assert all(len(forest) <= config.draft_depth for forest in stats.forests)
            assert stats.new_tokens == config.max_new_tokens or config.eos_token_id != -1
        assert policy.throughput is not None and policy.outlook is outlook
        learnt = (policy.throughput.rate, outlook.earned, outlook.left, outlook.correction, outlook.passing(1))
        assert np.isfinite(learnt).all() and policy.throughput.rate > 0 and 0 <= outlook.left <= 1
        assert 0 < outlook.passing(1) < 1 and outlook.earned <= 1
        if config.draft_depth and config.max_new_tokens > 2:
            assert any(forest for result in results for forest in result.stats.forests)


def test_hidden_states_of_a_real_pair_are_looked_at() -> None:
    pair = llama_pair()
    policy = learned(pair, net=net_of_llamas())
    (result,) = DSBDDecoder(pair, config_of(), policy).generate([PROMPT])
    assert policy.needs_hidden and result.stats.new_tokens == 9


def outcome(results: list[DecodeResult]) -> list[Any]:
    """All that depends on the widths."""
    return [(r.sequences, r.stats.target_widths, r.stats.draft_widths, r.stats.forests) for r in results]


def streams(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


@pytest.mark.parametrize("share", [True, False])
def test_by_the_table_equal_prompts_in_equal_order_give_equal_widths(share: bool) -> None:
    pair, config = random_pair(6, seed=2, closeness=0.7), config_of()

    def decode(seed: int = 0) -> list[Any]:
        decoder = DSBDDecoder(pair, config, learned(pair, share=share))
        return outcome(decoder.generate(PROMPTS * 2, torch.Generator().manual_seed(seed), batch_size=3))

    assert decode() == decode() != decode(seed=1)


def test_prompts_that_learn_alone_do_not_depend_on_their_neighbours() -> None:
    pair, config = random_pair(6, seed=3, closeness=0.7), config_of(max_new_tokens=13)

    def decode(share: bool, batch_size: int) -> list[Any]:
        decoder = DSBDDecoder(pair, config, learned(pair, share=share, width_value=2.0))
        return outcome(decoder.generate(PROMPTS * 5, streams(15), batch_size=batch_size))

    assert decode(False, 1) == decode(False, 7) == decode(False, 15)
    assert decode(True, 1) != decode(True, 15)  # as those do that learn together


def one_after_the_other(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[tuple[float, float, float]]:
    """What each iteration was said to have earned, and by the table to have taken; and what the latter was."""
    told: list[tuple[float, float]] = []
    update = Throughput.update

    def spied(self: Throughput, reward: float, seconds: float) -> None:
        told.append((reward, seconds))
        update(self, reward, seconds)

    monkeypatch.setattr(Throughput, "update", spied)
    pair, costs = random_pair(6, seed=4, closeness=0.7), UnitCosts(0.1, 1.0, 0.07)
    policy = learned(pair, latency=costs, width_value=0.0)
    decoder = DSBDDecoder(pair, config_of(**changes), policy)
    found: list[tuple[float, float, float]] = []
    for prompt in PROMPTS * 4:
        told.clear()
        (result,) = decoder.generate([prompt])
        stats = result.stats
        assert len(told) == stats.iterations == len(stats.forests)
        assert sum(reward for reward, _ in told) == stats.new_tokens  # a layer is a token, where no loss is priced
        took = [
            iteration_seconds(costs, forest, roots) for forest, roots in zip(stats.forests, stats.roots, strict=True)
        ]
        found += [(reward, said, true) for (reward, said), true in zip(told, took, strict=True)]
    return found


def test_the_table_prices_the_forests_that_were_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    """But perhaps for the last iteration of a prompt, where nothing may be drafted: see the next test."""
    found = one_after_the_other(monkeypatch, max_new_tokens=12)
    right = sum(said == pytest.approx(true) for _, said, true in found)
    assert right >= len(found) - len(PROMPTS * 4) and right > 12


@pytest.mark.parametrize("changes", [{"max_new_tokens": 12}, {"draft_depth": 0, "min_width": 2}], ids=str)
def test_the_table_prices_iterations_that_drafted_nothing(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = one_after_the_other(monkeypatch, **changes)
    assert [said for _, said, _ in found] == pytest.approx([true for *_, true in found])


def test_where_m_is_given_its_price_changes_nothing() -> None:
    """target_width=1 with a controller that was trained for 4: all that is left to decide is speed."""
    pair, config = random_pair(6, seed=5, closeness=0.8), config_of(target_width=1)
    found = []
    for value in (0.0, 3.0, 100.0):
        decoder = DSBDDecoder(pair, config, learned(pair, width_value=value))
        found.append(outcome(decoder.generate(PROMPTS * 4, streams(12))))
    assert found[0] == found[1] == found[2]


# Exactness.


@dataclass
class Step:
    """A layer by what it started from and what it kept."""

    beams: Beams
    width: int
    kept: Beams


class Steps:
    """Keeps all steps of a prompt, as paths."""

    shadow = None
    needs_hidden = False

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._beams: Beams = frozenset({()})
        self._forest = TokenForest()

    def drafted(self, forest: TokenForest, beams: object, layers: object) -> None:
        self._forest = forest

    def layer(self, event: LayerEvent) -> None:
        kept = frozenset(tuple(self._forest.path(node)) for node, _ in event.kept)
        self.steps.append(Step(self._beams, event.record.target_width, kept))
        self._beams = kept

    def end(self, best_path: list[int]) -> None:
        pass


def step_p_value(reference: Reference, recorders: list[Steps], least: int = 60) -> tuple[float, set[int]]:
    """Smallest p-value, corrected for their number, of what layers kept given their beams and M; and the M seen.

    With exact=True, every layer is beam sampling of its width: given the input beams and M, whatever M followed.
    """
    kept: dict[tuple[Beams, int], Counter[Beams]] = defaultdict(Counter)
    for recorder in recorders:
        for step in recorder.steps:
            kept[step.beams, step.width][step.kept] += 1
    often = {key: counts for key, counts in kept.items() if counts.total() >= least}
    p = [chi_square_p(counts, reference.step(beams, width)) for (beams, width), counts in often.items()]
    return min(p) * len(p), {width for _, width in often}


class Peeking(LearnedWidth):
    """One beam where the first draft of the layer is token 2: what must never be done."""

    first_draft = 0

    def target_width(self, context: TargetContext) -> int:
        honest = super().target_width(context)
        return 1 if self.first_draft == 2 else honest


def steps_of(pair: ModelPair, config: DecodingConfig, policy: LearnedWidth, draws: int) -> tuple[float, set[int]]:
    recorders = [Steps() for _ in range(draws)]
    decode_often(pair, config, draws, policy, recorders)
    return step_p_value(Reference(pair.target, PROMPT, config), recorders)


@pytest.mark.parametrize("replacement", [False, True])
def test_layers_of_an_exact_config_are_beam_sampling_of_their_widths(replacement: bool) -> None:
    config = settings(3, 5, 2, 4, exact=True, replacement=replacement)
    pair = random_pair(3, seed=8, closeness=0.6)
    p, widths = steps_of(pair, config, learned(pair, width_value=0.4), 500)
    assert len(widths) > 1, "the case must have several widths"
    assert p > PASS


def test_an_exact_layer_of_a_width_that_followed_the_drafts_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    leak_drafts(monkeypatch)
    config, pair = settings(3, 5, 2, 4, exact=True), random_pair(3, seed=8, closeness=0.6)
    assert steps_of(pair, config, learned(pair, Peeking, width_value=100.0), 400)[0] < CAUGHT


@pytest.mark.parametrize(
    ("value", "changes"),
    [(3.0, {}), (2.0, {"exact": True}), (2.0, {"refill": "width", "replacement": True})],
    ids=str,
)
def test_first_slots_are_exact_draws(value: float, changes: dict[str, Any]) -> None:
    """Beams that are kept besides depend on the coins; the first M slots never do (design 5.2)."""
    config = settings(3, 5, 3, 6, **changes)
    pair = random_pair(4, seed=11, closeness=0.6)
    recorder = SlotRecorder(config.replacement)
    decode_often(pair, config, 200, learned(pair, width_value=value), recorder)
    assert len(recorder.uniforms) > 1
    assert recorder.p_value() > PASS


def test_first_slots_of_a_width_that_followed_the_drafts_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    leak_drafts(monkeypatch)
    recorder, pair = SlotRecorder(replacement=False), random_pair(3, seed=8, closeness=0.6)
    decode_often(pair, settings(3, 5, 3, 6), 300, learned(pair, Peeking, width_value=100.0), recorder)
    assert recorder.p_value() < CAUGHT


def test_as_wide_as_can_be_all_returned_beams_follow_beam_sampling() -> None:
    """Whatever draft widths and depths were chosen, and though prompts learn from each other."""
    config = settings(2, 4, 2, 3)
    pair = random_pair(3, seed=3, closeness=0.5)
    policy = learned(pair, width_value=1e9)
    results = decode_often(pair, config, 500, policy)
    counts = Counter(frozenset(map(tuple, result.sequences)) for result in results)
    assert {m for result in results for m in result.stats.target_widths} == {2}
    assert chi_square_p(counts, Reference(pair.target, PROMPT, config).returned()) > PASS
