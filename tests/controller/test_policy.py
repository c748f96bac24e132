"""LearnedWidth: the tokens of beam sampling whatever its weights, what it decides, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from controller import LearnedWidth
from controller.checkpoint import save_controller
from controller.network import SOFT
from controller.plan import SCORED
from decoding import DecodingConfig, DSBDDecoder, UserError, beam_sample
from decoding.cost_table import LatencyTable
from decoding.policies.base import TargetContext
from decoding.results import DecodeResult
from tests.controller.synthetic import ABOUT, CONFIG, prompts, random_net, random_policy, streams
from tests.small_pair import small_pair

CHEAP = LatencyTable((1, 64, 128), (1.0, 1.0, 1.5), (0.01, 0.01, 0.01))
NODES_DEAR = LatencyTable((1, 64), (1.0, 20.0), (0.01, 0.01))
DRAFT_DEAR = LatencyTable((1, 64), (1.0, 1.0), (5.0, 5.0))


def decode(policy: LearnedWidth, config: DecodingConfig = CONFIG, count: int = 6, **options: Any) -> list[DecodeResult]:
    return DSBDDecoder(small_pair(), config, policy).generate(prompts(count), streams(count), **options)


def sequences(results: Sequence[DecodeResult]) -> list[list[list[int]]]:
    return [result.sequences for result in results]


@pytest.mark.parametrize("latency", [CHEAP, NODES_DEAR, None])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_width": 1, "top_k": None},
        {"oversample": 2, "warp": "beam"},
        {"eos_token_id": [5, 9], "num_return_sequences": 2},
    ],
)
def test_the_tokens_are_those_of_beam_sampling(seed: int, latency: Any, changes: dict[str, Any]) -> None:
    config = CONFIG.with_changes(**changes)
    alone = beam_sample(small_pair().target, prompts(6), config, streams(6))
    with pytest.warns(UserWarning) if {"top_k", "oversample"} & set(changes) else _nothing():
        learned = decode(random_policy(seed, latency=latency, clock="table"), config)
    assert sequences(learned) == sequences(alone)
    assert all(a.scores == pytest.approx(b.scores, abs=1e-4) for a, b in zip(alone, learned, strict=True))
    together = decode(random_policy(seed, latency=latency, clock="table"), config, batch_size=2)
    assert sequences(together) == sequences(alone)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_where_nodes_are_dear_fewer_are_sent() -> None:
    free = decode(random_policy(latency=CHEAP, clock="table"))
    dear = decode(random_policy(latency=NODES_DEAR, clock="table"))
    scored = [
        sum(record.scored for r in results for record in r.stats.records) / sum(r.stats.iterations for r in results)
        for results in (free, dear)
    ]
    assert scored[1] < scored[0] / 2
    assert all(max(record.scored for record in r.stats.records) <= 64 + CONFIG.target_width for r in free)


@pytest.mark.parametrize("half", [False, True], ids=["all sent", "half sent"])
def test_it_tells_how_many_it_expects_to_be_accepted(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """E[K] of a layer is the sum of the chances that the drafts which are sent hold the first j of the selection."""
    seen: list[tuple[float, float, bool]] = []

    class Watched(LearnedWidth):
        def expected_count(self, context: TargetContext) -> float | None:
            found, place = super().expected_count(context), context.draft.layer - 1
            assert found is not None
            left = np.exp(self._layers[place].left[0]) - SOFT, self._layers[place].left[1]
            chances = [self._host.passes(self._features[place], *left, j) for j in range(1, CONFIG.target_width + 1)]
            seen.append((found, sum(chances), bool(self._sent[place].all())))
            return found

    def sent(values: Any, *_: Any) -> Any:
        return (values == SCORED) | (np.arange(len(values)) % 2 == 0) if half else np.ones(len(values), np.bool_)

    monkeypatch.setattr("controller.policy.sent", sent)
    policy = Watched(random_policy(0).net, random_policy(0).provenance, latency=CHEAP, clock="table")
    layers = [layer for result in decode(policy, batch_size=1) for layer in result.stats.layers]
    assert [layer.expected for layer in layers if layer.draft_width] == [found for found, *_ in seen]
    assert all(layer.expected is None for layer in layers if not layer.draft_width)
    assert all(0 < found <= CONFIG.target_width for found, *_ in seen)
    assert all(found == pytest.approx(whole) if all_sent else found < whole for found, whole, all_sent in seen)
    assert all(all_sent for *_, all_sent in seen) != half


def test_where_drafting_does_not_pay_it_stops() -> None:
    policy = random_policy(latency=DRAFT_DEAR, clock="table")
    decode(policy, count=6)
    later = decode(policy, count=6)
    passes = sum(len(record.draft_passes) for r in later for record in r.stats.records)
    assert passes <= 0.05 * sum(r.stats.iterations for r in later)


def test_without_share_prompts_do_not_depend_on_others() -> None:
    together = decode(random_policy(latency=CHEAP, clock="table", share=False))
    for i, (prompt, stream) in enumerate(zip(prompts(6), streams(6), strict=True)):
        policy = random_policy(latency=CHEAP, clock="table", share=False)
        (alone,) = DSBDDecoder(small_pair(), CONFIG, policy).generate([prompt], [stream])
        assert [r.drafts for r in alone.stats.records] == [r.drafts for r in together[i].stats.records]


def test_settings_that_it_was_not_made_for_are_refused() -> None:
    policy = random_policy()
    for changes in ({"verification": "rejection"}, {"mode": "beam_search", "top_k": None}):
        with pytest.raises(UserError, match="decides under shared noise"):
            policy.check(CONFIG.with_changes(**changes))
    with pytest.raises(UserError, match="trained for at most 3"):
        policy.check(CONFIG.with_changes(target_width=4))
    with pytest.warns(UserWarning, match="trained with temperature=1.0"):
        policy.check(CONFIG.with_changes(temperature=0.7))
    with pytest.raises(UserError, match="clock is 'sun'"):
        random_policy(clock="sun")
    with pytest.raises(UserError, match="needs a latency table in seconds"):
        random_policy(clock="wall")
    with pytest.raises(UserError, match="latency is 3"):
        random_policy(latency=3)


def test_controllers_of_others_are_refused(tmp_path: Path) -> None:
    about = {"features": ABOUT, "pair": small_pair().describe(), "decoding": {}}
    saved = save_controller(random_net(), tmp_path / "c", about)
    loaded = LearnedWidth.load(saved, pair=small_pair())
    assert loaded.describe()["trained_for"] == small_pair().describe()["fingerprint"]
    with pytest.raises(UserError, match="was trained for the pair"):
        LearnedWidth.load(saved, pair=small_pair(seed=1))
    with pytest.raises(UserError, match="version 1 of the features"):
        LearnedWidth(random_net(), about | {"features": ABOUT | {"version": 1}})
    with pytest.raises(UserError, match="other features"):
        LearnedWidth(random_net(), about | {"features": {}})


def test_shared_experience_outlives_a_prompt() -> None:
    policy = random_policy(latency=CHEAP, clock="table")
    before = policy.experience.rate()
    decode(policy)
    assert policy.experience.rate() != before
    assert policy.use_latency(NODES_DEAR.to_dict()).experience.rate() == pytest.approx(before)
    torch.manual_seed(0)
