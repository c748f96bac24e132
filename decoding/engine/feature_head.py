"""FeatureHead: EAGLE-3's draft, one block over the target's hidden states. 2503.01840. `DraftHead`:
what it shares with the heads of other papers.

At a token it reads the token's embedding and a feature of the token before: three hidden states of
the target, fused, where the target has scored that token; what the head itself gave there where it
has not. It gives a feature, and from it the logits of the next token over a vocabulary of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeadShape:
    """Sizes and settings of a head, beside those of its block.

    Args:
        draft_vocab_size: Vd, rows of its output.
        target_hidden_size: of the states that it reads.
        layers: the target's hidden states that it reads, numbered as transformers numbers them.
        norm_before_residual: the block's residual is the normalised feature, not the feature.
        norm_before_fc: the fused states are normalised together first.
        fc_norm: each of them is, alone.
        norm_output: the feature that is handed on is the normalised one, which the logits are of.
        qk_norm: queries and keys are normalised by head, as Qwen 3's are.
        own_embedding: it has an embedding of its own, not the target's.
    """

    draft_vocab_size: int
    target_hidden_size: int
    layers: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    qk_norm: bool = False
    own_embedding: bool = False


class HeadAttention(nn.Module):
    """Projections of a head's block.

    Args:
        config: of the block.
        width: of what they read.
        qk_norm: as for `HeadShape`.
    """

    def __init__(self, config: LlamaConfig, width: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.head_dim, kv_heads = int(config.head_dim or 0), int(config.num_key_value_heads or 0)
        bias = bool(config.attention_bias)
        self.q_proj = nn.Linear(width, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=bias)
        if qk_norm:
            self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, read: Tensor, attend: Attend) -> Tensor:
        """Let states mix what they attend to, [..., T, width] -> [..., T, H]."""
        q, k, v = (
            projection(read).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attend(q, k, v))


class _Block(nn.Module):
    """The head's one block."""

    def __init__(self, config: LlamaConfig, shape: HeadShape) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)  # of embeddings
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)  # of features
        self.self_attn = HeadAttention(config, 2 * config.hidden_size, shape.qk_norm)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = LlamaMLP(config)


class ContextBlock(nn.Module):
    """A block that reads its own width, as Llama's does.

    Args:
        config, shape: as for `DraftHead`.
        mlp: makes what follows the attention.
    """

    def __init__(self, config: LlamaConfig, shape: HeadShape, mlp: Callable[[LlamaConfig], nn.Module]) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = HeadAttention(config, config.hidden_size, shape.qk_norm)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp(config)


class DraftHead(nn.Module):
    """One block over hidden states of a target, with a vocabulary of its own.

    Args:
        config: of the block; its `vocab_size` is the target's.
        shape: the rest.
        embedding: the target's, [V, H]; None for a head with its own.

    Attributes:
        d2t: [Vd] int64, what to add to an id of the head to have the target's.
        t2d: [V] bool, the target's tokens that it can propose.
    """

    midlayer: Any  # the block
    lm_head: nn.Linear
    embed_tokens: nn.Embedding  # of heads with an embedding of their own
    d2t: Tensor
    t2d: Tensor

    def __init__(self, config: LlamaConfig, shape: HeadShape, embedding: Tensor | None = None) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self._shared = None if embedding is None else (embedding,)  # no weight of the head's own
        self.register_buffer("d2t", torch.zeros(shape.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.use_tokens(torch.arange(shape.draft_vocab_size))

    @classmethod
    def for_target(cls, target: Any, draft_vocab_size: int, layers: tuple[int, ...] | None = None) -> Self:
        """A new head of random weights in the shape of a target's own blocks, with its
        embedding.
        """
        text = target.config.get_text_config()
        config = LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=1,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            max_position_embeddings=text.max_position_embeddings,
            rms_norm_eps=getattr(text, "rms_norm_eps", 1e-5),
            rope_parameters=dict(getattr(text, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 1e4}),
        )
        chosen = layers or cls.layers_of(text.num_hidden_layers)
        shape = HeadShape(min(draft_vocab_size, text.vocab_size), text.hidden_size, chosen)
        return cls(config, shape, target.get_input_embeddings().weight.detach())

    @staticmethod
    def layers_of(blocks: int) -> tuple[int, ...]:
        """The hidden states that it reads of a target of so many blocks: what the target's own head
        reads.
        """
        return (blocks,)

    @property
    def embedding(self) -> Tensor:
        """[V, H], its own or the target's."""
        return self.embed_tokens.weight if self._shared is None else self._shared[0]

    @property
    def groups(self) -> int:
        """Heads of queries that share one of keys and values."""
        return int(self.config.num_attention_heads) // int(self.config.num_key_value_heads or 1)

    @property
    def token_ids(self) -> Tensor:
        """[Vd] the target's ids of the tokens that it can propose."""
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def use_tokens(self, ids: Tensor) -> None:
        """Propose these of the target's tokens, [Vd] rising."""
        self.d2t.copy_(ids.to(self.d2t) - torch.arange(len(ids), device=self.d2t.device))
        self.t2d.zero_()[ids.to(self.t2d.device)] = True


class FeatureHead(DraftHead):
    """EAGLE-3's head, named as its checkpoints name it.

    Args:
        config, shape, embedding: as for `DraftHead`.
    """

    def __init__(self, config: LlamaConfig, shape: HeadShape, embedding: Tensor | None = None) -> None:
        super().__init__(config, shape, embedding)
        width, states = config.hidden_size, len(shape.layers) * shape.target_hidden_size
        self.fc = nn.Linear(states, width, bias=False)
        if shape.norm_before_fc:
            self.input_norm = LlamaRMSNorm(states, config.rms_norm_eps)
        if shape.fc_norm:
            norms = [LlamaRMSNorm(shape.target_hidden_size, config.rms_norm_eps) for _ in shape.layers]
            self.fc_norm = nn.ModuleList(norms)
        self.midlayer = _Block(config, shape)
        self.norm = LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, shape.draft_vocab_size, bias=False)
        if shape.own_embedding:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)

    @staticmethod
    def layers_of(blocks: int) -> tuple[int, ...]:
        """EAGLE-3's own choice of hidden states."""
        return default_layers(blocks)

    def fuse(self, states: Tensor) -> Tensor:
        """Features of the target's hidden states, [..., K, Ht] -> [..., H]."""
        if self.shape.fc_norm:
            normed = [norm(part) for norm, part in zip(self.fc_norm, states.unbind(-2), strict=True)]
            states = torch.stack(normed, -2)
        flat = states.flatten(-2)
        return self.fc(self.input_norm(flat) if self.shape.norm_before_fc else flat)

    def forward(self, embedded: Tensor, features: Tensor, attend: Attend) -> Tensor:
        """The block.

        Args:
            embedded: of tokens, [..., T, H].
            features: of the tokens before them, [..., T, H].
            attend: (queries [..., T, heads, D], keys and values [..., T, kv heads, D], all not yet
                turned by their positions) -> what they mix, [..., T, heads * D].

        Returns:
            Features of the tokens, [..., T, H]: what `logits` reads, and what is handed on.
        """
        block = self.midlayer
        normed = block.hidden_norm(features)
        both = torch.cat([block.input_layernorm(embedded), normed], -1)
        states = (normed if self.shape.norm_before_residual else features) + block.self_attn(both, attend)
        states = states + block.mlp(block.post_attention_layernorm(states))
        return self.norm(states) if self.shape.norm_output else states

    def handed_on(self, features: Tensor) -> Tensor:
        """Give what stands for the target's fused states, [..., H], of what `forward` gave: the
        same.
        """
        return features

    def logits(self, features: Tensor) -> Tensor:
        """[..., H] as `forward` gave them -> [..., Vd]."""
        return self.lm_head(features if self.shape.norm_output else self.norm(features))


def default_layers(blocks: int) -> tuple[int, ...]:
    """The hidden states that EAGLE-3 reads of a target of so many blocks: low, middle and high."""
    return (2, blocks // 2, blocks - 3) if blocks >= 6 else tuple(sorted({1, (blocks + 1) // 2, blocks}))


def block_config(fields: Mapping[str, Any]) -> LlamaConfig:
    """The block's config out of a checkpoint's."""
    known = {name: value for name, value in fields.items() if name not in ("model_type", "architectures", "dtype")}
    config = LlamaConfig(**known)
    config.head_dim = fields.get("head_dim") or config.hidden_size // config.num_attention_heads
    return config
