"""One forest pass of a model: `TransformersForward` calls the model itself, `fused.py` and
`graphs.py` are faster.

A forward owns no prompts: it reads and writes a `Store`, the flat KV buffer of a batch, where its
inputs say.
"""

from __future__ import annotations

import inspect
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from decoding.engine.families import family_of
from decoding.engine.positions import alibi_by_position, sliding_layers
from decoding.errors import UserError


@dataclass
class PassInputs:
    """Inputs of a pass: T tokens of `rows` prompts, each row's in N = T / rows places, or ragged
    with `pad`.
    """

    tokens: Tensor  # [T] int64
    positions: Tensor  # [T] int64
    slots: Tensor  # [T] int64 to write, row * capacity + slot
    mask: Tensor  # [rows, 1, N, S] additive
    first_row: int = 0
    pad: Tensor | None = None  # [rows * N] which of the T tokens stands there (any, for a filler)
    unpad: Tensor | None = None  # [T] where a token stands among the rows * N
    last_only: bool = False  # logits of the last token only, for prompts (one row)
    hidden: bool = False  # also give the last hidden states
    layers: tuple[int, ...] = ()  # K hidden states to give of every token too, numbered as transformers numbers them
    features: Tensor | None = None  # [T, H] of the token before each, for a `FeatureHead`
    window_mask: Tensor | None = None  # [rows, 1, N, S] as `mask`, for sliding layers; None: they see as much
    key_positions: Tensor | None = None  # [rows, S] int64, of the token in each slot, where ALiBi needs them

    @property
    def rows(self) -> int:
        """Number of rows that the pass reads."""
        return self.mask.shape[0]

    @property
    def masks(self) -> dict[bool, Tensor]:
        """The attention mask by kind of layer: {slides: mask}."""
        return {True: self.mask if self.window_mask is None else self.window_mask, False: self.mask}

    @property
    def read(self) -> int:
        """S, the number of slots that the pass reads in each row."""
        return self.mask.shape[3]


class PassOutput(NamedTuple):
    """Outputs of a pass; with `last_only` the first two are of the last token alone."""

    logits: Tensor  # [T, V]
    hidden: Tensor | None = None  # [T, H] what the head read, where asked for
    states: Tensor | None = None  # [T, K, H] of `layers`, where there are any; of all tokens


class Store(Protocol):
    """A flat KV buffer of rows x capacity slots."""

    rows: int
    capacity: int

    def grow(self, capacity: int) -> None:
        """Give each row more slots; what is in the buffer stays."""

    def copy_slots(self, source: int, row: int, count: int) -> None:
        """Copy the first `count` slots of one row into another: a prefix that prompts share."""

    @property
    def bytes(self) -> int:
        """Bytes of memory that the buffer takes."""
        ...


class Forward(Protocol):
    """Runs one model."""

    ragged: bool  # takes rows of different lengths without fillers
    static: bool  # wants bucketed shapes
    name: str

    def new_store(self, rows: int, capacity: int) -> Any:
        """A new, empty KV buffer."""

    def __call__(self, inputs: PassInputs, store: Any) -> PassOutput:
        """Run a pass."""
        ...


class _FlatLayer(CacheLayerMixin):
    """Keys and values of one layer, [rows * capacity, heads, dim]; reads and writes go where the
    store says.
    """

    is_sliding = False

    def __init__(self, store: TransformersStore) -> None:
        super().__init__()
        self._store: TransformersStore = weakref.proxy(store)  # no cycle: buffers go when the last user lets go

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        slots = self._store.rows * self._store.capacity

        def buffer(states: Tensor) -> Tensor:
            return states.new_zeros(slots, states.shape[1], states.shape[3])

        self.keys, self.values = buffer(key_states), buffer(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return self._through(self.keys, key_states), self._through(self.values, value_states)

    def _through(self, buffer: Tensor | None, states: Tensor) -> Tensor:
        """Write [B, heads, N, dim]; returns what the pass reads, [B, heads, S, dim]."""
        assert buffer is not None
        store, inputs = self._store, self._store.inputs
        assert inputs is not None, "only a forest pass may use this cache"
        slots = inputs.slots.to(buffer.device)  # layers of a dispatched model lie on several devices
        buffer.index_copy_(0, slots, states.transpose(1, 2).flatten(0, 1))
        rows = buffer.view(store.rows, store.capacity, *buffer.shape[1:])
        read = rows[inputs.first_row : inputs.first_row + inputs.rows, : inputs.read].transpose(1, 2)
        return read.contiguous() if store.side_by_side else read

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._store.inputs.read if self._store.inputs is not None else 0, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._store.capacity

    def get_max_cache_shape(self) -> int:  # the same question, as transformers < 5.20 asks it
        return self._store.capacity


class TransformersStore(Cache):
    """A flat KV buffer behind transformers' Cache interface."""

    def __init__(self, rows: int, capacity: int, num_layers: int, side_by_side: bool = False) -> None:
        self.rows, self.capacity, self.side_by_side = rows, capacity, side_by_side
        self.inputs: PassInputs | None = None  # of the pass under way
        self._flat = [_FlatLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._flat))

    def grow(self, capacity: int) -> None:
        """Give each row more slots; what is in the buffer stays."""
        for layer in self._flat:
            if layer.is_initialized:
                layer.keys, layer.values = (
                    larger(buffer, self.rows, self.capacity, capacity) for buffer in (layer.keys, layer.values)
                )
        self.capacity = capacity

    def copy_slots(self, source: int, row: int, count: int) -> None:
        """Copy the first `count` slots of one row into another."""
        for layer in self._flat:
            for buffer in (layer.keys, layer.values):
                if buffer is not None:
                    rows = buffer.view(self.rows, self.capacity, *buffer.shape[1:])
                    rows[row, :count] = rows[source, :count]

    @property
    def bytes(self) -> int:
        """Bytes of memory that the buffer takes."""
        buffers = [b for layer in self._flat if layer.is_initialized for b in (layer.keys, layer.values)]
        return sum(buffer.nbytes for buffer in buffers if buffer is not None)


def larger(buffer: Tensor | None, rows: int, old: int, new: int) -> Tensor:
    """[rows * old, ...] -> [rows * new, ...], each row's slots in front."""
    assert buffer is not None
    grown = buffer.new_zeros(rows, new, *buffer.shape[1:])
    grown[:, :old] = buffer.view(rows, old, *buffer.shape[1:])
    return grown.flatten(0, 1)


class TransformersForward:
    """Calls the model as transformers wrote it, through a Cache that is a flat buffer."""

    ragged, static, name = False, False, "transformers"

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)  # its runner is kept as long as the model lives, and must not keep it alive
        self._layers = model.config.get_text_config().num_hidden_layers
        self._can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._all_slide = all(sliding_layers(model.config))
        self._side_by_side = family_of(model.config).side_by_side

    def new_store(self, rows: int, capacity: int) -> TransformersStore:
        """An empty buffer; keys and values are allocated by the first pass."""
        return TransformersStore(rows, capacity, self._layers, self._side_by_side)

    def __call__(self, inputs: PassInputs, store: TransformersStore) -> PassOutput:
        """Run a pass.

        Raises:
            UserError: states of layers are asked of a model that does not give them.
        """
        read: list[Tensor] = []
        hook = None
        model: Any = self._model()
        if inputs.hidden:
            head = model.get_output_embeddings()
            hook = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
        store.inputs = inputs
        try:
            with self._mask(model, inputs) as mask:
                output = model(
                    input_ids=inputs.tokens.view(inputs.rows, -1),
                    position_ids=inputs.positions.view(inputs.rows, -1),
                    attention_mask=mask,
                    past_key_values=store,
                    use_cache=True,
                    **({"logits_to_keep": 1} if inputs.last_only and self._can_keep else {}),
                    **({"output_hidden_states": True} if inputs.layers else {}),
                )
        finally:
            store.inputs = None
            if hook is not None:
                hook.remove()
        logits, hidden = output.logits.flatten(0, 1), read[0].flatten(0, 1) if read else None
        states = _states_of(model, output, inputs.layers) if inputs.layers else None
        if inputs.last_only:
            return PassOutput(logits[-1:], hidden[-1:] if hidden is not None else None, states)
        return PassOutput(logits, hidden, states)

    def _mask(self, model: Any, inputs: PassInputs) -> AbstractContextManager[Tensor | dict[str, Tensor]]:
        """The attention mask as the model takes it: by kind of layer where the kinds differ."""
        if inputs.key_positions is not None:
            return alibi_by_position(model, inputs.mask, inputs.key_positions)
        if inputs.window_mask is None:
            return nullcontext(inputs.mask)
        if self._all_slide:
            return nullcontext(inputs.window_mask)
        return nullcontext({"full_attention": inputs.mask, "sliding_attention": inputs.window_mask})


def _states_of(model: Any, output: Any, layers: tuple[int, ...]) -> Tensor:
    """The hidden states of some layers, [T, K, H]."""
    given = getattr(output, "hidden_states", None)
    if given is None:
        kind = getattr(model.config, "model_type", type(model).__name__)
        raise UserError(
            f"The draft reads hidden states of the target's layers, but the target ({kind}) does not give them when "
            "output_hidden_states=True; give another draft, such as ngram."
        )
    return torch.stack([given[layer].flatten(0, 1) for layer in layers], 1)
