"""Measuring: which rows there are, in which order they run, and what the target says of a text."""

from __future__ import annotations

import json

import pytest
import torch

from decoding import DecodeResult, DecodeStats, DecodingConfig, UserError
from decoding.baselines import METHODS, Streams
from decoding.decoder import OutOfDeviceMemory, Prompts
from decoding.files import json_bytes
from decoding.measure import Measurement, Row, log_probability, make_rows, run_rows
from decoding.tasks.base import Prompt, stable_hash
from decoding.widths import IterationRecord, LayerRecord
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
    with pytest.raises(UserError, match="no row for 'fixed': asked_widths asks for more than the target width"):
        names(["fixed"], asked_widths=[9])
    with pytest.raises(UserError, match="final_widths asks for more"):
        names(["fixed"], widths=[4], final_widths=[8])
    with pytest.raises(UserError, match=r"grid\.surpluses is given with exact=true"):
        make_rows(["fixed"], METHODS, CONFIG.with_changes(exact=True), {"surpluses": ["keep", "drop"]})
    with pytest.raises(UserError, match="references holds 'hf_beam'; choose among"):
        make_rows(["fixed"], METHODS, CONFIG, {}, references=["hf_beam"])
    with pytest.raises(UserError, match=r"grid\.widths is 4; give a list, such as \[4\]"):
        make_rows(["fixed"], METHODS, CONFIG, {"widths": 4})


def test_rows_that_draft_nothing_are_there_once_for_each_width() -> None:
    wide = CONFIG.with_changes(target_width=8, draft_width=8)
    grid = {"widths": [4, 8], "draft_widths": [4, 8], "depths": [0, 2]}
    found = [row.name for row in make_rows(["fixed"], METHODS, wide, grid, references=())]
    assert [name for name in found if "γ=0" in name] == ["fixed M=4 w=4 γ=0", "fixed M=8 w=8 γ=0"]
    grid = {"widths": [8], "draft_widths": [6, 8], "depths": [0], "shares": [0.5, 0.9]}
    assert len(make_rows(["mass"], METHODS, wide, grid, references=())) == 2


@pytest.mark.parametrize(("widths", "expected"), [([], 4), ([1, 2], 4), ([6], 6)])
def test_policies_that_choose_m_have_the_configs_width_or_more(widths: list[int], expected: int) -> None:
    rows = make_rows(["threshold", "fixed"], METHODS, CONFIG, {"widths": widths}, references=())
    assert {row.config.target_width for row in rows if row.method == "threshold"} == {expected}
    assert {row.config.target_width for row in rows if row.method == "fixed"} == set(widths or [4])


def test_the_paper_has_its_own_rules_where_others_are_exact() -> None:
    (row,) = make_rows(["paper"], METHODS, CONFIG.with_changes(exact=True), {}, references=())
    assert (row.config.surplus, row.config.refill, row.config.exact) == ("drop", "full", False)


@pytest.mark.parametrize("name", ["beam_sample", "multinomial", "beam_search"])
def test_references_keep_their_beams_whatever_the_policies_do(name: str) -> None:
    (row,) = make_rows([name], METHODS, CONFIG.with_changes(one_beam_cache=True), {}, references=())
    assert not row.config.one_beam_cache


def test_an_interrupted_run_gives_what_all_rows_have_measured() -> None:
    count = {"a": 0, "b": 0}

    def method(name: str):  # type: ignore[no-untyped-def]
        def generate(prompts: Prompts, streams: Streams) -> list[DecodeResult]:
            count[name] += 1
            if name == "b" and count[name] == stop:
                raise KeyboardInterrupt
            stats = DecodeStats(new_tokens=2, iterations=1, seconds={"target": 0.5})
            return [DecodeResult([[1, 2]], [0.0], [False], stats) for _ in prompts]

        return generate

    rows, prompts = [Row(name, {}, CONFIG) for name in "ab"], [Prompt(str(i), [1]) for i in range(5)]
    calls, device = [method(name) for name in "ab"], torch.device("cpu")
    stop = 4  # one prompt to warm up, then the third
    found = run_rows(rows, calls, prompts, prompts[:1], 0, device)
    assert [[m.prompt_id for m in row] for row in found] == [["0", "1"], ["0", "1"]]
    count, stop = {"a": 0, "b": 0}, 2
    with pytest.raises(KeyboardInterrupt):
        run_rows(rows, calls, prompts, prompts[:1], 0, device)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_take_turns_with_the_same_seed(batch_size: int) -> None:
    """A row's turn takes `batch_size` prompts; a prompt's stream is the same in every row and in every batch."""
    calls: list[tuple[str, int, float]] = []

    def method(name: str):  # type: ignore[no-untyped-def]
        def generate(prompts: Prompts, streams: Streams) -> list[DecodeResult]:
            assert not isinstance(streams, torch.Generator)
            stats = DecodeStats(new_tokens=2, iterations=1, seconds={"target": 0.5})
            for prompt, stream in zip(prompts, streams, strict=True):
                calls.append((name, int(prompt[0]), float(torch.rand(1, generator=stream))))
            return [DecodeResult([[1, 2]], [0.0], [False], stats) for _ in prompts]

        return generate

    rows = [Row(name, {}, CONFIG) for name in "abc"]
    prompts = [Prompt(f"p{i}", [i]) for i in range(3)]
    done: list[str] = []
    methods, warmup, cpu = [method(n) for n in "abc"], [Prompt("w", [9])], torch.device("cpu")
    measured = run_rows(rows, methods, prompts, warmup, 0, cpu, done.append, batch_size)
    turns = {
        1: [("abc", [9]), ("bca", [0]), ("cab", [1]), ("abc", [2])],
        2: [("abc", [9]), ("bca", [0, 1]), ("cab", [2])],
    }
    assert [(name, token) for name, token, _ in calls] == [
        (name, token) for names, tokens in turns[batch_size] for name in names for token in tokens
    ]
    assert all(len({number for _, token, number in calls if token == t}) == 1 for t in (9, 0, 1, 2))
    assert len({number for _, _, number in calls}) == 4
    alone = torch.rand(1, generator=torch.Generator().manual_seed(stable_hash("0 p1") % 2**62))
    assert {number for _, token, number in calls if token == 1} == {float(alone)}, "whatever the batch is"
    assert [[m.prompt_id for m in row] for row in measured] == [["p0", "p1", "p2"]] * 3
    assert len(done) == 12
    assert measured[0][0].joules is None


def test_a_row_that_runs_out_of_memory_loses_no_other() -> None:
    def method(error: Exception | None):  # type: ignore[no-untyped-def]
        def generate(prompts: Prompts, streams: Streams) -> list[DecodeResult]:
            if error is not None and int(prompts[0][0]) == 1:
                raise error
            stats = DecodeStats(new_tokens=1, iterations=1, seconds={"target": 0.5})
            return [DecodeResult([[1]], [0.0], [False], stats) for _ in prompts]

        return generate

    errors = [None, OutOfDeviceMemory(CONFIG, 4, []), torch.OutOfMemoryError("CUDA out of memory")]
    rows, methods = [Row(name, {}, CONFIG) for name in "abc"], [method(error) for error in errors]
    prompts = [Prompt(f"p{i}", [i]) for i in range(3)]
    failed: dict[int, str] = {}
    measured = run_rows(rows, methods, prompts, [], 0, torch.device("cpu"), failed=failed)
    assert [len(row) for row in measured] == [3, 1, 1]
    assert set(failed) == {1, 2}
    assert "Lower batch_size (4)" in failed[1]
    assert "lower batch_size" in failed[2]
    with pytest.raises(UserError, match="ran out of memory"):
        run_rows(rows, methods, prompts, [], 0, torch.device("cpu"))


def test_log_probability_is_that_of_one_token_at_a_time() -> None:
    model, prompt, text = small_pair().target, [3, 4, 5], [6, 7, 8, 9]
    total = 0.0
    for i, token in enumerate(text):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text[:i]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    assert log_probability(model, prompt, text) == pytest.approx(total, abs=1e-4)  # float32 logits


def test_what_a_prompt_took_is_written_as_short_lists() -> None:
    layers = (LayerRecord(1, 6, 4, 5, True), LayerRecord(2, 6, 4, 2, False))
    records = [IterationRecord(layers, 2, 0.1, roots=1, drafts=(6, 6, 6))] * 64
    stats = DecodeStats(prompt_tokens=9, new_tokens=128, iterations=64, records=records)
    written = Measurement("p", 6.4, None, stats, [1, 2], False).to_dict()
    content = json_bytes(written)
    assert len(content) < 40 * stats.new_tokens
    read = json.loads(content)["stats"]
    assert (read["target_widths"], read["draft_widths"], read["accepted"]) == ([4] * 128, [6] * 128, [5, 2] * 64)
    assert (read["passed"], read["roots"], read["forests"]) == ([True, False] * 64, [1] * 64, [[6, 6, 6]] * 64)
    assert (read["prompt_tokens"], read["new_tokens"], read["iterations"]) == (9, 128, 64)
    assert read["seconds"] == stats.seconds and "records" not in read
