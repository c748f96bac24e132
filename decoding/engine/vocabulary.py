"""Vocabularies: a draft whose token ids are not all the target's speaks the target's.

Drafts only propose: a token that a draft lacks has Q = 0, and a wrong table costs acceptance, not
exactness.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.errors import UserError

EXAMPLES = 3
LACKING = 0.1  # share of the draft's ordinary tokens: more makes it a tokenizer of another family


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """The target's tokens as the draft's and back, for a draft of another vocabulary.

    Args:
        size: V, rows of the target's output.
        draft_size: Vd, rows of the draft's.
        filler: the draft's id that stands for tokens that it lacks.
        ids: [V] the draft's id of each of the target's tokens, `filler` where it has none; None:
            ids mean the same.
        target_rows, draft_rows: [S] the tokens of both, as the target's and as the draft's ids;
            None with `ids`.
    """

    size: int
    draft_size: int
    filler: int = 0
    ids: tuple[int, ...] | None = None
    target_rows: Tensor | None = None
    draft_rows: Tensor | None = None

    @classmethod
    def from_pairs(cls, size: int, draft_size: int, pairs: Sequence[tuple[int, int]], filler: int = 0) -> VocabularyMap:
        """A map by (target's id, draft's id) of each token of both."""
        ids = [filler] * size
        for target_id, draft_id in pairs:
            ids[target_id] = draft_id
        rows = torch.tensor(sorted(pairs), dtype=torch.int64).view(-1, 2)
        return cls(size, draft_size, filler, tuple(ids), rows[:, 0].contiguous(), rows[:, 1].contiguous())

    @property
    def shared(self) -> int:
        """S, the number of tokens that both vocabularies have."""
        return min(self.size, self.draft_size) if self.target_rows is None else len(self.target_rows)

    def to(self, device: torch.device) -> VocabularyMap:
        """This map for logits on `device`."""
        if self.target_rows is None or self.draft_rows is None or self.target_rows.device == device:
            return self
        return replace(self, target_rows=self.target_rows.to(device), draft_rows=self.draft_rows.to(device))

    def to_draft(self, tokens: Sequence[int]) -> list[int]:
        """The target's ids -> the draft's."""
        if self.ids is not None:
            return [self.ids[token] for token in tokens]
        return [token if token < self.draft_size else self.filler for token in tokens]

    def to_target(self, logits: Tensor) -> Tensor:
        """The draft's logits in the target's order, -inf for what it lacks; [N, Vd] -> [N, V].

        Rows that the target lacks are dropped; the softmax that follows makes up for them.
        """
        if self.target_rows is None or self.draft_rows is None:
            if self.draft_size >= self.size:
                return logits[:, : self.size]
            return F.pad(logits, (0, self.size - self.draft_size), value=-torch.inf)
        placed = logits.new_full((len(logits), self.size), -torch.inf)
        return placed.index_copy_(1, self.target_rows, logits.index_select(1, self.draft_rows))

    @property
    def digest(self) -> bytes:
        """A hash that is equal for equal maps."""
        numbers = [self.size, self.draft_size, self.filler, *(self.ids or ())]
        rows = [] if self.target_rows is None else self.target_rows.tolist()
        return hashlib.sha256(np.array([*numbers, -1, *rows], dtype=np.int64).tobytes()).digest()

    def describe(self) -> dict[str, Any]:
        """The map in a few numbers for results and traces; JSON-able."""
        return {"draft_size": self.draft_size, "shared": self.shared, "by": "id" if self.ids is None else "token"}


def match_vocabularies(
    size: int, draft_size: int, tokenizer: Any | None, draft_tokenizer: Any | None
) -> VocabularyMap | None:
    """The map from the draft's ids to the target's; None where both are the same and as many.

    Tokens are matched by their strings where both tokenizers are known; otherwise ids mean the
    same, as far as both models have them. Tokens of the draft that the target lacks are never
    proposed: those that were added to its tokenizer (special tokens are), and a few ordinary ones.

    Args:
        size, draft_size: rows of the models' outputs; either may be more than its tokenizer has
            tokens.
        tokenizer, draft_tokenizer: of transformers.

    Raises:
        UserError: the target lacks more than a tenth of the draft's ordinary tokens.
    """
    if tokenizer is None or draft_tokenizer is None or tokenizer is draft_tokenizer:
        return None if size == draft_size else VocabularyMap(size, draft_size)
    ours, theirs = tokenizer.get_vocab(), draft_tokenizer.get_vocab()
    added = {*draft_tokenizer.get_added_vocab(), *draft_tokenizer.all_special_tokens}
    refused = sorted((id_, token) for token, id_ in theirs.items() if token not in ours and token not in added)
    if len(refused) > LACKING * len(theirs):
        examples = ", ".join(f"{token!r} ({id_})" for id_, token in refused[:EXAMPLES])
        raise UserError(
            f"The tokenizers differ: {len(refused)} of the draft's {len(theirs)} tokens are not among the target's "
            f"{len(ours)}, such as {examples}. Choose a draft of the target's own family, or one without a tokenizer "
            "(draft=ngram, draft=layers:N)."
        )
    pairs = [
        (ours[token], id_) for token, id_ in theirs.items() if token in ours and ours[token] < size and id_ < draft_size
    ]
    if not pairs:
        raise UserError("The tokenizers have no token in common. Choose a draft of the target's own family.")
    least = min(size, draft_size)
    if {item for item in ours.items() if item[1] < least} == {item for item in theirs.items() if item[1] < least}:
        return None if size == draft_size else VocabularyMap(size, draft_size)
    return VocabularyMap.from_pairs(size, draft_size, pairs, _filler(draft_tokenizer, draft_size))


def _filler(tokenizer: Any, size: int) -> int:
    """The tokenizer's own word for what it does not know, if it has one."""
    id_ = getattr(tokenizer, "unk_token_id", None)
    return id_ if isinstance(id_, int) and 0 <= id_ < size else 0
