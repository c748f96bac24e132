"""Latency tables: what they say between and beyond their nodes, that they are kept and read, models of devices."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from decoding import ModelPair, UserError
from decoding.cost_table import BUSY, NODE_COUNTS, LatencyTable
from decoding.latency import described, main
from decoding.machine import seconds, store
from decoding.machine.choose import cost_table
from decoding.machine.modelled import modelled
from decoding.machine.passes import rising
from decoding.machine.seconds import measure_seconds
from decoding.support.entry import CONF_DIR
from decoding.support.settings import check_settings
from tests.decoding.stubs import small_llama

TABLE = LatencyTable((1, 8, 32), (0.010, 0.012, 0.020), (0.002, 0.003, 0.006), "a device", 0.001, 0.0005)
PLAIN: dict[str, Any] = {"nodes": [1, 2], "target": [0.1, 0.2], "draft": [0.01, 0.02]}


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is kept from another test, in this process or on disk."""
    monkeypatch.setattr(store, "_measured", {})
    monkeypatch.setenv("DSBD_CACHE", str(tmp_path / "cache"))


def pair_of(**options: Any) -> ModelPair:
    return ModelPair(small_llama(40), options.pop("draft", None) or small_llama(40, seed=1), **options)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[LatencyTable]:
    """Every table that is measured, without passes: number i costs i + 1 milliseconds of host."""
    tables: list[LatencyTable] = []

    def measure(*arguments: object) -> LatencyTable:
        host = (len(tables) + 1) / 1000
        tables.append(replace(TABLE, iteration=host, spread=0.1, measured=store.timestamp()))
        return tables[-1]

    monkeypatch.setattr(seconds, "_measure", measure)
    return tables


def another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_measured", {})


# ------------------------------------------------------------------------------------------- the table


def test_linear_between_and_beyond() -> None:
    assert TABLE.target_cost(8) == 0.012
    assert TABLE.target_cost(20) == pytest.approx(0.016)
    assert TABLE.draft_cost(32 + 24) == pytest.approx(0.009)
    assert TABLE.draft_cost(0) == TABLE.target_cost(-1) == 0.0
    assert TABLE.host_cost(0) == 0.001 and TABLE.host_cost(3) == pytest.approx(0.0025)


def test_a_table_without_host_costs_is_still_read() -> None:
    table = LatencyTable.from_dict({**PLAIN, "device": "cpu"})
    assert table.host_cost(5) == 0.0 and table.unit == "seconds" and table.spread is None


def test_there_and_back(tmp_path: Path) -> None:
    table = replace(TABLE, unit="joules", spread=0.1, measured=store.timestamp(), file=tmp_path)
    kept = json.loads(json.dumps(table.to_dict()))
    assert LatencyTable.from_dict(kept) == table and "file" not in kept
    (tmp_path / "table.json").write_text(json.dumps(kept))
    assert LatencyTable.load(tmp_path / "table.json") == table


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nodes": [2, 1]}, "nodes of a latency table is .* increasing"),
        ({"nodes": [1, 1]}, "increasing"),
        ({"nodes": [0, 1]}, "whole numbers from 1 on"),
        ({"nodes": [1.5, 2]}, "whole numbers from 1 on"),
        ({"nodes": [1], "target": [1.0], "draft": [1.0]}, "two or more"),
        ({"target": [0.1]}, "give 2 numbers above 0"),
        ({"target": [0.1, 0.0]}, "above 0"),
        ({"draft": [0.1, float("nan")]}, "draft of a latency table"),
        ({"draft": [0.1, float("inf")]}, "draft of a latency table"),
        ({"draft": [0.1, "0.2"]}, "draft of a latency table"),
        ({"draft": "0.2"}, "draft is no list"),
        ({"draft": 3}, "draft is no list"),
        ({"iteration": -1.0}, "iteration of a latency table is -1.0"),
        ({"layer": None}, "layer of a latency table is None"),
        ({"unit": "watts"}, "unit of a latency table is 'watts'; choose one of seconds, joules"),
        ({"layers": 0.1}, "layers is unknown"),
    ],
)
def test_tables_that_cannot_be(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        LatencyTable.from_dict({**PLAIN, **changes})


def test_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="target is missing"):
        LatencyTable.from_dict({"nodes": [1, 2], "draft": [1, 2]})
    with pytest.raises(UserError, match="give a mapping"):
        LatencyTable.from_dict([1, 2])  # type: ignore[arg-type]
    (tmp_path / "no.json").write_text("{")
    for name in ("no.json", "absent.json"):
        with pytest.raises(UserError, match=f"{name}.*cannot be read"):
            LatencyTable.load(tmp_path / name)


def test_more_nodes_never_cost_less() -> None:
    """The nearest non-decreasing costs: one high value is shared with its neighbours, not handed on to all larger."""
    assert rising([1.0, 4.0, 2.0, 6.0]) == (1.0, 3.0, 3.0, 6.0)
    assert rising([1.0, 2.0, 3.0]) == (1.0, 2.0, 3.0)
    values = np.random.default_rng(0).random(6)
    fit = np.array(rising(values))
    assert (np.diff(fit) >= 0).all() and fit.sum() == pytest.approx(values.sum())


# ------------------------------------------------------------------------------------------ measuring


def test_measures_passes_and_the_host() -> None:
    """Nothing random outside is moved, and results are what a planner needs."""
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    table = measure_seconds(pair_of(), prompt_tokens=8, repeats=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]
    assert table.nodes == NODE_COUNTS and table.unit == "seconds"
    assert list(table.target) == sorted(table.target) and list(table.draft) == sorted(table.draft)
    assert table.iteration > 0 and table.layer >= 0
    assert LatencyTable.from_dict(table.to_dict()) == table


def test_a_draft_that_proposes_nothing_still_has_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "_host_of", lambda decoder, prompt, seed: (2.0, 8, 0))
    assert seconds._host_seconds(pair_of(draft="ngram"), [1, 2, 3]) == (0.25, 0.25)


def test_a_layer_is_what_drafting_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    def host(decoder: Any, prompt: list[int], seed: int) -> tuple[float, int, int]:
        deep = decoder.policy.fixed_draft_depth
        return (8 * 0.5 + 16 * 0.125, 8, 16) if deep else (24 * 0.5, 24, 0)

    monkeypatch.setattr(seconds, "_host_of", host)
    assert seconds._host_seconds(pair_of(), [1, 2, 3]) == (0.5, 0.125)


def test_what_cannot_be_measured() -> None:
    with pytest.raises(UserError, match="A latency table needs a draft"):
        measure_seconds(ModelPair(small_llama(40), None))
    with pytest.raises(UserError, match="repeats of a latency table is 0"):
        measure_seconds(pair_of(), repeats=0)


# ------------------------------------------------------------------------------------------- the cache


def test_measured_once(measured: list[LatencyTable], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair = pair_of()
    first = measure_seconds(pair)
    assert measure_seconds(pair) is first
    another_process(monkeypatch)
    again = measure_seconds(pair_of())
    assert again == first and len(measured) == 1
    assert again.file is not None and again.file.parent == tmp_path / "cache" / "latency"
    assert measure_seconds(pair, fresh=True) == measured[1]
    another_process(monkeypatch)
    assert measure_seconds(pair) == measured[1] and len(measured) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: "[]",
        lambda text: text.replace('"target": [0.01', '"target": [-0.01'),
        lambda text: text.replace('"iteration"', '"iterations"'),
        lambda text: text.replace('"schema_version": 1', '"schema_version": 0'),
        lambda text: text.replace('"measured": "2', '"measured": "'),
    ],
)
def test_damaged_entries_are_measured_again(
    damage: Any, measured: list[LatencyTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = measure_seconds(pair_of()).file
    assert file is not None
    text = file.read_text()
    assert damage(text) != text
    file.write_text(damage(text))
    another_process(monkeypatch)
    assert measure_seconds(pair_of()) == measured[-1] and len(measured) == 2
    another_process(monkeypatch)
    assert measure_seconds(pair_of()) == measured[-1] and len(measured) == 2, "the new one is kept"


@pytest.mark.parametrize(("days", "times"), [(29, 1), (31, 2), (-31, 2)])
def test_old_entries_are_measured_again(
    days: int, times: int, measured: list[LatencyTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    then = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    monkeypatch.setattr(store, "timestamp", lambda: then)
    measure_seconds(pair_of())
    another_process(monkeypatch)
    measure_seconds(pair_of())
    assert len(measured) == times


def test_a_busy_machine_is_not_remembered(measured: list[LatencyTable], monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = seconds._measure
    monkeypatch.setattr(seconds, "_measure", lambda *a: replace(quiet(*a), spread=2 * BUSY))
    table = measure_seconds(pair_of())
    assert table.file is None and "not kept" in described(table)
    measure_seconds(pair_of())
    assert len(measured) == 1, "it serves this process"
    another_process(monkeypatch)
    measure_seconds(pair_of())
    assert len(measured) == 2


def test_a_cache_that_cannot_be_written(measured: list[LatencyTable], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    table = measure_seconds(pair_of(), cache_dir=tmp_path / "file" / "below")
    assert table.file is None and len(measured) == 1


def test_keys_tell_apart_what_costs_differently(measured: list[LatencyTable]) -> None:
    pairs = [
        pair_of(),
        pair_of(engine="transformers"),
        pair_of(draft="ngram"),
        pair_of(draft="layers:1"),
        ModelPair(small_llama(40).to(torch.bfloat16), small_llama(40, seed=1).to(torch.bfloat16)),
        ModelPair(small_llama(40), small_llama(40, seed=1).to(torch.bfloat16)),
    ]
    for pair in pairs:
        measure_seconds(pair)
    measure_seconds(pairs[0], prompt_tokens=16)
    assert len(measured) == len(pairs) + 1
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        measure_seconds(pairs[0])
    finally:
        torch.set_num_threads(threads)
    assert len(measured) == len(pairs) + 2


def test_where_tables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("DSBD_CACHE", "/own")
    assert store.cache_root() == Path("/own")
    monkeypatch.delenv("DSBD_CACHE")
    assert store.cache_root() == Path("/x/dsbd")
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        monkeypatch.setenv("HOME", "/home/somebody")
        assert store.cache_root() == Path("/home/somebody/.cache/dsbd")


# ------------------------------------------------------------------------------------ modelled devices


def test_a_modelled_pass_is_its_bytes() -> None:
    """Llama-3.1-8B multiplies 32 layers of 218,112,000 weights, a norm and a head of 128,256 rows: 15.0 GB."""
    weights = 32 * 218_112_000 + 4096 + 128_256 * 4096
    table = modelled("8b", "1b", 4.8e12, 989e12, bandwidth_share=0.65, context_tokens=0)
    slot = 2 * 2 * 32 * 8 * 128  # bytes of the one node's keys and values
    assert table.target_cost(1) == pytest.approx((2 * weights + slot) / (4.8e12 * 0.65))
    assert 2 * weights == pytest.approx(15.0e9, rel=0.01)
    tied = 1_235_814_400  # all weights of Llama-3.2-1B: its table is the head
    assert table.draft_cost(1) == pytest.approx((2 * tied + 2 * 2 * 16 * 8 * 64) / (4.8e12 * 0.65))


def test_arithmetic_counts_where_it_takes_longer() -> None:
    table = modelled("8b", "1b", 4.8e12, 1e12, compute_share=0.5, context_tokens=0, launch=0.001)
    weights = 32 * 218_112_000 + 4096 + 128_256 * 4096
    assert table.target_cost(32) == pytest.approx(2 * 32 * weights / 0.5e12 + 0.001)


def test_a_longer_context_takes_longer() -> None:
    short, long = (modelled("8b", "1b", 4.8e12, 989e12, context_tokens=tokens) for tokens in (0, 8000))
    assert long.target_cost(1) - short.target_cost(1) == pytest.approx(8000 * 131_072 / (4.8e12 * 0.65))


@pytest.mark.parametrize(
    ("name", "value"), [("bytes_per_second", 0), ("compute_share", 1.5), ("bandwidth_share", "a"), ("launch", -1)]
)
def test_devices_that_cannot_be(name: str, value: Any) -> None:
    settings: dict[str, Any] = {"bytes_per_second": 1e12, "flop_per_second": 1e12, name: value}
    with pytest.raises(UserError, match=f"{name} of a modelled device is"):
        modelled("8b", "1b", **settings)


# --------------------------------------------------------------------------------- choosing and showing


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("latency", list(overrides))
        check_settings(cfg, compose("latency"))
    return cfg


def test_the_shipped_device() -> None:
    table = instantiate(composed("latency=h200_8b_1b").latency)
    assert 0.004 < table.target_cost(1) < 0.006 and table.host_cost(1) > 0 and "modelled" in table.device


def test_every_way_to_give_a_table(measured: list[LatencyTable], tmp_path: Path) -> None:
    pair, path = pair_of(), tmp_path / "table.json"
    path.write_text(json.dumps(TABLE.to_dict()))
    for given in (TABLE, TABLE.to_dict(), path, str(path), lambda pair: TABLE):
        assert cost_table(pair, given) == cost_table(pair, given, "seconds") == TABLE
    assert not measured
    assert cost_table(pair) == cost_table(pair, instantiate(composed().latency)) == measured[0]
    assert len(measured) == 1


def test_units_must_match() -> None:
    pair = pair_of()
    with pytest.raises(UserError, match="objective is 'joules', but the latency table is in seconds"):
        cost_table(pair, TABLE, "joules")
    with pytest.raises(UserError, match="objective=joules needs an NVIDIA GPU"):
        cost_table(pair, None, "joules")
    with pytest.raises(UserError, match="objective is 'watts'; choose one of seconds, joules"):
        cost_table(pair, TABLE, "watts")
    with pytest.raises(UserError, match="latency is 3; give a LatencyTable"):
        cost_table(pair, 3)  # type: ignore[arg-type]


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    table = main(composed("latency=h200_8b_1b", "pair=local", "pair.target=no", "pair.draft=no", f"output={path}"))
    assert LatencyTable.load(path) == table
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("H200 (modelled") and out[2].split() == ["nodes", "target", "ms", "draft", "ms"]
    assert len(out) == 3 + len(table.nodes) + 3 and "an iteration" in out[-2]
    with pytest.raises(UserError, match="cannot be written"):
        main(composed("latency=h200_8b_1b", f"output={path}/below.json"))


def test_the_command_line(tmp_path: Path) -> None:
    """The built-in pair on this machine, as a user would call it."""
    command = [sys.executable, "-m", "decoding.latency", "latency.repeats=1", "latency.prompt_tokens=8"]
    command.append(f"output={tmp_path / 'table.json'}")
    done = subprocess.run(command, cwd=CONF_DIR.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    table = LatencyTable.load(tmp_path / "table.json")
    assert f"{1000 * table.target[0]:.4g}" in done.stdout and table.measured is not None
