"""Chats: what is asked, in which turns; mixes of tasks; refusals that name the line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from decoding import UserError
from decoding.tasks.base import JsonlTask
from decoding.tasks.mix import MixTask
from decoding.tasks.requests import RequestsTask
from tests.small_pair import small_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]


def chatty() -> Any:
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(task: JsonlTask) -> list[str]:
    return [prompt.text for prompt in task.prompts("test", None, chatty())]


def test_a_chat_has_system_instruction_and_request(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "hello"})
    options = dict(path=path, shares=None)
    assert texts(JsonlTask(**options)) == ["hello"]
    assert texts(JsonlTask(**options, chat=True)) == ["<user>hello<assistant>"]
    told = JsonlTask(**options, chat=True, system="Be brief.", instruction="Greet back.")
    assert texts(told) == ["<system>Be brief.<user>Greet back.\n\nhello<assistant>"]


def test_a_conversation_is_asked_as_it_stands(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"messages": TURNS})
    task = JsonlTask(path=path, shares=None, messages_field="messages")
    assert texts(task) == ["<user>a<assistant>b<user>c<assistant>"]


@pytest.mark.parametrize(
    "turns", [None, [], "hello", TURNS[:2], [{"role": "robot", "content": "a"}], [{"role": "user", "content": 3}]]
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path: Path, turns: Any) -> None:
    path = written(tmp_path / "p.jsonl", {"messages": TURNS}, {"messages": turns})
    with pytest.raises(UserError, match="line 2: 'messages' must be a list"):
        texts(JsonlTask(path=path, shares=None, messages_field="messages"))


def test_refusals_of_chats(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "hello"})
    with pytest.raises(UserError, match="no chat template"):
        JsonlTask(path=path, shares=None, chat=True).prompts("test", None, small_tokenizer())
    with pytest.raises(UserError, match="no worked example"):
        texts(JsonlTask(path=path, shares=None, one_shot=True))


def test_requests_are_different_and_all_in_one_split() -> None:
    task, tokenizer = RequestsTask(shares={"train": 60, "val": 15, "test": 25}), chatty()
    split = {name: {p.text for p in task.prompts(name, None, tokenizer)} for name in ("train", "val", "test")}
    assert sum(map(len, split.values())) == len(set().union(*split.values())) == 120
    assert min(map(len, split.values())) >= 10


def test_a_mix_takes_turns_and_scores_each_prompt_by_its_own_task(tmp_path: Path) -> None:
    tasks = {
        name: JsonlTask(path=written(tmp_path / f"{name}.jsonl", *rows), shares=None, reference_field="answer")
        for name, rows in {
            "one": [{"prompt": "a", "answer": "x"}, {"prompt": "b", "answer": "x"}, {"prompt": "c", "answer": "x"}],
            "two": [{"prompt": "d", "answer": "y"}],
        }.items()
    }
    mix = MixTask(tasks)
    prompts = mix.prompts("test", None, small_tokenizer())
    assert len(prompts) == 4 and [prompt.id.split("/")[0] for prompt in prompts] == ["one", "two", "one", "one"]
    assert len(mix.prompts("test", 2, small_tokenizer())) == 2
    found = mix.metrics("y\n", prompts[1])
    assert found and all(name.startswith("two_") for name in found) and found["two_exact_match"] == 1.0
    with pytest.raises(UserError, match="two tasks or more"):
        MixTask({"one": tasks["one"]})
