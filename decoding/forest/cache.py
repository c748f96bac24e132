"""ForestCache: slots of a batch's nodes in one model's flat KV buffer. Design section 6.

A row per prompt, a slot per node, and an additive mask row per node: its parent's row plus its own
slot. Slots of dead nodes are used again, lowest first, so nothing is ever moved and the slots in
use stay about as many as one sequence has tokens. The keys and values themselves belong to
`forward.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SLOT_STEP = 64  # attention reads a multiple of this many slots; with static shapes it doubles from SLOT_BUCKET
SLOT_BUCKET = 256
QUERY_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)


class _SlotTable:
    """The slot table of one prompt."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.slot_of: dict[int, int] = {0: prompt_length - 1}  # node -> slot
        self.free: list[int] = []  # heap
        self.next = prompt_length  # lowest slot that never held a node
        self.peak = prompt_length

    @property
    def used(self) -> int:
        return self.prompt_length + len(self.slot_of) - 1

    def take(self) -> int:
        if self.free:
            return heapq.heappop(self.free)
        self.next += 1
        return self.next - 1


@dataclass
class Placement:
    """Slots for the T nodes of a pass, on the host, row after row; each row's nodes stand in the
    first of N places.
    """

    order: list[tuple[int, int]]  # [T] (row, node)
    places: list[int]  # [T] where each node stands among rows * N
    slots: list[int]  # [T] in the flat buffer: row * capacity + slot
    base_rows: list[int]  # [T] mask row of the nearest ancestor that is not in this pass
    mask_rows: list[int]  # [T] the node's own mask row
    bits: list[int]  # what each node sees beyond its base: place * capacity + slot
    first_row: int  # rows read: first_row .. first_row + rows - 1
    rows: int
    queries: int  # N: most nodes of any row, or the bucket that holds them
    read: int  # S: slots read


class ForestCache:
    """Slot tables and mask rows of a batch.

    Args:
        rows: prompts at a time.
        longest_prompt: tokens; a prompt takes the slots 0..length - 1 of its row.
        spare: slots of a row for nodes, to begin with; they double when they run out.
        device, dtype: of the model; the mask is additive in that dtype.
        static: bucket shapes, so that a pass can be captured once and replayed.
        positions: also keep the position of each slot's token, for windows and ALiBi.
    """

    def __init__(
        self,
        rows: int,
        longest_prompt: int,
        spare: int,
        device: torch.device,
        dtype: torch.dtype,
        static: bool = False,
        positions: bool = False,
    ) -> None:
        self.rows, self.static = rows, static
        self._hidden = torch.finfo(dtype).min
        self._longest, self._device, self._dtype = longest_prompt, device, dtype
        self._tables: list[_SlotTable | None] = [None] * rows
        self.spare, self.capacity = spare, self._capacity(spare)
        self._masks = self._mask_table(spare, self.capacity)
        self._positions = self._position_table(self.capacity) if positions else None

    def _capacity(self, spare: int) -> int:
        """Slots of a row that leave `spare` ones for nodes; the last takes what fillers write."""
        need = self._longest + spare + 1
        capacity = SLOT_BUCKET if self.static else -(-need // SLOT_STEP) * SLOT_STEP
        while capacity < need:
            capacity *= 2
        return capacity

    def _mask_table(self, spare: int, capacity: int) -> Tensor:
        """Mask rows in which nothing is seen, [rows * (spare + 1) + 1, capacity].

        A row's mask rows: its prompt's last token, then one for each node slot. The very last is
        the fillers': it sees slot 0, since a query that sees nothing would divide by zero.
        """
        shape = (self.rows * (spare + 1) + 1, capacity)
        masks = torch.full(shape, self._hidden, dtype=self._dtype, device=self._device)
        masks[-1, 0] = 0
        return masks

    def _position_table(self, capacity: int) -> Tensor:
        """A table of positions, [rows, capacity] int64."""
        return torch.zeros(self.rows, capacity, dtype=torch.int64, device=self._device)

    def _grow(self, spare: int) -> None:
        """More slots for nodes; mask rows and positions are copied."""
        capacity = max(self.capacity, self._capacity(spare))
        masks = self._mask_table(spare, capacity)
        old = self._masks[:-1].view(self.rows, self.spare + 1, self.capacity)
        masks[:-1].view(self.rows, spare + 1, capacity)[:, : self.spare + 1, : self.capacity] = old
        if self._positions is not None:
            positions = self._position_table(capacity)
            positions[:, : self.capacity] = self._positions
            self._positions = positions
        self.spare, self.capacity, self._masks = spare, capacity, masks

    def reserve(self, capacity: int) -> None:
        """Address a buffer that is larger than was asked for; before any row is opened."""
        if capacity > self.capacity:
            self.capacity, self._masks = capacity, self._mask_table(self.spare, capacity)
            self._positions = self._position_table(capacity) if self._positions is not None else None

    def open(self, row: int, prompt_length: int) -> None:
        """A prompt takes a row; whatever was in it is forgotten."""
        self._tables[row] = _SlotTable(prompt_length)
        mask = self._masks[row * (self.spare + 1)]
        mask.fill_(self._hidden)
        mask[:prompt_length] = 0
        if self._positions is not None:
            self._positions[row, :prompt_length] = torch.arange(prompt_length, device=self._device)

    def close(self, row: int) -> None:
        """The prompt in a row is done."""
        self._tables[row] = None

    def slots_used(self, row: int) -> int:
        """Slots of a row that hold its prompt or a living node."""
        return self._table(row).used

    def slots_peak(self, row: int) -> int:
        """Most slots that were in use at a time since the row was opened."""
        return self._table(row).peak

    def holds(self, row: int, node: int) -> bool:
        """True if the node's keys and values are in the buffer."""
        return node in self._table(row).slot_of

    def slot(self, row: int, node: int) -> int:
        """The slot of a node that the buffer holds."""
        return self._table(row).slot_of[node]

    def prompt_mask(self, first: int, last: int) -> Tensor:
        """Causal mask of a prompt's tokens first..last - 1, [1, 1, last - first, slots read]."""
        slots = torch.arange(self._bucket(last), device=self._device)
        tokens = torch.arange(first, last, device=self._device)
        mask = torch.zeros(last - first, len(slots), dtype=self._dtype, device=self._device)
        return mask.masked_fill_(slots > tokens[:, None], self._hidden)[None, None]

    def place(self, wanted: Mapping[int, tuple[Sequence[int], Sequence[int]]]) -> Placement:
        """Give nodes slots.

        Args:
            wanted: row -> (nodes, their parents), parents before children; a parent has a slot or
                comes with its child. A node that has a slot keeps it.
        """
        while any(
            self._table(row).next + max(0, len(nodes) - len(self._table(row).free))
            > self._table(row).prompt_length + self.spare
            for row, (nodes, _) in wanted.items()
        ):
            self._grow(2 * self.spare + SLOT_STEP)
        most = max(len(nodes) for nodes, _ in wanted.values())
        first, last = (0, self.rows - 1) if self.static else (min(wanted), max(wanted))
        queries = query_bucket(most) if self.static else most
        placement = Placement([], [], [], [], [], [], first, last - first + 1, queries, read=0)
        highest = 0
        for row, (nodes, parents) in sorted(wanted.items()):
            self._place_row(placement, row, nodes, parents)
            highest = max(highest, self._table(row).next)
        placement.read = self._bucket(highest)
        return placement

    def _place_row(self, placement: Placement, row: int, nodes: Sequence[int], parents: Sequence[int]) -> None:
        table, capacity = self._table(row), self.capacity
        slot_of, start, offset = table.slot_of, row * capacity, self._first_mask_row(row) + 1 - table.prompt_length
        first = (row - placement.first_row) * placement.queries
        inside: dict[int, tuple[int, tuple[int, ...]]] = {}  # nodes of this pass -> base row, slots seen beyond it
        for place, (node, parent) in enumerate(zip(nodes, parents, strict=True), first):
            above = slot_of[parent if parent >= 0 else node]  # a prompt's last token sees what it saw
            slot = slot_of.get(node)  # one that has a slot is scored again, in its place
            slot = slot_of[node] = table.take() if slot is None else slot
            base, path = inside[parent] if parent in inside else (offset + above, ())
            path = (*path, slot)
            inside[node] = base, path
            placement.slots.append(start + slot)
            placement.base_rows.append(base)
            placement.mask_rows.append(offset + slot)
            placement.bits += [place * capacity + seen for seen in path]
        placement.order += [(row, node) for node in nodes]
        placement.places += range(first, first + len(nodes))
        table.peak = max(table.peak, table.used)

    def _first_mask_row(self, row: int) -> int:
        return row * (self.spare + 1)

    @property
    def filler_mask_row(self) -> int:
        """The mask row of a query that stands for nothing."""
        return self.rows * (self.spare + 1)

    def filler_slot(self, row: int) -> int:
        """The place in the flat buffer where a query writes that fills up a row: a slot that no
        mask row shows.
        """
        return (row + 1) * self.capacity - 1

    def masks(self, base_rows: Tensor, mask_rows: Tensor, bits: Tensor, rows: int, read: int) -> Tensor:
        """Mask rows of placed nodes: the base's row plus the slots between; kept for children.

        Args:
            base_rows, mask_rows: as in `Placement`, at each of rows * N places; fillers have their
                own row.
            bits: as in `Placement`.

        Returns:
            The additive mask [rows, 1, N, slots read].
        """
        masks = self._masks.index_select(0, base_rows)  # [rows * N, capacity]
        masks.view(-1).index_fill_(0, bits, 0)
        self._masks.index_copy_(0, mask_rows, masks)
        return masks.view(rows, 1, -1, self.capacity)[..., :read]

    @property
    def keeps_positions(self) -> bool:
        """True if `note`, `positions` and `window_mask` work."""
        return self._positions is not None

    @property
    def longest_path(self) -> int:
        """Tokens that a path can have, its prompt included."""
        return self._longest + self.spare

    def note(self, slots: Tensor, positions: Tensor) -> None:
        """Tokens at `positions` [T] take `slots` [T] of the flat buffer."""
        assert self._positions is not None
        self._positions.view(-1).index_copy_(0, slots, positions)

    def positions(self, first_row: int, rows: int, read: int) -> Tensor:
        """Positions of the tokens in each slot read, [rows, slots read]; for an empty slot, that of
        whatever was there.
        """
        assert self._positions is not None
        return self._positions[first_row : first_row + rows, :read]

    def window_mask(self, mask: Tensor, positions: Tensor, first_row: int, window: int) -> Tensor:
        """A mask without what lies `window` tokens or more before its query, as sliding layers of
        transformers see it.

        Along a path: all that a query sees are its ancestors, whatever their slots.

        Args:
            mask: [rows, 1, N, slots read].
            positions: of the queries, [rows * N].

        Returns:
            Additive, in the shape of `mask`.
        """
        rows, _, queries, read = mask.shape
        keys = self.positions(first_row, rows, read)[:, None, None]  # [rows, 1, 1, S]
        distance = positions.view(rows, 1, queries, 1) - keys
        return mask.masked_fill(distance >= window, self._hidden)

    def release(self, row: int, nodes: Sequence[int]) -> None:
        """Free the slots of dead nodes; nodes without a slot are ignored."""
        table = self._table(row)
        for node in nodes:
            slot = table.slot_of.pop(node, None)
            if slot is not None:
                heapq.heappush(table.free, slot)

    def _bucket(self, slots: int) -> int:
        """Slots to read so that the first `slots` are among them."""
        if not self.static:
            return min(-(-slots // SLOT_STEP) * SLOT_STEP, self.capacity)
        bucket = SLOT_BUCKET
        while bucket < slots:
            bucket *= 2
        return min(bucket, self.capacity)

    def _table(self, row: int) -> _SlotTable:
        table = self._tables[row]
        assert table is not None, "the row was opened"
        return table


def query_bucket(queries: int) -> int:
    """The smallest bucket that holds `queries`; beyond the largest, whole multiples of it."""
    for bucket in QUERY_BUCKETS:
        if queries <= bucket:
            return bucket
    return -(-queries // QUERY_BUCKETS[-1]) * QUERY_BUCKETS[-1]
