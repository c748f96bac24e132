"""SQuAD v1.1 (1606.05250): questions on a paragraph; the official exact match and F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from decoding.errors import reading
from decoding.tasks.base import Example, FileTask, Prompt, Shot, read_json
from decoding.tasks.metrics import first_line


@dataclass
class SquadTask(FileTask):
    """The articles of a SQuAD v1.1 file; the answer is the first line of the continuation."""

    name = "squad"
    own_instruction: ClassVar[str] = "Answer the question with a few words of the text, and with nothing else."
    shot: ClassVar[Shot | None] = Shot(
        "The mill at Arden was built in 1782 by Jonas Pell. It burnt down twice and grinds oats to this day.\n"
        "Question: What does the mill grind?\nAnswer:",
        "The mill at Arden was built in 1782 by Jonas Pell. It burnt down twice and grinds oats to this day.\n\n"
        "Question: What does the mill grind?",
        " oats",
    )

    def examples(self) -> Iterator[Example]:
        with reading(self.path, "Give a file in the format of SQuAD v1.1."):
            for article in read_json(self.path)["data"]:
                for paragraph in article["paragraphs"]:
                    for qa in paragraph["qas"]:
                        text = f"{paragraph['context']}\nQuestion: {qa['question']}\nAnswer:"
                        request = f"{paragraph['context']}\n\nQuestion: {qa['question']}"
                        yield Example(qa["id"], text, tuple(answer["text"] for answer in qa["answers"]), request)

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        """`exact_match` and `f1`, the best over the references."""
        return answer_metrics(first_line(prediction)[0], prompt.references)


def answer_metrics(answer: str, references: tuple[str, ...]) -> dict[str, float]:
    """Exact match and F1 of an answer, each the best over the references; empty without any."""
    if not references:
        return {}
    given = normalise(answer)
    expected = [normalise(reference) for reference in references]
    return {"exact_match": float(given in expected), "f1": max(_f1(given.split(), e.split()) for e in expected)}


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(given: list[str], expected: list[str]) -> float:
    common = sum((Counter(given) & Counter(expected)).values())
    return 2 * common / (len(given) + len(expected)) if common else 0.0
