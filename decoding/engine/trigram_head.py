"""TrigramHead: Chimera's draft, three tokens in place of the target's lower layers and one block in
place of the others. 2402.15758.

The *trigram encoder* makes a state of a token and the two before it. The *full-context encoder*,
one block, reads it beside the target's last states of all tokens that the target has scored, and
the trigrams of those since. A *residual head* gives the logits. The paper has a head for each of
the next tokens; here drafted tokens are read one by one, and the first head is enough.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from decoding.engine.feature_head import Attend, ContextBlock, DraftHead, HeadShape
from decoding.engine.forward import PassInputs, PassOutput
from decoding.engine.fused import FusedStore, linear, residual
from decoding.engine.head_forward import BlockForward

TOKENS = 3  # that an encoding reads


class _Residual(nn.Module):
    """x + silu(W x), the identity at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, states: Tensor) -> Tensor:
        """[..., width] both ways."""
        return states + F.silu(self.linear(states))


class _Trigram(nn.Module):
    """The trigram encoder."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = _Residual(TOKENS * width)
        self.fc = nn.Linear(TOKENS * width, width, bias=False)

    def forward(self, embedded: Tensor) -> Tensor:
        """[..., 3 H] -> [..., H]."""
        return self.fc(self.block(embedded))


class TrigramHead(DraftHead):
    """Chimera's head.

    Args:
        config, shape, embedding: as for `DraftHead`; the shape has one layer.
    """

    def __init__(self, config: LlamaConfig, shape: HeadShape, embedding: Tensor | None = None) -> None:
        super().__init__(config, shape, embedding)
        self.trigram = _Trigram(config.hidden_size)
        self.midlayer = ContextBlock(config, shape, LlamaMLP)
        self.residual = _Residual(config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, shape.draft_vocab_size, bias=False)

    def encode(self, trigrams: Tensor) -> Tensor:
        """Encode each token with the two before it, [..., 3] int64 -> [..., H]."""
        embedded = F.embedding(trigrams, self.embedding).flatten(-2)
        return self.trigram(embedded.to(self.lm_head.weight.dtype))

    def forward(self, states: Tensor, attend: Attend) -> Tensor:
        """The full-context encoder.

        Args:
            states: encodings, or the target's states, [..., T, H].
            attend: as for `FeatureHead`.

        Returns:
            What stands for the target's last states of the tokens, [..., T, H].
        """
        block = self.midlayer
        states = states + block.self_attn(block.input_layernorm(states), attend)
        return states + block.mlp(block.post_attention_layernorm(states))

    def logits(self, states: Tensor) -> Tensor:
        """[..., H] as `forward` gave them -> [..., Vd]."""
        return self.lm_head(self.residual(states))


class TrigramForward(BlockForward):
    """Runs a `TrigramHead`; a pass needs `features`: of each of its tokens what `encode` gives, or
    the target's state.
    """

    name = "trigram"

    @torch.no_grad()
    def __init__(self, head: TrigramHead) -> None:
        super().__init__(head)
        mlp: Any = head.midlayer.mlp
        self._tripled = residual_block(head.trigram.block)
        self._encoded = linear(head.trigram.fc.weight, None)
        self._qkv = self._before.then(*self._projections(head.midlayer.self_attn))
        self._gate_up = self._mlp_norm.then(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), None)
        self._down = residual(mlp.down_proj.weight, None)
        self._last = residual_block(head.residual)
        self._head = linear(head.lm_head.weight, None)

    def encode(self, trigrams: Tensor) -> Tensor:
        """Encode tokens, as `TrigramHead.encode` does."""
        return self._encoded(self._tripled(F.embedding(trigrams, self._embedding).flatten(-2)))

    def _pass(self, inputs: PassInputs, store: FusedStore) -> PassOutput:
        assert inputs.features is not None, "a head reads features"
        states = inputs.features
        states = self._out(self._mixed(self._qkv(self._before(states)), inputs, store), states.clone())
        gate, up = self._gate_up(self._mlp_norm(states)).chunk(2, -1)
        states = self._down(F.silu(gate).mul_(up), states)
        read = self._last(states[-1:] if inputs.last_only else states)
        return PassOutput(self._head(read), read if inputs.hidden else None)


def residual_block(block: _Residual) -> Any:
    """A `_Residual` with its weight laid out for this device; [T, width] both ways."""
    inside = linear(block.linear.weight, None)
    return lambda states: states + F.silu(inside(states))
