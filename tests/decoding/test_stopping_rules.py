"""Every rule that ends a text, with beams that are searched and beams that are drawn: searched texts are transformers'
own, token for token; drawn ones end as often in each way, and at each length, as transformers' do.

All seeds are fixed. Of about 70 p-values the smallest is expected near 0.015; a wrong rule gives less than 1e-6, or
texts that end in a way that transformers knows none of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, set_seed

from decoding import dsbd_generate
from decoding.loop.prompt_run import Hypothesis, PromptRun
from decoding.loop.search import SearchRun
from tests.decoding.stubs import chi_square_tail, sharp_llama
from tests.small_pair import small_pair, small_tokenizer

PASS, CAUGHT = 3e-4, 1e-6
PROMPT, NEW, DRAWS, PAD = [1, 2], 9, 400, 8
ENDS, STOPS = [0, 3], 5
UNKNOWN = 10**4  # no token of the small pair
FILLED = (PAD, -1)  # behind a text; transformers takes -1 where there are no EOS ids


@cache
def model_of(seed: int = 4) -> LlamaForCausalLM:
    """Soft enough that texts end early, late and never."""
    model = sharp_llama(8, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.div_(3)
    return model


def after_token(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """A criterion that ends a text behind a token."""
    return ids[:, -1] == STOPS


def after_length(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """A criterion that ends all texts at a length."""
    return torch.full((len(ids),), ids.shape[1] >= len(PROMPT) + 4)


def after_sum(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """A criterion that looks at all of a text."""
    return ids.sum(1) > 22


LENGTHS = {"max_new_tokens": NEW}
RULES: dict[str, dict[str, Any]] = {
    **{
        f"early {early}, penalty {penalty}": {"early_stopping": early, "length_penalty": penalty}
        for early in (False, True, "never")
        for penalty in (-1.0, 0.0, 0.5, 1.0, 2.0)
    },
    "one end": {"eos_token_id": 3},
    "five ends": {"eos_token_id": [0, 3, 4, 5, 6], "early_stopping": True},
    "no end": {"eos_token_id": None},
    "ends that cannot occur": {"eos_token_id": [3, -1, 900]},
    "max_length": {"max_new_tokens": None, "max_length": len(PROMPT) + 6},
    "max_length, early": {"max_new_tokens": None, "max_length": len(PROMPT) + 6, "early_stopping": True},
    "one token": {"max_new_tokens": 1},
    "min_length": {"min_length": len(PROMPT) + 4},
    "min_length, early": {"min_length": len(PROMPT) + 4, "early_stopping": True},
    "min_new_tokens": {"min_new_tokens": 3, "early_stopping": "never"},
    "min is max": {"min_new_tokens": NEW, "early_stopping": True},
    "a token's criterion": {"stopping_criteria": [after_token]},
    "a token's criterion, early": {"stopping_criteria": [after_token], "early_stopping": True},
    "a criterion alone": {"stopping_criteria": [after_token], "eos_token_id": None, "early_stopping": True},
    "a length's criterion": {"stopping_criteria": [after_length]},
    "a sum's criterion": {"stopping_criteria": [after_sum], "early_stopping": "never", "length_penalty": 0.0},
    "no time": {"max_time": 1e-9},
    "much time": {"max_time": 1e6, "early_stopping": True},
    "forced end": {"forced_eos_token_id": 3, "early_stopping": True},
    "decay": {"exponential_decay_length_penalty": (2, 1.5), "early_stopping": True},
}


def run(rule: str, prompts: torch.Tensor, sampled: bool, ours: dict[str, Any], beams: int = 3) -> list[list[list[int]]]:
    """All texts of each prompt, best first, without padding."""
    options: dict[str, Any] = {**LENGTHS, "eos_token_id": ENDS, **RULES[rule], "pad_token_id": PAD}
    options = {name: value for name, value in options.items() if value is not None or name == "eos_token_id"}
    options["stopping_criteria"] = list(options.get("stopping_criteria", []))
    if sampled:
        options |= {"do_sample": True, "top_k": 0}
        set_seed(11)
    found = model_of().generate(
        prompts, attention_mask=torch.ones_like(prompts), num_beams=beams, num_return_sequences=beams, **options, **ours
    )
    texts = [[token for token in row if token not in FILLED] for row in found[:, prompts.shape[1] :].tolist()]
    return [texts[i : i + beams] for i in range(0, len(texts), beams)]


def ending(text: list[int], rule: str) -> str:
    """The way in which a text ended."""
    options = {**LENGTHS, "eos_token_id": ENDS, **RULES[rule]}
    ends = options["eos_token_id"]
    longest = options.get("max_new_tokens") or options["max_length"] - len(PROMPT)
    if text and text[-1] in (ends if isinstance(ends, list) else [ends]):
        return "end"
    stops: list[Callable[..., torch.Tensor]] = options.get("stopping_criteria", [])
    if "max_time" in options and options["max_time"] < 1:
        stops = [lambda ids, scores: torch.tensor([True])]
    if any(bool(stop(torch.tensor([PROMPT + text]), None)) for stop in stops):
        return "criterion"
    return "full" if len(text) == longest else "cut off"


def ways(rule: str, ours: dict[str, Any]) -> tuple[Counter[Any], Counter[str]]:
    """Ways and lengths of the best and the last text of each draw; ways of all texts."""
    found = run(rule, torch.tensor([PROMPT] * DRAWS), True, ours)
    outer = Counter(tuple((ending(text, rule), len(text)) for text in (texts[0], texts[-1])) for texts in found)
    return outer, Counter(ending(text, rule) for texts in found for text in texts)


def same_p(one: Counter[Any], other: Counter[Any], least: int = 10) -> float:
    """p-value of two counts being of one distribution; rare outcomes are pooled."""
    total = one + other
    bins, rest = [], [0, 0]
    for outcome in total:
        pair = [one[outcome], other[outcome]]
        if total[outcome] >= least:
            bins.append(pair)
        else:
            rest = [rest[0] + pair[0], rest[1] + pair[1]]
    bins += [rest] if sum(rest) else []
    shares = one.total() / total.total(), other.total() / total.total()
    cells = [(seen, sum(pair) * share) for pair in bins for seen, share in zip(pair, shares, strict=True)]
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    return chi_square_tail(statistic, len(bins) - 1)


def drafted(depth: int = 2) -> dict[str, Any]:
    return {"custom_generate": dsbd_generate, "assistant_model": model_of(5), "draft_depth": depth}


@cache
def plain_ways(rule: str) -> tuple[Counter[Any], Counter[str]]:
    return ways(rule, {})


@pytest.mark.parametrize("rule", RULES)
def test_searched_texts_are_transformers(rule: str) -> None:
    """Of 24 prompts, all beams, none differs."""
    prompts = torch.tensor([[a, b] for a in range(1, 7) for b in (1, 2, 4, 6)])
    for beams in (2, 3):
        assert run(rule, prompts, False, drafted(), beams) == run(rule, prompts, False, {}, beams)


@pytest.mark.parametrize("rule", RULES)
def test_drawn_texts_end_as_transformers_do(rule: str) -> None:
    outer, kinds = ways(rule, drafted())
    expected_outer, expected = plain_ways(rule)
    assert set(kinds) <= set(expected), f"{kinds}, transformers {expected}"
    assert kinds["cut off"] == expected["cut off"] == 0
    assert same_p(outer, expected_outer) > PASS, f"{outer}, transformers {expected_outer}"


def competing(self: PromptRun) -> list[Hypothesis]:
    """Beams that still grow compete with those that ended."""
    return self.pool + [self._hypothesis(beam, False) for beam in self.beams]


def too_late(self: PromptRun) -> bool:
    """Nothing but a full text or no beam ends a prompt."""
    return not self.beams or self.stats.new_tokens >= self.config.max_new_tokens


def too_early(self: PromptRun) -> bool:
    """Any text that ended ends a prompt."""
    return not self.beams or bool(self.pool) or self.stats.new_tokens >= self.config.max_new_tokens


@pytest.mark.parametrize(
    ("method", "wrong", "rule"),
    [
        ("_hypotheses", competing, "early True, penalty 1.0"),
        ("_hypotheses", competing, "a criterion alone"),
        ("_is_done", too_late, "early True, penalty 1.0"),
        ("_is_done", too_early, "early False, penalty 2.0"),
    ],
)
def test_a_wrong_rule_is_caught(method: str, wrong: Any, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected_outer, expected = plain_ways(rule)
    monkeypatch.setattr(PromptRun, method, wrong)
    outer, kinds = ways(rule, drafted())
    assert kinds["cut off"] > 0 or not set(kinds) <= set(expected) or same_p(outer, expected_outer) < CAUGHT
    monkeypatch.setattr(SearchRun, method, wrong)
    prompts = torch.tensor([[a, b] for a in range(1, 7) for b in (1, 2, 4, 6)])
    assert run(rule, prompts, False, drafted()) != run(rule, prompts, False, {})


@pytest.mark.parametrize("early", [False, True])
def test_stop_strings(early: bool) -> None:
    """Searched texts are equal; drawn ones end as often, and none is cut off in the middle."""
    pair, tokenizer = small_pair(), small_tokenizer()
    strings = [chr(code) for code in range(33, 110, 3)]
    inputs = tokenizer("def area(", return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 3, "eos_token_id": None}
    options |= {"stop_strings": strings, "tokenizer": tokenizer, "early_stopping": early, "pad_token_id": UNKNOWN}
    ours = {"custom_generate": dsbd_generate, "assistant_model": pair.draft}
    searched = [pair.target.generate(**inputs, **options, **more)[0].tolist() for more in ({}, ours)]
    assert searched[0] == searched[1]
    length, found = inputs["input_ids"].shape[1], []
    for more in ({}, ours):
        set_seed(5)
        many = {name: rows.repeat(200, 1) for name, rows in inputs.items()}
        rows = pair.target.generate(**many, **options, **more, do_sample=True, top_k=0)[:, length:]
        texts = [[token for token in row.tolist() if token not in (-1, UNKNOWN)] for row in rows]
        stopped = [any(string in tokenizer.decode(text) for string in strings) for text in texts]
        assert all(stop or len(text) == 12 for stop, text in zip(stopped, texts, strict=True))
        found.append(Counter((stopped[i], len(texts[i])) for i in range(0, len(texts), 3)))
    assert same_p(*found) > PASS, found
