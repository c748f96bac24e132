"""Verdicts in words: what follows from rows that are plainly faster, slower, or neither."""

from __future__ import annotations

from typing import Any

import pytest

from decoding.measure.verdict_words import against, verdict_lines


def row(
    method: str, family: str, seconds: list[float], mode: str = "beam_search", drafts: bool = False
) -> dict[str, Any]:
    prompts = [
        {
            "tokens": [i, i + 1],
            "wall_seconds": one,
            "stats": {"new_tokens": 64, "forests": [[4, 4]] if drafts else [[]]},
        }
        for i, one in enumerate(seconds)
    ]
    config = {"mode": mode, "target_width": 4}
    return dict(method=method, name=method, family=family, batch_size=1, config=config, prompts=prompts, summary={})


STEADY = [1.0] * 20
MIXED = [0.5, 2.0] * 10


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ([0.5] * 20, "Drafting pays"),
        ([2.0] * 20, "Drafting does not pay"),
        (MIXED, "Whether drafting pays is not decided"),
    ],
)
def test_drafting_pays_does_not_or_is_not_decided(seconds: list[float], words: str) -> None:
    base, other = row("beam_search", "ours", STEADY), row("speculative_beam_search", "hand-set", seconds, drafts=True)
    (line,) = verdict_lines({"rows": [base, other]})
    assert line.startswith(words)


def test_other_texts_or_other_modes_are_not_compared() -> None:
    base = row("beam_search", "ours", STEADY)
    other = row("fixed", "hand-set", [0.1] * 20, drafts=True)
    for prompt in other["prompts"][:3]:  # beams were given up for speed
        prompt["tokens"] = [99]
    assert verdict_lines({"rows": [base, other]}) == []
    assert verdict_lines({"rows": [base, row("fixed", "hand-set", [0.1] * 20, mode="beam_sample", drafts=True)]}) == []


def test_a_ratio_is_of_totals_and_counts_equal_texts() -> None:
    fast, slow = row("a", "ours", [1.0, 3.0]), row("b", "ours", [4.0, 4.0])
    fast["prompts"][0]["tokens"] = [7]
    found = against(fast, slow)
    assert (found.ratio, found.same, found.of) == (2.0, 1, 2)
    assert found.low <= found.ratio <= found.high
