"""Drafts that read a prompt late guess as those that read it at once, and those never asked read nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from decoding import DSBDDecoder, ModelPair, WidthPolicy, beam_sample
from decoding.forest.late_scorer import LateScorer
from decoding.pairs.drafts.eagle3 import Eagle3Draft
from decoding.policies.base import RootContext
from decoding.results import DecodeResult
from tests.decoding.pairs import test_head_kinds
from tests.decoding.pairs.test_drafts import pair_with
from tests.decoding.pairs.test_eagle3 import head_of, target_of
from tests.decoding.pairs.test_feature_draft import feature_pair
from tests.decoding.stubs import seeded, settings

PROMPTS = [[1, 2, 3, 1, 2], [1, 2, 3, 5], [1, 2, 3, 1, 7, 2, 1, 2], [1, 2, 3, 6, 6], [8]]


def eagle3_pair() -> ModelPair:
    target = target_of()
    return ModelPair(target, Eagle3Draft(head_of(target)))


PAIRS: dict[str, Callable[[], ModelPair]] = {
    **{kind: partial(pair_with, kind) for kind in ("model", "layers:1", "ngram", "ngram+layers:1", "turned")},
    **{kind: partial(test_head_kinds.pair_of, kind) for kind in test_head_kinds.KINDS},
    "features": feature_pair,
    "eagle3": eagle3_pair,
}


class DraftsAtTimes(WidthPolicy):
    """Drafts in some iterations only."""

    def __init__(self, *iterations: int) -> None:
        self.iterations = iterations

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        return context.iteration in self.iterations


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts read their prompts when the target does."""
    wait = LateScorer.open

    def open_now(self: LateScorer, row: int, *rest: Any) -> None:
        wait(self, row, *rest)
        self.arrive(row)

    monkeypatch.setattr(LateScorer, "open", open_now)


def told(results: list[DecodeResult]) -> list[Any]:
    """All that is decided, drafted and accepted; no times."""
    return [
        (result.sequences, result.scores, [replace(record, seconds=0.0) for record in result.stats.records])
        for result in results
    ]


@pytest.mark.parametrize("mode", ["beam_sample", "beam_search"])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kind", PAIRS)
def test_late_is_as_at_once(kind: str, batch_size: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that took a prompt over from another, with prefixes to share, those never drafted for among them."""
    config = settings(3, 5, 2, 8, verification="shared_noise", mode=mode)
    pair = PAIRS[kind]()
    policies = [DraftsAtTimes(2, 3, 5), DraftsAtTimes(0, 4), DraftsAtTimes(1, 2, 3, 4, 5, 6, 7)]

    def decoded() -> list[Any]:
        return [
            told(DSBDDecoder(pair, config, policy).generate(PROMPTS, seeded(), batch_size=batch_size))
            for policy in policies
        ]

    late = decoded()
    assert any(sum(layer.accepted for record in of[2] for layer in record.layers) for found in late for of in found)
    at_once(monkeypatch)
    assert late == decoded()


@pytest.mark.parametrize("kind", PAIRS)
def test_what_never_drafts_leaves_the_draft_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, config = PAIRS[kind](), settings(3, 5, 2, 8, verification="shared_noise")
    arrived: list[int] = []
    arrive = LateScorer.arrive

    def noted(self: LateScorer, row: int) -> None:
        arrived.append(row)
        arrive(self, row)

    monkeypatch.setattr(LateScorer, "arrive", noted)
    results = DSBDDecoder(pair, config, DraftsAtTimes()).generate(PROMPTS, seeded())
    alone = beam_sample(pair.target, PROMPTS, config, seeded())
    assert [result.sequences for result in results] == [result.sequences for result in alone]
    assert not arrived and all(result.stats.draft_calls == 0 for result in results)
    assert all(result.stats.seconds["draft"] == 0 for result in results)


def test_what_the_draft_reads_of_the_prompt_is_no_time_of_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies that learn by the clock would take it for what drafting costs."""
    arrive = LateScorer.arrive

    def slow(self: LateScorer, row: int) -> None:
        time.sleep(0.2 if row in self._waiting else 0.0)
        arrive(self, row)

    monkeypatch.setattr(LateScorer, "arrive", slow)
    config = settings(2, 3, 2, 8, verification="shared_noise", eos_token_id=-1)
    (result,) = DSBDDecoder(pair_with("model"), config, DraftsAtTimes(3, 4)).generate([[1, 2, 3]], seeded())
    assert result.stats.seconds["prompt"] > 0.2
    assert all(record.seconds < 0.2 for record in result.stats.records)
