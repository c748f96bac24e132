"""EAGLE-3's training: the head is unrolled, so that it learns from its own features. 2503.01840."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from decoding.engine.feature_head import FeatureHead
from decoding.train_draft.fit import DraftModule, Guess
from decoding.train_draft.states import Seen, TargetStates


def unrolled(head: FeatureHead, tokens: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
    """Draft k = 1..steps tokens in a row, from every place.

    Features of the k-th are the head's own of the one before; only those of the first are the
    target's. A query sees the target's past up to its place, and its own steps since.

    Args:
        tokens: [B, T].
        features: fused states of the target at these tokens, [B, T, H].

    Yields:
        For each k, [B, T, H]: at place i, what predicts token i + k + 1 from the tokens up to i +
        k. Places
        from T - k on are of no use.
    """
    length, groups = tokens.shape[1], head.groups
    seen = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    own = torch.eye(length, dtype=torch.bool, device=tokens.device)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    places = torch.arange(length, device=tokens.device)[None]
    for step in range(steps):
        turned = head.rotary_emb(features, places + step)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, turned: Any = turned, mask: Tensor = seen
        ) -> Tensor:  # [B, T, heads, D]
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *turned)
            keys.append(k)
            values.append(v.transpose(1, 2))
            all_keys, all_values = (torch.cat(part, 2).repeat_interleave(groups, 1) for part in (keys, values))
            mixed = F.scaled_dot_product_attention(q, all_keys, all_values, attn_mask=mask)
            return mixed.transpose(1, 2).flatten(2)

        ahead = F.pad(tokens[:, 1 + step :], (0, min(1 + step, length)))[:, :length]
        features = head(F.embedding(ahead, head.embedding).to(features.dtype), features, attend)
        yield features
        seen = torch.cat([seen, own], 1)


class HeadModule(DraftModule):
    """Fits a head, unrolled.

    Args:
        head: new, or one to go on with.
        states: of the texts.
        steps: tokens drafted in a row.
        options: as for `DraftModule`.
    """

    def __init__(self, head: FeatureHead, states: TargetStates, steps: int = 4, **options: Any) -> None:
        super().__init__(states, **options)
        self.head, self.steps = head, steps

    @property
    def token_ids(self) -> Tensor:
        """[Vd] the target's ids of the head's tokens."""
        return self.head.token_ids

    def losses(self, seen: Seen) -> Iterator[Guess]:
        """Draft `steps` tokens in a row from every place."""
        chances = self.target_chances(seen)
        features = self.head.fuse(seen.states.to(self.head.fc.weight.dtype))
        for step, states in enumerate(unrolled(self.head, seen.tokens, features, self.steps)):
            yield self.guess(seen, chances, self.head.logits(states).float(), 1 + step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say of what shape the head is; a shared embedding is no weight of it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["head_shape"] = repr(self.head.shape)
