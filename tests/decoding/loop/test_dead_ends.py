"""Dead ends: paths after which nothing may follow, for processors forbid it or all that is left ends the text.

Where the target alone finds a text, so does what drafts, and policies have an answer where nothing can be drafted.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

import decoding.dice.sampling
from decoding import (
    BanditWidth,
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
    WidthPolicy,
)
from decoding.loop.processing import Rules
from tests.decoding.stubs import small_llama

POLICIES: list[WidthPolicy] = [
    FixedWidth(),
    ThresholdWidth(0.9),
    ExpectedWidth(),
    MassWidth(),
    GapWidth(),
    EntropyWidth(),
    RandomWidth(),
    UniformWidth(),
    KeyGapWidth(),
    BanditWidth(),
]
BY_NAME = pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)


class Dead(LogitsProcessor):
    """Nothing follows some tokens, or anything longer than so much."""

    def __init__(self, tokens: list[int], longest: int = 99) -> None:
        self.tokens, self.longest = torch.tensor(tokens), longest

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        dead = torch.isin(input_ids[:, -1], self.tokens) | (input_ids.shape[1] >= self.longest)
        return scores.masked_fill(dead[:, None], -torch.inf)


def decoded(
    pair: ModelPair, config: DecodingConfig, policy: WidthPolicy, prompt: list[int], seed: int, dead: Dead
) -> list[list[int]] | None:
    """The texts; None where there is none."""
    rules = Rules(prompt, LogitsProcessorList([dead]))
    try:
        random = torch.Generator().manual_seed(seed)
        return DSBDDecoder(pair, config, policy).generate([prompt], random, rules=rules)[0].sequences
    except UserError:
        return None


@pytest.mark.parametrize("draft", ["ngram", "model"])
@pytest.mark.parametrize("dense", [False, True], ids=["host", "dense"])
def test_what_drafts_finds_a_text_where_the_target_alone_does(
    draft: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parents whose rows are known to be dead, beside others that the draft is not asked for."""
    monkeypatch.setattr(decoding.dice.sampling, "HOST_VOCABULARY", 4 if dense else 2048)
    pair = ModelPair(small_llama(12), "ngram" if draft == "ngram" else small_llama(12, seed=4))
    config = DecodingConfig(target_width=3, draft_width=6, draft_depth=3, max_new_tokens=16, eos_token_id=-1)
    dead, policy, texts = Dead([3, 4, 5, 6, 7, 8]), FixedWidth(least_share=0.3), 0
    for seed in range(60):
        alone = decoded(pair, config.with_changes(draft_depth=0), policy, [0, 1, 2], seed, dead)
        assert decoded(pair, config, policy, [0, 1, 2], seed, dead) == alone
        texts += alone is not None
    assert 0 < texts < 60


@BY_NAME
@pytest.mark.parametrize(
    "changes", [{"top_k": 1}, {"top_p": 0.01}, {"top_k": 1, "warp": "beam", "target_width": 2}], ids=str
)
def test_a_first_step_that_can_only_end(policy: WidthPolicy, changes: dict[str, object]) -> None:
    target = small_llama(9)
    with torch.inference_mode():
        end = int(target(torch.tensor([[1, 2, 4]])).logits[0, -1].argmax())
    config = DecodingConfig(target_width=1, draft_width=3, draft_depth=2, max_new_tokens=8, eos_token_id=end)
    pair = ModelPair(target, small_llama(9, seed=1))
    (found,) = DSBDDecoder(pair, config.with_changes(**changes), policy).generate([[1, 2, 4]], torch.Generator())
    assert found.sequences == [[end]]


@pytest.mark.parametrize("policy", [p for p in POLICIES if p.name != "key_gap"], ids=lambda policy: policy.name)
@pytest.mark.parametrize("depth", [0, 2])
def test_a_search_whose_beams_are_all_dead_returns_what_ended(policy: WidthPolicy, depth: int) -> None:
    pair = ModelPair(small_llama(9), small_llama(9, seed=4))
    config = DecodingConfig(
        mode="beam_search",
        target_width=3,
        draft_width=6,
        draft_depth=depth,
        max_new_tokens=8,
        eos_token_id=[0, 1, 2, 3],
    )
    assert decoded(pair, config, policy, [1, 2, 3], 0, Dead([], longest=6)) == [[1]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("mode", ["beam_sample", "beam_search"])
def test_what_a_processor_made_is_not_laid_to_the_weights(mode: str, width: int, value: float) -> None:
    class Overflowing(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.index_fill(1, torch.tensor([3]), value)

    config = DecodingConfig(mode=mode, target_width=width, draft_width=4, draft_depth=2, max_new_tokens=4)
    pair, rules = ModelPair(small_llama(9), small_llama(9, seed=4)), Rules([1, 2], LogitsProcessorList([Overflowing()]))
    with pytest.raises(UserError, match="A logits processor made NaN or infinity"):
        DSBDDecoder(pair, config).generate([[1, 2]], torch.Generator(), rules=rules)
