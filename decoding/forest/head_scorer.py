"""HeadScorer: a head over the forests of a batch, beside the target's scorer whose states it
reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from decoding.dice.sampling import FloatArray, IntArray, log_probabilities
from decoding.engine.feature_head import DraftHead
from decoding.engine.forward import PassInputs
from decoding.forest.cache import Placement
from decoding.forest.node_scorer import ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest


class HeadScorer(ForestScorer):
    """Scores a node by its token and by a feature of its parent: the target's states there, or what
    the head gave there where the target has not been.

    A node that was scored by the head's own feature is scored again, in its slot, once the target
    has scored its parent: what the head reads of the past is then what it read in training.

    Args:
        head: on the target's device, in its dtype.
        target: the target's scorer of the same batch; it keeps the states of the head's layers.
        options: as for every scorer of the batch.
    """

    keeps: ClassVar[tuple[int, ...]] = (0,)  # what passes hand on, as the one layer that there is

    def __init__(self, head: DraftHead, target: ForestScorer, options: ScorerOptions) -> None:
        super().__init__(head, **vars(options), layers=self.keeps)
        self.target = target
        self._ids = head.token_ids  # [Vd]
        self._host_ids = self._ids.cpu().numpy()
        self._width = target.vocabulary_size
        self._guessed: list[set[int]] = [set() for _ in range(options.rows)]  # scored by the head's own features
        self._forward: Any = self.runner.prompts

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """Score a prompt, after the target has; its first token stands before no feature, and is
        left out.
        """
        self._guessed[row].clear()
        if shared is not None and len(prompt) > 1:
            shared = shared[0], shared[1] - 1
        super().open(row, prompt[1:] or prompt, forest, shared)

    def _prompt_features(self, row: int, first: int, last: int) -> Tensor:
        states = self.target.prompt_states(row)
        if len(states) == 1:  # a prompt of one token
            return self._forward.fuse(torch.zeros_like(states))
        return self._forward.fuse(states[first:last])

    def _missing(self, row: int, nodes: Sequence[int]) -> set[int]:
        """Also those whose parents the target has scored since."""
        missing = super()._missing(row, nodes)
        if missing:
            parents, target = self._held(row).forest.parents, self.target.cache
            better = {node for node in self._guessed[row] if target.holds(row, parents[node])}
            self._guessed[row] -= better
            missing |= better
        return missing

    def _inputs(self, placement: Placement) -> tuple[PassInputs, Sequence[int]]:
        inputs, at = super()._inputs(placement)
        features = torch.cat([self._features(row, nodes) for row, nodes in _by_row(placement.order)])
        if len(features) < len(inputs.tokens):
            places = torch.tensor(at).to(self.device, non_blocking=True)
            features = features.new_zeros(len(inputs.tokens), features.shape[1]).index_copy_(0, places, features)
        inputs.features = features
        return inputs, at

    def _features(self, row: int, nodes: list[int]) -> Tensor:
        """Features of the parents of some nodes of a row, [N, H]."""
        forest, holds = self._held(row).forest, self.target.cache.holds
        parents = [forest.parents[node] for node in nodes]
        known = [i for i, parent in enumerate(parents) if holds(row, parent)]
        fused = self._forward.fuse(self.target.layer_states(row, [parents[i] for i in known])) if known else None
        if fused is not None and len(known) == len(nodes):
            return fused
        own = [i for i, parent in enumerate(parents) if not holds(row, parent)]
        self._guessed[row].update(nodes[i] for i in own)
        guessed = self.layer_states(row, [parents[i] for i in own])[:, 0]
        if fused is None:
            return guessed
        order = torch.tensor([*known, *own]).argsort().to(self.device, non_blocking=True)
        return torch.cat([fused, guessed]).index_select(0, order)

    def _log_probs(self, logits: Tensor, order: list[tuple[int, int]], at: Sequence[int]) -> Tensor:
        """Over the head's own vocabulary where the likeliest tokens are all that is asked for, else
        the target's.
        """
        if self.top is not None and self._process is None:
            return log_probabilities(logits, self.temperature)
        placed = logits.new_full((len(logits), self._width), -torch.inf).index_copy_(1, self._ids, logits)
        return super()._log_probs(placed, order, at)

    def _tops(self, log_probs: Tensor) -> tuple[FloatArray, IntArray]:
        values, tokens = super()._tops(log_probs)
        return (values, self._host_ids[tokens]) if log_probs.shape[1] == len(self._host_ids) else (values, tokens)

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Let go of dead nodes, as every scorer does."""
        self._guessed[row].difference_update(dead)
        super().forget(row, dead, live)


def _by_row(order: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
    """(row, its nodes), in the order of a placement, where each row's nodes stand together."""
    grouped: dict[int, list[int]] = {}
    for row, node in order:
        grouped.setdefault(row, []).append(node)
    return list(grouped.items())
