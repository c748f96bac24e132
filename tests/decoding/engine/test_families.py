"""Every family of tests/decoding/families.py decodes as a forest as it decodes one sequence; what cannot is refused.

All weights are random and all seeds fixed, so nothing is flaky. docs/families.md says what is tested here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, FalconForCausalLM

import decoding.engine.graphs
import decoding.engine.positions
from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError
from decoding.engine.forward import PassInputs
from decoding.engine.runner import runner_of
from decoding.forest.cache import ForestCache
from decoding.forest.probe import check_forest_pass
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.pairs.architecture import check_architecture
from tests.decoding.engine.test_graphs import graphed
from tests.decoding.families import (
    FAMILIES,
    PAGE,
    REFUSED,
    SAMPLING,
    SEARCH,
    TREE,
    WINDOW,
    config_of,
    page,
    randomised,
)
from tests.decoding.stubs import Reference, chi_square_p

VOCABULARY = 61
ENDS = list(range(3, VOCABULARY, 6))  # for beam search: one token would hardly be met
PROMPTS = [9, 2, 17]  # tokens
CLOSE = 1e-4  # float32 sums in other orders: at worst 3.4e-5 is seen (Gemma), 1e-5 in most families
WRONG = 0.5  # a window that is off by one changes some log-probability by 1.6 to 11
ALIBI = [name for name, family in FAMILIES.items() if family.positions == "ALiBi"]


def having(test: str) -> Any:
    return pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if test in family.tested])


def tokens_of(count: int, vocabulary: int = VOCABULARY, seed: int = 0) -> list[int]:
    """Without the tokens 0 to 3, so that none ends the prompt."""
    return np.random.default_rng([count, seed]).integers(4, vocabulary, count).tolist()


# A forest's passes are the sequences' own.


@torch.inference_mode()
def largest_difference(model: Any, engine: str = "auto", rounds: int = 12) -> float:
    """Between a random forest's log-probabilities and those of plain passes over its paths, at any node.

    Three prompts of different lengths in a batch, some waiting; only two new beams of each step go on, so that slots
    are used again, and paths grow to more than twice the window.
    """
    size = model.config.get_text_config().vocab_size
    prompts, random = [tokens_of(count, size) for count in PROMPTS], np.random.default_rng(0)
    forests = [TokenForest() for _ in prompts]
    scorer = ForestScorer(model, len(prompts), max(PROMPTS), spare_slots=8, engine=engine)
    for row, (prompt, forest) in enumerate(zip(prompts, forests, strict=True)):
        scorer.open(row, prompt, forest)
    found = [{(): scorer.log_probs(row, [0])[0]} for row in range(len(prompts))]
    living, scored, deepest = [[0] for _ in prompts], 0, 0
    for step in range(rounds):
        wanted = {}
        for row, forest in enumerate(forests):
            if (step + row) % 3:
                parents = random.choice(living[row], random.integers(1, 5))
                nodes = [forest.child(int(parent), int(random.integers(size))) for parent in parents]
                nodes += [forest.child(nodes[-1], int(random.integers(size)))]
                nodes += [forest.child(nodes[-1], int(random.integers(size)))]
                wanted[row] = list(dict.fromkeys(nodes))
        scored += scorer.score(wanted)
        for row, nodes in wanted.items():
            for node, log_probs in zip(nodes, scorer.log_probs(row, nodes), strict=True):
                found[row][tuple(forests[row].path(node))] = log_probs
            deepest = max(deepest, *(forests[row].depths[node] for node in nodes))
            dead = forests[row].release([*nodes, *living[row]], set(nodes[-2:]))
            scorer.forget(row, dead, nodes[-2:])
            living[row] = nodes[-2:]
    assert deepest > 2 * WINDOW
    assert sum(scorer.cache.slots_peak(row) for row in range(3)) < sum(PROMPTS) + scored, "slots are used again"
    scorer.close()
    return max(difference_of_row(model, prompt, of_row) for prompt, of_row in zip(prompts, found, strict=True))


def difference_of_row(model: Any, prompt: list[int], found: dict[tuple[int, ...], Tensor]) -> float:
    """One plain pass for each path that no other continues: it has the nodes on the way as well."""
    worst, checked = 0.0, set()
    for path in sorted(found, key=len, reverse=True):
        if path in checked:
            continue
        ids = torch.tensor([[*prompt, *path]], device=model.device)
        expected = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
        for count in range(len(path) + 1):
            log_probs = found.get(path[:count])
            if log_probs is not None and path[:count] not in checked:
                checked.add(path[:count])
                worst = max(worst, float((log_probs - expected[len(prompt) + count - 1]).abs().max()))
    assert checked == found.keys()
    return worst


@having(TREE)
@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_forests_are_scored_as_sequences(name: str, engine: str) -> None:
    assert largest_difference(FAMILIES[name].model(), engine) < CLOSE


def test_both_ways_to_build_alibi_are_the_models_own() -> None:
    """Falcon adds it to the mask for torch's attention, and to the scores and the mask for its own."""
    model = FAMILIES["Falcon, ALiBi"].model()
    config = model.config
    config._attn_implementation = "eager"
    eager = FalconForCausalLM(config).eval()
    eager.load_state_dict(model.state_dict())
    assert largest_difference(eager) < CLOSE


# The same test on passes that are wrong.


def shifted_window(by: int) -> Callable[..., Tensor]:
    honest = ForestCache.window_mask

    def window_mask(self: ForestCache, mask: Tensor, positions: Tensor, first_row: int, window: int) -> Tensor:
        return honest(self, mask, positions, first_row, window + by)

    return window_mask


def by_slot(self: ForestCache, first_row: int, rows: int, read: int) -> Tensor:
    return torch.arange(read).repeat(rows, 1)


@pytest.mark.parametrize("engine", ["auto", "transformers"])
@pytest.mark.parametrize("fault", ["one wider", "one narrower", "none", "by slot"])
@pytest.mark.parametrize("name", ["Mistral", "Qwen 3", "Gemma 2"])
def test_a_wrong_window_is_caught(name: str, fault: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[name].model()
    if fault == "none":
        runner_of(model, engine).window = None
    elif fault == "by slot":
        monkeypatch.setattr(ForestCache, "positions", by_slot)
    else:
        monkeypatch.setattr(ForestCache, "window_mask", shifted_window(1 if fault == "one wider" else -1))
    assert largest_difference(model, engine) > WRONG


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_by_slots_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForestCache, "positions", by_slot)
    assert largest_difference(FAMILIES[name].model()) > WRONG


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ALIBI])
def test_positions_by_slots_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ForestScorer._inputs

    def inputs(self: ForestScorer, *args: Any) -> tuple[PassInputs, Any]:
        made, at = honest(self, *args)
        made.positions = made.slots % self.cache.capacity
        return made, at

    monkeypatch.setattr(ForestScorer, "_inputs", inputs)
    assert largest_difference(FAMILIES[name].model(), "transformers") > WRONG


# What windows and ALiBi cost, and leave behind.


def second_masks(longest_prompt: int, spare: int, monkeypatch: pytest.MonkeyPatch) -> int:
    made: list[int] = []
    honest = ForestCache.window_mask
    monkeypatch.setattr(ForestCache, "window_mask", lambda self, *a: made.append(1) or honest(self, *a))
    scorer = ForestScorer(FAMILIES["Qwen 3"].model(), 1, longest_prompt, spare)
    forest = TokenForest()
    with torch.inference_mode():
        scorer.open(0, tokens_of(longest_prompt), forest)
        scorer.score({0: [forest.child(0, 5)]})
    return len(made)


def test_windows_cost_nothing_where_no_path_is_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert second_masks(5, WINDOW - 5, monkeypatch) == 0
    assert second_masks(5, WINDOW - 4, monkeypatch) == 2


def test_the_window_is_no_limit_of_context() -> None:
    model = FAMILIES["Mistral"].model()
    assert ModelPair(model, None).context == 128


def test_the_length_at_which_all_angles_change_is_a_limit_of_context() -> None:
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    changes = dict(rope_parameters=rope, original_max_position_embeddings=40)
    model = replace(FAMILIES["Phi-3"], changes={**FAMILIES["Phi-3"].changes, **changes}).model()
    assert ModelPair(model, None).context == 40
    assert largest_difference(model, rounds=9) < CLOSE


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_leaves_the_model_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a pass fails."""
    model, tokens = FAMILIES[name].model(), torch.tensor([tokens_of(12)])
    with torch.inference_mode():
        before = model(tokens).logits
        largest_difference(model, rounds=9)
        monkeypatch.setattr(decoding.engine.positions, "_by_position", failing)
        with pytest.raises(UserError, match="no memory"):
            largest_difference(model)
        assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def failing(*args: Any) -> Any:
    raise RuntimeError("no memory")


# Static shapes, as CUDA graphs need them; the graphs only call what they captured.


@pytest.mark.parametrize("name", ["Mistral", "Qwen 3", "Gemma 2", *ALIBI])
def test_graphs_read_what_this_pass_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[name].model()
    (graphs,) = graphed(ModelPair(model, None), monkeypatch)
    assert largest_difference(model) < CLOSE
    assert 0 < graphs.captures < graphs.replays
    monkeypatch.setattr(decoding.engine.graphs, "_read_by", lambda inputs: ["tokens", "positions", "slots", "mask"])
    assert largest_difference(model) > WRONG, "a tensor that is not copied shows"


# The check before decoding sees it all by itself.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Mistral", "Gemma 2", "Phi-3"])
def test_the_probe_sees_a_wrong_window(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ForestCache, "window_mask", shifted_window(1))
    with pytest.raises(UserError, match="scores a forest of beams differently"):
        check_forest_pass(FAMILIES[name].model().to(dtype), "target", "transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_probe_sees_slots_taken_for_positions(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ForestCache, "positions", by_slot)
    honest = ForestScorer._to_device

    def to_device(self: ForestScorer, lists: list[Any]) -> Any:
        tokens, _, slots, *rest = honest(self, lists)
        return tokens, slots % self.cache.capacity, slots, *rest

    monkeypatch.setattr(ForestScorer, "_to_device", to_device)
    with pytest.raises(UserError, match="scores a forest of beams differently"):
        check_forest_pass(FAMILIES[name].model().to(dtype), "target", "transformers")


# What is decoded.


@having(SAMPLING)
def test_sampled_beams_follow_beam_sampling(name: str) -> None:
    """The chi-square test of test_exactness.py; the prompt is longer than the window."""
    family, prompt = FAMILIES[name], [1, 2, 0, 2, 2, 1, 0, 0, 1, 2]
    pair = ModelPair(family.model(vocabulary=4), family.model(vocabulary=4, seed=1))
    config = DecodingConfig(target_width=2, draft_width=3, draft_depth=2, max_new_tokens=2, num_return_sequences=2)
    results = DSBDDecoder(pair, config).generate([prompt] * 300, torch.Generator().manual_seed(0))
    counts = Counter(frozenset(map(tuple, result.sequences)) for result in results)
    assert chi_square_p(counts, Reference(pair.target, prompt, config.with_changes(eos_token_id=3)).returned()) > 1e-3


OPTIONS: list[dict[str, Any]] = [
    *({"early_stopping": early, "length_penalty": lp} for early in (False, True, "never") for lp in (0.5, 1.0, 2.0)),
    {"eos_token_id": None},
    {"min_new_tokens": 5},
]


@having(SEARCH)
def test_beam_search_is_generate(name: str) -> None:
    """Token for token, over widths and options; drafts are right now and then."""
    pair = related_pair(name)
    prompts = [tokens_of(count, seed=seed) for count in (5, 11) for seed in range(3)][:5]
    ended = accepted = 0
    searches: list[tuple[int, dict[str, Any]]] = [(1, {}), (1, OPTIONS[-2]), (1, OPTIONS[-1])]
    # When a search ends is no matter of the model, and test_search.py crosses these options with all widths. So a
    # family has every option once, and which of two widths it comes with changes from family to family.
    turn = list(FAMILIES).index(name)
    searches += [((2, 4)[(i + turn) % 2], options) for i, options in enumerate(OPTIONS)]
    for width, options in searches:
        options = {"eos_token_id": ENDS, **options}
        config = DecodingConfig(
            mode="beam_search",
            target_width=width,
            draft_width=width + 1,
            draft_depth=2,
            max_new_tokens=14,
            num_return_sequences=width,
            **{name: -1 if value is None else value for name, value in options.items()},
        )
        results = DSBDDecoder(pair, config).generate(prompts)
        expected = beams_of_generate(pair.target, prompts, width, options)
        for result, (sequences, scores) in zip(results, expected, strict=True):
            assert result.sequences == sequences, (width, options)
            if width > 1:  # generate gives no scores of greedy decoding
                assert result.scores == pytest.approx(scores, abs=1e-4, rel=1e-4)
            ended += sum(result.finished)
            accepted += sum(result.stats.accepted)
    assert ended > 0
    assert accepted > 0


def related_pair(name: str) -> ModelPair:
    """The draft's weights are nine parts of the target's, and one of another model's."""
    family = FAMILIES[name]
    target, draft = family.model(), family.model(seed=1)
    with torch.no_grad():
        for weight, own in zip(draft.parameters(), target.parameters(), strict=True):
            weight.copy_(0.9 * own + 0.1 * weight)
    return ModelPair(target, draft)


def beams_of_generate(
    model: Any, prompts: list[list[int]], width: int, options: dict[str, Any]
) -> list[tuple[list[list[int]], list[float]]]:
    """Of each prompt: continuations up to and with their end token, best first, and their scores."""
    found: list[tuple[list[list[int]], list[float]]] = []
    for length in sorted({len(prompt) for prompt in prompts}):  # prompts of one length need no padding
        ids = torch.tensor([prompt for prompt in prompts if len(prompt) == length])
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            max_new_tokens=14,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        ends = options["eos_token_id"] or []
        beams = [up_to_end(sequence, ends) for sequence in output.sequences[:, length:].tolist()]
        scores = output.sequences_scores.tolist() if width > 1 else [0.0] * len(beams)
        found += [(beams[i : i + width], scores[i : i + width]) for i in range(0, len(beams), width)]
    return found


def up_to_end(tokens: list[int], ends: list[int]) -> list[int]:
    found = [i for i, token in enumerate(tokens, 1) if token in ends]
    return tokens[: found[0]] if found else tokens


# What is refused, and the page.


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_with_its_reason(name: str) -> None:
    refused = REFUSED[name]
    if refused.by_config:
        config = config_of(refused.kind, refused.changes)
        with pytest.raises(UserError, match=refused.says) as refusal:
            check_architecture(config, "draft")
    else:
        config = config_of(refused.kind, {"vocab_size": VOCABULARY, **refused.changes})
        for dtype in (torch.bfloat16, torch.float32):
            pair = ModelPair(randomised(AutoModelForCausalLM, config).to(dtype), None)
            with pytest.raises(UserError, match=refused.says) as refusal:
                pair.check_forest_passes()
    assert "\n" not in str(refusal.value)


def test_the_page_says_what_is_tested() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "write it anew: python -m tests.decoding.families"
