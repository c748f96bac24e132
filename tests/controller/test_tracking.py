"""What reaches Weights & Biases: a logger's settings, refusals in a sentence, an evaluation's tables."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

import train
from controller.tracking import check_logger, finish, log_evaluation, start_run, trainer_options
from decoding import UserError
from decoding.entry import CONF_DIR


def config(directory: Path, *overrides: str, command: str = "train") -> DictConfig:
    settings = [f"paths.output_dir={directory}", "logger=wandb", *overrides]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(command, settings)


class Run:
    """A wandb run that keeps what it is given."""

    offline, id = False, "x1"

    def __init__(self) -> None:
        self.settings = SimpleNamespace(sync_dir="nowhere")
        self.options: dict[str, Any] = {}
        self.logged: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    fake = Run()

    @functools.wraps(wandb.init)
    def init(**options: Any) -> Run:
        inspect.signature(wandb.init).bind(**options)
        fake.options = options
        return fake

    monkeypatch.setattr(wandb, "init", init)
    return fake


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], {"mode": "offline", "project": "dsbd"}),
        (
            ["logger.wandb.offline=false", "+logger.wandb.id=x1", "+logger.wandb.resume=must"],
            {"id": "x1", "resume": "must", "mode": None},
        ),
        (["logger.wandb.offline=false", "+logger.wandb.version=x1"], {"id": "x1", "resume": "allow"}),
        (["+logger.wandb.id=x1"], {"id": "x1", "mode": "offline", "resume": None}),
        (["logger.wandb.offline=false", "+logger.wandb.fork_from='x1?_step=3'"], {"fork_from": "x1?_step=3"}),
        (["+logger.wandb.mode=online"], {"mode": "online"}),
        (["logger.wandb.offline=false", "+logger.wandb.mode=offline"], {"mode": "offline"}),
        (["+logger.wandb.mode=disabled"], {"mode": "disabled"}),
        (
            ["+logger.wandb.tags=[a,b]", "+logger.wandb.job_type=sweep", "+logger.wandb.config_exclude_keys=[seed]"],
            {"tags": ["a", "b"], "job_type": "sweep", "config_exclude_keys": ["seed"]},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_reach_wandb(tmp_path: Path, run: Run, given: list[str], expected: dict[str, Any]) -> None:
    cfg = config(tmp_path / "new", *given)
    assert start_run(cfg, trains=True) is run
    assert {key: run.options.get(key) for key in expected} == expected
    assert run.options["dir"] == str(tmp_path / "new") and (tmp_path / "new").is_dir()
    assert run.options["config"]["seed"] == 0 and "provenance" in run.options["config"]


def test_what_the_trainer_logs_reaches_its_logger(tmp_path: Path, run: Run) -> None:
    given = ["log_model=all", "+prefix=p", "+checkpoint_name=c", "+add_file_policy=immutable", "offline=false"]
    overrides = [f"{'+' * part.startswith('+')}logger.wandb.{part.lstrip('+')}" for part in given]
    cfg = config(tmp_path, *overrides)
    expected = {"log_model": "all", "prefix": "p", "checkpoint_name": "c", "add_file_policy": "immutable"}
    assert trainer_options(cfg) == expected
    assert not run.options.keys() & expected.keys()
    (logger,) = train.build_loggers(cfg, start_run(cfg, trains=True))
    assert isinstance(logger, WandbLogger) and logger.experiment is run  # type: ignore[comparison-overlap]
    logger.log_metrics({"loss": 1.0})
    assert run.logged == {"p-loss": 1.0}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("+logger.wandb.prjoect=x", "logger.wandb.prjoect is a setting of neither WandbLogger nor wandb.init; choose"),
        ("+logger.wandb.api_key=hidden", "logger.wandb.api_key would be written to disk"),
        ("+logger.wandb.settings={console: wrap}", "logger.wandb.settings are set here"),
        ("+logger.wandb.save_code=true", "logger.wandb.save_code is off"),
        ("+logger.wandb.anonymous=true", "does nothing in W&B"),
        ("logger.wandb.log_model=all", "log_model is 'all': it uploads checkpoints, which a run that is kept offline"),
        ("+logger.wandb.resume=must", "resume is 'must': it continues a run, .* Set logger.wandb.offline=false"),
        ("+logger.wandb.fork_from=a", "fork_from is 'a': it continues a run"),
    ],
)
def test_settings_without_an_effect_are_refused(tmp_path: Path, run: Run, given: str, sentence: str) -> None:
    for command in ("train", "evaluate"):
        if command == "evaluate" and "log_model" in given:
            sentence = r"logger\.wandb\.log_model is for train\.py"
        with pytest.raises(UserError, match=sentence) as error:
            start_run(config(tmp_path / "new", given, command=command), trains=command == "train")
        assert "hidden" not in str(error.value)
    assert not run.options and not (tmp_path / "new").exists()


def test_an_evaluation_has_no_trainer(tmp_path: Path) -> None:
    check_logger(config(tmp_path, "+logger.wandb.prefix=''", command="evaluate"))  # the defaults are none of its matter
    check_logger(config(tmp_path, "logger=csv", command="evaluate"))
    with pytest.raises(UserError, match=r"logger\.wandb\.prefix is for train\.py"):
        check_logger(config(tmp_path, "+logger.wandb.prefix=p", command="evaluate"))


def test_train_refuses_before_traces_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "ensure_traces", lambda cfg: pytest.fail("traces were collected"))
    with pytest.raises(UserError, match="log_model is 'all'"):
        train.main(config(tmp_path, "logger.wandb.log_model=all"))


def test_runs_of_wandb_itself(tmp_path: Path) -> None:
    """Offline and disabled, which need no account; a value that wandb refuses is a sentence."""
    settings = ["+logger.wandb.id=x1", "+logger.wandb.group=g", "+logger.wandb.job_type=j", "+logger.wandb.tags=[a]"]
    real = start_run(config(tmp_path, *settings))
    assert real is not None and real.offline
    assert (real.id, real.group, real.job_type, real.tags) == ("x1", "g", "j", ("a",))
    finish(real)
    finish(start_run(config(tmp_path, "+logger.wandb.mode=disabled")))
    with pytest.raises(UserError, match=r"wandb does not take a value in logger\.wandb .*mode"):
        start_run(config(tmp_path, "+logger.wandb.mode=later"))
    assert wandb.run is None


def test_comparisons_tuning_and_failures_are_logged(run: Run) -> None:
    ratio = {"ratio": 1.2, "low": 1.1, "high": float("nan")}
    entry = {
        "reference": "beam_sample M=4",
        "quality": -0.5,
        "speed": 300.0,
        "over": {"hand-set": ratio, "bandit": ratio},
    }
    oracle = {"oracle": 400.0, "gap_closed": 0.5}
    point = {"name": "fixed M=8", "log_prob": -0.4, "kept": True, "speeds": {"modelled": 200.0, "also": 100.0}}
    results = {
        "rows": [],
        "failed": {"fixed M=8": "The device ran out of memory."},
        "tuned": {"split": "val", "prompts": 2, "grid": [point]},
        "comparisons": {"clock": [entry], "modelled": [entry | oracle], "also": []},
    }
    log_evaluation(run, results, {})
    table = run.logged["comparisons"]
    lines = [dict(zip(table.columns, line, strict=True)) for line in table.data]
    assert [(line["by"], line["family"]) for line in lines] == [
        (by, family) for by in ("clock", "modelled") for family in ("hand-set", "bandit")
    ]
    assert lines[0]["reference"] == "beam_sample M=4" and lines[0]["speed"] == 300.0
    assert (lines[0]["ratio"], lines[0]["low"], lines[0]["high"]) == (1.2, 1.1, None)
    assert (lines[0]["oracle"], lines[2]["oracle"], lines[2]["gap_closed"]) == (None, 400.0, 0.5)
    tuning = run.logged["tuning"]
    assert tuning.columns[-2:] == ["modelled_tokens_per_second", "also_tokens_per_second"]
    assert tuning.data == [["fixed M=8", -0.4, True, 200.0, 100.0]]
    assert run.summary == {"fixed M=8/failed": "The device ran out of memory."}


def test_an_evaluation_without_comparisons_logs_none(run: Run) -> None:
    log_evaluation(run, {"rows": [], "failed": {}, "tuned": None, "comparisons": {"clock": []}}, {})
    assert set(run.logged) == {"frontier_table"} and run.summary == {}
