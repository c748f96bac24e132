"""The bench from a config to bench.json: rows, failures, interruption, roofline arithmetic, profile. No wall-clock."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from decoding import UserError, bench, report
from decoding.measure import roofline as roofline_module
from decoding.measure import turns
from decoding.measure.methods import METHODS, Method
from decoding.measure.results_file import SCHEMA_VERSION
from decoding.measure.roofline import cache_bytes, kv_bytes_per_slot, roofline, weight_bytes
from decoding.support.entry import CONF_DIR
from decoding.tasks.base import Prompt
from tests.decoding.stubs import small_llama
from tests.small_pair import small_pair

ROWS = (
    "{method: hf_beam_sample, target_width: 2}",
    "{method: beam_sample, target_width: 2}",
    "{method: fixed, target_width: 2, draft_width: 3, draft_depth: 2, exact: true}",
    "{method: fixed, target_width: 2, draft_width: 3, draft_depth: 2, exact: true, batch_size: 2}",
)
FIXED = "fixed M=2 w=3 γ=2 exact"


@pytest.fixture(autouse=True)
def _small_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roofline_module.BUFFER_BYTES, "cpu", 2**18)


def config(output: Path, *overrides: str, rows: tuple[str, ...] = ROWS) -> DictConfig:
    """bench.yaml on random models and prompts of the test's own, without what only Hydra's job knows."""
    path = output / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"def f{i}(x):\n"}) for i in range(3)))
    settings = [
        "data=jsonl",
        f"data.path={path}",
        "data.shares=null",
        f"paths.output_dir={output / 'out'}",
        "decoding.max_new_tokens=6",
        "prompts.limit=2",
        "prompts.warmup=1",
        "repeats=2",
        "bootstrap=20",
        "reference_width=2",
        f"rows=[{','.join(rows)}]",
    ]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("bench", [*settings, *overrides])
    with open_dict(cfg):
        cfg.pair = {"_target_": "tests.small_pair.small_pair"}
    return cfg


def read(output: Path) -> dict[str, Any]:
    return json.loads((output / "out" / "bench.json").read_text())


def numbers(node: Any) -> Iterator[float]:
    """Every number in a JSON value; null is none."""
    if isinstance(node, dict | list):
        for value in node.values() if isinstance(node, dict) else node:
            yield from numbers(value)
    elif isinstance(node, int | float):
        yield node


def test_json_holds_every_row_and_the_tables_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    returned = bench.main(config(tmp_path))
    found = read(tmp_path)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"bench.json"}
    assert found["complete"] and found["schema_version"] == SCHEMA_VERSION
    assert [row["name"] for row in found["rows"]] == [
        "hf_beam_sample M=2",
        "beam_sample M=2",
        FIXED,
        f"{FIXED}, batch 2",
    ]
    assert found["provenance"]["pair"]["name"] == "small" and found["provenance"]["machine"]["torch_threads"]
    assert found["provenance"]["config"]["repeats"] == 2
    for row in found["rows"]:
        summary = row["summary"]
        assert row["error"] is None and row["repeats"] == 2
        assert len(row["prompts"]) == 4 and all(p["log_prob"] < 0 for p in row["prompts"])
        assert all(math.isfinite(value) for value in numbers(summary))
        speed = summary["tokens_per_second"]
        assert 0 < speed["low"] <= speed["value"] <= speed["high"] and len(speed["repeats"]) == 2
        assert summary["speedup_over_reference"]["value"] > 0 and summary["log_prob"]["value"] < 0
        assert "joules_per_token" not in summary
    reference, engine, fixed, batched = (row["summary"] for row in found["rows"])
    assert reference["speedup_over_reference"]["repeats"] == [1, 1] and "overhead_share" not in reference
    assert 0 < fixed["overhead_share"]["value"] < 1 and fixed["draft_milliseconds"]["value"] > 0
    assert engine["block_efficiency"]["value"] == 1 <= fixed["block_efficiency"]["value"]
    # A prompt's text depends on its own seed only, so a batch decodes the same texts.
    assert fixed["log_prob"]["value"] == pytest.approx(batched["log_prob"]["value"])
    assert reference["kv_megabytes"]["value"] > engine["kv_megabytes"]["value"] > 0
    assert json.loads(json.dumps(returned["rows"])) == found["rows"]
    printed = capsys.readouterr().out
    for words in ("x hf_beam_sample", "in neither model", f"Batch 2 over batch 1, {FIXED}:", "at its peak"):
        assert words in printed
    for words in ("Fastest that is at least as likely", "CUDA graphs:", "of the bandwidth bound", "[least, greatest]"):
        assert words in printed
    report.command_line([str(tmp_path / "out" / "bench.json"), f"out={tmp_path / 'again'}"])
    again = capsys.readouterr().out
    for words in ("in neither model", "Fastest that is at least as likely", f"{FIXED}, batch 2", "is fastest"):
        assert words in again
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"results.md", "frontier.png"}


def test_equal_seeds_give_equal_texts_and_repeats_differ(tmp_path: Path) -> None:
    def log_probs(*overrides: str) -> list[float]:
        found = bench.main(config(tmp_path, "roofline=false", *overrides, rows=ROWS[1:2]))
        return [prompt["log_prob"] for prompt in found["rows"][0]["prompts"]]

    first = log_probs()
    assert log_probs() == first != log_probs("seed=7")
    assert first[:2] != first[2:]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("repeats=0", "repeats is 0"),
        ("prompts.limit=0", "prompts.limit is 0"),
        ("rows=[{method: fixed, batch_size: 4}]", "batch_size is 4 but there are 2 prompts"),
        ("rows=[{method: fixd}]", r"rows\[0\].method is 'fixd'; choose among multinomial, beam_sample"),
        ("profile_row=fixd", r"profile_row is 'fixd'; give the number of a row, 0 to 3, or one of: hf_beam_sample M=2"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, override: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        bench.main(config(tmp_path, "profile=true", override))
    assert not (tmp_path / "out").exists()


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException, after: int = 0) -> None:
    """A method `failing` that decodes like multinomial so many times."""

    def build(pair: Any, config: Any, settings: Any) -> Any:
        generate, calls = METHODS["multinomial"].build(pair, config, settings), iter(range(after))

        def decode(prompts: Any, generator: Any) -> Any:
            if next(calls, None) is None:
                raise error
            return generate(prompts, generator)

        return decode

    monkeypatch.setitem(METHODS, "failing", Method("failing", build, fixed={"target_width": 1, "draft_width": 1}))


def test_a_failing_row_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One prompt warms up, two a repeat: the fifth call is in the second repeat, and the first one stays."""
    failing(monkeypatch, UserError("The target model returned NaN."), after=4)
    bench.main(config(tmp_path, "roofline=false", rows=("{method: failing}", *ROWS[:2])))
    found = read(tmp_path)
    assert found["complete"] and found["failed"] == {"failing M=1": "The target model returned NaN."}
    assert [(row["repeats"], row["error"] is None) for row in found["rows"]] == [(1, False), (2, True), (2, True)]
    printed = capsys.readouterr()
    assert all("failing M=1 failed: The target model returned NaN." in text for text in printed)


def test_an_interrupted_run_writes_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, KeyboardInterrupt(), after=4)
    rows = (*ROWS[:2], "{method: failing}")
    with pytest.raises(KeyboardInterrupt):
        bench.main(config(tmp_path, rows=rows))
    found = read(tmp_path)
    assert found["complete"] is False and found["roofline"] is None
    assert all(row["repeats"] >= 1 and row["summary"]["log_prob"]["value"] < 0 for row in found["rows"])
    assert "Not complete" in capsys.readouterr().out


def test_profile_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["profile=true", "profile_tokens=4", "repeats=1", "roofline=false"]
    found = bench.main(config(tmp_path, *settings))["profile"]
    assert found["row"] == FIXED and found["iterations"] >= 2
    assert 0 < found["overhead_share"] < 1
    assert len(found["operators"]) == 15 and found["kernels"] == []
    trace = json.loads((tmp_path / "out" / "trace.json").read_text())
    assert any(event.get("name", "").startswith("aten::") for event in trace["traceEvents"])
    printed = capsys.readouterr().out
    assert "host operator" in printed and f"Profiled: {FIXED}" in printed


@pytest.mark.parametrize("tied", [False, True])
def test_bytes_of_a_pass_by_hand(tied: bool) -> None:
    model = small_llama(100, intermediate_size=24, tie_word_embeddings=tied)
    head_dim = 16 // 4
    attention = 16 * 16 + 2 * 16 * (2 * head_dim) + 16 * 16  # q, k and v, o
    block = attention + 3 * 16 * 24 + 2 * 16  # gate, up, down; two norms
    weights = 2 * block + 16 + 100 * 16  # last norm and head: the same tied or not, the table itself is not read
    assert weight_bytes(model) == 4 * weights
    assert kv_bytes_per_slot(model) == 2 * 2 * 2 * head_dim * 4  # keys and values, layers, heads, dim, float32
    model.bfloat16()
    assert weight_bytes(model) == 2 * weights
    assert kv_bytes_per_slot(model) == 2 * 2 * 2 * head_dim * 2


def test_bound_is_bytes_over_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = small_pair()
    speed = {"bytes_per_second": 1e6, "operation": "sum", "buffer_bytes": 1}
    monkeypatch.setattr(roofline_module, "read_bandwidth", lambda device: speed)
    monkeypatch.setattr(roofline_module, "pass_seconds", lambda *arguments: [(0.5, 0.6)] * 6)
    found = roofline(pair, [1] * 10)
    weights, slot = weight_bytes(pair.target), kv_bytes_per_slot(pair.target)
    assert [row["nodes"] for row in found["passes"]] == [1, 2, 4, 8, 16, 32]
    for row in found["passes"]:
        assert row["bytes"] == weights + slot * (10 + row["nodes"])
        assert row["bound_seconds"] == pytest.approx(row["bytes"] / 1e6)
        assert row["share"] == pytest.approx(row["bytes"] / 1e6 / 0.5)
    cache = cache_bytes(torch.device("cpu"))
    assert found["in_cache"] == (cache is not None and found["passes"][-1]["bytes"] <= cache)


def test_lengthened_prompts_end_as_they_did() -> None:
    prompts = [Prompt("a", [1, 2, 3]), Prompt("b", [4, 5, 6])]
    assert [p.tokens for p in bench.lengthened(prompts, 5)] == [[5, 6, 1, 2, 3], [2, 3, 4, 5, 6]]
    assert bench.lengthened(prompts, 8)[0].tokens == [2, 3, 4, 5, 6, 1, 2, 3]
    assert [p.tokens for p in bench.lengthened(prompts, 2)] == [[2, 3], [5, 6]]


def test_counters_of_graphs_are_told_by_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Runner:
        class forward:
            captures = replays = eager = 0

    def runner_of(model: Any, engine: str) -> type[Runner]:
        Runner.forward.captures += 1  # asked for twice a turn and model: as if something was captured in between
        return Runner

    monkeypatch.setattr(turns, "runner_of", runner_of)
    found = bench.main(config(tmp_path, "roofline=false", rows=ROWS[1:2]))
    assert found["rows"][0]["graphs"]["target"] == {"captures": 8, "replays": 0, "eager": 0}  # 4 turns
    assert found["graphs"]["target"]["captures"] > 0


def test_command_line(tmp_path: Path) -> None:
    """The built-in pair, from a shell."""
    settings = [
        "rows=[{method: fixed, target_width: 2, draft_width: 3, draft_depth: 1}]",
        "decoding.max_new_tokens=8",
        "prompts.limit=2",
        "prompts.warmup=0",
        "repeats=1",
        "roofline=false",
        f"hydra.run.dir={tmp_path / 'out'}",
    ]
    command = [sys.executable, "-m", "decoding.bench", *settings]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CONF_DIR.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "fixed M=2 w=3 γ=1" in done.stdout and str(tmp_path / "out" / "bench.json") in done.stdout
    assert read(tmp_path)["rows"][0]["summary"]["tokens_per_second"]["value"] > 0
