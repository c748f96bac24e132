"""Columns of a trace: one row per drafted layer of an iteration. Design section 7."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from datasets import Features, List, Value

from decoding.errors import UserError
from decoding.policies.base import DraftContext
from decoding.support.names import locate

SCHEMA_VERSION = 4
TRACE_FEATURES = Features(
    {
        "prompt_id": Value("string"),
        "split": Value("string"),  # of the task: train / val / test
        "iteration": Value("int32"),
        "layer": Value("int32"),  # from 1
        "reached": Value("bool"),  # all layers above passed
        "drafts": Value("int32"),  # drafted and sent to the target
        "features": List(Value("float32")),  # [F] of the layer, named in the manifest
        "candidates": List(Value("float32")),  # [C * G], in draft order; the G are named in the manifest
        "parents": List(Value("int32")),  # [C] place among the candidates of the layer above; -1 at the first layer
        "places": List(Value("int32")),  # [C] in the target's selection, from 1; 0: not selected
        "need": List(Value("int32")),  # [<= R] drafts, in draft order, that hold the first j selected; -1: not ranked
    }
)


@dataclass(frozen=True)
class Column:
    """A column of one's own.

    Args:
        name: of the column; another one whenever its values change their meaning.
        type: of its values, as `datasets` has them: `Value("float32")`, `List(Value("int32"))`.
        of: the value of a drafted layer.
    """

    name: str
    type: Any
    of: Callable[[DraftContext], Any]


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
    candidate_names: list[str]
    version: int

    def of_layer(self, context: DraftContext) -> np.ndarray:
        """Features of a layer as a whole, [F] float32."""
        ...

    def of_candidates(self, context: DraftContext) -> np.ndarray:
        """Features of each candidate by itself, [C, G] float32."""
        ...
