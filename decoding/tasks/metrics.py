"""Metrics of a continuation's first completed line: exact match and edit distance."""

from __future__ import annotations


def line_metrics(prediction: str, reference: str | None, finished: bool = False) -> dict[str, float]:
    """Exact match and edit similarity of the first line; empty where there is no reference.

    The line is the first one that is not blank, without trailing blanks. A prediction that stops
    within its first line cannot match exactly, unless it `finished` there (EOS); its edit
    similarity is that of what there is.
    """
    if reference is None:
        return {}
    expected, _ = first_line(reference)
    line, complete = first_line(prediction)
    exact = line == expected and (complete or finished)
    return {"exact_match": float(exact), "edit_similarity": edit_similarity(line, expected)}


def first_line(text: str) -> tuple[str, bool]:
    """The first line that is not blank, right-stripped, and whether a line end follows it."""
    line, end, rest = text.partition("\n")
    while end and not line.strip():
        line, end, rest = rest.partition("\n")
    return line.rstrip(), bool(end)


def edit_similarity(a: str, b: str) -> float:
    """1 - Levenshtein distance / length of the longer text; 1 for two empty texts."""
    longest = max(len(a), len(b))
    return 1.0 - levenshtein(a, b) / longest if longest else 1.0


def levenshtein(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of a character that turn `a` into `b`."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]
