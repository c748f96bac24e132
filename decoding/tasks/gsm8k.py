"""GSM8K (2110.14168): school arithmetic in words; the metric compares the final number."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from decoding.tasks.base import Example, FileTask, Prompt, read_jsonl, text_field

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


@dataclass
class Gsm8kTask(FileTask):
    """Rows {question, answer} whose answer ends in `#### N`."""

    name = "gsm8k"
    own_instruction: ClassVar[str] = "Solve this step by step. End with a line that holds #### and the final number."

    def examples(self) -> Iterator[Example]:
        for number, entry in read_jsonl(self.path):
            question, answer = (text_field(entry, key, self.path, number) for key in ("question", "answer"))
            yield Example(f"gsm8k:{number}", f"Question: {question}\nAnswer:", (answer,), question)

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        """`number_match`: the answer's number equals the reference's."""
        if prompt.reference is None:
            return {}
        expected = final_number(prompt.reference)
        return {"number_match": float(expected is not None and final_number(prediction) == expected)}


def final_number(text: str) -> Decimal | None:
    """The number after `####`, else the last one before a further "Question:"; None without."""
    text = text.split("\nQuestion:")[0]
    marked = _NUMBER.findall(text.split("####", 1)[1].split("\n")[0]) if "####" in text else []
    numbers = marked[:1] or _NUMBER.findall(text)[-1:]
    return Decimal(numbers[0].replace(",", "")) if numbers else None
