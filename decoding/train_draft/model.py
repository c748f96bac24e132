"""A small language model distilled from its target, with the target's tokens: sequence-level text
that
the target wrote, and its distribution at every place of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from decoding.train_draft.fit import DraftModule, Guess
from decoding.train_draft.states import Seen, TargetStates


class ModelModule(DraftModule):
    """Fits a small model; its vocabulary is the target's.

    Args:
        model: new, or one to go on with.
        states: of the texts.
        options: as for `DraftModule`.
    """

    _ids: Tensor

    def __init__(self, model: LlamaForCausalLM, states: TargetStates, **options: Any) -> None:
        super().__init__(states, **options)
        self.model = model
        self.register_buffer("_ids", torch.arange(model.config.vocab_size), persistent=False)  # moves along

    @property
    def token_ids(self) -> Tensor:
        """[V] all of the target's ids."""
        return self._ids

    def losses(self, seen: Seen) -> Iterator[Guess]:
        """Guess the next token at every place; padding stands on the right, where no place sees
        it.
        """
        logits = self.model(input_ids=seen.tokens, use_cache=False).logits.float()
        yield self.guess(seen, self.target_chances(seen), logits, 0)


def small_model(target: Any, hidden_size: int, layers: int) -> LlamaForCausalLM:
    """A new model of random weights, with the target's vocabulary, context and end tokens."""
    text = target.config.get_text_config()
    heads = max(1, hidden_size // 64)
    config = LlamaConfig(
        vocab_size=text.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=text.max_position_embeddings,
        tie_word_embeddings=True,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
    )
    return LlamaForCausalLM(config)
