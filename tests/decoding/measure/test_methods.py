"""Methods: each gives the same kind of result, exactly as long as asked, reproducible by its generator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from decoding import DecodingConfig, ModelPair, RandomWidth, UserError
from decoding.measure.methods import METHODS, policy_method
from decoding.measure.transformers_generate import hf_generate
from tests.decoding.stubs import chi_square_p, seeded
from tests.small_pair import small_pair

PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21, 22]]
CONFIG = DecodingConfig(target_width=3, draft_width=4, draft_depth=2, max_new_tokens=7, top_k=10, eos_token_id=-1)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return small_pair()


@pytest.mark.parametrize("name", [name for name in METHODS if name != "ct2_beam_search"])  # test_ctranslate2.py
def test_every_method_gives_the_length_asked_for_and_is_reproducible(pair: ModelPair, name: str) -> None:
    config = CONFIG.with_changes(verification="shared_noise") if name == "key_gap" else CONFIG  # it goes by the noise
    generate = METHODS[name](pair, config)
    results = generate(PROMPTS, seeded())
    again = [result.sequences for result in generate(PROMPTS, seeded())]
    assert again == [result.sequences for result in results] or name == "bandit"  # which goes by the clock, and learns
    others = [[result.sequences for result in generate(PROMPTS, seeded(seed))] for seed in (1, 2)]
    drawn = [result.sequences for result in results] not in others
    assert drawn != name.endswith("beam_search"), "seeds matter, but to beam search"
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert [len(sequence) for sequence in result.sequences] == [7]
        assert result.finished == [False]
        assert (result.stats.new_tokens, result.stats.prompt_tokens) == (7, len(prompt))
        assert result.stats.total_seconds > 0
        assert 1 <= result.stats.block_efficiency <= CONFIG.draft_depth + 1 or name == "hf_assisted"
        assert result.stats.target_calls <= 7
        assert result.stats.kv_slots_end > len(prompt)


def test_global_random_numbers_are_left_alone(pair: ModelPair) -> None:
    before = torch.get_rng_state()
    hf_generate(pair, PROMPTS, CONFIG, seeded(), num_beams=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.6}])
def test_transformers_samples_what_the_config_says(changes: dict[str, Any]) -> None:
    """First tokens against the softmax after temperature, top-k and top-p; the model's own settings do not count."""
    pair = small_pair()
    pair.target.generation_config.update(temperature=0.01, top_k=1, repetition_penalty=9.0, do_sample=True)
    own = pair.target.generation_config
    config = CONFIG.with_changes(**{"top_k": None, **changes}, target_width=1, max_new_tokens=1)
    with torch.inference_mode():
        logits = pair.target(torch.tensor([PROMPTS[0]])).logits[0, -1].double() / config.temperature
    ranked, order = logits.softmax(-1).sort(descending=True)
    ranked[config.top_k or len(ranked) :] = 0
    ranked /= ranked.sum()
    if config.top_p is not None:
        ranked[ranked.cumsum(0) - ranked >= config.top_p] = 0
    exact = {int(token): float(p) for token, p in zip(order, ranked / ranked.sum(), strict=True) if p > 0}
    results = hf_generate(pair, [PROMPTS[0]] * 300, config, seeded())
    counts = Counter(result.sequences[0][0] for result in results)
    assert chi_square_p(counts, exact) > 1e-4  # a fixed seed; wrong settings give 0
    assert pair.target.generation_config is own


def test_eos_ends_hypotheses_and_minus_one_never_does(pair: ModelPair) -> None:
    ends = list(range(0, pair.vocab_size, 2))  # every other token
    config = CONFIG.with_changes(eos_token_id=ends, max_new_tokens=12, num_return_sequences=3)
    for generate in (METHODS["hf_beam_sample"](pair, config), METHODS["hf_sample"](pair, config)):
        (result, _) = generate(PROMPTS, seeded())
        assert any(result.finished)
        for sequence, finished in zip(result.sequences, result.finished, strict=True):
            assert [token in ends for token in sequence] == [False] * (len(sequence) - 1) + [finished]
    free = config.with_changes(eos_token_id=-1)
    (result, _) = METHODS["hf_beam_sample"](pair, free)(PROMPTS, seeded())
    assert [len(sequence) for sequence in result.sequences] == [12] * 3
    own = config.with_changes(eos_token_id=None)
    pair.target.generation_config.eos_token_id = ends
    try:
        (result, _) = METHODS["hf_sample"](pair, own)(PROMPTS, seeded())
    finally:
        pair.target.generation_config.eos_token_id = 0
    assert result.finished == [True]


def test_assisted_sampling_counts_the_calls_of_both_models(pair: ModelPair) -> None:
    same = ModelPair(pair.target, pair.target, pair.tokenizer)  # every draft is accepted
    (result, _) = METHODS["hf_assisted"](same, CONFIG.with_changes(max_new_tokens=16))(PROMPTS, seeded())
    assert result.stats.block_efficiency < 16
    (result, _) = METHODS["hf_assisted"](pair, CONFIG)(PROMPTS, seeded())
    assert result.stats.draft_calls > 0
    assert result.stats.seconds["other"] == result.stats.total_seconds


def test_methods_of_width_one_narrow_the_whole_config() -> None:
    config = CONFIG.with_changes(min_width=2, num_return_sequences=3)
    chain = METHODS["speculative"].configure(config, {"draft_depth": 2})
    assert (chain.target_width, chain.draft_width, chain.min_width, chain.num_return_sequences) == (1, 1, 1, 1)
    many = METHODS["multi_draft"].configure(config, {"draft_width": 4})
    assert (many.target_width, many.draft_width) == (1, 4)
    wide = METHODS["hf_beam_sample"].configure(config, {"target_width": 6})
    assert (wide.target_width, wide.draft_width) == (6, 6)


def test_policy_method_runs_the_policy_it_is_given(pair: ModelPair) -> None:
    generate = policy_method(RandomWidth, make=lambda: RandomWidth(seed=3, full_share=0.0))(pair, CONFIG)
    results = generate(PROMPTS, seeded())
    assert len({width for result in results for width in result.stats.target_widths}) > 1


def test_transformers_refuses_the_same_prompts(pair: ModelPair) -> None:
    for prompts, sentence in (
        (([],), "is empty"),
        (([10**6],), "outside the vocabulary"),
    ):
        with pytest.raises(UserError, match=sentence):
            METHODS["hf_sample"](pair, CONFIG)(list(prompts), seeded())
