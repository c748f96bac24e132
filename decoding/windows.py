"""Sliding windows: which layers of a model see only the end of a path, as its config says."""

from __future__ import annotations

from typing import Any


def window_of(config: Any) -> int | None:
    """Tokens that a sliding layer sees, the query's own among them; None where no layer slides."""
    text = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    return window if window and any(sliding_layers(config)) else None


def sliding_layers(config: Any) -> list[bool]:
    """Of each layer, whether it sees a window only."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    if kinds:
        return [kind == "sliding_attention" for kind in kinds[:count]]
    slides = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return [bool(slides)] * count
