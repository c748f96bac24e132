"""docs/errors.md against the code: every class of errors, every module that makes a sentence, what to do in each."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/errors.md").read_text()
FILES = sorted([*(ROOT / "decoding").rglob("*.py"), *(ROOT / "controller").rglob("*.py"), *ROOT.glob("*.py")])
# Words that tell somebody what to do; a sentence also may say what is allowed, and leave the rest to the reader.
REMEDY = re.compile(
    r"(?i)\b(allow|build|call|change|choos|collect|convert|counted from|deriv|evaluate again|giv|install|keep|leav|"
    r"lower|load|look|make|mend|mov|must|sav|needs?|pass|pip|put|rais|remov|run|set|shorten|tak|train|adapt|"
    r"try|us|wait|write|ask|say|log|allowed are|it has|axes are|it can|may be)(e|es|d|ing|s)?\b|\?$"
)


def classes(files: list[Path]) -> dict[str, str]:
    """Dotted name and base of every class of exceptions."""
    found: dict[str, str] = {}
    for path in files:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts) if path.is_relative_to(ROOT) else path.stem
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                bases = [ast.unparse(base) for base in node.bases]
                if any(re.search(r"(Error|Exception|Failed)$", base) for base in bases):
                    found[f"{module}.{node.name}"] = bases[0]
    return found


def text_of(node: ast.AST) -> str:
    """A sentence's text as far as it stands in the code; what is filled in becomes {}."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) for value in node.values)
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and node.value.id.isupper():
        return "Give "  # a constant sentence
    return "{}"


def sentences(path: Path, names: set[str]) -> Iterator[tuple[int, str]]:
    """Line and text of each error that a file makes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args:
            yield node.lineno, text_of(node.args[0])


NAMES = {name.rpartition(".")[2] for name in classes(FILES)} | {"UserError"}


def test_every_class_is_on_the_page() -> None:
    table = PAGE.split("\n## ")[0]
    listed = {name.rpartition(".")[2] for name in re.findall(r"^\| `([\w.]+)`", table, re.MULTILINE)}
    assert listed == NAMES


def test_every_module_that_makes_a_sentence_is_on_the_page_and_no_other() -> None:
    makes = {str(path.relative_to(ROOT)) for path in FILES if any(sentences(path, NAMES - {"QueryError"}))}
    rows = [line for line in PAGE.split("\n## ", 1)[1].splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`([\w/]+\.py)`", row.split("|")[1])]
    assert len(listed) == len(set(listed)) and set(listed) == makes
    assert all(len(row.split(" | ")) == 3 and row.split(" | ")[2].strip(" |") for row in rows)


def test_every_sentence_says_what_to_do() -> None:
    poor = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in FILES
        for line, text in sentences(path, NAMES - {"QueryError"})
        if not (text.startswith("{}") and len(text) < 8)  # made elsewhere
        and not re.search(r"\{\}[).]*$", text)  # its end is
        and not REMEDY.search(text)
    ]
    assert poor == []


def test_a_poor_sentence_and_a_new_class_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "poor.py"
    path.write_text("class Odd(UserError):\n    pass\n\n\nraise Odd(f'{x} is bad.')\n")
    assert classes([path]) == {"poor.Odd": "UserError"}
    assert [text for _, text in sentences(path, {"Odd"})] == ["{} is bad."]
    assert not REMEDY.search("{} is bad.")
