"""N-gram drafts: the index against brute force, the distribution as written, exact output, and what has no proposal."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import decoding.dice.sampling
import decoding.loop.prompt_run
import decoding.loop.rejection_run
from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError
from decoding.forest.tree import TokenForest
from decoding.loop.processing import Rules
from decoding.loop.rejection_run import judge_layer
from decoding.pairs.drafts.ngram import BACKOFF, NgramDraft, NgramIndex, NgramScorer
from decoding.results import DecodeResult
from tests.decoding.loop.test_exactness import CAUGHT, PASS, count_sets, settings
from tests.decoding.stubs import Reference, chi_square_p, random_pair, small_llama

REPEATING = [1, 0, 2, 1, 0]  # 0 and 2 came after 0 or 1 before: there is something to propose at once


def followers(tokens: list[int], n: int) -> dict[int, int]:
    """What followed the last n tokens before, by looking everywhere."""
    counts: dict[int, int] = {}
    for at in range(len(tokens) - n):
        if tokens[at : at + n] == tokens[len(tokens) - n :]:
            counts[tokens[at + n]] = counts.get(tokens[at + n], 0) + 1
    return counts


def grown_forest(prompt: list[int], vocabulary: int, max_ngram: int, seed: int) -> tuple[TokenForest, NgramIndex]:
    generator = np.random.default_rng(seed)
    forest = TokenForest()
    index = NgramIndex(prompt, forest, max_ngram)
    for _ in range(60):
        node = forest.child(int(generator.integers(len(forest))), int(generator.integers(vocabulary)))
        if generator.random() < 0.5:
            index.add(node)  # with its ancestors
    return forest, index


@pytest.mark.parametrize("max_ngram", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_the_index_finds_what_brute_force_finds(length: int, max_ngram: int) -> None:
    """In the prompt, across its end, and on the node's own path, never on a sibling's; also after nodes have died."""
    for seed in range(5):
        generator = np.random.default_rng(100 + seed)
        prompt = generator.integers(3, size=length).tolist()
        forest, index = grown_forest(prompt, 3, max_ngram, seed)
        leaves = [node for node in range(1, len(forest)) if node not in forest.parents]
        dying = [leaf for leaf in leaves if generator.random() < 0.5]
        dead: set[int] = set()
        for step in range(2):
            for node in range(len(forest)):
                if node not in dead:
                    index.add(node)
                    for n in range(1, max_ngram + 1):
                        assert index.followers(node, n) == followers(prompt + forest.path(node), n), (step, node, n)
            dead = set(forest.release(dying, set()))
            for node in sorted(dead, reverse=True):
                index.remove(node)


def test_an_emptied_index_holds_the_prompt_alone() -> None:
    forest, index = grown_forest([0, 1, 0], 3, 3, seed=1)
    for node in forest.release([n for n in range(1, len(forest)) if n not in forest.parents], set()):
        index.remove(node)
    assert not index._nodes and set(index._tails) == set(index._paths) == {0}


def test_longer_matches_outweigh_shorter_ones() -> None:
    #              a  b  c  ..  x  b  d  ..  a  b
    prompt = [0, 1, 2, 9, 5, 1, 3, 8, 0, 1]
    shares = NgramIndex(prompt, TokenForest(), 3).distribution(0)
    total = 1 + BACKOFF
    assert shares == pytest.approx({2: (1 + BACKOFF / 2) / total, 3: BACKOFF / 2 / total})


def test_what_never_came_before_has_no_proposal() -> None:
    assert NgramIndex([0, 1, 2], TokenForest(), 3).distribution(0) == {}
    assert NgramIndex([4], TokenForest(), 3).distribution(0) == {}


# ------------------------------------------------------------------------------------------- scorer


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_rows_are_distributions_on_the_host_and_on_the_device(temperature: float) -> None:
    prompt, forest = [0, 1, 2, 0, 3, 0, 1], TokenForest()
    rows = {top: NgramScorer(NgramDraft(2), 1, 6, temperature, top) for top in (None, 6, 1)}
    empty = forest.child(0, 5)
    known = forest.child(0, 0)
    for scorer in rows.values():
        scorer.open(0, prompt, forest)
        scorer.score({0: [known, empty]})
        assert scorer.calls(0) == 1 and scorer.score({0: [known]}) == 0 and scorer.calls(0) == 1
        assert scorer.proposes(0, [empty, known]) and not scorer.proposes(0, [empty])
        assert scorer.hidden(0, [known]) is None
    dense = rows[None].log_probs(0, [known, empty])
    assert dense.shape == (2, 6) and (dense[1] == -torch.inf).all()
    share = NgramIndex(prompt, forest, 2)
    share.add(known)
    powered = {token: value ** (1 / temperature) for token, value in share.distribution(known).items()}
    expected = {token: value / sum(powered.values()) for token, value in powered.items()}
    assert {t: dense[0, t].exp().item() for t in expected} == pytest.approx(expected)
    assert dense[0].exp().sum().item() == pytest.approx(1)
    values, tokens = rows[6].tops(0, [known, empty])
    assert {int(t): math.exp(v) for t, v in zip(tokens[0], values[0], strict=True) if v > -math.inf} == pytest.approx(
        expected
    )
    assert (values[1] == -np.inf).all()
    values, tokens = rows[1].tops(0, [known])
    assert values.tolist() == [[0.0]] and tokens[0, 0] == max(expected, key=lambda token: expected[token])


def test_rows_are_prompts_of_their_own_and_are_used_again() -> None:
    scorer = NgramScorer(NgramDraft(), 2, 9)
    forests = [TokenForest(), TokenForest()]
    scorer.open(0, [1, 2, 1], forests[0])
    scorer.open(1, [1, 3, 1], forests[1], shared=(0, 1))
    best = [scorer.log_probs(row, [0]).argmax().item() for row in (0, 1)]
    assert best == [2, 3]
    scorer.close_row(0)
    scorer.open(0, [4, 5, 4], forests[0])
    assert scorer.log_probs(0, [0]).argmax().item() == 5


def test_forgotten_nodes_leave_nothing() -> None:
    scorer, forest = NgramScorer(NgramDraft(), 1, 9, top=9), TokenForest()
    scorer.open(0, [1, 2, 1], forest)
    kept, dropped = forest.child(0, 2), forest.child(0, 3)
    leaf = forest.child(dropped, 1)
    scorer.score({0: [kept, leaf]})
    scorer.forget(0, forest.release([leaf], {kept}), [kept])
    held = scorer._held(0)
    assert set(held.scored) == {kept} and set(held.index._tails) == {0, kept}
    assert all(node == kept for nodes in held.index._nodes.values() for node in nodes)


# ---------------------------------------------------------------------------------------- exactness


def ngram_pair(vocabulary: int, seed: int = 3, draft: Any = "ngram") -> ModelPair:
    return ModelPair(random_pair(vocabulary, seed=seed).target, draft)


def decode_often(pair: ModelPair, prompt: list[int], config: DecodingConfig, draws: int) -> list[DecodeResult]:
    return DSBDDecoder(pair, config).generate([prompt] * draws, torch.Generator().manual_seed(0))


def test_a_wrong_q_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn by counts, judged as if drawn uniformly."""
    config, pair = settings(1, 1, 1, 2), ngram_pair(3)
    prompt = [0, 1, 0, 1, 0, 1, 0, 2, 0]
    expected = Reference(pair.target, prompt, config).returned()
    assert chi_square_p(count_sets(decode_often(pair, prompt, config, 2000)), expected) > PASS

    def uniform(target: Any, draft: Any, picks: Any, **rule: Any) -> Any:
        wrong = decoding.dice.sampling.Joint(
            draft.parents, draft.tokens, np.full(len(draft), 1 / len(draft)), draft.weights
        )
        return judge_layer(target, wrong, picks, **rule)

    monkeypatch.setattr(decoding.loop.rejection_run, "judge_layer", uniform)
    assert chi_square_p(count_sets(decode_often(pair, prompt, config, 2000)), expected) < CAUGHT


@pytest.mark.parametrize("prompt", [[1], [0, 1, 2]])
def test_without_a_proposal_it_is_beam_sampling(prompt: list[int]) -> None:
    """Where nothing came before, nothing is drafted: the first layer, at least, is the target's own."""
    config, pair = settings(2, 3, 2, 3), ngram_pair(3)
    results = decode_often(pair, prompt, config, 800)
    assert {result.stats.draft_widths[0] for result in results} == {0}
    assert chi_square_p(count_sets(results), Reference(pair.target, prompt, config).returned()) > PASS


def test_beams_without_a_proposal_may_have_siblings_with_one() -> None:
    """Some beams of a layer have empty rows; the layer is drafted from the others."""
    config, pair = settings(3, 4, 2, 4), ngram_pair(5, seed=7)
    prompt = [3, 0, 3]
    results = decode_often(pair, prompt, config, 300)
    widths = {width for result in results for width in result.stats.draft_widths}
    assert 0 in widths and len(widths) > 2


def test_copying_text_is_accepted() -> None:
    """A target that repeats its prompt is drafted by lookup alone: 6 layers an iteration."""
    cycle = torch.full((16, 4, 4), -20.0)
    for token in range(4):
        cycle[:, token, (token + 1) % 4] = 20.0
    pair = ngram_pair(4)
    with torch.no_grad():
        pair.target.table.copy_(cycle)
    (result,) = DSBDDecoder(pair, settings(1, 1, 6, 10)).generate([[0, 1, 2, 3, 0]], torch.Generator().manual_seed(0))
    assert result.sequences == [[1, 2, 3, 0, 1, 2, 3, 0, 1, 2]]
    assert result.stats.iterations == 2


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("draft", ["ngram", "model of fewer tokens"])
def test_processors_that_forbid_all_that_a_draft_knows(width: int, draft: str) -> None:
    """Nothing is drafted then, and the target is decoded as ever."""

    class Only(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            banned = torch.full_like(scores, -torch.inf)
            banned[:, 4:] = scores[:, 4:]
            return banned

    pair = ModelPair(small_llama(6), "ngram" if draft == "ngram" else small_llama(3, seed=1))
    config = settings(width, 2, 2, 4)
    rules = [Rules([1, 2, 1], LogitsProcessorList([Only()]))]
    (result,) = DSBDDecoder(pair, config).generate([[1, 2, 1]], torch.Generator().manual_seed(0), rules=rules)
    assert {token for sequence in result.sequences for token in sequence} <= {4, 5}


# ------------------------------------------------------------------------------------------- pairs


def test_names_and_fingerprints() -> None:
    target = small_llama(5)
    pairs = [ModelPair(target, draft) for draft in (None, "ngram", "ngram:2", "layers:1", small_llama(5, seed=1))]
    assert [pair.draft_name for pair in pairs] == [None, "ngram:3", "ngram:2", "layers:1", "model"]
    assert [pair.describe()["draft"] for pair in pairs] == [None, "ngram:3", "ngram:2", "layers:1", "model"]
    assert len({pair.fingerprint for pair in pairs}) == 5
    assert ModelPair(target, NgramDraft(2)).fingerprint == pairs[2].fingerprint
    assert [list(pair.models) for pair in pairs] == [["target"]] * 3 + [["target", "draft"]] * 2
    assert ModelPair(target, "ngram").context == ModelPair(target, None).context == 512


@pytest.mark.parametrize(
    "draft", ["", "ngram:", "ngram:0", "ngram:-1", "ngram:x", "layers", "layers:", "gram", "ngram:²"]
)
def test_unknown_drafts_are_refused(draft: str) -> None:
    with pytest.raises(UserError, match=r"draft is .*; give a model, or layers:N .* ngram or ngram:N") as refusal:
        ModelPair(small_llama(5), draft)
    assert "\n" not in str(refusal.value)
