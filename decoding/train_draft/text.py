"""Text for a draft to learn from: a file, answers to a file's prompts, or turns that the target
makes up.

A draft has to guess what its target would write, so the target writes what it learns from. With a
chat template and nothing else it writes the users' turns too, and then its answers to them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import GenerationConfig

from decoding.engine.placement import device_of
from decoding.errors import UserError
from decoding.pairs.pair import ModelPair
from decoding.support.checks import number, whole
from decoding.support.files import write_whole
from decoding.support.progress import RunProgress

_MARK = "\x00here\x00"  # stands for a user's turn in a rendered template
_FOLD = 20  # a document in so many is held out


class Document(NamedTuple):
    """One text: its tokens, [T] int32, and where what the target wrote of it begins."""

    tokens: Tensor
    start: int

    @property
    def held_out(self) -> bool:
        """True for one document in twenty, by a hash of its tokens: equal texts are on one side."""
        return hashlib.sha256(self.tokens.numpy().tobytes()).digest()[0] % _FOLD == 0


@dataclass(frozen=True)
class TextConfig:
    """Settings of the text.

    Args:
        source: "chat": the target makes up users' turns in its chat template, and answers them; the
            path of a
            .jsonl file with prompts ({"prompt": ...} a line), which it continues, in its chat
            template where it
            has one; or that of a .txt file, which is taken as it is.
        tokens: how many, at least; of files, at most.
        batch: texts written at a time.
        longest: tokens of a text at most.
        temperature, top_k: of the sampling.
        seed: of the sampling.

    Raises:
        UserError: a value that cannot be, or a source that cannot be read.
    """

    source: str = "chat"
    tokens: int = 1_000_000
    batch: int = 32
    longest: int = 512
    temperature: float = 1.0
    top_k: int | None = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("tokens", 1), ("batch", 1), ("longest", 2), ("seed", 0)):
            whole(f"text.{name}", getattr(self, name), least)
        number("text.temperature", self.temperature, above=0)
        if self.top_k is not None:
            whole("text.top_k", self.top_k, 1, hint="or null for all tokens")
        if self.source != "chat":
            if (
                not isinstance(self.source, str)
                or not self.path.is_file()
                or self.path.suffix not in (".jsonl", ".txt")
            ):
                raise UserError(f"text.source is {self.source!r}; give chat, or the path of a .jsonl or .txt file.")
            if self.path.suffix == ".jsonl":
                self.prompts()

    @property
    def path(self) -> Path:
        """The file that `source` names."""
        return Path(self.source).expanduser()

    def prompts(self) -> list[str]:
        """The prompts of a .jsonl file.

        Raises:
            UserError: a line that holds none.
        """
        prompts = []
        for place, line in enumerate(self.path.read_text(encoding="utf-8-sig").splitlines(), 1):
            try:
                prompts += [str(json.loads(line)["prompt"])] if line.strip() else []
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f'{self.path}, line {place}, is no object with a "prompt"; write {{"prompt": "..."}}.'
                ) from None
        return prompts


def documents(
    pair: ModelPair, config: TextConfig, directory: Path, progress: RunProgress | None = None
) -> list[Document]:
    """The texts of a config, written into a directory batch by batch; what is there already is not
    written again, but for a batch that is damaged.

    Args:
        pair: its target writes; a tokenizer is needed.
        directory: for the shards.
        progress: told of every batch's tokens.

    Raises:
        UserError: no tokenizer, no chat template where one is needed, or a file that cannot be
        read.
    """
    if pair.tokenizer is None:
        raise UserError("A draft is trained on text, and this pair has no tokenizer; load the target with one.")
    if config.source.endswith(".txt"):
        return _of_file(pair, config)
    prompts = None if config.source == "chat" else _prompts(pair, config)
    directory.mkdir(parents=True, exist_ok=True)
    _check_same(directory, {**asdict(config), "tokens": None, "target": pair.with_draft(None).fingerprint})
    found: list[Document] = []
    count = batch = 0
    task = progress.add_task("text: tokens", total=config.tokens) if progress is not None else None
    while count < config.tokens:
        shard = directory / f"text-{batch:05d}.safetensors"
        new = _read(shard)
        if new is None:
            with torch.random.fork_rng(devices=[pair.device] if pair.device.type == "cuda" else []):
                torch.manual_seed(config.seed * 1_000_003 + batch)
                if prompts is None:
                    written = _chats(pair, config)
                else:
                    chosen = [prompts[(batch * config.batch + i) % len(prompts)] for i in range(config.batch)]
                    written = _continued(pair, config, chosen)
            new = _save(shard, written)
        found += new
        count += sum(len(document.tokens) for document in new)
        batch += 1
        if progress is not None and task is not None:
            progress.advance(task, sum(len(document.tokens) for document in new))
    return found


def _of_file(pair: ModelPair, config: TextConfig) -> list[Document]:
    """A text file, cut into documents of `longest` tokens."""
    ids = pair.tokenizer(config.path.read_text(encoding="utf-8-sig"), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    if len(ids) < 2:
        raise UserError(f"text.source is {config.source!r}, which holds {len(ids)} tokens; give a longer text.")
    rows = torch.tensor(ids[: config.tokens], dtype=torch.int32).split(config.longest)
    return [Document(row.clone(), 0) for row in rows if len(row) > 1]


def _prompts(pair: ModelPair, config: TextConfig) -> list[list[int]]:
    """Token ids of a file's prompts, in the chat template where there is one."""
    prompts = [_templated(pair.tokenizer, text) for text in config.prompts()]
    prompts = [prompt for prompt in prompts if 0 < len(prompt) < config.longest]
    if not prompts:
        raise UserError(
            f"{config.path} has no prompt of less than {config.longest} tokens; give others, or raise text.longest."
        )
    return prompts


def _templated(tokenizer: Any, text: str) -> list[int]:
    """A prompt's token ids, as a user's turn where the tokenizer has a chat template."""
    if not tokenizer.chat_template:
        return list(tokenizer(text)["input_ids"])
    turn = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(ids["input_ids"])


def _chats(pair: ModelPair, config: TextConfig) -> list[Document]:
    """Users' turns that the target makes up, and its answers to them."""
    tokenizer = pair.tokenizer
    if not tokenizer.chat_template:
        raise UserError(
            "text.source is 'chat', but the target's tokenizer has no chat template; give the path of a .jsonl file "
            "with prompts, or of a .txt file."
        )
    turn = [{"role": "user", "content": _MARK}]
    rendered = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    before, _, after = rendered.partition(_MARK)
    opening, bridge = (list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (before, after))
    turns = _continued(pair, config, [opening] * config.batch, longest=len(opening) + config.longest // 4)
    ends = _ends(pair)
    prompts = []
    for document in turns:
        own = [int(token) for token in document.tokens[len(opening) :] if int(token) not in ends]
        if own:
            prompts.append([*opening, *own, *bridge])
    answered = _continued(pair, config, prompts)
    return [Document(document.tokens, len(opening)) for document in answered]


@torch.inference_mode()
def _continued(
    pair: ModelPair, config: TextConfig, prompts: Sequence[list[int]], longest: int | None = None
) -> list[Document]:
    """Prompts with what the target writes after them, up to `longest` tokens or an end token."""
    device, ends = device_of(pair.target), _ends(pair)
    width = max(len(prompt) for prompt in prompts)
    room = max((longest or config.longest) - width, 1)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = torch.tensor(prompt), 1
    settings = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_k=config.top_k or 0,
        max_new_tokens=room,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
    )
    output = pair.target.generate(
        input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
    ).cpu()
    found = []
    for row, prompt in zip(output, prompts, strict=True):
        new = row[width:].tolist()
        stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        found.append(Document(torch.tensor([*prompt, *new[:stop]], dtype=torch.int32), len(prompt)))
    return found


def _ends(pair: ModelPair) -> set[int]:
    """Ids that end a text."""
    given = getattr(pair.target.generation_config, "eos_token_id", None)
    given = pair.target.config.eos_token_id if given is None else given
    ids = [] if given is None else given if isinstance(given, list | tuple) else [given]
    own = pair.tokenizer.eos_token_id
    return {int(end) for end in [*ids, *([] if own is None else [own])]}


def _save(path: Path, written: Sequence[Document]) -> list[Document]:
    """Write a shard, under its name once it is whole; returns what `_read` finds in it."""
    flat = torch.cat([document.tokens for document in written])
    lengths = torch.tensor([len(document.tokens) for document in written])
    shard = {"tokens": flat, "lengths": lengths, "starts": torch.tensor([d.start for d in written])}
    write_whole(path, save(shard, {"sha256": _checksum(shard)}))
    return _documents(shard)


def _read(path: Path) -> list[Document] | None:
    """The texts of a shard; None where it is missing, or is not what was written there."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            shard = {name: file.get_tensor(name) for name in ("tokens", "lengths", "starts")}
            if (file.metadata() or {}).get("sha256") == _checksum(shard):
                return _documents(shard)
    except (SafetensorError, OSError):
        pass
    print(f"warning: {path} is not what was written there; it is written again.", file=sys.stderr)
    return None


def _checksum(shard: Mapping[str, Tensor]) -> str:
    """SHA-256 of a shard's tokens, lengths and starts."""
    digest = hashlib.sha256()
    for name in sorted(shard):
        digest.update(shard[name].numpy().tobytes())
    return digest.hexdigest()


def _documents(shard: Mapping[str, Tensor]) -> list[Document]:
    rows = shard["tokens"].split(shard["lengths"].tolist())
    return [Document(row.clone(), int(s)) for row, s in zip(rows, shard["starts"], strict=True) if len(row) > 1]


def _check_same(directory: Path, settings: dict[str, Any]) -> None:
    """Refuse a directory that was written with other settings (UserError)."""
    path, told = directory / "text.json", json.dumps(settings, indent=2)
    if path.exists() and path.read_text() != told:
        raise UserError(
            f"{directory} holds text of other settings or of another target; give another directory, or remove it."
        )
    write_whole(path, told.encode())


def token_counts(texts: Iterator[Document], vocab_size: int) -> Tensor:
    """Count each token, [V] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for document in texts:
        counts += torch.bincount(document.tokens.long(), minlength=vocab_size)
    return counts
