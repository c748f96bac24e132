"""Whatever drafts, the output is the target's: beams as enumerated, searches token for token, batches as alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import decoding.dice.sampling
from decoding import DecodingConfig, DSBDDecoder, ModelPair, beam_sample
from tests.decoding.engine.test_vocabulary import narrow_pair, tokenizer
from tests.decoding.loop.test_exactness import PASS, PROMPT, count_sets
from tests.decoding.pairs.test_feature_draft import feature_pair
from tests.decoding.pairs.test_lookup import REPEATING, ngram_pair
from tests.decoding.stubs import Reference, chi_square_p, seeded, settings, small_llama

SUBSETS: dict[str, tuple[int, list[int], int, DecodingConfig]] = {  # of the target's tokens, and rows of junk
    "one token lacks": (4, [0, 1, 2], 0, settings(2, 3, 2, 3)),
    "turned": (4, [3, 1, 0, 2], 0, settings(2, 3, 2, 3)),
    "turned and fewer": (5, [4, 0, 2], 2, settings(2, 3, 1, 2)),
    "one beam": (4, [2, 0], 1, settings(1, 2, 2, 3)),
    "a single token": (3, [2], 0, settings(2, 2, 1, 2)),
    "top-k of the joint": (5, [4, 0, 2], 0, settings(2, 3, 2, 3, top_k=3)),
    "top-k of each beam, more than known": (5, [3, 1], 0, settings(2, 3, 2, 3, top_k=3, warp="beam")),
    "top-p of the joint": (4, [3, 0, 1], 0, settings(2, 3, 2, 3, top_p=0.8)),
    "top-p of each beam": (4, [3, 0, 1], 0, settings(2, 3, 2, 3, top_p=0.7, warp="beam")),
    "temperature, end token": (4, [3, 0, 2], 1, settings(2, 3, 2, 3, temperature=0.7, eos_token_id=3)),
}
LAYERS = {
    "one beam": settings(1, 2, 2, 3),
    "two beams": settings(2, 3, 2, 3),
    "top-p": settings(2, 3, 1, 2, top_p=0.8),
    "top-p of each beam": settings(2, 3, 2, 3, top_p=0.7, warp="beam"),
    "top-k": settings(2, 3, 2, 3, top_k=3),
    "top-k of each beam": settings(2, 3, 2, 3, top_k=2, warp="beam", temperature=0.8),
}
NGRAMS = {
    "one beam": (3, settings(1, 1, 2, 3)),
    "one beam, several drafts": (3, settings(1, 3, 2, 3)),
    "two beams": (3, settings(2, 3, 2, 3)),
    "three layers": (3, settings(2, 4, 3, 4)),
    "more drafts than followers": (4, settings(3, 6, 1, 2)),
    "two iterations, exact": (3, settings(2, 2, 1, 3, exact=True)),
    "top-k of the joint": (4, settings(2, 3, 2, 3, top_k=3)),
    "top-k of each beam": (4, settings(2, 3, 2, 3, top_k=2, warp="beam")),
    "top-p of the joint": (4, settings(2, 3, 2, 3, top_p=0.8)),
    "top-p of each beam": (4, settings(2, 3, 2, 3, top_p=0.7, warp="beam")),
    "temperature, end token": (4, settings(2, 3, 2, 3, temperature=0.7, eos_token_id=2)),
}
FEATURES = [(engine, top_k) for engine in ("eager", "transformers") for top_k in (None, 3)]


def layers_pair() -> ModelPair:
    return ModelPair(small_llama(4, layers=3), "layers:1")


def mixed_pair() -> ModelPair:
    return ModelPair(small_llama(4, layers=3), "ngram+layers:1")


Case = tuple[Callable[[], ModelPair], list[int], DecodingConfig]
CASES: dict[str, Case] = {
    **{f"subset, {name}": (partial(narrow_pair, *pair), PROMPT, config) for name, (*pair, config) in SUBSETS.items()},
    **{f"layers, {name}": (layers_pair, PROMPT, config) for name, config in LAYERS.items()},
    **{f"ngram, {name}": (partial(ngram_pair, size), REPEATING, config) for name, (size, config) in NGRAMS.items()},
    **{f"mixed, {name}": (mixed_pair, REPEATING, config) for name, config in LAYERS.items()},
    **{
        f"features, {engine}, top_k={k}": (partial(feature_pair, 4, engine), PROMPT, settings(2, 3, 2, 3, top_k=k))
        for engine, k in FEATURES
    },
}
# With top-k everything is on the host; feature drafts are scored as other models are.
DENSE = [case for case, (_, _, config) in CASES.items() if config.top_k is None and not case.startswith("features")]
PLACES = [(case, host) for case in CASES for host in (True, False) if host or case in DENSE]


@pytest.mark.parametrize(("case", "host"), PLACES, ids=[f"{case}-{'host' if h else 'device'}" for case, h in PLACES])
@pytest.mark.parametrize("replacement", [False, True], ids=["without", "with"])
def test_drafts_leave_the_target_exact(
    case: str, replacement: bool, host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, prompt, config = CASES[case]
    if not host:
        monkeypatch.setattr(decoding.dice.sampling, "HOST_VOCABULARY", 1)
    pair, config = make(), config.with_changes(replacement=replacement)
    results = DSBDDecoder(pair, config).generate([prompt] * 500, seeded())
    assert chi_square_p(count_sets(results), Reference(pair.target, prompt, config).returned()) > PASS
    assert sum(sum(result.stats.accepted) for result in results) > 50, "drafts must count for something"


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: ModelPair(small_llama(5), "ngram"), 0),
        (partial(feature_pair, engine="eager"), 10),
        (partial(feature_pair, engine="transformers"), 10),
    ],
    ids=["ngram", "features, eager", "features, transformers"],
)
def test_beam_search_gives_the_same_tokens(make: Callable[[], ModelPair], least: int) -> None:
    """A batch, token by token as by the target alone; `least` drafts at least are accepted."""
    pair, config = make(), settings(3, 6, 2, 12, mode="beam_search")
    prompts = [[1, 2, 1, 2], [3, 3], [4]]
    drafted = DSBDDecoder(pair, config).generate(prompts)
    alone = beam_sample(pair.target, prompts, config, engine=pair.engine)
    assert [result.sequences for result in drafted] == [result.sequences for result in alone]
    assert sum(sum(result.stats.accepted) for result in drafted) > least


def with_fewer_tokens() -> ModelPair:
    words: Any = tokenizer("abcdefghi"), tokenizer("igecab")
    return ModelPair(small_llama(9), small_llama(6, seed=1), words[0], draft_tokenizer=words[1])


@pytest.mark.parametrize("make", [with_fewer_tokens, lambda: ModelPair(small_llama(9), "ngram:2"), feature_pair])
def test_batches_decode_as_alone(make: Callable[[], ModelPair]) -> None:
    """Prompts that repeat themselves, that begin alike, and with tokens that the narrow draft lacks."""
    decoder = DSBDDecoder(make(), settings(2, 4, 3, 12))
    prompts = [[1, 2, 1, 2], [8, 7], [1, 2, 5, 6, 1, 2], [0, 1, 0, 3, 0]]
    together = decoder.generate(prompts, [seeded(i) for i in range(4)], batch_size=3)
    assert any(sum(result.stats.accepted) for result in together)
    for i, result in enumerate(together):
        assert decoder.generate([prompts[i]], [seeded(i)])[0].sequences == result.sequences
