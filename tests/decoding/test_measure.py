"""Measuring: which rows there are, in which order they run, and what the target says of a text."""

from __future__ import annotations

import pytest
import torch

from decoding import DecodeResult, DecodeStats, DecodingConfig, UserError
from decoding.baselines import METHODS
from decoding.decoder import Prompts
from decoding.measure import Row, log_probability, make_rows, run_rows
from decoding.tasks.base import Prompt
from tests.small_pair import small_pair

CONFIG = DecodingConfig(target_width=4, draft_width=6, draft_depth=3, top_k=10)


def names(policies: list[str], **grid: list[float]) -> list[str]:
    return [row.name for row in make_rows(policies, METHODS, CONFIG, grid)]


def test_rows_are_the_grid_with_reference_rows_at_every_width() -> None:
    assert names(["fixed", "threshold"], widths=[2, 4], draft_widths=[3, 6], thresholds=[0.5, 0.9]) == [
        "beam_sample M=2",
        "beam_sample M=4",
        "hf_beam_sample M=2",
        "hf_beam_sample M=4",
        "fixed M=2 w=3 γ=3",
        "fixed M=2 w=6 γ=3",
        "fixed M=4 w=6 γ=3",  # w=3 could never pass
        "threshold M=4 w=6 γ=3 threshold=0.5",
        "threshold M=4 w=6 γ=3 threshold=0.9",
    ]


def test_rows_take_only_the_axes_of_their_method() -> None:
    found = names(
        ["speculative", "multi_draft", "hf_assisted", "fixed"], widths=[4], depths=[2, 4], asked_widths=[2, 4]
    )
    assert [name for name in found if "beam_sample" not in name] == [
        "speculative M=1 γ=2",
        "speculative M=1 γ=4",
        "multi_draft M=1 w=6 γ=2",
        "multi_draft M=1 w=6 γ=4",
        "hf_assisted M=1",
        "fixed M=2/4 w=6 γ=2",
        "fixed M=4 w=6 γ=2",
        "fixed M=2/4 w=6 γ=4",
        "fixed M=4 w=6 γ=4",
    ]
    assert names(["beam_sample"]).count("beam_sample M=4") == 1


def test_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"'fixd'; choose among multinomial, beam_sample"):
        names(["fixd"])
    with pytest.raises(UserError, match=r"grid holds width; its axes are widths"):
        names(["fixed"], width=[2])
    with pytest.raises(UserError, match=r"draft_width \(6\) is less than target_width \(8\)"):
        names(["fixed"], widths=[8])
    with pytest.raises(UserError, match="no row for 'fixed'"):
        names(["fixed"], asked_widths=[9])


def test_rows_take_turns_with_the_same_seed() -> None:
    calls: list[tuple[str, int, float]] = []

    def method(name: str):  # type: ignore[no-untyped-def]
        def generate(prompts: Prompts, generator: torch.Generator) -> list[DecodeResult]:
            calls.append((name, prompts[0][0], float(torch.rand(1, generator=generator))))
            return [DecodeResult([[1, 2]], [0.0], [False], DecodeStats(new_tokens=2, iterations=1))]

        return generate

    rows = [Row(name, {}, CONFIG) for name in "abc"]
    prompts = [Prompt(f"p{i}", [i]) for i in range(3)]
    done: list[str] = []
    measured = run_rows(
        rows, [method(n) for n in "abc"], prompts, [Prompt("w", [9])], 0, torch.device("cpu"), done.append
    )
    assert [(name, token) for name, token, _ in calls] == [
        *(("a", 9), ("b", 9), ("c", 9)),
        *(("b", 0), ("c", 0), ("a", 0)),
        *(("c", 1), ("a", 1), ("b", 1)),
        *(("a", 2), ("b", 2), ("c", 2)),
    ]
    for i in range(0, 12, 3):
        assert len({number for _, _, number in calls[i : i + 3]}) == 1
    assert len({number for _, _, number in calls}) == 4
    assert [[m.prompt_id for m in row] for row in measured] == [["p0", "p1", "p2"]] * 3
    assert len(done) == 12
    assert measured[0][0].joules is None


def test_log_probability_is_that_of_one_token_at_a_time() -> None:
    model, prompt, text = small_pair().target, [3, 4, 5], [6, 7, 8, 9]
    total = 0.0
    for i, token in enumerate(text):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text[:i]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    assert log_probability(model, prompt, text) == pytest.approx(total, abs=1e-4)  # float32 logits
