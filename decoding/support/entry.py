"""The frame that the command lines share: Hydra, and one sentence for a user's mistake.

    @entry_point(config_name="train")
    def main(cfg: DictConfig) -> float | None: ...

HYDRA_FULL_ERROR=1 shows tracebacks.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from decoding.errors import UserError, one_line
from decoding.support.files import write_whole
from decoding.support.in_use import LOCK, fresh_folder, in_use
from decoding.support.names import is_dotted
from decoding.support.plain import terminated_as_interrupted
from decoding.support.secret import hidden_in_logs, hide, hide_in_file, without_secrets
from decoding.support.settings import check_settings, unknown_setting

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"
_FULL_ERROR = "HYDRA_FULL_ERROR"
NOTES = ".hydra"  # the folder of a job's settings
_DISK = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
_BUGS = (LookupError, AttributeError, NameError, AssertionError, ArithmeticError)  # inside a callable that we built


def entry_point(
    config_name: str, renames: Mapping[str, str] | None = None, open_nodes: Sequence[str] = ()
) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """Make a task function a command line; called from Python with a config, it runs on that and
    returns its value.

    A user's mistake is printed as `error: ...` on stderr with exit code 2; Ctrl-C and SIGTERM give
    exit code 130. What the function returns reaches Hydra's sweepers.

    Args:
        config_name: primary config in conf/.
        renames: command line keys that are config groups in conf/ but plain settings of this
            command; Hydra would take `controller=outputs/x` for a choice of the group controller/.
        open_nodes: nodes that take settings of any name; the command checks them.
    """

    tracebacks = os.environ.get(_FULL_ERROR) == "1"

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        at_work = False

        @functools.wraps(task)
        def job(cfg: DictConfig) -> Any:
            nonlocal at_work
            at_work = True
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lightning|torch)\.")  # not ours to mend
            with _one_sentence(config_name, tracebacks):  # inside the job: Hydra reports failed jobs itself
                _hide_keys()
                check_settings(cfg, _compose(config_name, _chosen_groups()), open_nodes)
                hydra.utils.instantiate(cfg.get("decoding"))  # widths that cannot work, before a pair is loaded
                with in_use(Path(cfg.output_dir)) if "output_dir" in cfg else nullcontext():
                    _note_settings(cfg)
                    value = task(cfg)
            at_work = False
            return value

        OmegaConf.register_new_resolver("fresh_folder", fresh_folder, replace=True)
        launch = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)

        @functools.wraps(task)
        def main(cfg: DictConfig | None = None) -> Any:
            nonlocal at_work
            if cfg is not None:
                return task(cfg)
            at_work = False
            with (
                _one_sentence(config_name, tracebacks, lambda: not at_work),  # Hydra makes the folders of runs
                terminated_as_interrupted(),
                _hydra_raises(),
                hidden_in_logs(),
            ):
                arguments = [_renamed(argument, renames or {}) for argument in sys.argv[1:]]
                sys.argv[1:] = opened(arguments, _groups(config_name), open_nodes)
                return launch()

        return main

    return decorate


def build_all(nodes: DictConfig | None) -> list[Any]:
    """Instantiate the named nodes of a group such as callbacks or logger, in order."""
    return [hydra.utils.instantiate(node) for node in (nodes or {}).values() if node is not None]


# ------------------------------------------------------------------------------------------- errors


@contextmanager
def _one_sentence(config_name: str, tracebacks: bool, any_folder: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2; bugs keep their traceback.

    Args:
        any_folder: whether every error of the system is one of a folder that the user has named; a
            file that is missing may be a bug elsewhere.
    """
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if tracebacks or (isinstance(error, InstantiationException) and isinstance(error.__cause__, _BUGS)):
            raise
        _discard_empty_output()
        print(f"error: {hide(one_line(_sentence(error, config_name)))}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        number = _number(error)
        if tracebacks or not (number in _DISK or (number and any_folder())):
            raise
        where = f"{error.filename}" if error.filename else "A file"
        reason = one_line(f"{where} cannot be written or read ({os.strerror(number)}).")
        print(f"error: {reason} Make room, or give another directory; the same command goes on.", file=sys.stderr)
        raise SystemExit(2) from None


def _number(error: OSError) -> int:
    """The number of an error of the system; pyarrow says it in words alone."""
    said = re.search(r"\[errno (\d+)\]", str(error), re.IGNORECASE)
    return error.errno or (int(said[1]) if said else 0)


@contextmanager
def _hydra_raises() -> Iterator[None]:
    """Make Hydra raise what it would print, for `_one_sentence` to word; its own switch does that."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        del os.environ[_FULL_ERROR]
        if before is not None:
            os.environ[_FULL_ERROR] = before


def _sentence(error: BaseException, config_name: str) -> str:
    """The sentence that tells the user of a mistake: what was given, what is allowed."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return str(cause)
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.rpartition("/")
        if group and error.options is not None:
            return f"{group}={option} is not known; choose one of {', '.join(error.options)}."
    if isinstance(error, OverrideParseException):
        name, equals, value = str(error.override).partition("=")
        if equals and name and value.isprintable() and not value.startswith(("'", '"', "[", "{")):
            quoted = f"{name}={_in_quotes(value)}"
            return (
                f"The argument {error.override!r} cannot be read ({lines[0]}); a value with signs such as = or a comma "
                f"stands in quotes, those of the shell around them: {shlex.quote(quoted)}."
            )
        return f"The argument {error.override!r} cannot be read ({lines[0]}); write settings as name=value."
    if isinstance(error, InstantiationException):
        return f"{' '.join(lines)} ({_FULL_ERROR}=1 shows where.)"
    refused = re.match(r"Could not (?:override|append to config) '([^']+)'", lines[0])
    unknown = _unknown_override(refused[1], config_name) if refused else None
    if unknown is not None:
        return unknown
    below = f" {str(error.__cause__).splitlines()[0]}" if error.__cause__ else ""
    return f"{lines[0]}{below}"


def _in_quotes(value: str) -> str:
    """A value as Hydra's grammar takes any text."""
    return '"' + value.replace('"', r"\"") + '"'


def _unknown_override(key: str, config_name: str) -> str | None:
    """The sentence for a key that the config does not have; None if the rest is wrong, too."""
    plain = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    groups = dict(argument.split("=", 1) for argument in plain if "=" in argument)
    chosen = [f"{g}={o}" for g, o in groups.items() if g != key and (CONF_DIR / g / f"{o}.yaml").is_file()]
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        defaults = _compose(config_name, chosen)
    return None if defaults is None else unknown_setting(key, defaults, config_name, _groups(config_name))


def _groups(config_name: str) -> set[str]:
    """Groups in the defaults list of a primary config."""
    primary = cast(DictConfig, OmegaConf.load(CONF_DIR / f"{config_name}.yaml"))
    return {str(key) for entry in primary.get("defaults", []) if isinstance(entry, DictConfig) for key in entry}


def _hide_keys() -> None:
    """Take keys out of the settings that Hydra has written into the folder of a sweep."""
    about = HydraConfig.get()
    if about.mode == RunMode.MULTIRUN:  # else its folder would be made by being named
        path = Path(about.sweep.dir, "multirun.yaml")
        if path.is_file():
            hide_in_file(path)


def _note_settings(cfg: DictConfig) -> None:
    """Write the settings of a job into the folder of its own, without keys, under Hydra's names.

    Hydra itself would do so before the folder is known to be free (conf/hydra/default.yaml).
    """
    about = cast(DictConfig, HydraConfig.instance().cfg)
    folder = Path(about.hydra.runtime.output_dir)
    if folder == Path.cwd():
        return
    for name, node in (("config", cfg), ("hydra", about), ("overrides", about.hydra.overrides.task)):
        told = OmegaConf.create(without_secrets(OmegaConf.to_container(node)))
        write_whole(folder / NOTES / f"{name}.yaml", OmegaConf.to_yaml(told).encode())


def _discard_empty_output() -> None:
    """Remove a job's output folder if Hydra's own notes are all there is in it."""
    if not HydraConfig.initialized():
        return
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not folder.is_dir() or folder == Path.cwd():
        return
    if all(p.name in (NOTES, LOCK) or (p.suffix == ".log" and p.stat().st_size == 0) for p in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


# -------------------------------------------------------------------------------------------- Hydra


def _chosen_groups() -> list[str]:
    """Choices of groups of the running job, as overrides; none that set values of other groups."""
    choices = HydraConfig.get().runtime.choices
    skip = ("hydra", "experiment", "debug", "sweep")
    return [f"{group}={choice}" for group, choice in choices.items() if choice and not group.startswith(skip)]


def _compose(config_name: str, overrides: list[str]) -> DictConfig | None:
    """Compose with the search path of the running Hydra; None if that fails."""
    try:
        return hydra.compose(config_name, overrides)
    except (HydraException, OmegaConfBaseException):
        return None


def opened(arguments: Sequence[str], groups: Collection[str], open_nodes: Sequence[str]) -> list[str]:
    """Arguments as Hydra takes them: a class in place of a group's choice, and settings of any name
    below open nodes.

    `policy=mine.HalfWidth policy.fraction=0.5` makes a node with that `_target_`, checked like any
    other.
    """
    split = [argument.partition("=") for argument in arguments]
    of_class = {key for key, _, value in split if key in groups and is_dotted(value)}
    opened = []
    for argument, (key, equals, value) in zip(arguments, split, strict=True):
        if equals and key in of_class:
            opened += [f"~{key}", f"++{key}._target_={value}"]
        elif equals and key.partition(".")[0] in {*of_class, *open_nodes} and "." in key:
            opened.append(f"++{argument}")
        else:
            opened.append(argument)
    return opened


def _renamed(argument: str, renames: Mapping[str, str]) -> str:
    """'controller=x' -> 'controller_path=x' for {"controller": "controller_path"}; a group is not
    given null.
    """
    key, equals, value = argument.partition("=")
    key = renames.get(key, key)
    if value == "null" and (CONF_DIR / key).is_dir():
        raise UserError(
            f"{argument} gives a group no choice, which Hydra cannot read; choose one of its names, or leave the group "
            "out with ~ before its name."
        )
    return f"{key}={value}" if equals else argument
