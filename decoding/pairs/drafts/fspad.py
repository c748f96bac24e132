"""FSPAD's heads as drafts: sampled features, and two vectors of each token. 2408.15562."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from decoding.engine.sampled_head import SampledHead
from decoding.pairs.drafts.base import NamedKind
from decoding.pairs.drafts.head import HeadDraft, load_own

_USAGE = "fspad:<directory> (a head of FSPAD, as train_draft writes it)"


class FspadDraft(HeadDraft):
    """A `SampledHead` drafts.

    Args:
        head, name: as for `HeadDraft`.
    """

    kind: ClassVar[str] = "fspad"


def load_head(source: str | Path, target: Any) -> SampledHead:
    """A head from a directory or the hub, on the target's device and in its dtype."""
    return load_own(SampledHead, "FSPAD", source, target)


def _from_text(source: str | None, target: Any) -> FspadDraft | None:
    """The draft that `fspad:<source>` names."""
    return FspadDraft(load_head(source, target), f"fspad:{source}") if source else None


KIND = NamedKind("fspad", _USAGE, _from_text)
