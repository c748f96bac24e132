"""Widen a small Llama into the shape of a large one without changing its next-token distributions.

The small model sits in a corner of the large one and the rest adds nothing, so that a pass computes
the small model's probabilities at the large model's cost in time and memory. **It models the cost
of a size; it is not a trained model of that size**: what it writes is what the small model writes.
Read energy with care too: most of what is multiplied is zero, which draws less power than trained
weights do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from decoding.errors import UserError
from decoding.support.checks import choice, whole

CONTEXT = 8192  # positions that an inflated model takes, for the sake of cost; see `inflate`
_ZERO = ("norm", "o_proj", "down_proj", "embed_tokens", "lm_head")  # layers whose padding must add nothing
_PAD_LOGIT = 2.0**14  # a padded row's logit is minus this over the rms of the last hidden state (1 to 20 in the pair)
_PAD_WEIGHT = 2.0**15  # of the spare dimension in padded rows; a power of two that float16 still holds


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama, named as in its config.

    Raises:
        UserError: a dimension that is no positive whole number, or heads that do not divide.
    """

    hidden_size: int  # H
    num_hidden_layers: int
    num_attention_heads: int  # A
    num_key_value_heads: int  # K
    head_dim: int  # D
    intermediate_size: int  # I
    vocab_size: int  # V
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "tie_word_embeddings":
                choice(f"{name} of a shape", value, (True, False))
            else:
                whole(f"{name} of a shape", value, least=1)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads ({self.num_attention_heads}) is no multiple of num_key_value_heads "
                f"({self.num_key_value_heads}); give one: every key-value head serves equally many query "
                "heads."
            )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size ({self.hidden_size}) is no multiple of num_attention_heads ({self.num_attention_heads}); "
                "give one: transformers' Llama needs it, whatever head_dim is."
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim is {self.head_dim}; rotary positions turn pairs of dimensions: give an even number."
            )

    @property
    def parameters(self) -> int:
        """The number of weights of a model of this shape."""
        attention = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        layer = self.hidden_size * (attention + 3 * self.intermediate_size + 2)
        embeddings = self.vocab_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + self.hidden_size * (embeddings + 1)


# From the config.json of each model on the Hugging Face hub.
SHAPES: Mapping[str, Shape] = {
    "13b": Shape(5120, 40, 40, 40, 128, 13824, 32000),  # meta-llama/Llama-2-13b-hf
    "8b": Shape(4096, 32, 32, 8, 128, 14336, 128256),  # meta-llama/Llama-3.1-8B
    "1b": Shape(2048, 16, 32, 8, 64, 8192, 128256, tie_word_embeddings=True),  # meta-llama/Llama-3.2-1B
    "400m": Shape(1024, 24, 16, 8, 64, 3584, 32000),  # no published model: a target for a CPU
    "160m": Shape(768, 12, 12, 12, 64, 3072, 32000),  # JackFram/llama-160m
    "68m": Shape(768, 2, 12, 12, 64, 3072, 32000),  # JackFram/llama-68m
}


def shape_of(size: str | Mapping[str, Any] | Shape) -> Shape:
    """A shape from its name in SHAPES, or from its dimensions.

    Raises:
        UserError: an unknown name, or dimensions that are unknown, missing or impossible.
    """
    if isinstance(size, Shape):
        return size
    names = [field.name for field in fields(Shape)]
    if isinstance(size, Mapping):
        given = {str(name): value for name, value in size.items()}
        wrong = [f"{name} is unknown" for name in given if name not in names]
        wrong += [f"{name} is missing" for name in names if name not in given and name != "tie_word_embeddings"]
        if wrong:
            raise UserError(f"A shape takes {', '.join(names)}; {', '.join(wrong)}.")
        return Shape(**given)
    if size not in SHAPES:
        raise UserError(
            f"The size {size!r} is not known; choose one of {', '.join(SHAPES)}, or give {', '.join(names)}."
        )
    return SHAPES[size]


@torch.no_grad()
def inflate(
    model: LlamaForCausalLM, shape: Shape, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
    """A Llama of `shape` with the next-token distributions of `model`; tokens beyond its vocabulary
    have probability 0.

    - Width is padded with zeros. The mean square over H' dimensions is H / H' of the one over H, so
      norm weights are
      scaled by sqrt(H / H') and eps by H / H'.
    - Heads of D' = r D dimensions: queries are scaled by sqrt(r), because attention divides by
      sqrt(D'); the rotary
      pair i goes to the pair r i, which turns at the same frequency.
    - A key-value head whose queries do not fit one group of `shape` is copied into several.
    - Further heads, inner dimensions and layers (appended) hold small random numbers that no output
      projection reads.
    - Padded rows of the vocabulary read one spare dimension, which holds the constant c in every
      real token. c² is
      taken out of eps, so that norms stay exact. They are for the size only: never feed their ids.

    The result takes 8192 positions whatever `model` was trained for. Beyond its trained context the
    text means nothing; cost, and the arithmetic of acceptance, stay what they are.

    Weights are filled one by one on `device`, in `dtype`: nothing large exists elsewhere.

    Args:
        model: a Llama without biases and with plain rotary positions.
        shape: at least as large as the model in every dimension.

    Raises:
        UserError: a model that is not such a Llama, or a shape that cannot hold it.
    """
    _check_model(model.config)
    _check_shape(model.config, shape)
    hidden, padded = model.config.hidden_size, shape.vocab_size > model.config.vocab_size
    narrow = hidden / shape.hidden_size
    floor = model.config.rms_norm_eps * hidden  # what eps adds to the sum of squares
    # The largest power of two whose square leaves some eps; a power of two is the same number in
    # every dtype.
    constant = 2.0 ** math.floor(math.log2(0.75 * floor) / 2) if padded else 0.0
    wide = _empty_llama(model, shape, (floor - constant**2) / shape.hidden_size, device, dtype)
    _fill_padding(wide)
    _fill_embeddings(model, wide, constant)
    norm_scale = math.sqrt(narrow)
    _put(wide.model.norm.weight[:hidden], norm_scale * model.model.norm.weight)
    if padded:
        wide.model.norm.weight[hidden] = norm_scale * _PAD_LOGIT / (_PAD_WEIGHT * constant)
    for index, layer in enumerate(wide.model.layers):
        for name in ("input_layernorm", "post_attention_layernorm"):
            weight = getattr(layer, name).weight[:hidden]
            if index < len(model.model.layers):
                _put(weight, norm_scale * getattr(model.model.layers[index], name).weight)
            else:
                weight.fill_(norm_scale)  # no effect: it keeps the numbers of a further layer ordinary
    for source, layer in zip(model.model.layers, wide.model.layers, strict=False):
        _fill_attention(source.self_attn, layer.self_attn)
        inner = model.config.intermediate_size
        _put(layer.mlp.gate_proj.weight[:inner, :hidden], source.mlp.gate_proj.weight)
        _put(layer.mlp.up_proj.weight[:inner, :hidden], source.mlp.up_proj.weight)
        _put(layer.mlp.down_proj.weight[:hidden, :inner], source.mlp.down_proj.weight)
    return wide.eval()


def query_scale(head_dim: int, wide_head_dim: int) -> float:
    """The factor of queries that undoes attention's division by the root of the head's size."""
    return math.sqrt(wide_head_dim / head_dim)


def rotary_indices(head_dim: int, wide_head_dim: int) -> Tensor:
    """Places of a head's dimensions in a wider head, so that each keeps its frequency; [D] int64.

    Pair i (dimensions i and i + D/2) turns by θ^(-2i/D) a position, and so does pair r·i of r·D
    dimensions.
    """
    pairs = torch.arange(head_dim // 2) * (wide_head_dim // head_dim)
    return torch.cat([pairs, pairs + wide_head_dim // 2])


def query_indices(heads: int, kv_heads: int, wide_group: int) -> tuple[Tensor, int]:
    """Places of query heads, so that each finds its own key-value head.

    Args:
        heads, kv_heads: of the model, A and K.
        wide_group: query heads per key-value head of the shape, G'.

    Returns:
        Index of every query head in the shape, [A] int64; copies of every key-value head, which lie
        side by side.
    """
    group = heads // kv_heads
    copies = -(-group // wide_group)
    head = torch.arange(heads)
    own, within = head // group, head % group
    return (own * copies + within // wide_group) * wide_group + within % wide_group, copies


def _fill_attention(source: Any, wide: Any) -> None:
    """One layer's projections; `source` and `wide` are attention modules."""
    config = source.config
    hidden, d, wide_d = config.hidden_size, source.head_dim, wide.head_dim
    heads, copies = query_indices(config.num_attention_heads, config.num_key_value_heads, wide.num_key_value_groups)
    kv_heads = torch.arange(config.num_key_value_heads * copies)
    rotary, plain = rotary_indices(d, wide_d), torch.arange(d)

    def rows(heads: Tensor, places: Tensor) -> Tensor:
        return (heads[:, None] * wide_d + places).flatten().to(wide.q_proj.weight.device)

    def copied(weight: Tensor) -> Tensor:  # [K D, H] -> [K copies D, H]
        return weight.view(config.num_key_value_heads, d, hidden).repeat_interleave(copies, 0).flatten(0, 1)

    q, k, v, o = (getattr(wide, f"{name}_proj").weight for name in "qkvo")
    q[rows(heads, torch.arange(wide_d))] = 0  # so that only the model's own dimensions count in q·k
    for weight, index, block in (
        (q, rows(heads, rotary), query_scale(d, wide_d) * source.q_proj.weight),
        (k, rows(kv_heads, rotary), copied(source.k_proj.weight)),
        (v, rows(kv_heads, plain), copied(source.v_proj.weight)),
    ):
        weight[index, :hidden] = block.to(weight)
    o[:hidden].index_copy_(1, rows(heads, plain), source.o_proj.weight.to(o))


def _fill_embeddings(model: LlamaForCausalLM, wide: LlamaForCausalLM, constant: float) -> None:
    """Token rows in and out; `constant` goes into the spare dimension of the rows of real tokens."""
    vocabulary, hidden = model.model.embed_tokens.weight.shape
    _put(wide.model.embed_tokens.weight[:vocabulary, :hidden], model.model.embed_tokens.weight)
    _put(wide.lm_head.weight[:vocabulary, :hidden], model.lm_head.weight)
    if constant:
        wide.lm_head.weight[vocabulary:, hidden] = -_PAD_WEIGHT
        # Tied, real rows also read the constant: the same small shift of all their logits, which
        # softmax ignores.
        wide.model.embed_tokens.weight[:vocabulary, hidden] = constant


def _fill_padding(wide: LlamaForCausalLM) -> None:
    """Zeros where padding must add nothing, small random numbers elsewhere; on any device alike."""
    noise = torch.rand(2**20, generator=torch.Generator().manual_seed(0))
    noise = (0.04 * (noise - 0.5)).to(wide.device, wide.dtype)
    for name, weight in wide.named_parameters():
        if name.split(".")[-2].endswith(_ZERO):
            weight.zero_()
        else:
            for part in weight.view(-1).split(len(noise)):
                part.copy_(noise[: len(part)])


def _put(into: Tensor, weight: Tensor) -> None:
    """Copy into a part of a wide weight, in its dtype and on its device."""
    into.copy_(weight)


def _empty_llama(
    model: LlamaForCausalLM, shape: Shape, eps: float, device: str | torch.device, dtype: torch.dtype
) -> LlamaForCausalLM:
    """A Llama of `shape` whose weights are allocated but not set."""
    old = model.config
    config = LlamaConfig(
        **asdict(shape),
        rms_norm_eps=eps,
        max_position_embeddings=max(CONTEXT, old.max_position_embeddings),
        rope_parameters=copy.deepcopy(old.rope_parameters),
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
        dtype=dtype,
    )
    with torch.device("meta"):
        wide = LlamaForCausalLM(config)
    torch.nn.Module.to(wide, dtype).to_empty(device=device)
    wide.tie_weights()  # to_empty gives each use of a shared weight its own memory
    wide.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # frequencies: not weights, and float32 always
    wide.generation_config = copy.deepcopy(model.generation_config)
    return wide


def _check_model(config: Any) -> None:
    plain = (
        config.model_type == "llama"
        and config.hidden_act == "silu"
        and not (config.attention_bias or config.mlp_bias)
        and config.rope_parameters["rope_type"] == "default"
    )
    if not plain:
        raise UserError(
            f"inflate() was given a {config.model_type} model; it takes a Llama with silu, without biases and with "
            "rotary positions of type 'default', such as those of the built-in pair."
        )


def _check_shape(config: Any, shape: Shape) -> None:
    """Refuse a shape that cannot hold a model."""
    for name in (field.name for field in fields(Shape) if field.name not in ("tie_word_embeddings", "head_dim")):
        has, given = getattr(config, name), getattr(shape, name)
        if given < has:
            raise UserError(f"{name} is {given}, but the model to be inflated has {has}: give at least {has}.")
    if shape.head_dim % config.head_dim:
        raise UserError(
            f"head_dim is {shape.head_dim}, no multiple of the model's {config.head_dim}: rotary frequencies would not "
            f"match. Give {config.head_dim}, {2 * config.head_dim} or another multiple."
        )
    group = shape.num_attention_heads // shape.num_key_value_heads
    _, copies = query_indices(config.num_attention_heads, config.num_key_value_heads, group)
    needed = config.num_key_value_heads * copies
    if shape.num_key_value_heads < needed:
        raise UserError(
            f"num_key_value_heads is {shape.num_key_value_heads} with {group} query heads each; the model's "
            f"{config.num_attention_heads} query heads need {needed} such groups. Give more heads of either kind."
        )
    if shape.vocab_size > config.vocab_size and shape.hidden_size == config.hidden_size:
        raise UserError(
            f"vocab_size {shape.vocab_size} pads the model's {config.vocab_size}, which takes one spare dimension, but "
            f"hidden_size is the model's own {config.hidden_size}: give at least {config.hidden_size + 1}."
        )
    if shape.tie_word_embeddings and not config.tie_word_embeddings:
        raise UserError("tie_word_embeddings is true, but the model's own embeddings are not tied: give false.")
