"""Draft: what proposes tokens for a target. A kind of draft is one file of this package with a
subclass in it.

Whatever drafts, the output follows the target: a draft only has to name the distribution Q that it
drew from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from decoding.engine.vocabulary import VocabularyMap
from decoding.errors import UserError
from decoding.forest.node_scorer import NodeScorer, ScorerOptions
from decoding.forest.scorer import ForestScorer


class Draft(ABC):
    """A draft of one target, which it may know but must not keep alive. One named in text is called
    with the target.

    Attributes:
        hidden_size: H of the states that its scorer's `hidden` gives; 0 where it gives none.
        target_layers: which hidden states of the target its scorer reads, numbered as transformers
            numbers them: 0 is the embeddings, i what the i-th block gives, the number of blocks
            what the head reads. The target's scorer keeps these of every prompt token and of every
            living node, and no others.
        vocabulary: makes its token ids the target's; None where they are the same.
    """

    hidden_size: int = 0
    target_layers: tuple[int, ...] = ()
    vocabulary: VocabularyMap | None = None

    @property
    @abstractmethod
    def name(self) -> str:
        """The draft as users write it and results show it: `model`, `layers:8`, `ngram:3`."""

    @property
    def models(self) -> dict[str, Any]:
        """Causal language models that it runs, by role; each is probed."""
        return {}

    @abstractmethod
    def fingerprint(self) -> bytes:
        """Bytes that tell this draft from others; the pair's fingerprint is a hash of them and of
        the target's.
        """

    def describe(self) -> dict[str, Any]:
        """The draft's part of the pair's description, beside that of its models; JSON-able."""
        matched = {} if self.vocabulary is None else {"vocabulary": self.vocabulary.describe()}
        return {"draft": self.name, **matched}

    @abstractmethod
    def scorer(self, target: ForestScorer, options: ScorerOptions) -> NodeScorer:
        """A scorer of this draft's nodes for one batch.

        Args:
            target: the target's scorer of the same batch. Its `layer_states` are the hidden states
                of `target_layers` at nodes, its `prompt_states` those at the prompt's tokens, as
                soon as it has scored them.
            options: those of the target's scorer.
        """

    def assistance(self) -> dict[str, Any]:
        """Arguments with which transformers' own `generate` is assisted by this draft.

        Raises:
            UserError: transformers knows no such draft.
        """
        raise UserError(
            f"hf_assisted cannot draft with {self.name!r}, which transformers' own generate does not know; give a "
            "model, or ngram."
        )


@dataclass(frozen=True)
class NamedKind:
    """A kind of draft that users name in text, `prefix` or `prefix:argument`.

    Args:
        usage: how it is written and what it is, for error messages.
        make: (what stands behind the colon, None without one; the target) -> the draft, or None
            where the text names none.
    """

    prefix: str
    usage: str
    make: Callable[[str | None, Any], Draft | None]


def whole_number(text: str | None) -> int | None:
    """The number that digits write, of at most six; None for any other text."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) <= 6 else None
