"""Task `stdlib`: continue held-out modules of the running interpreter's standard library.

Everything is read from the machine's own Python, so nothing is downloaded and no source text is
committed. A module's split is a stable hash of its name: the same on every machine and every
version.
"""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from decoding.errors import UserError
from decoding.support.checks import whole
from decoding.tasks.base import Prompt, check_split, check_tokenizer, stable_hash
from decoding.tasks.metrics import first_line, line_metrics

# Shares of the module names, in per cent. `model` trains the built-in pair; the other three are
# held out from it and serve the width controller: `train` and `val` for traces, `test` for
# evaluation.
SHARES = {"model": 62, "train": 16, "val": 8, "test": 14}

# Generated tables: they would make the loss look better than it is.
_GENERATED = ("encodings.", "pydoc_data.", "lib2to3.pgen2.", "_sysconfigdata", "sre_constants", "token", "symbol")
_TEST_PARTS = {"test", "tests", "idle_test", "test_asyncio"}


def split_of(module: str) -> str:
    """Name the split of a module: 'model', 'train', 'val' or 'test'; depends on the name alone."""
    bucket = stable_hash(module) % 100
    for split, share in SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("SHARES must add up to 100")


def stdlib_modules(tests: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (dotted module name, source text) of the standard library, sorted by name.

    Args:
        tests: yield the library's own test modules instead (absent from some distributions).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    named = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if {"site-packages", "dist-packages", "__pycache__"} & set(parts):
            continue
        if bool(_TEST_PARTS & set(parts)) != tests:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if not name.startswith(_GENERATED):
            named.append((name, path))
    for name, path in sorted(named):
        try:
            yield name, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


@dataclass
class StdlibTask:
    """Continue a held-out module from a line end.

    A prompt is a slice of the module's own tokenisation, so that there is no artefact at its edges.

    Args:
        prompt_tokens: length of every prompt, the tokenizer's BOS included.
        reference_tokens: length of the reference, the text that follows in the module.
    """

    prompt_tokens: int = 128
    reference_tokens: int = 64

    name = "stdlib"

    def __post_init__(self) -> None:
        for field in ("prompt_tokens", "reference_tokens"):
            whole(f"data.{field}", getattr(self, field), least=2, hint="tokens")

    def prompts(self, split: str, limit: int | None, tokenizer: PreTrainedTokenizerBase | None) -> list[Prompt]:
        """Prompts in turn from the split's modules, each of which gives one before any gives two.

        Raises:
            UserError: unknown split, or no module of the split is long enough.
        """
        check_split(split)
        tokenizer = check_tokenizer(tokenizer, self.name)
        modules = sorted((item for item in stdlib_modules() if split_of(item[0]) == split), key=_order)
        found: list[list[Prompt]] = []
        for name, text in modules:
            if limit is not None and len(found) >= limit:
                break
            cut = self._cut(name, text, tokenizer)
            if cut:
                found.append(sorted(cut, key=lambda prompt: stable_hash(prompt.id)))
        if not found:
            raise UserError(
                f"No module of split {split!r} has {self.prompt_tokens + self.reference_tokens} tokens. "
                "Lower data.prompt_tokens or data.reference_tokens."
            )
        return [prompt for prompt in chain.from_iterable(zip_longest(*found)) if prompt is not None][:limit]

    def _cut(self, name: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
        """Non-overlapping prompts of a module, in its order; each ends at a line end, its reference
        has a full line.
        """
        tokens = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        prefix = list(tokenizer("")["input_ids"])  # BOS where the tokenizer adds one
        length = self.prompt_tokens - len(prefix)

        def text_of(part: list[int]) -> str:
            return str(tokenizer.decode(part))

        line_end = {token: text_of([token]).endswith("\n") for token in set(tokens)}
        cut, start = [], 0
        for end in range(length, len(tokens) - self.reference_tokens + 1):
            if end - length < start or not line_end[tokens[end - 1]]:
                continue
            reference = text_of(tokens[end : end + self.reference_tokens])
            line, complete = first_line(reference)
            if not (line and complete):
                continue
            number = text_of(tokens[:end]).count("\n") + 1
            prompt = tokens[end - length : end]
            cut.append(Prompt(f"{name}:{number}", prefix + prompt, reference, text_of(prompt), (reference,)))
            start = end + self.reference_tokens
        return cut

    def metrics(self, prediction: str, prompt: Prompt, finished: bool = False) -> dict[str, float]:
        """Exact match and edit similarity of the first completed line."""
        return line_metrics(prediction, prompt.reference, finished)

    def describe(self) -> dict[str, Any]:
        """Name, settings and the Python version, on which the sources depend."""
        return {"name": self.name, **asdict(self), "python": platform.python_version()}


def _order(module: tuple[str, str]) -> int:
    return stable_hash("order " + module[0])
