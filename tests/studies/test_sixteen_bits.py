"""studies/sixteen_bits.py on a tiny model: equal in float32, and each difference with the margin at which it starts."""

from __future__ import annotations

import math

import pytest
import torch

from decoding import ModelPair
from studies import sixteen_bits
from studies.sixteen_bits import Difference, compare, differences, table, token_log_probs
from tests.small_pair import small_pair

PROMPTS = [[5, 6, 7, 8, 9, 10], [20, 21, 22], [30, 31, 32, 33], [7, 9]]


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return small_pair()


def test_in_float32_nothing_differs(pair: ModelPair) -> None:
    found = compare(pair, PROMPTS, 8, widths=(1, 3))
    assert len(found) == 2 * 3 and not any(found.values())
    assert "| 3 | transformers, padded | 0 of 4 | - | - | - |" in table(found, 4)


def test_a_difference_is_told_with_the_margin_at_which_it_starts(pair: ModelPair) -> None:
    prompt, shared, tokens = PROMPTS[0], [11, 12], (13, 14)
    with torch.inference_mode():
        row = pair.target(torch.tensor([[*prompt, *shared]])).logits[0, -1].log_softmax(-1)
    margin = float((row[tokens[0]] - row[tokens[1]]).abs())
    answers = [[*shared, token, 15] for token in tokens]
    (found,) = differences(pair.target, [prompt], [answers[0]], [answers[1]])
    assert (found.prompt, found.place) == (0, 2)
    assert found.token_margin == pytest.approx(margin, abs=1e-5)
    sums = [sum(token_log_probs(pair.target, prompt, answer)) for answer in answers]
    assert found.score_margin == pytest.approx(abs(sums[0] - sums[1]) / 4, abs=1e-5)
    assert differences(pair.target, PROMPTS[:2], [[1], [2]], [[1], [2]]) == []
    (cut,) = differences(pair.target, [prompt], [shared], [answers[0]])
    assert cut.place == 2 and math.isnan(cut.token_margin)


def test_an_engine_that_is_wrong_is_seen(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    right = sixteen_bits.by_engine

    def wrong(*given: object) -> list[list[int]]:
        return [[*answer[:-1], (answer[-1] + 1) % 250] for answer in right(*given)]  # type: ignore[arg-type]

    monkeypatch.setattr(sixteen_bits, "by_engine", wrong)
    found = compare(pair, PROMPTS, 8, widths=(2,))
    assert [len(found[2, name]) for name in ("this engine", "transformers, padded")] == [4, 0]
    assert all(isinstance(each, Difference) and each.place == 7 for each in found[2, "this engine"])


def test_in_16_bits_it_runs_from_end_to_end(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["sixteen_bits", "tiny", "2", "6"])
    sixteen_bits.main()
    printed = capsys.readouterr().out
    assert printed.count(" of 2 |") == 9
