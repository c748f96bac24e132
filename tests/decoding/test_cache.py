"""ForestCache and ForestScorer on a small random Llama: a forest pass is a sequential pass, and slots come back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import decoding.decoder
from decoding import DecodingConfig, DSBDDecoder, ModelPair, RandomWidth, beam_sample
from decoding.cache import SLOT_STEP, ForestCache
from decoding.forest import TokenForest
from decoding.scorer import ForestScorer
from tests.decoding.stubs import Reference, chi_square_p

PROMPT = [1, 2, 0, 3, 2]


def small_llama(vocabulary: int = 7, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """Random, grouped-query attention, sharp enough that tokens and positions matter."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    torch.set_rng_state(state)
    return model


def small_pair(vocabulary: int = 7) -> ModelPair:
    """The draft is the target with noise on its weights, so that drafts are sometimes right."""
    target, draft = small_llama(vocabulary), small_llama(vocabulary)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return ModelPair(target, draft)


@torch.inference_mode()
def alone(model: LlamaForCausalLM, path: list[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities after prompt + path from a plain pass without any cache."""
    logits = model(input_ids=torch.tensor([[*PROMPT, *path]]), use_cache=False).logits[0, -1]
    return (logits.float() / temperature).log_softmax(-1)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # float32 sums in another order: 16 channels and 2 layers leave errors of some 1e-6.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_any_order_of_passes_scores_every_node_as_if_alone() -> None:
    """Random forests, scored some nodes at a time, some with unscored ancestors, some after slots were used again."""
    model, random = small_llama(), np.random.default_rng(0)
    forest = TokenForest()
    scorer = ForestScorer(model, PROMPT, forest, spare_slots=0, temperature=0.8)
    scorer.prefill()
    close(scorer.log_probs([0])[0], alone(model, [], 0.8))
    living, scored = [0], 0
    for _ in range(25):
        before = len(forest)
        for _ in range(random.integers(1, 9)):
            forest.child(int(random.choice(living[-12:])), int(random.integers(7)))
        made = list(range(before, len(forest))) or [forest.child(living[-1], len(forest) % 7)]
        nodes = [*made, forest.child(made[-1], int(random.integers(7)))]  # the last with its parent in the same pass
        fresh = scorer.score(nodes)
        scored += fresh
        assert scorer.score(nodes) == 0, "a node is scored at most once"
        for row, node in zip(scorer.log_probs(nodes), nodes, strict=True):
            close(row, alone(model, forest.path(node), 0.8))
        keep = {int(node) for node in random.choice(nodes, min(3, len(nodes)), replace=False)}
        dead = forest.release([*nodes, *living], keep)
        scorer.forget(dead, sorted(keep))
        living = [0, *sorted(set(keep))]
        for node in keep:
            while node > 0:
                assert scorer.cache.holds(node)
                node = forest.parents[node]
    assert scored > 100
    assert scorer.cache.slots_peak < len(PROMPT) + 64, "dead slots are used again"


@torch.inference_mode()
def test_the_buffer_grows_and_keeps_what_it_holds() -> None:
    model, forest = small_llama(), TokenForest()
    scorer = ForestScorer(model, PROMPT, forest, spare_slots=0, temperature=1.0)
    scorer.prefill()
    assert scorer.cache.capacity == SLOT_STEP
    node = 0
    for token in [3, 1, 4, 1, 5] * 30:  # one path of 150 nodes, then its end
        node = forest.child(node, token)
        if forest.depths[node] % 7 == 0:
            scorer.score([node])
    scorer.score([node])
    assert scorer.cache.capacity >= len(PROMPT) + 150
    assert scorer.cache.slots_used == len(PROMPT) + 150
    close(scorer.log_probs([node])[0], alone(model, forest.path(node)))


def test_slots_are_taken_lowest_first_and_masks_hold_only_ancestors() -> None:
    cache = ForestCache(3, 8, num_layers=1, device=torch.device("cpu"), dtype=torch.float32)
    prompt = cache.begin_prompt()[0, 0] == 0
    assert prompt.tolist() == [[True, False, False], [True, True, False], [True, True, True]]
    first = cache.begin_nodes([1, 2, 3], [0, 0, 1])[0, 0] == 0
    assert [row.nonzero().flatten().tolist() for row in first] == [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 2, 3, 5]]
    assert cache.slots_used == 6
    cache.release([2, 9])
    assert not cache.holds(2)
    assert cache.slots_used == 5
    again = cache.begin_nodes([4, 5], [3, 1])[0, 0] == 0
    assert [row.nonzero().flatten().tolist() for row in again] == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6]]
    assert cache.slots_peak == 7


def check_slots(run: Any) -> None:
    """After an iteration each cache holds the prompt and scored ancestors of living beams, one slot each."""
    wanted = {0}
    for beam in run.beams:
        node = beam.node
        while node > 0:
            wanted.add(node)
            node = run.forest.parents[node]
    for scorer in (run.target, run.draft):
        slots = scorer.cache._slot_of
        assert set(slots) <= wanted
        assert len(set(slots.values())) == len(slots)
        assert not set(slots.values()) & set(scorer.cache._free)
        # All but the newest layers must have been scored by the target, or the next pass would score them twice.
        assert scorer is run.draft or {n for n in wanted if run.forest._children[n]} <= set(slots)


@pytest.mark.parametrize("changes", [{}, {"one_beam_cache": True}, {"exact": True}, {"replacement": True}], ids=str)
def test_slots_hold_living_paths_only(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = decoding.decoder._PromptRun
    prune, checks = run._prune, []

    def checked(self: Any) -> None:
        prune(self)
        check_slots(self)
        checks.append(1)

    monkeypatch.setattr(run, "_prune", checked)
    config = DecodingConfig(
        target_width=4, draft_width=6, draft_depth=3, max_new_tokens=40, eos_token_id=2, top_k=8, **changes
    )
    results = DSBDDecoder(small_pair(), config, RandomWidth()).generate([PROMPT] * 6, torch.Generator().manual_seed(0))
    assert len(checks) == sum(result.stats.iterations for result in results)
    for result in results:
        stats = result.stats
        # At most: the living paths, and one forest with the beams it grew from.
        assert stats.kv_slots_end <= len(PROMPT) + stats.new_tokens * 4
        assert stats.kv_slots_peak <= len(PROMPT) + stats.new_tokens * 4 + 6 * 3 + 4


def test_widths_share_slots() -> None:
    """Width 8 costs about one sequence: beams share their ancestors (design section 6)."""
    config = DecodingConfig(
        target_width=8, draft_width=10, draft_depth=2, max_new_tokens=100, eos_token_id=-1, top_k=10
    )
    (result,) = DSBDDecoder(small_pair(), config).generate([PROMPT], torch.Generator().manual_seed(0))
    # A random model's beams fork early and long; those of a trained one share nearly all (see the README's numbers).
    assert result.stats.kv_slots_end <= 2 * (len(PROMPT) + 100)


def test_beams_through_the_real_cache_follow_beam_sampling() -> None:
    """The chi-square test of test_exactness.py with attention, GQA and slots that are used again."""
    pair = small_pair(vocabulary=4)
    config = DecodingConfig(
        target_width=2, draft_width=3, draft_depth=2, max_new_tokens=3, num_return_sequences=2, eos_token_id=3
    )
    results = DSBDDecoder(pair, config).generate([PROMPT] * 700, torch.Generator().manual_seed(0))
    assert {0, 1, 2} <= {accepted for result in results for accepted in result.stats.accepted}
    counts = Counter(frozenset(map(tuple, result.sequences)) for result in results)
    assert chi_square_p(counts, Reference(pair.target, PROMPT, config).returned()) > 1e-3  # fixed seed


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_scores_are_the_models_own_log_probabilities(length_penalty: float) -> None:
    """score = Σ log p(token | prefix) / length**length_penalty, recomputed from plain passes, end tokens included."""
    pair = small_pair()
    config = DecodingConfig(
        target_width=4,
        draft_width=6,
        draft_depth=3,
        max_new_tokens=12,
        temperature=0.7,
        top_k=9,
        eos_token_id=5,
        num_return_sequences=4,
        length_penalty=length_penalty,
    )
    finished = 0
    for result in DSBDDecoder(pair, config).generate([PROMPT] * 4, torch.Generator().manual_seed(0)):
        for sequence, score, ended in zip(result.sequences, result.scores, result.finished, strict=True):
            total = sum(float(alone(pair.target, sequence[:i], 0.7)[token]) for i, token in enumerate(sequence))
            assert score == pytest.approx(total / len(sequence) ** length_penalty, abs=1e-3)
            assert ended == (sequence[-1] == 5)
            finished += ended
    assert finished > 0


def test_hidden_states_are_the_last_layers() -> None:
    """What contexts hold is the output of the final norm, as `output_hidden_states` gives it."""
    model, forest = small_llama(), TokenForest()
    scorer = ForestScorer(model, PROMPT, forest, 8, 1.0, keep_hidden=True)
    try:
        with torch.inference_mode():
            scorer.prefill()
            nodes = [forest.child(0, 4), forest.child(0, 5)]
            scorer.score(nodes)
            expected = torch.stack(
                [
                    model(input_ids=torch.tensor([[*PROMPT, token]]), output_hidden_states=True).hidden_states[-1][
                        0, -1
                    ]
                    for token in (4, 5)
                ]
            )
        found = scorer.hidden(nodes)
        assert found is not None
        close(torch.from_numpy(found), expected.mean(0))
        assert scorer.hidden([99]) is None
    finally:
        scorer.close()
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_beam_sample_of_width_one_matches_generate_greedily() -> None:
    """At a very low temperature one beam is greedy decoding, token for token."""
    model = small_llama()
    config = DecodingConfig(target_width=1, temperature=1e-4, max_new_tokens=30, eos_token_id=-1)
    (result,) = beam_sample(model, [PROMPT], config, torch.Generator().manual_seed(0))
    prompt = torch.tensor([PROMPT])
    expected = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=30, pad_token_id=0
    )
    assert result.sequences[0] == expected[0, len(PROMPT) :].tolist()


@pytest.mark.gpu
def test_gpu_scores_equal_cpu_scores() -> None:
    """Scores on the GPU are those of plain passes there; TF32 off by default, so float32 sums differ little."""
    pair = small_pair()
    config = DecodingConfig(target_width=4, draft_width=6, draft_depth=3, max_new_tokens=20, eos_token_id=-1, top_k=9)
    pair = ModelPair(pair.target.to("cuda"), pair.draft.to("cuda"))
    (result,) = DSBDDecoder(pair, config).generate([PROMPT], torch.Generator().manual_seed(0))
    model = pair.target.to("cpu")
    total = sum(float(alone(model, result.sequences[0][:i])[t]) for i, t in enumerate(result.sequences[0]))
    assert result.scores[0] == pytest.approx(total / 20, abs=1e-3)
