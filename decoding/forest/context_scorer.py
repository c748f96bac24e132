"""ContextScorer: a model that drafts as far as its context goes, for a target that goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest


class ContextScorer(ForestScorer):
    """Scores nodes within a context; after those beyond it, nothing is proposed.

    Args:
        model, options: as for ForestScorer.
        context: tokens that the model takes.
    """

    def __init__(self, model: Any, context: int, **options: Any) -> None:
        super().__init__(model, **options)
        self.context = context
        self._room: dict[int, tuple[TokenForest, int]] = {}  # row -> its forest, and the depth that still fits
        self._filled: set[int] = set()  # rows whose slots hold a prompt, of which a prefix may be shared

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """Score a prompt, unless it is longer than the context."""
        self._room[row] = forest, self.context - len(prompt)
        if len(prompt) <= self.context:
            super().open(row, prompt, forest, shared if shared is not None and shared[0] in self._filled else None)
            self._filled.add(row)

    def close_row(self, row: int) -> None:
        """The prompt in a row is done."""
        if self._is_open(row):
            super().close_row(row)
        del self._room[row]

    def score(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """Make sure that those of the nodes that fit are scored; returns how many are new."""
        fitting = {row: [node for node in nodes if self._fits(row, node)] for row, nodes in wanted.items()}
        return super().score({row: nodes for row, nodes in fitting.items() if nodes})

    def proposes(self, row: int, nodes: Sequence[int]) -> bool:
        """True if all of some nodes fit, and any token may follow."""
        return all(self._fits(row, node) for node in nodes) and super().proposes(row, nodes)

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor | None:
        """Last hidden states at the scored ones of `nodes`, [N, H]; None where none is kept."""
        return super().hidden(row, nodes) if self._is_open(row) else None

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Nodes died; keep what is known of `live` ones only."""
        if self._is_open(row):
            super().forget(row, dead, live)

    def calls(self, row: int) -> int:
        """Passes that scored nodes of the row's prompt."""
        return super().calls(row) if self._is_open(row) else 0

    def _is_open(self, row: int) -> bool:
        return self._room[row][1] >= 0

    def _fits(self, row: int, node: int) -> bool:
        forest, depth = self._room[row]
        return forest.depths[node] <= depth
