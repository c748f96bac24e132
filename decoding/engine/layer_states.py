"""LayerStates: hidden states of chosen layers at every slot of a batch's flat buffer, for drafts
that read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from decoding.engine.forward import larger


class LayerStates:
    """K states a slot, beside the keys and values of its token; the first pass tells their width.

    Args:
        rows: of the KV buffer.
        capacity: its slots of each row.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self._rows, self._capacity = rows, capacity
        self._states: Tensor | None = None  # [rows * capacity, K, H]

    def write(self, slots: Tensor, states: Tensor) -> None:
        """Keep what a pass gave at the slots that it wrote; [T] of the flat buffer, [T, K, H]."""
        if self._states is None:
            self._states = states.new_zeros(self._rows * self._capacity, *states.shape[1:])
        self._states.index_copy_(0, slots, states)

    def copy_slots(self, source: int, row: int, count: int) -> None:
        """Copy the first `count` slots of one row into another: a prefix that prompts share."""
        assert self._states is not None, "the source was opened"
        rows = self._states.unflatten(0, (self._rows, self._capacity))
        rows[row, :count] = rows[source, :count]

    def grow(self, capacity: int) -> None:
        """Give each row more slots; what is kept stays."""
        if self._states is not None:
            self._states = larger(self._states, self._rows, self._capacity, capacity)
        self._capacity = capacity

    def read(self, row: int, slots: Sequence[int]) -> Tensor:
        """The states at some slots of a row that were written; [N, K, H]."""
        assert self._states is not None, "the row was opened"
        indices = torch.tensor([row * self._capacity + slot for slot in slots], dtype=torch.int64)
        return self._states.index_select(0, indices.to(self._states.device))
