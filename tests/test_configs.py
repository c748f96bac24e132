"""Every config composes with every command that lists its group, and its settings are ones that its target takes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_method, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from decoding import (
    DecodingConfig,
    EntropyWidth,
    ExpectedWidth,
    FixedWidth,
    GapWidth,
    MassWidth,
    RandomWidth,
    ThresholdWidth,
    UniformWidth,
    UserError,
)
from decoding.support.entry import CONF_DIR, build_all, opened
from decoding.support.settings import check_settings
from decoding.tasks.base import Prompt

COMMANDS = ("train", "collect", "evaluate", "bench", "generate", "latency")
GLOBAL = ("experiment", "debug", "sweep")  # set values of other groups; each is for the commands that it names
MISSING = {
    "pair=local": ["pair.target=a", "pair.draft=b"],
    "data=jsonl": ["data.path=p.jsonl"],
    "policy=learned": ["policy.path=p"],
    "latency=file": ["latency.path=p"],
}


def groups_of(command: str) -> list[str]:
    entries = OmegaConf.load(CONF_DIR / f"{command}.yaml")["defaults"]
    return [str(key) for entry in entries if isinstance(entry, DictConfig) for key in entry if key != "hydra"]


def options_of(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def commands_named_in(path: Path) -> list[str]:
    head = "".join(re.findall(r"^#.*\n", path.read_text(), re.MULTILINE))
    named = {"train": "train.py", "evaluate": "evaluate.py"}
    named |= {name: f"decoding.{name}" for name in ("collect", "bench", "generate", "latency", "train_draft")}
    return [command for command, name in named.items() if name in head or "All commands" in head]


def combinations() -> Iterator[tuple[str, str]]:
    for command in COMMANDS:
        for group in groups_of(command):
            for option in options_of(group):
                said = (CONF_DIR / group / f"{option}.yaml").read_text()
                named = (f"{command}.py {group}={option}", f"decoding.{command} {group}={option}")
                if group not in GLOBAL or any(name in said for name in named):
                    yield command, f"{group}={option}"


def composed(command: str, *overrides: str, output_dir: str = "out") -> DictConfig:
    """A config as a job would get it."""
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(command, list(overrides), return_hydra_config=True)
    with open_dict(cfg):
        cfg.hydra.runtime.output_dir = output_dir
        HydraConfig.instance().set_config(cfg)
        del cfg["hydra"]
    return cfg


@pytest.fixture(autouse=True)
def _no_hydra_left() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


@pytest.mark.parametrize(("command", "choice"), list(combinations()))
def test_composes_with_known_settings(command: str, choice: str) -> None:
    check_settings(composed(command, choice, *MISSING.get(choice, [])))


@pytest.mark.parametrize("group", GLOBAL)
def test_every_global_option_names_its_command(group: str) -> None:
    used = {choice for _, choice in combinations()}
    assert {f"{group}={option}" for option in options_of(group)} <= used


@pytest.mark.parametrize("path", sorted(CONF_DIR.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF_DIR)))
def test_first_lines_name_a_command(path: Path) -> None:
    first = path.read_text().split("\n")[:3]
    assert first[0].startswith("#")
    assert commands_named_in(path), f"{path} does not say which command uses it"


def commands_in_comments() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(file, command, settings) of every command line in a comment of conf/, once, but for those composed above."""
    named = "|".join(COMMANDS)
    line = re.compile(rf"python (?:-m (?:decoding|studies)\.)?({named})(?:\.py)?((?: +[+\w.@/]+=[^\s\"']+)+)")
    seen = {(command, (choice,)) for command, choice in combinations()}
    for path in sorted(CONF_DIR.rglob("*.yaml")):
        for comment in re.findall(r"#.*", path.read_text()):
            for command, settings in line.findall(comment):
                given = tuple(setting.rstrip(",;:)") for setting in settings.split())
                if (command, given) not in seen:
                    seen.add((command, given))
                    yield path.relative_to(CONF_DIR).as_posix(), command, given


@pytest.mark.parametrize(("where", "command", "given"), list(commands_in_comments()))
def test_commands_in_comments_compose(where: str, command: str, given: tuple[str, ...]) -> None:
    """Sweeps by their first value; settings with ... in them are left out."""
    settings = [text.replace("<directory>", "outputs") for text in given if "..." not in text]
    settings = [text if "[" in text else text.split(",")[0] for text in settings]
    settings += [text for choice in MISSING if choice in settings for text in MISSING[choice]]
    if command == "evaluate":  # as their entry points rename it
        settings = [re.sub(r"^controller=", "controller_path=", text) for text in settings]
    settings = opened(settings, groups_of(command), ("grid",))
    check_settings(composed(command, *settings), composed(command), ("grid",))


def test_a_class_of_ones_own_stands_for_the_choice_of_a_group() -> None:
    """As `python -m decoding.collect policy=mine.HalfWidth policy.fraction=0.25 data=mine.Poems` is read."""
    half, poems = "tests.decoding.measure.test_rows.HalfWidth", "tests.test_configs.Poems"
    given = [f"policy={half}", "policy.fraction=0.25", "seed=3", f"data={poems}", "data.lines=2"]
    settings = opened(given, groups_of("collect"), ())
    cfg = composed("collect", *settings)
    check_settings(cfg, composed("collect"))
    assert instantiate(cfg.policy).fraction == 0.25 and cfg.policy == {"_target_": half, "fraction": 0.25}
    assert instantiate(cfg.data).lines == 2 and cfg.seed == 3
    wrong = composed("collect", *opened([f"policy={half}", "policy.fractions=1"], groups_of("collect"), ()))
    with pytest.raises(UserError, match=r"policy.fractions is not a setting of .*HalfWidth; choose among fraction"):
        check_settings(wrong)


class Poems:
    """A user's task: prompts, metrics and a description are all that it takes."""

    name = "poems"

    def __init__(self, lines: int = 1) -> None:
        self.lines = lines

    def prompts(self, split: str, limit: int | None, tokenizer: Any) -> list[Prompt]:
        tokens = tokenizer("def rose(x):\n" * self.lines)["input_ids"]
        return [Prompt(f"{split}-{i}", tokens) for i in range(min(limit or 4, 4))]

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        return {"lines": float(prediction.count("\n") >= self.lines)}

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "lines": self.lines}


@pytest.mark.parametrize(
    "name",
    [
        "decoding.latency.LatencyTable.measure",
        "decoding.latency.LatencyTable.load",
        "decoding.energy.measure_joules",
        "decoding.device_model.modelled",
    ],
)
def test_older_names_in_configs_are_found(name: str) -> None:
    """Users' own configs name what has moved since."""
    assert callable(get_method(name))


def test_decoding_lists_every_field() -> None:
    """A default may differ from the dataclass's, a field may not be forgotten."""
    node = dict(composed("train").decoding)
    assert node.keys() - {"_target_"} == DecodingConfig.__dataclass_fields__.keys()
    assert instantiate(composed("train", "decoding=exact").decoding).refill == "width"
    paper = instantiate(composed("evaluate", "decoding=paper").decoding)
    assert (paper.surplus, paper.refill, paper.one_beam_cache) == ("drop", "full", True)


@pytest.mark.parametrize(
    ("option", "kind"),
    [
        ("fixed", FixedWidth),
        ("threshold", ThresholdWidth),
        ("expected", ExpectedWidth),
        ("uniform", UniformWidth),
        ("random", RandomWidth),
        ("mass", MassWidth),
        ("gap", GapWidth),
        ("entropy", EntropyWidth),
    ],
)
def test_policies_are_built(option: str, kind: type) -> None:
    assert isinstance(instantiate(composed("collect", f"policy={option}").policy), kind)


def test_tasks_of_a_mix_stay_tasks() -> None:
    """Hydra would make configs of those that are dataclasses."""
    task = instantiate(composed("evaluate", "data=mix").data)
    assert set(task.tasks) == {"gsm8k", "squad", "spec_bench", "spider"}
    assert all(callable(part.prompts) and callable(part.metrics) for part in task.tasks.values())


def test_training_parts_are_built(tmp_path: Path) -> None:
    cfg = composed("train", output_dir=str(tmp_path))
    assert len(build_all(cfg.callbacks)) == len(cfg.callbacks) == 4
    (logger,) = build_all(cfg.logger)
    trainer = instantiate(cfg.trainer, logger=logger, callbacks=build_all(cfg.callbacks))
    assert trainer.max_epochs == cfg.trainer.max_epochs
    assert build_all(composed("train", "logger=none").logger) == []
    assert not list(tmp_path.iterdir()), "building must not write"


def test_debug_and_sweep_change_what_they_say() -> None:
    debug = composed("train", "debug=fdr")
    assert debug.trainer.fast_dev_run is True and debug.logger == {}
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        swept: Any = compose("train", ["sweep=lr"], return_hydra_config=True)
    assert swept.hydra.mode.name == "MULTIRUN" and "controller.lr" in swept.hydra.sweeper.params


def run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("train.py", "controller.hiden=3"), "Did you mean controller.hidden?"),
        (("train.py", "decoding.draft_width=2"), "draft_width (2) is less than target_width (4)"),
        (("evaluate.py", "policies=[foo]"), "policies holds 'foo'; choose among"),
        (("-m", "decoding.collect", "pair=foo"), "pair=foo is not known; choose one of inflated, llama2_13b,"),
    ],
)
def test_command_lines_refuse_in_one_sentence(tmp_path: Path, command: tuple[str, ...], expected: str) -> None:
    root = CONF_DIR.parent
    script = [str(root / part) if part.endswith(".py") else part for part in command]
    result = run(*script, folder=tmp_path if command[0] != "-m" else root)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert result.stderr.startswith("error: ") and expected in result.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
