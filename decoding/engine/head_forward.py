"""HeadForward: a forest pass of a `FeatureHead`, in few operations, as `FusedForward` runs models;
`BlockForward`: what the passes of all heads share.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.engine.feature_head import DraftHead, FeatureHead
from decoding.engine.forward import PassInputs, PassOutput
from decoding.engine.fused import (
    FusedForward,
    FusedStore,
    Norm,
    after,
    joined,
    linear,
    pairs_together,
    residual,
    rows_reordered,
)
from decoding.engine.watch import Watch


class BlockForward(FusedForward):
    """A pass of a head's one block: what kinds of heads share.

    Args:
        head: its block is `midlayer`.
    """

    @torch.no_grad()
    def __init__(self, head: DraftHead) -> None:
        config, attention = head.config, head.midlayer.self_attn
        self._heads, self._kv_heads = int(config.num_attention_heads), int(config.num_key_value_heads or 0)
        self._dim, self._scale = attention.head_dim, attention.head_dim**-0.5
        self._embedding, self._rotary = head.embedding, head.rotary_emb
        self._layers, self._slides = [None], [False]  # what the store asks for
        self._before = Norm(head.midlayer.input_layernorm)
        order = pairs_together(self._dim)
        norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        q_norm, k_norm = (norm.weight[order] if norm is not None else None for norm in norms)
        self._turning: Any = SimpleNamespace(q_norm=q_norm, k_norm=k_norm, norm=self._before)
        self._out = residual(attention.o_proj.weight, attention.o_proj.bias)
        self._mlp_norm = Norm(head.midlayer.post_attention_layernorm)
        self._watch = Watch([head])

    def _projections(self, attention: Any) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values in one weight and bias, in the order that turns fastest."""
        order = pairs_together(self._dim)
        turned = [rows_reordered(attention.q_proj, order), rows_reordered(attention.k_proj, order)]
        return joined([*turned, (attention.v_proj.weight, attention.v_proj.bias)])

    def _mixed(self, qkv: Tensor, inputs: PassInputs, store: FusedStore) -> Tensor:
        """Write keys and values, and attend; [T, (heads + 2 kv heads) * D] -> [T, heads * D]."""
        group = self._heads // self._kv_heads
        mask = torch.cat([inputs.mask] * group, 2) if group > 1 else inputs.mask
        turns = store.turns.index_select(0, inputs.positions)[:, None]
        queries = self._turned(qkv, turns, self._turning)
        store.buffers[0].index_copy_(0, inputs.slots, qkv[:, self._heads * self._dim :])
        if inputs.pad is not None:
            queries = queries.index_select(0, inputs.pad)
        mixed = self._attend(queries, *store.views(inputs)[0], mask)
        return mixed if inputs.unpad is None else mixed.index_select(0, inputs.unpad)


class HeadForward(BlockForward):
    """Runs a head; a pass needs `features` of its tokens.

    Its output's `hidden` are what the logits are of, its `states` [T, 1, H] the features to hand
    on.
    """

    name = "head"

    @torch.no_grad()
    def __init__(self, head: FeatureHead) -> None:
        super().__init__(head)
        block, mlp = head.midlayer, head.midlayer.mlp
        self._shape, self._hidden = head.shape, Norm(block.hidden_norm)
        self._qkv = after([self._before, self._hidden], *self._projections(block.self_attn))
        gate_up, gate_up_bias = joined(
            [(mlp.gate_proj.weight, mlp.gate_proj.bias), (mlp.up_proj.weight, mlp.up_proj.bias)]
        )
        self._gate_up = self._mlp_norm.then(gate_up, gate_up_bias)
        self._down = residual(mlp.down_proj.weight, mlp.down_proj.bias)
        self._norm = Norm(head.norm)
        self._head = self._norm.then(head.lm_head.weight, None)
        self._fc = linear(head.fc.weight, None)
        self._fuse_norms = head.fuse if head.shape.fc_norm or head.shape.norm_before_fc else None

    def fuse(self, states: Tensor) -> Tensor:
        """Fuse hidden states, as `FeatureHead.fuse` does."""
        return self._fc(states.flatten(-2)) if self._fuse_norms is None else self._fuse_norms(states)

    def _pass(self, inputs: PassInputs, store: FusedStore) -> PassOutput:
        assert inputs.features is not None, "a head reads features"
        features = inputs.features
        embedded = F.embedding(inputs.tokens, self._embedding)
        qkv = self._qkv(torch.cat([self._before(embedded), self._hidden(features)], -1))
        mixed = self._mixed(qkv, inputs, store)
        above = self._hidden.whole(features) if self._shape.norm_before_residual else features.clone()
        states = self._out(mixed, above)
        gate, up = self._gate_up(self._mlp_norm(states)).chunk(2, -1)
        states = self._down(F.silu(gate).mul_(up), states)
        kept = self._normed(states) if self._shape.norm_output else states
        read = states[-1:] if inputs.last_only else states
        logits = self._head(self._norm(read))
        return PassOutput(logits, self._normed(read) if inputs.hidden else None, kept[:, None])
