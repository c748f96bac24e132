"""A draft that is a smaller language model, of the target's family or of another vocabulary."""

from __future__ import annotations

from typing import Any

from decoding.engine.placement import device_of
from decoding.engine.vocabulary import VocabularyMap
from decoding.errors import UserError
from decoding.forest.context_scorer import ContextScorer
from decoding.forest.node_scorer import NodeScorer, ScorerOptions
from decoding.forest.scorer import ForestScorer
from decoding.pairs.architecture import context_of, text_config, weight_sample
from decoding.pairs.drafts.base import Draft


class ModelDraft(Draft):
    """A causal language model of transformers drafts.

    Args:
        model: in hand; put into evaluation mode.
        vocabulary: makes its token ids the target's; None where they are the same.
    """

    name = "model"

    def __init__(self, model: Any, vocabulary: VocabularyMap | None = None) -> None:
        model.eval()
        self.model = model
        self.hidden_size = int(text_config(model).hidden_size)
        self.vocabulary = vocabulary.to(device_of(model)) if vocabulary is not None else None

    @property
    def models(self) -> dict[str, Any]:
        """The draft model by its role, "draft"."""
        return {"draft": self.model}

    def fingerprint(self) -> bytes:
        """Bytes of the sizes, of a sample of every weight, and of how ids are matched."""
        return weight_sample(self.model) + (self.vocabulary.digest if self.vocabulary is not None else b"")

    def scorer(self, target: ForestScorer, options: ScorerOptions) -> NodeScorer:
        """Passes of the model over its own forest cache, as far as its context goes; the target's
        states are not read.
        """
        context = context_of(self.model)
        if context is None or options.longest_prompt + options.spare_slots <= context:
            return ForestScorer(self.model, **vars(options), vocabulary=self.vocabulary)
        return ContextScorer(self.model, context, **vars(options), vocabulary=self.vocabulary)

    def assistance(self) -> dict[str, Any]:
        """Arguments that make the model transformers' `assistant_model`."""
        if self.vocabulary is not None:
            raise UserError(
                "hf_assisted needs a draft with the target's token ids and as many embedding rows, as transformers' "
                f"own generate does; the target has {self.vocabulary.size}, the draft {self.vocabulary.draft_size}."
            )
        return {"assistant_model": self.model}
