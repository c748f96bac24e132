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
            yield Example(f"gsm8k:{number}", f"Question: {question}\nAnswer:", (answer,), question, line=number)

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        """`number_match`: the answer's number equals the reference's. An answer that was cut off
        before it came to one has none: a number on the way may be right by chance.
        """
        if prompt.reference is None:
            return {}
        expected = final_number(prompt.reference, finished=True)
        return {"number_match": float(expected is not None and final_number(prediction, finished) == expected)}


def final_number(text: str, finished: bool = False) -> Decimal | None:
    """The number after `####`, else the last one before a further "Question:"; None where there is
    none, or where the text may go on in the line of the one or at all.

    Args:
        text: an answer.
        finished: it ends there.
    """
    answer, further, _ = text.partition("\nQuestion:")
    finished = finished or bool(further)
    _, mark, rest = answer.partition("####")
    line, end, _ = rest.partition("\n")
    marked = _NUMBER.findall(line)
    if mark and marked:
        numbers = marked[:1] if finished or end else []
    else:
        numbers = _NUMBER.findall(answer)[-1:] if finished else []
    return Decimal(numbers[0].replace(",", "")) if numbers else None
