"""Drafts of other vocabularies: which are taken, what becomes of their ids, and that the output stays the target's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import decoding.dice.sampling
import decoding.loop.prompt_run
import decoding.loop.rejection_run
from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError
from decoding.dice.dense import dense_joint
from decoding.dice.sampling import compact_joint, top_entries
from decoding.engine.vocabulary import VocabularyMap, match_vocabularies
from decoding.forest.scorer import ForestScorer
from decoding.loop.rejection_run import judge_layer
from tests.decoding.loop.test_exactness import CAUGHT, PASS, PROMPT, count_sets, decode_often, settings
from tests.decoding.stubs import MAX_POSITIONS, Reference, TableModel, chi_square_p, random_pair, small_llama

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def tokenizer(tokens: str | Sequence[str], special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Each token at its place; `special` ones after them."""
    ids = {token: i for i, token in enumerate(tokens)}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(ids, next(iter(ids)))))
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


# ------------------------------------------------------------------------------------------ matching


def test_equal_vocabularies_need_no_map() -> None:
    assert match_vocabularies(8, 8, None, None) is None
    assert match_vocabularies(8, 8, tokenizer("abcd"), tokenizer("abcd")) is None
    pair = random_pair(4)
    assert pair.vocabulary is None and "vocabulary" not in pair.describe()


@pytest.mark.parametrize(("size", "draft_size"), [(8, 6), (6, 8)])
def test_padded_rows_are_padded_or_cut(size: int, draft_size: int) -> None:
    """Qwen: one tokenizer, embedding rows rounded up differently."""
    for words in (None, tokenizer("abcde")):
        found = match_vocabularies(size, draft_size, words, words and tokenizer("abcde"))
        assert found is not None and found.ids is None and found.shared == 6
        logits = torch.randn(3, draft_size)
        mapped = found.to_target(logits)
        assert mapped.shape == (3, size)
        assert torch.equal(mapped[:, :6], logits[:, :6]) and (mapped[:, 6:] == -torch.inf).all()
        assert found.to_draft([0, 5]) == [0, 5]
    assert VocabularyMap(8, 6).to_draft([5, 6, 7]) == [5, 0, 0]


def test_a_subset_under_other_ids_is_matched_by_string() -> None:
    found = match_vocabularies(6, 5, tokenizer("abcdef"), tokenizer("fdb"))
    assert found is not None and found.shared == 3 and found.describe()["by"] == "token"
    assert found.to_draft([5, 3, 1]) == [0, 1, 2]
    logits = torch.tensor([[10.0, 11.0, 12.0, 99.0, 99.0]])  # the last two rows have no token
    none = -torch.inf
    assert found.to_target(logits).tolist() == [[none, 12.0, none, 11.0, none, 10.0]]


def test_a_subset_under_the_same_ids_is_only_padded() -> None:
    found = match_vocabularies(6, 3, tokenizer("abcdef"), tokenizer("abc"))
    assert found is not None and found.ids is None and found.shared == 3


def test_every_token_keeps_its_string() -> None:
    """Ids through the map mean the same strings, whichever way."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        ours = [*generator.permutation(list(LETTERS))]
        theirs = [*generator.permutation(ours)][: int(generator.integers(1, 27))]
        target, draft = tokenizer(ours), tokenizer(theirs)
        found = match_vocabularies(len(ours), len(theirs), target, draft)
        known = [target.get_vocab()[token] for token in theirs]
        if found is None:
            assert ours == theirs
            continue
        assert draft.convert_ids_to_tokens(found.to_draft(known)) == target.convert_ids_to_tokens(known)
        mapped = found.to_target(torch.arange(len(theirs))[None].float())[0]
        assert {target.convert_ids_to_tokens(i): int(mapped[i]) for i in known} == draft.get_vocab()
        assert int((mapped > -torch.inf).sum()) == len(theirs)


def test_foreign_tokens_are_refused_with_count_and_examples() -> None:
    with pytest.raises(
        UserError, match=r"4 of the draft's 6 tokens are not .* target's 3, such as 'w' \(2\), 'x' \(3\)"
    ):
        match_vocabularies(3, 6, tokenizer("abc"), tokenizer("abwxyz"))
    with pytest.raises(UserError, match="no token in common"):
        match_vocabularies(3, 1, tokenizer("abc"), tokenizer(["<e>"], special=["<e>"]))


def test_special_tokens_that_the_target_lacks_are_never_proposed() -> None:
    found = match_vocabularies(6, 6, tokenizer("abcd", ["<s>", "</s>"]), tokenizer("abcd", ["</s>", "<pad>"]))
    assert found is not None and found.shared == 5
    mapped = found.to_target(torch.arange(6.0)[None])[0]
    assert mapped.tolist() == [0.0, 1.0, 2.0, 3.0, -torch.inf, 4.0]
    assert found.to_draft([4]) == [0], "the target's <s> is no <pad>"


def test_a_few_ordinary_tokens_that_the_target_lacks_are_never_proposed() -> None:
    """Three of forty: a fine-tuned draft's tokenizer may have them; wherever they stand."""
    words = [*LETTERS, *"0123456789#"]
    for extra in ([*words, "ä", "ö", "ü"], ["ä", *words[:9], "ö", *words[9:], "ü"]):
        found = match_vocabularies(len(words), len(extra), tokenizer(words), tokenizer(extra))
        assert found is not None and found.shared == len(words)
        mapped = found.to_target(torch.arange(float(len(extra)))[None])[0]
        assert mapped.tolist() == [float(extra.index(word)) for word in words]
        assert found.to_draft(range(len(words))) == [extra.index(word) for word in words]
    few = [*words[:30], "ä", "ö", "ü", "ß"]
    with pytest.raises(UserError, match="4 of the draft's 34 tokens are not among the target's 37"):
        match_vocabularies(len(words), len(few), tokenizer(words), tokenizer(few))


def test_tokens_beyond_a_models_rows_are_left_out() -> None:
    found = match_vocabularies(3, 2, tokenizer("abcd"), tokenizer("dcba"))
    assert found is not None and found.shared == 1 and found.to_draft([2]) == [1]


def test_maps_tell_pairs_apart() -> None:
    models = small_llama(6), small_llama(4, seed=1)
    by_id = ModelPair(*models)
    by_token, otherwise = (
        ModelPair(*models, tokenizer=tokenizer("abcdef"), draft_tokenizer=tokenizer(words))
        for words in ("fedc", "efdc")
    )
    assert len({pair.fingerprint for pair in (by_id, by_token, otherwise)}) == 3
    assert by_token.describe()["vocabulary"] == {"draft_size": 4, "shared": 4, "by": "token"}


# ---------------------------------------------------------------------------------------- exactness


def narrowed(pair: ModelPair, order: Sequence[int], spare: int = 0) -> tuple[TableModel, VocabularyMap]:
    """The pair's draft, knowing only the target's tokens `order`, in that order, and its map; `spare` rows of junk."""
    index = torch.tensor(order)
    table = pair.draft.table.detach()[:, index][..., index]
    size = len(order) + spare
    padded = torch.full((MAX_POSITIONS, size, size), 1.0)
    padded[:, : len(order), : len(order)] = table
    found = VocabularyMap.from_pairs(pair.vocab_size, size, [(token, i) for i, token in enumerate(order)])
    return TableModel(padded), found


def narrow_pair(
    vocabulary: int, order: Sequence[int], spare: int = 0, closeness: float = 0.6, seed: int = 3
) -> ModelPair:
    pair = random_pair(vocabulary, seed=seed, closeness=closeness)
    draft, found = narrowed(pair, order, spare)
    words = LETTERS[:vocabulary]
    narrow = ModelPair(
        pair.target, draft, tokenizer(words), draft_tokenizer=tokenizer([words[token] for token in order])
    )
    made = narrow.vocabulary
    assert made is not None
    assert made.to_draft(order) == list(range(len(order)))
    if made.ids is not None:
        assert made.digest == found.digest
    return narrow


@pytest.mark.parametrize("sizes", [(5, 4), (4, 6)], ids=["fewer rows", "more rows"])
def test_models_in_hand_of_other_sizes_share_the_first_ids(sizes: tuple[int, int]) -> None:
    target, draft = random_pair(sizes[0], seed=4).target, random_pair(sizes[1], seed=5).target
    pair, config = ModelPair(target, draft), settings(2, 3, 2, 3)
    assert pair.vocabulary is not None and pair.vocabulary.shared == 4
    results = decode_often(pair, config, 500)
    assert chi_square_p(count_sets(results), Reference(target, PROMPT, config).returned()) > PASS


# A wrong map: exactness cannot show it (any Q is exact), acceptance and equality of distributions do.


def shifted(found: VocabularyMap) -> VocabularyMap:
    """The map with every draft id one off, in both directions."""
    assert found.target_rows is not None and found.draft_rows is not None
    pairs = [
        (target, (draft + 1) % found.draft_size)
        for target, draft in zip(found.target_rows.tolist(), found.draft_rows.tolist(), strict=True)
    ]
    return VocabularyMap.from_pairs(found.size, found.draft_size, pairs)


@pytest.mark.parametrize("engine", ["auto", "transformers"])
@pytest.mark.parametrize("sound", [True, False], ids=["sound", "one off"])
def test_a_turned_copy_of_the_target_is_the_target(sound: bool, engine: str) -> None:
    """A draft that is the target under other ids has Q = P, so that every draft is accepted; not with a map one off."""
    size = 7
    target, draft = small_llama(size), small_llama(size)
    order = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    with torch.no_grad():
        draft.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight[order])
        draft.lm_head.weight.copy_(target.lm_head.weight[order])
    words = LETTERS[:size]
    turned = tokenizer([words[i] for i in order.tolist()])
    pair = ModelPair(target, draft, tokenizer(words), engine=engine, draft_tokenizer=turned)
    if not sound:
        assert pair.drafter is not None and pair.vocabulary is not None
        pair.drafter.vocabulary = shifted(pair.vocabulary)
    results = decode_often(pair, settings(1, 1, 2, 6), 20)
    iterations = [result.stats.iterations for result in results]
    assert set(iterations) == {2} if sound else np.mean(iterations) > 3


def test_a_subset_draft_reports_the_very_q_it_draws_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verifier that is shown a map one off judges by another Q than was drawn from: caught."""
    pair = narrow_pair(4, [3, 1, 0, 2], closeness=-0.5, seed=1)
    config = settings(2, 3, 1, 2)
    expected = Reference(pair.target, PROMPT, config).returned()
    assert chi_square_p(count_sets(decode_often(pair, config, 2000)), expected) > PASS

    def turned(target: Any, draft: Any, picks: Any, **rule: Any) -> Any:
        wrong = decoding.dice.sampling.Joint(draft.parents, draft.tokens, np.roll(draft.probs, 1), draft.weights)
        return judge_layer(target, wrong, picks, **rule)

    monkeypatch.setattr(decoding.loop.rejection_run, "judge_layer", turned)
    assert chi_square_p(count_sets(decode_often(pair, config, 2000)), expected) < CAUGHT


# ---------------------------------------------------------------------------------------- downstream


@pytest.mark.parametrize("warp", ["joint", "beam"])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 4, "top_p": 0.6}], ids=str)
def test_tokens_without_probability_are_in_no_support(warp: str, cuts: dict[str, Any]) -> None:
    """Rows with few finite entries, and one with none, on the host and on the device alike."""
    none = -torch.inf
    logits = torch.tensor([[1.0, none, 0.5, none, none], [none, none, none, none, 2.0], [0.1, 0.2, 0.3, 0.4, 0.5]])
    log_probs = torch.cat([logits.log_softmax(-1), torch.full((1, 5), none)])
    config = DecodingConfig(target_width=1, draft_width=2, warp=warp, **cuts)
    nodes, weights = [3, 5, 7, 9], [-0.5, -1.0, -1.5, 0.0]
    with np.errstate(all="raise", under="ignore"):
        compact = compact_joint(*top_entries(log_probs, config.top_k or 5), nodes, weights, config)
    dense = dense_joint(log_probs, nodes, weights, config)
    assert np.isfinite(compact.weights).all() and compact.probs.min() > 0
    assert compact.probs.sum() == pytest.approx(1)
    assert 9 not in compact.parents and set(compact.tokens[compact.parents == 5]) <= {4}

    def as_dict(joint: Any) -> dict[tuple[int, int], float]:
        return {(int(p), int(t)): q for p, t, q in zip(joint.parents, joint.tokens, joint.probs, strict=True)}

    assert as_dict(compact) == pytest.approx(as_dict(dense), abs=1e-6)


def test_nothing_possible_at_all_is_one_sentence() -> None:
    config = DecodingConfig()
    with pytest.raises(UserError, match="The target model gives every continuation the probability 0"):
        compact_joint(np.full((2, 3), -np.inf), np.zeros((2, 3), dtype=np.int64), [1, 2], [0.0, 0.0], config, "target")


def test_prompts_hold_the_targets_tokens() -> None:
    """Ids beyond the draft's are fine in a prompt, ids beyond the target's are not."""
    pair = ModelPair(small_llama(9), small_llama(5, seed=1))
    config = DecodingConfig(target_width=2, draft_width=3, draft_depth=2, max_new_tokens=5, eos_token_id=-1)
    (result,) = DSBDDecoder(pair, config).generate([[8, 3, 7]], torch.Generator().manual_seed(0))
    assert len(result.sequences[0]) == 5
    pair = ModelPair(small_llama(5), small_llama(9, seed=1))
    with pytest.raises(UserError, match="token id 7, outside the vocabulary of 5"):
        DSBDDecoder(pair, config).generate([[7]])


def test_scores_under_a_map_are_the_models_own() -> None:
    """What the scorer gives at nodes is the draft's softmax over the tokens it shares, whatever path leads there."""
    draft = small_llama(6, seed=2)
    found = VocabularyMap.from_pairs(8, 6, [(7, 0), (0, 1), (3, 2), (2, 3)])
    scorer = ForestScorer(draft, rows=1, longest_prompt=3, spare_slots=8, vocabulary=found)
    forest = decoding.loop.prompt_run.TokenForest()
    with torch.inference_mode():
        scorer.open(0, [3, 7, 2], forest)
        node = forest.child(forest.child(0, 0), 5)  # 5: the draft lacks it
        scorer.score({0: [node]})
        got = scorer.log_probs(0, [node])[0]
        logits: Tensor = draft(input_ids=torch.tensor([[2, 0, 3, 1, 0]])).logits[0, -1]
    expected = torch.full((8,), -torch.inf)
    expected[[7, 0, 3, 2]] = logits[:4].log_softmax(-1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    scorer.close()


# ------------------------------------------------------------------------------------ saved and loaded


def saved(model: LlamaForCausalLM, words: PreTrainedTokenizerFast, directory: Path) -> str:
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("rows", "words", "shared", "by"),
    [
        (12, tokenizer("abcdefgh"), 10, "id"),  # Qwen: one tokenizer, other padding
        (8, tokenizer("abcdefgh"), 8, "id"),
        (6, tokenizer("abcd"), 4, "token"),  # rows 4 and 5 are nothing to the draft, and letters to the target
        (4, tokenizer("abcd"), 4, "id"),
        (8, tokenizer("hgfedcba"), 8, "token"),
        (8, tokenizer("cag"), 3, "token"),
        (9, tokenizer("abcdefgh", ["<tool>"]), 8, "token"),
    ],
    ids=[
        "more padding",
        "less padding",
        "first tokens, padded",
        "first tokens",
        "turned",
        "few",
        "a special token more",
    ],
)
def test_checkpoints_load_and_decode(
    rows: int, words: PreTrainedTokenizerFast, shared: int, by: str, tmp_path: Path
) -> None:
    target = saved(small_llama(10), tokenizer("abcdefgh"), tmp_path / "target")
    draft = saved(small_llama(rows, seed=1), words, tmp_path / "draft")
    pair = ModelPair.load(target, draft, device="cpu", dtype="float32")
    assert pair.vocabulary is not None
    assert pair.vocabulary.describe() == {"draft_size": rows, "shared": shared, "by": by}
    config = settings(2, 3, 2, 3)
    results = decode_often(pair, config, 300)
    assert all(len(result.sequences) == 2 for result in results)
    assert chi_square_p(count_sets(results), Reference(pair.target, PROMPT, config).returned()) > PASS
