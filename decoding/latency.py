"""Latency tables: seconds of a model pass by the number of nodes scored, measured on the device at hand."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from decoding.drafts import DraftScorer
from decoding.errors import UserError
from decoding.forest import TokenForest
from decoding.pair import ModelPair
from decoding.scorer import ForestScorer

NODE_COUNTS = (1, 2, 4, 8, 16, 32)
_measured: dict[tuple[str, ...], LatencyTable] = {}


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one pass of each model at `nodes` scored nodes; linear in between, extrapolated beyond."""

    nodes: tuple[int, ...]
    target: tuple[float, ...]
    draft: tuple[float, ...]
    device: str = "cpu"

    def target_seconds(self, nodes: float) -> float:
        """Seconds of a target pass over that many nodes."""
        return self._at(self.target, nodes)

    def draft_seconds(self, nodes: float) -> float:
        """Seconds of a draft pass over that many nodes."""
        return self._at(self.draft, nodes)

    def _at(self, seconds: tuple[float, ...], nodes: float) -> float:
        if nodes <= 0:
            return 0.0
        if nodes > self.nodes[-1]:
            slope = (seconds[-1] - seconds[-2]) / (self.nodes[-1] - self.nodes[-2])
            return seconds[-1] + max(0.0, slope) * (nodes - self.nodes[-1])
        return float(np.interp(nodes, self.nodes, seconds))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "nodes": list(self.nodes),
            "target": list(self.target),
            "draft": list(self.draft),
            "device": self.device,
        }

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> LatencyTable:
        """The inverse of `to_dict`."""
        return cls(tuple(table["nodes"]), tuple(table["target"]), tuple(table["draft"]), table.get("device", "cpu"))

    @classmethod
    def measure(cls, pair: ModelPair, prompt_tokens: int = 128, repeats: int = 7) -> LatencyTable:
        """Time passes over forests of several sizes; median of `repeats`. Measured once per process and pair.

        Args:
            pair: both models; what an n-gram draft takes to look up its nodes is timed in the same way.
            prompt_tokens: prompt length behind the forest (at most half of the context is used).
            repeats: timed passes per size, after two to warm up.

        Raises:
            UserError: a pair without a draft.
        """
        if pair.draft is None:
            raise UserError("A latency table needs a draft: give the pair one, such as draft=ngram.")
        key = (str(pair.device), pair.fingerprint, str(next(pair.target.parameters()).dtype), pair.engine)
        if key not in _measured:
            length = min(prompt_tokens, (pair.context or 2 * prompt_tokens) // 2)
            prompt = [i % pair.vocab_size for i in range(1, length + 1)]
            sizes: dict[str, Any] = {"rows": 1, "longest_prompt": length, "spare_slots": max(NODE_COUNTS), "top": 1}
            target = _pass_seconds(ForestScorer(pair.target, **sizes, engine=pair.engine), prompt, repeats)
            draft = _pass_seconds(pair.draft_scorer(**sizes), prompt, repeats)
            _measured[key] = cls(NODE_COUNTS, tuple(target), tuple(draft), str(pair.device))
        return _measured[key]


@torch.inference_mode()
def _pass_seconds(scorer: DraftScorer, prompt: list[int], repeats: int) -> list[float]:
    """Median seconds of a pass for each of NODE_COUNTS; never decreasing in the number of nodes."""
    forest = TokenForest()
    medians = []
    try:
        scorer.open(0, prompt, forest)
        for count in NODE_COUNTS:
            times = []
            for _ in range(repeats + 2):
                nodes = [forest.child(0, token) for token in range(count)]
                began = time.perf_counter()
                scorer.score({0: nodes})  # ends with its results on the host: nothing to wait for
                times.append(time.perf_counter() - began)
                scorer.forget(0, forest.release(nodes, set()), [])
            medians.append(float(np.median(times[2:])))
    finally:
        scorer.close()
    return np.maximum.accumulate(medians).tolist()
