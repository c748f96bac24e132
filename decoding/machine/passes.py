"""Single passes over forests of a chosen size behind a prompt: what the clock, NVML and the
roofline measure.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from decoding.cost_table import NODE_COUNTS
from decoding.errors import UserError
from decoding.forest.node_scorer import NodeScorer, ScorerOptions
from decoding.forest.tree import TokenForest
from decoding.pairs.pair import ModelPair
from decoding.support.arrays import FloatArray

TOP = 10  # tokens that a pass brings to the host, where nobody asks for another number


class ForestPasses:
    """Passes over forests of a chosen size behind a prompt; leaving `with` gives the buffers back.

    Args:
        scorers: by role, in the order to open them: a draft may read what the target's scorer knows
            of the prompt.
        role: whose passes they are.
        prompt: token ids.
    """

    def __init__(self, scorers: Mapping[str, NodeScorer], role: str, prompt: Sequence[int]) -> None:
        self._scorers, self._scorer, self._forest = scorers, scorers[role], TokenForest()
        for scorer in scorers.values():
            scorer.open(0, prompt, self._forest)

    def __enter__(self) -> ForestPasses:
        return self

    def __exit__(self, *error: object) -> None:
        for scorer in self._scorers.values():
            scorer.close()

    def run(self, nodes: int) -> tuple[float, float]:
        """Score `nodes` new nodes, results on the host, and forget them.

        Returns:
            Seconds inside the model, and seconds with slots and masks.
        """
        drafted = [self._forest.child(0, token) for token in range(nodes)]
        before, began = self._scorer.model_seconds, time.perf_counter()
        self._scorer.score({0: drafted})  # ends with its results on the host: nothing to wait for
        inside, whole = self._scorer.model_seconds - before, time.perf_counter() - began
        self._scorer.forget(0, self._forest.release(drafted, set()), [])
        return inside, whole


def check_draft(pair: ModelPair) -> None:
    """Refuse a pair without a draft (UserError): its table would be half empty."""
    if pair.drafter is None:
        raise UserError("A latency table needs a draft: give the pair one, such as draft=ngram.")


def forest_passes(pair: ModelPair, role: str, prompt: Sequence[int], top: int = TOP) -> ForestPasses:
    """Passes of a pair's "target" or "draft" that bring the `top` likeliest tokens to the host."""
    top = min(top, pair.vocab_size)
    options = ScorerOptions(1, len(prompt), spare_slots=max(NODE_COUNTS), top=top, engine=pair.engine)
    return ForestPasses(pair.scorers(options, drafting=role == "draft"), role, prompt)


def synthetic_prompt(pair: ModelPair, tokens: int) -> list[int]:
    """Token ids without meaning; at most half of what the models take."""
    length = max(1, min(tokens, (pair.context or 2 * tokens) // 2))
    return [i % pair.vocab_size for i in range(1, length + 1)]


def rising(costs: Sequence[float] | FloatArray) -> tuple[float, ...]:
    """The nearest costs, in squares, that never decrease: more nodes take no less."""
    indices = range(len(costs))
    return tuple(
        float(max(min(np.mean(costs[i : j + 1]) for j in indices[k:]) for i in indices[: k + 1])) for k in indices
    )
