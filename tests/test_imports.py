"""The rooms: every module imports, none imports upward, and what is shipped is what is there."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ABOVE = {
    "decoding": {"controller", "studies", "train", "evaluate", "conf"},
    "controller": {"studies", "train", "evaluate", "conf"},
}


def modules(package: str) -> list[str]:
    paths = sorted((ROOT / package).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


@pytest.mark.parametrize(
    "name", [*modules("decoding"), *modules("controller"), *modules("studies"), "train", "evaluate"]
)
def test_imports(name: str) -> None:
    importlib.import_module(name)


@pytest.mark.parametrize("package", sorted(ABOVE))
def test_nothing_imports_upward(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            upward = {name.partition(".")[0] for name in names} & ABOVE[package]
            assert not upward, f"{path.relative_to(ROOT)}:{node.lineno} imports {upward}"


def test_every_package_is_shipped() -> None:
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("decoding", "controller", "conf")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_decoding_alone_stays_light() -> None:
    """Somebody who only decodes does not wait for the training libraries."""
    code = "import sys, decoding; print([m for m in ('lightning', 'wandb', 'datasets', 'hydra') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_constraints_pin_what_the_project_needs() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines)
    assert pins["torch"] == "2.13.0" and pins["lightning"] not in ("2.6.2", "2.6.3")
    extras = PROJECT["project"]["optional-dependencies"]
    for requirement in [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["energy"]]:
        name = re.split(r"[<>=!\[ ]", requirement, maxsplit=1)[0]
        assert name in pins, f"{name} is not pinned in constraints.txt"
