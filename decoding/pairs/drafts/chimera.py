"""Chimera's heads as drafts: trigrams, beside the states of what the target has scored.
2402.15758.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from decoding.engine.trigram_head import TrigramHead
from decoding.forest.head_scorer import HeadScorer
from decoding.forest.trigram_scorer import TrigramScorer
from decoding.pairs.drafts.base import NamedKind
from decoding.pairs.drafts.head import HeadDraft, load_own

_USAGE = "chimera:<directory> (a head of Chimera, as train_draft writes it)"


class ChimeraDraft(HeadDraft):
    """A `TrigramHead` drafts.

    Args:
        head, name: as for `HeadDraft`.
    """

    kind: ClassVar[str] = "chimera"
    scored_by: ClassVar[type[HeadScorer]] = TrigramScorer


def load_head(source: str | Path, target: Any) -> TrigramHead:
    """A head from a directory or the hub, on the target's device and in its dtype."""
    return load_own(TrigramHead, "Chimera", source, target)


def _from_text(source: str | None, target: Any) -> ChimeraDraft | None:
    """The draft that `chimera:<source>` names."""
    return ChimeraDraft(load_head(source, target), f"chimera:{source}") if source else None


KIND = NamedKind("chimera", _USAGE, _from_text)
