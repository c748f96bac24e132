"""What the files about the project say of one another: versions, licence, and the lowest dependencies."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [
    Requirement(line)
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in group
]


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and line[0] != "#"]
    return dict(line.lower().replace("_", "-").split("==") for line in lines)


def test_the_oldest_environment_has_what_is_required_and_no_more() -> None:
    assert set(pins("constraints-oldest.txt")) == {requirement.name for requirement in REQUIREMENTS}


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_the_oldest_version_is_the_lower_bound(requirement: Requirement) -> None:
    (bound,) = [one.version for one in requirement.specifier if one.operator == ">="]
    oldest = Version(pins("constraints-oldest.txt")[requirement.name])
    if requirement.name == "torch":  # in place of gigabytes, see the file
        assert str(oldest) == pins("constraints.txt")["torch"]
    else:
        assert oldest == Version(bound)
    assert requirement.specifier.contains(oldest)


def test_the_pinned_versions_are_allowed() -> None:
    pinned, extras = pins("constraints.txt"), PROJECT["optional-dependencies"]
    assert pinned["torch"] == "2.13.0" and pinned["lightning"] not in ("2.6.2", "2.6.3")
    needed = [Requirement(line).name for line in [*PROJECT["dependencies"], *extras["dev"], *extras["energy"]]]
    assert [name for name in needed if name not in pinned] == []
    for requirement in REQUIREMENTS:
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement


def test_the_citation_is_of_this_version_and_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_the_licence_is_shipped() -> None:
    for name in PROJECT["license-files"]:
        assert "Apache License" in (ROOT / name).read_text()
