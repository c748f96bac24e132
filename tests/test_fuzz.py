"""Any config, prompt and policy: a result that keeps the invariants, or a sentence; never a hang, never a traceback
from inside a library.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoding import (
    BanditWidth,
    DecodeResult,
    DecodingConfig,
    DSBDDecoder,
    EntropyWidth,
    ExpectedWidth,
    FixedWidth,
    GapWidth,
    KeyGapWidth,
    MassWidth,
    ModelPair,
    RandomWidth,
    ThresholdWidth,
    UniformWidth,
    UserError,
    beam_sample,
    dsbd_generate,
)
from decoding.forest.cache import ForestCache
from decoding.forest.late_scorer import LateScorer
from decoding.loop.batch import Batch
from tests.fuzzing import TRIED, counted, examples
from tests.small_pair import small_pair

ODD = st.sampled_from([None, True, -1, 0, 1.5, float("nan"), float("inf"), 2**70, "4", "", [], [1], {}])
ANY = {
    "mode": st.sampled_from(["beam_sample", "beam_search"]),
    "target_width": st.integers(1, 5),
    "draft_width": st.integers(1, 9),
    "draft_depth": st.integers(0, 3),
    "min_width": st.integers(1, 3),
    "max_new_tokens": st.integers(1, 9),
    "min_new_tokens": st.integers(0, 3),
    "temperature": st.one_of(st.floats(0.05, 3.0), st.sampled_from([1e-6, 1e6])),
    "top_k": st.one_of(st.none(), st.integers(1, 20), st.just(10**6)),
    "top_p": st.one_of(st.none(), st.floats(0.01, 1.0)),
    "warp": st.sampled_from(["joint", "beam"]),
    "oversample": st.integers(1, 3),
    "draft_top_k": st.one_of(st.none(), st.integers(4, 40)),
    "verification": st.sampled_from(["shared_noise", "rejection"]),
    "replacement": st.booleans(),
    "surplus": st.sampled_from(["keep", "drop"]),
    "refill": st.sampled_from(["full", "width"]),
    "exact": st.booleans(),
    "one_beam_cache": st.booleans(),
    "length_penalty": st.floats(-3.0, 3.0),
    "early_stopping": st.sampled_from([False, True, "never"]),
    "eos_token_id": st.one_of(st.none(), st.integers(-2, 320), st.lists(st.integers(-2, 320), max_size=12)),
    "num_return_sequences": st.integers(1, 3),
}
FEW = {"max_new_tokens": 6, "target_width": 2, "draft_width": 4}  # where a config says nothing


@st.composite
def settings_of_a_config(draw: st.DrawFn, odd: bool = False) -> dict[str, Any]:
    """A few settings; with `odd` one of them is of no kind that is expected."""
    names = draw(st.lists(st.sampled_from(sorted(ANY)), unique=True, max_size=8))
    found = FEW | {name: draw(ANY[name]) for name in names}
    if odd:
        found[draw(st.sampled_from(sorted(ANY)))] = draw(ODD)
    return found


@st.composite
def policies(draw: st.DrawFn) -> Any:
    """A policy's class and its settings, which often do not fit."""
    small, share = st.one_of(st.none(), st.integers(-1, 9)), st.floats(-0.5, 1.5)
    kind: Any = draw(
        st.sampled_from(
            [FixedWidth, FixedWidth, RandomWidth, UniformWidth, ExpectedWidth, KeyGapWidth, BanditWidth, *BY_SHARE]
        )
    )
    if kind is FixedWidth:
        return partial(kind, draw(small), draw(small), draw(small))
    return partial(kind, draw(share)) if kind in BY_SHARE else kind


BY_SHARE = (ThresholdWidth, MassWidth, GapWidth, EntropyWidth)
TOKENS = st.lists(st.integers(0, 250), min_size=1, max_size=9)
PROMPTS = st.lists(TOKENS, min_size=1, max_size=3)


@cache
def pair() -> ModelPair:
    return small_pair()


def streams(count: int, seed: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def check_result(result: DecodeResult, prompt: list[int], config: DecodingConfig) -> None:
    """Tokens of the vocabulary, lengths, ends, order of scores, and scores as the target alone gives them."""
    assert 1 <= len(result.sequences) <= config.num_return_sequences
    assert len(result.sequences) == len(result.scores) == len(result.finished)
    assert all(a >= b for a, b in zip(result.scores, result.scores[1:], strict=False)), result.scores
    given = config.eos_token_id
    ends = {pair().target.config.eos_token_id} if given is None else {*given} if isinstance(given, list) else {given}
    for tokens, score, finished in zip(result.sequences, result.scores, result.finished, strict=True):
        assert all(0 <= token < pair().vocab_size for token in tokens)
        assert 1 <= len(tokens) <= config.max_new_tokens
        assert finished == (tokens[-1] in ends) and not ends & set(tokens[:-1])
        assert len(tokens) == config.max_new_tokens or finished
        assert len(tokens) > config.min_new_tokens or not finished or len(tokens) == config.max_new_tokens
        expected = log_probability(prompt, tokens, config, ends) / len(tokens) ** config.length_penalty
        assert score == pytest.approx(expected, rel=1e-3, abs=1e-3)
    stats = result.stats
    assert sum(1 for _ in stats.layers) == stats.new_tokens and max(map(len, result.sequences)) <= config.max_new_tokens
    assert 0 < stats.kv_slots_end <= stats.kv_slots_peak


@torch.inference_mode()
def log_probability(prompt: list[int], tokens: list[int], config: DecodingConfig, ends: set[int]) -> float:
    """Log-probability of a continuation by a plain pass of the target; of one beam without the ends that it may not
    have yet, as transformers' processors take them out of its logits."""
    logits = pair().target(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()
    if config.target_width == 1:
        logits[: config.min_new_tokens, [end for end in ends if 0 <= end < pair().vocab_size]] = -torch.inf
    found = (logits / config.temperature).log_softmax(-1)
    return float(found[torch.arange(len(tokens)), torch.tensor(tokens)].sum())


@pytest.fixture(scope="module", autouse=True)
def batches() -> Iterator[list[Batch]]:
    """The batches that the decoder makes, the last one kept."""
    made: list[Batch] = []

    class Seen(Batch):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made[:] = [self]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("decoding.decoder.Batch", Seen)
        yield made


def check_freed(batch: Batch) -> None:
    """No prompt holds a slot, no scorer a KV buffer."""
    for scorer in batch.scorers.values():
        scorer = scorer.scorer if isinstance(scorer, LateScorer) else scorer
        assert getattr(scorer, "_store", None) is None
        cache = getattr(scorer, "cache", None)
        assert cache is None or cache._tables == [None] * cache.rows


SEEDS = st.integers(0, 2**40)


@examples(80)
@given(settings_of_a_config(), policies(), PROMPTS, SEEDS, st.integers(1, 3))
def test_decoding(
    batches: list[Batch], settings: dict[str, Any], policy: Any, prompts: list[list[int]], seed: int, size: int
) -> None:
    with warnings.catch_warnings(), counted("decoding", UserError):
        warnings.simplefilter("ignore")
        config = DecodingConfig(**settings)
        decoder = DSBDDecoder(pair(), config, policy())
        results = decoder.generate(prompts, streams(len(prompts), seed), batch_size=size)
        assert len(results) == len(prompts)
        for result, prompt in zip(results, prompts, strict=True):
            check_result(result, prompt, config)
        check_freed(batches[-1])


@examples(40)
@given(settings_of_a_config(), st.integers(1, 9), st.integers(0, 4), PROMPTS, SEEDS)
def test_full_widths_give_the_tokens_of_the_target_alone(
    settings: dict[str, Any], draft_width: int, depth: int, prompts: list[list[int]], seed: int
) -> None:
    settings |= {"verification": "shared_noise", "draft_width": draft_width, "draft_depth": depth, "surplus": "keep"}
    settings |= {"refill": "full", "exact": False, "one_beam_cache": False}
    with warnings.catch_warnings(), counted("full widths", UserError):
        warnings.simplefilter("ignore")
        config = DecodingConfig(**settings)
        results = DSBDDecoder(pair(), config, FixedWidth()).generate(prompts, streams(len(prompts), seed))
        alone = beam_sample(pair().target, prompts, config, streams(len(prompts), seed))
        assert [r.sequences for r in results] == [r.sequences for r in alone]
        expected = [score for result in alone for score in result.scores]
        # float32 sums, which a negative length penalty multiplies
        assert [s for r in results for s in r.scores] == pytest.approx(expected, rel=1e-5, abs=1e-4)


@examples(60)
@given(settings_of_a_config(odd=True))
def test_odd_settings(settings: dict[str, Any]) -> None:
    """What is taken works as the rest does; an odd value that is taken is one that happens to be allowed."""
    with warnings.catch_warnings(), counted("odd settings", UserError):
        warnings.simplefilter("ignore")
        config = DecodingConfig(**settings)
        if config.max_new_tokens <= 10 and config.target_width <= 10 and config.draft_depth <= 4:
            (result,) = DSBDDecoder(pair(), config).generate([[5, 6, 7]], streams(1, 0))
            check_result(result, [5, 6, 7], config)


ODD_PROMPTS = st.one_of(
    ODD,
    st.text(),
    st.lists(st.one_of(ODD, st.text(max_size=3), st.integers()), max_size=3),
    st.lists(st.lists(st.one_of(st.integers(-3, 400), st.just(2**40)), max_size=4), max_size=3),
    st.builds(torch.zeros, st.lists(st.integers(0, 3), max_size=3).map(tuple)),
    st.builds(lambda n: torch.zeros(1, n, dtype=torch.long), st.integers(0, 300)),
)


@examples(40)
@given(ODD_PROMPTS, st.one_of(st.just(torch.Generator()), ODD), ODD)
def test_odd_prompts(prompts: Any, generator: Any, batch_size: Any) -> None:
    with warnings.catch_warnings(), counted("odd prompts", UserError):
        warnings.simplefilter("ignore")
        config = DecodingConfig(**FEW)
        results = DSBDDecoder(pair(), config).generate(prompts, generator, batch_size=batch_size)
        assert len(results) == len(prompts)


GENERATION = {
    "num_beams": st.integers(1, 4),
    "num_return_sequences": st.integers(1, 3),
    "max_new_tokens": st.integers(1, 8),
    "min_new_tokens": st.integers(0, 4),
    "max_length": st.integers(1, 12),
    "min_length": st.integers(0, 9),
    "length_penalty": st.floats(-2.0, 2.0),
    "early_stopping": st.sampled_from([False, True, "never"]),
    "eos_token_id": st.one_of(st.none(), st.integers(-2, 300), st.lists(st.integers(0, 300), min_size=1, max_size=4)),
    "repetition_penalty": st.floats(0.5, 2.0),
    "no_repeat_ngram_size": st.integers(0, 3),
    "bad_words_ids": st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=2), min_size=1, max_size=3),
    "suppress_tokens": st.lists(st.integers(0, 200), max_size=5),
    "begin_suppress_tokens": st.lists(st.integers(0, 200), max_size=5),
    "forced_eos_token_id": st.integers(0, 200),
    "forced_bos_token_id": st.integers(0, 200),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 4), st.floats(0.5, 1.5)),
    "renormalize_logits": st.booleans(),
    "remove_invalid_values": st.booleans(),
    "sequence_bias": st.just([[[5], 2.0], [[7, 8], -1.0]]),
    "use_cache": st.booleans(),
    "output_scores": st.booleans(),
    "num_beam_groups": st.integers(1, 2),
    "diversity_penalty": st.sampled_from([0.0, 0.5]),
    "penalty_alpha": st.sampled_from([0.0, 0.6]),
    "guidance_scale": st.sampled_from([1.0, 1.5]),
    "stop_strings": st.sampled_from([["a"], ["e", "th"], []]),
    "temperature": st.floats(0.1, 2.0),
    "top_k": st.integers(1, 20),
    "draft_depth": st.integers(0, 3),
    "draft_width": st.integers(1, 9),
}
OURS = ("draft_depth", "draft_width")


@examples(40)
@given(
    st.lists(st.sampled_from(sorted(GENERATION)), unique=True, max_size=6),
    st.data(),
    st.lists(TOKENS, min_size=1, max_size=2),
    st.sampled_from([None, "ngram", "model"]),
)
def test_generation_arguments(names: list[str], data: st.DataObject, prompts: list[list[int]], draft: Any) -> None:
    """Where transformers' own search gives tokens, so does dsbd_generate, the same ones, or it refuses by name."""
    options = {"num_beams": 3, "max_new_tokens": 6} | {name: data.draw(GENERATION[name], name) for name in names}
    own = {name: options.pop(name) for name in OURS if name in options}
    if "stop_strings" in options:
        options["tokenizer"] = pair().tokenizer
    longest = max(map(len, prompts))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        "pad_token_id": 0,
        "do_sample": False,
    }
    model = pair().target
    with warnings.catch_warnings(), counted("generation arguments", UserError):
        warnings.simplefilter("ignore")
        try:
            plain = model.generate(**inputs, **options)
        except Exception as error:  # whatever transformers makes of it
            TRIED[f"generation arguments: transformers' own {type(error).__name__}"] += 1
            return
        if (plain < 0).any():  # hypotheses without a token left: transformers fills them up with -1
            return
        drafter = pair().models["draft"] if draft == "model" else draft
        ours = model.generate(**inputs, **options, **own, assistant_model=drafter, custom_generate=dsbd_generate)
        assert ours.tolist() == plain.tolist()


@examples(60)
@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.integers(0, 8), st.booleans())
def test_slots_of_a_forest(data: st.DataObject, rows: int, prompt: int, spare: int, static: bool) -> None:
    """However nodes come and go, each has a slot of its own and sees its ancestors alone."""
    cache = ForestCache(rows, prompt, spare, torch.device("cpu"), torch.float32, static)
    parents: list[dict[int, int]] = []  # of living nodes, by row
    for row in range(rows):
        cache.open(row, prompt)
        parents.append({0: -1})
    for step in range(data.draw(st.integers(1, 6), "steps")):
        wanted: dict[int, tuple[list[int], list[int]]] = {}
        for row in range(rows):
            count = data.draw(st.integers(0, 5), "nodes")
            above = [data.draw(st.sampled_from(sorted(parents[row])), "parent") for _ in range(count)]
            nodes = [100 * step + i + 1 for i in range(count)]
            parents[row].update(zip(nodes, above, strict=True))
            if nodes:
                wanted[row] = nodes, above
        if wanted:
            with counted("forests"):
                check_placement(cache, wanted, parents, prompt)
        for row in range(rows):
            living = set(parents[row].values())
            leaves = sorted(set(parents[row]) - living - {0})
            dead = data.draw(st.lists(st.sampled_from(leaves), unique=True), "dead") if leaves else []
            cache.release(row, dead)
            for node in dead:
                del parents[row][node]
            assert cache.slots_used(row) == prompt + len(parents[row]) - 1 <= cache.slots_peak(row)


def check_placement(
    cache: ForestCache,
    wanted: dict[int, tuple[list[int], list[int]]],
    parents: list[dict[int, int]],
    prompt: int,
) -> None:
    found = cache.place(wanted)
    filler = cache.filler_mask_row
    places = found.rows * found.queries
    base, mask = torch.full((places,), filler), torch.full((places,), filler)
    base[found.places], mask[found.places] = torch.tensor(found.base_rows), torch.tensor(found.mask_rows)
    seen = cache.masks(base, mask, torch.tensor(found.bits, dtype=torch.long), found.rows, found.read)
    for (row, node), place in zip(found.order, found.places, strict=True):
        slots = {cache.slot(row, other) for other in parents[row] if other}
        assert len(slots) == len(parents[row]) - 1 and all(prompt <= slot < found.read for slot in slots)
        path, at = set(range(prompt)), node
        while at > 0:
            path.add(cache.slot(row, at))
            at = parents[row][at]
        visible = seen[place // found.queries, 0, place % found.queries] == 0
        assert set(visible.nonzero().flatten().tolist()) == path
