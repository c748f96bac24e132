"""DSBDDecoder on stubs whose every token, pass and acceptance is known beforehand; bad input; what is left behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from decoding import DecodingConfig, DSBDDecoder, FixedWidth, ModelPair, UserError, WidthPolicy, beam_sample
from decoding.decoder import as_token_lists
from decoding.policies.base import TargetContext
from decoding.results import DecodeResult, LayerEvent, Recorder
from tests.decoding.stubs import MAX_POSITIONS, TableModel, llama_pair, random_pair, settings, small_llama

PROMPT = [1, 2]
VOCABULARY = 5
SURE = 60.0  # a logit lead: other tokens have probability e^-60, less than one draw in 1e25


def tokens_at(position: int) -> int:
    """The token that the sure models put after `position` tokens."""
    return (3 * position + 1) % 4


def sure_model(right: list[bool] | None = None) -> TableModel:
    """All mass on one token at each place: the target's own, or another where `right` says False."""
    table = torch.zeros(MAX_POSITIONS, VOCABULARY, VOCABULARY)
    for position in range(MAX_POSITIONS):
        new = position + 1 - len(PROMPT)  # index of the token in the continuation
        wrong = right is not None and 0 <= new < len(right) and not right[new]
        table[position, :, (tokens_at(position) + wrong) % VOCABULARY] = SURE
    return TableModel(table)


def continuation(count: int) -> list[int]:
    return [tokens_at(len(PROMPT) - 1 + i) for i in range(count)]


@dataclass
class Expected:
    """What one beam with one draft a layer must do, worked out by hand from which drafts are right."""

    iterations: int = 0
    target_calls: int = 0
    draft_calls: int = 0
    draft_widths: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


def expected_run(right: list[bool], count: int, depth: int) -> Expected:
    run, done = Expected(), 0
    while done < count:
        layers = min(depth, count - done - 1)
        # The prompt's pass has scored the root for both models; later roots are new to both.
        run.target_calls += layers > 0 or done > 0
        run.draft_calls += max(layers - (done == 0), 0)
        run.iterations += 1
        good = 0
        while good < layers and right[done + good]:
            good += 1
        run.accepted += [1] * good + [0]
        run.draft_widths += [1] * good + [1 if good < layers else 0]
        done += good + 1
    return run


PATTERNS = {
    "always": [True] * 12,
    "never": [False] * 12,
    "sometimes": [True, True, False, True, False, False, True, True, True, False, True, True],
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("replacement", [False, True])
def test_known_drafts_give_known_tokens_and_passes(pattern: str, depth: int, replacement: bool) -> None:
    """Drafts that are right are accepted, the first wrong one ends the iteration, and the tokens are the target's."""
    right, count = PATTERNS[pattern], 11
    pair = ModelPair(sure_model(), sure_model(right))
    config = settings(1, 1, depth, count, replacement=replacement)
    (result,) = DSBDDecoder(pair, config).generate([PROMPT], torch.Generator().manual_seed(0))
    expected = expected_run(right, count, depth)
    assert result.sequences == [continuation(count)]
    assert result.finished == [False]
    stats = result.stats
    assert (stats.iterations, stats.target_calls) == (expected.iterations, expected.target_calls)
    assert stats.draft_calls == (expected.draft_calls if depth else 0)
    assert stats.draft_widths == expected.draft_widths
    assert stats.accepted == expected.accepted
    assert stats.target_widths == [1] * count
    assert stats.block_efficiency == pytest.approx(count / expected.iterations)
    assert (stats.new_tokens, stats.prompt_tokens) == (count, 2)
    assert stats.total_seconds == pytest.approx(sum(stats.seconds.values()))
    assert set(stats.seconds) == {"prompt", "draft", "target", "verify", "policy", "other"}


@pytest.mark.parametrize("replacement", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_draft_equal_to_its_target_is_always_accepted(width: int, replacement: bool) -> None:
    """P = Q layer after layer if M = w: every draft is accepted, and an iteration commits γ + 1 layers."""
    pair = random_pair(5, seed=1, closeness=1.0)
    config = settings(width, width, 2, 9, replacement=replacement)
    for result in DSBDDecoder(pair, config).generate([PROMPT] * 20, torch.Generator().manual_seed(0)):
        assert result.stats.iterations == 3
        assert result.stats.accepted == [width, width, 0] * 3
        assert result.stats.draft_widths == [width, width, 0] * 3


def deepest_positions(pair: ModelPair, config: DecodingConfig, policy: WidthPolicy | None = None) -> dict[str, int]:
    """The largest position that each model is asked to score."""
    pair.check_forest_passes()  # it runs passes of its own
    deepest = {"target": -1, "draft": -1}
    handles = []
    for role, model in (("target", pair.target), ("draft", pair.draft)):

        def note(module: Any, args: Any, kwargs: dict[str, Any], role: str = role) -> None:
            deepest[role] = max(deepest[role], int(kwargs["position_ids"].max()))

        handles.append(model.register_forward_pre_hook(note, with_kwargs=True))
    results = DSBDDecoder(pair, config, policy).generate([PROMPT] * 10, torch.Generator().manual_seed(0))
    for handle in handles:
        handle.remove()
    for result in results:
        assert result.stats.new_tokens == config.max_new_tokens
        assert {len(sequence) for sequence in result.sequences} == {config.max_new_tokens}
        assert len(result.stats.target_widths) == config.max_new_tokens
        assert sum(width == 0 for width in result.stats.draft_widths) <= result.stats.iterations
    return deepest


@pytest.mark.parametrize("count", range(1, 8))
@pytest.mark.parametrize("depth", range(5))
def test_decoding_stops_exactly_at_max_new_tokens(count: int, depth: int) -> None:
    """The depth shrinks near the end: the last token is never drafted, and nothing is cut off afterwards."""
    config = settings(3, 4, depth, count)
    deepest = deepest_positions(random_pair(4, seed=2, closeness=0.9), config)
    root = len(PROMPT) - 1
    # The last committed layer is drawn from scores of depth count - 1; the draft's deepest layer from count - 2.
    assert deepest["target"] <= root + count - 1
    assert deepest["draft"] <= max(root, root + count - 2)


class Narrowing(WidthPolicy):
    """M falls by one a layer."""

    def target_width(self, context: TargetContext) -> int:
        return 4 - context.draft.layer


@pytest.mark.parametrize("replacement", [False, True])
def test_exact_keeps_no_more_than_its_width(replacement: bool) -> None:
    config = settings(4, 6, 3, 4, exact=True, replacement=replacement)
    for result in DSBDDecoder(random_pair(4, closeness=1.0), config, Narrowing()).generate(
        [PROMPT] * 20, torch.Generator().manual_seed(0)
    ):
        assert len(result.sequences) <= result.stats.target_widths[-1]
        assert all(n <= m for n, m in zip(result.stats.accepted, result.stats.target_widths, strict=True))


class KeptRecorder(Recorder):
    """(passed, accepted, kept) of every verified layer."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, int, int]] = []

    def layer(self, event: LayerEvent) -> None:
        if event.verdict is not None:
            self.seen.append((event.record.passed, event.record.accepted, len(event.kept)))


@pytest.mark.parametrize("surplus", ["keep", "drop"])
@pytest.mark.parametrize("refill", ["full", "width"])
def test_surplus_and_refill_go_beyond_the_width_up_to_target_width(surplus: str, refill: str) -> None:
    """M = 2 of 4: a passed layer keeps its surplus or not, a failed one is filled to 4 or to 2."""
    config = settings(4, 6, 2, 6, surplus=surplus, refill=refill)
    recorder = KeptRecorder()
    decoder = DSBDDecoder(random_pair(6, seed=2, closeness=0.5), config, FixedWidth(target_width=2))
    decoder.generate([PROMPT] * 60, torch.Generator().manual_seed(0), [recorder] * 60)
    passed = {(accepted, kept) for passed, accepted, kept in recorder.seen if passed}
    failed = {(accepted, kept) for passed, accepted, kept in recorder.seen if not passed}
    assert all(accepted == kept for accepted, kept in passed)
    assert {kept for _, kept in passed} == ({2, 3, 4} if surplus == "keep" else {2})
    assert {accepted for accepted, _ in failed} == {0, 1}
    assert {kept for _, kept in failed} == ({4} if refill == "full" else {2})


def test_one_beam_cache_goes_on_with_the_best_beam() -> None:
    config = settings(3, 4, 2, 9, one_beam_cache=True)
    roots = []

    class Watching(WidthPolicy):
        def draft_further(self, context: Any, layer: int, widths: tuple[int, ...]) -> bool:
            roots.append(len(context.weights))
            return True

    decoder = DSBDDecoder(random_pair(4, closeness=0.7), config, Watching())
    results = decoder.generate([PROMPT] * 10, torch.Generator().manual_seed(0))
    assert set(roots) == {1}
    assert all(len(result.sequences[0]) == 9 for result in results)


# Ends.


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_an_end_token_among_the_drafts_ends_the_hypothesis(depth: int, at: int) -> None:
    """The target is sure of its path and token `at` of it is an end token."""
    end = continuation(at)[-1]
    expected = continuation(continuation(12).index(end) + 1)
    config = DecodingConfig(target_width=1, draft_width=2, draft_depth=depth, max_new_tokens=10, eos_token_id=end)
    (result,) = DSBDDecoder(ModelPair(sure_model(), sure_model()), config).generate(
        [PROMPT], torch.Generator().manual_seed(0)
    )
    assert result.sequences == [expected]
    assert result.finished == [True]
    assert result.stats.new_tokens == len(expected)


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("surplus", ["keep", "drop"])
def test_returned_hypotheses_end_once_and_are_sorted(early_stopping: bool | str, surplus: str) -> None:
    config = settings(3, 5, 3, 8, eos_token_id=[0, 3], early_stopping=early_stopping, surplus=surplus)
    decoder = DSBDDecoder(random_pair(5, seed=4, closeness=0.7), config, FixedWidth(target_width=2))
    for result in decoder.generate([PROMPT] * 60, torch.Generator().manual_seed(0)):
        assert result.scores == sorted(result.scores, reverse=True)
        assert len({tuple(sequence) for sequence in result.sequences}) == len(result.sequences)
        for sequence, finished in zip(result.sequences, result.finished, strict=True):
            assert finished == (sequence[-1] in (0, 3))
            assert not {0, 3} & set(sequence[:-1])
            assert finished or len(sequence) == result.stats.new_tokens
        assert max(map(len, result.sequences)) <= result.stats.new_tokens <= 8


def test_the_models_own_end_token_is_the_default() -> None:
    pair = ModelPair(sure_model(), sure_model())
    pair.target.config.eos_token_id = continuation(3)[-1]
    config = DecodingConfig(target_width=1, draft_width=1, max_new_tokens=10)
    never = config.with_changes(eos_token_id=-1)
    generator = torch.Generator().manual_seed(0)
    assert DSBDDecoder(pair, config).generate([PROMPT], generator)[0].finished == [True]
    assert DSBDDecoder(pair, never).generate([PROMPT], generator)[0].finished == [False]


# Prompts and other input.


def test_prompts_may_come_as_lists_and_tensors() -> None:
    assert as_token_lists(torch.tensor([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]
    assert as_token_lists([torch.tensor([1, 2]), [3]]) == [[1, 2], [3]]
    assert as_token_lists([]) == []


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([[1], []], "Prompt 1 is empty; give at least one token"),
        ([[1, 4]], r"Prompt 0 holds token id 4, outside the vocabulary of 4 \(0 to 3\)"),
        ([[-1]], "Prompt 0 holds token id -1, outside the vocabulary"),
        (
            [[1] * 14],
            "Prompt 0 has 14 tokens and max_new_tokens is 3, together more than the target model's context of 16",
        ),
        (["hello"], "prompts holds text"),
        ("hello", "prompts holds text"),
        ([1, 2], "prompts is one list of token ids"),
        (torch.tensor([1, 2]), "prompts is a tensor of 1 dimension"),
        (None, "prompts is None; give a list of lists"),
        ([[1], None], "Prompt 1 is None; give a list of token ids"),
        ([[1, 0.5]], "Prompt 0 is .*0.5.*; give a list of token ids"),
        (torch.ones(1, 2), "Prompt 0 is tensor.*; give a list of token ids"),
    ],
    ids=str,
)
def test_bad_prompts_are_refused(prompts: Any, sentence: str) -> None:
    config = DecodingConfig(target_width=2, draft_width=2, max_new_tokens=3)
    with pytest.raises(UserError, match=sentence):
        DSBDDecoder(random_pair(4), config).generate(prompts)


@pytest.mark.parametrize("changes", [{}, {"mode": "beam_search"}, {"verification": "rejection"}], ids=str)
def test_a_draft_stops_where_its_context_ends(changes: dict[str, Any]) -> None:
    """Its table of positions ends: a pass beyond it would be an IndexError. One prompt is longer from the start."""
    pair = random_pair(4)
    pair.draft.table.data = pair.draft.table.data[:10]
    prompts = [[1, 2, 3, 1, 0, 2, 1, 3, 3], [1, 2, 3, 1, 2, 0, 3, 1, 1, 2, 3], [1, 2, 3, 0, 1, 2, 2, 1, 0]]
    config = DecodingConfig(target_width=2, draft_width=3, max_new_tokens=5, eos_token_id=-1, **changes)
    with pytest.raises(UserError, match=r"A pass of the model \(llama\) failed: index 10 is out of bounds"):
        generated(pair, config, prompts)
    pair.draft.config.max_position_embeddings = 10
    results = generated(pair, config, prompts)
    assert [len(result.sequences[0]) for result in results] == [5, 5, 5]
    assert [result.stats.draft_calls > 0 for result in results] == [True, False, True]
    records = results[0].stats.records
    assert len(records[0].drafts) == 2, "as many layers as fit"
    if "verification" in changes:  # else the target's known rows propose, too
        assert not records[-1].drafts
        assert [record.drafts for record in results[1].stats.records] == [()] * 5
    if "verification" not in changes:
        alone = beam_sample(pair.target, prompts, config, torch.Generator().manual_seed(0))
        assert [result.sequences for result in results] == [result.sequences for result in alone]


def generated(pair: ModelPair, config: DecodingConfig, prompts: list[list[int]]) -> list[DecodeResult]:
    """Two at a time, so that rows are used again; they share a prefix that one of them does not hold."""
    return DSBDDecoder(pair, config).generate(prompts, torch.Generator().manual_seed(0), batch_size=2)


def test_a_target_goes_on_beyond_what_it_was_made_for() -> None:
    """As in transformers' generate, where angles go on; with a word."""
    model = small_llama(7, max_position_embeddings=8)
    config = DecodingConfig(mode="beam_search", target_width=1, draft_width=1, max_new_tokens=12)
    with pytest.warns(UserWarning, match=r"Prompt 0 .* 16 tokens, more than the 8 that the target model was made for"):
        (result,) = beam_sample(model, [[1, 2, 3, 4]], config)
    plain = model.generate(torch.tensor([[1, 2, 3, 4]]), do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert result.sequences[0] == plain[0, 4:].tolist()


def test_generators_must_match_prompts() -> None:
    decoder = DSBDDecoder(random_pair(4), DecodingConfig(max_new_tokens=2))
    with pytest.raises(UserError, match=r"generator is 0; give a torch\.Generator"):
        decoder.generate([[1]], generator=0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="2 generators for 1 prompts"):
        decoder.generate([[1]], [torch.Generator()] * 2)


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.9}, {"top_p": 0.9, "warp": "beam"}, {"top_k": 4}], ids=str)
def test_nan_in_mid_decoding_names_the_model_and_leaves_no_hooks(role: str, cuts: dict[str, Any]) -> None:
    pair = random_pair(5)
    pair.check_forest_passes()
    getattr(pair, role).table.data[4:] = torch.nan

    class Watching(WidthPolicy):
        needs_hidden = True

    decoder = DSBDDecoder(pair, DecodingConfig(max_new_tokens=8, eos_token_id=-1, **cuts), Watching())
    with pytest.raises(UserError, match=f"The {role} model returned NaN"):
        decoder.generate([PROMPT], torch.Generator().manual_seed(0))
    for model in (pair.target, pair.draft):
        assert not model.head._forward_pre_hooks


def test_a_policy_that_fails_leaves_no_hooks() -> None:
    class Failing(WidthPolicy):
        needs_hidden = True

        def target_width(self, context: TargetContext) -> int:
            raise RuntimeError("broken policy")

    pair = random_pair(5)
    with pytest.raises(RuntimeError, match="broken policy"):
        DSBDDecoder(pair, DecodingConfig(max_new_tokens=4), Failing()).generate([PROMPT])
    assert not pair.target.head._forward_pre_hooks
    assert not pair.draft.head._forward_pre_hooks


def test_beam_sample_ignores_drafting_settings() -> None:
    pair = random_pair(4)
    config = DecodingConfig(target_width=2, draft_width=5, draft_depth=4, max_new_tokens=5, eos_token_id=-1)
    first, second = (
        beam_sample(pair.target, [PROMPT], c, torch.Generator().manual_seed(0))[0]
        for c in (config, config.with_changes(draft_width=2, draft_depth=1))
    )
    assert first.sequences == second.sequences
    assert first.stats.draft_calls == 0
    assert first.stats.draft_widths == [0] * 5
    assert first.stats.iterations == 5
    assert first.stats.target_calls == 4, "the first layer comes from the prompt's own pass"


@pytest.mark.parametrize("policy", ["fixed", 4, FixedWidth], ids=str)
def test_what_is_no_policy_is_refused(policy: Any) -> None:
    with pytest.raises(UserError, match="give a WidthPolicy, such as FixedWidth"):
        DSBDDecoder(random_pair(VOCABULARY), DecodingConfig(), policy)


def test_autocast_is_refused_and_spoils_nothing() -> None:
    """Also before the models were ever run: what a probe would keep then would be of another dtype."""
    pair = llama_pair()
    config = DecodingConfig(target_width=2, draft_width=3, draft_depth=1, max_new_tokens=4, eos_token_id=-1)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UserError, match=r"torch.autocast is on"):
        DSBDDecoder(pair, config)
    (result,) = DSBDDecoder(pair, config).generate([PROMPT])
    assert len(result.sequences[0]) == 4


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("top_k", [None, 4])
def test_nothing_ends_before_min_new_tokens(width: int, top_k: int | None) -> None:
    """Sampling; three of five tokens end a hypothesis, and do so once they may."""
    ends = [0, 1, 2]
    config = settings(width, 4, 2, 8, eos_token_id=ends, top_k=top_k, min_new_tokens=3)
    results = DSBDDecoder(random_pair(VOCABULARY), config).generate([PROMPT] * 20, torch.Generator().manual_seed(0))
    sequences = [sequence for result in results for sequence in result.sequences]
    assert all(token not in ends for sequence in sequences for token in sequence[:3])
    assert any(sequence[3] in ends for sequence in sequences)
