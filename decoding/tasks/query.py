"""SQL that a model wrote: read out of its answer as people read it, run where it can change
nothing, and its rows compared.
"""

from __future__ import annotations

import itertools
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = list[tuple[Any, ...]]

SECONDS, MOST_ROWS, MOST_BYTES = 3.0, 10_000, 20_000_000  # of one query
_LONGEST_VALUE = 1_000_000  # bytes: no function makes a longer text
_HEAP = 256_000_000  # bytes that SQLite may take
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, 33}  # 33: SQLITE_RECURSIVE
_FENCE = re.compile(r"```(?:[\w+-]*[ \t]*\n|sql[ \t]+)?(.*?)(```|\Z)", re.DOTALL | re.IGNORECASE)
_INLINE = re.compile(r"`([^`\n]*\bselect\b[^`\n]*)`", re.IGNORECASE)
_WITH = r"\bWITH\s+\w+\s*(?:\([^)]*\))?\s*AS\s*\("
# A query begins with SELECT in capitals, or with select at the start of a line: "select" in the
# middle of one, or "Select" at its start, is more often prose.
_STARTS = (
    re.compile(rf"\bSELECT\b|^[ \t(]*select\b|{_WITH}|^[ \t]*{_WITH.lower()}", re.MULTILINE),
    re.compile(r"\bselect\b", re.IGNORECASE),
)
_QUOTED = r"""'(?:[^']|'')*'|"[^"]*"|"""
_END = re.compile(_QUOTED + r"(;|\n[ \t]*\n|\n--)")
_END_IN_FENCE = re.compile(_QUOTED + r"(;)")


class QueryError(Exception):
    """A query that does not run, or not within its limits."""


# ------------------------------------------------------------------------------------------ reading


def read_query(answer: str) -> tuple[str, bool]:
    """The first query of an answer, and whether something ends it: a semicolon, a fence, an empty
    line or a comment.

    It is looked for in a fenced block first, then between backticks, then in the text. An answer
    without any is returned as it is.
    """
    for text, close in _FENCE.findall(answer):
        if any(start.search(text) for start in _STARTS):
            query, _ = _cut(text, _END_IN_FENCE)
            return query, bool(close) or _ends(text, _END_IN_FENCE)
    inline = _INLINE.search(answer)
    if inline:
        return _cut(inline[1], _END)[0], True
    query, whole = _cut(answer, _END)
    return query.rstrip(".`"), whole


def _cut(text: str, end: re.Pattern[str]) -> tuple[str, bool]:
    """The text from where its query begins to where it ends, and whether something ends it."""
    found = next((match for match in (start.search(text) for start in _STARTS) if match), None)
    text = text[found.start() :] if found else text
    for match in end.finditer(text):
        if match[1]:
            return text[: match.start()].strip(), True
    return text.strip(), False


def _ends(text: str, end: re.Pattern[str]) -> bool:
    return _cut(text, end)[1]


# ------------------------------------------------------------------------------------------ running


def run_query(database: Path, query: str, seconds: float = SECONDS) -> Rows:
    """The rows of one SELECT.

    The file is opened read-only and as immutable, nothing but selecting, reading and functions is
    let through, and time, rows, bytes and SQLite's memory have limits.

    Args:
        seconds: after which the query is stopped.

    Raises:
        QueryError: it does not run, is no SELECT, or takes more than it may.
    """
    until = time.monotonic() + seconds
    try:
        connection = sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    except sqlite3.Error as error:
        raise QueryError(str(error)) from error
    try:
        connection.text_factory = lambda content: content.decode(errors="replace")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute(f"PRAGMA hard_heap_limit = {_HEAP}")  # of the process, and it stays
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_VALUE)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, 1000)
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.set_authorizer(_authorise)
        connection.set_progress_handler(lambda: time.monotonic() > until, 1000)
        rows: Rows = []
        size = 0
        for row in connection.execute(query):
            rows.append(row)
            size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
            if len(rows) > MOST_ROWS or size > MOST_BYTES or time.monotonic() > until:
                raise QueryError(f"more than {MOST_ROWS} rows, {MOST_BYTES} bytes or {seconds} seconds")
        return rows
    except (sqlite3.Error, sqlite3.Warning, MemoryError, ValueError, OverflowError) as error:
        raise QueryError(str(error)) from error
    finally:
        connection.close()


def run_answer(database: Path, query: str) -> Rows:
    """The rows of a query; lines at its end that make it a syntax error are words about it and left
    out.

    Raises:
        QueryError: as for `run_query`, of the whole text.
    """
    lines, first = query.splitlines(), None
    for count in range(len(lines), 0, -1):
        try:
            return run_query(database, "\n".join(lines[:count]))
        except QueryError as error:
            first = first or error
            if "syntax error" not in str(error) and "unrecognized token" not in str(error):
                break
    raise first or QueryError("no query")


def _authorise(action: int, first: str | None, second: str | None, *_: str | None) -> int:
    """Nothing but selecting, reading, functions and recursion; no function that loads code."""
    harmless = action in _ALLOWED and (second or "").lower() != "load_extension"
    return sqlite3.SQLITE_OK if harmless else sqlite3.SQLITE_DENY


# ---------------------------------------------------------------------------------------- comparing


def same_rows(found: Rows, expected: Rows, ordered: bool) -> bool:
    """True if two results hold the same rows, each as often.

    The columns may stand in another order, as long as it is one order for all rows.

    Args:
        ordered: the rows must stand in the same order, too.
    """
    if len(found) != len(expected) or (expected and len(found[0]) != len(expected[0])):
        return False
    if not expected:
        return True
    if ordered:
        return any(_reordered(found, order) == expected for order in _orders(found, expected))
    wanted = Counter(expected)
    return any(Counter(_reordered(found, order)) == wanted for order in _orders(found, expected))


def _orders(found: Rows, expected: Rows) -> Sequence[tuple[int, ...]]:
    """Orders of the columns under which each column holds the expected values; at most a thousand."""
    ours, theirs = ([Counter(column) for column in zip(*rows, strict=True)] for rows in (found, expected))
    fitting = [[i for i, column in enumerate(ours) if column == wanted] for wanted in theirs]
    orders = (order for order in itertools.product(*fitting) if len(set(order)) == len(order))
    return list(itertools.islice(orders, 1000))


def _reordered(rows: Rows, order: Sequence[int]) -> Rows:
    return [tuple(row[i] for i in order) for row in rows]
