"""What files and configs alone show to be wrong is a sentence before a model is loaded, in every command."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from omegaconf import open_dict

import evaluate
from controller.checkpoint import save_controller
from decoding import UserError
from decoding.support.entry import CONF_DIR
from tests.controller.synthetic import ABOUT, random_net
from tests.small_pair import small_pair

FILES = {
    "lost.jsonl": None,
    "torn.jsonl": '{"prompt": "def f():"}\n{"prompt": ',
    "twice.jsonl": '{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n',
    "one_split.jsonl": '{"prompt": "def f():"}\n',
}
COMMANDS = {"evaluate": "evaluate", "bench": "decoding.bench", "collect": "decoding.collect", "train": "train"}
MODULES = COMMANDS | {"train_draft": "decoding.train_draft.__main__"}


class Loaded(Exception):
    """A model was loaded."""


def loading() -> None:
    """A pair that must not be asked for."""
    raise Loaded


def run(command: str, directory: Path, *overrides: str) -> None:
    """Run a command on a pair that may not be loaded."""
    settings = [f"paths.output_dir={directory / 'out'}"]
    if command in ("collect", "train"):
        settings += [f"collect.traces_dir={directory / 'traces'}"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(command, [*(() if command == "generate" else settings), *overrides])
    with open_dict(cfg):
        cfg.pair = {"_target_": f"{__name__}.loading"}
    if command == "generate":
        importlib.import_module("decoding.generate").run(cfg, "def f():")
    else:
        importlib.import_module(MODULES[command]).main(cfg)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("lost.jsonl", "Cannot read .*lost.jsonl"),
        ("torn.jsonl", "torn.jsonl, line 2: not JSON"),
        ("twice.jsonl", "twice.jsonl, line 2: the id '1' is that of line 1, too"),
        ("one_split.jsonl", "one_split.jsonl has no prompts in split"),
    ],
)
def test_files_of_prompts(tmp_path: Path, command: str, file: str, sentence: str) -> None:
    if (content := FILES[file]) is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=sentence):
        run(command, tmp_path, "data=jsonl", f"data.path={tmp_path / file}")
    assert not (tmp_path / "out").exists() and not (tmp_path / "traces").exists()


def saved(directory: Path, name: str = "controller", seed: int = 0) -> Path:
    """An untrained network for three beams of the small pair."""
    about = {"features": ABOUT, "pair": small_pair().describe(), "decoding": {}}
    return save_controller(random_net(seed), directory / name, about)


MISTAKES = [
    ("evaluate", ["policies=[learned]", "grid.widths=[2,8]"], "trained for at most"),
    ("evaluate", ["policies=[fixed]", "prompts.split=tset"], "tset"),
    ("evaluate", ["policies=[fixed]", "latency=file", "latency.path=/nowhere/table.json"], "/nowhere/table.json"),
    ("evaluate", ["policies=[fixed]", "tune.grids=[{policies: [fixed]}]", "tune.split=model"], "train, val, test"),
    ("evaluate", ["controller_path=/nowhere/controller"], "No controller at /nowhere/controller"),
    ("evaluate", ["controller_path=[]"], "controller is []; give a directory"),
    ("evaluate", ["controller_path=[a,./a]"], "or a list of different ones"),
    ("bench", ["rows=[{method: fixed, target_width: 2, asked_width: 5}]"], "5"),
    ("bench", ["rows=[{method: learned, path: /nowhere/controller}]"], "No controller at /nowhere/controller"),
    ("bench", ["rows=[{method: threshold, threshold: 7}]"], "threshold is 7"),
    ("bench", ["prompts.split=tset"], "tset"),
    ("collect", ["policy=fixed", "policy.draft_width=1"], "draft_width"),
    ("collect", ["collect.train_prompts=0"], "collect.train_prompts is 0"),
    ("train", ["collect.batch_size=0"], "collect.batch_size is 0"),
    ("train", ["controller.hidden=0"], "controller.hidden is 0"),
    ("train", ["controller.lr=-1"], "controller.lr is -1"),
    ("train", ["trainer.accelerator=warp"], "warp"),
    ("train_draft", ["kind=medusa"], "kind is 'medusa'"),
    ("train_draft", ["ckpt_path=/nowhere/last.ckpt"], "There is no checkpoint at /nowhere/last.ckpt"),
    ("train_draft", ["text.source=/nowhere/prompts.jsonl"], "text.source is '/nowhere/prompts.jsonl'"),
    ("train_draft", ["text.source=3"], "text.source is 3"),
    ("train_draft", ["text.tokens=0"], "text.tokens is 0"),
    ("train_draft", ["text.longest=0"], "text.longest is 0"),
    ("train_draft", ["text.batch=0"], "text.batch is 0"),
    ("train_draft", ["text.temperature=0"], "text.temperature is 0"),
    ("train_draft", ["text.top_k=-1"], "text.top_k is -1"),
    ("train_draft", ["head.draft_vocab_size=0"], "head.draft_vocab_size is 0"),
    ("train_draft", ["head.layers=last"], "head.layers is 'last'"),
    ("train_draft", ["kind=fspad", "head.layers=[1,2]"], "a head of kind=fspad reads one layer"),
    ("train_draft", ["kind=model", "model.hidden_size=100"], "model.hidden_size is 100"),
    ("train_draft", ["fit.steps=0"], "fit.steps is 0"),
    ("train_draft", ["fit.batch_tokens=0"], "fit.batch_tokens is 0"),
    ("train_draft", ["fit.lr=0"], "fit.lr is 0"),
    ("train_draft", ["fit.decay=-1"], "fit.decay is -1"),
    ("train_draft", ["fit.weight_decay=-1"], "fit.weight_decay is -1"),
    ("train_draft", ["fit.max_seconds=0"], "fit.max_seconds is 0"),
    ("train_draft", ["fit.room_gb=0"], "fit.room_gb is 0"),
    ("generate", ["policy=fixed", "policy.draft_width=1"], "draft_width"),
    ("generate", ["policy=learned", "policy.path=/nowhere/controller"], "No controller at /nowhere/controller"),
]


@pytest.mark.parametrize(("command", "overrides", "sentence"), MISTAKES, ids=str)
def test_settings(tmp_path: Path, command: str, overrides: list[str], sentence: str) -> None:
    if "policies=[learned]" in overrides:
        overrides = [*overrides, f"controller_path={saved(tmp_path)}", "decoding.verification=shared_noise"]
    with pytest.raises(Exception, match=re.escape(sentence)) as error:  # Hydra wraps what it builds
        run(command, tmp_path, *overrides)
    assert isinstance(error.value, UserError | InstantiationException)


@pytest.mark.parametrize("command", [*MODULES, "generate"])
def test_without_a_mistake_the_pair_is_asked_for(tmp_path: Path, command: str) -> None:
    with pytest.raises(Exception, match=r"Loaded|loading"):
        run(command, tmp_path)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["out/a/controller", "out/b/controller"], ["a", "b"]),
        (["me/small", "me/large"], ["small", "large"]),
        (["a/x/c", "b/x/c", "b/y/c"], ["a/x", "b/x", "b/y"]),
        (["lr=0.1,seed=2/c", "lr=0.2,seed=2/c"], ["lr_0.1_seed_2", "lr_0.2_seed_2"]),
        (["c", "x/c"], ["1", "2"]),
        (["a b", "a+b"], ["1", "2"]),
    ],
)
def test_names_tell_controllers_apart(paths: list[str], names: list[str]) -> None:
    assert evaluate.told_apart(paths) == names


def test_two_controllers_take_turns_in_one_evaluation(tmp_path: Path) -> None:
    """Rows of either by name, in the table, the comparisons and the provenance."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"def f{i}(x):\n"}) + "\n" for i in range(4)))
    paths = [saved(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    settings = ["data=jsonl", f"data.path={prompts}", "data.shares=null", f"paths.output_dir={tmp_path / 'out'}"]
    settings += ["decoding.target_width=2", "decoding.max_new_tokens=6", "decoding.verification=shared_noise"]
    settings += ["bootstrap=20", "prompts.warmup=0", "grid.widths=[2]", "references=[beam_sample]"]
    settings += [f"controller_path=[{','.join(map(str, paths))}]", "policies=[fixed,learned]"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("evaluate", settings)
    with open_dict(cfg):
        cfg.pair = {"_target_": "tests.small_pair.small_pair"}
    found = evaluate.main(cfg)
    names = ["beam_sample M=2", "fixed M=2 w=8 γ=3", "learned:one M=2 w=8 γ=3", "learned:two M=2 w=8 γ=3"]
    assert [row["name"] for row in found["rows"]] == names and not found["failed"]
    assert all("learned:two" in entry["over"] for entry in found["comparisons"]["clock"])
    source = found["provenance"]
    assert source["controller"] == [str(path) for path in paths] and len({*source["controller_sha256"]}) == 2
    page = (tmp_path / "out" / "results.md").read_text()
    assert "learned:one M=2" in page and "learned:two M=2" in page


@pytest.mark.parametrize("command", COMMANDS)
def test_a_huge_prompt_is_told_with_its_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is decoded, where the target cannot take it; else said, and it goes on."""
    monkeypatch.setattr("decoding.decoder.DSBDDecoder.generate", lambda *_, **__: pytest.fail("decoded"))
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"def f{i}(x):\n" * (400 if i == 33 else 1)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(f"{__name__}.loading", small_pair)
    monkeypatch.setattr("decoding.pairs.pair.limit_of", lambda model: 256)
    more = ["data.shares=null"] if command in ("evaluate", "bench") else ["collect.train_prompts=null"]
    if command in ("collect", "train"):
        monkeypatch.setattr(
            "decoding.tasks.base.FileTask._split_of", lambda self, text: "val" if "f1(" in text else "train"
        )
    else:
        more += ["prompts.limit=null", "prompts.warmup=0"]
    if command == "evaluate":
        more += ["policies=[fixed]"]
    if command == "bench":
        more += ["rows=[{method: fixed, target_width: 2}]"]
    with pytest.raises(UserError, match=r"Prompt 'p33' \(.*prompts.jsonl, line 34\) has \d+ tokens .* context of 256"):
        run(command, tmp_path, "data=jsonl", f"data.path={path}", "decoding.target_width=2", *more)
    monkeypatch.setattr("decoding.pairs.pair.limit_of", lambda model: None)
    with pytest.raises(BaseException, match="decoded"):
        run(command, tmp_path, "data=jsonl", f"data.path={path}", "decoding.target_width=2", *more)
    said = capsys.readouterr().err
    assert said.count("prompts.jsonl, line 34) and its new tokens may be") == 1
