"""Any file and any override: what is read is whole, or a sentence says what is wrong with it."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from controller import LearnedWidth
from controller.checkpoint import save_controller
from controller.data import TraceDataModule
from decoding import DecodingConfig, DSBDDecoder, UserError
from decoding.cost_table import LatencyTable
from decoding.report import command_line
from decoding.support.entry import CONF_DIR, entry_point
from decoding.tasks.base import JsonlTask
from decoding.tasks.humaneval import HumanEvalTask
from decoding.tasks.spec_bench import SpecBenchTask
from decoding.tasks.spider import SpiderTask
from decoding.tasks.squad import SquadTask
from decoding.traces.store import load_traces
from tests.controller.synthetic import ABOUT, CONFIG, random_net, write_traces
from tests.fuzzing import counted, examples
from tests.small_pair import small_pair, small_tokenizer
from train import read_checkpoint

JSON: Any = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 2**66), st.floats(), st.text(max_size=5)),
    lambda below: st.one_of(st.lists(below, max_size=3), st.dictionaries(st.text(max_size=4), below, max_size=3)),
    max_leaves=5,
)


@st.composite
def damage(draw: st.DrawFn) -> Any:
    """A function that damages bytes: cuts, flips a bit, puts bytes in, or replaces all."""
    kind, share = draw(st.sampled_from(["cut", "flip", "insert", "replace"])), draw(st.floats(0, 1, exclude_max=True))
    bit, more = draw(st.integers(0, 7)), draw(st.binary(max_size=9))

    def damaged(content: bytes) -> bytes:
        at = int(share * len(content))
        if kind == "cut":
            return content[:at]
        if kind == "flip" and content:
            return content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :]
        return content[:at] + more + content[at:] if kind == "insert" else more

    return damaged


def paths_of(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document."""
    yield path
    below = node.items() if isinstance(node, dict) else enumerate(node[:3]) if isinstance(node, list) else ()
    for key, value in below:
        yield from paths_of(value, (*path, key))


@st.composite
def changed(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document, one or two of whose values are others or gone."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        *above, last = draw(st.sampled_from([path for path in paths_of(found) if path]))
        node = found
        for key in above:
            node = node[key]
        if draw(st.booleans()) and isinstance(node, dict):
            del node[last]
        else:
            node[last] = draw(JSON)
        if not found:
            break
    return found


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Traces, a controller and a checkpoint, whole."""
    folder = tmp_path_factory.mktemp("kept")
    write_traces(folder / "traces")
    about = {"features": ABOUT, "pair": small_pair().describe(), "decoding": {"top_k": 8}}
    save_controller(random_net(), folder / "controller", about)
    state = {"state_dict": random_net().state_dict(), "epoch": 1, "optimizer_states": [{}], "loops": {"fit_loop": {}}}
    torch.save(state, folder / "last.ckpt")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where damaged copies go."""
    return tmp_path_factory.mktemp("damaged")


def fresh(kept: Path, name: str, place: Path) -> Path:
    shutil.rmtree(place / name, ignore_errors=True)
    return Path(shutil.copytree(kept / name, place / name))


@cache
def document(path: Path) -> Any:
    return json.loads(path.read_text())


def use_traces(folder: Path) -> None:
    load_traces(folder)
    data = TraceDataModule(folder)
    assert len(data.rows["train"]) > 0 and all(torch.isfinite(c).all() for c in data.rows["train"].columns.values())


@examples(25)
@given(damage(), st.sampled_from(["manifest.json", "traces-00000.parquet"]))
def test_damaged_traces(kept: Path, place: Path, damaged: Any, name: str) -> None:
    folder = fresh(kept, "traces", place)
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(damaged(before))
    with counted("damaged traces", UserError):
        use_traces(folder)
        if name.endswith(".parquet"):
            assert (folder / name).read_bytes() == before, "the checksum was not looked at"


@examples(40)
@given(st.data())
def test_manifests(kept: Path, place: Path, data: st.DataObject) -> None:
    folder = fresh(kept, "traces", place)
    found = data.draw(changed(document(kept / "traces" / "manifest.json")), "manifest")
    (folder / "manifest.json").write_text(json.dumps(found))
    with counted("manifests", UserError):
        use_traces(folder)


def use_controller(folder: Path) -> None:
    policy = LearnedWidth.load(folder)
    decoder = DSBDDecoder(small_pair(), CONFIG, policy)
    (result,) = decoder.generate([[5, 6, 7]], torch.Generator().manual_seed(0))
    assert result.sequences


@examples(25)
@given(damage(), st.sampled_from(["config.json", "model.safetensors"]))
def test_damaged_controllers(kept: Path, place: Path, damaged: Any, name: str) -> None:
    folder = fresh(kept, "controller", place)
    (folder / name).write_bytes(damaged((folder / name).read_bytes()))
    with warnings.catch_warnings(), counted("damaged controllers", UserError):
        warnings.simplefilter("ignore")
        use_controller(folder)


@examples(30)
@given(st.data())
def test_configs_of_controllers(kept: Path, place: Path, data: st.DataObject) -> None:
    folder = fresh(kept, "controller", place)
    (folder / "config.json").write_text(
        json.dumps(data.draw(changed(document(kept / "controller" / "config.json")), "config"))
    )
    with warnings.catch_warnings(), counted("configs of controllers", UserError):
        warnings.simplefilter("ignore")
        use_controller(folder)


@examples(20)
@given(damage())
def test_damaged_checkpoints(kept: Path, place: Path, damaged: Any) -> None:
    path = place / "damaged.ckpt"
    path.write_bytes(damaged((kept / "last.ckpt").read_bytes()))
    with warnings.catch_warnings(), counted("damaged checkpoints", UserError):
        warnings.simplefilter("ignore")
        assert alike(read_checkpoint(str(path)), read_checkpoint(str(kept / "last.ckpt"))), "no checksum was looked at"


def alike(one: Any, other: Any) -> bool:
    """Equal in every tensor of two nested values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.equal(other)
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


TABLE = LatencyTable((1, 2, 8), (1.0, 1.1, 1.5), (0.2, 0.2, 0.4)).to_dict()


@examples(40)
@given(st.one_of(changed(TABLE), JSON))
def test_latency_tables(place: Path, table: Any) -> None:
    path = place / "table.json"
    path.write_text(json.dumps(table))
    with counted("latency tables", UserError):
        found = LatencyTable.load(path)
        assert found.target_cost(3) > 0 and found.draft_cost(3) > 0 and found.host_cost(2) >= 0


LINE = {
    "prompt": "def f():\n",
    "reference": "return",
    "turns": ["a", "b"],
    "messages": [{"role": "user", "content": "x"}],
}
FILES = {
    "own": (JsonlTask, [LINE, LINE], {"reference_field": "reference"}),
    "chat": (JsonlTask, [LINE], {"messages_field": "messages"}),
    "spec": (SpecBenchTask, [{"question_id": 1, "category": "qa", "turns": ["a", "b"]}], {}),
    "humaneval": (
        HumanEvalTask,
        [{"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "t"}],
        {},
    ),
    "squad": (
        SquadTask,
        {
            "data": [
                {"paragraphs": [{"context": "c", "qas": [{"id": "1", "question": "q", "answers": [{"text": "a"}]}]}]}
            ]
        },
        {},
    ),
    "spider": (SpiderTask, [{"db_id": "pond", "question": "q", "query": "SELECT 1"}], {}),
}
TABLES = [{"db_id": "pond", "table_names_original": ["pond"], "column_names_original": [[-1, "*"], [0, "id"]]}]


@examples(60)
@given(st.sampled_from(sorted(FILES)), st.data())
def test_files_of_prompts(place: Path, name: str, data: st.DataObject) -> None:
    kind, whole, options = FILES[name]
    found = data.draw(st.one_of(changed(whole), st.just(whole)), "content")
    lines = isinstance(whole, list) and name != "spider"
    text = "\n".join(map(json.dumps, found)) if lines and isinstance(found, list) else json.dumps(found)
    content = data.draw(st.one_of(st.just(lambda raw: raw), damage()), "damage")(text.encode())
    path = place / f"{name}.json{'l' if lines else ''}"
    path.write_bytes(content)
    if name == "spider":
        tables = data.draw(st.one_of(st.just(TABLES), changed(TABLES)), "tables")
        (place / "tables.json").write_text(json.dumps(tables))
    with counted("files of prompts", UserError):
        task = kind(str(path), shares=None, **options)
        prompts = task.prompts("test", None, small_tokenizer())
        assert prompts and all(prompt.tokens for prompt in prompts)
        assert len({prompt.id for prompt in prompts}) == len(prompts)
        for prompt in prompts:
            task.metrics("SELECT 1;", prompt)
            json.dumps(task.describe())


ENDS = {"value": 100.0, "low": 90.0, "high": 110.0}
RESULTS = {
    "schema_version": 2,
    "rows": [
        {
            "name": f"{method} M=4",
            "method": method,
            "family": "hand-set",
            "settings": {"target_width": 4},
            "config": {"target_width": 4},
            "summary": {"tokens_per_second": ENDS, "log_prob": ENDS | {"value": -0.5}},
            "counts": {"target_width": {"4": 10}},
            "prompts": [{"prompt_id": "a", "metrics": {}, "log_prob": -1.0, "tokens": 2}],
        }
        for method in ("beam_sample", "fixed")
    ],
    "failed": {},
    "unscored": None,
    "stopped": None,
    "tuned": None,
    "comparisons": {"clock": []},
    "calibration": {},
    "provenance": {
        "argv": ["evaluate.py"],
        "git_sha": None,
        "versions": {"torch": "2.13"},
        "pair": {"name": "small"},
        "task": {"name": "stdlib", "prompts": 1},
        "machine": {"gpu": None, "cpu": "c", "cores": 2, "system": "Linux"},
        "date": "2026-11-26",
        "config": {},
    },
}


@examples(40)
@given(changed(RESULTS))
def test_results(place: Path, results: Any) -> None:
    path = place / "results.json"
    path.write_text(json.dumps(results))
    with counted("results", UserError):
        command_line([str(path)])


SETTINGS = sorted(
    {f"{path.parent.name}={path.stem}" for path in CONF_DIR.glob("*/*.yaml")}
    | {f"decoding.{name}" for name in DecodingConfig.__dataclass_fields__}
    | {"seed", "pair.device", "policy.draft_width", "collect.batch_size", "data.path", "collect.columns", "output_dir"}
    | {"hydra.run.dir", "trainer.max_epochs", "controller.lr", "ckpt_path", "prompts.limit", "policies", "rows", "grid"}
)
VALUES = st.one_of(
    st.sampled_from(
        ["1", "-1", "null", "true", "1.5", "[1,2]", "{a: 1}", "abc", "''", "${seed}", "${nothing}", "[", "1e999"]
    ),
    st.text("abc019=.,:[]{}$'\"\\ ~+-é\n", max_size=6),
)


@examples(12)
@given(
    st.sampled_from(["collect", "train", "evaluate", "generate", "bench"]),
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from(["", "", "+", "++", "~"]), st.sampled_from(SETTINGS), VALUES).map(
                lambda parts: parts[0] + (parts[1] if "=" in parts[1] else f"{parts[1]}={parts[2]}")
            ),
            st.text("abz01=.+~-${}[]é ", max_size=8),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_overrides(place: Path, command: str, arguments: list[str]) -> None:
    """Hydra's own options, which begin with a dash, aside."""
    given_ = [argument for argument in arguments if not argument.startswith("-") and "hydra.run.dir" not in argument]
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with pytest.MonkeyPatch.context() as patch, counted("overrides", Refused):
        patch.chdir(place)
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        patch.setattr(sys, "argv", [f"{command}.py", *given_, "hydra.run.dir=run"])
        said: list[str] = []
        patch.setattr(sys, "stderr", Said(said))
        try:
            entry_point(command, open_nodes=("learned",))(lambda cfg: None)()
        except SystemExit as stop:
            text = "".join(said)
            assert stop.code == 2 and text.startswith("error: ") and text.count("\n") == 1, (given_, stop.code, text)
            raise Refused(text) from None
        finally:
            root.handlers[:], root.level = handlers, level
            shutil.rmtree(place / "run", ignore_errors=True)


class Refused(Exception):
    """A command line ended with exit code 2 and a sentence."""


class Said:
    """A stream that keeps what is written to it."""

    def __init__(self, kept: list[str]) -> None:
        self.kept = kept

    def write(self, text: str) -> int:
        self.kept.append(text)
        return len(text)

    def flush(self) -> None:
        """Nothing waits."""
