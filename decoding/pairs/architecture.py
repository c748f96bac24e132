"""Architecture of a transformers model: sizes, a sample of its weights, and which models are
refused, and why.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from decoding.engine.families import family_of
from decoding.errors import UserError

_SAMPLED = 64  # entries of each weight that a fingerprint holds
# Fields of configs of models that keep a state; not all of them name their kinds of layers.
_STATE = (
    *("state_size", "ssm_state_size", "mamba_d_state", "lru_width"),
    *("conv_kernel", "conv_L_cache", "rescale_every"),
)


def check_architecture(config: Any, role: str) -> None:
    """Refuse models whose keys and values cannot live in a flat buffer of slots (UserError)."""
    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"The {role} model ({kind}) is an encoder-decoder; this decoder needs a decoder-only causal LM such as "
            "Llama, Qwen or Mistral."
        )
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = set(getattr(text, "layer_types", None) or [])
    recurrent = layers - {"full_attention", "sliding_attention", "chunked_attention"}
    state = any(hasattr(text, name) for name in _STATE)
    if recurrent or state or not hasattr(text, "num_attention_heads"):
        what = f" (layers: {', '.join(sorted(recurrent))})" if recurrent else ""
        raise UserError(
            f"The {role} model ({kind}) keeps a recurrent state{what}, which cannot branch into a forest of beams; use "
            "a model whose layers are all attention."
        )
    unfit = family_of(config).unfit
    if unfit is not None:
        raise UserError(f"The {role} model ({kind}) cannot score a forest of beams: {unfit}.")


def text_config(model: Any) -> Any:
    """The config of a model's language part."""
    return model.config.get_text_config()


def vocab_size_of(model: Any) -> int:
    """Rows of a model's output."""
    return int(text_config(model).vocab_size)


def device_of(model: Any) -> torch.device:
    """The device of a model's weights."""
    return next(model.parameters()).device


def same_device(one: torch.device, other: torch.device) -> bool:
    """True for one place under two names: cuda is the current one of several GPUs."""
    if one.type != other.type:
        return False
    current = torch.cuda.current_device() if one.type == "cuda" else 0
    return (current if one.index is None else one.index) == (current if other.index is None else other.index)


def context_of(model: Any) -> int | None:
    """Tokens that a model takes; a chunk is a limit, and so is a length at which all angles of a
    model change.
    """
    text = text_config(model)
    limits = [getattr(text, "max_position_embeddings", None)]
    limits.append(getattr(text, "attention_chunk_size", None))
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings"))
    lengths = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(lengths) if lengths else None


def weight_sample(model: Any) -> bytes:
    """A model's sizes and a sample of every weight, to be hashed.

    Every weight, since a fine-tune may leave most of them as they were: merged adapters change
    projections only.
    """
    text = text_config(model)
    parts = [json.dumps([text.model_type, text.vocab_size, text.hidden_size, text.num_hidden_layers]).encode()]
    for weight in model.parameters():
        flat = weight.detach().flatten()
        sample = flat[:: -(-len(flat) // _SAMPLED) or 1].to(torch.bfloat16)
        parts.append(json.dumps(list(weight.shape)).encode() + sample.float().cpu().numpy().tobytes())
    return b"".join(parts)


def describe_model(model: Any) -> dict[str, Any]:
    """A model's type and sizes, for results and traces; JSON-able."""
    text = text_config(model)
    return {
        "type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
    }
