"""Static shapes, as CUDA graphs need them, without a GPU: in buckets the same tokens as in exact shapes, whatever is
where no one should look; and GraphedForward's bookkeeping with graphs that only call.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import decoding.engine.graphs
import decoding.forest.scorer
from decoding import DecodeResult, DecodingConfig, DSBDDecoder, FixedWidth, ModelPair, RandomWidth, ThresholdWidth
from decoding.engine.forward import PassInputs, PassOutput, TransformersStore
from decoding.engine.fused import FusedStore
from decoding.engine.graphs import GRAPH_LIMIT, GraphedForward, _Captured, _read_by
from decoding.engine.runner import runner_of
from decoding.forest.cache import QUERY_BUCKETS, SLOT_BUCKET, ForestCache
from tests.decoding.loop.test_batch import CONFIG, POLICIES, PROMPTS, SETTINGS, assert_same, seeded
from tests.decoding.stubs import llama_pair

ENGINES = pytest.mark.parametrize("engine", ["auto", "transformers"])
LOUD = 1e4  # noise this large in a slot that is read would change every token


class Static:
    """A forward in static shapes that hides noise wherever no result may come from.

    Before a pass the last slot of each row, where fillers write, is filled with noise, and fillers get random tokens
    and positions; after it, their rows of the output are NaN.
    """

    ragged, static = False, True

    def __init__(self, forward: Any, seed: int = 0) -> None:
        self.forward, self.name = forward, f"{forward.name}+static"
        self.shapes: list[tuple[int, int, int]] = []  # rows, queries, slots read
        self.fillers = 0
        self._random = torch.Generator().manual_seed(seed)

    def new_store(self, rows: int, capacity: int) -> Any:
        return self.forward.new_store(rows, capacity)

    def __call__(self, inputs: PassInputs, store: Any) -> PassOutput:
        assert inputs.pad is None and inputs.unpad is None
        assert inputs.first_row == 0 and inputs.rows == store.rows, "always all rows"
        queries = inputs.tokens.numel() // inputs.rows
        assert inputs.tokens.shape == inputs.positions.shape == inputs.slots.shape == (inputs.rows * queries,)
        assert inputs.mask.shape == (inputs.rows, 1, queries, inputs.read)
        self.shapes.append((inputs.rows, queries, inputs.read))
        last = torch.arange(1, store.rows + 1) * store.capacity - 1
        for buffer in buffers_of(store):
            buffer[last] = LOUD * torch.randn(buffer[last].shape, generator=self._random)
        filler = torch.isin(inputs.slots, last)
        count = int(filler.sum())
        self.fillers += count
        inputs.tokens = inputs.tokens.clone()
        inputs.tokens[filler] = torch.randint(7, (count,), generator=self._random)
        inputs.positions = inputs.positions.clone()
        inputs.positions[filler] = torch.randint(64, (count,), generator=self._random)
        logits, hidden, states = self.forward(inputs, store)
        return PassOutput(without(logits, filler), without(hidden, filler) if hidden is not None else None, states)


def without(values: Tensor, filler: Tensor) -> Tensor:
    return values.masked_fill(filler[:, None], torch.nan)


def buffers_of(store: FusedStore | TransformersStore) -> Sequence[Tensor]:
    if isinstance(store, FusedStore):
        return store.buffers
    both = [buffer for layer in store._flat for buffer in (layer.keys, layer.values)]
    return [buffer for buffer in both if buffer is not None]


def static_runs(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> list[Static]:
    """Let both models of a pair run in static shapes."""
    pair.check_forest_passes()
    forwards = []
    for model in pair.models.values():
        runner = runner_of(model, pair.engine)
        runner._spare.clear()  # of capacities that are no bucket
        forwards.append(Static(runner.prompts))
        monkeypatch.setattr(runner, "forward", forwards[-1])
    return forwards


@ENGINES
@pytest.mark.parametrize("policy", ["fixed", "random"])
@pytest.mark.parametrize("settings", ["defaults", "exact", "per beam", "with replacement", "target alone"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_static_shapes_give_the_same_tokens(
    engine: str, policy: str, settings: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = llama_pair(engine=engine)
    decoder = DSBDDecoder(pair, CONFIG.with_changes(**SETTINGS[settings]), POLICIES[policy]())
    expected = decoder.generate(PROMPTS, seeded(), batch_size=batch_size)
    forwards = static_runs(pair, monkeypatch)
    assert_same(decoder.generate(PROMPTS, seeded(), batch_size=batch_size), expected)
    shapes = [shape for forward in forwards for shape in forward.shapes]
    assert {rows for rows, _, _ in shapes} == {batch_size or len(PROMPTS)}
    assert {queries for _, queries, _ in shapes} <= set(QUERY_BUCKETS)
    assert {read for _, _, read in shapes} == {SLOT_BUCKET}
    assert sum(forward.fillers for forward in forwards) > 0


@ENGINES
def test_hidden_states_of_static_shapes_are_the_same(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a policy is shown of hidden states; a graph's outputs are written over by its next pass."""
    seen: list[list[float]] = []

    class Watching(ThresholdWidth):
        needs_hidden = True

        def draft_width(self, context: Any) -> int:
            seen.append([*context.draft_hidden.tolist(), *context.root.target_hidden.tolist()])
            return super().draft_width(context)

    pair = llama_pair(engine=engine)
    decoder = DSBDDecoder(pair, CONFIG, Watching(0.6))
    expected = decoder.generate(PROMPTS, seeded())
    count = len(seen)
    forwards = static_runs(pair, monkeypatch)
    for forward in forwards:
        forward.forward = Overwriting(forward.forward)
    assert_same(decoder.generate(PROMPTS, seeded()), expected)
    assert len(seen) == 2 * count > 0
    np.testing.assert_allclose(sorted(seen[count:]), sorted(seen[:count]), atol=1e-4)


class Overwriting:
    """Puts all outputs of a shape into the same tensors, as a graph does."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward
        self.outputs: dict[Any, PassOutput] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.forward, name)

    def __call__(self, inputs: PassInputs, store: Any) -> PassOutput:
        found = self.forward(inputs, store)
        held = self.outputs.setdefault(found[0].shape, PassOutput(*(None if x is None else x.clone() for x in found)))
        for place, value in zip(held, found, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        return held


@ENGINES
def test_long_decodings_double_their_slots(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 250 and 3 tokens, 30 new ones: the slots read go from one bucket to the next in mid-decoding."""
    prompts = [np.random.default_rng(0).integers(0, 6, 240).tolist(), [1, 2, 3]]
    pair = llama_pair(engine=engine)
    decoder = DSBDDecoder(pair, CONFIG.with_changes(max_new_tokens=30, eos_token_id=-1), FixedWidth())
    expected = decoder.generate(prompts, seeded())
    forwards = static_runs(pair, monkeypatch)
    assert_same(decoder.generate(prompts, seeded()), expected)
    for forward in forwards:
        reads = [read for _, _, read in forward.shapes]
        assert set(reads) == {SLOT_BUCKET, 2 * SLOT_BUCKET}
        assert reads == sorted(reads)


def test_the_poison_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a filler's slot is in sight of a beam, the tests above fail."""
    pair = llama_pair()
    decoder = DSBDDecoder(pair, CONFIG)
    expected = decoder.generate(PROMPTS, seeded())
    static_runs(pair, monkeypatch)
    honest = ForestCache.masks

    def leaky(self: ForestCache, *args: Any) -> Tensor:
        mask = honest(self, *args).clone()
        mask[..., -1] = 0
        return mask

    monkeypatch.setattr(ForestCache, "masks", leaky)
    found = decoder.generate(PROMPTS, seeded())
    assert [result.sequences for result in found] != [result.sequences for result in expected]


# GraphedForward, with graphs that only call what they captured.


class Recalled(_Captured):
    """A captured graph but for the graph: its inputs are its own tensors, and its outputs always the same ones."""

    def __init__(self, forward: Any, inputs: PassInputs, store: Any, pool: Any) -> None:
        self._inputs = copy.copy(inputs)
        for name in _read_by(inputs):
            setattr(self._inputs, name, getattr(inputs, name).clone())
        self._forward, self._store, self._graph = forward, weakref.ref(store), self
        self._outputs = forward(self._inputs, store)

    def replay(self) -> None:
        for place, value in zip(self._outputs, self._forward(self._inputs, self._store()), strict=True):
            if place is not None and value is not None:
                place.copy_(value)


def graphed(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> list[GraphedForward]:
    """Let both models of a pair run through GraphedForward with graphs that only call."""
    pair.check_forest_passes()
    monkeypatch.setattr(decoding.engine.graphs, "_Captured", Recalled)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    forwards = []
    for model in pair.models.values():
        runner = runner_of(model, pair.engine)
        runner._spare.clear()
        forwards.append(GraphedForward(runner.prompts))
        monkeypatch.setattr(runner, "forward", forwards[-1])
    return forwards


@ENGINES
def test_graphs_are_captured_once_and_replayed(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = llama_pair(engine=engine)
    decoder = DSBDDecoder(pair, CONFIG, RandomWidth())
    expected = decoder.generate(PROMPTS, seeded())
    forwards = graphed(pair, monkeypatch)
    assert_same(decoder.generate(PROMPTS, seeded()), expected)
    for forward in forwards:
        assert 0 < forward.captures < forward.replays
        assert forward.eager == 0
    captures = [forward.captures for forward in forwards]
    assert_same(decoder.generate(PROMPTS, seeded()), expected)
    assert [forward.captures for forward in forwards] == captures, "the buffer is used again, and its graphs with it"
    decoder.generate(PROMPTS[:2], seeded())
    assert all(forward.captures > before for forward, before in zip(forwards, captures, strict=True))


def test_graphs_go_with_their_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = llama_pair()
    forwards = graphed(pair, monkeypatch)
    DSBDDecoder(pair, CONFIG).generate(PROMPTS, seeded())
    assert all(len(forward._graphs) == forward.captures for forward in forwards)
    for model in (pair.target, pair.draft):
        runner_of(model, "auto")._spare.clear()
    gc.collect()
    assert [len(forward._graphs) for forward in forwards] == [0, 0]


def test_a_pool_whose_graphs_are_gone_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses it: a pool dies with its last graph, its handle with it."""
    pair = llama_pair()
    forwards = graphed(pair, monkeypatch)
    handles = iter(range(100))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    DSBDDecoder(pair, CONFIG).generate(PROMPTS, seeded())
    first = [forward._pool for forward in forwards]
    assert all(forward.captures > 1 for forward in forwards) and sorted(first) == [0, 1], "one pool a model"
    for model in (pair.target, pair.draft):
        runner_of(model, "auto")._spare.clear()
    gc.collect()
    DSBDDecoder(pair, CONFIG).generate(PROMPTS, seeded())
    assert sorted(forward._pool for forward in forwards) == [2, 3]


def test_a_buffer_goes_with_its_last_user() -> None:
    """At once: the garbage collector does not know that a GPU's memory is short."""
    store = TransformersStore(1, 64, 2)
    gone = weakref.ref(store)
    gc.disable()
    try:
        del store
        assert gone() is None
    finally:
        gc.enable()


def test_no_more_graphs_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = llama_pair()
    decoder = DSBDDecoder(pair, CONFIG, RandomWidth())
    expected = decoder.generate(PROMPTS, seeded())
    monkeypatch.setattr(decoding.engine.graphs, "GRAPH_LIMIT", 2)
    forwards = graphed(pair, monkeypatch)
    assert_same(decoder.generate(PROMPTS, seeded()), expected)
    assert sum(forward.captures for forward in forwards) <= 4 < GRAPH_LIMIT
    assert sum(forward.eager for forward in forwards) > 0


def test_what_cannot_be_captured_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning a model, and the same tokens."""
    pair = llama_pair()
    decoder = DSBDDecoder(pair, CONFIG)
    expected = decoder.generate(PROMPTS, seeded())
    forwards = graphed(pair, monkeypatch)

    def refuse(*args: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(decoding.engine.graphs, "_Captured", refuse)
    with pytest.warns(UserWarning, match=r"cannot be captured as a CUDA graph \(operation not permitted") as caught:
        found = decoder.generate(PROMPTS, seeded())
    assert len([w for w in caught if "CUDA graph" in str(w.message)]) == 2
    assert_same(found, expected)
    assert all((forward.captures, forward.replays) == (0, 0) and forward.eager > 0 for forward in forwards)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["fixed", "random"])
def test_graphs_on_a_gpu_draw_the_same_tokens(policy: str) -> None:
    """float32 with TF32 off, which is torch's default: kernels differ in the order of their sums alone."""
    config = DecodingConfig(
        target_width=3, draft_width=5, draft_depth=3, max_new_tokens=40, eos_token_id=-1, num_return_sequences=3
    )
    results: dict[str, list[DecodeResult]] = {}
    for engine in ("auto", "eager", "transformers"):
        pair = llama_pair(engine=engine)
        pair = ModelPair(pair.target.to("cuda"), pair.draft.to("cuda"), engine=engine)
        decoder = DSBDDecoder(pair, config, POLICIES[policy]())
        results[engine] = decoder.generate(PROMPTS, seeded())
        if engine == "auto":
            for model in (pair.target, pair.draft):
                forward = runner_of(model, engine).forward
                assert isinstance(forward, GraphedForward)
                assert 0 < forward.captures < forward.replays
                assert forward.eager == 0
            assert_same(decoder.generate(PROMPTS, seeded()), results[engine])  # replays alone
    assert_same(results["auto"], results["eager"])
    assert_same(results["transformers"], results["eager"])


@pytest.mark.gpu
def test_graphs_on_a_gpu_follow_their_buffer() -> None:
    """Batches of other sizes come and go; slots grow in mid-decoding; a prompt gets what it gets alone."""
    pair = llama_pair()
    pair = ModelPair(pair.target.to("cuda"), pair.draft.to("cuda"))
    decoder = DSBDDecoder(pair, CONFIG.with_changes(max_new_tokens=60, eos_token_id=-1), RandomWidth())
    long = np.random.default_rng(0).integers(0, 6, 220).tolist()
    together = decoder.generate([*PROMPTS, long], seeded())
    for size in (1, 3, 2, 7):
        assert_same(decoder.generate([*PROMPTS, long], seeded(), batch_size=size), together)
