"""Settings of a composed config against what takes them: the signature of each `_target_`, or the
default's kind.

The schema of a config group is the signature of its `_target_`: a setting that the callable does
not take, or whose type does not fit its annotation, is refused with what is allowed. Settings of no
callable keep the kind of their default.
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from decoding.errors import UserError
from decoding.support.checks import number, whole
from decoding.support.names import locate

_NODE_KEYS = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
_MAY_BE_NULL = ("prompts.limit", "prompts.warmup", "prompts.tokens", "reference_width")  # all, none, as they are, none
_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def check_settings(cfg: DictConfig, defaults: DictConfig | None = None, open_nodes: Sequence[str] = ()) -> None:
    """Refuse settings that are missing, unknown or of the wrong type.

    Args:
        cfg: the composed config.
        defaults: the same groups without the user's values; settings of no callable are compared
            with it.
        open_nodes: nodes whose settings have any name.

    Raises:
        UserError: the first such setting, with what is allowed.
    """
    for path in sorted(OmegaConf.missing_keys(cfg)):
        raise UserError(f"{path} is not set: give it as {path}=...")
    plain_defaults = None if defaults is None else OmegaConf.to_container(defaults, resolve=False)
    plain = OmegaConf.to_container(cfg, resolve=True)
    for name in open_nodes:
        for node in (plain, plain_defaults):
            if isinstance(node, dict):
                node.pop(name, None)
    _check_node("", plain, plain_defaults)


def check_counts(cfg: DictConfig, least: Mapping[str, int]) -> None:
    """Refuse counts that cannot be.

    Args:
        least: smallest value by the setting's name.

    Raises:
        UserError: the first that is no whole number, or too small.
    """
    for name, smallest in least.items():
        value = OmegaConf.select(cfg, name)
        if value is not None or name not in _MAY_BE_NULL:
            whole(name, value, smallest)


def check_seconds(value: Any, name: str = "max_seconds") -> None:
    """Refuse a limit that is neither a number above 0 nor null (UserError)."""
    if value is not None:
        number(name, value, above=0, hint="or null for no limit")


def unknown_setting(key: str, defaults: DictConfig, config_name: str, groups: Iterable[str]) -> str:
    """The sentence for a key of the command line, such as policy.seed, that a config does not have.

    Args:
        defaults: the config without that key.
        config_name: how the sentence calls it.
        groups: names that may stand in the key's place at the top.
    """
    node, owner = OmegaConf.to_container(defaults, resolve=False), ""
    for part in key.split("."):
        path = f"{owner}.{part}".lstrip(".")
        if not isinstance(node, dict):
            return f"{key} is not a setting: {owner or config_name} is a single value."
        if part in node:
            node, owner = node[part], path
            continue
        if "_target_" not in node:
            return _unknown(path, owner or f"{config_name}.yaml", [*node, *(() if owner else groups)])
        takes, _ = _parameters(owner, node["_target_"])
        if part in takes:
            return f"{path} is a parameter of {node['_target_']} that conf/ leaves alone; to set it, write +{path}=..."
        return _unknown(path, owner, takes)
    return f"{key} cannot be set here: it is what other choices make it."


def _check_node(path: str, node: Any, default: Any) -> None:
    """Walk a plain config; `default` is the same node as conf/ has it, None where there is nothing
    to compare.
    """
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
        check_type(f"{path}.{key}", value, takes.get(key, Any))


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
        check_type(full, value, type(usual), f" (default {usual!r})")


def _parameters(path: str, name: str) -> tuple[dict[str, Any], bool]:
    """Parameters of a `_target_` with annotations, and whether it takes further ones (**options)."""
    try:
        called = locate(name)
        signature = inspect.signature(called)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"{path}._target_ is {name!r}, which cannot be used: {error}.") from error
    try:
        hints = get_type_hints(called.__init__ if inspect.isclass(called) else called)
    except (NameError, TypeError, AttributeError):  # annotations that only a type checker can see
        hints = {}
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature.parameters.values()
    takes = {p.name: hints.get(p.name, Any) for p in parameters if p.kind not in variable and p.name[0] != "_"}
    return takes, any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def check_type(path: str, value: Any, hint: Any, more: str = "") -> None:
    """Refuse a YAML value that does not fit an annotation (UserError); `more` is said behind what
    is allowed.
    """
    if not _fits(value, hint):
        raise UserError(f"{path} is {value!r}; give {_words(hint)}{more}.")


def _fits(value: Any, hint: Any) -> bool:
    """True if a YAML value may be given for an annotation; an annotation that is not understood
    lets all through.
    """
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
