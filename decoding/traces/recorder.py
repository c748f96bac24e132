"""A decoder's recorder that turns committed layers into trace rows. Design section 7."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from decoding.dice.sampling import Dice
from decoding.forest.tree import TokenForest
from decoding.results import LayerEvent, Recorder
from decoding.traces.schema import Column, ContextFeatures


class TraceRecorder(Recorder):
    """A decoder's recorder that turns layers into rows.

    Args:
        features: computes the feature columns.
        hidden_sizes: (H_p, H_q), for zeros where a state is unknown; None: hidden states are not
            logged.
        shadow_seed: seed of the coins that judge the drafts a decoder no longer needs.
        columns: of one's own.
    """

    def __init__(
        self,
        features: ContextFeatures,
        hidden_sizes: tuple[int, int] | None,
        shadow_seed: int,
        columns: Sequence[Column] = (),
    ) -> None:
        self.shadow: Dice | None = Dice(torch.Generator().manual_seed(shadow_seed))
        self._features, self._columns = features, columns
        self.needs_hidden = hidden_sizes is not None
        self._hidden_sizes = hidden_sizes or (0, 0)
        self.rows: list[dict[str, Any]] = []
        # This prompt's rows, with the kept beams and their slots: no more, since events hold whole
        # distributions.
        self._open: list[tuple[dict[str, Any], list[tuple[int, float]], list[int]]] = []
        self._forest = TokenForest()
        self._prompt_id, self._split = "", ""

    def start(self, prompt_id: str, split: str) -> None:
        """A prompt begins."""
        self._prompt_id, self._split = prompt_id, split
        self._open = []

    def drafted(
        self, forest: TokenForest, beams: list[tuple[int, float]], layers: list[list[tuple[int, float]]]
    ) -> None:
        """Rows are made of what is judged; only the forest is kept."""
        self._forest = forest

    def layer(self, event: LayerEvent) -> None:
        """Add a row; what became of its beams comes later."""
        context, record = event.context.draft, event.record
        target_size, draft_size = self._hidden_sizes
        row = {
            "prompt_id": self._prompt_id,
            "split": self._split,
            "layer": context.layer,
            "target_width": record.target_width,
            "draft_width": record.draft_width,
            "kept_width": len(event.kept),
            "features": self._features(context),
            "target_features": self._features.of_target(event.context),
            "draft_hidden": _sized(context.draft_hidden, draft_size),
            "target_hidden": _sized(context.root.target_hidden, target_size),
            "accept_bits": [],
            "accept_probs": [],
        }
        if event.verdict is not None:
            row["accept_bits"] = event.verdict.bits
            row["accept_probs"] = event.verdict.probabilities
        row |= {column.name: column.of(event) for column in self._columns}
        self._open.append((row, event.kept, event.slots))

    def end(self, best_path: list[int]) -> None:
        """Fill in what became of the beams: row d committed the tokens at depth d."""
        behind = deficits([kept for _, kept, _ in self._open], self._forest.parents, best_path)
        for depth, (row, _, slots) in enumerate(self._open):
            node = best_path[depth] if depth < len(best_path) else None
            row["survivor_slot"] = slots.index(node) + 1 if node in slots else 0
            row["slot_deficits"] = [behind[depth][slot] for slot in slots]
            self.rows.append(row)
        self._open = []

    def take_rows(self) -> list[dict[str, Any]]:
        """Hand over the finished rows."""
        rows, self.rows = self.rows, []
        return rows


def deficits(
    layers: Sequence[Sequence[tuple[int, float]]], parents: Sequence[int], best_path: Sequence[int]
) -> list[dict[int, float]]:
    """Nats by which each beam's line was behind the best when it ended.

    A beam's line are its descendants. At the last layer that holds one of them, its deficit is the
    weight of that layer's best beam less that of its heaviest descendant; beams of the best
    hypothesis have none. What would have been lost with the others, if only some had been kept, is
    the least deficit among these.

    Args:
        layers: each layer's beams as (node, weight).
        parents: of every node.
        best_path: nodes of the best hypothesis, by layer.

    Returns:
        [layers] of {node: deficit}, 0 or more.
    """
    found: list[dict[int, float]] = [{} for _ in layers]
    for last in reversed(range(len(layers))):
        best = max(weight for _, weight in layers[last])
        for node, weight in sorted(layers[last], key=lambda beam: -beam[1]):
            for depth in range(last, -1, -1):  # up to the ancestors of a heavier or longer line
                if node in found[depth]:
                    break
                found[depth][node] = best - weight
                node = parents[node]
    for of_layer, node in zip(found, best_path, strict=False):
        of_layer[node] = 0.0
    return found


def _sized(hidden: np.ndarray | None, size: int) -> np.ndarray:
    """The state, zeros where it is unknown; nothing where none is logged."""
    return np.zeros(size, dtype=np.float32) if hidden is None or not size else hidden
