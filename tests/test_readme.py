"""The pages: what they name exists, commands compose, links lead somewhere, Python runs, and prose wraps at 100."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf

from decoding import report
from decoding.generate import read_arguments
from decoding.support.entry import CONF_DIR
from decoding.traces.schema import TRACE_FEATURES

ROOT = Path(__file__).resolve().parent.parent
ENTRIES = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "decoding.collect": "collect",
    "decoding.bench": "bench",
    "decoding.generate": "generate",
    "decoding.latency": "latency",
    "decoding.train_draft": "train_draft",
}
NOW = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
NOW.remove("docs/log.md")  # names what was there at the time
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in [*NOW, "docs/log.md"]}
README = TEXT["README.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WIDTH = 100
FOREIGN = {"enable_gqa"}  # an argument of torch's attention that is not used here


def blocks(language: str, page: str = "README.md") -> list[str]:
    return [text for name, text in BLOCK.findall(TEXT[page]) if name == language]


def commands(page: str) -> list[str]:
    """Command lines of a page's blocks, without comments."""
    lines = "".join(blocks("bash", page)).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def composed_by(word: str) -> list[Any]:
    """(page, command) of commands that Hydra reads; those of extending.md are read with its classes at hand."""
    pages = [page for page in NOW if page != "docs/extending.md"]
    return [pytest.param(c, id=f"{p}: {c[:60]}") for p in pages for c in commands(p) if c.startswith(word)]


@pytest.mark.parametrize("command", composed_by("python"))
def test_commands_compose(command: str) -> None:
    words = [word for word in shlex.split(command)[1:] if word not in ("-m", "...")]
    if words[0] == "decoding.generate":
        _, words[1:] = read_arguments(words[1:])
    if words[0] == "decoding.report":
        assert report.read_arguments(words[1:]).files
    if words[0] not in ENTRIES:
        assert words[0] in (
            "decoding.report",
            "decoding.tiny",
            "studies.draft_kinds",
            "studies.sixteen_bits",
            "tests.decoding.families",
        )
        return
    overrides = []
    for word in words[1:]:
        key, _, value = re.sub(r"<\w+>|\.\.\.", "x", word).partition("=")  # an elided path is any path
        if words[0] == "evaluate.py" and key == "controller":
            key = "controller_path"
        # a sweep's first value stands for all; what is left out has none
        overrides.append(
            key if key.startswith("~") else f"{key}={value if value.startswith(('[', '{')) else value.split(',')[0]}"
        )
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        compose(ENTRIES[words[0]], overrides)


def test_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks("python", "docs/first-steps.md")
    exec(compile(block, "docs/first-steps.md", "exec"), {})
    assert "tokens per iteration" in capsys.readouterr().out


def test_python_in_place_of_generate_runs() -> None:
    (block,) = blocks("python", "docs/transformers.md")
    assert "assert (before == after).all()" in block
    exec(compile(block, "docs/transformers.md", "exec"), {})


# ---------------------------------------------------------------------------------------- what is named


def spans(page: str) -> list[str]:
    """What a page has in code: spans between backticks, lines of commands and of untitled blocks."""
    prose = BLOCK.sub("", TEXT[page])
    lines = [line for language in ("bash", "") for block in blocks(language, page) for line in block.splitlines()]
    return [*re.findall(r"`([^`]+)`", prose), *lines]


def own_files(page: str) -> set[str]:
    """Files that a page tells its reader to write: the first lines of its blocks name them."""
    return set(re.findall(r"^```\w+\n# (\S+\.(?:py|yaml))$", TEXT[page], re.MULTILINE))


def missing_paths(page: str) -> Iterator[str]:
    """Paths in code that begin at the root or are a file of Python, and are not there."""
    rooted = r"(?<![\w/.-])(?:decoding|controller|conf|studies|tests|docs|\.ci)/[\w./*{},-]*"
    for span in spans(page):
        for path in re.findall(rf"{rooted}|(?<![\w/.*{{<-])\w+\.py\b", span):
            path = path.rstrip(".,")
            begins, _, rest = path.partition("{")
            inside, _, ends = rest.partition("}")
            for part in inside.split(","):
                there = ROOT.glob(begins + part + ends) if "/" in path else _files(path)
                if not any(there) and path not in own_files(page):
                    yield path


@cache
def _files(name: str) -> tuple[Path, ...]:
    folders = ("decoding", "controller", "studies", "tests")
    return (*ROOT.glob(name), *(path for folder in folders for path in (ROOT / folder).rglob(name)))


def missing_names(page: str) -> Iterator[str]:
    """Dotted names of this project, in code, that are neither importable nor settings of a command."""
    for span in spans(page):
        for name in re.findall(r"(?<![\w/.@-])(?:decoding|controller|studies|tests)(?:\.\w+)+", span):
            if not name.endswith((".py", ".json", ".yaml")) and not _is_there(name) and name not in _settings():
                yield name


@cache
def _is_there(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[count:]:
            if not hasattr(found, attribute) and attribute not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, attribute, None)
        return True
    return False


@cache
def _settings() -> set[str]:
    """Dotted names of all settings in conf/, an option of a group under the group's name."""
    found: set[str] = set()
    for path in CONF_DIR.rglob("*.yaml"):
        group = "" if path.parent == CONF_DIR else f"{path.parent.relative_to(CONF_DIR).as_posix()}."
        found |= {group + key for key in _keys(OmegaConf.load(path))} | {*_keys(OmegaConf.load(path))}
    return found


def _keys(node: Any) -> Iterator[str]:
    if isinstance(node, ListConfig) or not isinstance(node, DictConfig):
        return
    for key in node:
        yield str(key)
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            yield from (f"{key}.{below}" for below in _keys(node[key]))


def missing_options(page: str) -> Iterator[str]:
    """Choices of a config group, in code, that are no file of the group and no class by its dotted name."""
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()} - {"controller", "hydra", "paths"}
    for span in spans(page):
        for group, _, option in re.findall(r"(?<![\w.])(\w+)(@\w+)?=([\w.]*)(?![\w.(])", span):
            known = option in ("", "...") or re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", option)
            file = f"{group}/{option}.yaml"
            if group in groups and not (known or (CONF_DIR / file).is_file() or f"conf/{file}" in own_files(page)):
                yield f"{group}={option}"


def missing_commands(page: str) -> Iterator[str]:
    """Modules after `python -m` and targets of make that are not there."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for span in spans(page):
        for module in re.findall(r"python -m ([\w.]+)", span):
            if module not in ("build", "pytest") and importlib.util.find_spec(module) is None:
                yield f"python -m {module}"
        yield from (f"make {name}" for name in re.findall(r"^make ([a-z]+)", span) if name not in targets)


def missing_words(page: str) -> Iterator[str]:
    """Names in code, of two words or with a capital inside, that no file of this project has."""
    taught = set(re.findall(r"\w+", "".join(text for language, text in BLOCK.findall(TEXT[page]) if language)))
    for span in re.findall(r"`([^`]+)`", BLOCK.sub("", TEXT[page])):
        for word in re.findall(r"(?<![\w/.-])[A-Za-z]\w*(?:_[a-z]|[a-z][A-Z])\w*", span):
            words, endings = _words()
            made = any(word.endswith(ending) and word.removesuffix(ending) in words for ending in endings)
            if word not in words | taught | FOREIGN and not made:
                yield word


@cache
def _words() -> tuple[set[str], set[str]]:
    """Words of the project's files, and endings of names that are made, as in f"{phase}_seconds"."""
    folders = ("decoding", "controller", "conf", "studies", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    files = [path for path in files if path.name not in ("test_readme.py", "test_extending.py")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*files, ROOT / "train.py", ROOT / "evaluate.py"])
    return set(re.findall(r"\w+", text + (ROOT / "pyproject.toml").read_text())), set(re.findall(r"\}(_\w+)", text))


CHECKS = (missing_paths, missing_names, missing_options, missing_commands, missing_words)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("page", NOW)
def test_what_is_named_exists(page: str, check: Any) -> None:
    assert sorted(set(check(page))) == []


@pytest.mark.parametrize(
    ("check", "text", "found"),
    [
        (missing_paths, "`decoding/kernels.py`, `decoding/dice/{sampling,dices}.py`, `rules.py`, `conf/x/*.yaml`", 4),
        (missing_names, "`decoding.widths.WidthPolicy` `decoding.WidthPolicies` `decoding.target_widht=4`", 3),
        (missing_options, "`experiment=frontier_2`, `policy=best`", 2),
        (missing_commands, "```bash\npython -m controller.room\nmake tests\n```", 2),
        (missing_words, "`LayerKernel` and `boldest_width`", 2),
    ],
)
def test_what_is_not_there_is_found(check: Any, text: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEXT, "page", text + "\n`decoding/dice/`, `decoding.WidthPolicy`, `policy=fixed`, `make test`")
    assert len(list(check("page"))) == found


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page: str) -> None:
    """To files and to headings of pages."""
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", BLOCK.sub("", TEXT[page])):
        path, _, heading = link.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {link}"
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if heading else []
        slugs = [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]
        assert not heading or heading in slugs, f"{page} links to {link}"


def test_the_map_has_every_room() -> None:
    block = next(text for _, text in BLOCK.findall(TEXT["CONTRIBUTING.md"]) if text.startswith("train.py evaluate.py"))
    named = set(re.findall(r"^ *(\w+)/ ", block, re.MULTILINE))
    rooms = {path.parent.name for path in (ROOT / "decoding").glob("*/__init__.py")}
    assert named == {"conf", "decoding", "controller", "studies", "tests", "docs", *rooms}


def test_the_table_of_trace_columns_is_the_schema() -> None:
    rows = TEXT["docs/formats.md"].split("| column |")[1].split("|\n", 1)[1].split("\n\n")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]*)\|", rows, re.MULTILINE)))
    assert named == list(TRACE_FEATURES)


# ----------------------------------------------------------------------------------------- how it is set


def long_lines(text: str) -> list[str]:
    """Lines of prose beyond WIDTH, formulas apart; a link's address does not count, nor does a line of one word."""
    lines = BLOCK.sub("", text).splitlines()
    prose = [re.sub(r"\]\([^)]*\)", "]", line) for line in lines if not line.startswith(("|", "<!--", "    "))]
    return [line for line in prose if len(line) > WIDTH and " " in line.strip("-* ")]


@pytest.mark.parametrize("page", TEXT)
def test_prose_wraps(page: str) -> None:
    assert long_lines(TEXT[page]) == []
    assert long_lines(f"{'so ' * 40}\n| {'so ' * 40}|\n```\n{'so ' * 40}\n```\n") == ["so " * 40]


def test_tables_of_the_readme_are_short() -> None:
    tables = re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE)
    assert tables and all(table.count("\n") <= 2 + 7 for table in tables)
