"""What SECURITY.md promises: foreign files run nothing and lead nowhere, keys are written nowhere, versions pinned."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import logging
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from safetensors.torch import save_file

from controller import LearnedWidth
from controller.checkpoint import load_controller, save_controller
from decoding import ModelPair, UserError
from decoding.pairs.drafts.eagle3 import load_head
from decoding.support.entry import entry_point
from decoding.support.files import inside
from decoding.support.provenance import provenance, to_plain
from decoding.tasks.base import Prompt
from decoding.tasks.spider import SpiderTask
from decoding.traces.store import load_traces
from tests.controller.synthetic import ABOUT, random_net, write_traces
from tests.small_pair import small_pair, small_tokenizer
from tests.test_packaging import PROJECT, pins
from train import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*(ROOT / "decoding").rglob("*.py"), *(ROOT / "controller").rglob("*.py"), *ROOT.glob("*.py")])
# A key of the hub in form, and one of no known form.
KEY, FOREIGN = "hf_" + "Zq9" * 11, "f0" * 20


class Payload:
    """Makes a directory where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    """A directory that only a payload makes; it must not be there at the end."""
    path = tmp_path / "run"
    yield path
    assert not path.exists(), "the payload ran"


def payload(mark: Path) -> bytes:
    return pickle.dumps({"state_dict": Payload(mark), "epoch": 0, "optimizer_states": [], "loops": {}})


def zipped(path: Path, content: bytes) -> Path:
    """What torch.save writes, with a pickle of one's own in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return path


def test_the_payload_would_run(tmp_path: Path) -> None:
    for name, load in (("a", pickle.loads), ("b", lambda content: torch.load(content, weights_only=False))):
        content = payload(tmp_path / name)
        load(content if name == "a" else zipped(tmp_path / "b.ckpt", content))
        assert (tmp_path / name).is_dir()


def test_a_pickled_checkpoint_is_refused(tmp_path: Path, mark: Path) -> None:
    raw = tmp_path / "raw.ckpt"
    raw.write_bytes(payload(mark))
    for path in (raw, zipped(tmp_path / "zip.ckpt", payload(mark))):
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            read_checkpoint(str(path))


def test_pickled_weights_of_a_model_are_refused(tmp_path: Path, mark: Path) -> None:
    """Also where an index of shards names them."""
    small_pair().target.config.save_pretrained(tmp_path / "m")
    small_tokenizer().save_pretrained(tmp_path / "m")
    for name in ("pytorch_model.bin", "model.safetensors"):
        zipped(tmp_path / "m" / name, payload(mark))
        with pytest.raises(UserError, match="could not be loaded"):
            ModelPair.load(str(tmp_path / "m"), "ngram")


def test_pickled_weights_of_a_head_and_of_a_controller_are_refused(tmp_path: Path, mark: Path) -> None:
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text("{}")
    zipped(head / "pytorch_model.bin", payload(mark))
    with pytest.raises(UserError, match="a pickle can run code"):
        load_head(str(head), small_pair().target)
    saved = save_controller(random_net(), tmp_path / "c", {"features": ABOUT, "pair": {}, "decoding": {}})
    zipped(saved / "pytorch_model.bin", payload(mark))
    zipped(saved / "model.safetensors", payload(mark))
    with pytest.raises(UserError, match="is damaged"):
        load_controller(saved)


def test_code_of_a_model_is_not_run(tmp_path: Path, mark: Path) -> None:
    config = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.Odd"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "odd.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="could not be loaded"):
        ModelPair.load(str(tmp_path), "ngram")


def test_a_controller_from_the_hub_imports_nothing(tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_features.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    about = {"features": {**ABOUT, "class": "odd_features.Odd"}, "pair": {}, "decoding": {}}
    saved = save_controller(random_net(), tmp_path / "c", about)
    monkeypatch.setattr("controller.checkpoint.snapshot_download", lambda *_, **__: str(saved))
    with pytest.raises(UserError, match="no module is imported because a controller from the hub names it"):
        LearnedWidth.load("someone/widths")


@pytest.mark.parametrize("name", ["../away.parquet", "/etc/passwd", "..", "", "a/b", None, 3])
def test_no_name_leads_out_of_a_folder(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match="no name of a file in"):
        inside(tmp_path, name)
    written = write_traces(tmp_path / "t")
    manifest = json.loads((written / "manifest.json").read_text())
    manifest["shards"][0]["file"] = name
    (written / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="no name of a file in"):
        load_traces(written)


def test_a_database_lies_in_its_folder(tmp_path: Path) -> None:
    task = SpiderTask(str(tmp_path / "dev.json"))
    with pytest.raises(UserError, match="no name of a file in"):
        task.database_of(Prompt("spider:../../other:0", [1], None))
    assert task.database_of(Prompt("spider:pond:0", [1], None)) == tmp_path / "database/pond/pond.sqlite"


def test_nothing_unsafe_is_called() -> None:
    """Neither pickle, code from text, nor a shell; torch.load of numbers alone; remote code by its flag alone."""
    assert unsafe(FILES) == []


def unsafe(files: list[Path]) -> list[str]:
    found = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if (
                name
                in ("eval", "exec", "compile", "os.system", "pickle.load", "pickle.loads", "yaml.load", "joblib.load")
                or (name == "torch.load" and given.get("weights_only") != "True")
                or "True" in (given.get("trust_remote_code"), given.get("shell"), given.get("allow_pickle"))
            ):
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)}")
    return found


def test_an_unsafe_call_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "unsafe.py"
    path.write_text(
        "torch.load(x)\ntorch.load(x, weights_only=True)\nrun(y, shell=True)\nload(z, trust_remote_code=t)\n"
    )
    assert [line.split(":")[1] for line in unsafe([path])] == ["1", "3"]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two keys in the environment, and a folder of one's own."""
    monkeypatch.setenv("WANDB_API_KEY", FOREIGN)
    monkeypatch.setenv("HF_TOKEN", KEY)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize("sweep", [False, True])
def test_a_key_is_written_nowhere(
    keys: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sweep: bool
) -> None:
    """Given by name, by value, inside a mapping, or from the environment; in a run that ends well and in one that
    does not."""

    def task(cfg: DictConfig) -> None:
        (tmp_path / "results.json").write_text(json.dumps([provenance(), to_plain(cfg)]))
        logging.getLogger("x").warning("it runs")
        raise UserError(f"the hub says no to {KEY}; log in.")

    mapping = "+collect.note={a: 1, token: OWNVALUE1, b: " + KEY + "}"
    given = ["+pair.token=OWNVALUE2", mapping, "+collect.other=${oc.env:WANDB_API_KEY}", f"+collect.tag=x{FOREIGN}"]
    monkeypatch.setattr(sys, "argv", ["collect.py", *(["-m", "seed=1,2"] if sweep else []), *given])
    monkeypatch.setattr("decoding.support.entry.check_settings", lambda *_: None)  # which knows none of them
    with pytest.raises(SystemExit) as end:
        entry_point("collect")(task)()
    assert end.value.code == 2
    written = {p: p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert any(p.name == "overrides.yaml" for p in written) and any(p.name == "multirun.yaml" for p in written) == sweep
    for where, text in {**written, "the terminal": "".join(capsys.readouterr())}.items():
        for key in (KEY, FOREIGN, "OWNVALUE1", "OWNVALUE2"):
            assert key not in text, (where, key)
    saved = next(p for p in written if p.name == "config.yaml")
    assert OmegaConf.load(saved).collect.note.a == 1, "the rest is as it was"


def test_what_is_installed_fits_together() -> None:
    """Each requirement of this package is met; `pip check` asks the same of all packages."""
    wrong = []
    for requirement in (Requirement(line) for line in PROJECT["dependencies"]):
        if not requirement.specifier.contains(importlib.metadata.version(requirement.name)):
            wrong.append(str(requirement))
    assert wrong == []


def test_all_that_is_needed_is_pinned() -> None:
    """What the pinned packages need, theirs included, is pinned too, but for what virtual environments come with."""
    pinned, lacking = pins("constraints.txt"), []
    todo = [
        Requirement(line)
        for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
        for line in group
        if not line.startswith("speculators")  # fits the oldest versions alone
    ]
    assert "speculators" in pins("constraints-oldest.txt")
    seen: set[str] = set()
    while todo:
        requirement = todo.pop()
        name = requirement.name.lower().replace("_", "-").replace(".", "-")
        if name in (*seen, "setuptools") or (
            requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        ):
            continue
        seen.add(name)
        if name not in pinned:
            lacking.append(name)
        try:
            todo += map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue
    assert sorted(lacking) == [], "pin them in constraints.txt"
