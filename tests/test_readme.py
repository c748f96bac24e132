"""The README's commands, and those of pages with numbers, compose, its make targets exist, and its Python runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from decoding import report
from decoding.generate import read_arguments
from decoding.support.entry import CONF_DIR

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ENTRIES = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "decoding.collect": "collect",
    "decoding.bench": "bench",
    "decoding.generate": "generate",
}
PAGES = [(ROOT / "docs" / name).read_text() for name in ("performance.md", "drafts.md")]


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands() -> list[str]:
    found = [block for page in (README, *PAGES) for block in blocks("bash", page)]
    lines = "\n".join(found).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python") and "decoding.tiny" not in c])
def test_commands_compose(command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if word != "-m"]
    if words[0] == "decoding.generate":
        _, words[1:] = read_arguments(words[1:])
    if words[0] == "decoding.report":
        assert report.read_arguments(words[1:]).files
        return
    overrides = []
    for word in words[1:]:
        key, _, value = word.partition("=")
        if words[0] == "evaluate.py" and key == "controller":
            key = "controller_path"
        # a sweep's first value stands for all; an elided path is any path
        value = value.replace("...", "x") if value.startswith(("[", "{")) else value.split(",")[0].replace("...", "x")
        overrides.append(f"{key}={value}")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        compose(ENTRIES[words[0]], overrides)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    used = {shlex.split(command)[1] for command in commands() if command.startswith("make")}
    assert {"demo", "test"} <= used <= targets


def test_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("python")
    exec(compile(block, "README.md", "exec"), {})
    assert "tokens per iteration" in capsys.readouterr().out


def test_python_in_place_of_generate_runs() -> None:
    page = ROOT / "docs" / "transformers.md"
    (block,) = blocks("python", page.read_text())
    assert "assert (before == after).all()" in block
    exec(compile(block, str(page), "exec"), {})


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http|#)([^)]+)\)", README))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
