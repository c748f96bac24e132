"""EAGLE-3 heads as drafts, in the two file formats that people have them in. 2503.01840.

The original one names the block `midlayer`, that of the package speculators `layers.0`, with the
block's config nested in the head's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from decoding.engine.feature_head import FeatureHead, HeadShape, block_config, default_layers
from decoding.errors import UserError
from decoding.pairs.architecture import text_config
from decoding.pairs.drafts.base import NamedKind
from decoding.pairs.drafts.head import HeadDraft, HeadFiles, write_head

_NEEDLESS = ("verifier_lm_head.", "verifier_norm.", "rotary_emb.", "lm_head.bias")
_USAGE = "eagle3:<directory or hub id> (an EAGLE-3 head of this target; eagle3:smollm2 comes with the package)"


class Eagle3Draft(HeadDraft):
    """A `FeatureHead` drafts.

    Args:
        head, name: as for `HeadDraft`.
    """

    kind: ClassVar[str] = "eagle3"


def load_head(source: str | Path, target: Any) -> FeatureHead:
    """A head from a directory or the hub, in either format, on the target's device and in its
    dtype.

    Args:
        source: the directory, a hub id, or the name of a head that comes with the package.
        target: the model that it drafts for; lends its embedding to a head without one.

    Raises:
        UserError: not there, in a format that is not read (pickled weights are none), damaged, or a
        head of
            another target.
    """
    files = HeadFiles(source, "EAGLE-3")
    fields = files.fields()
    kind = fields.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise files.unfit(f"is of the kind {kind!r}; of speculators, eagle3 is what is loaded.")
    weights = {_renamed(name): w for name, w in files.weights().items() if not name.startswith(_NEEDLESS)}
    nested = fields.get("transformer_layer_config")
    block = block_config(nested if nested is not None else fields)
    _check(files, fields, block, weights, target)
    text = text_config(target)
    embedding = weights.get("embed_tokens.weight")
    shape = HeadShape(
        draft_vocab_size=len(weights["lm_head.weight"]),
        target_hidden_size=int(text.hidden_size),
        layers=_layers(files, fields, int(text.num_hidden_layers)),
        norm_before_residual=bool(fields.get("norm_before_residual", False)),
        norm_before_fc=bool(fields.get("norm_before_fc", False)),
        fc_norm=bool(fields.get("fc_norm", False)),
        norm_output=bool(fields.get("norm_output", False)),
        qk_norm="midlayer.self_attn.q_norm.weight" in weights,
        own_embedding=embedding is not None,
    )
    lent = None if embedding is not None else target.get_input_embeddings().weight.detach()
    return files.filled(FeatureHead(block, shape, lent), weights, target)


def save_head(head: FeatureHead, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a head in EAGLE-3's own format: config.json and model.safetensors.

    `load_head` and other engines read it back; a shared embedding is not written.
    """
    told = {name: v for name, v in vars(head.shape).items() if name not in ("layers", "own_embedding", "qk_norm")}
    fields = {
        **told,
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(head.shape.layers), "use_aux_hidden_state": True},
    }
    write_head(head, directory, fields, dtype)


def _renamed(name: str) -> str:
    """A weight's name in the original format."""
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def _layers(files: HeadFiles, fields: Mapping[str, Any], blocks: int) -> tuple[int, ...]:
    """Hidden states that the head reads: those that its config names, else EAGLE-3's own choice."""
    nested = fields.get("eagle_config") or {}
    named = fields.get("eagle_aux_hidden_state_layer_ids") or nested.get("eagle_aux_hidden_state_layer_ids")
    layers = tuple(int(layer) for layer in named) if named else default_layers(blocks)
    if not all(0 <= layer <= blocks for layer in layers):
        raise files.unfit(f"reads layers {list(layers)}; its target has {blocks}.")
    return layers


def _check(files: HeadFiles, fields: Mapping[str, Any], block: Any, weights: Mapping[str, Tensor], target: Any) -> None:
    """Refuse what is no EAGLE-3 head, or one of another target (UserError)."""
    if "fc.weight" not in weights or "lm_head.weight" not in weights:
        raise UserError(
            f"{str(files.source)!r} is no EAGLE-3 head: it has no weights fc and lm_head. Give a draft that is a model "
            "of its own without eagle3: in front."
        )
    if any(name.startswith("layers.1.") for name in weights) or int(block.num_hidden_layers) > 1:
        raise files.unfit(f"has {block.num_hidden_layers} blocks; heads of one are loaded.")
    files.check(fields, block, target)
    width = int(text_config(target).hidden_size)
    if "embed_tokens.weight" not in weights and block.hidden_size != width:
        raise files.unfit(f"is {block.hidden_size} wide and has no embedding of its own; the target's is {width} wide.")


def _from_text(source: str | None, target: Any) -> Eagle3Draft | None:
    """The draft that `eagle3:<source>` names."""
    return Eagle3Draft(load_head(source, target), f"eagle3:{source}") if source else None


KIND = NamedKind("eagle3", _USAGE, _from_text)
