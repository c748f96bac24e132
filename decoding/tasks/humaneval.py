"""HumanEval (2107.03374): function headers and docstrings; the reference is the canonical solution.
No program that a model wrote is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from decoding.tasks.base import Example, FileTask, Prompt, read_jsonl, text_field


@dataclass
class HumanEvalTask(FileTask):
    """Rows {task_id, prompt, canonical_solution} of HumanEval.jsonl(.gz).

    A continuation is scored by its first line. An answer in a chat, which begins with words or with
    the header again, has its log-probability and its text alone.
    """

    name = "humaneval"
    note: ClassVar[str] = (
        "HumanEval: no program that a model wrote is run, so there is no pass@k; log-probability and the completed "
        "text stand for themselves."
    )
    own_instruction: ClassVar[str] = "Complete this Python function. Answer with the whole function in a code block."

    def examples(self) -> Iterator[Example]:
        for number, entry in read_jsonl(self.path):
            name, text, solution = (
                text_field(entry, key, self.path, number) for key in ("task_id", "prompt", "canonical_solution")
            )
            yield Example(name, text, (solution,), f"```python\n{text.rstrip()}\n```", line=number)

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        return {} if self.chat else super().metrics(prediction, prompt, finished)
