"""ForestCache: all beams of a prompt in one flat KV buffer per model, a slot per node. Design section 6.

Attention goes through an additive mask row per node: its parent's row plus its own slot. Slots of dead nodes
are used again, lowest first, so nothing is ever moved and the buffer in use stays about as long as one
sequence.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

SLOT_STEP = 64  # attention reads a multiple of this many slots


class _FlatLayer(CacheLayerMixin):
    """Keys and values of one layer, [1, heads, slots, dim]; writes go where the owner says."""

    is_sliding = False

    def __init__(self, owner: ForestCache) -> None:
        super().__init__()
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        capacity = self._owner.capacity

        def buffer(states: Tensor) -> Tensor:  # [1, heads, capacity, dim]
            return states.new_zeros(1, states.shape[1], capacity, states.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._owner.write_slots, key_states)
        self.values.index_copy_(2, self._owner.write_slots, value_states)
        read = self._owner.read_slots
        return self.keys[:, :, :read], self.values[:, :, :read]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.read_slots, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._owner.capacity

    def get_max_cache_shape(self) -> int:  # the same question, as transformers < 5.20 asks it
        return self._owner.capacity


class ForestCache(Cache):
    """The KV buffer, slot table and mask rows of one prompt and one model.

    Args:
        prompt_length: tokens in the prompt; they take slots 0..prompt_length - 1.
        capacity: slots to begin with; the buffer doubles when they run out.
        num_layers: attention layers of the model.
        device, dtype: of the model; the mask rows are additive in that dtype.
    """

    def __init__(
        self, prompt_length: int, capacity: int, num_layers: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.capacity = -(-capacity // SLOT_STEP) * SLOT_STEP
        self._flat = [_FlatLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._flat))
        self.prompt_length = prompt_length
        self.write_slots = torch.empty(0, dtype=torch.int64, device=device)
        self.read_slots = 0
        self.slots_peak = prompt_length
        self._device = device
        self._hidden = torch.finfo(dtype).min
        # Row 0 belongs to the prompt's last token, row s - prompt_length + 1 to the node in slot s.
        rows = self.capacity - prompt_length + 1
        self._rows = torch.full((rows, self.capacity), self._hidden, dtype=dtype, device=device)
        self._rows[0, :prompt_length] = 0
        self._slot_of: dict[int, int] = {0: prompt_length - 1}
        self._free: list[int] = []
        self._next = prompt_length

    @property
    def slots_used(self) -> int:
        """Slots that hold the prompt or a living node."""
        return self.prompt_length + len(self._slot_of) - 1

    def holds(self, node: int) -> bool:
        """Whether the node's keys and values are in the buffer."""
        return node in self._slot_of

    def begin_prompt(self) -> Tensor:
        """Aim the next forward pass at the prompt; returns its causal mask [1, 1, L, slots read]."""
        length = self.prompt_length
        self.write_slots = torch.arange(length, device=self._device)
        self.read_slots = length
        mask = torch.full((length, length), self._hidden, dtype=self._rows.dtype, device=self._device)
        return mask.triu(1)[None, None]

    def begin_nodes(self, nodes: list[int], parents: list[int]) -> Tensor:
        """Give each node a slot and aim the next forward pass at them; parents come before children.

        Returns:
            The additive mask [1, 1, len(nodes), slots read].
        """
        slots, parent_slots = [], []
        for node, parent in zip(nodes, parents, strict=True):
            parent_slots.append(self._slot_of[parent])
            slots.append(self._take_slot())
            self._slot_of[node] = slots[-1]
        both = torch.tensor([slots, parent_slots], dtype=torch.int64).to(self._device, non_blocking=True)
        own, above = both[0], both[1]
        rows = own - (self.prompt_length - 1)
        # A parent may be in the same pass, so rows are extended a generation at a time.
        for first, last in _generations(nodes, parents):
            self._rows[rows[first:last]] = self._rows[above[first:last] - (self.prompt_length - 1)]
            self._rows[rows[first:last], own[first:last]] = 0
        self.write_slots = own
        self.read_slots = min(-(-self._next // SLOT_STEP) * SLOT_STEP, self.capacity)
        self.slots_peak = max(self.slots_peak, self.slots_used)
        return self._rows[rows, : self.read_slots][None, None]

    def release(self, nodes: list[int]) -> None:
        """Free the slots of dead nodes; nodes without a slot are ignored."""
        for node in nodes:
            slot = self._slot_of.pop(node, None)
            if slot is not None:
                heapq.heappush(self._free, slot)

    def _take_slot(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        if self._next >= self.capacity:
            self._grow(2 * self.capacity)
        self._next += 1
        return self._next - 1

    def _grow(self, capacity: int) -> None:
        """Move to a larger buffer; rare, since dead slots are used again."""
        old, self.capacity = self.capacity, capacity
        for layer in self._flat:
            if layer.is_initialized:
                for name in ("keys", "values"):
                    states = getattr(layer, name)  # [1, heads, old, dim]
                    larger = states.new_zeros(1, states.shape[1], capacity, states.shape[3])
                    larger[:, :, :old] = states
                    setattr(layer, name, larger)
        rows = self._rows.new_full((capacity - self.prompt_length + 1, capacity), self._hidden)
        rows[: self._rows.shape[0], :old] = self._rows
        self._rows = rows


def _generations(nodes: list[int], parents: list[int]) -> list[tuple[int, int]]:
    """Cut the list into runs in which no node's parent stands in the same run."""
    runs: list[tuple[int, int]] = []
    seen: set[int] = set()
    first = 0
    for i, (node, parent) in enumerate(zip(nodes, parents, strict=True)):
        if parent in seen:
            runs.append((first, i))
            first, seen = i, set()
        seen.add(node)
    runs.append((first, len(nodes)))
    return runs
