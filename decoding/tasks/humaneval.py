"""HumanEval (2107.03374): function headers and docstrings; the reference is the canonical solution.
No code is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from decoding.tasks.base import Example, FileTask, read_jsonl, text_field


@dataclass
class HumanEvalTask(FileTask):
    """Rows {task_id, prompt, canonical_solution} of HumanEval.jsonl(.gz); scores the first line."""

    name = "humaneval"

    def examples(self) -> Iterator[Example]:
        for number, entry in read_jsonl(self.path):
            name, text, solution = (
                text_field(entry, key, self.path, number) for key in ("task_id", "prompt", "canonical_solution")
            )
            yield Example(name, text, (solution,))
