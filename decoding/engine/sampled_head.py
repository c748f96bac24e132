"""SampledHead: FSPAD's draft, one block that reads sampled features and gives two of its own.
2408.15562.

*Feature sampling*: a target's state stands for all tokens that may follow; in a space as wide as
the block's MLP, the embedding of the token that did follow says what of the state counts. *Partial
alignment*: a token has two vectors; one is handed on and learns to be the target's next state, the
other gives the logits and is free to be surer than that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from decoding.engine.feature_head import Attend, ContextBlock, DraftHead, HeadShape
from decoding.engine.forward import PassInputs, PassOutput
from decoding.engine.fused import FusedStore, Norm, linear, residual
from decoding.engine.head_forward import BlockForward


class _Gated(nn.Module):
    """A gated projection from H over the block's MLP width to `out`."""

    def __init__(self, config: LlamaConfig, out: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, out, bias=False)

    def forward(self, gate: Tensor, states: Tensor) -> Tensor:
        """Let through what the gate lets through; [..., H] both -> [..., out]."""
        return self.down_proj(F.silu(self.gate_proj(gate)) * self.up_proj(states))


class _Sampler(nn.Module):
    """Feature sampling: a token's embedding and the state before it become the block's input."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _Gated(config, config.hidden_size)

    def forward(self, embedded: Tensor, features: Tensor) -> Tensor:
        """[..., H] both -> [..., H]."""
        both = self.fc(torch.cat([embedded, features], -1))
        return both + self.mlp(embedded, self.norm(both))


def _two_vectors(config: LlamaConfig) -> nn.Module:
    return _Gated(config, 2 * config.hidden_size)


class SampledHead(DraftHead):
    """FSPAD's head; its features are states of the target as they are.

    Args:
        config, shape, embedding: as for `DraftHead`; the shape has one layer.
    """

    def __init__(self, config: LlamaConfig, shape: HeadShape, embedding: Tensor | None = None) -> None:
        super().__init__(config, shape, embedding)
        self.sampler = _Sampler(config)
        self.midlayer = ContextBlock(config, shape, _two_vectors)
        self.lm_head = nn.Linear(config.hidden_size, shape.draft_vocab_size, bias=False)

    def fuse(self, states: Tensor) -> Tensor:
        """Features of the target's hidden states: themselves, [..., 1, H] -> [..., H]."""
        return states.squeeze(-2)

    def forward(self, embedded: Tensor, features: Tensor, attend: Attend) -> Tensor:
        """The block.

        Args:
            embedded, features, attend: as for `FeatureHead`.

        Returns:
            What the logits are of, and what is handed on, side by side, [..., T, 2 H].
        """
        block, states = self.midlayer, self.sampler(embedded, features)
        states = states + block.self_attn(block.input_layernorm(states), attend)
        normed = block.post_attention_layernorm(states)
        return torch.cat([states, states], -1) + block.mlp(normed, normed)

    def handed_on(self, features: Tensor) -> Tensor:
        """Give what stands for the target's states, [..., H], of what `forward` gave."""
        return features[..., self.config.hidden_size :]

    def logits(self, features: Tensor) -> Tensor:
        """[..., 2 H] as `forward` gave them -> [..., Vd]."""
        return self.lm_head(features[..., : self.config.hidden_size])


class SampledForward(BlockForward):
    """Runs a `SampledHead`, as `HeadForward` does a `FeatureHead`."""

    name = "sampled"

    @torch.no_grad()
    def __init__(self, head: SampledHead) -> None:
        super().__init__(head)
        sampler, mlp = head.sampler, head.midlayer.mlp
        self._sampler_norm = Norm(sampler.norm)
        self._fc = linear(sampler.fc.weight, None)
        self._gate = linear(sampler.mlp.gate_proj.weight, None)
        self._up = self._sampler_norm.then(sampler.mlp.up_proj.weight, None)
        self._sampled = residual(sampler.mlp.down_proj.weight, None)
        self._qkv = self._before.then(*self._projections(head.midlayer.self_attn))
        self._gate_up = self._mlp_norm.then(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), None)
        self._down = residual(mlp.down_proj.weight, None)
        self._head = linear(head.lm_head.weight, None)
        self._width = head.config.hidden_size

    def fuse(self, states: Tensor) -> Tensor:
        """Fuse hidden states, as `SampledHead.fuse` does."""
        return states.squeeze(-2)

    def _pass(self, inputs: PassInputs, store: FusedStore) -> PassOutput:
        assert inputs.features is not None, "a head reads features"
        embedded = F.embedding(inputs.tokens, self._embedding)
        both = self._fc(torch.cat([embedded, inputs.features], -1))
        gated = F.silu(self._gate(embedded)).mul_(self._up(self._sampler_norm(both)))
        states = self._sampled(gated, both)
        states = self._out(self._mixed(self._qkv(self._before(states)), inputs, store), states)
        gate, up = self._gate_up(self._mlp_norm(states)).chunk(2, -1)
        twice = self._down(F.silu(gate).mul_(up), torch.cat([states, states], -1))
        read = twice[-1:, : self._width] if inputs.last_only else twice[:, : self._width]
        logits = self._head(read.contiguous())
        return PassOutput(logits, read if inputs.hidden else None, twice[:, None, self._width :])
