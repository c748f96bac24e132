"""Provenance of a result: command line, code version, library versions, machine. Written beside
every output.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from decoding.support.names import is_dotted

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "lightning", "hydra-core", "numpy", "safetensors")
_SECRET = re.compile(r"(^|[._+])(token|\w+_token|secret|password|passwd|\w*api_?key|credentials?)$", re.IGNORECASE)


def provenance() -> dict[str, Any]:
    """Everything below in one JSON-able dict: argv, git_sha, versions, python, machine, date
    (UTC, ISO 8601).
    """
    return {
        "argv": [Path(sys.argv[0]).name, *map(hide_secret, sys.argv[1:])],
        "git_sha": git_sha(),
        "versions": library_versions(),
        "python": platform.python_version(),
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def run_provenance(cfg: DictConfig, pair: Any, task: Any, prompts: int) -> dict[str, Any]:
    """`provenance` of a run over prompts of a task: its pair, its task with split and number of
    prompts, its config.
    """
    about = {**task.describe(), "split": cfg.prompts.split, "prompts": prompts}
    about |= {"note": task.note} if getattr(task, "note", "") else {}
    return {**provenance(), "pair": pair.describe(), "task": about, "config": to_plain(cfg)}


def git_sha() -> str | None:
    """Commit of this checkout, with `-dirty` where tracked files differ from it; None for an
    installed copy or without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository: that commit says nothing
        # about this code.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def code_sha256(config: Any = ()) -> str:
    """SHA-256, in hex, of this project's code, and of the modules that a plain config names."""
    modules = [sys.modules[name] for name in sorted(_named_modules(config)) if name in sys.modules]
    files = {Path(file) for module in modules if (file := getattr(module, "__file__", None))}
    files |= {
        ROOT / "evaluate.py",
        *(path for room in ("decoding", "controller") for path in (ROOT / room).rglob("*.py")),
    }
    found = hashlib.sha256()
    for path in sorted(path for path in files if path.is_file()):
        found.update(f"{path.name} ".encode() + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _named_modules(node: Any) -> set[str]:
    """The modules that strings such as 'mine.HalfWidth' name, at any depth."""
    if isinstance(node, str):
        return {node.rpartition(".")[0]} if is_dotted(node) else set()
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return {name for value in values for name in _named_modules(value)}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what comes out; absent ones are left out."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def machine() -> dict[str, Any]:
    """CPU model, usable cores, torch threads, GPU name (None without one), system; neither host nor
    user name.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain dicts and lists, interpolations resolved, values of secret keys hidden."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    return _without_secrets(plain)


def hide_secret(argument: str) -> str:
    """'pair.token=abc' -> 'pair.token=***'; anything else as it is."""
    key, equals, _ = argument.partition("=")
    return f"{key}=***" if equals and _SECRET.search(key) else argument


def _without_secrets(node: Any) -> Any:
    if isinstance(node, dict):
        return {
            key: "***" if isinstance(value, str) and _SECRET.search(str(key)) else _without_secrets(value)
            for key, value in node.items()
        }
    return [_without_secrets(value) for value in node] if isinstance(node, list) else node


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
