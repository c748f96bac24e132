"""What a trace row holds: one per (iteration, committed layer). Design section 7.

`TRACE_FEATURES` are the columns of every row. A `Column` is one of anybody's own beside them: readers take columns by
name, so that whoever does not know it does not see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from datasets import Features, List, Value

from decoding.errors import UserError
from decoding.policies.base import DraftContext, TargetContext
from decoding.results import LayerEvent
from decoding.support.names import locate

SCHEMA_VERSION = 3

TRACE_FEATURES = Features(
    {
        "prompt_id": Value("string"),
        "split": Value("string"),  # of the task: train / val / test
        "layer": Value("int32"),  # of its iteration, from 1
        "target_width": Value("int32"),  # M
        "draft_width": Value("int32"),  # w; 0 at the layer drawn from the target
        "kept_width": Value("int32"),  # beams committed, finished ones included
        "features": List(Value("float32")),  # [F], named in the manifest
        "target_features": List(Value("float32")),  # [G], named in the manifest: what is known once P is
        "draft_hidden": List(Value("float32")),  # [H_q], mean over the layer's parents; empty unless asked for
        "target_hidden": List(Value("float32")),  # [H_p], at the root; empty unless asked for
        "accept_bits": List(Value("bool")),  # [w], continued in shadow past M
        "accept_probs": List(Value("float32")),  # [w], Σ min(R, Q_i) given the layer's history before draft i
        "survivor_slot": Value("int32"),  # place of the best hypothesis's beam among the draws, from 1; 0: none
        "slot_deficits": List(Value("float32")),  # [kept_width], in the order of draws; see `deficits`
    }
)


@dataclass(frozen=True)
class Column:
    """A column of one's own.

    Args:
        name: of the column; another one whenever its values change their meaning.
        type: of its values, as `datasets` has them: `Value("float32")`, `List(Value("int32"))`.
        of: the value of a committed layer.
    """

    name: str
    type: Any
    of: Callable[[LayerEvent], Any]


def own_columns(names: Iterable[str]) -> tuple[Column, ...]:
    """Columns by their dotted names, as `collect.columns` lists them.

    Raises:
        UserError: there is none of that name, or a column is there already.
    """
    found: dict[str, Column] = {}
    for name in names:
        try:
            column = locate(name)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"collect.columns holds {name!r}, which cannot be imported: {error}.") from error
        if not isinstance(column, Column):
            raise UserError(f"collect.columns holds {name!r}, which is no decoding.traces.Column.")
        if column.name in TRACE_FEATURES or column.name in found:
            raise UserError(f"collect.columns: rows have a column {column.name!r} already; give {name} another name.")
        found[column.name] = column
    return tuple(found.values())


class ContextFeatures(Protocol):
    """Turns a context into the features of a row; the controller's own when logging for it."""

    names: list[str]
    target_names: list[str]
    version: int

    def __call__(self, context: DraftContext) -> np.ndarray:
        """Features of a layer before its drafts are drawn, [F] float32."""
        ...

    def of_target(self, context: TargetContext) -> np.ndarray:
        """Features of a layer once its P is known, [G] float32."""
        ...
