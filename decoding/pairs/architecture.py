"""Architecture of a transformers model: sizes, a sample of its weights, and which models are
refused, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from decoding.engine.families import family_of, has_alibi
from decoding.engine.positions import STATIC_ROPE
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
    chosen = layers & {"indexed_attention", "compressed_sparse_attention", "heavily_compressed_attention"}
    if chosen:
        raise UserError(
            f"The {role} model ({kind}) chooses or compresses the tokens that it attends to (layers: "
            f"{', '.join(sorted(chosen))}), which no mask over a forest of beams can follow; use a model whose layers "
            "attend to all tokens, or to a window of them."
        )
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


def context_of(model: Any) -> int | None:
    """Tokens that a model was made for, its scaled positions counted; None where it does not say."""
    limit, made_for = limit_of(model), getattr(text_config(model), "max_position_embeddings", None)
    if not isinstance(made_for, int) or made_for <= 0:
        return limit
    for rope in _ropes(model):
        factor = rope.get("factor") or 1.0
        made_for = max(made_for, int(factor * rope.get("original_max_position_embeddings", made_for)))
    return made_for if limit is None else min(made_for, limit)


def limit_of(model: Any) -> int | None:
    """Tokens beyond which a model cannot be run, or not with keys that are cached; None without
    end.

    A chunk of attention is a limit, a table of positions, and a length at which all angles change.
    Angles that depend on a token's position alone go on without end, as ALiBi does: that a model
    was not trained so far is for its user to judge, as in transformers' `generate`.
    """
    text = text_config(model)
    ropes = _ropes(model)
    limits = [getattr(text, "attention_chunk_size", None)]
    if not has_alibi(text) and not (ropes and all(rope.get("rope_type", "default") in STATIC_ROPE for rope in ropes)):
        limits.append(getattr(text, "max_position_embeddings", None))
    limits += [r.get("original_max_position_embeddings") for r in ropes if r.get("rope_type") == "longrope"]
    lengths = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(lengths) if lengths else None


def _ropes(model: Any) -> list[Mapping[str, Any]]:
    """The rotary positions of a model, of each kind of layer where these differ."""
    rope = getattr(text_config(model), "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or ([rope] if rope else [])


def weight_sample(model: Any) -> bytes:
    """A model's sizes and a sample of every weight, to be hashed.

    Every weight, since a fine-tune may leave most of them as they were: merged adapters change
    projections only.
    """
    text = text_config(model)
    parts = [json.dumps([text.model_type, text.vocab_size, text.hidden_size, text.num_hidden_layers]).encode()]
    for name, whole in model.named_parameters():
        for weight in _parts(_loaded(model, name, whole.detach())):
            flat = weight.flatten()
            sample = flat[:: -(-len(flat) // _SAMPLED) or 1].to(torch.bfloat16)
            parts.append(json.dumps(list(weight.shape)).encode() + sample.float().cpu().numpy().tobytes())
    return b"".join(parts)


def _loaded(model: Any, name: str, weight: Any) -> Any:
    """A weight that is offloaded, from where it waits; any other itself."""
    if not weight.is_meta:
        return weight
    module, _, leaf = name.rpartition(".")
    return model.get_submodule(module)._hf_hook.weights_map[leaf]


def _parts(weight: Any) -> Iterator[Any]:
    """The plain tensors that a packed weight is made of; a plain one itself."""
    names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else ()
    if not names:
        yield weight
    for name in names:
        yield from _parts(getattr(weight, name))


def describe_model(model: Any) -> dict[str, Any]:
    """A model's type and sizes, for results and traces; JSON-able."""
    text = text_config(model)
    return {
        "type": model.config.model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden_size": text.hidden_size,
        "layers": text.num_hidden_layers,
    }
