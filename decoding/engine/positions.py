"""Positions in a forest pass: layers that see a window only, and the ALiBi bias of any slot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # rotary angles that depend on the position alone


def window_of(config: Any) -> int | None:
    """Tokens that a sliding layer sees, the query's own among them; None where no layer slides."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    return window if window and any(sliding_layers(config)) else None


def sliding_layers(config: Any) -> list[bool]:
    """For each layer, true if it sees a window only."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return [kind == "sliding_attention" for kind in kinds[:count]]
    slides = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return [bool(slides)] * count


@contextmanager
def alibi_by_position(
    model: Any,
    mask: Tensor,  # [rows, 1, N, S] additive
    key_positions: Tensor,  # [rows, S] int64
) -> Iterator[Tensor]:
    """Within the block, the model's layers see `mask`, and a bias by `key_positions`: of tokens,
    not of slots.

    Models with ALiBi make the bias themselves, for keys in order, from a 2-D mask. They are given
    such a mask, and for the time of a pass hooks on their blocks hand on the forest's mask and the
    bias gathered by position. Softmax does not see what is added to all keys of a query alike, so
    slope * (position of the key) is enough; the models count on that too.

    Yields:
        The attention mask to call the model with: ones, [rows, S].
    """
    given: dict[str, Tensor] = {}  # the same for all layers: made once, when the first is called

    def hand_on(block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if not given:
            given.update(_by_position(model.config, kwargs["alibi"], mask, key_positions))
        return args, {**kwargs, **given}

    handles = [block.register_forward_pre_hook(hand_on, with_kwargs=True) for block in model.transformer.h]
    try:
        yield torch.ones_like(key_positions)
    finally:
        for handle in handles:
            handle.remove()


def _by_position(config: Any, alibi: Tensor, mask: Tensor, key_positions: Tensor) -> dict[str, Tensor]:
    """The model's own bias of keys 0, 1, ..., S - 1 -> that of the tokens in the slots, rounded as
    the model rounds.
    """
    rows, read = key_positions.shape
    heads = alibi.numel() // (rows * read)
    # Dead slots may hold positions beyond the slots read; nobody sees them.
    index = key_positions.clamp(max=read - 1)[:, None, None].expand(-1, heads, -1, -1)  # [rows, heads, 1, S]
    bias = alibi.view(rows, heads, 1, read).gather(3, index)
    if config.model_type == "falcon":  # its mask holds the bias as well, divided as the scores are
        hidden = torch.finfo(mask.dtype).min
        mask = (bias / math.sqrt(config.hidden_size // heads)).masked_fill(mask < 0, hidden)
    return {"alibi": bias.view_as(alibi), "attention_mask": mask}
