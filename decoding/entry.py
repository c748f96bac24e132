"""What the command lines share: Hydra, one sentence for a user's mistake, and checks of the composed config.

    @entry_point(config_name="train")
    def main(cfg: DictConfig) -> float | None: ...

The schema of a config group is the signature of its `_target_`: a setting that the callable does not take, or whose
type does not fit its annotation, is refused with what is allowed. Settings of no callable keep the kind of their
default. HYDRA_FULL_ERROR=1 shows tracebacks.
"""

from __future__ import annotations

import collections.abc
import difflib
import functools
import inspect
import os
import re
import shutil
import sys
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from decoding.errors import UserError
from decoding.names import is_dotted, locate

CONF_DIR = Path(__file__).resolve().parent.parent / "conf"
_FULL_ERROR = "HYDRA_FULL_ERROR"
_BUGS = (LookupError, AttributeError, NameError, AssertionError, ArithmeticError)  # inside a callable that we built
_MAY_BE_NULL = ("prompts.limit", "prompts.warmup", "prompts.tokens", "reference_width")  # all, none, as they are, none
_NODE_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def entry_point(
    config_name: str, renames: Mapping[str, str] | None = None, open_nodes: Sequence[str] = ()
) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """Make a task function a command line; called from Python with a config, it runs on that and returns its value.

    A user's mistake is printed as `error: ...` on stderr with exit code 2; Ctrl-C gives exit code 130. What the
    function returns reaches Hydra's sweepers.

    Args:
        config_name: primary config in conf/.
        renames: command line keys that are config groups in conf/ but plain settings of this command; Hydra would
            take `controller=outputs/x` for a choice of the group controller/.
        open_nodes: nodes that take settings of any name; the command checks them.
    """

    tracebacks = os.environ.get(_FULL_ERROR) == "1"

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @functools.wraps(task)
        def job(cfg: DictConfig) -> Any:
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lightning|torch)\.")  # not ours to mend
            with _one_sentence(config_name, tracebacks):  # inside the job: Hydra reports failed jobs itself
                check_settings(cfg, _compose(config_name, _chosen_groups()), open_nodes)
                hydra.utils.instantiate(cfg.get("decoding"))  # widths that cannot work, before a pair is loaded
                return task(cfg)

        launch = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=config_name)(job)

        @functools.wraps(task)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return task(cfg)
            arguments = [_renamed(argument, renames or {}) for argument in sys.argv[1:]]
            sys.argv[1:] = opened(arguments, _groups(config_name), open_nodes)
            with _one_sentence(config_name, tracebacks), _hydra_raises():
                return launch()

        return main

    return decorate


def build_all(nodes: DictConfig | None) -> list[Any]:
    """Instantiate the named nodes of a group such as callbacks or logger, in order."""
    return [hydra.utils.instantiate(node) for node in (nodes or {}).values() if node is not None]


def check_settings(cfg: DictConfig, defaults: DictConfig | None = None, open_nodes: Sequence[str] = ()) -> None:
    """Refuse settings that are missing, unknown or of the wrong type.

    Args:
        cfg: the composed config.
        defaults: the same groups without the user's values; settings of no callable are compared with it.
        open_nodes: nodes whose settings have any name.

    Raises:
        UserError: the first such setting, with what is allowed.
    """
    for path in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{path} is not set: give it as {path}=...")
    known = None if defaults is None else OmegaConf.to_container(defaults, resolve=False)
    plain = OmegaConf.to_container(cfg, resolve=True)
    for name in open_nodes:
        for node in (plain, known):
            if isinstance(node, dict):
                node.pop(name, None)
    _check_node("", plain, known)


def check_counts(cfg: DictConfig, least: Mapping[str, int]) -> None:
    """Refuse counts that cannot be.

    Args:
        least: smallest value by the setting's name.

    Raises:
        UserError: the first that is no whole number, or too small.
    """
    for name, smallest in least.items():
        value = OmegaConf.select(cfg, name)
        if value is None and name in _MAY_BE_NULL:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise UserError(f"{name} is {value!r}; give a whole number of at least {smallest}.")


# ------------------------------------------------------------------------------------------- settings


def _check_node(path: str, node: Any, default: Any) -> None:
    """Walk a plain config; `default` is the same node as conf/ has it, None where there is nothing to compare."""
    if not isinstance(node, dict):
        return
    if "_target_" in node:
        _check_call(path, node)
    elif isinstance(default, dict) and default:
        _check_kinds(path, node, default)
    for key, value in node.items():
        below = default.get(key) if isinstance(default, dict) else None
        _check_node(f"{path}.{key}".lstrip("."), value, below)


def _check_call(path: str, node: dict[str, Any]) -> None:
    """Names and types of a node's settings against the signature of its `_target_`."""
    name = node["_target_"]
    takes, open_ended = _parameters(path, name)
    for key in node.keys() - _NODE_KEYS:
        if key not in takes and not open_ended:
            raise UserError(_unknown(f"{path}.{key}", name, takes))
    for key, value in node.items():
        hint = takes.get(key, Any)
        if not _fits(value, hint):
            raise UserError(f"{path}.{key} is {value!r}; give {_words(hint)}.")


def _check_kinds(path: str, node: dict[str, Any], default: dict[str, Any]) -> None:
    """Names and kinds of settings that no callable takes."""
    for key, value in node.items():
        full = f"{path}.{key}".lstrip(".")
        if key not in default:
            if not (isinstance(value, dict) and "_target_" in value):  # a further callback or logger is welcome
                raise UserError(_unknown(full, path, default))
            continue
        usual = default[key]
        interpolated = isinstance(usual, str) and "${" in usual
        if value is None or usual is None or interpolated or isinstance(usual, dict):
            continue
        kind = float if isinstance(usual, float) else type(usual)
        if not _fits(value, kind):
            raise UserError(f"{full} is {value!r}; give {_words(kind)} (default {usual!r}).")


def _parameters(path: str, name: str) -> tuple[dict[str, Any], bool]:
    """Parameters of a `_target_` with their annotations, and whether it takes further ones (**options)."""
    try:
        target = locate(name)
        signature = inspect.signature(target)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{path}._target_ is {name!r}, which cannot be used: {error}.") from error
    try:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can see
        hints = {}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature.parameters.values()
    takes = {p.name: hints.get(p.name, Any) for p in parameters if p.kind not in variable and p.name[0] != "_"}
    return takes, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value may be given for an annotation; what is not understood is let through."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint in (None, type(None)):
        return value is None
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    if hint in (bool, str, list, dict):
        return isinstance(value, hint)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return isinstance(value, dict)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Collection):
        inner = get_args(hint)[:1] or (Any,)
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if isinstance(hint, type) and issubclass(hint, Path):
        return isinstance(value, str)
    return True


def _words(hint: Any) -> str:
    """An annotation in words: `int | None` -> 'a whole number or null'."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(option) for option in get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if hint in (None, type(None)):
        return "null"
    origin = get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Collection):
        hint = dict if issubclass(origin, collections.abc.Mapping) else list
    return _KINDS.get(hint) or str(getattr(hint, "__name__", hint))


def _unknown(path: str, owner: str, allowed: Iterable[str]) -> str:
    """The sentence for a setting that does not exist."""
    names = sorted({key for key in map(str, allowed) if key not in _NODE_KEYS})
    key = path.rpartition(".")[2]
    close = difflib.get_close_matches(key, names, n=1)
    guess = f" Did you mean {path.removesuffix(key)}{close[0]}?" if close else ""
    whose = f" of {owner}" if owner else ""
    return f"{path} is not a setting{whose}; choose among {', '.join(names) or 'none'}.{guess}"


# --------------------------------------------------------------------------------------------- errors


@contextmanager
def _one_sentence(config_name: str, tracebacks: bool) -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2; bugs keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if tracebacks or (isinstance(error, InstantiationException) and isinstance(error.__cause__, _BUGS)):
            raise
        _discard_empty_output()
        print(f"error: {_sentence(error, config_name)}", file=sys.stderr)
        raise SystemExit(2) from None
    except ValueError as error:
        if "Config group override" not in str(error):  # of Hydra: a group's choice is a name
            raise
        empty = " ".join(argument for argument in sys.argv[1:] if argument.endswith("=null"))
        print(
            f"error: {empty} gives a group no choice, which Hydra cannot read; choose one of its names, or leave the "
            "group out with ~ before its name.",
            file=sys.stderr,
        )
        raise SystemExit(2) from None


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
    """What to tell the user: what was given, what is allowed."""
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
        return f"The argument {error.override!r} cannot be read ({lines[0]}); write settings as name=value."
    if isinstance(error, InstantiationException):
        return f"{' '.join(lines)} ({_FULL_ERROR}=1 shows where.)"
    refused = re.match(r"Could not (?:override|append to config) '([^']+)'", lines[0])
    if refused:
        return _unknown_override(refused[1], config_name)
    below = f" {str(error.__cause__).splitlines()[0]}" if error.__cause__ else ""
    return f"{lines[0]}{below}"


def _unknown_override(key: str, config_name: str) -> str:
    """The sentence for a command line key that the config does not have."""
    plain = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    groups = dict(argument.split("=", 1) for argument in plain if "=" in argument)
    chosen = [f"{g}={o}" for g, o in groups.items() if (CONF_DIR / g / f"{o}.yaml").is_file()]
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        node: Any = _compose(config_name, [c for c in chosen if c.partition("=")[0] != key])
    path: list[str] = []
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in node:
            break
        path, node = [*path, part], node._get_node(part)
    owner, wrong = ".".join(path), ".".join(key.split(".")[: len(path) + 1])
    if not isinstance(node, DictConfig):
        return f"{key} is not a setting: {owner or config_name} is a single value."
    if "_target_" in node:
        with suppress(UserError):
            takes, _ = _parameters(owner, node["_target_"])
            if key.removeprefix(f"{owner}.") in takes:
                return (
                    f"{key} is a parameter of {node['_target_']} that conf/ leaves alone; to set it, write +{key}=..."
                )
            return _unknown(wrong, owner, [*takes, *node])
    return _unknown(wrong, owner or f"{config_name}.yaml", [*node, *(() if owner else _groups(config_name))])


def _groups(config_name: str) -> set[str]:
    """Groups in the defaults list of a primary config."""
    primary = cast(DictConfig, OmegaConf.load(CONF_DIR / f"{config_name}.yaml"))
    entries = primary.get("defaults", [])
    return {str(key) for entry in entries if isinstance(entry, DictConfig) for key in entry}


def _discard_empty_output() -> None:
    """Remove a job's output folder if Hydra's own notes are all there is in it."""
    if not HydraConfig.initialized():
        return
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not folder.is_dir() or folder == Path.cwd():
        return
    if all(p.name == ".hydra" or (p.suffix == ".log" and p.stat().st_size == 0) for p in folder.iterdir()):
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- Hydra


def _chosen_groups() -> list[str]:
    """The running job's choices of groups, as overrides, without those that set values of other groups."""
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
    """Arguments as Hydra takes them: a class in place of a group's choice, and settings of any name below open nodes.

    `policy=mine.HalfWidth policy.fraction=0.5` makes a node with that `_target_`, checked like any other.
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
    """'controller=x' -> 'controller_path=x' for {"controller": "controller_path"}."""
    key, equals, value = argument.partition("=")
    return f"{renames.get(key, key)}={value}" if equals else argument
