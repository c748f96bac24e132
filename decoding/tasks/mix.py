"""Several tasks as one: a prompt of each in turn, and the metrics of each under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any

from transformers import PreTrainedTokenizerBase

from decoding.errors import UserError
from decoding.support.checks import whole
from decoding.tasks.base import Prompt, Task, check_files


class MixTask:
    """The prompts of several tasks, in turn for as long as each has some.

    A prompt's id begins with the name that its task has here, and so do its metrics.

    Args:
        tasks: by name.
        max_new_tokens: length of the answers; conf/decoding takes it from here.
    """

    name = "mix"

    def __init__(self, tasks: Mapping[str, Task], max_new_tokens: int = 64) -> None:
        if len(tasks) < 2:
            raise UserError(f"data.tasks holds {', '.join(tasks) or 'none'}; a mix needs two tasks or more.")
        self.tasks = dict(tasks)
        self.max_new_tokens = whole("data.max_new_tokens", max_new_tokens, least=1)

    @property
    def note(self) -> str:
        """All that the tasks say of themselves."""
        return " ".join(filter(None, (getattr(task, "note", "") for task in self.tasks.values())))

    def check(self, splits: Sequence[str] = ()) -> None:
        """Read the files of all tasks."""
        for task in self.tasks.values():
            check_files(task, splits)

    def prompts(self, split: str, limit: int | None, tokenizer: PreTrainedTokenizerBase | None) -> list[Prompt]:
        """The first `limit` prompts of a split, as many of each task as there are."""
        share = None if limit is None else -(-limit // len(self.tasks))
        found = [
            [_renamed(prompt, f"{name}/{prompt.id}") for prompt in task.prompts(split, share, tokenizer)]
            for name, task in self.tasks.items()
        ]
        return [prompt for prompt in chain.from_iterable(zip_longest(*found)) if prompt is not None][:limit]

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        """The metrics of the prompt's own task, each with that task's name before it."""
        name, _, id = prompt.id.partition("/")
        found = self.tasks[name].metrics(prediction, _renamed(prompt, id), finished)
        return {f"{name}_{metric}": value for metric, value in found.items()}

    def describe(self) -> dict[str, Any]:
        """The tasks' descriptions of themselves."""
        return {"name": self.name, "tasks": {name: task.describe() for name, task in self.tasks.items()}}


def _renamed(prompt: Prompt, id: str) -> Prompt:
    return replace(prompt, id=id)
