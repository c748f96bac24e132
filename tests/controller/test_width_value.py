"""LearnedWidth with `width_value`: fewer beams where that pays, and layers that are exact draws all the same."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from controller import LearnedWidth
from controller.plan import HOPE, Plan
from decoding import DecodingConfig, DSBDDecoder, UserError, beam_sample
from decoding.cost_table import UnitCosts
from decoding.policies.base import DraftContext, TargetContext
from decoding.results import LayerEvent, Recorder
from tests.controller.synthetic import ABOUT, CONFIG, prompts, random_net, random_policy, streams
from tests.decoding.stubs import Path, Reference, chi_square_p, random_pair, settings
from tests.small_pair import small_pair

PROMPT, PASS, CAUGHT = [0, 1], 1e-3, 1e-6
EXACT = settings(2, 3, 2, 6, exact=True, verification="shared_noise")


class Drawn(Recorder):
    """The first M of every layer as they were drawn, by the beams that the layer started from and M."""

    def __init__(self) -> None:
        self.found: list[tuple[tuple[tuple[Path, ...], int], tuple[Path, ...]]] = []
        self._beams: tuple[Path, ...] = ((),)
        self._forest: Any = None

    def drafted(self, forest: Any, beams: Any, layers: Any, contexts: Any) -> None:
        self._forest = forest

    def layer(self, event: LayerEvent) -> None:
        width = event.record.target_width
        drawn = tuple(tuple(self._forest.path(node)) for node in event.slots[:width])
        if self._beams:
            self.found.append(((self._beams, width), drawn))
        self._beams = tuple(sorted(drawn))


class Peeking(LearnedWidth):
    """The broken twin: fewer beams are asked for where the first draft is the first token."""

    def choose(self, context: DraftContext) -> NDArray[np.int64]:
        assert context.candidates is not None
        self.tokens = [*getattr(self, "tokens", [])[: context.layer - 1], context.candidates.tokens[0]]
        return super().choose(context)

    def target_width(self, context: TargetContext) -> int:
        if context.draft_width == 0:
            return super().target_width(context)
        return 1 if self.tokens[context.draft.layer - 1] == 0 else 2


def chances_of(kind: type[LearnedWidth], count: int) -> dict[int, float]:
    """For each M the p that its layers' draws are exact: places of what was drawn in its distribution are uniform."""
    pair = random_pair(3, seed=8, closeness=0.6)
    policy = kind(random_net(2), {"features": ABOUT, "pair": pair.describe()}, clock="table", width_value=0.2)
    recorders = [Drawn() for _ in range(count)]
    DSBDDecoder(pair, EXACT, policy).generate([PROMPT] * count, streams(count), recorders)
    reference, coin = Reference(pair.target, PROMPT, EXACT), random.Random(0)
    places: dict[int, Counter[int]] = defaultdict(Counter)
    for (beams, width), drawn in (found for recorder in recorders for found in recorder.found):
        left = reference.joint(beams)
        for path in drawn:
            total, below = sum(left.values()), sum(share for other, share in left.items() if other < path)
            places[width][int(8 * (below + coin.random() * left.pop(path)) / total)] += 1
    return {width: chi_square_p(found, dict.fromkeys(range(8), 1 / 8)) for width, found in places.items()}


def test_with_exact_every_layer_is_an_exact_draw_of_its_width() -> None:
    chances = chances_of(LearnedWidth, 300)
    assert {1, 2} <= set(chances)
    assert min(chances.values()) > PASS


def test_a_width_that_follows_the_drafts_is_caught() -> None:
    assert min(chances_of(Peeking, 300).values()) < CAUGHT


def widths_of(width_value: float | None, config: DecodingConfig = CONFIG) -> list[int]:
    policy = random_policy(clock="table", width_value=width_value)
    results = DSBDDecoder(small_pair(), config, policy).generate(prompts(6), streams(6))
    return [layer.target_width for result in results for layer in result.stats.layers if layer.draft_width]


def test_the_lower_the_value_the_fewer_beams() -> None:
    means = [np.mean(widths_of(value)) for value in (0.0, 0.1, 0.3, 1e6)]
    assert means == sorted(means) and means[0] < means[2] < means[3] == CONFIG.target_width


def test_a_great_value_gives_the_tokens_of_beam_sampling() -> None:
    policy = random_policy(clock="table", width_value=1e6)
    found = DSBDDecoder(small_pair(), CONFIG, policy).generate(prompts(6), streams(6))
    alone = beam_sample(small_pair().target, prompts(6), CONFIG, streams(6))
    assert [result.sequences for result in found] == [result.sequences for result in alone]


def test_no_fewer_than_min_width_are_asked_for() -> None:
    assert min(widths_of(0.0, CONFIG.with_changes(min_width=2))) == 2
    with pytest.raises(UserError, match="no beams to trade"):
        random_policy(width_value=1.0).check(CONFIG.with_changes(min_width=3))
    with pytest.raises(UserError, match="width_value"):
        random_policy(width_value=-1.0)
    assert random_policy(width_value=2.0).describe()["width_value"] == 2.0


@pytest.mark.parametrize(
    ("chances", "value", "width"),
    [([0.9, 0.5, 0.1], 0.0, 1), ([0.9, 0.5, 0.1], 100.0, 3), ([0.9, 0.85, 0.1], 1.0, 2), ([0.5, 0.5, 0.5], 0.0, 3)],
)
def test_beams_weigh_the_chance_to_pass_against_what_is_lost(
    chances: Sequence[float], value: float, width: int
) -> None:
    plan = Plan(UnitCosts())
    assert plan.beams(chances, value, 1) == width
    assert width == max((1, 2, 3), key=lambda m: (HOPE * chances[m - 1] - value / m, m))
