"""Turns: in which order rows decode, what is left of an interrupted run, and what the target says of a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decoding import DecodeResult, DecodeStats, DecodingConfig, UserError
from decoding.decoder import OutOfDeviceMemory, Prompts
from decoding.machine.meter import Reading
from decoding.measure import turns
from decoding.measure.journal import Journal
from decoding.measure.methods import Method
from decoding.measure.rows import Row
from decoding.measure.summary import RATIOS
from decoding.measure.transformers_generate import Streams
from decoding.measure.turns import Measurement, Record, keep_whole, log_probability, take_turns, warm_up, write_energy
from decoding.policies.base import IterationRecord, LayerRecord
from decoding.support.files import json_bytes
from decoding.tasks.base import Prompt, stable_hash
from tests.small_pair import small_pair

CONFIG = DecodingConfig(target_width=4, draft_width=6, draft_depth=3, top_k=10)


PAIR: Any = SimpleNamespace(device=torch.device("cpu"), models={}, engine="auto")
Decode = Callable[[Prompts, Streams], None]


def record(name: str, decode: Decode = lambda prompts, streams: None, batch_size: int = 1) -> Record:
    """A row that decodes nothing, after whatever `decode` does."""

    def generate(prompts: Prompts, streams: Streams) -> list[DecodeResult]:
        decode(prompts, streams)
        stats = DecodeStats(new_tokens=2, iterations=1, seconds={"target": 0.5})
        return [DecodeResult([[1, 2]], [0.0], [False], stats) for _ in prompts]

    method = Method(name, lambda pair, config, settings: generate)
    return Record(Row(method, {}, CONFIG), generate, PAIR, batch_size)


def ids(record: Record) -> list[list[str]]:
    return [[measurement.prompt_id for measurement in repeat] for repeat in record.repeats]


PROMPTS = [Prompt(f"p{i}", [i]) for i in range(3)]


def run_turns(records: list[Record], prompts: list[Prompt]) -> None:
    """Take all turns once."""
    list(take_turns(records, prompts, 0))


@pytest.mark.parametrize(
    ("stop", "left", "found"),
    [
        (1, 0, []),  # nothing that both rows have
        (2, 1, [["p0"]]),
        (3, 2, [["p0", "p1"]]),
        (4, 3, [["p0", "p1", "p2"]]),  # in the second repeat, which is forgotten
        (6, 3, [["p0", "p1", "p2"]]),
    ],
)
def test_an_interrupted_run_keeps_what_all_rows_have(stop: int, left: int, found: list[list[str]]) -> None:
    calls = iter(range(1, 100))

    def interrupted(prompts: Prompts, streams: Streams) -> None:
        if next(calls) == stop:
            raise KeyboardInterrupt

    records = [record("a"), record("b", interrupted)]
    with pytest.raises(KeyboardInterrupt):
        list(take_turns(records, PROMPTS, 0, repeats=2))
    assert keep_whole(records, 3) == left
    assert [ids(each) for each in records] == [found] * 2


@pytest.mark.parametrize("batch_size", [1, 2])
def test_rows_take_turns_with_the_same_seed(batch_size: int) -> None:
    """A row's turn takes `batch_size` prompts; a prompt's stream is the same in every row and in every batch."""
    calls: list[tuple[str, int, float]] = []

    def noted(name: str) -> Decode:
        def decode(prompts: Prompts, streams: Streams) -> None:
            assert not isinstance(streams, torch.Generator)
            for prompt, stream in zip(prompts, streams, strict=True):
                calls.append((name, int(prompt[0]), float(torch.rand(1, generator=stream))))

        return decode

    records, done = [record(name, noted(name), batch_size) for name in "abc"], []
    warm_up(records, [Prompt("w", [9])], 0, done.append)
    assert list(take_turns(records, PROMPTS, 0, advance=done.append)) == [0]
    order = {
        1: [("abc", [9]), ("abc", [0]), ("bca", [1]), ("cab", [2])],
        2: [("abc", [9]), ("abc", [0, 1]), ("bca", [2])],
    }
    assert [(name, token) for name, token, _ in calls] == [
        (name, token) for names, tokens in order[batch_size] for name in names for token in tokens
    ]
    assert all(len({number for _, token, number in calls if token == t}) == 1 for t in (9, 0, 1, 2))
    assert len({number for _, _, number in calls}) == 4
    alone = torch.rand(1, generator=torch.Generator().manual_seed(stable_hash("0 p1") % 2**62))
    assert {number for _, token, number in calls if token == 1} == {float(alone)}, "whatever the batch is"
    assert [ids(each) for each in records] == [[["p0", "p1", "p2"]]] * 3
    assert sum(done) == 12
    assert records[0].repeats[0][0].joules is None


def test_repeats_have_seeds_of_their_own_and_small_rows_fill_a_large_ones_turn() -> None:
    drawn: list[float] = []

    def draw(prompts: Prompts, streams: Streams) -> None:
        drawn.extend(float(torch.rand(1, generator=stream)) for stream in streams)

    records = [record("alone", draw), record("together", batch_size=2)]
    assert list(take_turns(records, PROMPTS, 0, repeats=2)) == [0, 1]
    assert len(set(drawn)) == 6
    assert [len(each.repeats) for each in records] == [2, 2]


def test_a_row_that_fails_loses_no_other_and_keeps_its_whole_repeats() -> None:
    def failing(error: Exception, at: int) -> Decode:
        calls = iter(range(100))

        def decode(prompts: Prompts, streams: Streams) -> None:
            if next(calls) == at:
                raise error

        return decode

    errors = [OutOfDeviceMemory(CONFIG, 4, []), torch.OutOfMemoryError("CUDA out of memory"), UserError("NaN.")]
    records = [record("a"), *(record(str(i), failing(error, 1 + 2 * i)) for i, error in enumerate(errors))]
    list(take_turns(records, PROMPTS, 0, repeats=2))
    assert keep_whole(records, 3) == 3
    assert [len(each.repeats) for each in records] == [2, 0, 1, 1]
    told = [each.error or "" for each in records[1:]]
    assert "Lower batch_size (4)" in told[0] and "lower batch_size" in told[1] and told[2] == "NaN."
    assert records[0].error is None


def test_a_batch_that_memory_does_not_suffice_for_is_halved(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no row asked for it; said once, and the next turns begin with what fitted."""
    sizes: list[int] = []

    def small(prompts: Prompts, streams: Streams) -> None:
        sizes.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    prompts = [Prompt(f"p{i}", [i]) for i in range(8)]
    each, asked = record("a", small, batch_size=4), record("b", small, batch_size=4)
    asked.row = replace(asked.row, batch_size=4)
    run_turns([each, asked], prompts)
    assert ids(each) == [[f"p{i}" for i in range(8)]] and each.batch_size == 1 and each.error is None
    assert sizes[:7] == [4, 2, 1, 1, 1, 1, 4] and set(sizes[7:]) == {1}
    assert "the device ran out of memory" in (asked.error or "").lower() and not ids(asked)
    said = capsys.readouterr().err
    assert said.count("a M=4: the device ran out of memory with 4 prompts at a time; going on with 2.") == 1
    assert said.count("with 2 prompts at a time; going on with 1.") == 1


def test_the_energy_of_a_turn_is_shared_by_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meter:
        joules = 6.0
        readings = ()

        def __init__(self, device: object) -> None: ...

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(turns, "EnergyMeter", Meter)
    each = record("a", batch_size=3)
    list(take_turns([each], PROMPTS, 0))
    assert [measurement.joules for measurement in each.repeats[0]] == pytest.approx([2.0, 2.0, 2.0])


def test_texts_that_are_the_same_are_scored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one prompt, and with the same end: rows whose tokens are equal have equal numbers, for one pass."""

    stats = DecodeStats(new_tokens=2, iterations=1, seconds={"target": 0.5})

    def generate(prompts: Prompts, streams: Streams) -> list[DecodeResult]:
        return [DecodeResult([[1, 3]], [0.0], [True], replace(stats)) for _ in prompts]

    other = record("c")
    other.generate = generate
    records = [record("a"), record("b"), other]
    run_turns(records, PROMPTS)
    scored: list[tuple[str, list[int], bool]] = []

    def told(measurement: Measurement, prompt: Prompt, pair: Any, task: Any) -> None:
        scored.append((prompt.id, measurement.tokens, measurement.finished))
        measurement.log_prob, measurement.metrics = -float(len(scored)), {"n": float(len(scored))}

    monkeypatch.setattr(turns, "evaluate_text", told)
    turns.score_all(records, PROMPTS, PAIR, SimpleNamespace())  # type: ignore[arg-type]
    assert scored == [(p.id, tokens, tokens == [1, 3]) for tokens in ([1, 2], [1, 3]) for p in PROMPTS]
    log_probs = [[m.log_prob for m in each.repeats[0]] for each in records]
    assert log_probs == [[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0]]
    assert records[1].repeats[0][2].metrics == {"n": 3.0}


def test_log_probability_is_that_of_one_token_at_a_time() -> None:
    model, prompt, text = small_pair().target, [3, 4, 5], [6, 7, 8, 9]
    total = 0.0
    for i, token in enumerate(text):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + text[:i]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
    assert log_probability(model, prompt, text) == pytest.approx(total, abs=1e-4)  # float32 logits


class Counter:
    """An energy meter whose counter stands at 10, 20, 30, ... joules."""

    def __init__(self, device: Any) -> None:
        self.joules: float | None = None
        self.readings: list[Reading] = []
        self._count = 0

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self._count += 1
        ends = (10_000 * self._count, 10_000 * (self._count + 1))
        self.joules, self.readings = 10.0, [Reading("GPU-a", 1.5, end) for end in ends]


def test_what_the_energy_counter_said_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line a turn beside the results, of a run that goes on from a journal as well; its prompts share the joules."""
    monkeypatch.setattr(turns, "EnergyMeter", Counter)

    def run(count: int) -> list[Record]:
        records = [record("a", batch_size=2), record("b")]
        list(take_turns(records, PROMPTS[:count], 0, journal=Journal(tmp_path, {"settings": 1})))
        return records

    run(2)
    records = run(3)
    for each in records:
        first, second, third = (measurement.joules for measurement in each.repeats[0])
        assert first and second and first + second == pytest.approx(10.0) and third == 10.0
    assert list(write_energy(tmp_path, records)) == ["energy.jsonl"]
    lines = [json.loads(line) for line in (tmp_path / "energy.jsonl").read_text().splitlines()]
    assert [(line["row"], line["prompts"]) for line in lines] == [
        (row, ids) for row in ("a M=4", "b M=4") for ids in (["p0", "p1"], ["p2"])
    ]
    assert lines[0]["readings"] == [
        {"card": "GPU-a", "unix_seconds": 1.5, "millijoules": millijoules} for millijoules in (10_000, 20_000)
    ]
    for line in lines:
        first, last = (reading["millijoules"] for reading in line["readings"])
        assert last - first == 10_000
    assert "readings" not in records[0].repeats[0][0].to_dict()


def test_without_a_counter_nothing_is_written(tmp_path: Path) -> None:
    each = record("a")
    list(take_turns([each], PROMPTS, 0))
    assert len(each.repeats[0]) == 3
    assert write_energy(tmp_path, [each, record("b")]) == {} and not list(tmp_path.iterdir())


def test_expected_and_real_counts_stand_side_by_side_and_survive_the_journal() -> None:
    """Of drafted layers; where a policy says nothing of some, of those that it speaks of."""
    layers = (LayerRecord(1, 6, 4, 5, True, 4.5), LayerRecord(2, 6, 4, 2, False, 2.75), LayerRecord(3, 0, 4, 0, True))
    silent = tuple(replace(layer, expected=None) for layer in layers)
    for some, means in ((layers, (3.625, 3.5)), (silent, (None, 3.5)), ((layers[0], silent[1]), (4.5, 5.0))):
        stats = DecodeStats(records=[IterationRecord(some, 3, 0.1)])
        told = json.loads(json.dumps(asdict(Measurement("p", 6.4, None, stats, [1, 2], False))))
        found = Measurement.restored(told)
        assert found.stats.layers == list(some)
        shares = [RATIOS[name](found) for name in ("expected_count", "accepted_count")]
        assert tuple(top / count if count else None for top, count in shares) == means


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
