"""Spider (1809.08887): a schema and a question; the reference is the SQL query. None is run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoding.errors import UserError
from decoding.tasks.base import Example, FileTask, Prompt, content_hash, read_json


@dataclass
class SpiderTask(FileTask):
    """Rows {db_id, question, query} of dev.json; schemas from `tables`, or tables.json beside it.

    Args:
        tables: path of tables.json; None looks beside `path`.
    """

    tables: str | None = None

    name = "spider"

    def examples(self) -> Iterator[Example]:
        try:
            schemas = {schema["db_id"]: _tables(schema) for schema in read_json(self._tables_path())}
            for number, entry in enumerate(read_json(self.path)):
                text = f"{schemas[entry['db_id']]}\n-- {entry['question']}\n"
                yield Example(f"spider:{entry['db_id']}:{number}", text, (entry["query"],))
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.path} and its tables.json are not in Spider's format ({error!r}).") from None

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "tables": content_hash(self._tables_path())}

    def _tables_path(self) -> str | Path:
        return self.tables or Path(self.path).with_name("tables.json")

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        """`query_match`: the query as text, up to case, spaces and quotes; it must be complete."""
        if prompt.reference is None:
            return {}
        query, end, _ = re.split(r"(;|\n\s*\n|\n--|\Z)", prediction, maxsplit=1)
        complete = bool(end) or finished
        return {"query_match": float(complete and normalise(query) == normalise(prompt.reference))}


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
