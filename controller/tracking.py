"""Weights & Biases for train.py and evaluate.py: a run made from the settings of the config's WandbLogger.

Offline needs no account; secrets stay here. Settings that neither WandbLogger nor wandb.init takes are refused.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig

from decoding.errors import UserError
from decoding.provenance import provenance, to_plain

_RENAMED = {"save_dir": "dir", "version": "id"}  # WandbLogger's names -> wandb.init's, before which they go
_OFFLINE_MODES = ("offline", "dryrun")
_CONTINUING = ("resume", "resume_from", "fork_from")
_MADE_HERE = {
    "api_key": "would be written to disk with the config: log in with `wandb login`, or set WANDB_API_KEY",
    "experiment": "is the run that is started here: leave it out",
    "config": "is this project's own, all settings and where they ran: leave it out",
    "settings": "are set here, so that W&B records neither the command line nor the code: use W&B's environment "
    "variables, such as WANDB_BASE_URL",
    "save_code": "is off, since the commit is recorded with the config: leave it out",
    "anonymous": "does nothing in W&B any more: leave it out",
}


class _Logger(NamedTuple):
    """The config's WandbLogger."""

    path: str  # of its node in the config
    settings: dict[str, Any]  # that are given; null is not


def check_logger(cfg: DictConfig, trains: bool = False) -> None:
    """Refuse settings of the config's WandbLogger that cannot have an effect.

    Args:
        cfg: the whole config.
        trains: whether a Lightning trainer logs into the run, and so may log checkpoints.

    Raises:
        UserError: the first such setting.
    """
    logger = _logger_of(cfg)
    if logger is None:
        return
    takes = _init_names() | _logger_defaults().keys()
    for key, value in logger.settings.items():
        path = f"{logger.path}.{key}"
        if key in _MADE_HERE:
            raise UserError(f"{path} {_MADE_HERE[key]}.")
        if key not in takes:
            allowed = ", ".join(sorted(takes - _MADE_HERE.keys()))
            raise UserError(f"{path} is a setting of neither WandbLogger nor wandb.init; choose among {allowed}.")
        if not trains and key in _trainer_names() and value != _logger_defaults()[key]:
            raise UserError(f"{path} is for train.py, whose trainer logs steps and checkpoints; leave it out here.")
    if _is_offline(logger.settings):
        for key in ("log_model", *_CONTINUING):
            if logger.settings.get(key) not in (None, False, "never"):
                why = "uploads checkpoints" if key == "log_model" else "continues a run"
                online = "mode=online" if "mode" in logger.settings else "offline=false"
                raise UserError(
                    f"{logger.path}.{key} is {logger.settings[key]!r}: it {why}, which a run that is kept offline "
                    f"cannot. Set {logger.path}.{online}, or leave it out."
                )


def start_run(cfg: DictConfig, trains: bool = False) -> Any | None:
    """Start a wandb run if the config's logger group has one; None otherwise.

    Args:
        cfg: the whole config; its `logger` group holds settings of Lightning's WandbLogger and of wandb.init.
        trains: as for `check_logger`.

    Raises:
        UserError: a setting that is refused, or wandb cannot be started, for instance on line without an account.
    """
    check_logger(cfg, trains)
    logger = _logger_of(cfg)
    if logger is None:
        return None
    import wandb

    options = _init_options(logger.settings)
    if "dir" in options:
        Path(options["dir"]).mkdir(parents=True, exist_ok=True)
    # wandb would record the command line and a patch of uncommitted code by itself; the provenance is enough.
    quiet = wandb.Settings(silent=True, disable_git=True, save_code=False, x_disable_meta=True, console="off")
    try:
        return wandb.init(config={**to_plain(cfg), "provenance": provenance()}, settings=quiet, **options)
    except wandb.Error as error:
        raise UserError(
            f"wandb could not start ({error}). Log in with `wandb login`, or set {logger.path}.offline=true."
        ) from None
    except ValueError as error:  # of a setting, on several lines
        raise UserError(f"wandb does not take a value in {logger.path} ({' '.join(str(error).split())}).") from None


def trainer_options(cfg: DictConfig) -> dict[str, Any]:
    """What of the config's WandbLogger the run does not hold and Lightning's logger needs, such as log_model."""
    logger = _logger_of(cfg)
    given = {} if logger is None else logger.settings
    return {key: value for key, value in given.items() if key in _trainer_names()}


def finish(run: Any | None, failed: bool = False) -> None:
    """Close the run and, where it is offline, print the command that uploads it."""
    if run is None:
        return
    offline, folder = run.offline, Path(run.settings.sync_dir)
    run.finish(exit_code=1 if failed else 0)
    if offline:
        print_sync_command(folder)


def print_sync_command(folder: Path) -> None:
    """Say how to upload an offline run."""
    print(f"wandb run kept offline; to upload it: wandb sync {folder}", file=sys.stderr)


@contextmanager
def tracked(cfg: DictConfig, trains: bool = False) -> Iterator[Any | None]:
    """The run for the length of a block; a crash closes it too, marked as failed. Arguments as for `start_run`."""
    run = start_run(cfg, trains)
    try:
        yield run
    except BaseException:
        finish(run, failed=True)
        raise
    finish(run)


def log_evaluation(run: Any | None, results: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Log an evaluation: each row's numbers and histograms, the plots, and as tables the frontier, the comparisons with
    hand-set widths and the tuning of those. A row that failed has its sentence as `<row>/failed`."""
    if run is None:
        return
    import wandb

    from controller.report import frontier_rows

    headings, values = frontier_rows(results["rows"])
    run.log({"frontier_table": wandb.Table(columns=[*headings], data=values)})
    for row in results["rows"]:
        for metric, value in row["summary"].items():
            run.summary[f"{row['name']}/{metric}"] = value["value"]
        for name, counts in row["counts"].items():
            data = [[int(value), count] for value, count in counts.items()]
            table = wandb.Table(columns=[name, "layers"], data=data)
            run.log({f"{row['name']}/{name}": wandb.plot.bar(table, name, "layers", title=f"{row['name']}: {name}")})
    for name, why in (results.get("failed") or {}).items():
        run.summary[f"{name}/failed"] = why
    tables = {"comparisons": _comparison_rows(results), "tuning": _tuning_rows(results)}
    run.log({name: wandb.Table(columns=[*head], data=body) for name, (head, body) in tables.items() if body})
    run.log({Path(name).stem: wandb.Image(str(path)) for name, path in files.items() if path.suffix == ".png"})


def _comparison_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and values of `comparisons`: a line for each clock or table, reference and family."""
    own, ratios = ("reference", "quality", "speed"), ("ratio", "low", "high")
    further = ("oracle", "gap_closed")
    values = [
        [
            by,
            *(entry[k] for k in own),
            family,
            *(_known(ratio[k]) for k in ratios),
            *(_known(entry.get(k)) for k in further),
        ]
        for by, entries in (results.get("comparisons") or {}).items()
        for entry in entries
        for family, ratio in entry["over"].items()
    ]
    return ["by", *own, "family", *ratios, *further], values


def _tuning_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and values of `tuned`: a line for each hand-set setting that was tried."""
    grid = (results.get("tuned") or {}).get("grid") or []
    speeds = list(grid[0]["speeds"]) if grid else []
    values = [[p["name"], p["log_prob"], p["kept"], *(p["speeds"][name] for name in speeds)] for p in grid]
    return ["setting", "log_prob", "kept", *(f"{name}_tokens_per_second" for name in speeds)], values


def _known(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _logger_of(cfg: DictConfig) -> _Logger | None:
    """The config's WandbLogger, with secrets hidden; None where there is none."""
    for name, node in (to_plain(cfg).get("logger") or {}).items():
        if isinstance(node, dict) and str(node.get("_target_", "")).endswith("WandbLogger"):
            given = {key: value for key, value in node.items() if value is not None and not key.startswith("_")}
            return _Logger(f"logger.{name}", given)
    return None


def _init_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of wandb.init from a logger's settings; `mode` goes before `offline`."""
    options = {key: value for key, value in settings.items() if key in _init_names()}
    options |= {new: settings[old] for old, new in _RENAMED.items() if old in settings}
    if _is_offline(settings):
        options["mode"] = "offline"
    elif "id" in options and not options.keys() & set(_CONTINUING):
        options["resume"] = "allow"  # as WandbLogger does: what is logged under that id is not lost
    return options


def _is_offline(settings: Mapping[str, Any]) -> bool:
    return settings["mode"] in _OFFLINE_MODES if "mode" in settings else bool(settings.get("offline"))


def _init_names() -> set[str]:
    import wandb

    return set(inspect.signature(wandb.init).parameters)


def _logger_defaults() -> dict[str, Any]:
    """WandbLogger's own arguments and their defaults."""
    from lightning.pytorch.loggers import WandbLogger

    parameters = inspect.signature(WandbLogger).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD}


def _trainer_names() -> set[str]:
    """WandbLogger's arguments that say what a trainer logs; the others say what run it is."""
    return _logger_defaults().keys() - _init_names() - _RENAMED.keys() - {"offline", "experiment"}
