"""Traces: rows as decoding saw them, bit for bit; shards that are whole or refused; a second run finds the first."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from controller import WidthNet
from controller.checkpoint import save_controller
from controller.features import ContextFeatures
from decoding import DecodingConfig, DSBDDecoder, FixedWidth, ModelPair, RandomWidth, UserError
from decoding.collect import Collection, ensure_traces, trace_key
from decoding.cost_table import LatencyTable
from decoding.dice.acceptance import joint_keys
from decoding.forest.tree import TokenForest
from decoding.policies.bandit import BanditWidth
from decoding.policies.base import DraftContext, TargetContext
from decoding.results import LayerEvent
from decoding.tasks.base import Prompt
from decoding.tasks.stdlib import StdlibTask
from decoding.traces.recorder import TraceRecorder, deficits
from decoding.traces.schema import TRACE_FEATURES
from decoding.traces.store import MANIFEST, load_traces
from tests.decoding.stubs import seeded, small_llama

CONFIG = DecodingConfig(target_width=3, draft_width=5, draft_depth=2, max_new_tokens=10, top_k=8, eos_token_id=-1)


class SimpleFeatures:
    """Two numbers of a context, and one of P."""

    names = ("layer", "top_prob")
    target_names = ("top_target_prob",)
    version = 1

    def __call__(self, context: DraftContext) -> np.ndarray:
        return np.array([context.layer, context.joint.probs.max()], dtype=np.float32)

    def of_target(self, context: TargetContext) -> np.ndarray:
        return np.array([context.target.probs.max()], dtype=np.float32)


def make_pair() -> ModelPair:
    shape = dict(num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, initializer_range=0.4)
    target, draft = (small_llama(20, n, seed, tie_word_embeddings=True, **shape) for n, seed in ((2, 0), (1, 1)))
    draft.model.embed_tokens.weight.data.copy_(target.model.embed_tokens.weight.data)
    return ModelPair(target, draft, name="small")


class FixedTask:
    """Prompts that need no tokenizer."""

    name = "numbers"

    def prompts(self, split: str, limit: int | None, tokenizer: object) -> list[Prompt]:
        return [Prompt(f"{split}:{i}", [1 + i % 7, 2, 3], None, None) for i in range(limit or 3)]

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


def collect_config(directory: Path, **collect: int) -> DictConfig:
    here = __name__
    return OmegaConf.create(
        {
            "pair": {"_target_": f"{here}.make_pair"},
            "data": {"_target_": f"{here}.FixedTask"},
            "features": {"_target_": f"{here}.SimpleFeatures"},
            "policy": {"_target_": "decoding.RandomWidth", "seed": 0},
            "decoding": {
                "_target_": "decoding.DecodingConfig", "target_width": 3, "draft_width": 5, "draft_depth": 2,
                "max_new_tokens": 10, "top_k": 8, "eos_token_id": -1,
            },
            "collect": {"train_prompts": 4, "val_prompts": 2, "traces_dir": str(directory), "batch_size": 1} | collect,
            "seed": 3,
        }
    )  # fmt: skip


@dataclass
class Spy(TraceRecorder):
    """Keeps what the recorder was told, beside the rows."""

    events: list[LayerEvent] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    forest: TokenForest = field(default_factory=TokenForest)

    def __init__(self, seed: int = 0, sizes: tuple[int, int] | None = None) -> None:
        super().__init__(SimpleFeatures(), sizes, shadow_seed=seed)
        self.events, self.path = [], []

    def drafted(
        self, forest: TokenForest, beams: list[tuple[int, float]], layers: list[list[tuple[int, float]]]
    ) -> None:
        self.forest = forest
        super().drafted(forest, beams, layers)

    def layer(self, event: LayerEvent) -> None:
        self.events.append(event)
        super().layer(event)

    def end(self, best_path: list[int]) -> None:
        self.path = best_path
        super().end(best_path)


def recorded(
    policy: RandomWidth | FixedWidth, seed: int = 0, config: DecodingConfig = CONFIG
) -> tuple[Spy, list[dict[str, Any]]]:
    spy = Spy()
    spy.start("p", "train")
    DSBDDecoder(make_pair(), config, policy).generate([[1, 2, 3]], torch.Generator().manual_seed(seed), spy)
    return spy, spy.take_rows()


def test_recording_changes_nothing():
    pair, prompt = make_pair(), [[1, 2, 3]]
    for seed in range(5):
        plain = DSBDDecoder(pair, CONFIG, RandomWidth(seed=seed)).generate(prompt, torch.Generator().manual_seed(seed))
        spy = Spy(seed=99)
        spy.start("p", "train")
        seen = DSBDDecoder(pair, CONFIG, RandomWidth(seed=seed)).generate(
            prompt, torch.Generator().manual_seed(seed), spy
        )
        assert plain[0].sequences == seen[0].sequences


def test_rows_say_what_the_decoder_did():
    spy, rows = recorded(RandomWidth(seed=1))
    assert len(rows) == CONFIG.max_new_tokens == len(spy.events)
    features = SimpleFeatures()
    for row, event in zip(rows, spy.events, strict=True):
        np.testing.assert_array_equal(row["features"], features(event.context.draft))
        np.testing.assert_array_equal(row["target_features"], features.of_target(event.context))
        assert (row["layer"], row["target_width"]) == (event.record.layer, event.record.target_width)
        assert len(row["accept_bits"]) == len(row["accept_probs"]) == row["draft_width"]
        assert (row["draft_width"], row["kept_width"]) == (event.record.draft_width, len(event.kept))
        assert set(row) == set(TRACE_FEATURES)
    assert {len(row["accept_bits"]) > 0 for row in rows} == {True, False}


def test_hidden_states_are_logged_when_asked_for():
    asked = Spy(sizes=(16, 16))
    for spy in (asked, Spy()):
        spy.start("p", "train")
        DSBDDecoder(make_pair(), CONFIG, RandomWidth(seed=1)).generate([[1, 2, 3]], seeded(), spy)
        rows = spy.take_rows()
        for name in ("draft_hidden", "target_hidden"):
            assert {len(row[name]) for row in rows} == {16 if spy is asked else 0}
            assert any(np.any(row[name]) for row in rows) == (spy is asked)
        hidden = {event.context.draft.root.target_hidden is None for event in spy.events}
        assert hidden == {spy is not asked}, "nor are they computed"


RECORDED = [
    {},
    {"exact": True},
    {"replacement": True},
    {"eos_token_id": [3, 4, 5]},
    {"eos_token_id": [3, 4, 5], "length_penalty": 2.0, "early_stopping": "never"},
    {"one_beam_cache": True},
    {"target_width": 1},
]


@pytest.mark.parametrize("changes", RECORDED, ids=str)
def test_slots_are_in_the_order_of_the_verdict_and_name_the_survivor(changes: dict[str, Any]) -> None:
    """Slots read from the verdict itself, by (parent, token); one of them is on the path of the best hypothesis."""
    config, survivors = CONFIG.with_changes(**changes), 0
    for seed in range(8):
        spy, rows = recorded(RandomWidth(seed=seed), seed, config)
        assert len(rows) == len(spy.events)
        for depth, (row, event) in enumerate(zip(rows, spy.events, strict=True)):
            if event.verdict is not None:
                keys = np.unique(
                    np.concatenate([joint_keys(event.context.target), joint_keys(event.context.draft.joint)])
                )
                chosen = list(dict.fromkeys(keys[event.verdict.slots].tolist()))
                assert chosen == [spy.forest.parents[n] * 2**32 + spy.forest.tokens[n] for n in event.slots]
            ranked = [node for node, _ in event.kept]
            assert sorted(ranked) == sorted(event.slots) and len(row["slot_deficits"]) == row["kept_width"]
            best = spy.path[depth] if depth < len(spy.path) else None
            assert (row["survivor_slot"] == 0) == (best is None)
            if best is not None:
                survivors += 1
                assert event.slots[row["survivor_slot"] - 1] == best
                assert row["slot_deficits"][row["survivor_slot"] - 1] == 0.0
            assert min(row["slot_deficits"]) == 0.0
        kept = [event.kept for event in spy.events]
        for row, event, expected in zip(
            rows, spy.events, slow_deficits(kept, spy.forest.parents, spy.path), strict=True
        ):
            assert row["slot_deficits"] == pytest.approx([expected[node] for node in event.slots])
    assert survivors > 8


def slow_deficits(
    layers: list[list[tuple[int, float]]], parents: list[int], best_path: list[int]
) -> list[dict[int, float]]:
    """The definition, beam by beam: all its descendants, the last layer that has some, the heaviest of them."""

    def descends(node: int, steps: int, ancestor: int) -> bool:
        for _ in range(steps):
            node = parents[node]
        return node == ancestor

    found: list[dict[int, float]] = []
    for depth, layer in enumerate(layers):
        found.append({})
        for beam, _ in layer:
            if depth < len(best_path) and best_path[depth] == beam:
                found[-1][beam] = 0.0
                continue
            for last in reversed(range(depth, len(layers))):
                line = [weight for node, weight in layers[last] if descends(node, last - depth, beam)]
                if line:
                    found[-1][beam] = max(weight for _, weight in layers[last]) - max(line)
                    break
    return found


def test_deficits_by_hand() -> None:
    """Nodes 1 and 2 under the root; 3, 4 under 1, 5 under 2; 6, 7 under 3: the lines of 2, 4 and 5 end at layer 2."""
    parents = [-1, 0, 0, 1, 1, 2, 3, 3]
    layers = [[(1, -1.0), (2, -1.5)], [(5, -1.75), (3, -2.0), (4, -3.0)], [(6, -2.5), (7, -4.0)]]
    assert deficits(layers, parents, [1, 3, 6]) == [{1: 0.0, 2: 0.0}, {5: 0.0, 3: 0.0, 4: 1.25}, {6: 0.0, 7: 1.5}]
    # Node 2's line led when it ended; were 5 lighter, 0.25 nats would be lost with it alone.
    layers[1][0] = (5, -2.25)
    assert deficits(layers, parents, [1, 3, 6])[:2] == [{1: 0.0, 2: 0.25}, {5: 0.25, 3: 0.0, 4: 1.0}]
    # The best hypothesis ended at layer 2, by its score: its beams have no deficit, and later layers are as they are.
    assert deficits(layers, parents, [2, 5]) == [{1: 0.0, 2: 0.0}, {5: 0.0, 3: 0.0, 4: 1.0}, {6: 0.0, 7: 1.5}]
    assert deficits(layers[:1], parents, [2]) == [{1: 0.0, 2: 0.0}]
    assert deficits([], parents, []) == []


def random_tree(rng: np.random.Generator) -> tuple[list[list[tuple[int, float]]], list[int]]:
    """Layers of beams, best first, each a child of one of the layer above; some nodes never were beams."""
    parents, layers, above = [-1], [], [0]
    for _ in range(int(rng.integers(1, 7))):
        beams = []
        for _ in range(int(rng.integers(1, 6))):
            parents += [above[int(rng.integers(len(above)))] for _ in range(int(rng.integers(1, 3)))]
            beams.append((len(parents) - 1, float(rng.normal())))
        layers.append(sorted(beams, key=lambda beam: -beam[1]))
        above = [node for node, _ in beams]
        above = above[: int(rng.integers(1, len(above) + 1))]  # the others ended, or were let go
    return layers, parents


def ancestors(node: int, parents: list[int]) -> list[int]:
    path = []
    while node > 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@pytest.mark.parametrize("seed", range(200))
def test_deficits_equal_their_definition_on_random_trees(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers, parents = random_tree(rng)
    heaviest = ancestors(layers[-1][0][0], parents)
    last = int(rng.integers(len(layers)))
    ended = ancestors(layers[last][int(rng.integers(len(layers[last])))][0], parents)
    for best_path in (heaviest, ended):
        found = deficits(layers, parents, best_path)
        assert found == slow_deficits(layers, parents, best_path)
        for depth, (of_layer, layer) in enumerate(zip(found, layers, strict=True)):
            assert set(of_layer) == {node for node, _ in layer}
            assert min(of_layer.values()) == 0.0  # the heaviest beam of the last layer has an ancestor everywhere
            slots = [node for node, _ in layer]
            rng.shuffle(slots)
            nothing_lost = {node for node in slots if of_layer[node] == 0.0}
            assert {path[depth] for path in (heaviest, best_path) if depth < len(path)} <= nothing_lost
            for k in range(1, len(slots) + 1):
                regret = min(of_layer[node] for node in slots[:k])
                assert (regret == 0.0) == bool(nothing_lost & set(slots[:k]))


def test_every_draft_has_a_bit_and_its_probability_is_right():
    """Over many layers the bits follow the logged closed form: sum of (bit - prob) has mean 0, variance Σ p(1 - p)."""
    excess, variance = 0.0, 0.0
    pair = make_pair()
    for seed in range(60):
        spy = Spy(seed=seed)
        spy.start("p", "train")
        DSBDDecoder(pair, CONFIG, RandomWidth(seed=seed)).generate(
            [[1, 2, 3]], torch.Generator().manual_seed(seed), spy
        )
        for row in spy.take_rows():
            excess += sum(bit - prob for bit, prob in zip(row["accept_bits"], row["accept_probs"], strict=True))
            variance += sum(prob * (1 - prob) for prob in row["accept_probs"])
    assert variance > 50
    assert abs(excess) < 4 * variance**0.5  # 4 standard deviations


def test_a_second_run_finds_the_traces(tmp_path: Path):
    cfg = collect_config(tmp_path)
    directory = ensure_traces(cfg)
    written = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert ensure_traces(cfg) == directory
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == written
    other = collect_config(tmp_path, train_prompts=5)
    assert ensure_traces(other) != directory


def said(cfg: DictConfig) -> dict[str, Any]:
    """What the traces of a config are found by."""
    return Collection.of(cfg, make_pair()).describe()


def test_the_key_is_of_what_the_parts_say(tmp_path: Path):
    cfg = collect_config(tmp_path)
    cfg.data = {"_target_": "decoding.tasks.stdlib.StdlibTask"}
    about = said(cfg)
    assert about["decoding"] == asdict(CONFIG)
    assert about["policy"] == RandomWidth(seed=0).describe()
    assert about["task"] == StdlibTask(prompt_tokens=128, reference_tokens=64).describe()
    assert about["pair"] == make_pair().fingerprint
    key = trace_key(about)
    cfg.data["reference_tokens"] = 64  # the default, written out
    assert trace_key(said(cfg)) == key
    for part, change in (("data", {"prompt_tokens": 99}), ("policy", {"seed": 1}), ("decoding", {"top_k": 9})):
        other = cfg.copy()
        other[part] = {**other[part], **change}
        assert trace_key(said(other)) != key
    for change in ({"train_prompts": 9}, {"test_prompts": 1}, {"hidden": True}):
        other = cfg.copy()
        other.collect = {**other.collect, **change}
        assert trace_key(said(other)) != key


def test_the_key_says_nothing_of_the_modules_that_hold_the_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One class by two dotted paths, then the same classes moved to a module of another name."""
    cfg = collect_config(tmp_path)
    cfg.data = {"_target_": "decoding.tasks.stdlib.StdlibTask"}
    key = trace_key(said(cfg))
    cfg.policy["_target_"], cfg.decoding["_target_"] = (
        "decoding.policies.exploration.RandomWidth",
        "decoding.config.DecodingConfig",
    )
    assert trace_key(said(cfg)) == key
    moved = ModuleType("moved")
    for part, kind in (
        ("policy", RandomWidth),
        ("decoding", DecodingConfig),
        ("data", StdlibTask),
        ("features", SimpleFeatures),
    ):
        monkeypatch.setattr(kind, "__module__", "moved")
        setattr(moved, kind.__name__, kind)
        cfg[part]["_target_"] = f"moved.{kind.__name__}"
    monkeypatch.setitem(sys.modules, "moved", moved)
    assert trace_key(said(cfg)) == key


class HalfWidth(FixedWidth):
    """Says what its base says."""


class SilentTask:
    name = "silent"


def test_parts_that_do_not_describe_themselves_are_refused(tmp_path: Path):
    for part, kind in (("policy", HalfWidth), ("data", SilentTask)):
        cfg = collect_config(tmp_path)
        cfg[part] = {"_target_": f"{__name__}.{kind.__name__}"}
        with pytest.raises(UserError, match=rf"{kind.__name__} does not describe itself, .* Give the class a describe"):
            ensure_traces(cfg)


def test_other_prompts_in_the_same_file_have_traces_of_their_own(tmp_path: Path):
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


def test_a_policy_counts_by_what_is_in_its_files(tmp_path: Path):
    features = ContextFeatures()
    names = {"version": features.version, "names": features.names, "target_names": features.target_names}
    about = {"pair": {}, "decoding": {}, "features": names}
    sizes = len(features.names), 5, 3, 0, 0, len(features.target_names)
    first, second, table = tmp_path / "first", tmp_path / "second", tmp_path / "table.json"
    torch.manual_seed(0)
    net = WidthNet(*sizes)
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
    assert policy(first, width_value=3.0) != plain
    save_controller(WidthNet(*sizes), second, about)
    assert policy(second) != plain, "retrained"
    by_table = policy(first, latency=str(kept(costs, table)))
    assert by_table != plain
    moved = kept(replace(costs, measured="2026-01-01"), tmp_path / "moved.json")
    assert policy(first, latency=str(moved)) == by_table
    assert policy(first, latency=str(kept(replace(costs, draft=(0.5, 0.6)), table))) != by_table
    assert BanditWidth(latency=costs).describe() == BanditWidth(latency=LatencyTable.load(moved)).describe()
    assert BanditWidth(latency=costs).describe() != BanditWidth(latency=LatencyTable.load(table)).describe()


def test_traces_come_back_as_written(tmp_path: Path):
    dataset, manifest = load_traces(ensure_traces(collect_config(tmp_path)))
    assert len(dataset) == manifest["rows"] == 6 * CONFIG.max_new_tokens
    assert manifest["features"]["names"] == list(SimpleFeatures.names)
    assert manifest["features"]["target_names"] == list(SimpleFeatures.target_names)
    for row in dataset:
        assert len(row["target_features"]) == 1
        assert len(row["slot_deficits"]) == row["kept_width"] >= row["survivor_slot"]
        assert row["survivor_slot"] == 0 or row["slot_deficits"][row["survivor_slot"] - 1] == 0
    assert set(dataset["split"]) == {"train", "val"}
    assert manifest["pair"]["fingerprint"] == make_pair().fingerprint


def test_an_interrupted_collection_goes_on_with_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("decoding.collect.SHARD_PROMPTS", 2)
    whole, _ = load_traces(ensure_traces(collect_config(tmp_path / "whole")))
    calls = {"n": 0}
    original = DSBDDecoder.generate

    def stops(self: DSBDDecoder, *args: object, **kwargs: object) -> object:
        calls["n"] += 1
        if calls["n"] == 4:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

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


def test_rows_do_not_depend_on_the_batch_size(tmp_path: Path):
    """And a second run finds what another batch size has collected."""
    alone, _ = load_traces(ensure_traces(collect_config(tmp_path / "alone", batch_size=1)))
    together, _ = load_traces(ensure_traces(collect_config(tmp_path / "together", batch_size=4)))
    assert alone.column_names == together.column_names
    assert len(alone) == len(together)
    for row, other in zip(alone, together, strict=True):
        for column in row:
            if isinstance(row[column], str):
                assert row[column] == other[column]
            else:
                np.testing.assert_allclose(row[column], other[column], atol=1e-4)  # float32 sums in other orders
    (first,), (second,) = ((tmp_path / name).iterdir() for name in ("alone", "together"))
    assert first.name == second.name


def test_a_bad_batch_size_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"collect.batch_size is 0; give a whole number of at least 1"):
        ensure_traces(collect_config(tmp_path, batch_size=0))


class OneSplitTask(FixedTask):
    """The same prompts in every split, as a file with `shares=null` has."""

    def prompts(self, split: str, limit: int | None, tokenizer: object) -> list[Prompt]:
        return super().prompts("all", limit, tokenizer)


def test_prompts_in_two_splits_are_refused_before_anything_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DSBDDecoder, "generate", lambda *_: pytest.fail("decoded"))
    cfg = collect_config(tmp_path)
    cfg.data["_target_"] = f"{__name__}.OneSplitTask"
    with pytest.raises(UserError, match=r"'all:0' is in the splits 'train' and 'val': .* is for evaluation only"):
        ensure_traces(cfg)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("harm", ["missing", "truncated", "foreign", "changed", "manifest", "schema", "nothing"])
def test_damaged_traces_are_refused(tmp_path: Path, harm: str):
    directory = ensure_traces(collect_config(tmp_path))
    (shard,) = directory.glob("*.parquet")
    manifest = json.loads((directory / MANIFEST).read_text())
    if harm == "missing":
        shard.unlink()
    elif harm == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif harm == "foreign":
        table = pq.read_table(shard)
        pq.write_table(table.replace_schema_metadata({b"dsbd": b'{"trace_key": "other"}'}), shard)
    elif harm == "changed":
        table = pq.read_table(shard)
        layer = pa.array([0] * table.num_rows, table.schema.field("layer").type)
        pq.write_table(table.set_column(table.schema.get_field_index("layer"), "layer", layer), shard)
    elif harm == "manifest":
        (directory / MANIFEST).write_text("{")
    elif harm == "schema":
        (directory / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 99}))
    else:
        directory = tmp_path / "empty"
    with pytest.raises(UserError) as caught:
        load_traces(directory)
    assert str(directory) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
