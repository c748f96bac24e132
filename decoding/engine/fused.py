"""A forest pass for models of Llama's shape, in few operations: projections fused, rotary embedding
as one complex product, one write of keys and values a layer, weights laid out for the CPU's matrix
kernels.

What it computes is what the model's own `forward` computes; `check_forest_pass` compares the two
before it is used.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from decoding.engine.families import family_of
from decoding.engine.forward import PassInputs, PassOutput, larger
from decoding.engine.positions import STATIC_ROPE, sliding_layers
from decoding.engine.watch import Watch

_PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
# On a GPU without cuDNN's attention, which torch prefers on some: it plans anew, in many
# milliseconds, for every shape.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Rotation = Callable[[int], Tensor]  # positions -> e^(i * angle) of each, [positions, D/2] complex64
Linear = Callable[[Tensor], Tensor]
Residual = Callable[[Tensor, Tensor], Tensor]  # (input, residual) -> residual + projection, perhaps in its place


def can_fuse(model: Any) -> bool:
    """True if `FusedForward` knows this model: the family, plain float weights on one device,
    nothing hooked in.
    """
    config = model.config
    if type(model).__name__ != family_of(config).fused or getattr(config, "hidden_act", None) != "silu":
        return False
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in STATIC_ROPE or rope.get("partial_rotary_factor", 1.0) != 1.0:
        return False
    weights = list(model.parameters())
    one_kind = len({(type(weight), weight.dtype, weight.device) for weight in weights}) == 1
    if not one_kind or weights[0].dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if type(weights[0]) is not nn.Parameter or hooked(model):  # packed weights cannot be cut and joined
        return False
    # Adapters and parametrisations bring modules of their own.
    homes = (type(model).__module__, "torch.nn.modules.", "transformers.activations")
    if not all(type(module).__module__.startswith(homes) for module in model.modules()):
        return False
    layers = model.model.layers
    plain = all(type(layer.get_submodule(name)) is nn.Linear for layer in layers for name in _PROJECTIONS)
    return plain and type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding


def hooked(model: Any) -> bool:
    """True if someone watches or changes what passes between the model's modules, or what they do,
    which a fused pass would skip.
    """
    return any(
        module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook") or "forward" in vars(module)
        for module in model.modules()
    )


class FusedStore:
    """Keys beside values, [rows * capacity, 2 * heads * dim] a layer; and the rotary table for as
    many positions.
    """

    def __init__(
        self, like: Tensor, rows: int, capacity: int, layers: int, heads: int, dim: int, rotation: Rotation
    ) -> None:
        self.rows, self.capacity = rows, capacity
        self._heads, self._dim, self._rotation = heads, dim, rotation
        self.turns = rotation(capacity)  # [capacity, dim / 2]; positions are less than slots
        self.buffers = [like.new_zeros(rows * capacity, 2 * heads * dim) for _ in range(layers)]
        self._views: dict[tuple[int, int, int], list[tuple[Tensor, Tensor]]] = {}

    def grow(self, capacity: int) -> None:
        """Give each row more slots; what is in the buffer stays."""
        self.buffers = [larger(buffer, self.rows, self.capacity, capacity) for buffer in self.buffers]
        self.capacity, self.turns = capacity, self._rotation(capacity)
        self._views.clear()

    def copy_slots(self, source: int, row: int, count: int) -> None:
        """Copy the first `count` slots of one row into another."""
        for buffer in self.buffers:
            rows = buffer.view(self.rows, self.capacity, -1)
            rows[row, :count] = rows[source, :count]

    @property
    def bytes(self) -> int:
        """Bytes of memory that the buffer takes."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def views(self, inputs: PassInputs) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of each layer that a pass reads, [rows, heads, S, dim] each."""
        key = (inputs.first_row, inputs.rows, inputs.read)
        views = self._views.get(key)
        if views is None:
            views = self._views[key] = [self._view(buffer, *key) for buffer in self.buffers]
        return views

    def _view(self, buffer: Tensor, first: int, rows: int, read: int) -> tuple[Tensor, Tensor]:
        both = buffer.view(self.rows, self.capacity, 2, self._heads, self._dim)[first : first + rows, :read]
        return both[:, :, 0].transpose(1, 2), both[:, :, 1].transpose(1, 2)


class Norm:
    """RMSNorm before a projection: x -> x * w / sqrt(mean(x^2) + eps).

    On the CPU it costs as much as the projection of a few tokens when it is five operations;
    without its weight it is three, x / hypot(|x|, sqrt(H eps)), and `after` has the projection that
    follows apply the weight and sqrt(H).
    """

    def __init__(self, norm: Any) -> None:
        self.weight, self.eps = norm.weight, norm.variance_epsilon
        self._width = len(self.weight)
        lighter = self.weight.dtype == torch.float32 and _packs(self.weight)
        self.left = self.weight.detach() * self._width**0.5 if lighter else None  # [H] what follows applies
        self._floor = torch.tensor((self._width * self.eps) ** 0.5) if lighter else None

    def then(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """The projection that follows."""
        return after([self], weight, bias)

    def whole(self, states: Tensor) -> Tensor:
        """Normalise as the model's own norm does, its weight included; [T, H] both ways."""
        return F.rms_norm(states, (self._width,), self.weight, self.eps)

    def __call__(self, states: Tensor) -> Tensor:
        """Normalise states, [T, H] both ways, but for what is `left`."""
        if self._floor is None:
            return self.whole(states)
        return states / torch.linalg.vector_norm(states, dim=-1, keepdim=True).hypot_(self._floor)


class _Layer:
    """One block's weights, as the pass wants them."""

    def __init__(self, block: Any, dim: int) -> None:
        attention, mlp = block.self_attn, block.mlp
        order = pairs_together(dim)
        turned = [rows_reordered(attention.q_proj, order), rows_reordered(attention.k_proj, order)]
        self.norm = Norm(block.input_layernorm)
        self.qkv = self.norm.then(*joined([*turned, (attention.v_proj.weight, attention.v_proj.bias)]))
        self.out = residual(attention.o_proj.weight, attention.o_proj.bias)
        gate, up = mlp.gate_proj, mlp.up_proj
        weight, bias = joined([(gate.weight, gate.bias), (up.weight, up.bias)])
        if not _packs(weight):  # the model's own projections become views: no second copy of the largest weights
            rows = gate.weight.shape[0]
            gate.weight.data, up.weight.data = weight[:rows], weight[rows:]
        self.mlp_norm = Norm(block.post_attention_layernorm)
        self.gate_up = self.mlp_norm.then(weight, bias)
        self.down = residual(mlp.down_proj.weight, mlp.down_proj.bias)
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))  # of each head: Qwen 3
        self.q_norm, self.k_norm = (norm.weight[order] if norm is not None else None for norm in norms)


_made: weakref.WeakKeyDictionary[nn.Module, tuple[Watch, weakref.ref[Any]]] = weakref.WeakKeyDictionary()


def _shared(module: nn.Module, also: nn.Module | None, make: Callable[[], Any]) -> Any:
    """The result of `make`, once for all models that share a module, and again when its weights, or
    those of another module that it is made of, have changed.
    """
    of = [module] if also is None else [module, also]
    watch, made = _made.get(module, (None, lambda: None))
    thing = made() if watch is not None and watch.holds(of) else None
    if thing is None:
        thing = make()
        _made[module] = Watch(of), weakref.ref(thing)  # after `make`, which may move weights
    return thing


class FusedForward:
    """Runs a model of one of the families that `can_fuse` knows."""

    ragged, static, name = True, False, "fused"

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        config = model.config
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        blocks = model.model.layers
        self._layers = [_shared(block, None, partial(_Layer, block, self._dim)) for block in blocks]
        self._slides = sliding_layers(config)
        self._scale = model.model.layers[0].self_attn.scaling
        self._embedding = model.model.embed_tokens.weight
        self._norm = Norm(model.model.norm)
        head = model.lm_head
        self._head = _shared(head, model.model.norm, lambda: self._norm.then(head.weight, head.bias))
        self._rotary = model.model.rotary_emb
        self._watch = Watch([model])

    def copies(self, model: Any) -> bool:
        """True while the model's weights and settings are those that this forward was made of."""
        return self._watch.holds([model])

    def new_store(self, rows: int, capacity: int) -> FusedStore:
        """A new, empty KV buffer."""
        return FusedStore(self._embedding, rows, capacity, len(self._layers), self._kv_heads, self._dim, self._rotation)

    def __call__(self, inputs: PassInputs, store: FusedStore) -> PassOutput:
        """Run a pass."""
        if not self._embedding.is_cuda:
            return self._pass(inputs, store)
        with sdpa_kernel(_ATTENTION):
            return self._pass(inputs, store)

    def _pass(self, inputs: PassInputs, store: FusedStore) -> PassOutput:
        group = self._heads // self._kv_heads
        masks = {slides: inputs.masks[slides] for slides in set(self._slides)}
        if group > 1:
            masks = {slides: torch.cat([mask] * group, 2) for slides, mask in masks.items()}  # [B, 1, G * N, S]
        turns = store.turns.index_select(0, inputs.positions)[:, None]  # [T, 1, D/2]
        states = F.embedding(inputs.tokens, self._embedding)  # [T, H]
        kept = states.new_empty(len(states), len(inputs.layers), states.shape[-1]) if inputs.layers else None
        weights = zip(self._layers, self._slides, store.buffers, store.views(inputs), strict=True)
        for number, (layer, slides, buffer, (keys, values)) in enumerate(weights):
            _keep(kept, inputs.layers, number, states)
            qkv = layer.qkv(layer.norm(states))  # [T, (heads + 2 kv) * D]
            queries = self._turned(qkv, turns, layer)
            buffer.index_copy_(0, inputs.slots, qkv[:, self._heads * self._dim :])
            if inputs.pad is not None:
                queries = queries.index_select(0, inputs.pad)
            mixed = self._attend(queries, keys, values, masks[slides])  # [B * N, heads * D]
            if inputs.unpad is not None:
                mixed = mixed.index_select(0, inputs.unpad)
            states = layer.out(mixed, states)
            gate, up = layer.gate_up(layer.mlp_norm(states)).chunk(2, -1)
            states = layer.down(F.silu(gate).mul_(up), states)
        if len(self._layers) in inputs.layers:
            _keep(kept, inputs.layers, len(self._layers), self._normed(states))
        if inputs.last_only:
            states = states[-1:]
        logits = self._head(self._norm(states))
        return PassOutput(logits, self._normed(states) if inputs.hidden else None, kept)

    def _normed(self, states: Tensor) -> Tensor:
        """States as the model's own head reads them, [T, H] both ways; `_norm` leaves its weight to
        the head.
        """
        return self._norm.whole(states)

    def _turned(self, qkv: Tensor, turns: Tensor, layer: _Layer) -> Tensor:
        """Rotate queries and keys in place; returns the queries, [T, heads * D]."""
        tokens, heads, dim = qkv.shape[0], self._heads + self._kv_heads, self._dim
        both = qkv[:, : heads * dim].view(tokens, heads, dim)
        if layer.q_norm is not None and layer.k_norm is not None:
            both[:, : self._heads] = F.rms_norm(both[:, : self._heads], (dim,), layer.q_norm, layer.norm.eps)
            both[:, self._heads :] = F.rms_norm(both[:, self._heads :], (dim,), layer.k_norm, layer.norm.eps)
        pairs = both.unflatten(-1, (dim // 2, 2))  # [T, heads, D/2, 2]
        if qkv.dtype == torch.float32:
            torch.view_as_complex(pairs).mul_(turns)
        else:
            pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()).mul_(turns)))
        return qkv[:, : self._heads * dim]

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Queries that share a key head are stacked: no copy of keys per query head.
        [B * N, heads * D] both ways.
        """
        rows, kv, dim = keys.shape[0], self._kv_heads, self._dim
        group = self._heads // kv
        if group == 1:
            stacked = queries.view(rows, -1, kv, dim).transpose(1, 2)
            mixed = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=self._scale)
            return mixed.transpose(1, 2).reshape(-1, kv * dim)
        stacked = queries.view(rows, -1, kv, group, dim).permute(0, 2, 3, 1, 4).reshape(rows, kv, -1, dim)
        mixed = F.scaled_dot_product_attention(stacked, keys, values, attn_mask=mask, scale=self._scale)
        return mixed.view(rows, kv, group, -1, dim).permute(0, 3, 1, 2, 4).reshape(-1, kv * group * dim)

    def _rotation(self, positions: int) -> Tensor:
        """e^(i * angle) of every position, attention scaling included, [positions, D/2] complex64."""
        ids = torch.arange(positions, device=self._embedding.device)[None]
        cosine, sine = self._rotary(torch.empty(0, dtype=torch.float32, device=ids.device), ids)  # [1, P, D]
        half = self._dim // 2
        return torch.complex(cosine[0, :, :half].float(), sine[0, :, :half].float())


def _keep(kept: Tensor | None, layers: tuple[int, ...], number: int, states: Tensor) -> None:
    """Copy hidden states [T, H] into `kept` [T, K, H]: the next block may add to them in place."""
    if kept is not None:
        for place, layer in enumerate(layers):
            if layer == number:
                kept[:, place] = states


def pairs_together(dim: int) -> Tensor:
    """Order of a head's channels in which the two that rotate together are neighbours: 0, D/2, 1,
    D/2 + 1, ...
    """
    return torch.arange(dim).view(2, -1).t().flatten()


def rows_reordered(linear: nn.Linear, order: Tensor) -> tuple[Tensor, Tensor | None]:
    """A projection's weight and bias with each head's channels in `order`; scores do not change if
    q and k share it.
    """

    def reorder(values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, len(order)))[:, order.to(values.device)].flatten(0, 1)

    return reorder(linear.weight), reorder(linear.bias) if linear.bias is not None else None


def joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Projections of one input as a single one."""
    biased = any(bias is not None for _, bias in parts)
    biases = [bias if bias is not None else weight.new_zeros(len(weight)) for weight, bias in parts]
    return torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biased else None


def _packs(weight: Tensor) -> bool:
    """True if this weight is laid out anew for the CPU's matrix kernels."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and _multiplies_bfloat16())


@functools.cache
def _multiplies_bfloat16() -> bool:
    """True if the processor multiplies bfloat16 matrices itself; elsewhere torch's own product is
    kept.
    """
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _stays_plain(weight: Tensor) -> bool:
    """True for weights that are multiplied as they are, but transposed."""
    return weight.dtype == torch.float32 and weight.numel() <= _most_plain()


@functools.cache
def _most_plain() -> int:
    """Weights up to this size are multiplied as they are, but transposed; larger ones in oneDNN's
    layout.

    A call of oneDNN takes some 20 microseconds before it multiplies, MKL's product of a few rows 4.
    On Intel's processors MKL is the faster up to a million weights, elsewhere only where there is
    next to nothing to multiply.
    """
    processor = Path("/proc/cpuinfo")
    return 2**20 if processor.exists() and "GenuineIntel" in processor.read_text() else 2**16


def _packed(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), 16)


class _Halves(NamedTuple):
    """A float32 weight that 16 bits hold, times a power of two; products are those of float32."""

    packed: Any
    multiply: Any  # (x, packed) -> product, the bias added
    down: float  # one over the power


def _halves(weight: Tensor, bias: Tensor | None = None, scales_bias: bool = False) -> _Halves | None:
    """Hold a float32 weight in float16, at half the memory to read; None where the rounded weight
    would be another one.

    Checkpoints of 16 bits that are computed with in float32 lose nothing: a power of two brings the
    largest value near float16's end, and what is rounded then is below 2^-32 of it (bfloat16 has
    the wider range). The kernel (FBGEMM's) widens the weights as it reads them, and multiplies and
    adds in float32.

    Args:
        scales_bias: the product is taken as it comes, `down` still to apply, its bias too.
    """
    if weight.dtype != torch.float32 or not _multiplies_halves():
        return None
    largest = max(-float(weight.min()), float(weight.max()))
    if not 0 < largest < math.inf:
        return None
    up = 2.0 ** (15 - math.frexp(largest)[1])  # the largest is in [2^14, 2^15) then
    if not all(_rounds_little(rows * up) for rows in weight.detach().split(4096)):
        return None
    bias = bias.detach() * (up if scales_bias else 1.0) if bias is not None else None
    packed = torch.ops.quantized.linear_prepack_fp16(weight.detach() * up, bias)
    operator = torch.ops.quantized.linear_dynamic_fp16.default
    return _Halves(packed, getattr(operator, "_op", operator), 1 / up)  # without Python's part of the dispatch, 6 us


def _rounds_little(rows: Tensor) -> bool:
    """True if float16 changes no value by more than a quarter of what float32 rounds its row's
    largest by.
    """
    largest = rows.abs().amax(1)
    return bool((rows.half().float().sub_(rows).abs_().amax(1) <= 2.0**-26 * largest).all())


@functools.cache
def _multiplies_halves() -> bool:
    """True if torch has FBGEMM's product of float32 and float16 here, and it does what it should.

    Asked of the product itself, since what torch lists does not tell: a build without FBGEMM
    (ARM)     has the operator and raises RuntimeError when it is called, another one lacks it.
    Weights are then     laid out as before, which is slower and gives the same tokens.
    """
    try:
        weight = torch.arange(-32.0, 32.0).view(4, 16)
        packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
        found = torch.ops.quantized.linear_dynamic_fp16(torch.ones(3, 16), packed)
        return found.tolist() == weight.sum(1).expand(3, 4).tolist()
    except (AttributeError, RuntimeError):  # no such operator; one that this build cannot run
        return False


def after(norms: Sequence[Norm], weight: Tensor, bias: Tensor | None) -> Linear:
    """Make a projection of what norms give side by side; [T, in] -> [T, out]."""
    left = [norm.left for norm in norms if norm.left is not None]
    if not left:
        return linear(weight, bias)
    scale = torch.cat(left)
    halves = _halves(weight, bias)
    if halves is None:
        return linear(weight * scale, bias)
    packed, multiply, down = halves
    scale = scale * down
    return lambda x: multiply(x * scale, packed)


def linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """Make a projection, its weight laid out for this device; [T, in] -> [T, out]."""
    if not _packs(weight):
        return lambda x: F.linear(x, weight, bias)
    if (halves := _halves(weight, bias)) is not None:
        return lambda x: halves.multiply(x * halves.down, halves.packed)
    bias = bias.detach() if bias is not None else None
    if _stays_plain(weight):
        columns = weight.detach().t().contiguous()  # [in, out]
        return partial(_added, columns, bias) if bias is not None else lambda x: x.mm(columns)
    packed, multiply = _packed(weight), torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _added(columns: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    return torch.addmm(bias, x, columns)


def residual(weight: Tensor, bias: Tensor | None) -> Residual:
    """Make a projection that is added to a residual, perhaps in its place; [T, out]."""
    if not _packs(weight):
        if bias is None:
            return lambda x, residual: residual.addmm_(x, weight.t())  # one kernel
        return lambda x, residual: F.linear(x, weight, bias).add_(residual)
    if (halves := _halves(weight, bias, scales_bias=True)) is not None:
        return lambda x, residual: residual.add_(halves.multiply(x, halves.packed), alpha=halves.down)
    bias = bias.detach() if bias is not None else None
    if _stays_plain(weight):
        columns = weight.detach().t().contiguous()
        if bias is None:
            return lambda x, residual: residual.addmm_(x, columns)
        return lambda x, residual: _added(columns, bias, x).add_(residual)
    packed, multiply = _packed(weight), torch.ops.mkldnn._linear_pointwise.binary
    return lambda x, residual: multiply(x, residual, packed, bias, "add")
