"""Heads over the target's states: what the drafts of all kinds of heads share, and their files.

A head is a directory, or a repository of the hub, with config.json and model.safetensors; pickled
weights are not loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils.hub import cached_file

from decoding.engine.feature_head import DraftHead, HeadShape, block_config
from decoding.engine.placement import device_of, dtype_of
from decoding.errors import UserError, first_line
from decoding.forest.head_scorer import HeadScorer
from decoding.forest.node_scorer import NodeScorer, ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.pairs.architecture import text_config, weight_sample
from decoding.pairs.drafts.base import Draft
from decoding.support.files import write_whole

SHIPPED = Path(__file__).parent / "heads"  # heads that come with the package, by name
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_MAPS = ("d2t", "t2d")


class HeadDraft(Draft):
    """A head drafts from the target's hidden states.

    Args:
        head: put into evaluation mode.
        name: as users write it; None: the kind's.
    """

    kind: ClassVar[str]  # how users name the kind
    scored_by: ClassVar[type[HeadScorer]] = HeadScorer

    def __init__(self, head: DraftHead, name: str | None = None) -> None:
        self.head = head.eval().requires_grad_(False)
        self._name = name or self.kind
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
        return self.scored_by(self.head, target, options)


@dataclass(frozen=True)
class HeadFiles:
    """The files of one head.

    Args:
        source: a directory, a hub id, or the name of a head that comes with the package.
        label: of the kind, in sentences.
    """

    source: str | Path
    label: str

    def fields(self) -> dict[str, Any]:
        """The head's config.json."""
        path = self._file("config.json")
        if path is None:
            raise UserError(
                f"The head {str(self.source)!r} could not be loaded: it has no config.json. Give a directory with a "
                f"head of {self.label} (config.json and model.safetensors), or a hub id that this machine can reach."
            )
        try:
            fields = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise self.unfit(f"could not be loaded: config.json: {first_line(error)}.") from error
        if not isinstance(fields, dict):
            raise self.unfit("could not be loaded: config.json holds no settings.")
        return fields

    def weights(self) -> dict[str, Tensor]:
        """All weights of the checkpoint, by name."""
        single, index = (self._file(name) for name in _WEIGHTS)
        files = [single] if single else []
        if not files and index is not None:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [path for name in names if (path := self._file(Path(name).name)) is not None]
        if not files:
            raise UserError(
                f"The head {str(self.source)!r} has no model.safetensors. Weights in pytorch_model.bin are not loaded, "
                "since a pickle can run code; convert them where you trust them, with torch.load and "
                "safetensors.torch.save_file, or take a repository that has safetensors."
            )
        weights = {}
        try:
            for file in files:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        weights[name] = opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise self.unfit(f"could not be loaded: {first_line(error)}.") from error
        return weights

    def check(self, fields: Mapping[str, Any], block: Any, target: Any) -> None:
        """Refuse a head of another target (UserError)."""
        text = text_config(target)
        if block.vocab_size != text.vocab_size:
            raise self.unfit(f"is of a target with {block.vocab_size} tokens; this one has {text.vocab_size}.")
        given = fields.get("target_hidden_size") or text.hidden_size
        if given != text.hidden_size:
            raise self.unfit(f"reads states of {given} numbers; the target's have {text.hidden_size}.")

    def filled(self, head: DraftHead, weights: Mapping[str, Tensor], target: Any) -> Any:
        """A head with the weights of the checkpoint, on the target's device and in its dtype."""
        if "d2t" in weights:  # some checkpoints have no maps: their ids are the target's
            ids = torch.arange(head.shape.draft_vocab_size) + weights["d2t"].long()
            if int(ids.min()) < 0 or int(ids.max()) >= head.config.vocab_size or len(ids.unique()) < len(ids):
                raise self.unfit("is damaged: its d2t does not name tokens of the target.")
            head.t2d.zero_()
            head.use_tokens(ids)
        found = {name: weight for name, weight in weights.items() if name not in _MAPS}
        wanted = {name: tuple(value.shape) for name, value in head.state_dict().items() if name not in _MAPS}
        shapes = {name: tuple(value.shape) for name, value in found.items()}
        if wanted != shapes:
            raise self.unfit(f"does not fit: {_difference(wanted, shapes)}")
        head.load_state_dict(found, strict=False)
        return head.to(device=device_of(target), dtype=dtype_of(target))

    def unfit(self, what: str) -> UserError:
        """The sentence on a head that cannot be taken."""
        return UserError(
            f"The head {str(self.source)!r} {what} Give a whole head of {self.label} that was trained for this target."
        )

    def _file(self, name: str) -> Path | None:
        """A file of a directory, or of a repository of the hub; None where there is none."""
        source = self.source
        folder = Path(source).expanduser()
        if not folder.is_dir() and (SHIPPED / folder.name).is_dir() and str(source) == folder.name:
            folder = SHIPPED / folder.name
        if folder.is_dir():
            return folder / name if (folder / name).is_file() else None
        if str(source).startswith(("/", "./", "../", "~")):
            raise self.unfit("could not be loaded: there is no such directory.")
        try:
            found = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"The head {str(source)!r} could not be loaded: {first_line(error)} Give a directory, or a hub id that "
                "this machine can reach."
            ) from error
        return None if found is None else Path(found)


def load_own(kind: type[DraftHead], label: str, source: str | Path, target: Any) -> Any:
    """A head of a paper that has no file format of its own, as `save_own` writes it.

    Args:
        kind: its class, which config.json names.
        label: of the kind, in sentences.
        source: the directory, or a hub id.
        target: the model that it drafts for; lends its embedding.

    Raises:
        UserError: not there, of another kind, damaged, or a head of another target.
    """
    files = HeadFiles(source, label)
    fields = files.fields()
    if fields.get("architectures") != [kind.__name__]:
        raise files.unfit(f"is of the kind {fields.get('architectures')}, where {kind.__name__} must be.")
    weights = files.weights()
    told = {"draft_vocab_size", "layers"} - fields.keys()
    if told:
        raise files.unfit(f"is damaged: its config.json has no {min(told)}.")
    block = block_config(fields)
    files.check(fields, block, target)
    shape = HeadShape(int(fields["draft_vocab_size"]), int(text_config(target).hidden_size), tuple(fields["layers"]))
    head = kind(block, shape, target.get_input_embeddings().weight.detach())
    return files.filled(head, weights, target)


def save_own(head: DraftHead, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a head that `load_own` reads."""
    shape = head.shape
    told = {"draft_vocab_size": shape.draft_vocab_size, "target_hidden_size": shape.target_hidden_size}
    write_head(head, directory, {"architectures": [type(head).__name__], **told, "layers": list(shape.layers)}, dtype)


def write_head(head: DraftHead, directory: str | Path, fields: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write config.json, the block's settings and others, and model.safetensors; a shared embedding
    is not written.
    """
    folder = Path(directory)
    weights = {name: w.to(dtype) if w.is_floating_point() else w for name, w in head.state_dict().items()}
    write_whole(folder / "model.safetensors", save({name: w.cpu().contiguous() for name, w in weights.items()}))
    told = {**head.config.to_diff_dict(), **fields}
    write_whole(folder / "config.json", json.dumps(told, indent=2, default=str).encode() + b"\n")


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first weight that lacks, is too many, or has another shape, in words."""
    for name, shape in wanted.items():
        if name not in found:
            return f"it has no weight {name}."
        if found[name] != shape:
            return f"{name} is {list(found[name])}, where its config and the target make it {list(shape)}."
    return f"it has a weight {next(name for name in found if name not in wanted)}, which nothing reads."
