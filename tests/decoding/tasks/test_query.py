"""Queries of models: read as people read them, harmless whatever they say, compared by their rows."""

from __future__ import annotations

import hashlib
import sqlite3
import time
from pathlib import Path

import pytest

from decoding.tasks import query as of_query
from decoding.tasks.query import QueryError, read_query, run_answer, run_query, same_rows
from decoding.tasks.spider import SpiderTask
from tests.decoding.tasks.test_tasks import data_file
from tests.small_pair import small_tokenizer


@pytest.mark.parametrize(
    ("answer", "query", "whole"),
    [
        ("SELECT a FROM t;", "SELECT a FROM t", True),
        ("SELECT a FROM t", "SELECT a FROM t", False),  # may go on
        ("```sql\nSELECT a\n\nFROM t;\n```\nThis selects a.", "SELECT a\n\nFROM t", True),
        ("Here it is: SELECT a FROM t;\nIt selects a.", "SELECT a FROM t", True),
        ("You can use `select a from t` here.", "select a from t", True),
        ("I select the rows:\nselect a from t\n\nDone", "select a from t", True),
        ("SELECT ';' FROM t; SELECT 2", "SELECT ';' FROM t", True),  # not at a quoted semicolon
        ("WITH x AS (SELECT 1) SELECT * FROM x;", "WITH x AS (SELECT 1) SELECT * FROM x", True),
        ("```sql\nSELECT a FROM", "SELECT a FROM", False),  # cut off within its fence
        ("no query at all", "no query at all", False),
    ],
)
def test_a_query_is_read_out_of_an_answer(answer: str, query: str, whole: bool) -> None:
    assert read_query(answer) == (query, whole)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "ponds.sqlite"
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE pond (name TEXT, depth REAL)")
        made.executemany("INSERT INTO pond VALUES (?, ?)", [("Elm", 2.5), ("Ash", 1.0), ("Oak", 4.0)])
    return path


def test_a_select_gives_its_rows(database: Path) -> None:
    assert run_query(database, "SELECT name FROM pond WHERE depth > 2 ORDER BY depth") == [("Elm",), ("Oak",)]
    assert run_answer(database, "SELECT count(*) FROM pond\nThis counts the ponds.") == [(3,)]


@pytest.mark.parametrize(
    "hostile",
    [
        "DROP TABLE pond",
        "DELETE FROM pond",
        "UPDATE pond SET depth = 0",
        "INSERT INTO pond VALUES ('x', 1)",
        "CREATE TABLE other (a)",
        "CREATE TEMP TABLE other (a)",
        "PRAGMA writable_schema = 1",
        "PRAGMA user_version = 7",
        "ATTACH DATABASE '{folder}/new.sqlite' AS new",
        "VACUUM INTO '{folder}/new.sqlite'",
        "SELECT load_extension('/lib/x.so')",
        "SELECT 1; DROP TABLE pond",
        "BEGIN EXCLUSIVE",
        "ALTER TABLE pond ADD COLUMN x",
    ],
)
def test_a_hostile_query_changes_nothing(database: Path, hostile: str) -> None:
    before = hashlib.sha256(database.read_bytes()).hexdigest()
    with pytest.raises(QueryError):
        run_query(database, hostile.format(folder=database.parent))
    assert hashlib.sha256(database.read_bytes()).hexdigest() == before
    assert [path.name for path in database.parent.iterdir()] == [database.name]


def test_what_takes_too_much_is_stopped(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT {} FROM n"
    began = time.monotonic()
    with pytest.raises(QueryError):  # one row that never comes
        run_query(database, endless.format("count(*)"), seconds=0.2)
    assert time.monotonic() - began < 30, "it was stopped at all"
    monkeypatch.setattr(of_query, "MOST_ROWS", 50)
    with pytest.raises(QueryError, match="more than 50 rows"):
        run_query(database, endless.format("i"))
    for greedy in ("SELECT randomblob(100000000)", "SELECT replace(hex(zeroblob(400000)), '0', 'xxxxxxxx')"):
        with pytest.raises(QueryError):
            run_query(database, greedy)


def test_a_database_that_is_no_file_is_an_error_of_the_query(tmp_path: Path) -> None:
    with pytest.raises(QueryError):
        run_query(tmp_path / "none.sqlite", "SELECT 1")


def test_rows_are_compared_as_bags_and_columns_in_one_order() -> None:
    rows = [(1, "a"), (2, "b"), (2, "b")]
    assert same_rows([(2, "b"), (1, "a"), (2, "b")], rows, ordered=False)
    assert not same_rows([(2, "b"), (1, "a"), (2, "b")], rows, ordered=True)
    assert not same_rows([(1, "a"), (2, "b"), (1, "a")], rows, ordered=False)  # as often as it is there
    assert same_rows([("a", 1), ("b", 2), ("b", 2)], rows, ordered=True)
    assert not same_rows([("a", 1), (2, "b"), ("b", 2)], rows, ordered=False)  # one order for all rows
    assert not same_rows([(1,), (2,), (2,)], rows, ordered=False)
    assert same_rows([], [], ordered=False)
    assert not same_rows([], rows, ordered=False)


def test_gold_queries_of_spider_run_and_match_themselves() -> None:
    task = SpiderTask(path=data_file("spider/dev.json"), shares=None)
    prompts = task.prompts("test", None, small_tokenizer())
    asked = [prompt for prompt in prompts if task.database_of(prompt).is_file()]
    assert len(asked) >= 100
    for prompt in asked:
        assert prompt.reference is not None
        found = task.metrics(f"```sql\n{prompt.reference}\n```", prompt)
        assert (found["query_match"], found["query_runs"], found["execution_match"]) == (1, 1, 1), prompt.id
