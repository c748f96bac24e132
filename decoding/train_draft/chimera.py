"""Chimera's training: from trigrams and the target's states, its next states and what follows.
2402.15758.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from decoding.engine.trigram_head import TOKENS, TrigramHead
from decoding.train_draft.eagle3 import HeadModule, Unrolling
from decoding.train_draft.fit import Guess, shifted
from decoding.train_draft.states import Seen

DISTILLATION = 1.0  # weight of the squared distance of states beside the cross entropy


def trigrams(tokens: Tensor) -> Tensor:
    """Each token behind the two before it, [B, T] -> [B, T, 3]; the first stands for what is not
    there.
    """
    first = tokens[:, :1].expand(-1, TOKENS - 1)
    return torch.cat([first, tokens], 1).unfold(1, TOKENS, 1)


def encoded(head: TrigramHead, tokens: Tensor, states: Tensor, steps: int) -> Iterator[Tensor]:
    """Draft k = 1..steps tokens in a row, from every place.

    A query sees the target's states up to its place, and the encodings of its own tokens since.

    Args:
        tokens: [B, T].
        states: the target's last at these tokens, [B, T, H].

    Yields:
        For each k, [B, T, H]: at place i, what stands for the target's state at token i + k, and
        predicts token i + k + 1. Places from T - k on are of no use.
    """
    unrolling = Unrolling(head, tokens.shape[1], tokens.device)
    block = head.midlayer  # keys and values of the target's states are what the steps read
    block.self_attn(block.input_layernorm(states), unrolling.attends(states, 0))
    encodings = head.encode(trigrams(tokens))
    for ahead in range(1, steps + 1):
        yield head(shifted(encodings, ahead), unrolling.attends(states, ahead))


class ChimeraModule(HeadModule):
    """Fits a `TrigramHead`.

    Args:
        head, states, steps, options: as for `HeadModule`.
    """

    def losses(self, seen: Seen) -> Iterator[Guess]:
        """Draft `steps` tokens in a row from every place."""
        chances = self.target_chances(seen)
        theirs = seen.states[:, :, 0].to(self.head.lm_head.weight.dtype)
        for step, given in enumerate(encoded(self.head, seen.tokens, theirs, self.steps)):
            entropy, logits, counts, ahead = self.guess(seen, chances, self.head.logits(given).float(), 1 + step)
            distance = F.mse_loss(given.float(), shifted(theirs, ahead).float(), reduction="none").mean(-1)
            yield entropy + DISTILLATION * distance, logits, counts, ahead
