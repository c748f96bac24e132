"""What may stand for the draft of a pair, and what the decoder asks of whatever scores its nodes.

A draft is a small language model; the target's own first layers, `layers:8`; or n-grams of the prompt and the text so
far, `ngram` or `ngram:4`. Whichever it is, the output follows the target: a draft only has to name the Q it drew from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from decoding.early_layers import first_layers
from decoding.errors import UserError
from decoding.forest import TokenForest
from decoding.lookup import NgramDraft
from decoding.sampling import FloatArray, IntArray

ALLOWED = "layers:N (the target's first N layers), ngram or ngram:N (no draft model; suffixes of up to N tokens)"
_KINDS = re.compile(r"(layers|ngram)(:.*)?", re.DOTALL)


class DraftScorer(Protocol):
    """Nodes in, log-probabilities of the next token out, in the target's token ids, for a batch of prompts."""

    top: int | None  # `tops` gives at most so many tokens of a node; None: `log_probs` gives all, on the device
    model_seconds: float  # spent in `score`, in passes or what stands for them

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """A prompt takes a row; its last token is node 0 of `forest`, scored at once. `shared` as for ForestScorer."""

    def close_row(self, row: int) -> None:
        """The prompt in a row is done."""

    def score(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """Make sure that all nodes of `wanted` (row -> nodes) are scored; returns how many are new."""
        ...

    def proposes(self, row: int, nodes: Sequence[int]) -> bool:
        """Whether any token may follow any of some scored nodes; where none may, nothing further is drafted."""
        ...

    def tops(self, row: int, nodes: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """Log-probabilities of the likeliest next tokens at scored nodes, and the tokens; [N, K] each.

        -inf stands for want of more; what is finite in a row are different tokens.
        """
        ...

    def log_probs(self, row: int, nodes: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token at scored nodes, [N, V] float32 on the target's device."""
        ...

    def hidden(self, row: int, nodes: Sequence[int]) -> FloatArray | None:
        """Mean of the last hidden states at scored nodes, [H]; None where none is known."""

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Nodes died; of the others, log-probabilities are asked for at `live` nodes only."""

    def calls(self, row: int) -> int:
        """Times that nodes of the row's prompt were scored; the prompt itself not counted."""
        ...

    def close(self) -> None:
        """Give back what can be used again."""

    def free(self) -> None:
        """Keep nothing: memory is short, or what is kept may be spoilt."""


def is_kind(text: str) -> bool:
    """Whether a text names a draft that comes without a model of its own."""
    return _KINDS.fullmatch(text) is not None


def named_draft(text: str, target: Any) -> tuple[Any, str]:
    """The draft that a text names, and its name written out.

    Args:
        text: `layers:8`, `ngram`, `ngram:4`.
        target: whose layers they are.

    Raises:
        UserError: another text, or a number that cannot be.
    """
    kind, colon, number = text.partition(":")
    whole = re.fullmatch(r"[0-9]{1,6}", number) is not None
    if kind == "layers" and whole:
        return first_layers(target, int(number)), f"layers:{int(number)}"
    if kind == "ngram" and (not colon or (whole and int(number) > 0)):
        draft = NgramDraft(int(number)) if colon else NgramDraft()
        return draft, draft.name
    raise UserError(f"draft is {text!r}; give a model, or {ALLOWED}.")
