"""Shared noise: with target_width beams at every layer the tokens are those of `beam_sample` with the same seed,
whatever was drafted; with fewer, layers are exact draws if M was fixed without the layer's noise. And wrong runs.

All seeds are fixed. Two keys that differ by rounding alone may change places in passes of other shapes: for these seeds
none do. Of the p-values, about 15, the smallest is expected near 0.06; a wrong run gives less than 1e-6.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteriaList

import decoding.dice.sampling
import decoding.loop.noise_run
from decoding import (
    DecodingConfig,
    DSBDDecoder,
    ExpectedWidth,
    FixedWidth,
    ModelPair,
    RandomWidth,
    ThresholdWidth,
    UniformWidth,
    WidthPolicy,
    beam_sample,
)
from decoding.dice import noise
from decoding.dice.verdict import NEVER, Verdict
from decoding.loop.processing import Rules
from decoding.policies.base import DraftContext, Parents, RootContext, TargetContext
from decoding.policies.hand_set import EntropyWidth, GapWidth, MassWidth
from decoding.results import DecodeResult, LayerEvent, Recorder
from tests.decoding.loop.test_exactness import FIXED_CASES, PROMPT, ByTarget, count_sets, width_by_target
from tests.decoding.loop.test_exactness import settings as sampling_settings
from tests.decoding.loop.test_search import pair_with
from tests.decoding.stubs import Reference, chi_square_p, random_pair

PASS, CAUGHT = 1e-3, 1e-6


def settings(width: int, drafts: int, depth: int, tokens: int, **changes: Any) -> DecodingConfig:
    """Returns all beams and never ends early, unless `changes` say otherwise."""
    return sampling_settings(width, drafts, depth, tokens, **{"verification": "shared_noise", **changes})


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def some_prompts(count: int = 8) -> list[list[int]]:
    dice = random.Random(count)
    return [[dice.randrange(40) for _ in range(dice.randint(1, 6))] for _ in range(count)]


class Restless(WidthPolicy):
    """Widths, depths and passes of the draft by noise, keys and whatever else is to be seen."""

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        return layer == 1 or (context.iteration + layer) % 3 > 0

    def ask_draft(self, context: RootContext, layer: int, parents: Parents) -> bool:
        return parents.unknown_share > 0.3

    def draft_width(self, context: DraftContext) -> int:
        seen = float((context.joint.probs if context.noise is None else context.noise).min())
        return 1 + int(1000 * seen + context.layer) % context.root.config.draft_width


class Idle(WidthPolicy):
    """Never runs the draft where anything is known."""

    def ask_draft(self, context: RootContext, layer: int, share: float) -> bool:
        return False


def check_equal(
    pair: ModelPair, config: DecodingConfig, policy: WidthPolicy | None = None, rules: Any = None, count: int = 8
) -> list[DecodeResult]:
    """Tokens and scores are those of the target alone; returns the results."""
    prompts = some_prompts(count)
    given = [rules(prompt) for prompt in prompts] if rules else None
    found = DSBDDecoder(pair, config, policy).generate(prompts, seed(), rules=given)
    alone = DSBDDecoder(ModelPair(pair.target, None), config.with_changes(draft_depth=0))
    for plain, result in zip(alone.generate(prompts, seed(), rules=given), found, strict=True):
        assert result.sequences == plain.sequences
        assert result.scores == pytest.approx(plain.scores, abs=1e-4)
        assert result.finished == plain.finished
    return found


# Equal tokens.


@pytest.mark.parametrize("oversample", [1, 2])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("draft", ["noisy", "unrelated", "layers:1", "ngram"])
def test_tokens_are_those_of_the_target_alone(draft: str, width: int, oversample: int) -> None:
    dice = random.Random(f"{draft} {width} {oversample}")
    config = settings(
        width,
        dice.choice([width, 2 * width, 16]),
        dice.choice([1, 2, 4]),
        14,
        top_k=dice.choice([None, 20]),
        warp=dice.choice(["joint", "beam"]),
        temperature=dice.choice([0.7, 1.0]),
        eos_token_id=dice.choice([-1, [3], [3, 5, 17]]),
        early_stopping=dice.choice([False, True, "never"]),
        oversample=oversample,
    )
    check_equal(pair_with(draft), config)


POLICIES: dict[str, WidthPolicy] = {
    "fixed": FixedWidth(draft_width=5, draft_depth=2),
    "random": RandomWidth(seed=1, full_share=1.0),
    "threshold": ThresholdWidth(0.9),
    "expected": ExpectedWidth(),
    "uniform": UniformWidth(seed=1),
    "mass": MassWidth(0.8, stop_entropy=1.0),
    "gap": GapWidth(1.5),
    "entropy": EntropyWidth(0.5),
    "restless": Restless(),
    "idle": Idle(),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_change_passes_and_no_tokens(policy: str) -> None:
    """min_width = target_width: a rule that would ask for less is not let."""
    config = settings(3, 9, 4, 16, min_width=3, top_k=12, eos_token_id=[3, 5])
    results = check_equal(pair_with("noisy"), config, POLICIES[policy])
    assert {width for result in results for width in result.stats.target_widths} == {3}


def test_processors_and_criteria_apply_to_both() -> None:
    """A repetition penalty, tokens that must not end yet, and a stopping criterion on every fifth token."""

    def rules(prompt: list[int]) -> Rules:
        fifth = lambda ids, _: torch.tensor([int(row[-1]) % 5 == 0 and len(row) > 6 for row in ids])  # noqa: E731
        return Rules(
            prompt,
            LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]),
            StoppingCriteriaList([fifth]),  # type: ignore[list-item]
        )

    for oversample in (1, 2):
        config = settings(3, 8, 3, 12, top_k=15, oversample=oversample, eos_token_id=[3], min_new_tokens=4)
        check_equal(pair_with("noisy"), config, rules=rules)


@pytest.mark.parametrize("draft", ["noisy", "ngram"])
@pytest.mark.parametrize("changes", [{}, {"oversample": 2}, {"top_p": 0.8}, {"top_p": 0.9, "warp": "beam"}], ids=str)
def test_whole_vocabularies_on_the_device(draft: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a vocabulary is large and nothing is cut; the same noise, so the same tokens as on the host."""
    config = settings(3, 8, 3, 12, eos_token_id=[3, 5], **changes)
    host = check_equal(pair_with(draft), config)
    monkeypatch.setattr(decoding.dice.sampling, "HOST_VOCABULARY", 16)
    device = check_equal(pair_with(draft), config)
    assert [r.sequences for r in host] == [r.sequences for r in device]
    assert [r.stats.accepted for r in host] == [r.stats.accepted for r in device]


def test_a_prompt_is_decoded_as_if_it_were_alone() -> None:
    """In any order, by twos, and whatever the others are; equal prompts have dice of their own."""
    prompts = some_prompts(6)
    streams = [seed(number) for number in range(6)]
    decoder = DSBDDecoder(pair_with("noisy"), settings(3, 8, 3, 14, top_k=12), Restless())
    together = decoder.generate(prompts, streams)
    by_twos = decoder.generate(prompts[::-1], [seed(number) for number in range(6)][::-1], batch_size=2)[::-1]
    for number, (prompt, one, other) in enumerate(zip(prompts, together, by_twos, strict=True)):
        (alone,) = decoder.generate([prompt], [seed(number)])
        assert one.sequences == other.sequences == alone.sequences
        assert one.stats.accepted == other.stats.accepted == alone.stats.accepted
    twice = decoder.generate([prompts[0]] * 2, seed())
    assert twice[0].sequences != twice[1].sequences


def test_beam_sample_takes_the_same_dice() -> None:
    config = settings(3, 8, 3, 10, top_k=12)
    pair, prompts = pair_with("noisy"), some_prompts()
    found = DSBDDecoder(pair, config).generate(prompts, seed())
    plain = beam_sample(pair.target, prompts, config, seed())
    assert [r.sequences for r in found] == [r.sequences for r in plain]
    other = beam_sample(pair.target, prompts, config, seed(1))
    assert [r.sequences for r in found] != [r.sequences for r in other]


@pytest.mark.parametrize("fault", ["a layer passes by any draft", "noise of nodes, not of paths"])
def test_runs_that_depend_on_drafts_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "a layer passes by any draft":
        monkeypatch.setattr(decoding.loop.noise_run, "judge", lambda places, known, *_: Verdict(1, any(known)))
    else:
        monkeypatch.setattr(
            noise.PathNoise, "hashes", lambda self, nodes: noise.token_codes(np.array(nodes, dtype=np.int64))
        )
    with pytest.raises(AssertionError):
        check_equal(pair_with("noisy"), settings(3, 6, 3, 14, top_k=12))


# Distributions.

CASES = ["one beam, several drafts", "two layers", "three beams", "more beams than the support", "top-k of the joint"]
CASES += ["top-p of each beam", "end tokens, early stop", "end token, never stop early"]


@pytest.mark.parametrize("case", CASES)
def test_all_returned_beams_follow_beam_sampling(case: str) -> None:
    vocabulary, closeness, config = FIXED_CASES[case]
    config = config.with_changes(verification="shared_noise")
    pair = random_pair(vocabulary, seed=3, closeness=closeness)
    expected = Reference(pair.target, PROMPT, config).returned()
    results = DSBDDecoder(pair, config).generate([PROMPT] * 500, seed())
    assert chi_square_p(count_sets(results), expected) > PASS


def test_noise_of_tokens_in_place_of_paths_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed and token, the same E, whatever came before: siblings' children are no longer independent."""
    monkeypatch.setattr(noise.PathNoise, "hashes", lambda self, nodes: np.full(len(nodes), self._hashes[0]))
    vocabulary, closeness, config = FIXED_CASES["two layers"]
    config = config.with_changes(verification="shared_noise")
    pair = random_pair(vocabulary, seed=3, closeness=closeness)
    results = DSBDDecoder(pair, config).generate([PROMPT] * 500, seed())
    assert chi_square_p(count_sets(results), Reference(pair.target, PROMPT, config).returned()) < CAUGHT


@pytest.mark.parametrize("eos", [-1, 2])
def test_dynamic_widths_with_exact_follow_beam_sampling_of_those_widths(eos: int) -> None:
    """M < R, by P; w by Q. Known rows and several iterations included."""
    config = settings(3, 4, 2, 3, exact=True, eos_token_id=eos)
    pair = random_pair(3, seed=8, closeness=0.6)
    expected = Reference(pair.target, PROMPT, config).returned(width_by_target)
    results = DSBDDecoder(pair, config, ByTarget()).generate([PROMPT] * 800, seed())
    assert len({width for result in results for width in result.stats.target_widths}) > 1
    assert chi_square_p(count_sets(results), expected) > PASS


class Coin(WidthPolicy):
    """M of the first layer by a coin of its own; or, if `peeks`, by the layer's noise, which it was shown for w."""

    def __init__(self, peeks: bool) -> None:
        self.peeks, self.first = peeks, 0
        self._random = np.random.default_rng(2)

    def draft_width(self, context: DraftContext) -> int:
        if context.layer == 1 and context.noise is not None:
            self.first = int(context.joint.tokens[np.argmin(context.noise / context.joint.probs)])
        return 3

    def target_width(self, context: TargetContext) -> int:
        if context.draft.root.iteration > 0 or context.committed:
            return 2
        return 1 + (self.first == 2 if self.peeks else int(self._random.integers(2)))


@pytest.mark.parametrize("peeks", [False, True], ids=["own coin", "after seeing the noise"])
def test_a_width_chosen_after_seeing_the_noise_is_caught(peeks: bool) -> None:
    """Given M, the beams follow beam sampling of width M then 2; not if M was chosen by the layer's noise."""
    config = settings(2, 3, 1, 2, exact=True)
    pair = random_pair(3, seed=2, closeness=0.3)
    by_width: dict[int, list[DecodeResult]] = defaultdict(list)
    for result in DSBDDecoder(pair, config, Coin(peeks)).generate([PROMPT] * 800, seed()):
        by_width[result.stats.target_widths[0]].append(result)
    assert set(by_width) == {1, 2}
    least = 1.0
    for width, results in by_width.items():
        widths = [width, 2]
        expected = Reference(pair.target, PROMPT, config).returned(lambda _, __, layer, w=widths: w[layer - 1])
        least = min(least, chi_square_p(count_sets(results), expected))
    assert least < CAUGHT if peeks else least > PASS


class FirstSlots(Recorder):
    """Records the first M of each layer as they were drawn, by what the layer started from."""

    def __init__(self) -> None:
        self.drawn: Counter[tuple[int, ...]] = Counter()
        self._forest: Any = None

    def drafted(self, forest: Any, beams: Any, layers: Any, contexts: Any) -> None:
        self._forest = forest

    def layer(self, event: LayerEvent) -> None:
        first = event.slots[: event.record.target_width]
        if len(self._forest.path(first[0])) == 1:
            self.drawn[tuple(self._forest.tokens[node] for node in first)] += 1


def test_the_first_m_of_a_layer_are_exact_draws_where_more_are_kept() -> None:
    """The defaults, `keep` and `full`, with M = 2 of R = 3: the order of draws included."""
    pair = random_pair(4, seed=1, closeness=-0.5)
    recorders = [FirstSlots() for _ in range(700)]
    config = settings(3, 3, 2, 3)
    DSBDDecoder(pair, config, FixedWidth(2)).generate([PROMPT] * 700, seed(), recorders)
    joint = Reference(pair.target, PROMPT, config).joint([()])
    expected = {(a[0], b[0]): joint[a] * joint[b] / (1 - joint[a]) for a in joint for b in joint if a != b}
    assert chi_square_p(sum((r.drawn for r in recorders), Counter()), expected) > PASS


def test_first_slots_of_a_width_chosen_by_the_noise_are_caught() -> None:
    """`keep` and `full` as above; layers where M = 2 of R = 2 was asked for by a coin, or by who won the race."""
    config, pair = settings(2, 3, 1, 2), random_pair(3, seed=2, closeness=0.3)
    joint = Reference(pair.target, PROMPT, config).joint([()])
    expected = {(a[0], b[0]): joint[a] * joint[b] / (1 - joint[a]) for a in joint for b in joint if a != b}
    for peeks in (False, True):
        recorders = [FirstSlots() for _ in range(400)]
        DSBDDecoder(pair, config, Coin(peeks)).generate([PROMPT] * 400, seed(), recorders)
        drawn = sum((r.drawn for r in recorders), Counter())
        pairs = Counter({first: count for first, count in drawn.items() if len(first) == 2})
        assert pairs.total() > 50
        p = chi_square_p(pairs, expected)
        assert p < CAUGHT if peeks else p > PASS


# What is told.


class Watcher(WidthPolicy):
    """Keeps what it is shown, the drafts' keys included."""

    needs_candidates = True

    def __init__(self) -> None:
        self.drafts: list[DraftContext] = []
        self.targets: list[TargetContext] = []

    def fork(self, seed: int) -> WidthPolicy:
        return self

    def draft_width(self, context: DraftContext) -> int:
        self.drafts.append(context)
        return 5

    def target_width(self, context: TargetContext) -> int:
        self.targets.append(context)
        return 2


def test_contexts_show_noise_for_w_and_never_for_m() -> None:
    watcher = Watcher()
    DSBDDecoder(pair_with("noisy"), settings(2, 5, 3, 12, top_k=12), watcher).generate([[1, 2]], seed())
    assert all(context.draft.noise is None and context.draft.candidates is None for context in watcher.targets)
    assert all(context.candidates is not None for context in watcher.drafts)
    for context in watcher.drafts:
        assert context.noise is not None and not context.noise.flags.writeable
        assert len(context.noise) == len(context.joint)
        assert context.known is not None and len(context.known) == len(context.weights)
    shares = [float(np.mean(context.known)) for context in watcher.drafts]  # type: ignore[arg-type]
    assert shares[0] == 1 and 0 in shares and any(0 < share < 1 for share in shares)


class Needs(Recorder):
    """Records what a layer needed, what was drafted and what was selected."""

    def __init__(self) -> None:
        self.found: list[tuple[LayerEvent, list[int]]] = []
        self._layers: list[list[int]] = []

    def drafted(self, forest: Any, beams: Any, layers: list[list[tuple[int, float]]], contexts: Any) -> None:
        self._layers = [[node for node, _ in layer] for layer in layers]

    def layer(self, event: LayerEvent) -> None:
        self.found.append((event, self._layers.pop(0) if event.record.draft_width else []))


@pytest.mark.parametrize("oversample", [1, 2])
def test_needs_are_places_in_the_order_of_drafts(oversample: int) -> None:
    """need_j <= w where and only where the first j are drafted, and need_M <= w where and only where a layer passes."""
    recorders = [Needs() for _ in range(8)]
    config = settings(4, 6, 3, 16, top_k=12, oversample=oversample)
    DSBDDecoder(pair_with("noisy"), config).generate(some_prompts(), seed(), recorders)
    beyond = 0
    for event, drafts in (found for recorder in recorders for found in recorder.found):
        if not event.record.draft_width:
            assert event.need == []
            continue
        assert len(event.need) == len(event.slots) == 4
        within = [0 <= need <= len(drafts) for need in event.need]
        assert event.record.accepted == (within.index(False) if False in within else 4)
        assert event.record.passed == within[-1]
        worst = 0
        for node, need in zip(event.slots, event.need, strict=True):
            if need == NEVER:
                break
            rank = drafts.index(node) + 1 if node in drafts else 0 if need <= len(drafts) else need
            worst = max(worst, rank)
            assert need == worst
        beyond += event.need[-1] > len(drafts)
    assert beyond > 3, "needs must be known beyond what was drafted"
