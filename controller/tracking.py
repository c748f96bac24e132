"""Weights & Biases for train.py and evaluate.py: the run of the config's WandbLogger, for the length of a block.

Offline needs no account. Settings are those of Lightning's WandbLogger and of wandb.init, which say what they refuse.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from decoding.errors import UserError, first_line
from decoding.support.provenance import provenance, to_plain

if TYPE_CHECKING:  # evaluate.py needs none of Lightning but this
    from lightning.pytorch.loggers import WandbLogger

PATIENCE = 60.0  # seconds at the end of a run for what is not uploaded yet; it stays on the disk
_SILENCE = ("timed out", "deadline exceeded", "while retrying")  # in what wandb says of a server that does not answer


@contextmanager
def tracked(cfg: DictConfig) -> Iterator[WandbLogger | None]:
    """The config's WandbLogger with its run started, None where it has none; a crash closes the run as failed.

    Args:
        cfg: the whole config, which the run records with its provenance; loggers are in its `logger` group.

    Raises:
        UserError: settings that are refused, or wandb cannot start, for instance on line without an account.
    """
    logger = _start(cfg)
    try:
        yield logger
    except BaseException:
        finish(logger, failed=True)
        raise
    finish(logger)


def _start(cfg: DictConfig) -> WandbLogger | None:
    name = next((name for name, node in (cfg.get("logger") or {}).items() if is_wandb(node)), None)
    if name is None:
        return None
    import wandb
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    # wandb would record the command line and a patch of uncommitted code by itself; the provenance is enough.
    quiet = wandb.Settings(silent=True, disable_git=True, save_code=False, x_disable_meta=True, console="off")
    if "finish_timeout" in type(quiet).model_fields:  # older ones wait as long as it takes
        quiet.finish_timeout = PATIENCE
    build = instantiate(cfg.logger[name], _partial_=True, _convert_="all")
    about = {**to_plain(cfg), "provenance": provenance()}

    def begun(**changes: Any) -> WandbLogger:
        logger: WandbLogger = build(settings=quiet, **changes)
        Path(logger.save_dir or ".").mkdir(parents=True, exist_ok=True)
        logger.log_hyperparams(about)  # starts the run
        return logger

    try:
        return begun()
    except (wandb.Error, MisconfigurationException, TypeError, ValueError) as error:
        if isinstance(error, wandb.errors.CommError) and any(words in str(error).lower() for words in _SILENCE):
            print(f"warning: wandb cannot be reached ({first_line(error)}); the run is kept offline.", file=sys.stderr)
            return begun(offline=True, mode="offline", log_model=False)
        raise UserError(
            f"wandb does not start with the settings of logger.{name} ({' '.join(str(error).split())}). Mend them; "
            f"without an account, set logger.{name}.offline=true."
        ) from error


def is_wandb(node: Any) -> bool:
    """Whether a node of the `logger` group describes a WandbLogger."""
    return bool(node) and str(node.get("_target_")).endswith("WandbLogger")


def finish(logger: WandbLogger | None, failed: bool = False) -> None:
    """Close the run and, where it is offline, or its server was gone for as long as `PATIENCE`, print the command that
    uploads it.
    """
    if logger is None:
        return
    run = logger.experiment
    offline, folder = run.offline, Path(run.settings.sync_dir)
    run.finish(exit_code=1 if failed else 0)
    if offline or getattr(run, "_finish_timed_out", False):
        print(f"wandb run kept offline; to upload it: wandb sync {folder}", file=sys.stderr)


def log_evaluation(logger: WandbLogger | None, results: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Log an evaluation: each row's numbers and histograms, the plots, and as tables the frontier, the comparisons with
    hand-set widths and the tuning of those. A row that failed has its sentence as `<row>/failed`."""
    if logger is None:
        return
    import wandb

    from decoding.measure.pages import frontier_rows

    run = logger.experiment
    for row in results["rows"]:
        run.summary.update({f"{row['name']}/{metric}": value["value"] for metric, value in row["summary"].items()})
        for name, counts in row["counts"].items():
            data = [[int(value), count] for value, count in counts.items()]
            table = wandb.Table(columns=[name, "layers"], data=data)
            run.log({f"{row['name']}/{name}": wandb.plot.bar(table, name, "layers", title=f"{row['name']}: {name}")})
    run.summary.update({f"{name}/failed": why for name, why in (results.get("failed") or {}).items()})
    tables = {
        "frontier_table": frontier_rows(results["rows"]),
        "comparisons": _comparison_rows(results.get("comparisons") or {}),
        "tuning": _tuning_rows((results.get("tuned") or {}).get("grid") or []),
    }
    run.log({name: wandb.Table(columns=[*head], data=body) for name, (head, body) in tables.items() if body})
    run.log({Path(name).stem: wandb.Image(str(path)) for name, path in files.items() if path.suffix == ".png"})


def _comparison_rows(comparisons: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Headings and values: a line for each clock or table, reference and family; what is not known is None."""
    own, ratios = ("reference", "quality", "speed", "oracle", "gap_closed"), ("ratio", "low", "high")
    values = [
        [by, family, *map(_known, [*(entry.get(name) for name in own), *(ratio[name] for name in ratios)])]
        for by, entries in comparisons.items()
        for entry in entries
        for family, ratio in entry["over"].items()
    ]
    return ["by", "family", *own, *ratios], values


def _known(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def _tuning_rows(grid: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Headings and values: a line for each hand-set setting that was tried."""
    speeds = list(grid[0]["speeds"]) if grid else []
    values = [[p["name"], p["log_prob"], p["kept"], *(p["speeds"][name] for name in speeds)] for p in grid]
    return ["setting", "log_prob", "kept", *(f"{name}_tokens_per_second" for name in speeds)], values
