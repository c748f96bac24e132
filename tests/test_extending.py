"""Every recipe of docs/extending.md, taken from the page: its files are written, imported by name, and used."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

import evaluate
import train
from controller import LearnedWidth
from decoding import DecodingConfig, DSBDDecoder, ModelPair, UserError, beam_sample, bench, collect, dsbd_generate
from decoding.engine import families as engine_families
from decoding.engine.fused import can_fuse
from decoding.generate import read_arguments
from decoding.measure import methods
from decoding.measure.methods import METHODS, find_method
from decoding.support.entry import CONF_DIR, opened
from decoding.support.settings import check_settings
from decoding.traces import load_traces
from decoding.traces.schema import TRACE_FEATURES
from tests.decoding import families
from tests.small_pair import small_pair
from tests.test_configs import composed, groups_of

PAGE = (CONF_DIR.parent / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SMALL = ["decoding.target_width=2", "decoding.draft_width=3", "decoding.draft_depth=2", "decoding.max_new_tokens=6"]
PROMPTS = [[5, 6, 7, 8], [5, 6, 9]]


def blocks(section: str, language: str) -> dict[str, str]:
    """Blocks of a recipe by what their first line says that they are: a file, or a place in one."""
    found = re.findall(rf"```{language}\n# (.*?)\n(.*?)```", SECTIONS[section], re.DOTALL)
    assert found, f"{section} has no {language}"
    return dict(found)


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that writes the Python of a recipe, to be imported as by a user who has it beside the command."""
    names: list[str] = []

    def write(section: str) -> None:
        for file, text in blocks(section, "python").items():
            (tmp_path / file).write_text(text)
            names.append(Path(file).stem)

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in names:
        sys.modules.pop(name, None)
    HydraConfig.instance().cfg = None


def settings_of(command: str, folder: Path, *given: str) -> DictConfig:
    """A config with a user's settings, for a job on small models that writes into a folder."""
    cfg = composed(command, *opened([*given, *SMALL], groups_of(command), ("grid",)))
    with open_dict(cfg):
        cfg.paths.output_dir = str(folder / "out")
        cfg.pair = {"_target_": "tests.small_pair.small_pair"}
        if "data" in cfg and cfg.data._target_.startswith("decoding"):
            cfg.data = {"_target_": "tests.test_configs.Poems"}
    return cfg


@pytest.mark.parametrize("command", [line for line in COMMANDS if "tests" not in line])
def test_commands_are_read(command: str, written: Any) -> None:
    """Each command of the page composes, and its settings are ones that the classes of the page take."""
    for section, text in SECTIONS.items():
        if "```python\n# FAMILIES" not in text:
            written(section)
    words = [word for word in shlex.split(command)[1:] if word != "-m"]
    name = words[0].removeprefix("decoding.").removesuffix(".py")
    if name == "generate":
        _, words[1:] = read_arguments(words[1:])
    given = opened(words[1:], groups_of(name), ("grid",))
    check_settings(composed(name, *given), composed(name), ("grid",))


def test_a_policy(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the evaluation with the grid of its own, one of the bench, and a YAML with other defaults."""
    written("A width policy")
    few = ["prompts.limit=1", "prompts.warmup=1", "bootstrap=20"]
    given = ["policies=[half_width.HalfWidth]", "references=[]", *few]
    rows = evaluate.main(settings_of("evaluate", tmp_path, *given))["rows"]
    assert [row["settings"]["fraction"] for row in rows] == [0.25, 0.5]
    row = "rows=[{method: half_width.HalfWidth, draft_width: 3, fraction: 0.25}]"
    given = [row, "repeats=1", "roofline=false", "reference_width=null", *few]
    (found,) = bench.main(settings_of("bench", tmp_path, *given))["rows"]
    assert found["settings"]["fraction"] == 0.25 and set(found["counts"]["target_width"]) == {"1"}

    ((file, text),) = blocks("A width policy", "yaml").items()
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(text)
    monkeypatch.setattr(methods, "CONF_DIR", tmp_path / "conf")
    config = DecodingConfig(target_width=8, draft_width=8, max_new_tokens=6, eos_token_id=-1)
    (result,) = find_method("half", METHODS)(small_pair(), config)([PROMPTS[0]], torch.Generator().manual_seed(0))
    assert set(result.stats.target_widths) == {2}


def test_a_task(written: Any, tmp_path: Path) -> None:
    written("A task")
    given = ["data=sums.Sums", "data.largest=50", "policies=[multinomial]", "references=[]", "bootstrap=20"]
    found = evaluate.main(settings_of("evaluate", tmp_path, *given, "prompts.limit=3", "prompts.warmup=1"))
    assert found["provenance"]["task"] == {"name": "sums", "largest": 50, "split": "test", "prompts": 3}
    assert 0 <= found["rows"][0]["summary"]["right"]["value"] <= 1
    task = sys.modules["sums"].Sums()
    splits = [{prompt.id for prompt in task.prompts(s, None, small_pair().tokenizer)} for s in ("train", "val", "test")]
    assert len(set.union(*splits)) == sum(map(len, splits)) == 100, "a prompt has one split"
    first = task.prompts("test", 1, small_pair().tokenizer)[0]
    assert [task.metrics(text, first)["right"] for text in (" 5 and so on", " 6", "")] == [1, 0, 0]


def test_a_draft(written: Any) -> None:
    """By its dotted name, in hand and in place of an assistant: beam search's own tokens, drafts among them."""
    written("A draft")
    target = small_pair().target
    pair = ModelPair(target, "echo.Echo")
    shape: dict[str, Any] = {"target_width": 3, "draft_width": 6, "draft_depth": 2, "max_new_tokens": 12}
    config = DecodingConfig(mode="beam_search", eos_token_id=-1, **shape)
    drafted = DSBDDecoder(pair, config).generate(PROMPTS)
    alone = beam_sample(target, PROMPTS, config)
    assert [result.sequences for result in drafted] == [result.sequences for result in alone]
    for verification in ("shared_noise", "rejection"):
        sampled = config.with_changes(mode="beam_sample", temperature=0.7, verification=verification)
        results = DSBDDecoder(pair, sampled).generate(PROMPTS, torch.Generator().manual_seed(0))
        assert all(len(result.sequences[0]) == 12 for result in results)
    assert all(result.stats.passed[0] for result in results), "asked after the prompt, where it says what P is"

    own = sys.modules["echo"].Echo(target)
    assert ModelPair(target, own).fingerprint == pair.fingerprint != ModelPair(target, "ngram").fingerprint
    inputs = {"input_ids": torch.tensor([PROMPTS[0]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 8, "repetition_penalty": 1.3, "pad_token_id": 0}
    before = target.generate(**inputs, **options)
    after = target.generate(**inputs, **options, assistant_model=own, custom_generate=dsbd_generate)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nowhere.Echo", "which cannot be imported: No module"), ("json.JSONDecoder", "derive it from decoding.pairs")],
)
def test_drafts_that_are_not_there_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ModelPair(small_pair().target, name)


def test_a_feature(written: Any, tmp_path: Path) -> None:
    """Collected, trained on, named by the controller, loaded with it, and decoded with."""
    written("A feature of the network")
    few = ["collect.train_prompts=3", "collect.val_prompts=2", "trainer.max_epochs=1", "logger=none"]
    quiet = ["callbacks.progress_bar=null", "+trainer.enable_progress_bar=false"]
    given = ["features=beams_share.Features", f"collect.traces_dir={tmp_path / 'traces'}"]
    train.main(settings_of("train", tmp_path, *given, *few, *quiet))
    policy = LearnedWidth.load(tmp_path / "out" / "controller")
    assert isinstance(policy.features, sys.modules["beams_share"].Features)
    config = DecodingConfig(target_width=2, draft_width=3, draft_depth=2, max_new_tokens=6, verification="shared_noise")
    (result,) = DSBDDecoder(small_pair(), config, policy).generate([PROMPTS[0]], torch.Generator().manual_seed(0))
    assert len(result.sequences[0]) == 6 or result.finished[0]


def test_a_trace_column(written: Any, tmp_path: Path) -> None:
    """Every row has it, the others stay as they are, and such traces are not mistaken for those without it."""
    written("A trace column")
    few = [f"collect.traces_dir={tmp_path}", "collect.train_prompts=2", "collect.val_prompts=1"]
    plain, _ = load_traces(collect.ensure_traces(settings_of("collect", tmp_path, *few)))
    given = [*few, "collect.columns=[runner_up.RUNNER_UP]"]
    rows, manifest = load_traces(collect.ensure_traces(settings_of("collect", tmp_path, *given)))
    assert set(rows.column_names) == {*TRACE_FEATURES, "runner_up"} and list(manifest["columns"]) == ["runner_up"]
    assert set(plain.column_names) == {*TRACE_FEATURES}
    assert rows.remove_columns("runner_up")[:] == plain[:]
    values = rows["runner_up"]
    assert all(0 <= value <= 0.5 for value in values) and len(set(values)) > 1
    for wrong, sentence in (("runner_up.runner_up", "no decoding.traces.Column"), ("nowhere.X", "cannot be imported")):
        with pytest.raises(UserError, match=sentence):
            collect.ensure_traces(settings_of("collect", tmp_path, *few, f"collect.columns=[{wrong}]"))
    twice = "collect.columns=[runner_up.RUNNER_UP,runner_up.RUNNER_UP]"
    with pytest.raises(UserError, match="have a column 'runner_up' already"):
        collect.ensure_traces(settings_of("collect", tmp_path, *few, twice))


def test_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is all that the tests of families need, and a record all that a fused pass needs."""
    from tests.decoding.engine import test_families  # which imports half of the tests

    found = blocks("A model family", "python")
    place, text = found.popitem()
    assert place == "FAMILIES in decoding/engine/families.py"
    (record,) = eval(f"{{{text}}}", dict(vars(engine_families))).items()
    place, text = found.popitem()
    assert place == "FAMILIES in tests/decoding/families.py"
    (row,) = eval(f"{{{text}}}", dict(vars(families))).items()

    monkeypatch.setitem(families.FAMILIES, *row)
    close, largest_difference = test_families.CLOSE, test_families.largest_difference
    assert largest_difference(row[1].model()) < close
    test_families.test_beam_search_is_generate(row[0])
    fused = families.Family(record[0], "rotary", "full", families._SHAPE)
    assert not can_fuse(fused.model())
    monkeypatch.setitem(engine_families.FAMILIES, *record)
    assert can_fuse(fused.model()) and largest_difference(fused.model()) < close
