"""LateScorer: a draft reads a prompt where its first guess is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from decoding.dice.sampling import FloatArray, IntArray
from decoding.forest.node_scorer import NodeScorer
from decoding.forest.tree import TokenForest


class LateScorer:
    """A draft's scorer whose prompts wait: what never drafts does not pay for the draft's pass over
    its prompt.

    Args:
        scorer: of the draft.
        prefix: how many tokens all prompts of the batch begin with.
    """

    def __init__(self, scorer: NodeScorer, prefix: int) -> None:
        self.scorer, self.prefix = scorer, prefix
        self.top, self.model_seconds = scorer.top, scorer.model_seconds
        self._waiting: dict[int, tuple[Sequence[int], TokenForest]] = {}
        self._filled: set[int] = set()  # rows whose slots hold a prompt, this one's or one before

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """A prompt takes a row, and waits in it until `arrive`."""
        self._waiting[row] = prompt, forest

    def arrive(self, row: int) -> None:
        """Score the prompt of a row, if it waits."""
        waiting = self._waiting.pop(row, None)
        if waiting is not None:
            source = row if row in self._filled else min(self._filled, default=None)
            self.scorer.open(row, *waiting, (source, self.prefix) if source is not None else None)
            self._filled.add(row)
            self.model_seconds = self.scorer.model_seconds

    def close_row(self, row: int) -> None:
        """The prompt in a row is done."""
        if self._waiting.pop(row, None) is None:
            self.scorer.close_row(row)

    def score(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """Make sure that all nodes of `wanted` (row -> nodes) are scored; returns how many are new."""
        for row in wanted:
            self.arrive(row)
        count = self.scorer.score(wanted)
        self.model_seconds = self.scorer.model_seconds
        return count

    def proposes(self, row: int, nodes: Sequence[int]) -> bool:
        """True if any token may follow any of some scored nodes."""
        return self.scorer.proposes(row, nodes)

    def tops(self, row: int, nodes: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """Log-probabilities of the likeliest next tokens at scored nodes, and their ids; [N, K]
        each.
        """
        return self.scorer.tops(row, nodes)

    def log_probs(self, row: int, nodes: Sequence[int]) -> Tensor:
        """Log-probabilities of the next token at scored nodes, [N, V] on the target's device."""
        return self.scorer.log_probs(row, nodes)

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor | None:
        """Last hidden states at the scored ones of `nodes`, [N, H]; None while the prompt waits."""
        return None if row in self._waiting else self.scorer.hidden(row, nodes)

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Nodes died; of the others, log-probabilities are asked for at `live` nodes only."""
        if row not in self._waiting:
            self.scorer.forget(row, dead, live)

    def calls(self, row: int) -> int:
        """Times that nodes of the row's prompt were scored; the prompt itself not counted."""
        return 0 if row in self._waiting else self.scorer.calls(row)

    def close(self) -> None:
        """Give back what can be used again."""
        self.scorer.close()

    def free(self) -> None:
        """Keep nothing: memory is short, or what is kept may be spoilt."""
        self.scorer.free()
