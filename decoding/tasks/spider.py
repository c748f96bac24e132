"""Spider (1809.08887): a schema and a question; the reference is the SQL query. Queries are
compared as text and, where the databases are at hand, by the rows that they give.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from decoding.errors import reading
from decoding.support.files import inside
from decoding.tasks.base import Example, FileTask, Prompt, Shot, content_hash, read_json
from decoding.tasks.query import QueryError, read_query, run_answer, run_query, same_rows


@dataclass
class SpiderTask(FileTask):
    """Rows {db_id, question, query} of dev.json; schemas from `tables`, or tables.json beside it.

    Args:
        tables: path of tables.json; None looks beside `path`.
        databases: folder of `<db_id>/<db_id>.sqlite`; None looks for database/ beside `path`. A
            database that is not there is not asked.
    """

    tables: str | None = None
    databases: str | None = None

    name = "spider"
    own_instruction: ClassVar[str] = (
        "Write a SQLite query that answers the question. Answer with the query in a code block, and with nothing else."
    )
    shot: ClassVar[Shot | None] = Shot(
        "CREATE TABLE pond (id, name, depth);\n-- Which ponds are deeper than 2 metres?\n",
        "CREATE TABLE pond (id, name, depth);\n\nQuestion: Which ponds are deeper than 2 metres?",
        "SELECT name FROM pond WHERE depth > 2;",
    )

    def examples(self) -> Iterator[Example]:
        with reading(f"{self.path} or its tables.json", "Give Spider's own files."):
            schemas = {schema["db_id"]: _tables(schema) for schema in read_json(self._tables_path())}
            for number, entry in enumerate(read_json(self.path)):
                schema, question = schemas[entry["db_id"]], entry["question"]
                request = f"{schema}\n\nQuestion: {question}"
                yield Example(
                    f"spider:{entry['db_id']}:{number}", f"{schema}\n-- {question}\n", (entry["query"],), request
                )

    def describe(self) -> dict[str, Any]:
        about = super().describe()
        about.pop("databases")  # no prompt depends on them
        return {**about, "tables": content_hash(self._tables_path())}

    def _tables_path(self) -> str | Path:
        return self.tables or Path(self.path).with_name("tables.json")

    def database_of(self, prompt: Prompt) -> Path:
        """The SQLite file that a prompt asks about, which need not be there."""
        name = prompt.id.split(":")[1]
        folder = Path(self.databases) if self.databases else Path(self.path).with_name("database")
        return inside(folder, name) / f"{name}.sqlite"

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        """`query_match`: the query as text, up to case, spaces and quotes; `execution_match`: it
        gives the reference's rows; `query_runs`: it gives any. A query that was cut off has none.

        Rows are in order where the reference orders them. Two empty results are weak evidence.
        """
        if prompt.reference is None:
            return {}
        query, whole = read_query(prediction)
        complete = whole or finished
        found = {"query_match": float(complete and normalise(query) == normalise(prompt.reference))}
        if (database := self.database_of(prompt)).is_file():
            expected = run_query(database, prompt.reference, seconds=60)
            try:
                rows = run_answer(database, query) if complete else None
            except QueryError:
                rows = None
            ordered = bool(re.search(r"\border\s+by\b", prompt.reference, re.IGNORECASE))
            found["query_runs"] = float(rows is not None)
            found["execution_match"] = float(rows is not None and same_rows(rows, expected, ordered))
        return found


def normalise(query: str) -> str:
    """One form for queries that differ in case, spaces, quotes or a final semicolon."""
    query = re.sub(r"\s*([(),=<>!]+)\s*", r" \1 ", query.replace('"', "'").strip().rstrip(";"))
    return " ".join(query.lower().split())


def _tables(schema: dict[str, Any]) -> str:
    columns = [name for _, name in schema["column_names_original"]]
    owners = [table for table, _ in schema["column_names_original"]]
    return "\n".join(
        f"CREATE TABLE {table} ({', '.join(c for c, owner in zip(columns, owners, strict=True) if owner == i)});"
        for i, table in enumerate(schema["table_names_original"])
    )
