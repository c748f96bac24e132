"""EAGLE-3's training: the head is unrolled, so that it learns from its own features. 2503.01840."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from decoding.engine.feature_head import Attend, FeatureHead
from decoding.engine.sampled_head import SampledHead
from decoding.train_draft.fit import DraftModule, Guess, shifted
from decoding.train_draft.states import Seen, TargetStates


class Unrolling:
    """Keys and values while each place of some texts drafts a few tokens in a row: it attends to
    the past up to it, and to its own steps.

    Args:
        head: whose block attends.
        length: T of the texts.
        device: of them.
    """

    def __init__(self, head: Any, length: int, device: torch.device) -> None:
        self._head, self._places = head, torch.arange(length, device=device)[None]
        self._own = torch.eye(length, dtype=torch.bool, device=device)
        self._past = torch.ones_like(self._own).tril()
        self._seen: list[Tensor] = []  # [T, T] of each entry of `_keys`: the place of a row sees that of a column
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def attends(self, like: Tensor, ahead: int) -> Attend:
        """The block's attention at a step.

        Args:
            like: of the dtype of its states, [B, T, H].
            ahead: how far ahead of its place a token stands, as places are counted.
        """
        turned = self._head.rotary_emb(like, self._places + ahead)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, T, heads, D]
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *turned)
            self._seen.append(self._own if self._seen else self._past)
            self._keys.append(k)
            self._values.append(v.transpose(1, 2))
            groups = self._head.groups
            keys, values = (torch.cat(part, 2).repeat_interleave(groups, 1) for part in (self._keys, self._values))
            mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=torch.cat(self._seen, 1))
            return mixed.transpose(1, 2).flatten(2)

        return attend


def unrolled(head: FeatureHead | SampledHead, tokens: Tensor, features: Tensor, steps: int) -> Iterator[Tensor]:
    """Draft k = 1..steps tokens in a row, from every place.

    Features of the k-th are the head's own of the one before; only those of the first are the
    target's. A query sees the target's past up to its place, and its own steps since.

    Args:
        tokens: [B, T].
        features: fused states of the target at these tokens, [B, T, H].

    Yields:
        For each k, what the head gives, [B, T, ...]: at place i, what predicts token i + k + 1 from
        the tokens up to i + k. Places from T - k on are of no use.
    """
    unrolling = Unrolling(head, tokens.shape[1], tokens.device)
    for step in range(steps):
        embedded = F.embedding(shifted(tokens, 1 + step), head.embedding).to(features.dtype)
        given = head(embedded, features, unrolling.attends(features, step))
        yield given
        features = head.handed_on(given)


class HeadModule(DraftModule):
    """Fits a head, unrolled.

    Args:
        head: a `DraftHead`, new or one to go on with.
        states: of the texts.
        steps: tokens drafted in a row.
        options: as for `DraftModule`.
    """

    def __init__(self, head: Any, states: TargetStates, steps: int = 4, **options: Any) -> None:
        super().__init__(states, **options)
        self.head, self.steps = head, steps

    @property
    def token_ids(self) -> Tensor:
        """[Vd] the target's ids of the head's tokens."""
        return self.head.token_ids

    def losses(self, seen: Seen) -> Iterator[Guess]:
        """Draft `steps` tokens in a row from every place."""
        chances = self.target_chances(seen)
        features = self.head.fuse(seen.states.to(self.head.lm_head.weight.dtype))
        for step, states in enumerate(unrolled(self.head, seen.tokens, features, self.steps)):
            yield self.guess(seen, chances, self.head.logits(states).float(), 1 + step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say of what shape the head is; a shared embedding is no weight of it."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["head_shape"] = repr(self.head.shape)
