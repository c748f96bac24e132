"""EAGLE-3 heads as drafts, in the two file formats that people have them in. 2503.01840.

The original one names the block `midlayer`, that of the package speculators `layers.0`, with the
block's config nested in the head's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file

from decoding.engine.feature_head import FeatureHead, HeadShape, block_config, default_layers
from decoding.engine.placement import device_of, dtype_of
from decoding.errors import UserError, first_line
from decoding.forest.head_scorer import HeadScorer
from decoding.forest.node_scorer import NodeScorer, ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.pairs.architecture import text_config, weight_sample
from decoding.pairs.drafts.base import Draft, NamedKind

SHIPPED = Path(__file__).parent / "heads"  # heads that come with the package, by name
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_NEEDLESS = ("verifier_lm_head.", "verifier_norm.", "rotary_emb.", "lm_head.bias")
_USAGE = "eagle3:<directory or hub id> (an EAGLE-3 head of this target; eagle3:smollm2 comes with the package)"


class Eagle3Draft(Draft):
    """A head drafts from the target's hidden states.

    Args:
        head: put into evaluation mode.
        name: as users write it.
    """

    def __init__(self, head: FeatureHead, name: str = "eagle3") -> None:
        self.head = head.eval().requires_grad_(False)
        self._name = name
        self.hidden_size = int(head.config.hidden_size)
        self.target_layers = head.shape.layers

    @property
    def name(self) -> str:
        """The draft as users write it: `eagle3:` and where it came from."""
        return self._name

    def fingerprint(self) -> bytes:
        """Bytes of the head's sizes, of a sample of every weight, and of what it reads and
        proposes.
        """
        ids = self.head.token_ids.cpu().numpy().tobytes()
        return weight_sample(self.head) + repr(self.head.shape).encode() + ids

    def describe(self) -> dict[str, Any]:
        """Name, sizes and settings; JSON-able."""
        shape = self.head.shape
        head = {"draft_vocab_size": shape.draft_vocab_size, "layers": list(shape.layers)}
        head["parameters"] = sum(weight.numel() for weight in self.head.parameters())
        return {**super().describe(), "head": head}

    def scorer(self, target: ForestScorer, options: ScorerOptions) -> NodeScorer:
        """Passes of the head over its own forest cache; reads what the target's scorer keeps."""
        return HeadScorer(self.head, target, options)


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
    fields, weights = _fields(source), _weights(source)
    nested = fields.get("transformer_layer_config")
    block = block_config(nested if nested is not None else fields)
    _check(source, fields, block, weights, target)
    text = text_config(target)
    # Some checkpoints have no maps: their ids are the target's.
    draft_vocab_size = len(weights["lm_head.weight"])
    embedding = weights.get("embed_tokens.weight")
    shape = HeadShape(
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=int(text.hidden_size),
        layers=_layers(source, fields, int(text.num_hidden_layers)),
        norm_before_residual=bool(fields.get("norm_before_residual", False)),
        norm_before_fc=bool(fields.get("norm_before_fc", False)),
        fc_norm=bool(fields.get("fc_norm", False)),
        norm_output=bool(fields.get("norm_output", False)),
        qk_norm="midlayer.self_attn.q_norm.weight" in weights,
        own_embedding=embedding is not None,
    )
    lent = None if embedding is not None else target.get_input_embeddings().weight.detach()
    head = FeatureHead(block, shape, lent)
    if "d2t" not in weights:
        weights.pop("t2d", None)
    else:
        ids = torch.arange(draft_vocab_size) + weights["d2t"].long()
        if int(ids.min()) < 0 or int(ids.max()) >= block.vocab_size or len(ids.unique()) < len(ids):
            raise _unfit(source, "is damaged: its d2t does not name tokens of the target.")
        head.t2d.zero_()
        head.use_tokens(ids)
    own = head.state_dict()
    weights = {name: weight for name, weight in weights.items() if name not in ("d2t", "t2d")}
    wanted = {name: tuple(value.shape) for name, value in own.items() if name not in ("d2t", "t2d")}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if wanted != found:
        raise _unfit(source, f"does not fit: {_difference(wanted, found)}")
    head.load_state_dict(weights, strict=False)
    return head.to(device=device_of(target), dtype=dtype_of(target))


def save_head(head: FeatureHead, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a head in EAGLE-3's own format: config.json and model.safetensors.

    `load_head` and other engines read it back; a shared embedding is not written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    fields = head.config.to_diff_dict()
    for name, value in vars(head.shape).items():
        if name not in ("layers", "own_embedding", "qk_norm"):
            fields[name] = value
    fields |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(head.shape.layers), "use_aux_hidden_state": True},
    }
    state = head.state_dict()
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in state.items()}
    save_file({name: w.cpu().contiguous() for name, w in weights.items()}, folder / "model.safetensors.part")
    (folder / "model.safetensors.part").replace(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(fields, indent=2, default=str) + "\n")


def _fields(source: str | Path) -> dict[str, Any]:
    """The head's config.json."""
    path = _file(source, "config.json")
    if path is None:
        raise UserError(
            f"The head {str(source)!r} could not be loaded: it has no config.json. Give a directory with an EAGLE-3 "
            "head (config.json and model.safetensors), or a hub id that this machine can reach."
        )
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unfit(source, f"could not be loaded: config.json: {first_line(error)}.") from error
    if not isinstance(fields, dict):
        raise _unfit(source, "could not be loaded: config.json holds no settings.")
    kind = fields.get("speculators_model_type")
    if kind not in (None, "eagle3"):
        raise _unfit(source, f"is of the kind {kind!r}; of speculators, eagle3 is what is loaded.")
    return fields


def _weights(source: str | Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, under EAGLE-3's own names."""
    single, index = (_file(source, name) for name in _WEIGHTS)
    files = [single] if single else []
    if not files and index is not None:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [path for name in names if (path := _file(source, Path(name).name)) is not None]
    if not files:
        raise UserError(
            f"The head {str(source)!r} has no model.safetensors. Weights in pytorch_model.bin are not loaded, since a "
            "pickle can run code; convert them where you trust them, with torch.load and "
            "safetensors.torch.save_file, or take a repository that has safetensors."
        )
    weights = {}
    try:
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    weights[name] = opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise _unfit(source, f"could not be loaded: {first_line(error)}.") from error
    return {_renamed(name): w for name, w in weights.items() if not name.startswith(_NEEDLESS)}


def _renamed(name: str) -> str:
    """A weight's name in the original format."""
    return name.replace("layers.0.", "midlayer.", 1) if name.startswith("layers.0.") else name


def _file(source: str | Path, name: str) -> Path | None:
    """A file of a directory, or of a repository of the hub; None where there is none."""
    folder = Path(source).expanduser()
    if not folder.is_dir() and (SHIPPED / folder.name).is_dir() and str(source) == folder.name:
        folder = SHIPPED / folder.name
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if str(source).startswith(("/", "./", "../", "~")):
        raise _unfit(source, "could not be loaded: there is no such directory.")
    try:
        found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The head {str(source)!r} could not be loaded: {first_line(error)} Give a directory, or a hub id that "
            "this machine can reach."
        ) from error
    return None if found is None else Path(found)


def _layers(source: str | Path, fields: Mapping[str, Any], blocks: int) -> tuple[int, ...]:
    """Hidden states that the head reads: those that its config names, else EAGLE-3's own choice."""
    nested = fields.get("eagle_config") or {}
    named = fields.get("eagle_aux_hidden_state_layer_ids") or nested.get("eagle_aux_hidden_state_layer_ids")
    layers = tuple(int(layer) for layer in named) if named else default_layers(blocks)
    if not all(0 <= layer <= blocks for layer in layers):
        raise _unfit(source, f"reads layers {list(layers)}; its target has {blocks}.")
    return layers


def _check(
    source: str | Path, fields: Mapping[str, Any], block: Any, weights: Mapping[str, Tensor], target: Any
) -> None:
    """Refuse what is no EAGLE-3 head, or one of another target (UserError)."""
    text = text_config(target)
    if "fc.weight" not in weights or "lm_head.weight" not in weights:
        raise UserError(
            f"{str(source)!r} is no EAGLE-3 head: it has no weights fc and lm_head. Give a draft that is a model of "
            "its own without eagle3: in front."
        )
    if any(name.startswith("layers.1.") for name in weights) or int(block.num_hidden_layers) > 1:
        raise _unfit(source, f"has {block.num_hidden_layers} blocks; heads of one are loaded.")
    if block.vocab_size != text.vocab_size:
        raise _unfit(source, f"is of a target with {block.vocab_size} tokens; this one has {text.vocab_size}.")
    given = fields.get("target_hidden_size") or text.hidden_size
    if given != text.hidden_size:
        raise _unfit(source, f"reads states of {given} numbers; the target's have {text.hidden_size}.")
    if "embed_tokens.weight" not in weights and block.hidden_size != text.hidden_size:
        raise _unfit(
            source,
            f"is {block.hidden_size} wide and has no embedding of its own; the target's is {text.hidden_size} wide.",
        )


def _unfit(source: str | Path, what: str) -> UserError:
    """The sentence on a head that cannot be taken."""
    return UserError(f"The head {str(source)!r} {what} Give a whole EAGLE-3 head that was trained for this target.")


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first weight that lacks, is too many, or has another shape, in words."""
    for name, shape in wanted.items():
        if name not in found:
            return f"it has no weight {name}."
        if found[name] != shape:
            return f"{name} is {list(found[name])}, where its config and the target make it {list(shape)}."
    return f"it has a weight {next(name for name in found if name not in wanted)}, which nothing reads."


def _from_text(source: str | None, target: Any) -> Eagle3Draft | None:
    """The draft that `eagle3:<source>` names."""
    return Eagle3Draft(load_head(source, target), f"eagle3:{source}") if source else None


KIND = NamedKind("eagle3", _USAGE, _from_text)
