"""train.py on made-up traces: what it writes, returns and prints, resuming, tracking, checkpoints that are refused."""

from __future__ import annotations

import csv
import functools
import json
import logging
import re
import shlex
import signal
import struct
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning import Callback, Trainer
from omegaconf import DictConfig

import train
from controller import LearnedWidth
from controller.checkpoint import load_controller
from controller.features import describe_features
from decoding import DSBDDecoder, UserError, beam_sample
from decoding.measure.plots import calibration_curves
from decoding.support.entry import CONF_DIR
from tests.controller.synthetic import CONFIG, FEATURES, prompts, streams, write_traces
from tests.small_pair import small_pair


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up traces, which no test changes."""
    return write_traces(tmp_path_factory.mktemp("traces"), 8)


@pytest.fixture(autouse=True)
def traces(written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(train, "ensure_traces", lambda cfg: written)
    return written


def config(directory: Path, *overrides: str) -> DictConfig:
    quick = ["trainer.max_epochs=2", "callbacks.progress_bar=null", "logger=none", "+trainer.enable_progress_bar=false"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", [f"paths.output_dir={directory}", *quick, *overrides])


def test_trains_calibrates_saves_and_returns_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loss = train.main(config(tmp_path, "logger=csv"))
    assert 0 < loss < 2
    assert f"controller saved in {tmp_path / 'controller'}" in capsys.readouterr().out
    net, about = load_controller(tmp_path / "controller")
    assert about["pair"] == small_pair().describe() and about["decoding"]["draft_width"] == CONFIG.draft_width
    assert {"argv", "git_sha", "versions", "traces", "training", "metrics", "reliability", "calibration"} <= set(about)
    assert about["metrics"]["val/loss"] <= loss + 1e-6  # calibrated on the same rows
    assert about["features"] == describe_features(FEATURES, {})
    text = (tmp_path / "controller" / "config.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    for name, value in about["calibration"].items():
        assert value == pytest.approx(float(net.get_buffer(name)))
    learned = LearnedWidth.load(tmp_path / "controller", pair=small_pair())
    results = DSBDDecoder(small_pair(), CONFIG, learned).generate(prompts(3), streams(3))
    alone = beam_sample(small_pair().target, prompts(3), CONFIG, streams(3))
    assert [result.sequences for result in results] == [result.sequences for result in alone]
    metrics = (tmp_path / "csv" / "metrics.csv").read_text()
    for name in ("train/loss", "val/candidate_ece", "val/candidate_explained", "calibrated/val/after_nll"):
        assert name in metrics
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_equal_seeds_give_equal_controllers(tmp_path: Path) -> None:
    losses = [train.main(config(tmp_path / name, f"seed={seed}")) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert losses[0] == losses[1] != losses[2]
    first, second = (load_controller(tmp_path / name / "controller")[0].state_dict() for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_fast_dev_run(tmp_path: Path) -> None:
    train.main(config(tmp_path, "trainer.max_epochs=1", "+trainer.fast_dev_run=true"))
    assert load_controller(tmp_path / "controller")


def test_resumes(tmp_path: Path) -> None:
    train.main(config(tmp_path / "a", "trainer.max_epochs=1"))
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    train.main(config(tmp_path / "b", f"ckpt_path={last}"))
    assert torch.load(tmp_path / "b" / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 1
    with pytest.raises(UserError, match="nothing is left to do"):
        train.main(config(tmp_path / "c", f"ckpt_path={last}", "trainer.max_epochs=1"))
    with pytest.raises(UserError, match=r"holds another network: net\."):
        train.main(config(tmp_path / "d", f"ckpt_path={last}", "controller.hidden=16"))
    assert not (tmp_path / "c").exists() and not (tmp_path / "d").exists()


def state_of(checkpoint: dict[str, Any], callback: str) -> dict[str, Any]:
    found = [(key, state) for key, state in checkpoint["callbacks"].items() if key.startswith(callback)]
    (state,) = [state for key, state in found if "'monitor': None" not in key]
    return dict(state)


def test_resuming_keeps_the_best_epoch_and_takes_the_new_patience(tmp_path: Path) -> None:
    train.main(config(tmp_path / "a", "trainer.max_epochs=1"))
    path = tmp_path / "a" / "checkpoints" / "last.ckpt"
    last = torch.load(path, weights_only=True)
    best = state_of(last, "ModelCheckpoint")["best_model_path"]
    unbeaten = torch.tensor(-1.0)
    for key, state in last["callbacks"].items():
        if key.startswith("ModelCheckpoint") and "'monitor': None" not in key:
            state |= {"best_k_models": {best: unbeaten}, "best_model_score": unbeaten, "kth_value": unbeaten}
    torch.save(last, path)
    resume = (f"ckpt_path={path}", "callbacks.early_stopping.patience=30")
    train.main(config(tmp_path / "b", *resume))
    path = tmp_path / "b" / "checkpoints" / "last.ckpt"
    resumed = torch.load(path, weights_only=True)
    assert state_of(resumed, "EarlyStopping")["patience"] == 30
    assert state_of(resumed, "ModelCheckpoint")["best_model_path"] == best
    assert not (tmp_path / "b" / "checkpoints" / "best.ckpt").exists()
    first, second = (load_controller(tmp_path / name / "controller")[0].state_dict() for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(UserError, match="was trained for 2 epochs and"):
        train.main(config(tmp_path / "c", f"ckpt_path={path}"))
    Path(best).unlink()  # a best epoch that nobody has is none
    train.main(config(tmp_path / "c", f"ckpt_path={path}", "trainer.max_epochs=3"))
    assert (tmp_path / "c" / "checkpoints" / "best.ckpt").is_file()


class Interrupts(Callback):
    """Ctrl-C, or another signal, in the first batch of an epoch, counted from 0."""

    def __init__(self, epoch: int, number: int = signal.SIGINT) -> None:
        self.epoch, self.number = epoch, number

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        if trainer.current_epoch == self.epoch:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("epoch", "sentence"),
    [
        (1, "The best and the last epoch are kept; the same command with ckpt_path={last} goes on from there."),
        (0, "No epoch of this fit is kept; the same command starts it again"),
    ],
)
def test_an_interrupted_fit_says_how_to_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    epoch: int,
    sentence: str,
    number: signal.Signals,
) -> None:
    target = f"{Interrupts.__module__}.Interrupts"
    arguments = ["trainer.max_epochs=2", "callbacks.progress_bar=null", "logger=none"]
    arguments += [
        "+trainer.enable_progress_bar=false",
        f"+callbacks.stop={{_target_: {target}, epoch: {epoch}, number: {int(number)}}}",
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", f"paths.output_dir={tmp_path}", *arguments])
    monkeypatch.chdir(tmp_path)
    before, root = signal.signal(signal.SIGINT, signal.default_int_handler), logging.getLogger()  # nohup ignores it
    handlers, level = root.handlers[:], root.level
    try:
        with pytest.raises(SystemExit) as stop:
            train.main()
    finally:
        root.handlers[:], root.level = handlers, level  # Hydra's do not outlive the test
        after = signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130 and after == signal.default_int_handler  # the next Ctrl-C is heard
    last = tmp_path / "checkpoints" / "last.ckpt"
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith(sentence.format(last=last)) and lines[-1] == "interrupted"
    assert not list(tmp_path.rglob("*controller*"))
    if epoch:
        train.main(config(tmp_path / "again", f"ckpt_path={last}"))
        assert load_controller(tmp_path / "again" / "controller")


def test_a_job_of_a_sweep_that_is_interrupted_goes_on_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its jobs differ, so none may be given the checkpoint of another one."""
    fixed = ["trainer.max_epochs=2", "callbacks.progress_bar=null", "logger=none", "controller.hidden=8"]
    stop = f"+callbacks.stop={{_target_: {Interrupts.__module__}.Interrupts, epoch: 9}},{{_target_: "
    stop += f"{Interrupts.__module__}.Interrupts, epoch: 1}}"
    arguments = ["-m", f"hydra.sweep.dir={tmp_path}", *fixed, "+trainer.enable_progress_bar=false", stop]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    monkeypatch.chdir(tmp_path)
    before, root = signal.signal(signal.SIGINT, signal.default_int_handler), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with pytest.raises(SystemExit):
            train.main()
    finally:
        root.handlers[:], root.level = handlers, level
        signal.signal(signal.SIGINT, before)
    said = capsys.readouterr().err.splitlines()[-2]
    found = re.search(
        "for this job of the sweep, the command without -m and with these settings alone, (.*), goes", said
    )
    assert found, said
    settings = shlex.split(found[1])
    assert settings[-1] == f"ckpt_path={tmp_path}/1/checkpoints/last.ckpt" and Path(settings[-1][10:]).is_file()
    assert set(fixed) < set(settings) and sum("callbacks.stop" in setting for setting in settings) == 1
    train.main(
        config(
            tmp_path / "again",
            *(setting for setting in settings if "enable_progress" not in setting),
            "callbacks.stop.epoch=9",
        )
    )
    assert load_controller(tmp_path / "again" / "controller")


class GetsWorse(Callback):
    """Every epoch after the first is worse than the one before."""

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch:
            for parameter in pl_module.parameters():
                parameter.data += 2


def test_last_is_the_last_epoch_and_its_metrics_go_on(tmp_path: Path) -> None:
    """A changed setting is refused, not passed over; one flipped byte of the checkpoint is noticed."""
    worse = f"+callbacks.worse={{_target_: {GetsWorse.__module__}.GetsWorse}}"
    train.main(config(tmp_path, worse, "logger=csv"))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 1
    assert torch.load(last.with_name("best.ckpt"), weights_only=True)["epoch"] == 0
    for change, words in (
        ("controller.lr=5e-3", "controller.lr=0.01 (now 0.005)"),
        ("seed=4", "seed=0 (now 4)"),
        ("controller.batch_size=32", "controller.batch_size=64 (now 32)"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            train.main(config(tmp_path / "other", f"ckpt_path={last}", "trainer.max_epochs=3", change))
    train.main(config(tmp_path, f"ckpt_path={last}", "trainer.max_epochs=3", "logger=csv"))
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        epochs = [row["epoch"] for row in csv.DictReader(file) if row["val/loss"]]
    assert epochs == ["0", "1", "2"]
    content = last.read_bytes()
    with zipfile.ZipFile(last) as archive:
        weights = [info for info in archive.infolist() if "/data/" in info.filename]
    assert len(weights) > 5
    for info in weights:
        lengths = struct.unpack_from("<HH", content, info.header_offset + 26)  # of its name, of what pads it
        place = info.header_offset + 30 + sum(lengths) + info.file_size // 2
        last.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        torch.load(last, weights_only=True)  # does not notice
        with pytest.raises(UserError, match="cannot be read as a checkpoint"):
            train.read_checkpoint(str(last))


def test_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint at"):
        train.main(config(tmp_path, f"ckpt_path={tmp_path / 'absent.ckpt'}"))
    (tmp_path / "noise.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="cannot be read"):
        train.main(config(tmp_path, f"ckpt_path={tmp_path / 'noise.ckpt'}"))
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not a training checkpoint"):
        train.main(config(tmp_path, f"ckpt_path={tmp_path / 'other.ckpt'}"))


def test_wandb_offline_is_closed_and_says_how_to_upload(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import wandb

    train.main(config(tmp_path, "logger=wandb", "trainer.max_epochs=1"))
    assert wandb.run is None
    said = capsys.readouterr()
    assert "wandb sync" in said.out + said.err
    assert list(tmp_path.rglob("*.wandb"))


def test_checkpoints_are_logged_where_log_model_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On line, which no test is: the run is offline, wandb's logger is asked for what it would upload."""
    import wandb

    logged: list[list[str]] = []
    start = wandb.init

    def log_artifact(artifact: Any, aliases: Sequence[str] = (), **_: Any) -> None:
        if artifact.type == "model":  # tables are artifacts too
            logged.append(list(aliases))

    @functools.wraps(start)
    def init(**options: Any) -> Any:
        run = start(**options | {"mode": "offline"})
        monkeypatch.setattr(run, "log_artifact", log_artifact)
        return run

    monkeypatch.setattr(wandb, "init", init)
    train.main(config(tmp_path, "logger=wandb", "logger.wandb.offline=false", "logger.wandb.log_model=all"))
    assert ["latest", "best"] in logged
    logged.clear()
    train.main(config(tmp_path / "none", "logger=wandb", "logger.wandb.offline=false"))
    assert not logged


def test_a_crash_closes_the_run_and_leaves_no_controller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def crash(*_: Any) -> None:
        assert wandb.run is not None
        raise RuntimeError("power cut")

    monkeypatch.setattr(train, "calibrate", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train.main(config(tmp_path, "logger=wandb", "trainer.max_epochs=1"))
    assert wandb.run is None and not (tmp_path / "controller").exists()


def test_what_is_saved_of_the_curves(tmp_path: Path) -> None:
    train.main(config(tmp_path, "trainer.max_epochs=1"))
    _, about = load_controller(tmp_path / "controller")
    saved = about["reliability"]
    assert saved["split"] == "val" and set(saved["curves"]) == {"candidate", "after", "before"}
    assert saved["predicted"] == saved["curves"]["candidate"]["predicted"]
    assert calibration_curves(about)["candidate selected"]["rows"] == saved["rows"]
    for name, curve in saved["curves"].items():
        assert {"predicted", "observed", "rows", "error"} == set(curve)
        assert about["metrics"][f"val/{name}_ece"] == pytest.approx(curve["error"])


def test_test_rows_are_what_reliability_is_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = write_traces(tmp_path / "traces", 8, tested=7)
    monkeypatch.setattr(train, "ensure_traces", lambda cfg: held_out)
    train.main(config(tmp_path / "run", "trainer.max_epochs=1"))
    _, about = load_controller(tmp_path / "run" / "controller")
    assert about["reliability"]["split"] == "test" and "test/candidate_ece" in about["metrics"]
