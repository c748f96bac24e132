"""`model.generate(..., custom_generate=dsbd_generate)` returns what `generate` returns without it; what it draws is
distributed as what transformers draws from; what it cannot do it refuses in a sentence.

All seeds are fixed. There are about 20 p-values here: the smallest is expected near 0.05; a wrong sampler gives less
than 1e-6, as the tests of broken ones show.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    EosTokenCriteria,
    Gemma3Config,
    GenerationConfig,
    Idefics3Config,
    InternVLConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinPLogitsWarper,
    Mistral3Config,
    PrefixConstrainedLogitsProcessor,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
    set_seed,
)
from transformers.generation import EncoderRepetitionPenaltyLogitsProcessor
from transformers.generation.streamers import BaseStreamer

import decoding.custom_generate
from decoding import FixedWidth, ModelPair, UserError, dsbd_generate
from decoding.custom_generate import REFUSED
from decoding.loop.prompt_run import PromptRun
from tests.decoding.stubs import chi_square_p, sharp_llama
from tests.small_pair import small_pair

PASS, CAUGHT = 1e-3, 1e-6
PAD, END = 0, 3


def forces_dead_ends() -> bool:
    """Whether this transformers forces tokens that an allowed prefix asks for and others forbid; 5.17 does not."""
    processor = PrefixConstrainedLogitsProcessor(lambda _, tokens: [0], 1)
    return not bool(processor(torch.tensor([[1]]), torch.full((1, 2), -torch.inf)).isneginf().all())


def ignores_padding_by_row() -> bool:
    """Whether this transformers takes a tensor for the prompt lengths to ignore; 5.17 does not."""
    try:
        RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=torch.tensor([1]))
    except ValueError:
        return False
    return True


@cache
def target(vocabulary: int = 40) -> LlamaForCausalLM:
    return sharp_llama(vocabulary, seed=1)


@cache
def draft(vocabulary: int = 40) -> LlamaForCausalLM:
    """The target with noise on its weights."""
    model = sharp_llama(vocabulary, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return model


def padded(*prompts: list[int]) -> dict[str, Tensor]:
    """A batch with padding on the left."""
    longest = max(map(len, prompts))
    rows = [[PAD] * (longest - len(prompt)) + prompt for prompt in prompts]
    masks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}


def one(*tokens: int) -> dict[str, Tensor]:
    return padded(list(tokens))


BATCH = padded([7, 11, 29, 7, 11], [5, 9], [31, 8, 8, 22, 13, 17, 2])


def check_equal(
    inputs: dict[str, Tensor], width: int, ours: dict[str, Any] | None = None, model: Any = None, **options: Any
) -> Tensor:
    """Plain generate and this one give equal tensors; returns them. `ours` are options that only this one is given."""
    model = model if model is not None else target()
    options = {"max_new_tokens": 10, "eos_token_id": END, "pad_token_id": PAD, "num_beams": width, **options}
    plain = model.generate(**inputs, **options)
    given = {"assistant_model": draft()} if ours is None else ours
    found = model.generate(**inputs, **options, **{"custom_generate": dsbd_generate, **given})
    assert found.tolist() == plain.tolist()
    assert found.dtype == plain.dtype
    return plain


class FarTokensOnly(LogitsProcessor):
    """A user's own, a function of its row: no token follows one that is less than four away."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        near = (torch.arange(scores.shape[1]) - input_ids[:, -1:]).abs() < 4
        return scores.masked_fill(near, -torch.inf)


class FifthsAfterEight(StoppingCriteria):
    """A user's own: the row ends on a multiple of five after its eighth token."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids[:, -1] % 5 == 0) & (input_ids.shape[1] > 8)


def allowed_in_batch(prompt: int, tokens: Tensor) -> list[int]:
    """Depends on the prompt's place in the batch and on its last token."""
    return [END, 10 + prompt, 20 + prompt, (int(tokens[-1]) * 7 + prompt) % 40, (int(tokens[-1]) + 5) % 40, 39 - prompt]


class ByOwnRules:
    """Options made afresh for each call: processors of transformers may keep state."""

    def __init__(self, **makers: Callable[[], Any]) -> None:
        self.makers = makers

    def __call__(self) -> dict[str, Any]:
        return {name: make() for name, make in self.makers.items()}


CASES: dict[str, dict[str, Any] | ByOwnRules] = {
    "plain": {},
    "several EOS": {"eos_token_id": [3, 5, 17, 22]},
    "EOS -1": {"eos_token_id": -1},
    "EOS twice and -1": {"eos_token_id": [17, 17, -1]},
    "EOS beyond the vocabulary": {"eos_token_id": [END, 17, 1000]},
    "no EOS": {"eos_token_id": None},
    "pad is EOS": {"pad_token_id": END},
    "pad 9": {"pad_token_id": 9},
    "repetition penalty": {"repetition_penalty": 1.8},
    "bad words": {"bad_words_ids": [[17], [8, 8], [33], [22, 13, 17]]},
    "no repeated pairs": {"no_repeat_ngram_size": 2},
    "no repeated tokens": {"no_repeat_ngram_size": 1},
    "forced EOS": {"forced_eos_token_id": END, "max_new_tokens": 6},
    "sequence bias": {"sequence_bias": [[[17], 2.0], [[8, 33], -3.0], [[11, 21], 5.0]]},
    "suppressed": {"suppress_tokens": [17, 33, 8], "begin_suppress_tokens": [4, 36, END]},
    "min_length": {"min_length": 14, "eos_token_id": [3, 17, 33]},
    "min_new_tokens": {"min_new_tokens": 5, "eos_token_id": [3, 17, 33]},
    "exponential decay": {"exponential_decay_length_penalty": (2, 1.6)},
    "allowed prefixes": {"prefix_allowed_tokens_fn": allowed_in_batch},
    "renormalized": {"renormalize_logits": True, "repetition_penalty": 1.3, "bad_words_ids": [[17], [33]]},
    "invalid values": {"remove_invalid_values": True, "suppress_tokens": [33]},
    "own processor": ByOwnRules(logits_processor=lambda: LogitsProcessorList([FarTokensOnly()])),
    "own warpers": ByOwnRules(
        logits_processor=lambda: LogitsProcessorList([TopKLogitsWarper(1), MinPLogitsWarper(0.1)])
    ),
    "own over built-in": ByOwnRules(
        logits_processor=lambda: LogitsProcessorList([RepetitionPenaltyLogitsProcessor(3.0), FarTokensOnly()]),
        repetition_penalty=lambda: 1.2,
    ),
    "own criterion": ByOwnRules(stopping_criteria=lambda: StoppingCriteriaList([FifthsAfterEight()])),
    "own length": ByOwnRules(stopping_criteria=lambda: StoppingCriteriaList([MaxLengthCriteria(11)])),
    "own length, passed": ByOwnRules(stopping_criteria=lambda: StoppingCriteriaList([MaxLengthCriteria(3)])),
    "own EOS": ByOwnRules(stopping_criteria=lambda: StoppingCriteriaList([EosTokenCriteria([17, 33])])),
    "more own EOS": ByOwnRules(stopping_criteria=lambda: StoppingCriteriaList([EosTokenCriteria(list(range(3, 20)))])),
    "own EOS, several in the config": ByOwnRules(
        stopping_criteria=lambda: StoppingCriteriaList([EosTokenCriteria([17, 33])]), eos_token_id=lambda: [3, 5, 22]
    ),
    "no time, as argument": {"max_time": 0.0},
    "no time": ByOwnRules(stopping_criteria=lambda: StoppingCriteriaList([MaxTimeCriteria(0.0)])),
    "max_length": {"max_new_tokens": None, "max_length": 13},
    "default length": {"max_new_tokens": None},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sliding cache": {"cache_implementation": "sliding_window"},
    "hybrid cache": {"cache_implementation": "hybrid_chunked"},
}


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_tensors_are_those_of_plain_generate(case: str, width: int) -> None:
    """Three left-padded prompts; with several beams all that were kept, under another penalty and stopping rule."""
    options = CASES[case]
    made = [options() if isinstance(options, ByOwnRules) else options for _ in range(2)]
    common: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": END, "pad_token_id": PAD, "num_beams": width}
    if width > 1:
        common |= {"num_return_sequences": 2, "length_penalty": 0.3, "early_stopping": "never"}
    plain = target().generate(**BATCH, **{**common, **made[0]})
    found = target().generate(**BATCH, **{**common, **made[1]}, assistant_model=draft(), custom_generate=dsbd_generate)
    assert found.tolist() == plain.tolist()


@pytest.mark.parametrize("length", [2, 5])
def test_a_mask_of_another_length_is_told(length: int) -> None:
    """`generate` makes positions of it, which then do not count the prompt's tokens."""
    with pytest.raises(UserError, match="attention_mask"):
        mask = torch.ones(1, length, dtype=torch.int64)
        target().generate(
            torch.tensor([[1, 2, 3]]), attention_mask=mask, custom_generate=dsbd_generate, max_new_tokens=4
        )


# Of these the tokens are the plain ones, or other only where rows are filled up.
WITHOUT_EFFECT = {"plain", "pad is EOS", "pad 9", "default length", "without cache"} | {
    case for case in CASES if case.endswith(" cache")
}


def test_the_cases_change_the_outcome() -> None:
    """Otherwise they would show nothing."""
    common: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": END, "pad_token_id": PAD, "num_beams": 3}
    common |= {"num_return_sequences": 2, "length_penalty": 0.3, "early_stopping": "never"}
    plain = target().generate(**BATCH, **common).tolist()
    same = set()
    for case, options in CASES.items():
        made = options() if isinstance(options, ByOwnRules) else options
        if target().generate(**BATCH, **{**common, **made}).tolist() == plain:
            same.add(case)
    assert same <= WITHOUT_EFFECT


@pytest.mark.parametrize("width", [1, 2])
def test_forced_bos_and_prompts_of_one_token(width: int) -> None:
    found = check_equal(padded([4], [9]), width, forced_bos_token_id=17)
    assert found[:, 1].tolist() == [17, 17]


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("engine", ["auto", "transformers"])
def test_the_built_in_pair(width: int, engine: str) -> None:
    pair = ModelPair.tiny()
    texts = ["def read_lines(path):\n", "import os\n\n\nclass Tree:\n    def __init__(self"]
    inputs = pair.tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 20, "num_beams": width, "repetition_penalty": 1.1}
    plain = pair.target.generate(**inputs, **options)
    ours = {"assistant_model": pair.draft, "custom_generate": dsbd_generate, "engine": engine}
    assert pair.target.generate(**inputs, **options, **ours).tolist() == plain.tolist()


@pytest.mark.parametrize("given", ["argument", "config", "model"])
@pytest.mark.parametrize("width", [1, 3])
def test_beams_may_be_asked_for_in_three_places(given: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding that a repetition penalty leaves out and prefixes by prompt go by the rows that generate has made."""
    settings = {"num_beams": width, "num_return_sequences": width, "repetition_penalty": 1.5, "max_new_tokens": 8}
    settings |= {"eos_token_id": END, "pad_token_id": PAD}
    options: dict[str, Any] = {"prefix_allowed_tokens_fn": allowed_in_batch}
    model = sharp_llama(40, seed=1)
    if given == "argument":
        options |= settings
    elif given == "config":
        options["generation_config"] = GenerationConfig(**settings)
    else:
        model.generation_config = GenerationConfig(**settings)
    plain = model.generate(**BATCH, **options)
    assert model.generate(**BATCH, **options, custom_generate=dsbd_generate).tolist() == plain.tolist()


def test_arguments_come_before_the_generation_config() -> None:
    config = GenerationConfig(num_beams=4, max_new_tokens=8, eos_token_id=END, pad_token_id=PAD, length_penalty=-1.0)
    options: dict[str, Any] = {"generation_config": config, "num_beams": 2, "length_penalty": 2.0}
    options |= {"early_stopping": True, "num_return_sequences": 2}
    plain = target().generate(**BATCH, **options)
    assert target().generate(**BATCH, **options, custom_generate=dsbd_generate).tolist() == plain.tolist()


@pytest.mark.parametrize("ours", ["none", "ngram", "layers:1", "bound", "policy", "narrow", "deep"])
@pytest.mark.parametrize("width", [1, 3])
def test_drafts_and_forests_change_no_token(ours: str, width: int) -> None:
    given: dict[str, dict[str, Any]] = {
        "none": {},
        "ngram": {"assistant_model": "ngram"},
        "layers:1": {"assistant_model": "layers:1"},
        "bound": {"custom_generate": partial(dsbd_generate, assistant_model=draft(), draft_depth=2)},
        "policy": {"assistant_model": draft(), "width_policy": FixedWidth(width)},
        "narrow": {"assistant_model": draft(), "draft_width": width, "draft_depth": 1},
        "deep": {"assistant_model": draft(), "draft_depth": 8, "engine": "transformers"},
    }
    check_equal(BATCH, width, given[ours], repetition_penalty=1.2)


def test_a_narrower_policy_is_another_algorithm() -> None:
    """FixedWidth(2) of 4 beams, without EOS: a layer that passes keeps 2 beams or more, so that the best is at least
    as good as greedy search's, and the shape is what was asked for."""
    options: dict[str, Any] = {
        "num_beams": 4,
        "max_new_tokens": 8,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    policy = FixedWidth(2)
    found = target().generate(**one(7, 11), **options, width_policy=policy, custom_generate=dsbd_generate)
    assert found.sequences.shape == (1, 10)
    greedy = target().generate(**one(7, 11), **{**options, "num_beams": 1, "output_logits": True})
    chosen = torch.stack(greedy.logits)[:, 0].log_softmax(-1).gather(1, greedy.sequences[0, 2:, None])
    assert found.sequences_scores[0] >= chosen.sum() / 8 - 1e-5


@pytest.mark.parametrize("dead_ends", [False, True])
@pytest.mark.parametrize("assistant", ["model", "ngram", None])
@pytest.mark.parametrize("width", [1, 3])
def test_allowed_prefixes_are_asked_for_along_allowed_paths_only(
    width: int, assistant: str | None, dead_ends: bool
) -> None:
    """As of a trie: it does not know other paths. Where bad words leave one beam nothing, the others go on."""
    dead_ends = dead_ends and (width > 1 or forces_dead_ends())  # elsewhere a greedy dead end is one, and refused
    inputs = one(1, 2, 4, 35, 1, 2, 4, 35, 1, 2)
    start = inputs["input_ids"].shape[1]

    def allowed(_: int, tokens: Tensor) -> list[int]:
        new = tokens[start:].tolist()
        follows = {1: [2, 4], 2: [4], 4: [1, 2, 8], 8: [1]}
        assert all(b in follows[a] for a, b in itertools.pairwise(new)), "off the trie"
        return follows[new[-1]] if new else [1, 2, 4]

    def tolerant(prompt: int, tokens: Tensor) -> list[int]:
        try:
            return allowed(prompt, tokens)
        except (AssertionError, KeyError):
            return [1]  # transformers asks for beams that do not exist as well

    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": width, "pad_token_id": PAD}
    options |= {"bad_words_ids": [[2, 4]]} if dead_ends else {}
    plain = target().generate(**inputs, **options, prefix_allowed_tokens_fn=tolerant)
    helper = draft() if assistant == "model" else assistant
    options |= {"assistant_model": helper, "custom_generate": dsbd_generate}
    found = target().generate(**inputs, **options, prefix_allowed_tokens_fn=allowed)
    assert found.tolist() == plain.tolist()


def test_a_beam_that_nothing_may_follow_goes_also_where_scores_are_normalised() -> None:
    """transformers goes on with the NaN that it makes of such a beam, which its topk takes for the best there is."""
    options: dict[str, Any] = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3, "pad_token_id": PAD}
    options |= {"bad_words_ids": [[2, 4]], "renormalize_logits": True, "assistant_model": draft()}
    follows = {1: [2, 4], 2: [4], 4: [1, 2, 8], 8: [1]}
    allowed = {"prefix_allowed_tokens_fn": lambda _, tokens: follows[int(tokens[-1])]}
    found = target().generate(**one(7, 4), **options, **allowed, custom_generate=dsbd_generate)
    for a, b in itertools.pairwise(found[:, 1:-1].T.tolist()):
        assert all(y in follows[x] and (x, y) != (2, 4) for x, y in zip(a, b, strict=True))


@pytest.mark.skipif(not ignores_padding_by_row(), reason="one length for all rows")
def test_a_users_own_padding_and_prefix_processors_are_told_their_row() -> None:
    """Made by the user for all rows of transformers' batch, with num_beams as an argument."""

    def processors() -> LogitsProcessorList:
        ignored = torch.tensor([2, 5, 0]).repeat_interleave(2)
        return LogitsProcessorList(
            [
                RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=ignored),
                PrefixConstrainedLogitsProcessor(allowed_in_batch, 2),
            ]
        )

    options = {"max_new_tokens": 8, "num_beams": 2, "pad_token_id": PAD, "eos_token_id": END}
    plain = target().generate(**BATCH, **options, logits_processor=processors())
    found = target().generate(**BATCH, **options, logits_processor=processors(), custom_generate=dsbd_generate)
    assert found.tolist() == plain.tolist()


# Texts: stop strings and streamers.


def test_inputs_that_a_model_makes_itself_are_refused() -> None:
    """They would be passed over, without a word; what transformers' own classes prepare is what is done here."""

    class Shifted(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, *args: Any, **options: Any) -> Any:
            return super().prepare_inputs_for_generation(*args, **options)

    class Plain(LlamaForCausalLM):
        pass

    config, prompt = sharp_llama(7).config, torch.tensor([[1, 2, 3]])
    with pytest.raises(UserError, match="Shifted has a prepare_inputs_for_generation of its own"):
        Shifted(config).generate(prompt, max_new_tokens=2, custom_generate=dsbd_generate)
    Plain(config).generate(prompt, max_new_tokens=2, custom_generate=dsbd_generate)


@pytest.mark.parametrize("width", [1, 3])
def test_stop_strings(width: int) -> None:
    pair = small_pair()
    inputs = dict(pair.tokenizer("def area(", return_tensors="pt"))
    options: dict[str, Any] = {"max_new_tokens": 16, "num_beams": width, "eos_token_id": None, "pad_token_id": PAD}
    text = pair.tokenizer.decode(pair.target.generate(**inputs, **options)[0, -9:-6])
    ours = {"assistant_model": pair.draft, "custom_generate": dsbd_generate}
    for given in ({"stop_strings": text}, {"stop_strings": [text, "zzz"]}):
        plain = pair.target.generate(**inputs, **options, **given, tokenizer=pair.tokenizer)
        found = pair.target.generate(**inputs, **options, **given, tokenizer=pair.tokenizer, **ours)
        assert found.tolist() == plain.tolist()
    own = [StoppingCriteriaList([StopStringCriteria(pair.tokenizer, text)]) for _ in range(2)]
    plain = pair.target.generate(**inputs, **options, stopping_criteria=own[0])
    assert pair.target.generate(**inputs, **options, stopping_criteria=own[1], **ours).tolist() == plain.tolist()
    bound = partial(dsbd_generate, tokenizer=pair.tokenizer, stop_strings=text)
    assert pair.target.generate(**inputs, **options, custom_generate=bound).tolist() == plain.tolist()
    with pytest.raises(UserError, match="stop_strings needs the tokenizer"):
        pair.target.generate(**inputs, **options, stop_strings=text, **ours)
    config = GenerationConfig(**options, stop_strings=text)  # transformers would lose the tokenizer
    for custom in (dsbd_generate, partial(dsbd_generate, draft_depth=1)):
        found = pair.target.generate(
            **inputs, generation_config=config, tokenizer=pair.tokenizer, **ours | {"custom_generate": custom}
        )
        assert found.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="could not locate a tokenizer"):  # as without custom_generate
        pair.target.generate(**inputs, generation_config=config, **ours)


@pytest.mark.parametrize("beams_in", ["config", "call"])
@pytest.mark.parametrize("drafted", [False, True])
def test_samples_may_be_asked_for_in_a_config(beams_in: str, drafted: bool) -> None:
    """Those of the same arguments, though transformers would take a draft for assisted sampling."""
    pair = small_pair()
    inputs = dict(pair.tokenizer("def area(", return_tensors="pt"))
    ours: dict[str, Any] = {"custom_generate": dsbd_generate} | ({"assistant_model": pair.draft} if drafted else {})
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": PAD}

    def sampled(**given: Any) -> Any:
        set_seed(3)
        return pair.target.generate(**inputs, **given, **ours).tolist()

    expected = sampled(**options, num_beams=3, num_return_sequences=2)
    in_config = options | {"num_return_sequences": 2} | ({"num_beams": 3} if beams_in == "config" else {})
    found = sampled(generation_config=GenerationConfig(**in_config), **({"num_beams": 3} if beams_in == "call" else {}))
    assert found == expected and len(found) == 2
    if drafted:
        one = GenerationConfig(**options, num_return_sequences=2)
        with pytest.raises(UserError, match=r"num_return_sequences \(2\) of one beam each"):
            sampled(generation_config=one)


def test_a_streamer_prints_what_plain_generate_prints(capsys: pytest.CaptureFixture[str]) -> None:
    pair = small_pair()
    inputs = dict(pair.tokenizer("def area(", return_tensors="pt"))
    printed = []
    for ours in ({}, {"assistant_model": pair.draft, "custom_generate": dsbd_generate}):
        pair.target.generate(**inputs, max_new_tokens=12, streamer=TextStreamer(pair.tokenizer), **ours)
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != ""


@pytest.mark.parametrize("width", [2, 4])
def test_an_iterator_gives_the_best_hypothesis_of_several_beams(width: int) -> None:
    """Which transformers does not do at all."""
    pair = small_pair()
    inputs = dict(pair.tokenizer("def area(", return_tensors="pt"))
    streamer = TextIteratorStreamer(pair.tokenizer, skip_prompt=True, timeout=60)
    found: list[Tensor] = []
    options = {"max_new_tokens": 12, "num_beams": width, "assistant_model": pair.draft}

    def work() -> None:
        found.append(pair.target.generate(**inputs, **options, streamer=streamer, custom_generate=dsbd_generate))

    thread = threading.Thread(target=work)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == pair.tokenizer.decode(found[0][0, inputs["input_ids"].shape[1] :])


class Heard(BaseStreamer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


# What is returned beside tokens.


@pytest.mark.parametrize(
    "options", [{}, {"length_penalty": 0.0, "early_stopping": True}, {"eos_token_id": None}], ids=str
)
def test_scores_are_those_of_plain_generate(options: dict[str, Any]) -> None:
    given = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": END, "pad_token_id": PAD}
    given |= {"return_dict_in_generate": True, "output_scores": True, **options}
    plain = target().generate(**BATCH, **given)
    found = target().generate(**BATCH, **given, assistant_model=draft(), custom_generate=dsbd_generate)
    assert type(found) is type(plain)
    assert found.sequences.tolist() == plain.sequences.tolist()
    assert found.sequences_scores.tolist() == pytest.approx(plain.sequences_scores.tolist(), rel=1e-4, abs=1e-5)
    greedy = {"max_new_tokens": 8, "return_dict_in_generate": True, "pad_token_id": PAD}
    one_beam = [target().generate(**BATCH, **greedy, **ours) for ours in ({}, {"custom_generate": dsbd_generate})]
    assert type(one_beam[0]) is type(one_beam[1])
    assert one_beam[0].sequences.tolist() == one_beam[1].sequences.tolist()


@pytest.mark.parametrize("prompts", [one(7, 11), BATCH], ids=["one", "batch"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("more", [{}, {"repetition_penalty": 1.3, "early_stopping": True}], ids=str)
def test_rows_of_every_step_are_those_of_plain_generate(
    prompts: dict[str, Tensor], beams: int, more: dict[str, Any]
) -> None:
    """What beam_indices point at is equal, and with it the transition scores; where no text comes from may be -inf."""
    given = {"max_new_tokens": 8, "num_beams": beams, "num_return_sequences": beams, "eos_token_id": END, **more}
    given |= {"pad_token_id": PAD, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = target().generate(**prompts, **given)
    for drafting in (None, draft()):
        found = target().generate(**prompts, **given, assistant_model=drafting, custom_generate=dsbd_generate)
        assert found.sequences.tolist() == plain.sequences.tolist()
        for rows, expected in ((found.scores, plain.scores), (found.logits, plain.logits)):
            assert [row.shape for row in rows] == [row.shape for row in expected]
            for row, wanted in zip(rows, expected, strict=True):
                there = row.amax(-1) > -torch.inf
                assert there.any()
                torch.testing.assert_close(row[there], wanted[there], rtol=1e-4, atol=1e-4)  # other kernels' sums
                if len(prompts["input_ids"]) == 1:
                    assert there.all()
        if beams > 1:
            assert found.beam_indices.tolist() == plain.beam_indices.tolist()
        ours, theirs = (
            target().compute_transition_scores(out.sequences, out.scores, getattr(out, "beam_indices", None))
            for out in (found, plain)
        )
        seen = ours > -torch.inf  # after its end a text of one beam has no scores
        assert seen.any(1).all()
        torch.testing.assert_close(ours[seen], theirs[seen], rtol=1e-4, atol=1e-4)


def test_transition_scores_of_sampled_beams_add_up() -> None:
    given = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": END, "pad_token_id": PAD}
    given |= {"return_dict_in_generate": True, "output_scores": True, "do_sample": True, "length_penalty": 0.0}
    for drafting in (None, draft()):
        torch.manual_seed(3)
        found = target().generate(**BATCH, **given, assistant_model=drafting, custom_generate=dsbd_generate)
        scores = target().compute_transition_scores(found.sequences, found.scores, found.beam_indices)
        assert scores.sum(1).tolist() == pytest.approx(found.sequences_scores.tolist(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_criteria_may_read_scores(beams: int) -> None:
    """They end a text where the last row's likeliest token is likely enough."""
    seen: list[int] = []

    def sure(ids: Tensor, scores: tuple[Tensor, ...], **_: Any) -> Tensor:
        seen.append(len(scores))
        likely = scores[-1].log_softmax(-1).max() > -2.2
        return torch.full((len(ids),), bool(likely))

    given = {"max_new_tokens": 12, "num_beams": beams, "eos_token_id": END, "pad_token_id": PAD}
    given |= {"return_dict_in_generate": True, "output_scores": True, "stopping_criteria": [sure]}
    for prompt in ((7, 11), (5, 9, 30), (4,), (17, 3)):
        plain = target().generate(**one(*prompt), **given).sequences.tolist()
        steps, seen[:] = max(seen), []
        for drafting in (None, draft()):
            ours = target().generate(**one(*prompt), **given, assistant_model=drafting, custom_generate=dsbd_generate)
            assert ours.sequences.tolist() == plain
            assert max(seen) == steps
            seen.clear()


def test_where_there_are_fewer_hypotheses_the_last_is_repeated() -> None:
    """Two tokens are allowed, and one of them ends: of three that are asked for two exist."""
    options: dict[str, Any] = {"max_new_tokens": 1, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": END}
    options |= {"pad_token_id": PAD, "return_dict_in_generate": True, "output_scores": True}
    options |= {"prefix_allowed_tokens_fn": lambda prompt, tokens: [END, 17]}
    plain = target().generate(**one(7, 11), **options)
    found = target().generate(**one(7, 11), **options, custom_generate=dsbd_generate)
    assert found.sequences[:2].tolist() == plain.sequences[:2].tolist()
    assert found.sequences[2].tolist() == found.sequences[1].tolist()
    assert found.sequences_scores[2] == plain.sequences_scores[2] == -1e9


def test_a_prompt_made_of_the_bos_token() -> None:
    options = {"bos_token_id": 6, "max_new_tokens": 6, "num_beams": 2, "pad_token_id": PAD}
    plain = target().generate(**options)
    assert target().generate(**options, custom_generate=dsbd_generate).tolist() == plain.tolist()


def test_inferred_masks() -> None:
    """Without a mask transformers takes pad tokens on the left for padding."""
    for width in (1, 2):
        options = {"num_beams": width, "repetition_penalty": 1.5}
        check_equal({"input_ids": BATCH["input_ids"]}, width, **{k: v for k, v in options.items() if k != "num_beams"})


# Vision-language models.


TEXT = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
TEXT |= {"vocab_size": 40, "num_key_value_heads": 2, "initializer_range": 0.3}
EYE = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4, image_size=16)
EYE |= {"patch_size": 8}
QWEN_EYE = dict(hidden_size=32, depth=1, num_heads=4, patch_size=8)
# Models with an eye, both of a few weights: the config, and what it takes beside text_config.
SEEING: dict[str, Callable[[], PreTrainedConfig]] = {
    "Gemma 3": lambda: Gemma3Config(text_config=TEXT, vision_config=EYE, mm_tokens_per_image=4, image_token_index=39),
    "LLaVA": lambda: LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**EYE, "model_type": "clip_vision_model"}
    ),
    "Mistral 3": lambda: Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"}, vision_config={**EYE, "model_type": "pixtral", "head_dim": 8}
    ),
    "Qwen2-VL": lambda: Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={**QWEN_EYE, "embed_dim": 32, "mlp_ratio": 2},
    ),
    "Qwen2.5-VL": lambda: Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config={**QWEN_EYE, "out_hidden_size": 32, "intermediate_size": 40},
    ),
    "InternVL": lambda: InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2"}, vision_config={**EYE, "image_size": [16, 16], "patch_size": [8, 8]}
    ),
    "Idefics 3": lambda: Idefics3Config(text_config={**TEXT, "model_type": "llama"}, vision_config=EYE),
}


@cache
def seeing(name: str = "Gemma 3") -> Any:
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(SEEING[name]()).eval()


@pytest.mark.parametrize("ours", [{}, {"assistant_model": "layers:1"}], ids=str)
@pytest.mark.parametrize("said", [{}, {"token_type_ids": torch.zeros(1, 3, dtype=torch.long)}], ids=["", "types"])
def test_text_to_a_vision_language_model(said: dict[str, Tensor], ours: dict[str, Any]) -> None:
    """transformers adds an empty mm_encoder_outputs, and processors say that all tokens are text."""
    check_equal({**one(5, 9, 30), **said}, 3, ours, seeing())


@pytest.mark.parametrize("name", [name for name in SEEING if name != "Gemma 3"])
def test_text_to_other_models_that_see(name: str) -> None:
    model = seeing(name)
    check_equal(one(5, 9, 30), 3, {}, model)
    check_equal(one(5, 9, 30), 1, {}, model)


@pytest.mark.parametrize("name", ["pixel_values", "token_type_ids"])
def test_pictures_are_refused_by_name(name: str) -> None:
    seen = {"pixel_values": torch.ones(1, 3, 16, 16), "token_type_ids": torch.ones(1, 3, dtype=torch.long)}[name]
    with pytest.raises(UserError, match=f"not the input ({name}|mm_encoder_outputs)"):
        seeing().generate(**one(5, 9, 30), **{name: seen}, max_new_tokens=3, custom_generate=dsbd_generate)


# Sampling.


VOCABULARY = 6
SAMPLED = one(1, 2)
Processed = Callable[[list[int], Tensor], Tensor]


@cache
def small_target() -> LlamaForCausalLM:
    model = sharp_llama(VOCABULARY, seed=4)
    with torch.no_grad():
        model.lm_head.weight.div_(3)
    return model


@cache
def small_draft() -> LlamaForCausalLM:
    return sharp_llama(VOCABULARY, seed=5)


@torch.no_grad()
def scores_after(path: list[int], processors: list[Any], log: bool) -> list[float]:
    """What the processors make of logits, or of log-probabilities where several beams are kept."""
    tokens = torch.tensor([[*SAMPLED["input_ids"][0].tolist(), *path]])
    scores = small_target()(input_ids=tokens).logits[:, -1].float()
    scores = scores.log_softmax(-1) if log else scores
    for processor in processors:
        scores = processor(tokens, scores)
    return scores[0].double().tolist()


def shares(scores: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
    """exp, normalised; without what is impossible."""
    table = torch.tensor(list(scores.values()), dtype=torch.float64).softmax(0).tolist()
    return {path: share for path, share in zip(scores, table, strict=True) if share > 0}


def sample_chances(processors: list[Any], tokens: int) -> dict[tuple[int, ...], float]:
    """Exact chance of each continuation under transformers' sampling."""
    now: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(tokens):
        after = {}
        for path, chance in now.items():
            following = {(*path, v): s for v, s in enumerate(scores_after(list(path), processors, log=False))}
            after |= {child: chance * share for child, share in shares(following).items()}
        now = after
    return now


Pair = frozenset[tuple[int, ...]]


def pair_chances(processors: list[Any]) -> dict[Pair, float]:
    """Exact chance of each pair of sequences after two steps of transformers' sampled beam search without EOS.

    Four draws without replacement from the joint at each step; the two likeliest go on, but the last token ends all,
    and then the first two drawn count.
    """

    def draws_of(weights: dict[tuple[int, ...], float], count: int) -> Iterator[tuple[list[tuple[int, ...]], float]]:
        joint = shares(weights)
        for drawn in itertools.permutations(joint, min(count, len(joint))):
            chance, left = 1.0, 1.0
            for child in drawn:
                chance *= joint[child] / left
                left -= joint[child]
            yield list(drawn), chance

    first = {(v,): s for v, s in enumerate(scores_after([], processors, log=True))}
    starts: dict[Pair, float] = defaultdict(float)
    for drawn, chance in draws_of(first, 4):
        starts[frozenset(sorted(drawn, key=lambda child: -first[child])[:2])] += chance
    out: dict[Pair, float] = defaultdict(float)
    for beams, chance in starts.items():
        second = {
            (*beam, v): first[beam] + s
            for beam in sorted(beams)
            for v, s in enumerate(scores_after(list(beam), processors, log=True))
        }
        for drawn, share in draws_of(second, 2):
            out[frozenset(drawn)] += chance * share
    return dict(out)


class Tilt(LogitsProcessor):
    """A user's own, by the row's last token; it leaves scores that do not add up to one."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 0.5 * (input_ids[:, -1:] % 3) * (torch.arange(scores.shape[1]) == 2) - 0.8 * input_ids[:, -1:]


# Options of generate, and the processors that transformers makes of them for one beam and for two.
WARPS: dict[str, tuple[dict[str, Any], Callable[[int], list[Any]]]] = {
    "plain": ({"top_k": 0}, lambda keep: []),
    "temperature": ({"top_k": 0, "temperature": 0.6}, lambda keep: [TemperatureLogitsWarper(0.6)]),
    "top-k": ({"top_k": 3}, lambda keep: [TopKLogitsWarper(3)]),
    "top-1": ({"top_k": 1}, lambda keep: [TopKLogitsWarper(1, min_tokens_to_keep=keep)]),
    "top-p": ({"top_k": 0, "top_p": 0.7}, lambda keep: [TopPLogitsWarper(0.7, min_tokens_to_keep=keep)]),
    "min-p": ({"top_k": 0, "min_p": 0.25}, lambda keep: [MinPLogitsWarper(0.25, min_tokens_to_keep=keep)]),
    "all": (
        {"top_k": 4, "top_p": 0.9, "temperature": 1.5, "repetition_penalty": 1.4},
        lambda keep: [
            RepetitionPenaltyLogitsProcessor(1.4),
            Tilt(),
            TemperatureLogitsWarper(1.5),
            TopKLogitsWarper(4, min_tokens_to_keep=keep),
            TopPLogitsWarper(0.9, min_tokens_to_keep=keep),
        ],
    ),
}


def draws(width: int, count: int, rows: int = 1, **options: Any) -> list[list[int]]:
    """New tokens of sampled sequences: `count` of each of `rows` copies of the prompt."""
    set_seed(7)
    inputs = {name: tensor.repeat(rows, 1) for name, tensor in SAMPLED.items()}
    given = {"do_sample": True, "max_new_tokens": 2, "num_beams": width, "num_return_sequences": count}
    ours = {"assistant_model": small_draft(), "custom_generate": dsbd_generate}
    return small_target().generate(**inputs, **{**given, **ours, **options})[:, 2:].tolist()


def options_of(case: str) -> dict[str, Any]:
    own = LogitsProcessorList([Tilt()]) if case == "all" else None
    return {**WARPS[case][0], "logits_processor": own}


@pytest.mark.parametrize("case", WARPS)
def test_one_beam_is_transformers_sampling(case: str) -> None:
    expected = sample_chances(WARPS[case][1](1), 2)
    counts = Counter(tuple(tokens) for tokens in draws(1, 700, **options_of(case)))
    assert chi_square_p(counts, expected) > PASS


def test_samples_of_one_prompt_are_independent() -> None:
    """Three a row: the first tokens of a row are a draw from the product of three distributions."""
    chances = sample_chances([], 1)
    expected = {a + b + c: chances[a] * chances[b] * chances[c] for a, b, c in itertools.product(chances, repeat=3)}
    found = torch.tensor(draws(1, 3, 400, top_k=0, max_new_tokens=1)).view(400, 3)
    assert chi_square_p(Counter(tuple(row) for row in found.tolist()), expected) > PASS


def test_top_k_keeps_all_that_are_equal_at_its_edge() -> None:
    """As TopKLogitsWarper does; scores of 16-bit models are often equal."""
    model = sharp_llama(VOCABULARY, seed=4)
    with torch.no_grad():
        best = model(input_ids=SAMPLED["input_ids"]).logits[0, -1].argmax()
        model.lm_head.weight[2:] = model.lm_head.weight[best]
    set_seed(7)
    options = {"do_sample": True, "max_new_tokens": 1, "num_return_sequences": 300, "top_k": 1}
    found = model.generate(**SAMPLED, **options, custom_generate=dsbd_generate)[:, 2].tolist()
    scores = model(input_ids=SAMPLED["input_ids"]).logits[0, -1]
    kept = (scores == scores.max()).nonzero().flatten().tolist()
    assert len(kept) >= 4, "the tied tokens must be the likeliest"
    assert chi_square_p(Counter(found), dict.fromkeys(kept, 1 / len(kept))) > PASS


@pytest.mark.parametrize(
    ("case", "given"), [*((case, "argument") for case in WARPS), ("top-1", "config"), ("all", "config")]
)
def test_two_beams_are_drawn_as_transformers_draws_them(case: str, given: str) -> None:
    """From the softmax over (beam, token) of accumulated processed scores, which processors leave unnormalised.

    transformers makes its warpers for the num_beams of the config and does not see one that comes as an argument.
    """
    expected = pair_chances(WARPS[case][1](2))
    options: dict[str, Any] = options_of(case)
    if given == "config":
        config = GenerationConfig(
            do_sample=True, max_new_tokens=2, num_beams=2, num_return_sequences=2, **WARPS[case][0]
        )
        set_seed(7)
        inputs = {name: tensor.repeat(600, 1) for name, tensor in SAMPLED.items()}
        own = {"logits_processor": options["logits_processor"], "generation_config": config}
        ours = {"assistant_model": small_draft(), "custom_generate": dsbd_generate}
        found = small_target().generate(**inputs, **own, **ours)[:, 2:].tolist()
    else:
        found = draws(2, 2, 600, **options)
    counts = Counter(frozenset(map(tuple, found[i : i + 2])) for i in range(0, len(found), 2))
    assert chi_square_p(counts, expected) > PASS


def test_warpers_made_for_more_beams_than_are_kept() -> None:
    """The config asks for two beams, of which a row keeps two tokens at least; with one beam top-1 leaves one."""
    config = GenerationConfig(do_sample=True, num_beams=2, top_k=1, max_new_tokens=4)
    expected = small_target().generate(**SAMPLED, do_sample=False, max_new_tokens=4)
    for _ in range(20):
        given = {"generation_config": config, "num_beams": 1, "custom_generate": dsbd_generate}
        assert small_target().generate(**SAMPLED, **given).tolist() == expected.tolist()


@pytest.mark.parametrize("fault", ["normalised", "unprocessed"])
def test_wrong_samplers_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = PromptRun.process

    def wrong(self: PromptRun, nodes: Any, logits: Tensor, of_target: bool) -> Tensor:
        return (honest(self, nodes, logits, of_target) if fault == "normalised" else logits).log_softmax(-1)

    monkeypatch.setattr(PromptRun, "process", wrong)
    found = draws(2, 2, 600, **options_of("all"))
    counts = Counter(frozenset(map(tuple, found[i : i + 2])) for i in range(0, len(found), 2))
    assert chi_square_p(counts, pair_chances(WARPS["all"][1](2))) < CAUGHT


def test_seeds_reproduce_and_searches_leave_the_random_stream_alone() -> None:
    first, again = draws(2, 2, 20, top_k=0), draws(2, 2, 20, top_k=0)
    assert first == again
    state = torch.get_rng_state()
    target().generate(**BATCH, num_beams=2, max_new_tokens=4, custom_generate=dsbd_generate)
    assert torch.equal(state, torch.get_rng_state())
    small_target().generate(**SAMPLED, do_sample=True, max_new_tokens=2, custom_generate=dsbd_generate)
    assert not torch.equal(state, torch.get_rng_state())


# Fields of GenerationConfig: all that transformers has, each looked at.

USED = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings"),
    *("do_sample", "num_beams", "early_stopping", "length_penalty", "num_return_sequences"),
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "renormalize_logits", "sequence_bias"),
    *("forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
    *("suppress_tokens", "begin_suppress_tokens", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("return_dict_in_generate", "output_scores", "output_logits"),
}
# A value that differs from the default, for those that cannot be seen in the tokens: how plain generate computes them.
WITHOUT_INFLUENCE: dict[str, Any] = {
    "use_cache": False,
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 64,
    "prefill_chunk_size": 2,
    "compile_config": None,
    "disable_compile": True,
    "continuous_batching_config": None,
    "decoder_start_token_id": 4,
    "num_assistant_tokens": 2,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.9,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "prompt_lookup_num_tokens": 3,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
}
REFUSED_BY_TRANSFORMERS = {"token_healing": True}  # it needs a tokenizer
ASKED: dict[str, Any] = {
    "assistant_ensemble_weight": 0.5,
    "cache_implementation": "quantized",
    "constraints": [object()],
    "diversity_penalty": 0.5,
    "dola_layers": "high",
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.5,
    "force_words_ids": [[7]],
    "guidance_scale": 1.5,
    "is_assistant": True,
    "low_memory": True,
    "num_beam_groups": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "penalty_alpha": 0.6,
    "speculation_type": "dflash",
    "use_mtp": True,
    "watermarking_config": WatermarkingConfig(),
}


def test_every_field_of_transformers_generation_config_has_been_looked_at() -> None:
    """A version of transformers with a new field fails here: decide what it means, and put it into one of these."""
    known = [USED, set(WITHOUT_INFLUENCE), set(REFUSED), set(REFUSED_BY_TRANSFORMERS)]
    assert sum(map(len, known)) == len(set().union(*known)), "a field is in two of them"
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert fields - set().union(*known) == set()
    assert set(ASKED) == set(REFUSED)


@pytest.mark.parametrize("field", ASKED)
def test_what_cannot_be_done_is_refused_by_name(field: str) -> None:
    config = GenerationConfig(max_new_tokens=3, use_cache=False)  # quantized caches need a package of their own
    setattr(config, field, ASKED[field])
    with pytest.raises(UserError, match=rf"^{field} is .*[^.]\.$"):
        target().generate(**one(7, 11), generation_config=config, custom_generate=dsbd_generate)


@pytest.mark.parametrize("field", WITHOUT_INFLUENCE)
def test_what_has_no_influence_has_none(field: str) -> None:
    options = {"max_new_tokens": 6, "num_beams": 2, "custom_generate": dsbd_generate, "pad_token_id": PAD}
    expected = target().generate(**BATCH, **options)
    assert target().generate(**BATCH, **options, **{field: WITHOUT_INFLUENCE[field]}).tolist() == expected.tolist()


def test_token_healing_is_refused_by_transformers() -> None:
    with pytest.raises(ValueError, match="token healing"):
        target().generate(**one(7, 11), token_healing=True, custom_generate=dsbd_generate)


# What is refused, and what is left behind.


def filled_cache() -> DynamicCache:
    cache = DynamicCache()
    target()(**one(7), past_key_values=cache)
    return cache


def embedded() -> Tensor:
    return target().get_input_embeddings()(torch.tensor([[7, 11]]))


RIGHT_PADDED = {
    "input_ids": torch.tensor([[7, 11, 4], [5, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]]),
}
HOLES = {"input_ids": torch.tensor([[7, 11, 4, 5]]), "attention_mask": torch.tensor([[1, 0, 1, 1]])}
WRONG_INPUTS: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "embeddings": (lambda: {"inputs_embeds": embedded()}, "not the input inputs_embeds"),
    "a filled cache": (lambda: {**one(7, 11), "past_key_values": filled_cache()}, "past_key_values holds tokens"),
    "padding on the right": (lambda: RIGHT_PADDED, "padding_side='left'"),
    "holes": (lambda: HOLES, "hides tokens that are not padding"),
    "positions of one's own": (lambda: {**one(7, 11), "position_ids": torch.tensor([[4, 5]])}, "position_ids"),
    "a streamer for two": (lambda: {**padded([7], [9]), "streamer": Heard()}, "streamer with 2 texts"),
    "a streamer for two samples": (
        lambda: {**one(7, 11), "streamer": Heard(), "do_sample": True, "num_return_sequences": 2},
        "streamer with 2 texts",
    ),
    "several processes": (lambda: {**one(7, 11), "synced_gpus": True}, "synced_gpus"),
    "a processor that knows the batch": (
        lambda: {
            **BATCH,
            "logits_processor": LogitsProcessorList([EncoderRepetitionPenaltyLogitsProcessor(2.0, BATCH["input_ids"])]),
        },
        "EncoderRepetitionPenaltyLogitsProcessor",
    ),
    "more sequences than beams": (
        lambda: {**one(7, 11), "num_beams": 2, "num_return_sequences": 3},
        "num_return_sequences",
    ),
    "an unknown draft": (lambda: {**one(7, 11), "assistant_model": "nothing:3"}, "nothing:3"),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_inputs_that_cannot_be_taken_are_refused_and_leave_the_model_as_it_was(case: str) -> None:
    make, message = WRONG_INPUTS[case]
    model = target()
    before = model.generation_config.to_dict()
    model.train()
    model.model.layers[0].eval()
    try:
        with pytest.raises(UserError, match=message) as caught:
            model.generate(**{"max_new_tokens": 3, **make()}, custom_generate=dsbd_generate)
        assert model.training and not model.model.layers[0].training
    finally:
        model.eval()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert model.generation_config.to_dict() == before
    check_equal(BATCH, 2)


def test_training_modes_are_kept() -> None:
    model, small = sharp_llama(40, seed=1), sharp_llama(40, seed=2)
    model.train()
    model.lm_head.eval()
    small.train()
    options = {"max_new_tokens": 3, "num_beams": 2}
    model.generate(**one(7, 11), **options, assistant_model=small, custom_generate=dsbd_generate)
    assert model.training and model.model.training and not model.lm_head.training and small.training


# How it knows what generate was given.


def test_a_streamer_and_a_draft_are_those_of_the_innermost_call() -> None:
    """A processor that itself generates, with the same model; both calls have a streamer of their own."""
    inner, outer, lengths = Heard(), Heard(), []

    class Asks(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if not lengths:
                found = target().generate(
                    **one(5, 9), max_new_tokens=3, num_beams=2, streamer=inner, custom_generate=dsbd_generate
                )
                lengths.append(found.shape[1])
                target().generate(**one(5, 9), max_new_tokens=3, custom_generate=dsbd_generate)  # without one
            return scores

    options = {"max_new_tokens": 4, "logits_processor": LogitsProcessorList([Asks()])}
    found = target().generate(**one(7, 11), **options, streamer=outer, custom_generate=dsbd_generate)
    assert outer.tokens == found[0].tolist() and outer.ended
    assert inner.tokens == check_equal(one(5, 9), 2, max_new_tokens=3, eos_token_id=None)[0].tolist() and inner.ended
    assert lengths == [5]


def test_calls_through_a_subclass_and_through_wrappers(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapped(LlamaForCausalLM):
        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return super().generate(*args, **kwargs)

    def generate(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        """A user's own in between, of a name that misleads."""
        return dsbd_generate(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)

    drafts = []
    made = decoding.custom_generate.ModelPair
    monkeypatch.setattr(
        decoding.custom_generate,
        "ModelPair",
        lambda model, small, *a, **k: drafts.append(small) or made(model, small, *a, **k),
    )
    model = Wrapped(target().config).eval()
    model.load_state_dict(target().state_dict())
    for custom in (dsbd_generate, generate, lambda *args, **kwargs: dsbd_generate(*args, **kwargs)):
        heard = Heard()
        given = {"assistant_model": draft(), "streamer": heard, "max_new_tokens": 5}
        found = model.generate(**one(7, 11), **given, custom_generate=custom)
        assert heard.tokens == found[0].tolist() and heard.ended
        assert drafts.pop() is draft()


def test_threads_do_not_see_each_other() -> None:
    """Each with a model, a streamer and a width of its own."""
    heard = [Heard() for _ in range(4)]
    found: dict[int, list[int]] = {}
    models = [sharp_llama(40, seed=seed) for seed in range(4)]

    def work(i: int) -> None:
        options = {"max_new_tokens": 6, "num_beams": 1 + i % 2, "streamer": heard[i]}
        found[i] = models[i].generate(**one(7, 11 + i), **options, custom_generate=dsbd_generate)[0].tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == [streamer.tokens for streamer in heard]


def test_a_call_that_generate_does_not_make_is_refused() -> None:
    """Directly, or from another thread, a streamer or a draft would be lost without a word."""

    def elsewhere(*args: Any, **kwargs: Any) -> Any:
        results: list[Any] = []

        def work() -> None:
            try:
                results.append(dsbd_generate(*args, **kwargs))
            except UserError as error:
                results.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if isinstance(results[0], UserError):
            raise results[0]
        return results[0]

    with pytest.raises(UserError, match="was not called by generate"):
        target().generate(**one(7, 11), max_new_tokens=3, custom_generate=elsewhere)

    def directly(*_: Tensor) -> Any:
        criteria = StoppingCriteriaList([MaxLengthCriteria(6)])
        return dsbd_generate(target(), one(7, 11)["input_ids"], LogitsProcessorList(), criteria, GenerationConfig())

    with pytest.raises(UserError, match="was not called by generate"):
        directly()
    options = {"logits_processor": LogitsProcessorList([directly]), "streamer": Heard(), "max_new_tokens": 3}
    with pytest.raises(UserError, match="was not called by generate"):  # the streamer is that of another call
        target().generate(**one(7, 11), **options, custom_generate=dsbd_generate)


def test_the_tokenizer_of_the_assistant_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, given = small_pair(), []
    made = decoding.custom_generate.ModelPair
    monkeypatch.setattr(
        decoding.custom_generate,
        "ModelPair",
        lambda *args, **options: given.append((args, options)) or made(*args, **options),
    )
    inputs = dict(pair.tokenizer("def area(", return_tensors="pt"))
    both = {"tokenizer": pair.tokenizer, "assistant_tokenizer": pair.tokenizer, "assistant_model": pair.draft}
    pair.target.generate(**inputs, max_new_tokens=3, **both, custom_generate=dsbd_generate)
    (args, options), *_ = given
    assert args[2] is pair.tokenizer and options["draft_tokenizer"] is pair.tokenizer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_beams": 0}, "num_beams is 0"),
        ({"num_beams": 2.0}, "num_beams is 2.0"),
        ({"num_beams": 2, "num_return_sequences": 3}, r"num_return_sequences \(3\) is more than num_beams \(2\)"),
        ({"num_beams": 1, "num_return_sequences": 3}, "or set do_sample=True"),
        ({"num_beams": 4, "draft_width": 2}, r"draft_width \(2\) is less than num_beams \(4\)"),
        ({"num_beams": 2, "length_penalty": "a"}, "length_penalty is 'a'"),
        ({"num_beams": 2, "width_policy": "fixed"}, "give a WidthPolicy"),
    ],
    ids=str,
)
def test_wrong_values_are_named_as_the_caller_named_them(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        target().generate(torch.tensor([[1, 2]]), max_new_tokens=2, custom_generate=dsbd_generate, **options)


def test_the_models_own_layers_are_made_once_and_go_with_it() -> None:
    model = sharp_llama(40, seed=5)
    for _ in range(2):
        model.generate(
            **one(1, 2),
            num_beams=2,
            max_new_tokens=3,
            pad_token_id=PAD,
            assistant_model="layers:1",
            custom_generate=dsbd_generate,
        )
        (made,) = decoding.custom_generate._named[model].values()
    again = decoding.custom_generate._named[model]["layers:1"]
    assert made is again
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("by_the_criterion", [False, True])
def test_an_own_eos_criterion_leaves_the_number_of_candidates_alone(
    monkeypatch: pytest.MonkeyPatch, by_the_criterion: bool
) -> None:
    """Plain generate counts the config's EOS tokens, not the criterion's; who counts those differs."""
    shape: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.4}
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(**shape)).eval()
    options = {"num_beams": 4, "max_new_tokens": 8, "eos_token_id": 2, "pad_token_id": 0}
    if by_the_criterion:
        monkeypatch.setattr(decoding.custom_generate, "_ends", lambda *_: [-1] * 68)
    different = 0
    for first in (53, 92):
        plain, found = (
            model.generate(
                torch.tensor([[first, 9, 30]]),
                **options,
                stopping_criteria=StoppingCriteriaList([EosTokenCriteria(torch.arange(2, 70))]),
                **more,
            ).tolist()
            for more in ({}, {"custom_generate": dsbd_generate})
        )
        different += plain != found
    assert (different > 0) == by_the_criterion
