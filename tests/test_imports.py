"""The rooms: every module imports, none imports upward, and what is shipped is what is there."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# From the ground up; a module imports from its own room and from lower floors.
FLOORS = (
    ("decoding.errors",),
    ("decoding.support",),
    ("decoding.config", "decoding.tasks"),
    ("decoding.cost_table",),
    *((f"decoding.{room}",) for room in ("engine", "dice", "forest", "policies")),
    ("decoding.results",),
    *((f"decoding.{room}",) for room in ("pairs", "loop")),
    ("decoding.decoder",),
    *((f"decoding.{room}",) for room in ("traces", "machine", "measure")),
    ("decoding",),  # doors: what is not named above
    ("controller",),
    ("train", "evaluate", "studies", "conf"),
)


def modules(package: str) -> list[str]:
    paths = sorted((ROOT / package).rglob("*.py"))
    return [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]


MODULES = {
    name: path
    for package in ("decoding", "controller")
    for name, path in zip(modules(package), sorted((ROOT / package).rglob("*.py")), strict=True)
}


@pytest.mark.parametrize(
    "name", [*modules("decoding"), *modules("controller"), *modules("studies"), "train", "evaluate"]
)
def test_imports(name: str) -> None:
    importlib.import_module(name)


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(module of this project, line) of every import of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in found:
            while name and name not in MODULES and name not in FLOORS[-1]:
                name = name.rpartition(".")[0]
            if name:
                yield name, node.lineno


def place_of(module: str) -> tuple[int, str]:
    """(floor, room) of a module, floors counted from the ground."""
    own = ".".join(module.split(".")[:2])
    return next((i, room) for i, rooms in enumerate(FLOORS) for room in rooms if room in (own, own.partition(".")[0]))


def upward_imports(modules: Mapping[str, Path]) -> list[str]:
    """Sentences on imports from a lower floor of a higher one, or between rooms of one floor."""
    wrong = []
    for module, path in modules.items():
        for name, line in imports_of(path):
            here, there = place_of(module), place_of(name)
            if there[0] > here[0] or (there[0] == here[0] and there != here):
                wrong.append(f"{path}:{line}: {module} imports {name}, which is not below it")
    return wrong


def circle_of(arrows: Mapping[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle; empty where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for name in sorted(arrows.get(module, ())):
            if found := walk(name, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := walk(module, []))), [])


def test_nothing_imports_upward() -> None:
    assert upward_imports(MODULES) == []


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "sampling.py"
    path.write_text("def draw():\n    from decoding.loop.batch import Batch\n    return Batch\n")
    (sentence,) = upward_imports({"decoding.dice.sampling": path})
    assert "sampling.py:2: decoding.dice.sampling imports decoding.loop.batch" in sentence
    path.write_text("from decoding.traces.store import load_traces\n")
    assert upward_imports({"decoding.traces.schema": path}) == [], "a room's own"


def test_no_circle() -> None:
    arrows = {module: {name for name, _ in imports_of(path)} - {module} for module, path in MODULES.items()}
    assert circle_of(arrows) == []
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]


def test_few_modules_stand_in_front_of_the_rooms() -> None:
    assert len(list((ROOT / "decoding").glob("*.py"))) <= 14


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
