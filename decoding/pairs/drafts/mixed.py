"""N-grams beside another draft: Q is a mixture of what it proposes and of what followed the same
tokens before.

A draft knows what its target tends to say, n-grams know the names, numbers and phrases of this
text: a head with a small vocabulary has no other way to propose them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.dice.sampling import FloatArray, IntArray
from decoding.forest.node_scorer import NodeScorer, ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.pairs.drafts.base import Draft
from decoding.pairs.drafts.ngram import NgramDraft, NgramScorer

# Of the n-grams in Q where the longest suffix that came before has 1, 2, 3 or more tokens.
WEIGHTS = (0.3, 0.5, 0.5)


class MixedDraft(Draft):
    """Another draft and n-grams propose together.

    Args:
        other: whose proposals get what the n-grams leave; all where no suffix came before.
        ngrams: their settings.
    """

    def __init__(self, other: Draft, ngrams: NgramDraft | None = None) -> None:
        self.other, self.ngrams = other, ngrams if ngrams is not None else NgramDraft()
        self.hidden_size, self.target_layers, self.vocabulary = other.hidden_size, other.target_layers, other.vocabulary

    @property
    def name(self) -> str:
        """The draft as users write it: `ngram:3+` and the other's name."""
        return f"{self.ngrams.name}+{self.other.name}"

    @property
    def models(self) -> dict[str, Any]:
        """The other draft's models."""
        return self.other.models

    def fingerprint(self) -> bytes:
        """Bytes of both drafts, and of their weights in Q."""
        return self.other.fingerprint() + self.ngrams.fingerprint() + repr(WEIGHTS).encode()

    def describe(self) -> dict[str, Any]:
        """The other draft's description, under the name of both."""
        return {**self.other.describe(), "draft": self.name}

    def scorer(self, target: ForestScorer, options: ScorerOptions) -> NodeScorer:
        """The other draft's scorer, with lookups on the host beside it."""
        lookups = self.ngrams.scorer(target, options)
        assert isinstance(lookups, NgramScorer)
        return MixedScorer(self.other.scorer(target, options), lookups)


class MixedScorer:
    """Nodes in, log-probabilities of the mixture out; a `NodeScorer`.

    Args:
        other, lookups: of the same batch and the same options.
    """

    def __init__(self, other: NodeScorer, lookups: NgramScorer) -> None:
        self.other, self.lookups, self.top = other, lookups, other.top
        self.model_seconds = 0.0  # in passes and in lookups

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """A prompt takes a row of both."""
        self.other.open(row, prompt, forest, shared)
        self.lookups.open(row, prompt, forest, shared)

    def close_row(self, row: int) -> None:
        """The prompt in a row is done."""
        self.other.close_row(row)
        self.lookups.close_row(row)

    def score(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """Make sure that both have scored all nodes of `wanted`; returns how many are new to the
        other draft.
        """
        self.lookups.score(wanted)
        count = self.other.score(wanted)
        self.model_seconds = self.other.model_seconds + self.lookups.model_seconds
        return count

    def proposes(self, row: int, nodes: Sequence[int]) -> bool:
        """True if either has a next token to propose after any of some scored nodes."""
        return self.other.proposes(row, nodes) or self.lookups.proposes(row, nodes)

    def tops(self, row: int, nodes: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """Log-probabilities of the likeliest next tokens, best first, and the tokens; [N, K] each."""
        found, found_tokens = self.lookups.tops(row, nodes)  # [N, F]
        if not self.other.proposes(row, nodes):
            return found, found_tokens
        values, tokens = self.other.tops(row, nodes)  # [N, K]
        weights = self._weights(row, nodes)[:, None]
        if not weights.any():
            return values, tokens
        shares, found_shares = (1 - weights) * np.exp(values), weights * np.exp(found)
        same = (found_tokens[:, :, None] == tokens[:, None, :]) & (found_shares > 0)[:, :, None]  # [N, F, K]
        shares = shares + (found_shares[:, :, None] * same).sum(1)
        shares = np.concatenate([shares, np.where(same.any(2), 0.0, found_shares)], 1)
        best = np.argsort(-shares, axis=1, kind="stable")[:, : self.top]
        with np.errstate(divide="ignore"):
            logs = np.log(np.take_along_axis(shares, best, 1))
        return logs, np.take_along_axis(np.concatenate([tokens, found_tokens], 1), best, 1)

    def log_probs(self, row: int, nodes: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token at scored nodes, [N, V] on the target's device."""
        found = self.lookups.log_probs(row, nodes)
        if not self.other.proposes(row, nodes):
            return found
        weights = torch.from_numpy(self._weights(row, nodes)).to(found)[:, None]
        return torch.logaddexp(self.other.log_probs(row, nodes) + (1 - weights).log(), found + weights.log())

    def _weights(self, row: int, nodes: Sequence[int]) -> FloatArray:
        """The n-grams' weight after each node, [N]; 0 where they have nothing to propose."""
        longest = [self.lookups.longest(row, node) for node in nodes]
        return np.array([WEIGHTS[min(n, len(WEIGHTS)) - 1] if n else 0.0 for n in longest])

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor | None:
        """The other draft's last hidden states."""
        return self.other.hidden(row, nodes)

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Nodes died; both keep what is known at `live` ones only."""
        self.other.forget(row, dead, live)
        self.lookups.forget(row, dead, live)

    def calls(self, row: int) -> int:
        """Passes of the other draft that scored nodes of the row's prompt."""
        return self.other.calls(row)

    def close(self) -> None:
        """Give back what can be used again."""
        self.other.close()

    def free(self) -> None:
        """Keep nothing."""
        self.other.free()
