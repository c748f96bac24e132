"""ForestCache and ForestScorer on a small random Llama: a forest pass is a sequential pass, and slots come back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import decoding.loop.prompt_run
from decoding import DecodingConfig, DSBDDecoder, ModelPair, RandomWidth, beam_sample
from decoding.forest.cache import QUERY_BUCKETS, SLOT_BUCKET, SLOT_STEP, ForestCache
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from tests.decoding.stubs import Reference, chi_square_p, llama_pair, open_scorers, settings, small_llama

PROMPT = [1, 2, 0, 3, 2]


@torch.inference_mode()
def alone(
    model: LlamaForCausalLM, path: list[int], temperature: float = 1.0, prompt: list[int] = PROMPT
) -> torch.Tensor:
    """Log-probabilities after prompt + path from a plain pass without any cache."""
    logits = model(input_ids=torch.tensor([[*prompt, *path]]), use_cache=False).logits[0, -1]
    return (logits.float() / temperature).log_softmax(-1)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    # float32 sums in another order: 16 channels and 2 layers leave errors of some 1e-6.
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


ENGINES = pytest.mark.parametrize("engine", ["auto", "transformers"])


@ENGINES
@pytest.mark.parametrize("prompts", [[PROMPT], [PROMPT, [6], [2, 4, 1, 1, 0, 5, 3, 3, 6]]], ids=["one row", "rows"])
@torch.inference_mode()
def test_any_order_of_passes_scores_every_node_as_if_alone(engine: str, prompts: list[list[int]]) -> None:
    """Random forests, scored some nodes at a time, some with unscored ancestors, some after slots were used again."""
    model, random = small_llama(), np.random.default_rng(0)
    longest = max(map(len, prompts))
    scorer = ForestScorer(model, len(prompts), longest, spare_slots=0, temperature=0.8, engine=engine)
    forests = [TokenForest() for _ in prompts]
    for row, (prompt, forest) in enumerate(zip(prompts, forests, strict=True)):
        scorer.open(row, prompt, forest)
        close(scorer.log_probs(row, [0])[0], alone(model, [], 0.8, prompt))
    living, scored = [[0] for _ in prompts], 0
    for step in range(25):
        rows = [row for row in range(len(prompts)) if len(prompts) == 1 or (step + row) % 3]  # some rows wait
        wanted: dict[int, list[int]] = {}
        for row in rows:
            forest = forests[row]
            before = len(forest)
            for _ in range(random.integers(1, 9)):
                forest.child(int(random.choice(living[row][-12:])), int(random.integers(7)))
            made = list(range(before, len(forest))) or [forest.child(living[row][-1], len(forest) % 7)]
            wanted[row] = [*made, forest.child(made[-1], int(random.integers(7)))]  # the last with its parent
        scored += scorer.score(wanted)
        assert scorer.score(wanted) == 0, "a node is scored at most once"
        for row, nodes in wanted.items():
            forest = forests[row]
            for found, node in zip(scorer.log_probs(row, nodes), nodes, strict=True):
                close(found, alone(model, forest.path(node), 0.8, prompts[row]))
            keep = {int(node) for node in random.choice(nodes, min(3, len(nodes)), replace=False)}
            dead = forest.release([*nodes, *living[row]], keep)
            scorer.forget(row, dead, sorted(keep))
            living[row] = [0, *sorted(set(keep))]
            for node in keep:
                while node > 0:
                    assert scorer.cache.holds(row, node)
                    node = forest.parents[node]
    assert scored > 100
    for row, prompt in enumerate(prompts):
        assert scorer.cache.slots_peak(row) < len(prompt) + 64, "dead slots are used again"


@ENGINES
@torch.inference_mode()
def test_the_buffer_grows_and_keeps_what_it_holds(engine: str) -> None:
    """Every row's slots move to the larger buffer, not only those of the row that needs it."""
    model = small_llama()
    scorer = ForestScorer(model, rows=2, longest_prompt=len(PROMPT), spare_slots=0, engine=engine)
    assert scorer.cache.capacity == SLOT_STEP
    forests = [TokenForest(), TokenForest()]
    for row, forest in enumerate(forests):
        scorer.open(row, PROMPT, forest)
    early = [forest.child(0, 3) for forest in forests]
    scorer.score({0: [early[0]], 1: [early[1]]})
    node = early[0]
    for token in [1, 4, 1, 5, 3] * 30:  # one path of 151 nodes
        node = forests[0].child(node, token)
        if forests[0].depths[node] % 7 == 0:
            scorer.score({0: [node]})
    scorer.score({0: [node]})
    assert scorer.cache.capacity >= len(PROMPT) + 151
    assert scorer.cache.slots_used(0) == len(PROMPT) + 151
    close(scorer.log_probs(0, [node])[0], alone(model, forests[0].path(node)))
    late = forests[1].child(early[1], 5)
    scorer.score({1: [late]})
    close(scorer.log_probs(1, [late])[0], alone(model, [3, 5]))
    assert scorer.cache.slots_used(1) == len(PROMPT) + 2


def seen_by(cache: ForestCache, wanted: dict[int, tuple[list[int], list[int]]]) -> dict[tuple[int, int], list[int]]:
    """Place nodes; the slots that each sees."""
    placement = cache.place(wanted)
    base_rows, mask_rows = ([cache.filler_mask_row] * (placement.rows * placement.queries) for _ in range(2))
    for place, base_row, mask_row in zip(placement.places, placement.base_rows, placement.mask_rows, strict=True):
        base_rows[place], mask_rows[place] = base_row, mask_row
    given = map(torch.tensor, (base_rows, mask_rows, placement.bits))
    everything = cache.masks(*given, placement.rows, placement.read)  # [rows, 1, N, S]
    assert everything.shape == (placement.rows, 1, placement.queries, placement.read)
    masks = everything.flatten(0, 2)[placement.places] == 0  # [T, S]
    for (row, _), flat, mask in zip(placement.order, placement.slots, masks, strict=True):
        assert flat // cache.capacity == row, "a row writes to its own slots"
        assert mask[flat % cache.capacity], "a node sees itself"
    return {key: mask.nonzero().flatten().tolist() for key, mask in zip(placement.order, masks, strict=True)}


@pytest.mark.parametrize("static", [False, True])
def test_slots_are_taken_lowest_first_and_masks_hold_only_ancestors(static: bool) -> None:
    cache = ForestCache(2, 4, spare=8, device=torch.device("cpu"), dtype=torch.float32, static=static)
    cache.open(0, 3)
    cache.open(1, 4)
    prompt = cache.prompt_mask(1, 3)[0, 0] == 0
    assert [row.nonzero().flatten().tolist() for row in prompt] == [[0, 1], [0, 1, 2]]
    assert seen_by(cache, {0: ([1, 2, 3], [0, 0, 1]), 1: ([1, 2], [0, 1])}) == {
        (0, 1): [0, 1, 2, 3],
        (0, 2): [0, 1, 2, 4],
        (0, 3): [0, 1, 2, 3, 5],
        (1, 1): [0, 1, 2, 3, 4],
        (1, 2): [0, 1, 2, 3, 4, 5],
    }
    assert (cache.slots_used(0), cache.slots_used(1)) == (6, 6)
    cache.release(0, [2, 9])
    assert not cache.holds(0, 2)
    assert cache.holds(1, 2)
    assert cache.slots_used(0) == 5
    assert seen_by(cache, {0: ([4, 5], [3, 1])}) == {(0, 4): [0, 1, 2, 3, 4, 5], (0, 5): [0, 1, 2, 3, 6]}
    assert (cache.slots_peak(0), cache.slots_peak(1)) == (7, 6)
    cache.close(1)
    cache.open(1, 2)
    assert seen_by(cache, {1: ([1], [0])}) == {(1, 1): [0, 1, 2]}, "nothing of the prompt that had the row"
    assert (cache.slots_used(1), cache.slots_peak(1)) == (3, 3)


def test_a_grown_cache_keeps_its_masks() -> None:
    cache = ForestCache(3, 4, spare=2, device=torch.device("cpu"), dtype=torch.float32)
    for row, length in enumerate((4, 2, 3)):
        cache.open(row, length)
        seen_by(cache, {row: ([1, 2], [0, 1])})
    path = list(range(3, 100))
    grown = seen_by(cache, {1: (path, [node - 1 for node in path])})
    assert cache.capacity >= 2 + 99
    assert grown[1, 99] == list(range(2 + 99))
    assert seen_by(cache, {0: ([3], [2]), 2: ([3], [1])}) == {(0, 3): [0, 1, 2, 3, 4, 5, 6], (2, 3): [0, 1, 2, 3, 5]}


@pytest.mark.parametrize("static", [False, True])
def test_fillers_see_slot_0_and_write_where_no_node_is(static: bool) -> None:
    cache = ForestCache(3, 5, spare=20, device=torch.device("cpu"), dtype=torch.float32, static=static)
    for row in range(3):
        cache.open(row, 5)
    nodes = list(range(1, 21))
    placement = cache.place({row: (nodes, [0] * 20) for row in range(3)})
    assert not set(placement.slots) & {cache.filler_slot(row) for row in range(3)}
    assert [cache.filler_slot(row) // cache.capacity for row in range(3)] == [0, 1, 2]
    filler = torch.tensor([cache.filler_mask_row])
    for _ in range(2):
        mask = cache.masks(filler, filler, torch.tensor([], dtype=torch.int64), 1, placement.read)
    assert (mask[0, 0, 0] == 0).nonzero().flatten().tolist() == [0]


def test_static_shapes_are_buckets() -> None:
    cache = ForestCache(2, 5, spare=1500, device=torch.device("cpu"), dtype=torch.float32, static=True)
    for row in range(2):
        cache.open(row, 5)
    queries, slots, first, parent = set(), set(), 1, 0
    for count in [1, 2, 3, 5, 9, 17, 33, 65, 129, 300, 1, 3]:
        nodes = list(range(first, first + count))
        placement = cache.place({1: (nodes, [parent] * count)})
        assert (placement.first_row, placement.rows) == (0, 2), "all rows, whichever has nodes"
        assert count <= placement.queries < 2 * max(count, 129)
        assert placement.read >= 5 + first + count - 1
        queries.add(placement.queries)
        slots.add(placement.read)
        first += count
    assert queries == {*QUERY_BUCKETS, 256, 384}
    assert slots == {SLOT_BUCKET, 2 * SLOT_BUCKET, 4 * SLOT_BUCKET}


def check_slots(run: Any) -> None:
    """After an iteration each cache holds the prompt and scored ancestors of living beams, one slot each."""
    wanted = {0}
    for beam in run.beams:
        node = beam.node
        while node > 0:
            wanted.add(node)
            node = run.forest.parents[node]
    for scorer in open_scorers(run):
        table = scorer.cache._tables[run.row]
        slots = table.slot_of
        assert set(slots) <= wanted
        assert len(set(slots.values())) == len(slots)
        assert not set(slots.values()) & set(table.free)
        # All but the newest layers must have been scored by the target, or the next pass would score them twice.
        assert scorer is not run.target or {n for n in wanted if run.forest._children[n]} <= set(slots)


@pytest.mark.parametrize("changes", [{}, {"one_beam_cache": True}, {"exact": True}, {"replacement": True}], ids=str)
def test_slots_hold_living_paths_only(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = decoding.loop.prompt_run.PromptRun
    prune, checks = run._prune, []

    def checked(self: Any) -> None:
        prune(self)
        check_slots(self)
        checks.append(1)

    monkeypatch.setattr(run, "_prune", checked)
    config = settings(4, 6, 3, 40, eos_token_id=2, top_k=8, **changes)
    results = DSBDDecoder(llama_pair(), config, RandomWidth()).generate([PROMPT] * 6, torch.Generator().manual_seed(0))
    assert len(checks) == sum(result.stats.iterations for result in results)
    for result in results:
        stats = result.stats
        # At most: the living paths, and one forest with the beams it grew from.
        assert stats.kv_slots_end <= len(PROMPT) + stats.new_tokens * 4
        assert stats.kv_slots_peak <= len(PROMPT) + stats.new_tokens * 4 + 6 * 3 + 4


def test_widths_share_slots() -> None:
    """Width 8 costs about one sequence: beams share their ancestors (design section 6)."""
    config = settings(8, 10, 2, 100, top_k=10)
    (result,) = DSBDDecoder(llama_pair(), config).generate([PROMPT], torch.Generator().manual_seed(0))
    # A random model's beams fork early and long; those of a trained one share nearly all (see the README's numbers).
    assert result.stats.kv_slots_end <= 2 * (len(PROMPT) + 100)


def test_beams_through_the_real_cache_follow_beam_sampling() -> None:
    """The chi-square test of test_exactness.py with attention, GQA and slots that are used again."""
    pair = llama_pair(vocabulary=4)
    config = settings(2, 3, 2, 3, eos_token_id=3)
    results = DSBDDecoder(pair, config).generate([PROMPT] * 700, torch.Generator().manual_seed(0))
    assert {0, 1, 2} <= {accepted for result in results for accepted in result.stats.accepted}
    counts = Counter(frozenset(map(tuple, result.sequences)) for result in results)
    assert chi_square_p(counts, Reference(pair.target, PROMPT, config).returned()) > 1e-3  # fixed seed


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0])
def test_scores_are_the_models_own_log_probabilities(length_penalty: float) -> None:
    """score = Σ log p(token | prefix) / length**length_penalty, recomputed from plain passes, end tokens included."""
    pair = llama_pair()
    config = settings(4, 6, 3, 12, eos_token_id=5, temperature=0.7, top_k=9, length_penalty=length_penalty)
    finished = 0
    for result in DSBDDecoder(pair, config).generate([PROMPT] * 4, torch.Generator().manual_seed(0)):
        for sequence, score, ended in zip(result.sequences, result.scores, result.finished, strict=True):
            total = sum(float(alone(pair.target, sequence[:i], 0.7)[token]) for i, token in enumerate(sequence))
            assert score == pytest.approx(total / len(sequence) ** length_penalty, abs=1e-3)
            assert ended == (sequence[-1] == 5)
            finished += ended
    assert finished > 0


@ENGINES
def test_hidden_states_are_the_last_layers(engine: str) -> None:
    """What contexts hold is the output of the final norm, as `output_hidden_states` gives it."""
    model, forest = small_llama(), TokenForest()
    scorer = ForestScorer(model, 2, len(PROMPT), spare_slots=8, keep_hidden=True, engine=engine)

    def expected(*paths: list[int]) -> torch.Tensor:
        states = [
            model(input_ids=torch.tensor([[*PROMPT, *path]]), output_hidden_states=True).hidden_states[-1][0, -1]
            for path in paths
        ]
        return torch.stack(states).mean(0)

    with torch.inference_mode():
        for row in range(2):
            scorer.open(row, PROMPT, forest)
        nodes = [forest.child(0, 4), forest.child(0, 5)]
        scorer.score({0: nodes, 1: nodes[1:]})
        for row, some, paths in ((0, nodes, [[4], [5]]), (1, nodes, [[5]]), (0, [0], [[]])):
            found = scorer.hidden(row, some)
            assert found is not None
            close(found.mean(0), expected(*paths))
        assert scorer.hidden(0, [99]) is None
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
    pair = llama_pair()
    config = DecodingConfig(target_width=4, draft_width=6, draft_depth=3, max_new_tokens=20, eos_token_id=-1, top_k=9)
    pair = ModelPair(pair.target.to("cuda"), pair.draft.to("cuda"))
    (result,) = DSBDDecoder(pair, config).generate([PROMPT], torch.Generator().manual_seed(0))
    model = pair.target.to("cpu")
    total = sum(float(alone(model, result.sequences[0][:i])[t]) for i, t in enumerate(result.sequences[0]))
    assert result.scores[0] == pytest.approx(total / 20, abs=1e-3)
