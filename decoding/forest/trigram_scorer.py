"""TrigramScorer: a `TrigramHead` over the forests of a batch, beside the target's scorer whose
states it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from decoding.engine.feature_head import DraftHead
from decoding.engine.forward import Forward, PassInputs
from decoding.engine.trigram_head import TOKENS
from decoding.forest.head_scorer import HeadScorer
from decoding.forest.node_scorer import ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest


class TrigramScorer(HeadScorer):
    """Scores a node by the encoding of its last three tokens, which reads the states of its
    ancestors: the target's, or their encodings where the target has not been.

    A node's slot has its encoding until the target has scored it, and then the target's state.

    Args:
        head, target, options: as for `HeadScorer`.
    """

    keeps: ClassVar[tuple[int, ...]] = ()  # nothing is handed on

    def __init__(self, head: DraftHead, target: ForestScorer, options: ScorerOptions) -> None:
        super().__init__(head, target, options)
        self._lengths = [0] * options.rows  # tokens of the prompt that was opened last
        self._told: list[set[int]] = [set() for _ in range(options.rows)]  # written by the target's states in a pass

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """Score a prompt, after the target has; its last token by its encoding, as every node is at
        first.
        """
        if shared is not None:  # the last slot of that prompt may still have an encoding
            shared = shared[0], min(shared[1], self._lengths[shared[0]] - 1)
        self._lengths[row] = len(prompt)
        self._guessed[row], self._told[row] = {0}, set()
        ForestScorer.open(self, row, prompt, forest, shared)

    def _prompt_features(self, row: int, first: int, last: int) -> Tensor:
        states, prompt = self.target.prompt_states(row)[first:last, 0], self._held(row).tokens
        if last < len(prompt):
            return states
        return torch.cat([states[:-1], self._forward.encode(self._trigrams(row, [0]))])

    def _missing(self, row: int, nodes: Sequence[int]) -> set[int]:
        """Also those that the target has scored since they were encoded."""
        missing = ForestScorer._missing(self, row, nodes)
        if missing:
            unasked = missing.difference(nodes)
            told = {node for node in self._guessed[row] | unasked if self.target.cache.holds(row, node)}
            self._guessed[row] = (self._guessed[row] | missing) - told
            self._told[row] = told
            missing = missing | told
        return missing

    def _features(self, row: int, nodes: list[int]) -> Tensor:
        """The target's states at nodes that it has scored, encodings of the others; [N, H]."""
        told = [i for i, node in enumerate(nodes) if node in self._told[row]]
        own = [i for i, node in enumerate(nodes) if node not in self._told[row]]
        parts = []
        if told:
            parts.append(self.target.layer_states(row, [nodes[i] for i in told])[:, 0])
        if own:
            parts.append(self._forward.encode(self._trigrams(row, [nodes[i] for i in own])))
        order = torch.tensor([*told, *own]).argsort().to(self.device, non_blocking=True)
        return torch.cat(parts).index_select(0, order)

    def _trigrams(self, row: int, nodes: Sequence[int]) -> Tensor:
        """The last three tokens up to some nodes, [N, 3]; a prompt's first stands for what is not
        there.
        """
        forest, prompt = self._held(row).forest, self._held(row).tokens
        found = []
        for node in nodes:
            tail: list[int] = []
            while node and len(tail) < TOKENS:
                tail.append(forest.tokens[node])
                node = forest.parents[node]
            tail = [*tail, *prompt[: -TOKENS - 1 : -1], *[prompt[0]] * TOKENS][:TOKENS]
            found.append(tail[::-1])
        return torch.tensor(found).to(self.device, non_blocking=True)

    def _run(self, inputs: PassInputs, order: list[tuple[int, int]], at: Sequence[int], forward: Forward) -> None:
        """One pass; what it gives at the target's own states is not kept where there is something
        better.
        """
        kept = [
            (entry, i)
            for entry, i in zip(order, at, strict=True)
            if not (entry[1] in self._told[entry[0]] and self.knows(*entry))
        ]
        super()._run(inputs, [entry for entry, _ in kept], [i for _, i in kept], forward)
