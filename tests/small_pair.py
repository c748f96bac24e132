"""A pair of random Llamas with a tokenizer: text in and out within milliseconds, no trained weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from decoding import ModelPair
from decoding.tiny import train_tokenizer


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level, so that any text can be read."""
    return train_tokenizer(iter(["def area(width, height):\n    return width * height\n\n\n"] * 4))


def small_pair(seed: int = 0) -> ModelPair:
    """Random target and draft; sharp enough for widths to matter."""
    tokenizer = small_tokenizer()
    torch_state = torch.get_rng_state()
    torch.manual_seed(seed)
    target = _llama(len(tokenizer), 16, 2, tokenizer.eos_token_id)
    draft = _llama(len(tokenizer), 8, 1, tokenizer.eos_token_id)
    torch.set_rng_state(torch_state)
    return ModelPair(target, draft, tokenizer, name="small")


def _llama(vocabulary: int, hidden: int, layers: int, eos: int) -> Any:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=eos,
    )
    return LlamaForCausalLM(config).eval()
