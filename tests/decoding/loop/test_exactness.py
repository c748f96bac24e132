"""What the decoder returns is distributed as beam sampling with the target alone: chi-square tests on models small
enough to enumerate, and the same tests on decoders that are wrong on purpose.

All seeds are fixed, so nothing is flaky: a case passed or failed for good when its seed was chosen. There are about
60 p-values in this file, so the smallest is expected near 0.02, and below 1e-3 for one choice of seeds in 17; a wrong
decoder gives less than 1e-6, as the last tests show.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import decoding.loop.prompt_run
import decoding.loop.rejection_run
from decoding import DecodingConfig, DSBDDecoder, FixedWidth, ModelPair, RandomWidth, WidthPolicy, beam_sample
from decoding.dice.rejection import LayerVerdict, align
from decoding.dice.sampling import Dice, FloatArray, IntArray
from decoding.forest.tree import TokenForest
from decoding.policies.base import DraftContext, RootContext, TargetContext
from decoding.results import DecodeResult, LayerEvent, Recorder
from tests.decoding.stubs import Beams, Reference, chi_square_p, chi_square_tail, random_pair, settings

PROMPT = [1, 2]
PASS, CAUGHT = 1e-3, 1e-6


def decode_often(
    pair: ModelPair, config: DecodingConfig, draws: int, policy: WidthPolicy | None = None, recorder: Any = None
) -> list[DecodeResult]:
    """Copies of one prompt in one batch; each has a stream of its own, derived from the generator and its number."""
    decoder = DSBDDecoder(pair, config, policy)
    recorders = recorder if isinstance(recorder, list) or recorder is None else [recorder] * draws
    return decoder.generate([PROMPT] * draws, torch.Generator().manual_seed(0), recorders)


def count_sets(results: list[DecodeResult]) -> Counter[Beams]:
    return Counter(frozenset(map(tuple, result.sequences)) for result in results)


# (vocabulary, closeness of draft and target, config). With M = target_width at every layer all settings are exact.
FIXED_CASES = {
    "one beam, one draft": (4, 0.5, settings(1, 1, 1, 2)),
    "one beam, several drafts": (3, 0.5, settings(1, 3, 2, 3)),
    "drafts as many as beams": (4, 0.5, settings(2, 2, 1, 2)),
    "two layers": (3, 0.5, settings(2, 3, 2, 3)),
    "three layers": (3, 0.8, settings(2, 4, 3, 4)),
    "three beams": (4, 0.5, settings(3, 4, 1, 2)),
    "four beams, two layers": (4, 0.7, settings(4, 6, 2, 2)),
    "more drafts than the support": (3, 0.5, settings(2, 8, 2, 3)),
    "more beams than the support": (3, 0.7, settings(4, 5, 2, 2)),
    "unrelated draft": (3, 0.0, settings(2, 4, 2, 3)),
    "draft equals target": (3, 1.0, settings(2, 3, 2, 3)),
    "two iterations, exact": (3, 0.3, settings(2, 2, 1, 3, exact=True)),
    "top-k of the joint": (5, 0.5, settings(2, 3, 2, 3, top_k=3)),
    "top-k of each beam": (5, 0.5, settings(2, 3, 2, 3, top_k=2, warp="beam")),
    "top-p of the joint": (4, 0.5, settings(2, 3, 2, 3, top_p=0.8)),
    "top-p of each beam": (4, 0.5, settings(2, 3, 2, 3, top_p=0.7, warp="beam")),
    "tiny top-p": (4, 0.5, settings(2, 3, 2, 3, top_p=1e-9, warp="beam")),
    "temperature and both cuts": (5, 0.5, settings(2, 3, 2, 3, temperature=0.7, top_k=4, top_p=0.9)),
    "hot": (3, 0.5, settings(2, 3, 2, 3, temperature=2.5)),
    "end token": (4, 0.5, settings(2, 3, 2, 3, eos_token_id=3)),
    "end tokens, early stop": (4, 0.5, settings(2, 3, 2, 3, eos_token_id=[0, 3], early_stopping=True)),
    "end token, never stop early": (
        4,
        0.5,
        settings(2, 4, 2, 4, eos_token_id=3, early_stopping="never", length_penalty=0.5, top_k=4),
    ),
}


@pytest.mark.parametrize("replacement", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("case", FIXED_CASES)
def test_all_returned_beams_follow_beam_sampling(case: str, replacement: bool) -> None:
    vocabulary, closeness, config = FIXED_CASES[case]
    config = config.with_changes(replacement=replacement)
    pair = random_pair(vocabulary, seed=3, closeness=closeness)
    expected = Reference(pair.target, PROMPT, config).returned()
    assert sum(expected.values()) == pytest.approx(1)
    counts = count_sets(decode_often(pair, config, draws=1000))
    assert chi_square_p(counts, expected) > PASS


@pytest.mark.parametrize("replacement", [False, True], ids=["without", "with"])
def test_beam_sample_follows_beam_sampling(replacement: bool) -> None:
    config = settings(2, 2, 1, 3, replacement=replacement, eos_token_id=2)
    pair = random_pair(3, seed=5)
    results = beam_sample(pair.target, [PROMPT] * 1500, config, torch.Generator().manual_seed(1))
    assert chi_square_p(count_sets(results), Reference(pair.target, PROMPT, config).returned()) > PASS


def test_beam_sample_of_width_one_is_plain_sampling() -> None:
    """Width 1: P(sequence) is the product of the model's own probabilities."""
    pair = random_pair(3, seed=6)
    config = settings(1, 1, 1, 3, temperature=0.8)
    reference = Reference(pair.target, PROMPT, config)
    paths = [(a, b, c) for a in range(3) for b in range(3) for c in range(3)]
    expected = {frozenset({path}): float(np.exp(reference.weight(path))) for path in paths}
    results = beam_sample(pair.target, [PROMPT] * 2000, config, torch.Generator().manual_seed(2))
    assert chi_square_p(count_sets(results), expected) > PASS


class ByTarget(WidthPolicy):
    """M = 1 where the target is sure of itself, else the widest; M and w also from what a Reference can compute."""

    def target_width(self, context: TargetContext) -> int:
        return 1 if context.target.probs.max() > 0.5 else context.draft.root.config.target_width

    def draft_width(self, context: DraftContext) -> int:
        return 1 + int(10 * context.joint.probs.max()) % context.root.config.draft_width


def width_by_target(reference: Reference, beams: Beams, layer: int) -> int:
    return 1 if max(reference.joint(sorted(beams)).values()) > 0.5 else reference.config.target_width


@pytest.mark.parametrize("replacement", [False, True], ids=["without", "with"])
@pytest.mark.parametrize("eos", [-1, 2])
def test_dynamic_widths_with_exact_follow_beam_sampling_of_those_widths(replacement: bool, eos: int) -> None:
    config = settings(3, 4, 2, 3, exact=True, replacement=replacement, eos_token_id=eos)
    pair = random_pair(3, seed=8, closeness=0.6)
    expected = Reference(pair.target, PROMPT, config).returned(width_by_target)
    results = decode_often(pair, config, 2000, ByTarget())
    widths = {width for result in results for width in result.stats.target_widths}
    assert widths == {1, 3}, "the case must have both widths"
    assert chi_square_p(count_sets(results), expected) > PASS


class Nosy(WidthPolicy):
    """Looks at all it may: P, Q, weights, history, records, and numbers of its own."""

    def __init__(self) -> None:
        self._random = np.random.default_rng(0)

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        return layer == 1 or widths[-1] + len(context.history) > 2

    def draft_width(self, context: DraftContext) -> int:
        return 1 + int(100 * context.joint.probs.max() + 100 * abs(context.weights[0])) % 5

    def target_width(self, context: TargetContext) -> int:
        both = align(context.target, context.draft.joint)
        seen = 100 * np.minimum(both.p, both.q).sum() + len(context.committed) + context.draft.root.remaining
        return 1 + (int(seen) + int(self._random.integers(2))) % 3


class SlotRecorder(Recorder):
    """Turns the first M slots of every verified layer into numbers that are uniform if the slots are exact.

    Slot k is drawn from T_k: P without the slots before it, or P itself with replacement. So
    u = T_k(outcomes before the slot's in some order) + T_k(slot) · v, v uniform, is uniform given everything that
    was fixed before the layer's drafts and given M (Rosenblatt's transform). The order is by Q - P, where a verifier
    that favours drafts shows most.
    """

    def __init__(self, replacement: bool) -> None:
        self._replacement = replacement
        self._random = np.random.default_rng(1)
        self.uniforms: dict[int, list[float]] = defaultdict(list)  # M -> numbers

    def layer(self, event: LayerEvent) -> None:
        if event.verdict is None:
            return
        both = align(event.context.target, event.context.draft.joint)
        order = np.argsort(both.q - both.p, kind="stable")
        slot = both.p.copy()
        for x in event.verdict.slots[: event.record.target_width]:
            before = slot[order[: int(np.flatnonzero(order == x)[0])]].sum()
            chance = (before + slot[x] * self._random.random()) / slot.sum()
            self.uniforms[event.record.target_width].append(float(chance))
            if not self._replacement:
                slot[x] = 0.0

    def p_value(self, bins: int = 10) -> float:
        """Chi-square of the uniforms, the groups of equal M apart."""
        statistic = 0.0
        for values in self.uniforms.values():
            counts = np.histogram(values, bins, range=(0, 1))[0]
            statistic += float(((counts - len(values) / bins) ** 2).sum() / (len(values) / bins))
        return chi_square_tail(statistic, (bins - 1) * len(self.uniforms))


@pytest.mark.parametrize("surplus", ["keep", "drop"])
@pytest.mark.parametrize("refill", ["full", "width"])
@pytest.mark.parametrize("replacement", [False, True], ids=["without", "with"])
def test_first_slots_are_exact_draws_whatever_the_policy_looks_at(surplus: str, refill: str, replacement: bool) -> None:
    config = settings(3, 5, 3, 6, surplus=surplus, refill=refill, replacement=replacement)
    recorder = SlotRecorder(replacement)
    decode_often(random_pair(4, seed=11, closeness=0.6), config, 300, Nosy(), recorder)
    assert set(recorder.uniforms) == {1, 2, 3}
    assert min(map(len, recorder.uniforms.values())) > 100
    assert recorder.p_value() > PASS


class WeightRecorder(Recorder):
    """Compares P and the weights of all kept beams with the reference, node by node; one for each prompt."""

    def __init__(self, reference: Reference, forests: list[TokenForest], prompt: int) -> None:
        self.reference, self.forests, self.prompt = reference, forests, prompt
        self.kept = 0

    def layer(self, event: LayerEvent) -> None:
        forest, target = self.forests[self.prompt], event.context.target
        path_of = {node: tuple(forest.path(int(node))) for node in np.unique(target.parents)}
        if not self.reference.config.one_beam_cache:
            expected = self.reference.joint(list(path_of.values()))
            seen = {
                (*path_of[parent], int(token)): prob
                for parent, token, prob in zip(target.parents, target.tokens, target.probs, strict=True)
            }
            assert seen == pytest.approx(expected, abs=1e-5)
        for node, weight in event.kept:
            assert weight == pytest.approx(self.reference.weight(tuple(forest.path(node))), abs=1e-5)
            self.kept += 1
        weights = [weight for _, weight in event.kept]
        assert weights == sorted(weights, reverse=True)
        assert len({node for node, _ in event.kept}) == len(event.kept) <= self.reference.config.target_width

    def end(self, best_path: list[int]) -> None:
        forest = self.forests[self.prompt]
        assert [forest.parents[node] for node in best_path] == [0, *best_path[:-1]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"replacement": True},
        {"surplus": "drop", "refill": "full"},
        {"one_beam_cache": True},
        {"top_k": 3, "temperature": 0.6},
        {"top_p": 0.8, "warp": "beam", "eos_token_id": 3},
    ],
    ids=str,
)
def test_every_beam_carries_its_true_weight(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kept beam, surplus or refill, has weight Σ log p of its tokens under the temperature-scaled target."""
    forests: list[TokenForest] = []

    class SpiedForest(TokenForest):
        def __init__(self) -> None:
            super().__init__()
            forests.append(self)

    monkeypatch.setattr(decoding.loop.prompt_run, "TokenForest", SpiedForest)
    config = settings(3, 5, 3, 7, **changes)
    pair = random_pair(4, seed=12, closeness=0.7)
    reference = Reference(pair.target, PROMPT, config)
    recorders = [WeightRecorder(reference, forests, prompt) for prompt in range(40)]
    results = decode_often(pair, config, 40, Nosy(), recorders)
    assert len(forests) == 40
    assert sum(recorder.kept for recorder in recorders) > 200
    for result in results:
        for sequence, score in zip(result.sequences, result.scores, strict=True):
            assert score == pytest.approx(reference.score(tuple(sequence)), abs=1e-5)


# Wrong on purpose: the tests above must be able to fail.


def unlike_pair() -> ModelPair:
    """A draft that leans against its target: most drafts are rejected, so that a wrong residual shows."""
    return random_pair(4, seed=1, closeness=-0.5)


def second_verifier(twice: bool = False, forgetful: bool = False) -> Callable[..., LayerVerdict]:
    """The rule of design 5.2 and 5.3 written a second time, with faults to switch on.

    Args:
        twice: subtract Q twice from the residual, as the published code does.
        forgetful: judge draws without replacement as if each came from Q itself.
    """

    def verify(
        p: FloatArray,
        q: FloatArray,
        drafts: IntArray,
        target_width: int,
        limit: int,
        refill: int,
        replacement: bool,
        dice: Dice,
        shadow: Dice | None = None,
    ) -> LayerVerdict:
        slots: list[int] = []
        slot, residual, draft = p.copy(), p.copy(), q.copy()

        def close(x: int) -> None:
            nonlocal slot, residual
            slots.append(x)
            if not replacement:
                slot[x] = 0.0
                slot /= max(slot.sum(), 1e-300)
            residual = slot.copy()

        for x in map(int, drafts):
            if len(slots) == limit or not slot.any():
                break
            if dice.uniform(1)[0] * draft[x] < residual[x]:
                close(x)
            else:
                rest = np.maximum(residual - (2 if twice else 1) * draft, 0.0)
                residual = rest / rest.sum() if rest.any() else slot.copy()
            if not replacement and not forgetful:
                draft[x] = 0.0
                draft /= max(draft.sum(), 1e-300)
        accepted, passed = len(slots), len(slots) >= target_width or not slot.any()
        while not passed and len(slots) < refill and slot.any():
            close(int(np.searchsorted(np.cumsum(residual), dice.uniform(1)[0] * residual.sum(), side="right")))
        return LayerVerdict(slots, accepted, passed)

    return verify


@pytest.mark.parametrize(
    ("fault", "replacement", "exact"),
    [
        ({}, False, True),
        ({}, True, True),
        ({"twice": True}, False, False),
        ({"twice": True}, True, False),
        ({"forgetful": True}, False, False),
    ],
    ids=["sound", "sound, with", "Q twice", "Q twice, with", "with-replacement rule on draws without"],
)
def test_wrong_verifiers_are_caught(
    fault: dict[str, bool], replacement: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding.loop.rejection_run, "verify_layer", second_verifier(**fault))
    config = settings(2, 3, 1, 2, replacement=replacement)
    pair = unlike_pair()
    expected = Reference(pair.target, PROMPT, config).returned()
    # Caught from as few draws as the tests above take; sound ones get more, so that small faults would show.
    p = chi_square_p(count_sets(decode_often(pair, config, 2000 if exact else 1000)), expected)
    assert p > PASS if exact else p < CAUGHT


class Coin(WidthPolicy):
    """M of the first layer by a coin of its own; or, if `peeks`, by the first draft of the layer."""

    def __init__(self, peeks: bool) -> None:
        self.peeks = peeks
        self.first_draft = 0
        self._random = np.random.default_rng(2)

    def target_width(self, context: TargetContext) -> int:
        if context.draft.root.iteration > 0 or context.committed:
            return 2
        return 1 + (self.first_draft == 2 if self.peeks else int(self._random.integers(2)))


def leak_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show each layer's first draft to the prompt's policy before it is asked for M."""
    run = decoding.loop.rejection_run.RejectionRun
    honest = run._commit_drafted

    def leaky(self: Any, context: TargetContext, target: Any, layer: Any) -> Any:
        self.policy.first_draft = self.forest.tokens[layer.nodes[0]]
        return honest(self, context, target, layer)

    monkeypatch.setattr(run, "_commit_drafted", leaky)


@pytest.mark.parametrize("peeks", [False, True], ids=["own coin", "after seeing the drafts"])
def test_a_width_chosen_after_seeing_the_drafts_is_caught(peeks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given M, the beams follow beam sampling of width M then 2; not if M was chosen after the drafts were seen."""
    leak_drafts(monkeypatch)
    config = settings(2, 3, 1, 2, exact=True)
    pair = random_pair(3, seed=2, closeness=0.3)
    by_width: dict[int, list[DecodeResult]] = defaultdict(list)
    for result in decode_often(pair, config, 2000, Coin(peeks)):
        by_width[result.stats.target_widths[0]].append(result)
    assert set(by_width) == {1, 2}
    least = 1.0
    for width, results in by_width.items():
        widths = [width, 2]
        expected = Reference(pair.target, PROMPT, config).returned(lambda _, __, layer, w=widths: w[layer - 1])
        least = min(least, chi_square_p(count_sets(results), expected))
    assert least < CAUGHT if peeks else least > PASS


def test_the_slot_test_catches_a_peeking_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    leak_drafts(monkeypatch)
    recorder = SlotRecorder(replacement=False)
    decode_often(random_pair(3, seed=2, closeness=0.3), settings(2, 3, 1, 2), 500, Coin(peeks=True), recorder)
    assert recorder.p_value() < CAUGHT


@pytest.mark.parametrize("fault", [{"twice": True}, {"forgetful": True}], ids=str)
def test_the_slot_test_catches_wrong_verifiers(fault: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.loop.rejection_run, "verify_layer", second_verifier(**fault))
    recorder = SlotRecorder(replacement=False)
    decode_often(unlike_pair(), settings(2, 3, 1, 2), 1000, recorder=recorder)
    assert recorder.p_value() < CAUGHT


# What a policy is told (design 5.4).


def as_plain(value: Any) -> Any:
    """Dataclasses and arrays as nested tuples that compare by value."""
    if hasattr(value, "__dataclass_fields__") and not isinstance(value, DecodingConfig):
        return tuple((name, as_plain(getattr(value, name))) for name in value.__dataclass_fields__)
    if isinstance(value, np.ndarray):
        return tuple(value.tolist())
    return tuple(map(as_plain, value)) if isinstance(value, list | tuple) else value


class Spy(WidthPolicy):
    """Keeps all contexts of the first iteration; its depth and later draft widths vary from run to run."""

    needs_hidden = True

    def __init__(self) -> None:
        self._random = np.random.default_rng(3)
        self.contexts: dict[int, list[Any]] = defaultdict(list)

    def draft_further(self, context: RootContext, layer: int, widths: tuple[int, ...]) -> bool:
        return layer == 1 or bool(self._random.random() < 0.8)

    def draft_width(self, context: DraftContext) -> int:
        return 3 if context.layer == 1 else int(self._random.integers(1, 5))

    def target_width(self, context: TargetContext) -> int:
        if context.draft.root.iteration == 0 and context.draft_width:
            self.contexts[context.draft.layer].append(as_plain(context))
        return 2


def test_contexts_hold_nothing_of_the_layers_drafts_or_of_what_lies_deeper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that differ only in a layer's drafts, its coins, deeper layers or depth show a policy the same context.

    At layer 1 nothing came before, so all contexts are one. At layer 2 the context is a function of the drafts and the
    slots of layer 1 and of its own draft width: it takes one value for each of their values.
    """
    seen: list[tuple[Any, ...]] = []  # all that layer 2's context may depend on
    drafts: list[tuple[int, ...]] = []  # of layer 2, on which it must not depend
    first: list[tuple[int, ...]] = []  # of layer 1
    run = decoding.loop.rejection_run.RejectionRun
    honest = run._commit_drafted

    def listening(self: Any, context: TargetContext, target: Any, layer: Any) -> Any:
        tokens = tuple(self.forest.tokens[node] for node in layer.nodes)
        if context.draft.root.iteration == 0 and context.draft.layer == 1:
            first.append(tokens)
        if context.draft.root.iteration == 0 and context.draft.layer == 2:
            seen.append((first[-1], tuple(beam.node for beam in self.beams), context.committed, context.draft_width))
            drafts.append((*(self.forest.parents[node] for node in layer.nodes), *tokens))
        return honest(self, context, target, layer)

    monkeypatch.setattr(run, "_commit_drafted", listening)
    spy = Spy()
    decode_often(random_pair(4, seed=13, closeness=0.8), settings(2, 4, 3, 5), 400, spy)
    assert len(set(first)) > 10, "the drafts of layer 1 must vary"
    assert len(set(spy.contexts[1])) == 1
    groups: dict[Any, set[Any]] = defaultdict(set)
    varied: dict[Any, set[Any]] = defaultdict(set)
    for key, context, drawn in zip(seen, spy.contexts[2], drafts, strict=True):
        groups[key].add(context)
        varied[key].add(drawn)
    assert max(map(len, groups.values())) == 1
    assert max(map(len, varied.values())) > 3, "equal contexts must have met different drafts"


def test_a_recorder_changes_nothing() -> None:
    """With shadow coins and hidden states on, the same seed gives the same sequences."""

    class Listening(SlotRecorder):
        shadow = Dice(torch.Generator().manual_seed(9))  # type: ignore[assignment]
        needs_hidden = True

    pair, config = random_pair(4, seed=14), settings(2, 4, 3, 6)
    plain = decode_often(pair, config, 50)
    listened = decode_often(pair, config, 50, recorder=Listening(False))
    assert [(r.sequences, r.scores) for r in plain] == [(r.sequences, r.scores) for r in listened]


def test_seeds_reproduce_and_streams_of_their_own_isolate_prompts() -> None:
    pair, config = random_pair(4, seed=15), settings(2, 4, 3, 6)
    decoder = DSBDDecoder(pair, config, RandomWidth(full_share=1.0))

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]

    together = decoder.generate([[1], [2, 3], [1, 2]], generators())
    alone = DSBDDecoder(pair, config, FixedWidth(draft_depth=3)).generate([[1, 2]], generators()[2:])
    again = DSBDDecoder(pair, config, RandomWidth(full_share=1.0)).generate([[1], [2, 3], [1, 2]], generators())
    assert [r.sequences for r in together] == [r.sequences for r in again]
    assert [len(r.sequences[0]) for r in together] == [6, 6, 6]
    assert alone[0].stats.new_tokens == 6
