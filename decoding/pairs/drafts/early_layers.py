"""A draft made of the target's first layers: its embedding, n blocks, final norm and head, all of
them shared.

Self-drafting by early exit, as in LayerSkip (2404.16710): no second model, and no second copy of
weights. Checkpoints that were trained to exit draft well, others poorly.
"""

from __future__ import annotations

from typing import Any

from decoding.engine.first_layers import first_layers
from decoding.pairs.drafts.base import NamedKind, whole_number
from decoding.pairs.drafts.model import ModelDraft


class EarlyLayersDraft(ModelDraft):
    """The target's first `count` blocks draft, as a model of their own.

    Args:
        target: a transformers causal LM.
        count: 1 to one less than it has blocks.

    Raises:
        UserError: too few or too many, or a model whose blocks cannot be found or taken apart.
    """

    def __init__(self, target: Any, count: int) -> None:
        super().__init__(first_layers(target, count))
        self.name = f"layers:{count}"


def _from_text(number: str | None, target: Any) -> EarlyLayersDraft | None:
    """The draft that `layers:N` names."""
    count = whole_number(number)
    return EarlyLayersDraft(target, count) if count is not None else None


KIND = NamedKind("layers", "layers:N (the target's first N layers)", _from_text)
