"""Drafts, a file for each kind; and which draft a model, a text or a `Draft` stands for.

In text: `layers:8`, the target's own first layers; `ngram` or `ngram:4`, what followed the same
tokens before; `eagle3:<directory>`, `fspad:...` and `chimera:...`, heads over the target's states;
`mine.Bigram`, a class of anybody's own. `ngram+` in front of another of these mixes n-grams into
what it proposes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from decoding.engine.vocabulary import match_vocabularies
from decoding.errors import UserError
from decoding.forest.node_scorer import NodeScorer, ScorerOptions
from decoding.pairs.architecture import check_architecture, text_config, vocab_size_of
from decoding.pairs.drafts import chimera, eagle3, early_layers, fspad, ngram
from decoding.pairs.drafts.base import Draft
from decoding.pairs.drafts.mixed import MixedDraft
from decoding.pairs.drafts.model import ModelDraft
from decoding.support.names import is_dotted, locate

__all__ = [
    "ALLOWED",
    "Draft",
    "MixedDraft",
    "ModelDraft",
    "NodeScorer",
    "ScorerOptions",
    "draft_of",
    "is_named",
    "named_draft",
]

# Drafts that come without a checkpoint.
KINDS = {kind.prefix: kind for kind in (early_layers.KIND, ngram.KIND, eagle3.KIND, fspad.KIND, chimera.KIND)}
_OWN = "mine.Bigram (a Draft of your own, by its dotted name)"
_BESIDE = re.compile(r"(ngram(?::\d{1,6})?)\+(.+)", re.DOTALL)
ALLOWED = ", ".join([*(kind.usage for kind in KINDS.values()), _OWN]) + ", or ngram+ in front of another of these"


def is_named(text: str) -> bool:
    """True if a text names a draft that comes without a checkpoint of its own."""
    beside = _BESIDE.fullmatch(text)
    if beside is not None:
        return is_named(beside[2])
    return text.partition(":")[0] in KINDS or (is_dotted(text) and not Path(text).exists())


def named_draft(text: str, target: Any) -> Draft:
    """The draft that a text names.

    Args:
        text: `layers:8`, `ngram`, `ngram:4`; the dotted name of a `Draft`, which is called with the
            target; or `ngram+layers:8`, `ngram:4+mine.Bigram` for both at once.
        target: the model that it drafts for.

    Raises:
        UserError: another text, a number that cannot be, or a dotted name of something else.
    """
    beside = _BESIDE.fullmatch(text)
    if beside is not None:
        ngrams = named_draft(beside[1], target)
        assert isinstance(ngrams, ngram.NgramDraft)
        return MixedDraft(named_draft(beside[2], target), ngrams)
    if is_dotted(text):
        return _of_class(text, target)
    prefix, colon, argument = text.partition(":")
    draft = KINDS[prefix].make(argument if colon else None, target) if prefix in KINDS else None
    if draft is None:
        raise UserError(f"draft is {text!r}; give a model, or {ALLOWED}.")
    return draft


def _of_class(name: str, target: Any) -> Draft:
    """A draft of anybody's own, by its dotted name."""
    try:
        kind = locate(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"draft is {name!r}, which cannot be imported: {error}. Give {ALLOWED}.") from error
    if not (inspect.isclass(kind) and issubclass(kind, Draft)):
        raise UserError(f"draft is {name!r}, which is no Draft; derive it from decoding.pairs.drafts.Draft.")
    make: Callable[[Any], Draft] = kind
    return make(target)


def draft_of(given: Any, target: Any, tokenizer: Any = None, draft_tokenizer: Any = None) -> Draft | None:
    """The draft that a `ModelPair` was given.

    Args:
        given: a `Draft`; a causal language model of transformers; a text as for `named_draft`; None
            for no draft.
        target: the model that it drafts for.
        tokenizer, draft_tokenizer: of the target and of a model, whose tokens are matched.

    Raises:
        UserError: none of these, a model that cannot draft for the target, or a draft that reads
            layers which the target does not have.
    """
    if isinstance(given, str):
        given = named_draft(given, target)
    if isinstance(given, Draft):
        _check_layers(given, target)
        return given
    if given is None:
        return None
    if not hasattr(given, "config"):
        raise UserError(
            f"draft is {given!r}; give a causal language model of transformers, loaded, or {ALLOWED}, or a Draft."
        )
    check_architecture(given.config, "draft")
    sizes = vocab_size_of(target), vocab_size_of(given)
    return ModelDraft(given, match_vocabularies(*sizes, tokenizer, draft_tokenizer))


def _check_layers(draft: Draft, target: Any) -> None:
    """Refuse a draft that reads layers which the target does not have."""
    most = int(text_config(target).num_hidden_layers)
    missing = [layer for layer in draft.target_layers if not 0 <= layer <= most]
    if missing:
        raise UserError(
            f"The draft {draft.name!r} reads layer {missing[0]} of the target, which has {most}; its target_layers may "
            f"be 0 (the embeddings) to {most} (what the head reads)."
        )
