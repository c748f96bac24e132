"""Prose in the code: docstrings stand alone and, like comments, wrap at 100 columns."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 100
# A sentence that opens so is a fragment, or one that cannot be read without its neighbour.
FRAGMENTS = ("As", "At", "By", "How", "In", "Of", "The same", "What", "When", "Where", "Whether", "Which", "Who")
UNCHECKED = (
    "controller",
    "decoding/config.py",
    "decoding/custom_generate.py",
    "decoding/dice",
    "decoding/forest/scorer.py",
    "decoding/loop",
    "decoding/policies/base.py",
)


def files() -> list[Path]:
    found = [*(ROOT / "decoding").rglob("*.py"), *(ROOT / "studies").rglob("*.py"), *ROOT.glob("*.py")]
    skipped = [ROOT / name for name in UNCHECKED]
    return sorted(path for path in found if not any(path.is_relative_to(one) for one in skipped))


def documented(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """(node, docstring) of the module and of every class and function; an absent docstring is empty."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            yield node, ast.get_docstring(node, clean=False) or ""


def fragments(path: Path) -> list[str]:
    """Sentences on docstrings that open as a fragment does."""
    return [
        f"{path}:{getattr(node, 'lineno', 1)}: {text.splitlines()[0]}"
        for node, text in documented(path)
        if text.startswith(tuple(f"{word} " for word in FRAGMENTS))
    ]


def undocumented(path: Path) -> list[str]:
    """Sentences on public functions and classes of a module that say nothing of themselves."""
    return [
        f"{path}:{node.lineno}: {node.name} has no docstring"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name[0] != "_" and not ast.get_docstring(node)
    ]


def long_prose(path: Path) -> list[str]:
    """Sentences on lines of docstrings, and of comments that have a line to themselves, that are too long."""
    source = path.read_text()
    lines = source.splitlines()
    prose = set()
    for node, text in documented(path):
        if text:
            (string, *_) = node.body  # type: ignore[attr-defined]
            prose |= set(range(string.lineno, string.end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            prose.add(token.start[0])
    return [
        f"{path}:{number}: {len(lines[number - 1])} columns"
        for number in sorted(prose)
        if len(lines[number - 1].removesuffix('"""')) > COLUMNS
    ]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_prose(path: Path) -> None:
    assert fragments(path) + undocumented(path) + long_prose(path) == []


def test_poor_prose_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "poor.py"
    comment, text = "# " + "why " * 30, "x" * COLUMNS
    path.write_text(f'"""How it is."""\n\n{comment}\ndef f():\n    """Of a node."""\n\n\ndef g():\n    """{text}"""\n')
    assert [line.split(": ", 1)[1] for line in fragments(path)] == ["How it is.", "Of a node."]
    assert [line.split(":")[1] for line in long_prose(path)] == ["3", "9"]
    path.write_text("def public():\n    pass\n\n\ndef _private():\n    pass\n")
    assert [line.split(": ", 1)[1] for line in undocumented(path)] == ["public has no docstring"]
