"""The knob: values read from a results table, what is between its rows, and what cannot be read."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest

from controller import LearnedWidth
from controller.checkpoint import save_controller, weights_sha256
from controller.width_value import choose_width_value, warn_of_shared_prompts
from decoding import UserError
from decoding.results_file import SCHEMA_VERSION
from tests.controller.test_policy import network, provenance

POINTS = [(0.0, -1.60, 400.0), (1.0, -1.40, 300.0), (10.0, -1.20, 200.0), (100.0, -1.10, 100.0)]


def row(method: str, log_prob: float, speed: float, width: int = 4, **settings: Any) -> dict[str, Any]:
    metrics = {"log_prob": log_prob, "tokens_per_second": speed, "modelled_speed": 2 * speed}
    summary = {name: {"value": value, "low": value, "high": value} for name, value in metrics.items()}
    config = {"target_width": width}
    return {"name": method, "method": method, "settings": settings, "config": config, "summary": summary}


def results(points: list[tuple[float, float, float]] | None = None, reference: float = -1.0) -> dict[str, Any]:
    """Learned rows in any order among others, as evaluate.py gives them."""
    learned = [row("learned", quality, speed, width_value=v) for v, quality, speed in reversed(points or POINTS)]
    others = [row("beam_sample", -2.0, 90.0, width=2), row("beam_sample", reference, 80.0), row("fixed", -0.5, 999.0)]
    return {"schema_version": SCHEMA_VERSION, "rows": [*others, *learned]}


@pytest.mark.parametrize(
    ("speed", "value"),
    [
        (100.0, 100.0),
        (50.0, 100.0),  # all are fast enough: the best one
        (200.0, 10.0),
        (150.0, math.sqrt(1000.0)),  # half way from 10 to 100 in the logarithm
        (250.0, math.sqrt(10.0)),
        (350.0, 0.5),  # from 0 to 1 in the value itself
        (400.0, 0.0),
    ],
)
def test_a_speed_is_reached_with_the_best_quality(speed: float, value: float) -> None:
    assert choose_width_value(results(), target_tokens_per_second=speed) == pytest.approx(value)


@pytest.mark.parametrize(
    ("drop", "value"),
    [(0.1, 100.0), (0.2, 10.0), (0.15, math.sqrt(1000.0)), (0.3, math.sqrt(10.0)), (0.5, 0.5), (0.6, 0.0), (9.0, 0.0)],
)
def test_a_drop_is_kept_with_the_smallest_value(drop: float, value: float) -> None:
    assert choose_width_value(results(), min_logprob_drop=drop) == pytest.approx(value)


def test_better_than_the_reference_needs_no_drop() -> None:
    assert choose_width_value(results(reference=-1.3), min_logprob_drop=0) == pytest.approx(math.sqrt(10.0))


def test_another_speed_is_read_where_it_is_named() -> None:
    assert choose_width_value(results(), target_tokens_per_second=400.0, speed="modelled_speed") == 10.0
    with pytest.raises(UserError, match=r"has no joules; its metrics are log_prob, modelled_speed, tokens_per_second"):
        choose_width_value(results(), target_tokens_per_second=400.0, speed="joules")


def test_noisy_rows_are_read_as_if_more_were_never_worse_nor_faster() -> None:
    noisy = [(1.0, -1.4, 300.0), (2.0, -1.5, 320.0), (4.0, -1.2, 200.0), (8.0, -1.25, 190.0)]
    assert choose_width_value(results(noisy), target_tokens_per_second=190.0) == 4.0, "8 is slower and no better"
    assert choose_width_value(results(noisy), target_tokens_per_second=300.0) == 1.0, "2 is no better"
    assert choose_width_value(results(noisy), min_logprob_drop=0.4) == 1.0
    assert choose_width_value(results(noisy), min_logprob_drop=0.3) == pytest.approx(math.sqrt(8.0))
    with pytest.raises(UserError, match=r"reach 190 to 300\."):
        choose_width_value(results(noisy), target_tokens_per_second=310.0)


def test_one_row_and_equal_values() -> None:
    assert choose_width_value(results([(3.0, -1.2, 100.0)]), target_tokens_per_second=90.0) == 3.0
    twice = [(1.0, -1.5, 300.0), (1.0, -1.3, 320.0), (4.0, -1.2, 200.0)]  # a mean of -1.4 and 310
    assert choose_width_value(results(twice), min_logprob_drop=0.4) == pytest.approx(1.0)


def without(method: str) -> dict[str, Any]:
    found = results()
    return {**found, "rows": [row for row in found["rows"] if row["method"] != method]}


@pytest.mark.parametrize(
    ("found", "targets", "sentence"),
    [
        (results(), {}, "give one of the two"),
        (results(), {"min_logprob_drop": 0.1, "target_tokens_per_second": 10.0}, "give one of the two"),
        (results(), {"min_logprob_drop": -0.1}, r"give a number of at least 0 \(nats per token"),
        (results(), {"min_logprob_drop": True}, r"give a number of at least 0 \(nats per token"),
        (results(), {"target_tokens_per_second": 0}, "give a number above 0"),
        (results(), {"target_tokens_per_second": float("nan")}, "give a number above 0"),
        (results(), {"target_tokens_per_second": 401.0}, "is 401; the table's learned rows reach 100 to 400"),
        (results(), {"min_logprob_drop": 0.05}, "is 0.05; the table's learned rows lie 0.1 to 0.6 nats"),
        (without("learned"), {"min_logprob_drop": 0.1}, "no learned row with a width_value"),
        (without("beam_sample"), {"min_logprob_drop": 0.1}, "no beam_sample row of target_width 4"),
        ({"schema_version": 7, "rows": []}, {"min_logprob_drop": 0.1}, "version 7; this code reads 2"),
        ([1], {"min_logprob_drop": 0.1}, "schema version None"),
        ({"schema_version": 2, "rows": [{"method": "learned"}]}, {"min_logprob_drop": 0.1}, "no rows with method"),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused(found: Any, targets: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        choose_width_value(found, **targets)


def test_several_references_are_refused() -> None:
    found = results()
    found["rows"].append(row("learned", -1.0, 100.0, width=2, width_value=2.0))
    with pytest.raises(UserError, match="target widths 2, 4"):
        choose_width_value(found, min_logprob_drop=0.1)


def test_from_a_file_and_into_a_policy(tmp_path: Path) -> None:
    path, controller = tmp_path / "results.json", tmp_path / "controller"
    save_controller(network(), controller, provenance())
    found = {**results(), "provenance": {"controller_sha256": weights_sha256(controller)}}
    path.write_text(json.dumps(found))
    assert choose_width_value(path, target_tokens_per_second=200.0) == pytest.approx(10.0)
    learned = LearnedWidth.load(controller, results=str(path), target_tokens_per_second=200.0, clock="table")
    assert learned.width_value == pytest.approx(10.0) and learned.clock == "table"
    assert LearnedWidth.load(controller, results=found, min_logprob_drop=0.1).width_value == pytest.approx(100.0)
    for options, sentence in (
        ({"results": path, "min_logprob_drop": 0.1, "width_value": 3.0}, "width_value is 3.0 beside results, min_log"),
        ({"min_logprob_drop": 0.1}, "min_logprob_drop without results"),
        ({"results": path}, "give one of the two"),
        ({"results": tmp_path / "absent.json", "min_logprob_drop": 0.1}, r"absent.json' cannot be read"),
        ({"results": controller / "config.json", "min_logprob_drop": 0.1}, "schema version None|cannot be read"),
    ):
        with pytest.raises(UserError, match=sentence):
            LearnedWidth.load(controller, **options)


STDLIB = {"name": "stdlib", "prompt_tokens": 128}


def of_task(task: dict[str, Any] = STDLIB) -> dict[str, Any]:
    """Results as above of the prompts a and b of the test split."""
    found = results()
    for line in found["rows"]:
        line["prompts"] = [{"prompt_id": "a"}, {"prompt_id": "b"}]
    return {**found, "provenance": {"task": {**task, "split": "test", "prompts": 2}}}


def test_a_width_value_that_is_measured_on_its_own_prompts_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"on 2 of the 3 prompts that are measured now \(split test of stdlib\)"):
        warn_of_shared_prompts(of_task(), {**STDLIB, "prompt_tokens": 64}, ["a", "c", "b"])
    with pytest.warns(UserWarning, match=r"prompts\.split=val"):
        warn_of_shared_prompts(of_task({"name": "jsonl", "sha256": "1"}), {"name": "jsonl", "sha256": "1"}, ["a"])


@pytest.mark.parametrize(
    ("task", "ids"),
    [(STDLIB, ["c", "d"]), ({"name": "squad"}, ["a", "b"]), ({"name": "stdlib", "sha256": "another file"}, ["a"])],
)
def test_other_prompts_are_not_warned_of(task: dict[str, Any], ids: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_shared_prompts(of_task(), task, ids)


def test_results_of_other_weights_are_refused(tmp_path: Path) -> None:
    """Where the controller lies does not matter, what is in it does."""
    save_controller(network(), tmp_path / "one", provenance())
    (tmp_path / "one").rename(tmp_path / "moved")
    found = {**results(), "provenance": {"controller_sha256": weights_sha256(tmp_path / "moved")}}
    assert LearnedWidth.load(tmp_path / "moved", results=found, min_logprob_drop=0.1).width_value == 100.0
    other = network()
    other.accept_bias.data += 1.0
    save_controller(other, tmp_path / "moved", provenance())
    for results_of, sentence in ((found, "sha256 [0-9a-f]{64}; this one's have"), (results(), r"\(not recorded\)")):
        with pytest.raises(UserError, match=sentence):
            LearnedWidth.load(tmp_path / "moved", results=results_of, min_logprob_drop=0.1)
        assert choose_width_value(results_of, min_logprob_drop=0.1) == 100.0, "for whichever controller they are of"
