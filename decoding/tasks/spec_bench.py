"""Spec-Bench (2401.07851) and MT-Bench (2306.05685): the first turn of each conversation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from decoding.errors import UserError
from decoding.tasks.base import Example, FileTask, read_jsonl


@dataclass
class SpecBenchTask(FileTask):
    """Rows {question_id, category, turns, reference?} of question.jsonl.

    Args:
        categories: keep these only; None keeps all.
    """

    categories: list[str] | None = None

    name = "spec_bench"

    def examples(self) -> Iterator[Example]:
        entries = list(read_jsonl(self.path))
        found = {str(entry.get("category")) for _, entry in entries}
        if absent := sorted(set(self.categories or ()) - found):
            raise UserError(
                f"data.categories holds {', '.join(map(repr, absent))}, which no line of {self.path} has; choose among "
                f"{', '.join(sorted(found))}."
            )
        for number, entry in entries:
            turns, references = entry.get("turns"), entry.get("reference") or []
            if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
                raise UserError(f"{self.path}, line {number}: 'turns' must be a list of texts, one for each turn.")
            if self.categories is not None and entry.get("category") not in self.categories:
                continue
            texts = references if isinstance(references, list) else [references]
            name = f"{self.name}:{entry.get('question_id', number)}"
            yield Example(name, turns[0], tuple(map(str, texts[:1])), line=number)


@dataclass
class MtBenchTask(SpecBenchTask):
    """MT-Bench in the format of Spec-Bench."""

    name = "mt_bench"
