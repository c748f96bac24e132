"""N-grams beside a draft: Q as written down here, exact output, and what happens where one of the two is silent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import decoding.dice.sampling
from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError, beam_sample
from decoding.forest.node_scorer import ScorerOptions
from decoding.forest.tree import TokenForest
from decoding.loop.processing import Rules
from decoding.pairs.drafts import MixedDraft, ModelDraft, named_draft
from decoding.pairs.drafts.mixed import WEIGHTS, MixedScorer
from decoding.pairs.drafts.ngram import NgramDraft, NgramIndex
from tests.decoding.pairs.test_feature_draft import feature_pair
from tests.decoding.stubs import seeded, settings, small_llama

REPEATING = [1, 2, 3, 1, 2, 4, 1, 2]
PATHS = [[3], [4], [5], [3, 1], [3, 1, 2], [5, 1]]  # after the prompt: with matches of 1, 2 and 3 tokens, and without


def mixed_pair(vocabulary: int = 9, **draft: Any) -> ModelPair:
    """A target, and a model of its size that guesses badly, beside n-grams."""
    target = small_llama(vocabulary)
    return ModelPair(target, MixedDraft(ModelDraft(small_llama(vocabulary, seed=1, **draft))))


@torch.inference_mode()
def opened(pair: ModelPair, top: int | None, vocabulary: int, **options: Any) -> tuple[MixedScorer, list[int], Any]:
    """The scorer of a prompt with some nodes scored, these nodes, and the index that n-grams are looked up in."""
    forest = TokenForest()
    asked = ScorerOptions(1, len(REPEATING), 30, top=vocabulary if top else None, **options)
    made: Any = pair.scorers(asked, True, top)
    for scorer in made.values():
        scorer.open(0, REPEATING, forest)
    nodes = [0]
    for path in PATHS:
        node = 0
        for token in path:
            node = forest.child(node, token)
        nodes.append(node)
    made["draft"].score({0: nodes})
    index = NgramIndex(REPEATING, forest, 3)
    for node in nodes:
        index.add(node)
    return made["draft"], nodes, index


def expected_row(own: torch.Tensor, shares: dict[int, float], longest: int) -> np.ndarray:
    """Q after one node, from the draft's own log-probabilities [V]."""
    row = own.double().exp().numpy()
    if longest:
        row *= 1 - WEIGHTS[longest - 1]
        for token, share in shares.items():
            row[token] += WEIGHTS[longest - 1] * share
    return row


@pytest.mark.parametrize("top", [None, 9, 3])
def test_q_is_the_mixture(top: int | None) -> None:
    """At every node; of `top` tokens, only what is among the draft's own or the n-grams' likeliest can be known."""
    pair = mixed_pair()
    scorer, nodes, index = opened(pair, top, 9)
    plain = ModelPair(pair.target, pair.draft)
    own, _, _ = opened(plain, None, 9)
    longest = [index.longest(node) for node in nodes]
    assert set(longest) == {0, 1, 2, 3}
    found = zip(own.log_probs(0, nodes), nodes, longest, strict=True)
    rows = np.stack([expected_row(row, index.distribution(node), n) for row, node, n in found])
    np.testing.assert_allclose(rows.sum(1), 1, rtol=1e-6)  # float32 softmax
    if top is None:
        np.testing.assert_allclose(scorer.log_probs(0, nodes).exp().numpy(), rows, rtol=1e-5)  # float32
        return
    values, tokens = scorer.tops(0, nodes)
    assert values.shape[1] <= top
    assert (np.diff(values) <= 0).all(), "best first"
    for row, logs, ids in zip(rows, values, tokens, strict=True):
        there = logs > -np.inf
        assert len(set(ids[there].tolist())) == there.sum(), "different tokens"
        if top == 9:
            np.testing.assert_allclose(np.exp(logs), row[ids], rtol=1e-5)
        else:  # a token that is not among the draft's likeliest lacks the draft's share
            assert (np.exp(logs[there]) <= row[ids[there]] * (1 + 1e-5)).all()


def test_a_full_draft_leaves_the_ngrams() -> None:
    """A draft whose context has ended proposes nothing more; n-grams go on, and tokens stay the target's."""
    pair = mixed_pair(max_position_embeddings=10)
    config = settings(2, 3, 2, 20, verification="shared_noise")
    (result,) = DSBDDecoder(pair, config).generate([REPEATING], seeded())
    (alone,) = beam_sample(pair.target, [REPEATING], config, seeded())
    assert result.sequences == alone.sequences
    scorer, nodes, index = opened(pair, 9, 9, keep_hidden=True)
    deep = nodes[1 + PATHS.index([3, 1, 2])]
    assert scorer.other.proposes(0, [0])
    assert not scorer.other.proposes(0, [deep])
    assert scorer.proposes(0, [deep])
    values, tokens = scorer.tops(0, [deep])
    shares = {int(t): float(np.exp(v)) for v, t in zip(values[0], tokens[0], strict=True) if v > -np.inf}
    assert shares == pytest.approx(index.distribution(deep))


MODES = {
    "sampling": settings(3, 6, 3, 20, verification="shared_noise"),
    "top-k": settings(3, 6, 3, 20, verification="shared_noise", top_k=4),
    "transformers' sampling": settings(3, 6, 2, 20, verification="shared_noise", oversample=2, warp="beam", top_k=4),
    "search": settings(3, 6, 2, 20, mode="beam_search"),
}


@pytest.mark.parametrize("host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_the_targets(mode: str, host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone and in a batch, by a model and by a draft that reads the target's states."""
    if not host:
        monkeypatch.setattr(decoding.dice.sampling, "HOST_VOCABULARY", 1)
    config: DecodingConfig = MODES[mode]
    prompts = [REPEATING, [5, 5, 5], [7]]
    with_states = feature_pair()
    assert with_states.drafter is not None
    for pair in (mixed_pair(), ModelPair(with_states.target, MixedDraft(with_states.drafter))):
        drafted = DSBDDecoder(pair, config).generate(prompts, [seeded(i) for i in range(3)], batch_size=2)
        alone = beam_sample(pair.target, prompts, config, [seeded(i) for i in range(3)])
        assert [result.sequences for result in drafted] == [result.sequences for result in alone]
        assert sum(sum(result.stats.accepted) for result in drafted) > 10


class Only(LogitsProcessor):
    """Two tokens, which the prompt does not hold."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        banned = torch.full_like(scores, -torch.inf)
        banned[:, 6:8] = scores[:, 6:8]
        return banned


def test_what_processors_forbid_is_not_proposed() -> None:
    """N-grams that are all forbidden leave Q to the draft, which is accepted."""
    rules = [Rules(REPEATING, LogitsProcessorList([Only()]))]
    config = settings(2, 4, 2, 12, verification="shared_noise", top_k=4)
    (result,) = DSBDDecoder(mixed_pair(), config).generate([REPEATING], seeded(), rules=rules)
    assert {token for sequence in result.sequences for token in sequence} <= {6, 7}
    assert sum(result.stats.accepted) > 10


def test_names_and_fingerprints() -> None:
    """As users write it, in any pair; two settings are two drafts."""
    target = small_llama(9, layers=3)
    texts = ["ngram:3+layers:1", "ngram:4+layers:1", "ngram:3+layers:2", "layers:1"]
    pairs = [ModelPair(target, text) for text in texts]
    assert [pair.draft_name for pair in pairs] == texts
    assert ModelPair(target, "ngram+layers:1").draft_name == texts[0]
    assert len({pair.fingerprint for pair in pairs}) == 4
    assert pairs[0].describe()["draft"] == "ngram:3+layers:1"
    assert isinstance(named_draft("ngram+tests.decoding.feature_draft.FeatureDraft", target), MixedDraft)
    for text in ("ngram+nothing", "ngram:0+layers:1", "layers:1+ngram", "ngram+layers:9"):
        with pytest.raises(UserError):
            ModelPair(target, text)
    assert MixedDraft(NgramDraft()).ngrams.max_ngram == 3
