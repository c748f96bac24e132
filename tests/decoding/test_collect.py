"""Collecting traces: rows that nothing but their prompt decides, a second run that finds the first, what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from omegaconf import DictConfig, OmegaConf

from controller import WidthNet
from controller.checkpoint import save_controller
from decoding import DecodingConfig, DSBDDecoder, ExploringWidth, FixedWidth, ModelPair, UserError
from decoding.collect import Collection, ensure_traces, trace_key
from decoding.cost_table import LatencyTable
from decoding.dice.sampling import NotNumbers, nan_message
from decoding.policies.bandit import BanditWidth
from decoding.policies.base import DraftContext
from decoding.tasks.base import Prompt
from decoding.tasks.stdlib import StdlibTask
from decoding.traces import Column, load_traces
from decoding.traces.schema import TRACE_FEATURES
from tests.controller.synthetic import ABOUT
from tests.decoding.stubs import FixedTask, SimpleFeatures, llama_pair

CONFIG = DecodingConfig(
    target_width=3,
    draft_width=5,
    draft_depth=2,
    max_new_tokens=10,
    top_k=8,
    eos_token_id=-1,
    verification="shared_noise",
)
PARENTS = Column("parents_weight", Value("float32"), lambda context: float(context.weights.max()))
OTHER = Column("parents_weight", Value("float64"), lambda context: float(context.weights.max()))
TAKEN = Column("layer", Value("int32"), lambda context: 0)


def make_pair() -> ModelPair:
    return llama_pair(20)


def collect_config(directory: Path, **collect: Any) -> DictConfig:
    stubs = SimpleFeatures.__module__
    decoding = {name: getattr(CONFIG, name) for name in ("target_width", "draft_width", "draft_depth", "top_k")}
    decoding |= {"max_new_tokens": 10, "eos_token_id": -1, "verification": "shared_noise"}
    return OmegaConf.create(
        {
            "pair": {"_target_": f"{__name__}.make_pair"},
            "data": {"_target_": f"{stubs}.FixedTask"},
            "features": {"_target_": f"{stubs}.SimpleFeatures"},
            "policy": {"_target_": "decoding.ExploringWidth", "seed": 0},
            "decoding": {"_target_": "decoding.DecodingConfig", **decoding},
            "collect": {"train_prompts": 4, "val_prompts": 2, "traces_dir": str(directory), "batch_size": 1} | collect,
            "seed": 3,
        }
    )


def assert_close(found: Dataset, expected: Dataset) -> None:
    """Equal rows, but for numbers that are float32 sums, made in other orders."""
    assert found.column_names == expected.column_names and len(found) == len(expected) > 0
    for row, other in zip(found, expected, strict=True):
        for column in row:
            if isinstance(row[column], str):
                assert row[column] == other[column]
            else:
                np.testing.assert_allclose(row[column], other[column], atol=1e-4)


# ------------------------------------------------------------------------------------------- rows


def test_rows_are_those_of_the_config(tmp_path: Path) -> None:
    rows, manifest = load_traces(ensure_traces(collect_config(tmp_path)))
    assert len(rows) == manifest["rows"] and manifest["prompts"] == len(set(rows["prompt_id"])) == 6
    assert set(rows["split"]) == {"train", "val"} and set(rows.column_names) == set(TRACE_FEATURES)
    assert manifest["features"]["names"] == SimpleFeatures.names
    assert manifest["features"]["candidate_names"] == SimpleFeatures.candidate_names
    assert manifest["pair"]["fingerprint"] == make_pair().fingerprint
    for row in rows:
        assert row["features"][0] == row["layer"] <= CONFIG.draft_depth
        assert len(row["candidates"]) == len(row["parents"]) == len(row["places"])
        assert 0 <= row["drafts"] <= CONFIG.draft_width and max(row["places"]) <= CONFIG.target_width
        assert row["reached"] or row["layer"] > 1


def test_columns_of_ones_own_stand_beside_the_others(tmp_path: Path) -> None:
    plain, _ = load_traces(ensure_traces(collect_config(tmp_path)))
    cfg = collect_config(tmp_path, columns=[f"{__name__}.PARENTS"])
    rows, manifest = load_traces(ensure_traces(cfg))
    assert set(rows.column_names) == {*TRACE_FEATURES, "parents_weight"} and set(manifest["columns"]) == {PARENTS.name}
    assert rows.remove_columns("parents_weight")[:] == plain[:]
    assert all(weight <= 0 for weight in rows["parents_weight"])
    other = collect_config(tmp_path, columns=[f"{__name__}.OTHER"])
    assert ensure_traces(other) != ensure_traces(cfg), "of another type"
    with pytest.raises(UserError, match="rows have a column 'layer' already"):
        ensure_traces(collect_config(tmp_path, columns=[f"{__name__}.TAKEN"]))


def test_an_interrupted_collection_goes_on_with_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("decoding.collect.SHARD_PROMPTS", 2)
    whole, _ = load_traces(ensure_traces(collect_config(tmp_path / "whole")))
    calls, original = [], DSBDDecoder.generate

    def stops(self: DSBDDecoder, *args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    cfg = collect_config(tmp_path / "parts")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DSBDDecoder, "generate", stops)
        ensure_traces(cfg)
    (directory,) = (tmp_path / "parts").iterdir()
    with pytest.raises(UserError, match="incomplete"):
        load_traces(directory)
    assert not list(directory.glob("*.partial"))
    parts, _ = load_traces(ensure_traces(cfg))
    assert whole.to_list() == parts.to_list()


class Fragile(FixedTask):
    """Prompt 2 of the split train ends with token 7."""

    def prompts(self, split: str, limit: int | None, tokenizer: Any) -> list[Prompt]:
        found = [replace(p, tokens=[3 if t == 7 else t for t in p.tokens]) for p in super().prompts(split, limit, None)]
        if split == "train":
            found[2] = replace(found[2], tokens=[*found[2].tokens[:-1], 7])
        return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_prompt_that_gives_nan_is_told_of_and_passed_over(
    tmp_path: Path, batch_size: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def config(directory: Path, **collect: Any) -> DictConfig:
        cfg = collect_config(directory, batch_size=batch_size, **collect)
        cfg.data._target_ = f"{__name__}.Fragile"
        return cfg

    whole, _ = load_traces(ensure_traces(config(tmp_path / "whole")))
    original = DSBDDecoder.generate

    def nan_at_seven(self: DSBDDecoder, prompts: Any, *args: Any, **options: Any) -> Any:
        if any(prompt[-1] == 7 for prompt in prompts):
            raise NotNumbers(nan_message("target"))
        return original(self, prompts, *args, **options)

    monkeypatch.setattr(DSBDDecoder, "generate", nan_at_seven)
    with pytest.raises(UserError, match="NaN"):
        ensure_traces(config(tmp_path / "strict", strict=True))
    rows, manifest = load_traces(ensure_traces(config(tmp_path / "parts")))
    (skipped,) = manifest["skipped"]
    assert f"Prompt {skipped!r} is passed over: The target model returned NaN" in capsys.readouterr().err
    kept = [row for row in whole if row["prompt_id"] != skipped]
    assert len(kept) < len(whole)
    assert_close(rows, Dataset.from_list(kept, features=whole.features))


@pytest.mark.parametrize("harm", ["gone", "flipped", "cut"])
def test_a_damaged_shard_alone_is_collected_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str) -> None:
    monkeypatch.setattr("decoding.collect.SHARD_PROMPTS", 2)
    cfg = collect_config(tmp_path)
    directory = ensure_traces(cfg)
    whole = load_traces(directory)[0].to_list()
    shard = directory / "traces-00001.parquet"
    content = shard.read_bytes()
    middle = len(content) // 2
    if harm == "gone":
        shard.unlink()
    else:
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        shard.write_bytes(flipped if harm == "flipped" else content[:middle])
    others = {path: path.stat().st_mtime_ns for path in directory.glob("*.parquet") if path != shard}
    calls, original = [], DSBDDecoder.generate

    def counted(self: DSBDDecoder, prompts: Any, *args: Any, **options: Any) -> Any:
        calls.extend(prompts)
        return original(self, prompts, *args, **options)

    monkeypatch.setattr(DSBDDecoder, "generate", counted)
    rows, manifest = load_traces(ensure_traces(cfg))
    assert len(calls) == 2 and rows.to_list() == whole and manifest["rows"] == len(whole) and manifest["prompts"] == 6
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_two_collections_of_the_same_traces_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is held up after its first shard: the other is refused, and the first ends with whole traces."""
    monkeypatch.setattr("decoding.collect.SHARD_PROMPTS", 2)
    cfg, refused, original = collect_config(tmp_path), [], DSBDDecoder.generate

    def held_up(self: DSBDDecoder, *args: Any, **options: Any) -> Any:
        if not refused and list(tmp_path.rglob("*.parquet")):
            with pytest.raises(UserError, match="is in use by process") as error:
                ensure_traces(cfg)
            refused.append(error)
        return original(self, *args, **options)

    monkeypatch.setattr(DSBDDecoder, "generate", held_up)
    rows, manifest = load_traces(ensure_traces(cfg))
    assert refused and manifest["prompts"] == 6 and len(rows) == manifest["rows"]


def test_rows_do_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """And a second run finds what another batch size has collected."""
    first = ensure_traces(collect_config(tmp_path / "alone", batch_size=1))
    second = ensure_traces(collect_config(tmp_path / "together", batch_size=4))
    assert_close(load_traces(second)[0], load_traces(first)[0])
    assert first.name == second.name


# ---------------------------------------------------------------------------------- the trace key


def said(cfg: DictConfig) -> dict[str, Any]:
    """What the traces of a config are found by."""
    return Collection.of(cfg, make_pair()).describe()


def test_a_second_run_finds_the_traces(tmp_path: Path) -> None:
    cfg = collect_config(tmp_path)
    directory = ensure_traces(cfg)
    written = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert ensure_traces(cfg) == directory
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == written
    assert ensure_traces(collect_config(tmp_path, train_prompts=5)) != directory


def test_traces_of_another_collection_are_not_taken(tmp_path: Path) -> None:
    cfg = collect_config(tmp_path)
    manifest = ensure_traces(cfg) / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"trace_key": "other"}))
    with pytest.raises(UserError, match="holds traces of another collection"):
        ensure_traces(cfg)


def test_the_key_is_of_what_the_parts_say(tmp_path: Path) -> None:
    cfg = collect_config(tmp_path)
    cfg.data = {"_target_": "decoding.tasks.stdlib.StdlibTask"}
    about = said(cfg)
    assert about["decoding"] == asdict(CONFIG)
    assert about["policy"] == ExploringWidth(seed=0).describe()
    assert about["task"] == StdlibTask(prompt_tokens=128, reference_tokens=64).describe()
    assert about["pair"] == make_pair().fingerprint
    key = trace_key(about)
    cfg.data["reference_tokens"] = 64  # the default, written out
    assert trace_key(said(cfg)) == key
    changes: list[tuple[str, dict[str, Any]]] = [
        ("data", {"prompt_tokens": 99}),
        ("policy", {"seed": 1}),
        ("decoding", {"top_k": 9}),
        ("collect", {"train_prompts": 9}),
        ("collect", {"test_prompts": 1}),
    ]
    for part, change in changes:
        other = cfg.copy()
        other[part] = {**other[part], **change}
        assert trace_key(said(other)) != key
    other = cfg.copy()
    other.seed = 4
    assert trace_key(said(other)) != key


@pytest.mark.parametrize("change", [{"version": 2}, {"names": ["a", "b"]}, {"candidate_names": ["p"]}], ids=str)
def test_the_key_is_of_the_features(change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = trace_key(said(collect_config(tmp_path)))
    for name, value in change.items():
        monkeypatch.setattr(SimpleFeatures, name, value)
    assert trace_key(said(collect_config(tmp_path))) != key


def test_the_key_says_nothing_of_the_modules_that_hold_the_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One class by two dotted paths, then the same classes moved to a module of another name."""
    cfg = collect_config(tmp_path)
    cfg.data = {"_target_": "decoding.tasks.stdlib.StdlibTask"}
    key = trace_key(said(cfg))
    cfg.policy["_target_"] = "decoding.policies.exploration.ExploringWidth"
    cfg.decoding["_target_"] = "decoding.config.DecodingConfig"
    assert trace_key(said(cfg)) == key
    moved = ModuleType("moved")
    parts = {"policy": ExploringWidth, "decoding": DecodingConfig, "data": StdlibTask, "features": SimpleFeatures}
    for part, kind in parts.items():
        monkeypatch.setattr(kind, "__module__", "moved")
        setattr(moved, kind.__name__, kind)
        cfg[part]["_target_"] = f"moved.{kind.__name__}"
    monkeypatch.setitem(sys.modules, "moved", moved)
    assert trace_key(said(cfg)) == key


class HalfWidth(FixedWidth):
    """Says what its base says."""


class SilentTask:
    name = "silent"


@pytest.mark.parametrize(("part", "kind"), [("policy", HalfWidth), ("data", SilentTask)])
def test_parts_that_do_not_describe_themselves_are_refused(part: str, kind: type, tmp_path: Path) -> None:
    cfg = collect_config(tmp_path)
    cfg[part] = {"_target_": f"{__name__}.{kind.__name__}"}
    with pytest.raises(UserError, match=rf"{kind.__name__} does not describe itself, .* Give the class a describe"):
        ensure_traces(cfg)


def test_other_prompts_in_the_same_file_have_traces_of_their_own(tmp_path: Path) -> None:
    def traces(prompts: list[str]) -> Path:
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        cfg = collect_config(tmp_path / "traces")
        cfg.pair = {"_target_": "tests.small_pair.small_pair"}
        cfg.data = {"_target_": "decoding.tasks.base.JsonlTask", "path": str(tmp_path / "prompts.jsonl")}
        cfg.decoding.max_new_tokens = 2
        return ensure_traces(cfg)

    texts = [f"def area{i}(width):" for i in range(20)]
    first, other, again = traces(texts), traces([*texts[:-1], "def volume(height):"]), traces(texts)
    assert first == again != other


def test_a_policy_counts_by_what_is_in_its_files(tmp_path: Path) -> None:
    """Weights and tables by their content, wherever they lie and whoever made them when."""
    about = {"pair": {}, "decoding": {}, "features": ABOUT}
    first, second, table = tmp_path / "first", tmp_path / "second", tmp_path / "table.json"
    net = WidthNet(3)
    save_controller(net, first, about)
    save_controller(net, second, about | {"git_sha": "another commit"})
    costs = LatencyTable((1, 8), (1.0, 2.0), (0.5, 0.5))

    def policy(path: Path, **settings: object) -> dict[str, Any]:
        cfg = collect_config(tmp_path)
        cfg.policy = {"_target_": "controller.LearnedWidth.load", "path": str(path), **settings}
        return dict(said(cfg)["policy"])

    def kept(costs: LatencyTable, path: Path) -> Path:
        path.write_text(json.dumps(costs.to_dict()))
        return path

    plain = policy(first)
    assert plain == policy(second) and str(tmp_path) not in str(plain)
    assert policy(first, share=False) != plain
    with torch.no_grad():
        net.mean += 1
    save_controller(net, second, about)
    assert policy(second) != plain, "retrained"
    by_table = policy(first, latency=str(kept(costs, table)))
    assert by_table != plain
    moved = kept(replace(costs, measured="2026-01-01"), tmp_path / "moved.json")
    assert policy(first, latency=str(moved)) == by_table
    assert policy(first, latency=str(kept(replace(costs, draft=(0.5, 0.6)), table))) != by_table
    assert BanditWidth(latency=costs).describe() == BanditWidth(latency=LatencyTable.load(moved)).describe()
    assert BanditWidth(latency=costs).describe() != BanditWidth(latency=LatencyTable.load(table)).describe()


# ---------------------------------------------------------------------------------------- refused


class OneSplitTask(FixedTask):
    """The same prompts in every split, as a file with `shares=null` has."""

    def prompts(self, split: str, limit: int | None, tokenizer: object) -> list[Prompt]:
        return super().prompts("all", limit, tokenizer)


class NoValTask(FixedTask):
    """All prompts are for training."""

    def prompts(self, split: str, limit: int | None, tokenizer: object) -> list[Prompt]:
        return super().prompts(split, limit, tokenizer) if split == "train" else []


def task(name: str) -> Callable[[DictConfig], None]:
    """A change of the config's task."""
    return lambda cfg: cfg.data.update(_target_=f"{__name__}.{name}")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (task("OneSplitTask"), r"'all:0' is in the splits 'train' and 'val': .* is for evaluation only"),
        (task("NoValTask"), "'numbers' has no prompts in split 'val'"),
        (lambda cfg: cfg.collect.update(batch_size=0), "collect.batch_size is 0; give a whole number of at least 1"),
        (lambda cfg: cfg.collect.update(train_prompts=0), "collect.train_prompts is 0; .* at least 1"),
        (lambda cfg: cfg.collect.update(val_prompts=-2), "collect.val_prompts is -2; .* at least 1"),
        (lambda cfg: cfg.collect.update(test_prompts=1.5), "collect.test_prompts is 1.5; give a whole number"),
        (lambda cfg: cfg.decoding.update(verification="rejection"), "Set decoding.mode=beam_sample and decoding.verif"),
        (lambda cfg: cfg.decoding.update(mode="beam_search", top_k=None), "traces are logged of shared noise"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_decoded(
    change: Callable[[DictConfig], None], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DSBDDecoder, "generate", lambda *_: pytest.fail("decoded"))
    cfg = collect_config(tmp_path)
    change(cfg)
    with pytest.raises(UserError, match=sentence):
        ensure_traces(cfg)
    assert not list(tmp_path.iterdir())


def test_a_context_holds_what_features_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates are ranked for whoever records, also where the policy asks for none."""
    seen: list[DraftContext] = []
    monkeypatch.setattr(
        SimpleFeatures, "of_layer", lambda self, context: (seen.append(context), np.zeros(2, np.float32))[1]
    )
    ensure_traces(collect_config(tmp_path))
    assert seen and all(context.candidates is not None and len(context.candidates) for context in seen)
