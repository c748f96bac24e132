"""Tasks: prompts with references, and metrics of a continuation.

Tasks that read a file (`FileTask`) share everything but how a row becomes text: `JsonlTask` here is
for users' own prompts, the others have a file each.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from decoding.errors import UserError
from decoding.support.checks import choice
from decoding.tasks.metrics import line_metrics

SPLITS = ("train", "val", "test")
SHARES = {"train": 60, "val": 15, "test": 25}  # per cent of a file's prompts, by a hash of the prompt's text
ROLES = ("system", "user", "assistant")
Message = dict[str, str]  # a turn of a conversation: its role and its content


@dataclass(frozen=True)
class Prompt:
    """One prompt: token ids, and what it is compared with.

    Args:
        id: unique within its task, the same in every run.
        tokens: prompt token ids.
        reference: text that should follow; None where nothing is known.
        text: the prompt as text, as the model reads it.
        references: all accepted texts where there are several; the first is `reference`.
        where: its place in the user's file, such as "prompts.jsonl, line 7"; None: it has none.
    """

    id: str
    tokens: list[int]
    reference: str | None = None
    text: str | None = None
    references: tuple[str, ...] = ()
    where: str | None = None

    @property
    def place(self) -> str:
        """The prompt's name in a sentence."""
        return f"Prompt {self.id!r}" + (f" ({self.where})" if self.where is not None else "")

    def to_dict(self) -> dict[str, Any]:
        """The prompt as results.json holds it: without its token ids, which its text stands for."""
        return {"id": self.id, "tokens": len(self.tokens), "text": self.text, "references": list(self.references)}


class Task(Protocol):
    """Prompts by split, and metrics of what follows them."""

    name: str

    def prompts(self, split: str, limit: int | None, tokenizer: PreTrainedTokenizerBase | None) -> list[Prompt]:
        """The first `limit` prompts of a split ("train", "val" or "test"), in a fixed order."""

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        """Metrics of a continuation in [0, 1], higher is better; empty without a reference.

        `finished`: the continuation ended on EOS, so that its last line is complete.
        """

    def describe(self) -> dict[str, Any]:
        """Name and all that the prompts depend on, JSON-able; equal for two tasks that give the
        same prompts.

        Traces are found again by it. Files are described by what is in them, not by their paths.
        """


@dataclass(frozen=True)
class Example:
    """A row of a file as text, before it is tokenised.

    Args:
        text: that the model continues; it also decides the split.
        request: that a user says in a chat; None: `text`.
        messages: a conversation in place of both.
        line: of the file, from 1, or place among its rows; None where that is not known.
    """

    id: str
    text: str
    references: tuple[str, ...] = ()
    request: str | None = None
    messages: tuple[Message, ...] = ()
    line: int | None = None

    def __post_init__(self) -> None:
        for value in (self.id, self.text, self.request or "", *self.references):
            if not isinstance(value, str):
                raise TypeError(f"{value!r} is no text")


class Shot(NamedTuple):
    """A worked example that may stand before every prompt of a task; `text` ends where `answer`
    begins.
    """

    text: str
    request: str
    answer: str


@dataclass
class FileTask(ABC):
    """Prompts read from a file that the user gives; subclasses say how a row becomes text.

    Args:
        path: the file.
        shares: per cent of the prompts in each split, by a stable hash of the prompt's text, so
            that a controller is never evaluated on prompts it was trained on; None puts every
            prompt in every split, for evaluation only.
        chat: ask as a user does, in the tokenizer's chat template.
        max_prompt_tokens: leave out longer prompts; None keeps all of them.
        system: what a chat's system says; None: what the template says by itself.
        instruction: stands before what is asked in a chat; None: the task's own.
        one_shot: a worked example stands before every prompt, where the task has one.
        max_new_tokens: length that the task's answers call for; conf/decoding takes it from here.
    """

    path: str
    shares: Mapping[str, int] | None = field(default_factory=lambda: dict(SHARES))
    chat: bool = False
    max_prompt_tokens: int | None = None
    system: str | None = None
    instruction: str | None = None
    one_shot: bool = False
    max_new_tokens: int = 64

    name = "file"
    note: ClassVar[str] = ""  # what a reader of results must know about the task; shown with them
    own_instruction: ClassVar[str] = ""
    shot: ClassVar[Shot | None] = None

    def __post_init__(self) -> None:
        if self.shares is not None and (set(self.shares) != set(SPLITS) or sum(self.shares.values()) != 100):
            raise UserError(
                f"data.shares is {dict(self.shares)}; give per cents for train, val and test that add up to 100, "
                "or null to use every prompt in every split, for evaluation only."
            )
        if self.one_shot and self.shot is None:
            raise UserError(f"data.one_shot is true, but {self.name} has no worked example; set data.one_shot=false.")

    @abstractmethod
    def examples(self) -> Iterator[Example]:
        """All rows of the file as text."""

    def check(self, splits: Sequence[str] = ()) -> None:
        """Read the whole file, as far as that needs no tokenizer.

        Raises:
            UserError: a row that cannot be, or a split without any.
        """
        texts = [example.text for example in self.examples()]
        found = set(SPLITS) if self.shares is None and texts else {self._split_of(text) for text in texts}
        for split in splits:
            if split not in found:
                raise self._without(split)

    def _without(self, split: str) -> UserError:
        return UserError(
            f"{self.path} has no prompts in split {split!r}. Use a longer file, raise data.max_prompt_tokens or, "
            "for evaluation only, set data.shares=null to use every prompt in every split."
        )

    def prompts(self, split: str, limit: int | None, tokenizer: PreTrainedTokenizerBase | None) -> list[Prompt]:
        check_split(split)
        tokenizer = check_tokenizer(tokenizer, self.name)
        found: list[Prompt] = []
        for example in self.examples():
            if limit is not None and len(found) >= limit:
                break
            if self.shares is not None and self._split_of(example.text) != split:
                continue
            text, tokens = self._tokenise(example, tokenizer)
            if not tokens:
                raise UserError(f"{self.path}: the prompt {example.id!r} has no token; remove it from the file.")
            where = None if example.line is None else f"{self.path}, line {example.line}"
            if self.max_prompt_tokens is None or len(tokens) <= self.max_prompt_tokens:
                first = example.references[0] if example.references else None
                found.append(Prompt(example.id, tokens, first, text, example.references, where))
        if not found:
            raise self._without(split)
        return found

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        return line_metrics(prediction, prompt.reference, finished)

    def describe(self) -> dict[str, Any]:
        content = content_hash(self.path)
        about = {key: _plain(value) for key, value in vars(self).items() if key not in ("path", "max_new_tokens")}
        about |= {"instruction": self._instruction()} if self.chat else {}
        about |= {"shot": list(self.shot)} if self.one_shot and self.shot is not None else {}
        return {"name": self.name, **about, "sha256": content}

    def _split_of(self, text: str) -> str:
        assert self.shares is not None
        bucket = stable_hash(text) % 100
        for split in SPLITS:
            if bucket < self.shares[split]:
                return split
            bucket -= self.shares[split]
        raise AssertionError("shares add up to 100")

    def _instruction(self) -> str:
        return self.own_instruction if self.instruction is None else self.instruction

    def _tokenise(self, example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[int]]:
        """A prompt as the model reads it, and its tokens."""
        if not self.chat and not example.messages:
            before = "" if not self.one_shot or self.shot is None else f"{self.shot.text}{self.shot.answer}\n\n"
            return before + example.text, list(tokenizer(before + example.text, verbose=False)["input_ids"])
        if not tokenizer.chat_template:
            raise UserError(
                f"{self.name} gives its prompts as a chat, but the pair's tokenizer has no chat template. Set "
                "data.chat=false, or take a model that was trained for chats."
            )
        turns = self.conversation(example)
        wrapped = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        return wrapped, list(tokenizer(wrapped, add_special_tokens=False, verbose=False)["input_ids"])

    def conversation(self, example: Example) -> list[Message]:
        """The turns of a chat that ends where the answer begins."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        if example.messages:
            return [*system, *example.messages]

        def asked(request: str) -> Message:
            return {"role": "user", "content": "\n\n".join(filter(None, [self._instruction(), request]))}

        request = example.text if example.request is None else example.request
        if not self.one_shot or self.shot is None:
            return [*system, asked(request)]
        worked = [asked(self.shot.request), {"role": "assistant", "content": self.shot.answer.strip()}]
        return [*system, *worked, asked(request)]


@dataclass
class JsonlTask(FileTask):
    """Your own prompts: a JSON object a line (.jsonl or .jsonl.gz).

    Args:
        prompt_field: the field that holds the prompt's text.
        reference_field: the field that holds the expected continuation; None: `reference`, in the
            lines that have one.
        messages_field: the field that holds a conversation instead, a list of {role, content} whose
            last is the user's; None where there is none.
    """

    prompt_field: str = "prompt"
    reference_field: str | None = None
    messages_field: str | None = None

    name = "jsonl"

    def examples(self) -> Iterator[Example]:
        lines: dict[str, int] = {}  # of each id
        for number, entry in read_jsonl(self.path):
            messages: tuple[Message, ...] = ()
            if self.messages_field is not None:
                messages = tuple(read_messages(entry, self.messages_field, self.path, number))
                text = "\n".join(message["content"] for message in messages)
            else:
                text = text_field(entry, self.prompt_field, self.path, number)
            if not text:
                raise UserError(f"{self.path}, line {number}: {self.prompt_field!r} is empty; a prompt needs a token.")
            reference = self.reference_field or "reference"
            references: tuple[str, ...] = ()
            if self.reference_field is not None or entry.get(reference) is not None:
                references = (text_field(entry, reference, self.path, number),)
            name = own_id(entry, self.path, number) or f"{Path(self.path).name}:{number}"
            if name in lines:
                raise UserError(
                    f"{self.path}, line {number}: the id {name!r} is that of line {lines[name]}, too; give each prompt "
                    "its own."
                )
            lines[name] = number
            yield Example(name, text, references, messages=messages, line=number)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "file": Path(self.path).name}  # the prompts' ids begin with it


def content_hash(path: str | Path) -> str:
    """SHA-256 of the file's content, in hexadecimal; decompressed where its name ends in .gz."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def read_bytes(path: str | Path) -> bytes:
    """The file's content, decompressed where its name ends in .gz; UserError if unreadable."""
    try:
        content = Path(path).read_bytes()
        return gzip.decompress(content) if str(path).endswith(".gz") else content
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"Cannot read {path}: {reason}. Give the path of an existing file.") from None


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a .jsonl or .jsonl.gz file; blank lines are skipped."""
    try:
        lines = read_bytes(path).decode("utf-8-sig").split("\n")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from None
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty; give a file with a JSON object a line.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}); mend it."
            ) from None
        if not isinstance(entry, dict):
            raise UserError(f"{path}, line {number}: a {type(entry).__name__}; each line must be a JSON object.")
        yield number, entry


def read_json(path: str | Path) -> Any:
    """The content of a .json file."""
    try:
        return json.loads(read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); give a whole file.") from None


def text_field(entry: Mapping[str, Any], name: str, path: str | Path, number: int) -> str:
    """The text in a field of a row; UserError where it is missing or no text."""
    if name not in entry:
        raise UserError(f"{path}, line {number}: no field {name!r}; it has {', '.join(sorted(entry)) or 'none'}.")
    if not isinstance(entry[name], str):
        raise UserError(f"{path}, line {number}: {name!r} is a {type(entry[name]).__name__}; it must be text.")
    return entry[name]


def own_id(entry: Mapping[str, Any], path: str | Path, number: int) -> str | None:
    """The id that a user gave a row, as text; None where there is none."""
    given = entry.get("id")
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int) or given == ""):
        raise UserError(f"{path}, line {number}: 'id' is {given!r}; give a text or a whole number, or leave it out.")
    return None if given is None else str(given)


def read_messages(entry: Mapping[str, Any], name: str, path: str | Path, number: int) -> list[Message]:
    """The conversation in a field of a row; UserError where it is missing or none that a model
    could answer.
    """
    turns = entry.get(name)
    right = isinstance(turns, list) and all(
        isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str) for turn in turns
    )
    if not right or not turns or turns[-1]["role"] != "user":
        raise UserError(
            f"{path}, line {number}: {name!r} must be a list of {{role, content}}, with the roles {', '.join(ROLES)}, "
            "and end with the user."
        )
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def check_files(task: Task, splits: Sequence[str]) -> None:
    """Refuse, before models are loaded, files and splits that `prompts` would refuse.

    Raises:
        UserError: what `FileTask.check` says, or a split that there never is.
    """
    for split in splits:
        check_split(split)
    check = getattr(task, "check", None)  # tasks of users may have none
    if check is not None:
        check(splits)


def check_split(split: str) -> None:
    """UserError unless the split is one that prompts may be taken from."""
    choice("split", split, SPLITS)


def check_tokenizer(tokenizer: PreTrainedTokenizerBase | None, task: str) -> PreTrainedTokenizerBase:
    """The tokenizer; UserError where the pair has none."""
    if tokenizer is None:
        raise UserError(
            f"The task {task!r} is text, and this pair has no tokenizer. Build it with ModelPair(..., tokenizer=...)."
        )
    return tokenizer


def _plain(value: Any) -> Any:
    """Lists and mappings as Python's own: those of Hydra are not JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def stable_hash(text: str) -> int:
    """A hash that is the same on every machine and in every run."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)
