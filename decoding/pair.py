"""ModelPair: a target and what drafts for it; loading, checks, description."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from decoding.config import DecodingConfig
from decoding.drafts import ALLOWED, DraftScorer, is_kind, named_draft
from decoding.errors import UserError
from decoding.families import family_of
from decoding.lookup import NgramDraft, NgramScorer
from decoding.probe import check_forest_pass
from decoding.runner import ENGINES
from decoding.scorer import ForestScorer
from decoding.vocabulary import VocabularyMap, match_vocabularies

_SAMPLED = 64  # entries of each weight that a fingerprint holds
_DTYPES = ("auto", "float32", "bfloat16", "float16")
# Fields of configs of models that keep a state; not all of them name their kinds of layers.
_STATE = (
    *("state_size", "ssm_state_size", "mamba_d_state", "lru_width"),
    *("conv_kernel", "conv_L_cache", "rescale_every"),
)


@dataclass
class ModelPair:
    """A transformers causal LM and its draft.

    Args:
        target: a model in hand.
        draft: another one; "layers:8", the target's own first layers; "ngram" or "ngram:4", what followed the same
            tokens before; None where only the target is used.
        tokenizer: the target's, for text in and out; None if you work with token ids.
        name: shown in results.
        engine: how the models are run: "auto", passes fused where the family is known, and CUDA graphs on a GPU;
            "eager", without graphs; "transformers", the models' own forward.
        note: what a reader of results must know about the pair; shown with them.
        draft_tokenizer: the draft's. With both, tokens are matched by their strings, so that the draft may know fewer
            of them, under other ids; without, ids mean the same as far as both models have them.

    Attributes:
        vocabulary: the draft's token ids as the target's; None where they are the same.
        draft_name: "model", or what `draft` was as text; None without one.

    Raises:
        UserError: a model that cannot be decoded with a forest cache, a draft with tokens that the target lacks, or a
            draft that does not exist.
    """

    target: Any
    draft: Any
    tokenizer: Any = None
    name: str = "custom"
    engine: str = "auto"
    note: str = ""
    draft_tokenizer: Any = None
    vocabulary: VocabularyMap | None = field(default=None, init=False, repr=False)
    draft_name: str | None = field(default=None, init=False)
    _fingerprint: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise UserError(f"engine is {self.engine!r}; choose one of {', '.join(ENGINES)}.")
        for role, model in (("target", self.target), ("draft", self.draft)):
            if not (hasattr(model, "config") or (role == "draft" and isinstance(model, str | NgramDraft | None))):
                kinds = f", or {ALLOWED}" if role == "draft" else ""
                raise UserError(f"{role} is {model!r}; give a causal language model of transformers, loaded{kinds}.")
        check_architecture(self.target.config, "target")
        self.target.eval()
        self.draft_name = None if self.draft is None else "model"
        if isinstance(self.draft, str):
            self.draft, self.draft_name = named_draft(self.draft, self.target)
        elif isinstance(self.draft, NgramDraft):
            self.draft_name = self.draft.name
        elif self.draft is not None:
            check_architecture(self.draft.config, "draft")
            self.draft.eval()
            draft_size = int(self.draft.config.get_text_config().vocab_size)
            found = match_vocabularies(self.vocab_size, draft_size, self.tokenizer, self.draft_tokenizer)
            self.vocabulary = found.to(_device_of(self.draft)) if found is not None else None

    @classmethod
    def tiny(cls, device: str = "cpu", engine: str = "auto", draft: str | None = None) -> ModelPair:
        """The built-in pair: offline, on the CPU by default, trained by `python -m decoding.tiny`.

        `draft` as for the class, instead of the pair's own: "layers:2", "ngram".
        """
        from decoding.tiny import load_tiny

        _check_device(device)
        target, small, tokenizer = load_tiny()
        torch.nn.Module.to(target, device)
        torch.nn.Module.to(small, device)
        return cls(target, draft or small, tokenizer, name=_name("tiny", draft), engine=engine)

    @classmethod
    def inflated(
        cls,
        target_size: str | Mapping[str, Any] = "8b",
        draft_size: str | Mapping[str, Any] = "1b",
        device: str = "cuda",
        dtype: str = "bfloat16",
        engine: str = "auto",
        draft: str | None = None,
    ) -> ModelPair:
        """The built-in pair in models of real size: its distributions, and so its acceptance, at their cost.

        A cost model of a size, not trained models of it: the text is the built-in pair's, and means nothing beyond the
        512 tokens that it was trained for. Nothing is downloaded or stored.

        Args:
            target_size, draft_size: names in `decoding.inflate.SHAPES`, or mappings with the fields of `Shape`.
            device: as for `load`.
            dtype: "bfloat16", "float16" or "float32".
            engine: how the models are run, as for the class.
            draft: "ngram" or "ngram:4" instead of a model of `draft_size`. Not "layers:8": the layers that a size adds
                do nothing, so an early exit would guess far better than a real one of its cost.

        Raises:
            UserError: unknown sizes, sizes that cannot hold the built-in models, or too little memory on the GPU.
        """
        from decoding.inflate import inflate, shape_of
        from decoding.tiny import load_tiny

        if dtype not in _DTYPES[1:]:
            raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES[1:])}.")
        if draft is not None and not draft.startswith("ngram"):
            raise UserError(f"draft is {draft!r}; an inflated pair takes ngram, ngram:N, or null for draft_size.")
        try:
            _check_device(device)
        except UserError as error:
            small = "pair.target_size=400m pair.draft_size=68m pair.device=cpu pair.dtype=float32"
            raise UserError(f"{error} On a CPU choose small sizes: {small}.") from error
        sizes = (target_size,) if draft else (target_size, draft_size)
        shapes = [shape_of(size) for size in sizes]
        names = [size if isinstance(size, str) else "custom" for size in sizes]
        if shapes[0].vocab_size != shapes[-1].vocab_size:
            raise UserError(
                f"target_size {names[0]} has {shapes[0].vocab_size} tokens, draft_size {names[1]} has "
                f"{shapes[1].vocab_size}: choose two sizes with one vocabulary, such as 8b and 1b, or 13b and 68m."
            )
        kind = getattr(torch, dtype)
        _check_memory(sum(shape.parameters for shape in shapes) * kind.itemsize, device)
        target, model, tokenizer = load_tiny()
        wide = [inflate(model, shape, device, kind) for model, shape in zip((target, model), shapes, strict=False)]
        note = (
            f"The built-in pair in the shapes {' and '.join(names)}: a model of what these sizes cost, not trained "
            "models of these sizes. Acceptance and text are the built-in pair's; draft=layers:N says nothing."
        )
        name = _name("-".join(["inflated", *names]), draft)
        return cls(wide[0], draft or wide[1], tokenizer, name=name, engine=engine, note=note)

    @classmethod
    def load(
        cls,
        target: str,
        draft: str,
        device: str = "cuda",
        dtype: str = "bfloat16",
        trust_remote_code: bool = False,
        name: str | None = None,
        engine: str = "auto",
        **options: Any,
    ) -> ModelPair:
        """Load a pair from the Hugging Face hub or from local directories.

        Args:
            target, draft: hub ids or paths; `draft` may also be "layers:8", "ngram" or "ngram:4", as for the class.
            device: "cuda", "cuda:1", "cpu", ...
            dtype: "bfloat16", "float16", "float32" or "auto".
            trust_remote_code: run code that comes with a checkpoint; off unless you ask for it.
            name: shown in results; the target's name if absent.
            engine: how the models are run, as for the class.
            options: passed to `from_pretrained` (for instance attn_implementation).

        Raises:
            UserError: what cannot be loaded, and why.
        """
        if dtype not in _DTYPES:
            raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(_DTYPES)}.")
        _check_device(device)
        sources = {"target": target} if _comes_without_model(draft) else {"target": target, "draft": draft}
        models, tokenizers = {}, {}
        for role, source in sources.items():
            config = _from_hub(AutoConfig, source, role, trust_remote_code=trust_remote_code)
            check_architecture(config, role)
            models[role] = _from_hub(
                AutoModelForCausalLM,
                source,
                role,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **options,
            ).to(device)
        for role, source in sources.items():
            tokenizers[role] = _from_hub(AutoTokenizer, source, role, trust_remote_code=trust_remote_code)
        return cls(
            models["target"],
            models.get("draft", draft),
            tokenizers["target"],
            name or _name(Path(target).name, draft if "draft" not in sources else None),
            engine,
            draft_tokenizer=tokenizers.get("draft"),
        )

    def with_draft(self, draft: Any) -> ModelPair:
        """The same target with another draft, as for the class."""
        return ModelPair(self.target, draft, self.tokenizer, self.name, self.engine, self.note)

    def draft_scorer(self, rows: int, longest_prompt: int, spare_slots: int, **options: Any) -> DraftScorer:
        """What scores nodes for the draft; arguments as for ForestScorer."""
        if isinstance(self.draft, NgramDraft):
            known = {name: options[name] for name in ("temperature", "top", "process") if name in options}
            return NgramScorer(self.draft, rows, self.vocab_size, device=self.device, **known)
        return ForestScorer(
            self.draft, rows, longest_prompt, spare_slots, **options, engine=self.engine, vocabulary=self.vocabulary
        )

    def check_forest_passes(self) -> None:
        """Make sure, once, that both models score forests as they score sequences (UserError otherwise)."""
        for role, model in self.models.items():
            check_forest_pass(model, role, self.engine)

    @property
    def models(self) -> dict[str, Any]:
        """The models by role: "target", and "draft" where the draft is one."""
        drafts = self.draft is not None and not isinstance(self.draft, NgramDraft)
        return {"target": self.target} | ({"draft": self.draft} if drafts else {})

    @property
    def device(self) -> torch.device:
        """Where the target lives."""
        return _device_of(self.target)

    @property
    def vocab_size(self) -> int:
        """Rows of the target's output."""
        return int(self.target.config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """Longest sequence that both models take, in tokens; None where they do not say."""
        limits = [_context_of(model) for model in self.models.values()]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    @property
    def fingerprint(self) -> str:
        """Hash of both models' sizes, of a sample of every weight and of how ids are matched; equal for equal pairs.

        Every weight, since a fine-tune may leave most of them as they were: merged adapters change projections only.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for model in self.models.values():
                text = model.config.get_text_config()
                shape = [text.model_type, text.vocab_size, text.hidden_size, text.num_hidden_layers]
                digest.update(json.dumps(shape).encode())
                for weight in model.parameters():
                    flat = weight.detach().flatten()
                    sample = flat[:: -(-len(flat) // _SAMPLED) or 1].to(torch.bfloat16)
                    digest.update(json.dumps(list(weight.shape)).encode() + sample.float().cpu().numpy().tobytes())
            if isinstance(self.draft, NgramDraft):
                digest.update(self.draft.name.encode())
            if self.vocabulary is not None:
                digest.update(self.vocabulary.digest)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """What the pair is, for results, traces and controllers; JSON-able."""
        return {
            "name": self.name,
            **({"note": self.note} if self.note else {}),
            "fingerprint": self.fingerprint,
            "draft": self.draft_name,
            **({"vocabulary": self.vocabulary.describe()} if self.vocabulary is not None else {}),
            "vocab_size": self.vocab_size,
            "device": str(self.device),
            "dtype": str(next(self.target.parameters()).dtype).removeprefix("torch."),
            "models": {
                role: {
                    "type": model.config.model_type,
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "hidden_size": model.config.get_text_config().hidden_size,
                    "layers": model.config.get_text_config().num_hidden_layers,
                }
                for role, model in self.models.items()
            },
        }


def check_architecture(config: Any, role: str) -> None:
    """Refuse models whose keys and values cannot live in a flat buffer of slots."""
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


def check_prompt(pair: ModelPair, prompt: list[int], config: DecodingConfig, index: int) -> None:
    """Refuse an empty prompt, foreign token ids, and what would not fit the models' contexts."""
    if not prompt:
        raise UserError(f"Prompt {index} is empty; give at least one token (for instance the BOS token).")
    worst = max(prompt) if min(prompt) >= 0 else min(prompt)
    if not 0 <= worst < pair.vocab_size:
        raise UserError(
            f"Prompt {index} holds token id {worst}, outside the vocabulary of {pair.vocab_size} (0 to "
            f"{pair.vocab_size - 1}). Was it made with another tokenizer?"
        )
    for role, model in pair.models.items():
        limit = _context_of(model)
        if limit is not None and len(prompt) + config.max_new_tokens > limit:
            raise UserError(
                f"Prompt {index} has {len(prompt)} tokens and max_new_tokens is {config.max_new_tokens}, together more "
                f"than the {role} model's context of {limit}. Shorten the prompt or lower max_new_tokens."
            )


def end_tokens(pair: ModelPair, config: DecodingConfig) -> frozenset[int]:
    """Token ids that end a hypothesis."""
    ids = config.eos_token_id
    if ids is None:
        generation = getattr(pair.target, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        if ids is None:
            ids = pair.target.config.eos_token_id
    if ids is None or ids == -1:
        return frozenset()
    ends = frozenset(ids if isinstance(ids, list | tuple) else [ids])
    if config.eos_token_id is not None and (unknown := sorted(end for end in ends if end >= pair.vocab_size)):
        raise UserError(
            f"eos_token_id holds {', '.join(map(str, unknown))}; the target knows the ids 0 to {pair.vocab_size - 1}. "
            "Give some of these, null for the model's own, or -1 to never stop."
        )
    return ends


def _context_of(model: Any) -> int | None:
    """Tokens that one model takes; a chunk is a limit, and so is a length at which all angles of a model change."""
    text = model.config.get_text_config()
    limits = [getattr(text, "max_position_embeddings", None)]
    limits.append(getattr(text, "attention_chunk_size", None))
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        limits.append(rope.get("original_max_position_embeddings"))
    known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known) if known else None


def _check_device(device: str) -> None:
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device is {device!r}; give cpu, cuda, or one of several GPUs as in cuda:1.") from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {device!r} but this machine has no CUDA device; set pair.device=cpu.")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {device!r} but this machine has {torch.cuda.device_count()}, counted from cuda:0.")


def _check_memory(needed: int, device: str) -> None:
    """Refuse weights of `needed` bytes that do not fit a GPU."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise UserError(
                f"The pair's weights take {needed / 1e9:.1f} GB, but {device} has {free / 1e9:.1f} GB free; choose "
                "smaller sizes, or a 16-bit dtype."
            )


def _device_of(model: Any) -> torch.device:
    return next(model.parameters()).device


def _name(base: str, draft: str | None) -> str:
    """A pair's name that tells drafts apart and can be a directory's: tiny, tiny-layers2."""
    return base if draft is None else f"{base}-{draft.replace(':', '')}"


def _comes_without_model(draft: str) -> bool:
    """Whether a text names a draft that is not loaded; what looks like one and is not is refused."""
    if is_kind(draft):
        return True
    if re.fullmatch(r"\w+:\w*", draft) and not Path(draft).exists():
        raise UserError(f"draft is {draft!r}; give a directory written by save_pretrained, a hub id, or {ALLOWED}.")
    return False


def _from_hub(loader: Any, source: str, role: str, **options: Any) -> Any:
    """`from_pretrained` with a clear sentence when it fails."""
    if source.startswith(("/", "./", "../", "~")) and not Path(source).is_dir():
        raise UserError(f"The {role} model {source!r} could not be loaded: there is no such directory.")
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        first = reason[0] if reason else type(error).__name__
        raise UserError(
            f"The {role} model {source!r} could not be loaded: {first} Give a directory written by save_pretrained, or "
            "a hub id that this machine can reach (pair.target=..., pair.draft=...)."
        ) from error
