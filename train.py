"""Train a width controller: traces (collected if absent) -> fit -> calibrate -> save. See
conf/train.yaml.

python train.py
python train.py pair=llama3_8b trainer=gpu logger=wandb controller.hidden=256 seed=1
python train.py -m controller.lr=1e-3,3e-4
python train.py ckpt_path=outputs/train/.../checkpoints/last.ckpt
"""

from __future__ import annotations

import decoding.support.early  # noqa: F401  # before what takes seconds to import

# isort: split
import csv
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter as CSVWriter
from omegaconf import DictConfig

from controller.calibration import calibrate, fit_rules
from controller.checkpoint import save_controller
from controller.data import TraceDataModule
from controller.features import check_columns, describe_features
from controller.metrics import CURVES, Reliability
from controller.module import ControllerModule
from controller.tracking import is_wandb, tracked
from decoding.collect import ensure_traces
from decoding.errors import UserError
from decoding.support.entry import build_all, entry_point
from decoding.support.fits import interruptible, load_whole, read_fit, this_job
from decoding.support.provenance import provenance, to_plain

_AGAIN = "Give a checkpoint that train.py wrote with these settings, or leave ckpt_path out to start afresh."


@entry_point(config_name="train")
def main(cfg: DictConfig) -> float:
    """Train the controller that the config describes; returns the best `val/loss`, for sweeps."""
    seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = read_checkpoint(cfg.ckpt_path)
    features = instantiate(cfg.features)
    check_columns(features)  # before traces are collected with them
    check_fit(cfg, features)
    with tracked(cfg) as wandb_logger:  # before traces are collected for hours; a crash closes its run too
        return fit(cfg, ensure_traces(cfg), checkpoint, wandb_logger)


def fit(
    cfg: DictConfig, traces: Path, checkpoint: dict[str, Any] | None, wandb_logger: WandbLogger | None = None
) -> float:
    """Train on the traces of a directory, calibrate, save to `output_dir`; returns the best
    `val/loss`.
    """
    features = instantiate(cfg.features)
    data = TraceDataModule(traces, cfg.controller.get("batch_size", 64), cfg.max_train_rows, features)
    sizes = {"names": features.names, "candidate_names": features.candidate_names, "target_width": data.target_width}
    module: ControllerModule = instantiate(cfg.controller, **sizes)
    settings = settings_of(cfg, data)
    check_checkpoint(checkpoint, module, cfg, settings)
    before = logged_before(cfg.ckpt_path, checkpoint)
    loggers = build_loggers(cfg, wandb_logger)
    for logger in loggers:
        if isinstance(logger, CSVLogger):
            logger.experiment.metrics += before
    callbacks = [*build_all(cfg.callbacks), GoOn(settings)]
    trainer: Trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers or False)
    started = time.perf_counter()
    with interruptible(lambda: what_is_kept(trainer)):
        trainer.fit(module, data, ckpt_path=cfg.ckpt_path, weights_only=True)
    seconds = time.perf_counter() - started
    load_best(trainer, module)
    loss = module.evaluate(data.rows["val"].columns)["val/loss"]
    calibrate(module.net, data.rows["val"].columns)
    fit_rules(module.net, data.rows["train"].columns)
    metrics = final_metrics(module, data)
    held_out = "test" if len(data.rows["test"]) else "val"
    curves = module.curves(held_out)
    about = describe(cfg, data, features, metrics, seconds) | {"reliability": describe_curves(curves, held_out)}
    saved = save_controller(module.net, Path(cfg.output_dir) / "controller", about)
    log_results(loggers, wandb_logger, data, metrics, curves)
    print_results(saved, metrics)
    return loss


def read_checkpoint(path: str | None) -> dict[str, Any] | None:
    """The checkpoint to resume from, None where none was given.

    Raises:
        UserError: missing, unreadable, or not a training checkpoint.
    """
    return None if path is None else read_fit(path, _AGAIN)


def check_fit(cfg: DictConfig, features: Any) -> None:
    """Build what a fit is made of once before traces are collected for hours: what cannot be is
    refused now.
    """
    sizes = {"names": features.names, "candidate_names": features.candidate_names}
    said = logging.getLogger("lightning.pytorch.utilities.rank_zero")  # of devices; it says so again
    with torch.random.fork_rng(devices=[]):
        instantiate(cfg.controller, **sizes, target_width=cfg.decoding.target_width)
    level = said.level
    said.setLevel(logging.ERROR)
    try:
        instantiate(cfg.trainer, callbacks=build_all(cfg.callbacks), logger=False)
    finally:
        said.setLevel(level)


def settings_of(cfg: DictConfig, data: TraceDataModule) -> dict[str, Any]:
    """Settings that a fit cannot change while it goes on; kept in its checkpoints."""
    plain = to_plain(cfg)
    names = ("controller", "features", "seed", "max_train_rows")
    settings = {name: plain[name] for name in names} | {"traces": {"trace_key": data.manifest.get("trace_key")}}
    return json.loads(json.dumps(settings))


def check_checkpoint(
    checkpoint: dict[str, Any] | None, module: ControllerModule, cfg: DictConfig, settings: dict[str, Any]
) -> None:
    """Refuse, before anything is written, a checkpoint that this fit cannot go on from."""
    if checkpoint is None:
        return
    ours = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    differs = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if differs:
        name = differs[0]
        raise UserError(
            f"{cfg.ckpt_path} holds another network: {name} has shape {theirs.get(name, 'none')} there, "
            f"{ours.get(name, 'none')} here ({len(differs)} such entries). {_AGAIN}"
        )
    changed = changes(checkpoint.get("settings", {}), settings)
    if changed:
        raise UserError(
            f"{cfg.ckpt_path} was trained with {'; '.join(changed)}, which a fit cannot change while it goes on. Give "
            "the same settings, or leave ckpt_path out to start afresh."
        )
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    epochs, limit = progress["processed"], cfg.trainer.get("max_epochs")  # "epoch" differs after the end of a fit
    if limit is not None and 0 <= limit <= epochs:
        raise UserError(
            f"{cfg.ckpt_path} was trained for {epochs} epochs and trainer.max_epochs is {limit}: nothing is left to "
            "do. Raise trainer.max_epochs."
        )


def changes(before: Any, now: Any, name: str = "") -> list[str]:
    """The settings that differ, as 'controller.lr=0.01 (now 0.001)'."""
    if isinstance(before, dict) and isinstance(now, dict):
        prefix = f"{name}." if name else ""
        keys = sorted(before.keys() | now.keys())
        return [change for key in keys for change in changes(before.get(key), now.get(key), f"{prefix}{key}")]
    return [] if before == now else [f"{name}={before} (now {now})"]


class GoOn(Callback):
    """Lets this fit's patience hold on resuming, and the best epoch stay the best though it lies in
    another folder; keeps the settings in every checkpoint.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["settings"] = self.settings

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if state and isinstance(callback, EarlyStopping):
                state["patience"] = callback.patience
            elif state and isinstance(callback, ModelCheckpoint) and state["dirpath"] != callback.dirpath:
                kept = Path(state["best_model_path"]).is_file()  # else the best epoch is one from here on
                state |= {"dirpath": callback.dirpath, "last_model_path": ""} if kept else {}


def what_is_kept(trainer: Trainer) -> str:
    """The sentence on how to go on after an interrupted fit."""
    kept = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    last = next((callback.best_model_path for callback in kept if callback.monitor is None), "")
    if not last or not Path(last).is_file():
        return f"No epoch of this fit is kept; {this_job()} starts it again, with the traces that are there."
    return f"The best and the last epoch are kept; {this_job(f'ckpt_path={last}')} goes on from there."


def logged_before(path: str | None, checkpoint: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of metrics.csv up to a checkpoint, where it lies in the folder of the run that wrote
    both.
    """
    found = Path(path or "").parent.parent / "csv" / CSVWriter.NAME_METRICS_FILE
    if checkpoint is None or not found.is_file():
        return []
    with found.open(newline="") as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    fitted = [row for row in rows if not any(name.startswith("calibrated/") for name in row)]
    return [row for row in fitted if int(row["step"]) < checkpoint["global_step"]]


def build_loggers(cfg: DictConfig, wandb_logger: WandbLogger | None) -> list[Logger]:
    """The config's loggers with the config in them; that of Weights & Biases is there already."""
    nodes = [node for node in cfg.logger.values() if node and not is_wandb(node)]
    loggers: list[Logger] = [instantiate(node) for node in nodes]
    for logger in loggers:
        logger.log_hyperparams({**to_plain(cfg), "provenance": provenance()})
    return [*loggers, wandb_logger] if wandb_logger is not None else loggers


def load_best(trainer: Trainer, module: ControllerModule) -> None:
    """Put the best checkpoint's weights into the module (the last ones where none was kept, as in a
    fast dev run).
    """
    best = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if best and Path(best).is_file():
        module.load_state_dict(load_whole(best)["state_dict"])
    module.cpu().eval()


def final_metrics(module: ControllerModule, data: TraceDataModule) -> dict[str, float]:
    """Metrics of the calibrated network on validation and, where there is one, test rows."""
    metrics: dict[str, float] = {}
    for split in ("val", "test"):
        if len(data.rows[split]):
            metrics |= module.evaluate(data.rows[split].columns, split)
    return metrics


def describe_curves(curves: dict[str, Reliability], split: str) -> dict[str, Any]:
    """JSON-able: the bins of the candidates' chances (predicted, observed, rows), the split, and
    all curves by name.
    """
    described = {name: _bins(bins) | {"error": bins.error} for name, bins in curves.items()}
    return _bins(curves[CURVES[0]]) | {"split": split, "curves": described}


def describe(
    cfg: DictConfig, data: TraceDataModule, features: Any, metrics: dict[str, float], seconds: float
) -> dict[str, Any]:
    """The origin of a controller and how good it is; JSON-able, saved in its config.json."""
    return {
        **provenance(),
        "pair": data.manifest["pair"],
        "decoding": data.manifest["decoding"],
        "features": describe_features(
            features, {key: value for key, value in to_plain(cfg.features).items() if key[0] != "_"}
        ),
        "traces": [
            {name: data.manifest.get(name) for name in ("trace_key", "rows", "prompts", "policy", "task", "seed")}
        ],
        "training": {
            "controller": to_plain(cfg.controller),
            "seed": cfg.seed,
            "rows": len(data.rows["train"]),
            "seconds": round(seconds, 1),
        },
        "metrics": metrics,
    }


def log_results(
    loggers: list[Logger],
    wandb_logger: WandbLogger | None,
    data: TraceDataModule,
    metrics: dict[str, float],
    curves: dict[str, Reliability],
) -> None:
    """Final metrics to every logger; histograms of the traces and the calibration tables to Weights
    & Biases.
    """
    for logger in loggers:
        logger.log_metrics({f"calibrated/{name}": value for name, value in metrics.items()})
        logger.save()
    if wandb_logger is None:
        return
    import wandb

    rows = data.rows["train"].columns
    selected = (rows["places"] > 0).sum(-1)[rows["there"]]
    counts = {"drafts": rows["drafts"][rows["there"]], "selected_candidates": selected}
    histograms = {f"traces/{name}": wandb.Histogram(values.tolist()) for name, values in counts.items()}
    tables = {
        f"calibration/{name}": wandb.Table(columns=list(Reliability._fields), data=np.stack(bins, axis=1).tolist())
        for name, bins in curves.items()
    }
    wandb_logger.experiment.log(histograms | tables)


def print_results(directory: Path, metrics: dict[str, float]) -> None:
    """The validation metrics and where the controller is."""
    for name, value in sorted(metrics.items()):
        print(f"{name:32s} {value:.4f}")
    print(f"controller saved in {directory}")


def _bins(bins: Reliability) -> dict[str, list[float | None]]:
    return {name: _without_nan(values) for name, values in bins._asdict().items()}


def _without_nan(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


if __name__ == "__main__":
    main()
