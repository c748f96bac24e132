"""States: what a head learns from of each text, read from the target once and kept while there is
room.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from decoding.engine.placement import device_of
from decoding.train_draft.text import Document

_ROWS = 1024  # of the target's whole output at a time


class Seen(NamedTuple):
    """Texts side by side, padded on the right."""

    tokens: Tensor  # [B, T] int64
    lengths: Tensor  # [B]
    starts: Tensor  # [B] where what the target wrote begins
    states: Tensor  # [B, T, K, H] hidden states of the head's layers
    last: Tensor  # [B, T, H] what the target's own head reads
    mass: Tensor  # [B, T] float32, log of the sum of the exponentials of its logits


class TargetStates:
    """Reads texts with the target.

    Args:
        target: a causal LM, frozen.
        layers: hidden states to give, numbered as transformers numbers them.
        texts: by number.
        room: bytes of states that are kept on the target's device; the rest is computed again every
            time.
    """

    def __init__(self, target: Any, layers: tuple[int, ...], texts: Sequence[Document], room: float = 4e9) -> None:
        self.target, self._layers, self._texts, self._room = target, layers, texts, room
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, numbers: Sequence[int]) -> Seen:
        """States of some texts."""
        device = device_of(self.target)
        texts = [self._texts[number] for number in numbers]
        longest = max(len(text.tokens) for text in texts)
        tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text.tokens)] = text.tokens.long()
        lengths = torch.tensor([len(text.tokens) for text in texts], device=device)
        starts = torch.tensor([text.start for text in texts], device=device)
        new = [number for number in numbers if number not in self._kept]
        if new:
            self._keep(numbers, tokens.to(device))
        found = [self._kept[number] for number in numbers]
        parts = [torch.nn.utils.rnn.pad_sequence([row[i] for row in found], batch_first=True) for i in range(3)]
        seen = Seen(tokens.to(device), lengths, starts, parts[0], parts[1], parts[2])
        if self._room < 0:  # what was kept before stays
            for number in new:
                self._room += _bytes(self._kept.pop(number))
        return seen

    def _keep(self, numbers: Sequence[int], tokens: Tensor) -> None:
        output = self.target(
            input_ids=tokens, output_hidden_states=True, use_cache=False, logits_to_keep=1, return_dict=True
        )
        chosen = [output.hidden_states[layer] for layer in self._layers]
        states = torch.stack(chosen, 2) if chosen else output.hidden_states[-1][:, :, None, :0]
        last = output.hidden_states[-1]
        mass = self._mass(last)
        for row, number in enumerate(numbers):
            if number in self._kept:
                continue
            length = len(self._texts[number].tokens)
            kept = states[row, :length].clone(), last[row, :length].clone(), mass[row, :length].clone()
            self._kept[number] = kept
            self._room -= _bytes(kept)

    def _mass(self, last: Tensor) -> Tensor:
        head = self.target.get_output_embeddings()
        rows = last.flatten(0, 1).split(_ROWS)
        return torch.cat([head(part).float().logsumexp(-1) for part in rows]).view(last.shape[:2])


def _bytes(parts: Sequence[Tensor]) -> int:
    return sum(part.nbytes for part in parts)
