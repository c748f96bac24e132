"""What reaches Weights & Biases, always offline: settings, refusals in a sentence, an evaluation's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb
from hydra import compose, initialize_config_dir
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

from controller.tracking import log_evaluation, tracked
from decoding import UserError
from decoding.support.entry import CONF_DIR


def config(directory: Path, *overrides: str, command: str = "train") -> DictConfig:
    settings = [f"paths.output_dir={directory}", "logger=wandb", *overrides]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose(command, settings)


class Run:
    """A wandb run that keeps what it is given."""

    offline, id = False, "x1"

    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_offline(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings of WandbLogger and of wandb.init reach the run; the config is recorded, its secrets are not."""
    settings = ["+logger.wandb.id=x1", "+logger.wandb.group=g", "+logger.wandb.tags=[a]", "+api_key=hidden"]
    with tracked(config(tmp_path / "new", *settings, command=command)) as logger:
        assert logger is not None
        run = logger.experiment
        assert run.offline and (run.id, run.group, run.tags, run.project) == ("x1", "g", ("a",), "dsbd")
        assert run.config["seed"] == 0 and run.config["api_key"] == "***" and "git_sha" in run.config["provenance"]
    assert wandb.run is None
    assert f"wandb sync {tmp_path / 'new'}" in capsys.readouterr().err


def test_no_logger_of_wandb_is_none(tmp_path: Path) -> None:
    for group in ("csv", "none"):
        with tracked(config(tmp_path, f"logger={group}")) as logger:
            assert logger is None


def test_disabled(tmp_path: Path) -> None:
    with tracked(config(tmp_path, "+logger.wandb.mode=disabled")) as logger:
        assert logger is not None and not list(tmp_path.rglob("*.wandb"))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("+logger.wandb.prjoect=x", "of logger.wandb .*unexpected keyword argument 'prjoect'"),
        ("+logger.wandb.api_key=hidden", "unexpected keyword argument 'api_key'"),
        ("+logger.wandb.mode=later", "mode"),
        ("logger.wandb.log_model=all", "cannot be uploaded in offline mode"),
    ],
)
def test_what_wandb_refuses_is_a_sentence(tmp_path: Path, given: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as error, tracked(config(tmp_path, given)):
        pytest.fail("it started")
    assert "hidden" not in str(error.value) and "\n" not in str(error.value)
    assert wandb.run is None


def logged(results: dict[str, Any]) -> Run:
    """What an evaluation's results are logged as."""
    run = Run()
    log_evaluation(WandbLogger(experiment=run), results, {})  # type: ignore[arg-type]
    return run


def test_comparisons_tuning_and_failures_are_logged() -> None:
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
    run = logged(results)
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


def test_an_evaluation_without_comparisons_logs_none() -> None:
    run = logged({"rows": [], "failed": {}, "tuned": None, "comparisons": {"clock": []}})
    assert run.logged == run.summary == {}
