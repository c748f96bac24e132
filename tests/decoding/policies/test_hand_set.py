"""Rules by hand: what each asks for by hand-computed distributions, when it stops, and that the output stays exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from decoding import DecodingConfig, DSBDDecoder, EntropyWidth, GapWidth, MassWidth, UserError, WidthPolicy
from decoding.measure.rows import make_rows
from decoding.policies.hand_set import HandSetWidth, entropy
from tests.decoding.loop.test_exactness import PASS, PROMPT, SlotRecorder, count_sets, decode_often, settings
from tests.decoding.policies.test_widths import CONFIG, FLAT, STEEP, context, joint
from tests.decoding.stubs import Beams, Reference, chi_square_p, random_pair

RULES = [MassWidth, GapWidth, EntropyWidth]


@pytest.mark.parametrize(
    ("p", "share", "expected"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.5, 1),
        ([0.5, 0.3, 0.15, 0.05], 0.51, 2),
        ([0.05, 0.15, 0.5, 0.3], 0.8, 2),  # in any order
        ([0.5, 0.3, 0.15, 0.05], 0.95, 3),
        ([0.5, 0.3, 0.15, 0.05], 1.0, 4),
        ([0.25, 0.25, 0.25, 0.25], 0.9, 4),
        ([0.1] * 10, 0.95, 4),  # never more than target_width
    ],
)
def test_mass_is_the_fewest_beams_that_hold_the_share(p: list[float], share: float, expected: int) -> None:
    found = MassWidth(share).target_width(context(p, p))
    assert found == expected


@pytest.mark.parametrize("share", [0, 1.2, True, float("nan"), "0.5"])
def test_mass_refuses_what_is_no_share(share: float) -> None:
    with pytest.raises(UserError, match=r"share is .*; give a number in \(0, 1\]"):
        MassWidth(share)


@pytest.mark.parametrize(
    ("p", "gap", "expected"),
    [
        ([0.5, 0.3, 0.15, 0.05], 0.0, 1),
        ([0.5, 0.3, 0.15, 0.05], math.log(5 / 3), 2),  # the second is exactly so far behind
        ([0.05, 0.15, 0.5, 0.3], 1.21, 3),  # in any order
        ([0.5, 0.3, 0.15, 0.05], 2.4, 4),
        ([0.25, 0.25, 0.25, 0.25], 0.0, 4),  # none is behind
        ([0.1] * 10, 1.0, 4),  # never more than target_width
    ],
)
def test_gap_counts_those_close_to_the_best(p: list[float], gap: float, expected: int) -> None:
    assert GapWidth(gap).target_width(context(p, FLAT)) == expected


@pytest.mark.parametrize(
    ("q", "scale", "expected"),
    [
        ([1.0], 0.5, 1),
        ([0.5, 0.5], 0.5, 1),
        ([0.5, 0.5], 0.51, 2),
        (FLAT, 0.75, 3),
        (FLAT, 1.0, 4),
        ([0.1] * 10, 1.0, 4),  # never more than target_width
        (STEEP, 1.0, 2),  # exp(0.168)
    ],
)
def test_entropy_asks_by_how_undecided_the_draft_is(q: list[float], scale: float, expected: int) -> None:
    for p in (FLAT, STEEP):  # the target has no say
        assert EntropyWidth(scale).target_width(context(p, q)) == expected


def test_entropy_of_known_distributions() -> None:
    assert entropy(joint(FLAT)) == pytest.approx(math.log(4)) and entropy(joint([1.0])) == 0
    assert entropy(joint([0.5, 0.25, 0.25])) == pytest.approx(1.5 * math.log(2))


@pytest.mark.parametrize("rule", RULES)
def test_last_layers_have_a_width_of_their_own(rule: type[HandSetWidth]) -> None:
    policy = rule(final_width=3)
    policy.check(CONFIG)
    assert policy.target_width(context(STEEP, STEEP, width=0)) == 3
    assert policy.target_width(context(STEEP, STEEP)) != 3
    assert rule().target_width(context(STEEP, STEEP, width=0)) != 3
    with pytest.raises(UserError, match=r"final_width is 9; give a whole number of 1..4"):
        rule(final_width=9).check(CONFIG)


@pytest.mark.parametrize("rule", RULES)
def test_drafting_stops_after_an_undecided_layer(rule: type[HandSetWidth]) -> None:
    policy, root = rule(stop_entropy=1.0), context(FLAT, FLAT).draft.root
    assert policy.draft_further(root, 1, ())
    assert policy.draft_width(context(FLAT, STEEP).draft) == CONFIG.draft_width
    assert policy.draft_further(root, 2, (6,))
    policy.draft_width(context(STEEP, FLAT).draft)
    assert not policy.draft_further(root, 3, (6, 6))
    assert policy.draft_further(root, 1, ()), "the next iteration starts afresh"
    never = rule()
    never.draft_width(context(STEEP, FLAT).draft)
    assert never.draft_further(root, 2, (6,))


def test_a_stop_shows_in_the_forests() -> None:
    """Through the decoder: no layer is drafted below one whose draft was undecided, and every other one is."""
    config = DecodingConfig(target_width=3, draft_width=4, draft_depth=4, max_new_tokens=12, eos_token_id=-1)
    limit, seen = 1.7, []

    class Watched(GapWidth):
        def draft_width(self, context: Any) -> int:
            seen.append((context.layer, context.root.remaining, entropy(context.joint)))
            return super().draft_width(context)

    pair = random_pair(5, seed=3, closeness=0.8, scale=2.0)
    DSBDDecoder(pair, config, Watched(gap=1.0, stop_entropy=limit)).generate(
        [[1, 2]] * 6, torch.Generator().manual_seed(0), batch_size=1
    )
    stopped = 0
    for (layer, remaining, nats), (following, _, _) in zip(seen, [*seen[1:], (1, 0, 0.0)], strict=True):
        last = layer == min(config.draft_depth, remaining - 1)
        assert following == (1 if last or nats > limit else layer + 1)
        stopped += not last and nats > limit
    assert 5 < stopped < len(seen) - 5, "the case must have both"


@pytest.mark.parametrize("policy", [MassWidth(0.7), GapWidth(0.8)], ids=["mass", "gap"])
def test_rules_by_the_target_follow_beam_sampling_of_their_widths(policy: HandSetWidth) -> None:
    """With exact=True; the reference sets M from P by a formula of its own. A rule that is read wrong is caught."""
    config = settings(3, 4, 2, 3, exact=True)
    pair = random_pair(3, seed=8, closeness=0.6)

    def width(reference: Reference, beams: Beams, layer: int) -> int:
        probs = sorted(reference.joint(sorted(beams)).values(), reverse=True)
        if isinstance(policy, MassWidth):
            return min(3, 1 + sum(sum(probs[:k]) < 0.7 for k in range(1, len(probs))))
        return min(3, sum(math.log(probs[0] / p) <= 0.8 for p in probs))

    results = decode_often(pair, config, 2000, policy)
    assert len({width for result in results for width in result.stats.target_widths}) > 1
    found = count_sets(results)
    assert chi_square_p(found, Reference(pair.target, PROMPT, config).returned(width)) > PASS
    always_widest = Reference(pair.target, PROMPT, config).returned(lambda *_: 3)
    assert chi_square_p(found, always_widest) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_first_slots_are_exact_draws_where_drafting_stops_early(rule: type[HandSetWidth]) -> None:
    recorder = SlotRecorder(replacement=False)
    policy = rule(final_width=2, stop_entropy=2.1)
    results = decode_often(random_pair(5, seed=2, scale=2.0), settings(3, 5, 3, 6), 1500, policy, recorder)
    assert {1, 2, 3} <= {len(forest) for result in results for forest in result.stats.forests}
    assert recorder.p_value() > PASS


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: GapWidth(-1), r"gap is -1; give a number of at least 0 \(nats"),
        (lambda: GapWidth(float("nan")), "gap is nan; give a number"),
        (lambda: GapWidth(float("inf")), "gap is inf; give a number"),
        (lambda: GapWidth(True), "gap is True; give a number"),
        (lambda: EntropyWidth(0), r"scale is 0; give a number above 0"),
        (lambda: EntropyWidth("wide"), "scale is 'wide'; give a number"),  # type: ignore[arg-type]
        (lambda: MassWidth(stop_entropy=-0.5), "stop_entropy is -0.5; give a number of at least 0"),
    ],
)
def test_what_is_no_setting_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        make()


def test_every_axis_reaches_the_policy() -> None:
    grid = {"shares": [0.5], "gaps": [0.7], "scales": [0.3], "stop_entropies": [0.9], "final_widths": [2]}
    pair, built = random_pair(5), {}
    for row in make_rows(["mass", "gap", "entropy"], CONFIG, grid, references=()):
        assert "stop=0.9" in row.name and "last=2" in row.name
        call: Any = row.build(pair)
        built[row.method.name] = call.func.__self__.policy.describe()
    common = {"final_width": 2, "stop_entropy": 0.9}
    assert built == {
        "mass": {"name": "mass", **common, "share": 0.5},
        "gap": {"name": "gap", **common, "gap": 0.7},
        "entropy": {"name": "entropy", **common, "scale": 0.3},
    }


def test_a_grid_without_drafts_has_no_stops() -> None:
    grid = {"gaps": [0.5, 1.0], "depths": [0, 2], "stop_entropies": [0.5, 1.0]}
    rows = make_rows(["gap"], CONFIG, grid, references=())
    depths = [row.config.draft_depth for row in rows]
    assert depths.count(0) == 2 and depths.count(2) == 4


def test_a_fork_does_not_see_its_neighbours_drafts() -> None:
    policy = GapWidth(stop_entropy=1.0)
    forks: list[WidthPolicy] = [policy.fork(seed) for seed in (0, 1)]
    root = context(FLAT, FLAT).draft.root
    forks[0].draft_width(context(FLAT, FLAT).draft)
    forks[1].draft_width(context(FLAT, STEEP).draft)
    assert [fork.draft_further(root, 2, (6,)) for fork in forks] == [False, True]
    assert np.isfinite(entropy(joint(STEEP)))
