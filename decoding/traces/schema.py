"""What a trace row holds: one per drafted layer of an iteration. Design section 7."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from datasets import Features, List, Value

from decoding.policies.base import DraftContext

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


class ContextFeatures(Protocol):
    """What turns a context into the features of a row; the controller's own when logging for it."""

    names: list[str]
    candidate_names: list[str]
    version: int

    def of_layer(self, context: DraftContext) -> np.ndarray:
        """What is known of a layer as a whole, [F] float32."""
        ...

    def of_candidates(self, context: DraftContext) -> np.ndarray:
        """What is known of each candidate by itself, [C, G] float32."""
        ...
