"""Weights & Biases for runs without a Lightning trainer (evaluate.py). Offline needs no account; secrets stay here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from decoding.errors import UserError
from decoding.provenance import provenance, to_plain

_RENAMED = {"save_dir": "dir"}  # WandbLogger's names -> wandb.init's
_PASSED = ("project", "name", "group", "tags", "notes", "entity", "id", "job_type")


def start_run(cfg: DictConfig) -> Any | None:
    """Start a wandb run if the config's logger group has one; None otherwise.

    Args:
        cfg: the whole config; its `logger` group holds settings of Lightning's WandbLogger, as for train.py.

    Raises:
        UserError: wandb cannot be started, for instance on line without an account.
    """
    settings = wandb_settings(cfg)
    if settings is None:
        return None
    import wandb

    options = {key: settings[key] for key in _PASSED if settings.get(key) is not None}
    options |= {new: settings[old] for old, new in _RENAMED.items() if settings.get(old) is not None}
    if "dir" in options:
        Path(options["dir"]).mkdir(parents=True, exist_ok=True)
    # wandb would record the command line and a patch of uncommitted code by itself; the provenance is enough.
    quiet = wandb.Settings(silent=True, disable_git=True, save_code=False, x_disable_meta=True, console="off")
    try:
        return wandb.init(
            mode="offline" if settings.get("offline") else None,
            config={**to_plain(cfg), "provenance": provenance()},
            settings=quiet,
            **options,
        )
    except wandb.Error as error:
        raise UserError(
            f"wandb could not start ({error}). Log in with `wandb login`, or set logger.wandb.offline=true."
        ) from None


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
def tracked(cfg: DictConfig) -> Iterator[Any | None]:
    """The run for the length of a block; a crash closes it too, marked as failed."""
    run = start_run(cfg)
    try:
        yield run
    except BaseException:
        finish(run, failed=True)
        raise
    finish(run)


def log_evaluation(run: Any | None, results: Mapping[str, Any], files: Mapping[str, Path]) -> None:
    """Log an evaluation: each row's numbers, the frontier as a table, histograms and the plots."""
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
    run.log({Path(name).stem: wandb.Image(str(path)) for name, path in files.items() if path.suffix == ".png"})


def wandb_settings(cfg: DictConfig) -> dict[str, Any] | None:
    """The settings of the config's WandbLogger, with secrets hidden; None where there is none."""
    for node in (to_plain(cfg).get("logger") or {}).values():
        if isinstance(node, dict) and str(node.get("_target_", "")).endswith("WandbLogger"):
            return node
    return None
