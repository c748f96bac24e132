"""Many prompts at a time: each gets what it would get alone, whatever its neighbours, the batch's size or its order.

Scores are compared to 1e-4: float32 sums are made in other orders when matrices have other shapes, which leaves errors
of some 1e-6 a token on these models, and sequences have at most 12 tokens.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import decoding.dice.sampling
import decoding.forest.cache
import decoding.forest.scorer
import decoding.loop.batch
import decoding.pairs.drafts.model
import decoding.pairs.pair
from decoding import (
    DecodeResult,
    DecodingConfig,
    DSBDDecoder,
    ExploringWidth,
    FixedWidth,
    ModelPair,
    RandomWidth,
    ThresholdWidth,
    UserError,
    WidthPolicy,
    beam_sample,
)
from decoding.decoder import OutOfDeviceMemory
from decoding.engine.forward import PassInputs, TransformersStore
from decoding.engine.fused import FusedStore
from decoding.engine.runner import SPARE_STORES, Runner, runner_of
from decoding.forest.cache import ForestCache
from decoding.forest.scorer import ForestScorer
from decoding.loop.batch import shared_prefix
from decoding.policies.base import TargetContext
from decoding.results import Recorder
from decoding.traces.recorder import TraceRecorder
from tests.decoding.stubs import Beams, Reference, SimpleFeatures, chi_square_p, llama_pair, seeded

PROMPTS = [[1, 2, 0, 3, 2], [5], [2, 4, 1, 1, 0, 5, 3, 3, 6, 2, 2], [4, 4], [1, 2, 0, 3, 2, 6], [3, 0, 1]]
CONFIG = DecodingConfig(
    target_width=3, draft_width=5, draft_depth=3, max_new_tokens=12, eos_token_id=6, num_return_sequences=3
)
ENGINES = pytest.mark.parametrize("engine", ["auto", "transformers"])
PASS, CAUGHT = 1e-3, 1e-6
FEW = 200  # copies of each prompt that show what is wrong on purpose; fewer than where it must be right


def assert_same(found: list[DecodeResult], expected: list[DecodeResult]) -> None:
    """Equal tokens, widths and passes; close scores."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.sequences == other.sequences
        assert one.finished == other.finished
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        for name in (
            *("prompt_tokens", "new_tokens", "iterations", "target_calls", "draft_calls"),
            *("target_widths", "draft_widths", "accepted", "kv_slots_peak", "kv_slots_end"),
        ):
            assert getattr(one.stats, name) == getattr(other.stats, name), name


# A prompt's result is its own.


POLICIES: dict[str, Callable[[], WidthPolicy]] = {
    "fixed": FixedWidth,
    "narrow": lambda: FixedWidth(target_width=2),
    "threshold": lambda: ThresholdWidth(0.6),
    "random": lambda: RandomWidth(seed=3),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "exact": {"exact": True, "early_stopping": True},
    "top-k": {"top_k": 4, "temperature": 0.7},
    "per beam": {"warp": "beam", "top_k": 3, "top_p": 0.9},
    "rejection": {"verification": "rejection"},
    "with replacement": {"verification": "rejection", "replacement": True, "top_p": 0.95},
    "one beam": {"one_beam_cache": True, "early_stopping": "never", "length_penalty": 0.5},
    "target alone": {"draft_depth": 0},
}


CASES = [*((policy, settings) for policy in POLICIES for settings in ("defaults", "exact", "rejection"))]
CASES += [("random", settings) for settings in SETTINGS if ("random", settings) not in CASES]


@ENGINES
@pytest.mark.parametrize(("policy", "settings"), CASES)
def test_a_prompt_gets_what_it_gets_alone(engine: str, policy: str, settings: str) -> None:
    pair, config = llama_pair(engine=engine), CONFIG.with_changes(**SETTINGS[settings])
    decoder = DSBDDecoder(pair, config, POLICIES[policy]())
    together = decoder.generate(PROMPTS, seeded())
    assert len({result.stats.new_tokens for result in together}) > 1, "prompts must end at different times"
    assert_same(together, [decoder.generate([prompt], seeded())[0] for prompt in PROMPTS])
    assert_same(together, decoder.generate(PROMPTS, seeded(), batch_size=2))
    assert_same(together, decoder.generate(PROMPTS[::-1], seeded(), batch_size=4)[::-1])


@ENGINES
@pytest.mark.parametrize("settings", ["defaults", "exact", "rejection", "with replacement", "target alone"])
def test_a_prompt_gets_what_it_gets_alone_with_a_large_vocabulary(
    engine: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is large is made small: uncut joint distributions stay on the device."""
    monkeypatch.setattr(decoding.dice.sampling, "HOST_VOCABULARY", 4)
    decoder = DSBDDecoder(llama_pair(engine=engine), CONFIG.with_changes(**SETTINGS[settings]), RandomWidth())
    together = decoder.generate(PROMPTS, seeded())
    assert_same(together, [decoder.generate([prompt], seeded())[0] for prompt in PROMPTS])
    assert_same(together, decoder.generate(PROMPTS[::-1], seeded(), batch_size=2)[::-1])


def test_engines_agree() -> None:
    """The fused pass, the model's own and graphs (eager, without a GPU) draw the same tokens."""
    runs = [
        DSBDDecoder(llama_pair(engine=engine), CONFIG, RandomWidth()).generate(PROMPTS, seeded())
        for engine in ("auto", "eager", "transformers")
    ]
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(UserError, match="engine is 'fast'; choose one of auto, eager, transformers"):
        DSBDDecoder(llama_pair(engine="fast"), CONFIG)


def test_beam_sample_takes_a_batch_and_an_engine() -> None:
    target = llama_pair().target
    together = beam_sample(target, PROMPTS, CONFIG, seeded())
    assert_same(together, [beam_sample(target, [prompt], CONFIG, seeded())[0] for prompt in PROMPTS])
    assert_same(together, beam_sample(target, PROMPTS, CONFIG, seeded(), batch_size=3, engine="transformers"))


def test_copies_of_a_prompt_have_streams_of_their_own() -> None:
    decoder = DSBDDecoder(llama_pair(), CONFIG, RandomWidth())
    prompt, other = PROMPTS[0], PROMPTS[3]
    copies = decoder.generate([prompt] * 6, seeded())
    assert len({str(result.sequences) for result in copies}) == 6
    assert len({tuple(result.stats.draft_widths) for result in copies}) > 3, "the policy's stream differs too"
    assert_same(decoder.generate([prompt] * 6, seeded(), batch_size=4), copies)
    assert_same(decoder.generate([prompt] * 2, seeded()), copies[:2])  # a copy is known by its number
    mixed = decoder.generate([other, prompt, other, prompt], seeded())
    assert_same([mixed[1], mixed[3]], copies[:2])


def test_a_generator_goes_on_from_call_to_call() -> None:
    decoder, generator = DSBDDecoder(llama_pair(), CONFIG), seeded()
    first, second = (decoder.generate(PROMPTS, generator) for _ in range(2))
    assert [r.sequences for r in first] != [r.sequences for r in second]
    again = seeded()
    assert_same([*decoder.generate(PROMPTS, again), *decoder.generate(PROMPTS, again)], [*first, *second])
    unseeded = [decoder.generate(PROMPTS) for _ in range(2)]
    assert [r.sequences for r in unseeded[0]] != [r.sequences for r in unseeded[1]]


def test_one_generator_for_each_prompt() -> None:
    decoder = DSBDDecoder(llama_pair(), CONFIG, RandomWidth())
    together = decoder.generate(PROMPTS, [seeded(seed) for seed in range(len(PROMPTS))], batch_size=4)
    alone = [decoder.generate([prompt], [seeded(seed)])[0] for seed, prompt in enumerate(PROMPTS)]
    assert_same(together, alone)
    moved = decoder.generate(PROMPTS[:1], [seeded(1)])
    assert moved[0].sequences != together[0].sequences


@ENGINES
def test_recorders_write_the_same_rows_as_one_prompt_at_a_time(engine: str) -> None:
    config = CONFIG.with_changes(verification="shared_noise")
    decoder = DSBDDecoder(llama_pair(engine=engine), config, ExploringWidth(seed=1))

    def recorders() -> list[TraceRecorder]:
        made = [TraceRecorder(SimpleFeatures()) for _ in PROMPTS]
        for i, recorder in enumerate(made):
            recorder.start(f"p{i}", "train")
        return made

    together, alone = recorders(), recorders()
    decoder.generate(PROMPTS, seeded(), together, batch_size=4)
    for prompt, recorder in zip(PROMPTS, alone, strict=True):
        decoder.generate([prompt], seeded(), recorder)
    for first, second in zip(together, alone, strict=True):
        rows, expected = first.take_rows(), second.take_rows()
        assert len(rows) == len(expected) > 0
        assert any(np.any(row["places"]) for row in rows)
        for row, other in zip(rows, expected, strict=True):
            for column in row:
                if isinstance(row[column], str):
                    assert row[column] == other[column]
                else:
                    np.testing.assert_allclose(row[column], other[column], atol=1e-4)


def test_recorders_must_match_prompts() -> None:
    recorder = TraceRecorder(SimpleFeatures())
    with pytest.raises(UserError, match="1 recorders for 2 prompts; give one for each prompt"):
        DSBDDecoder(llama_pair(), CONFIG).generate(PROMPTS[:2], seeded(), recorder)


# Exactness through the real cache, and what it catches.

EXACT = DecodingConfig(
    target_width=2, draft_width=3, draft_depth=2, max_new_tokens=3, num_return_sequences=2, eos_token_id=3
)
LONG, SHORT = [1, 2, 0, 3, 2, 2, 1], [2, 0]


def batch_p_values(engine: str, copies: int = 500, batch_size: int | None = None) -> list[float]:
    """Chi-square of the returned sets of two prompts of different lengths, copies of both side by side in a batch."""
    pair = llama_pair(vocabulary=4, engine=engine)
    results = DSBDDecoder(pair, EXACT).generate([LONG, SHORT] * copies, seeded(), batch_size=batch_size)
    p_values = []
    for prompt, own in ((LONG, results[::2]), (SHORT, results[1::2])):
        counts: Counter[Beams] = Counter(frozenset(map(tuple, result.sequences)) for result in own)
        p_values.append(chi_square_p(counts, Reference(pair.target, prompt, EXACT).returned()))
    return p_values


@pytest.mark.parametrize(("engine", "batch_size"), [("auto", None), ("auto", 50), ("transformers", 200)])
def test_beams_of_a_batch_follow_beam_sampling(engine: str, batch_size: int | None) -> None:
    assert min(batch_p_values(engine, batch_size=batch_size)) > PASS  # fixed seed


def test_beams_of_a_batch_with_a_large_vocabulary_follow_beam_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding.dice.sampling, "HOST_VOCABULARY", 3)
    assert min(batch_p_values("auto", copies=300)) > PASS  # fixed seed


def test_rows_that_swap_masks_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row reads with the mask of its neighbour. The check of a pair sees it, too."""
    honest = ForestCache.masks

    def rolled(self: ForestCache, *args: Any) -> torch.Tensor:
        return honest(self, *args).roll(1, 0)

    monkeypatch.setattr(ForestCache, "masks", rolled)
    with pytest.raises(UserError, match="scores a forest of beams differently"):
        batch_p_values("auto", FEW)
    monkeypatch.setattr(ModelPair, "check_forest_passes", lambda self: None)
    assert min(batch_p_values("auto", FEW)) < CAUGHT


def test_fillers_that_write_over_a_prompt_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForestCache, "filler_slot", lambda self, row: row * self.capacity)
    assert min(batch_p_values("transformers", FEW)) < CAUGHT


def test_a_neighbours_slots_in_sight_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beam that sees the slot next to its own: a sibling's, or what a beam that died has left."""
    honest = ForestCache.masks

    def leaky(self: ForestCache, *args: Any) -> torch.Tensor:
        mask = honest(self, *args).clone()
        if self.rows > 1:
            last = mask.shape[-1] - (mask == 0).int().flip(-1).argmax(-1, keepdim=True) - 1  # [rows, 1, N, 1]
            mask.scatter_(-1, (last - 1).clamp_min(0), 0.0)
        return mask

    monkeypatch.setattr(ForestCache, "masks", leaky)
    monkeypatch.setattr(ModelPair, "check_forest_passes", lambda self: None)
    assert min(batch_p_values("auto", FEW)) < CAUGHT


# Prompts: chunks and shared prefixes.


@ENGINES
@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_prompts_in_chunks_give_equal_results(engine: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [*PROMPTS, [int(token) for token in np.random.default_rng(0).integers(0, 6, 90)]]
    decoder = DSBDDecoder(llama_pair(engine=engine), CONFIG)
    whole = decoder.generate(prompts, seeded())
    monkeypatch.setattr(decoding.forest.scorer, "PREFILL_CHUNK", chunk)
    assert_same(decoder.generate(prompts, seeded()), whole)


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2, 3]], 2),  # the last is scored to go on from it
        ([[1, 2, 3], [1, 2]], 1),
        ([[1, 2], [2, 1]], 0),
        ([[1], [1]], 0),
        ([[5, 5, 1, 7], [5, 5, 2], [5, 5, 1, 9, 9]], 2),
    ],
    ids=str,
)
def test_shared_prefix(prompts: list[list[int]], count: int) -> None:
    assert shared_prefix(prompts) == count


class Counting:
    """A forward that counts tokens and passes."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.tokens = self.passes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.forward, name)

    def __call__(self, inputs: PassInputs, store: Any) -> Any:
        self.tokens += inputs.tokens.numel()
        self.passes += 1
        return self.forward(inputs, store)


def count_prompts(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> list[Counting]:
    """Counts what the prompts' own passes of both models take."""
    pair.check_forest_passes()
    counting = []
    for model in (pair.target, pair.draft):
        runner = runner_of(model, pair.engine)
        counting.append(Counting(runner.prompts))
        monkeypatch.setattr(runner, "prompts", counting[-1])
    return counting


HEAD = [1, 2, 0, 3, 2, 5, 4, 4, 1, 0]
SHARING = {
    "a common head": ([[*HEAD, 1], [*HEAD, 2, 2], [*HEAD, 3, 1, 2], [*HEAD, 4, 1, 2, 3]], 10 + 1 + 2 + 3 + 4),
    "all equal": ([HEAD] * 4, 10 + 3),
    "one is the head": ([HEAD, [*HEAD, 1], [*HEAD, 2, 2]], 10 + 2 + 3),
    "nothing shared": ([[1, 2, 3], [2, 2, 3]], 6),
    "one token": ([[1], [1], [2]], 3),
}


@ENGINES
@pytest.mark.parametrize("case", SHARING)
@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("chunk", [512, 3])
def test_a_shared_prefix_is_scored_once(
    engine: str, case: str, batch_size: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, tokens = SHARING[case]
    monkeypatch.setattr(decoding.forest.scorer, "PREFILL_CHUNK", chunk)
    pair = llama_pair(engine=engine)
    decoder = DSBDDecoder(pair, CONFIG.with_changes(max_new_tokens=4))
    with monkeypatch.context() as patch:
        patch.setattr(decoding.loop.batch, "shared_prefix", lambda prompts: 0)
        apart = decoder.generate(prompts, seeded(), batch_size=batch_size)
    counting = count_prompts(pair, monkeypatch)
    assert_same(decoder.generate(prompts, seeded(), batch_size=batch_size), apart)
    assert [counter.tokens for counter in counting] == [tokens, tokens]


# Slots and buffers.


@ENGINES
def test_slots_that_run_out_grow(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DSBDDecoder(llama_pair(engine=engine), CONFIG.with_changes(max_new_tokens=40, eos_token_id=-1))
    expected = decoder.generate(PROMPTS, seeded())
    capacities = []

    class Tight(ForestScorer):
        def __init__(self, model: Any, rows: int, longest_prompt: int, spare_slots: int, **options: Any) -> None:
            super().__init__(model, rows, longest_prompt, 0, **options)
            capacities.append([self.cache.capacity])
            self.seen = capacities[-1]

        def close(self) -> None:
            self.seen.append(self.cache.capacity)
            super().close()

    for module in (decoding.pairs.pair, decoding.pairs.drafts.model):  # of the target, of the draft
        monkeypatch.setattr(module, "ForestScorer", Tight)
    monkeypatch.setattr(decoding.forest.cache, "SLOT_STEP", 4)
    for model in (decoder.pair.target, decoder.pair.draft):
        runner_of(model, engine)._spare.clear()  # of a capacity that would do
    found = decoder.generate(PROMPTS, seeded())
    assert len(capacities) == 2
    assert all(first <= 12 and last >= 48 for first, last in capacities)
    for one, other in zip(found, expected, strict=True):
        assert one.sequences == other.sequences
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def live_bytes() -> list[int]:
    """Bytes of each KV buffer that is alive in this process."""
    gc.collect()
    return [thing.bytes for thing in gc.get_objects() if type(thing) in (FusedStore, TransformersStore)]


@ENGINES
def test_memory_stays_flat(engine: str) -> None:
    """Fifty calls of changing shapes leave a few buffers per model behind, of different batch sizes."""
    others = live_bytes()  # of other tests
    pair, random = llama_pair(engine=engine), np.random.default_rng(0)
    decoder = DSBDDecoder(pair, CONFIG.with_changes(max_new_tokens=4))
    most = 0
    for call in range(50):
        lengths = [50] * 4 if call == 25 else random.integers(1, 50, random.integers(1, 5)).tolist()
        decoder.generate([random.integers(0, 7, length).tolist() for length in lengths], seeded(call))
        if call % 10 != 5:
            continue  # looking at all objects takes its time
        live = live_bytes()
        most = max(most, sum(live) - sum(others))
        rows = [[store.rows for store in stores] for stores in spare_stores(pair)]
        assert all(len(set(own)) == len(own) <= SPARE_STORES for own in rows)
        assert len(live) - len(others) == sum(map(len, rows)), "no buffer is held elsewhere"
    # 2 layers x keys and values x 2 heads x 4 channels x 4 bytes = 256 bytes a slot; 128 slots hold the longest row.
    assert 0 < most <= 2 * (4 + 3 + 2 + 1) * 128 * 256


@ENGINES
def test_models_that_are_let_go_are_freed(engine: str) -> None:
    """With all that decoding keeps for them: weights laid out anew, buffers, graphs."""
    pair = llama_pair(engine=engine)
    DSBDDecoder(pair, CONFIG).generate(PROMPTS[:2], seeded())
    kept = [weakref.ref(thing) for model in (pair.target, pair.draft) for thing in (model, runner_of(model, engine))]
    del pair
    gc.collect()
    assert [reference() for reference in kept] == [None] * 4


def spare_stores(pair: ModelPair) -> list[list[Any]]:
    return [list(runner_of(model, pair.engine)._spare) for model in (pair.target, pair.draft)]


def test_a_buffer_is_used_again() -> None:
    pair = llama_pair()
    decoder = DSBDDecoder(pair, CONFIG)
    decoder.generate(PROMPTS, seeded())
    stores = spare_stores(pair)
    for prompts in (PROMPTS[::-1], PROMPTS[:1] * 6):
        decoder.generate(prompts, seeded())
        assert spare_stores(pair) == stores
    assert [own[-1].rows for own in stores] == [6, 6]


class Failing(WidthPolicy):
    """Breaks down in the third iteration."""

    needs_hidden = True

    def target_width(self, context: TargetContext) -> int:
        if context.draft.root.iteration == 2:
            raise RuntimeError("broken policy")
        return 2


@ENGINES
def test_an_exception_gives_the_buffers_back(engine: str) -> None:
    pair = llama_pair(engine=engine)
    expected = DSBDDecoder(pair, CONFIG).generate(PROMPTS, seeded())
    stores = spare_stores(pair)
    with pytest.raises(RuntimeError, match="broken policy"):
        DSBDDecoder(pair, CONFIG, Failing()).generate(PROMPTS, seeded())
    assert spare_stores(pair) == stores
    assert_same(DSBDDecoder(pair, CONFIG).generate(PROMPTS, seeded()), expected)


@ENGINES
def test_a_prompt_with_nan_leaves_none_behind(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token's embedding is not a number; prompts without it decode as ever, in a buffer that is used again."""
    pair = llama_pair(vocabulary=9, engine=engine)
    config = CONFIG.with_changes(eos_token_id=8)  # the bad token is fed in a prompt alone
    good, bad = [1, 2, 0], [1, 8, 8, 2, 0, 3]
    for model in (pair.target, pair.draft):
        with torch.no_grad():
            model.model.embed_tokens.weight[8] = torch.nan
    monkeypatch.setattr(ModelPair, "check_forest_passes", lambda self: None)  # which looks at that token, too
    decoder = DSBDDecoder(pair, config)
    expected = decoder.generate([good, good], seeded())
    with pytest.raises(UserError, match="returned NaN"):
        decoder.generate([good, bad], seeded())
    assert_same(decoder.generate([good, good], seeded()), expected)


# Out of memory, and what is no batch.


class Exhausted(Counting):
    """A device that has no memory left after some passes."""

    def __init__(self, forward: Any, passes: int) -> None:
        super().__init__(forward)
        self.limit = passes

    def __call__(self, inputs: PassInputs, store: Any) -> Any:
        if self.passes == self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().__call__(inputs, store)


@pytest.mark.parametrize("batch_size", [2, 1])
def test_out_of_memory_names_the_batch_size_and_keeps_what_is_done(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = llama_pair()
    decoder = DSBDDecoder(pair, CONFIG)
    expected = decoder.generate(PROMPTS, seeded(), batch_size=batch_size)
    runner = runner_of(pair.target, "auto")
    counting = Counting(runner.forward)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", counting)
        decoder.generate(PROMPTS, seeded(), batch_size=batch_size)
    lower = r"batch_size \(2\)" if batch_size == 2 else r"max_new_tokens \(12\)"
    with monkeypatch.context() as patch:
        patch.setattr(runner, "forward", Exhausted(runner.forward, counting.passes - 2))
        with pytest.raises(
            OutOfDeviceMemory, match=rf"Lower {lower}, target_width \(3\) or draft_width \(5\)"
        ) as caught:
            decoder.generate(PROMPTS, seeded(), batch_size=batch_size, halve=False)
    finished = caught.value.finished
    assert 0 < len(finished) < len(PROMPTS)
    assert f"{len(finished)} of 6 prompts were done" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert_same([finished[i] for i in sorted(finished)], [expected[i] for i in sorted(finished)])
    assert_same(decoder.generate(PROMPTS, seeded(), batch_size=batch_size), expected)


def test_no_memory_for_the_buffers_is_told_in_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = DSBDDecoder(llama_pair(), CONFIG)

    def full(self: Runner, rows: int, capacity: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Runner, "borrow", full)
    with pytest.raises(OutOfDeviceMemory, match=r"0 of 6 prompts were done. Lower batch_size \(6\)") as caught:
        decoder.generate(PROMPTS, seeded(), halve=False)
    assert caught.value.finished == {}
    with pytest.raises(OutOfDeviceMemory, match=r"Lower max_new_tokens \(12\)"), pytest.warns(UserWarning) as said:
        decoder.generate(PROMPTS, seeded())
    assert ["going on with 3" in str(said[0].message), "going on with 1" in str(said[1].message)] == [True, True]


class Heard(Recorder):
    """Keeps the layers of one prompt."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def layer(self, event: Any) -> None:
        self.layers.append([node for node, _ in event.kept])

    def restart(self) -> None:
        self.layers.clear()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("can't allocate memory")]
)
def test_half_the_batch_goes_on_where_memory_ran_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens and events as with enough memory; a recorder that cannot begin anew is not told twice."""
    pair = llama_pair()
    decoder, expected, heard = DSBDDecoder(pair, CONFIG), [Heard() for _ in PROMPTS], [Heard() for _ in PROMPTS]
    alone = decoder.generate(PROMPTS, seeded(), expected)
    runner = runner_of(pair.target, "auto")

    class Full(Counting):
        """No room for several prompts, once some passes are done."""

        def __call__(self, inputs: PassInputs, store: Any) -> Any:
            if self.passes > 3 and store.rows > 1:
                raise error
            return super().__call__(inputs, store)

    monkeypatch.setattr(runner, "forward", Full(runner.forward))
    with pytest.warns(UserWarning, match="ran out of memory with") as said:
        found = decoder.generate(PROMPTS, seeded(), heard)
    assert_same(found, alone)
    assert [one.layers for one in heard] == [one.layers for one in expected]
    assert [str(one.message).partition("; ")[2] for one in said] == ["going on with 3.", "going on with 1."]
    monkeypatch.setattr(runner, "forward", Full(runner.forward.forward))
    with pytest.raises(OutOfDeviceMemory, match="Lower batch_size"):
        decoder.generate(PROMPTS, seeded(), [Recorder() for _ in PROMPTS])


@pytest.mark.parametrize("batch_size", [0, True, -1, 2.5, "2"], ids=repr)
def test_what_is_no_batch_size_is_refused(batch_size: Any) -> None:
    with pytest.raises(
        UserError, match=r"batch_size is .*; give a whole number of at least 1 \(or None for all\)"
    ) as caught:
        DSBDDecoder(llama_pair(), CONFIG).generate(PROMPTS, batch_size=batch_size)
    assert "\n" not in str(caught.value)


def test_no_prompts_give_no_results() -> None:
    decoder = DSBDDecoder(llama_pair(), CONFIG)
    assert decoder.generate([]) == []
    assert decoder.generate([], [], [], batch_size=3) == []
    assert len(decoder.generate(PROMPTS[:2], seeded(), batch_size=100)) == 2
