"""A draft in one file that reads the target's hidden states, as feature-level drafts do; its weights are random.

After a node it proposes by the target's states of two layers at the nearest ancestor that the target has scored, the
node itself included, and by the node's own token. Untrained, but close enough to the target to be accepted at times.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from decoding.dice.sampling import FloatArray, IntArray, log_probabilities, top_entries
from decoding.forest.scorer import ForestScorer
from decoding.forest.tree import TokenForest
from decoding.pairs.architecture import text_config, weight_sample
from decoding.pairs.drafts import Draft, NodeScorer, ScorerOptions


class FeatureDraft(Draft):
    """Logits: the head of the last states, a random reading of those of block `layer`, and one of the token."""

    name = "features"

    def __init__(self, target: Any, layer: int = 1) -> None:
        text = text_config(target)
        self.target_layers = (layer, text.num_hidden_layers)
        self.hidden_size = 2 * text.hidden_size
        random = torch.Generator().manual_seed(0)
        reading = 0.1 * torch.randn(text.vocab_size, text.hidden_size, generator=random)
        head = target.get_output_embeddings().weight.detach()
        self.head = torch.cat([reading.to(head), head], 1)  # [V, 2 H]
        self.embedding = 0.3 * torch.randn(text.vocab_size, text.vocab_size, generator=random).to(head)
        self._sample = weight_sample(target)

    def fingerprint(self) -> bytes:
        """It is made from the target's weights and its layers."""
        return repr(self.target_layers).encode() + self._sample

    def scorer(self, target: ForestScorer, options: ScorerOptions) -> NodeScorer:
        """Reads the target's states, and keeps a row of log-probabilities a node."""
        return FeatureScorer(self, target, options)


class _Row:
    """The prompt in a row."""

    def __init__(self, prompt: Sequence[int], forest: TokenForest) -> None:
        self.prompt, self.forest, self.calls = list(prompt), forest, 0
        self.log_probs: dict[int, Tensor] = {}  # [V] of each scored node
        self.features: dict[int, Tensor] = {}  # [2 H]


class FeatureScorer:
    """The `NodeScorer` of a `FeatureDraft`; `read` logs (path of the anchor, its states [2, H]) for tests."""

    def __init__(self, draft: FeatureDraft, target: ForestScorer, options: ScorerOptions) -> None:
        self.draft, self.target, self.options, self.top = draft, target, options, options.top
        self.model_seconds = 0.0
        self.read: list[tuple[list[int], Tensor]] = []
        self._rows: list[_Row | None] = [None] * options.rows

    def open(self, row: int, prompt: Sequence[int], forest: TokenForest, shared: tuple[int, int] | None = None) -> None:
        """The target has scored the prompt: its states are there for all tokens, shared ones included."""
        self._rows[row] = _Row(prompt, forest)
        states = self.target.prompt_states(row)
        self.read += [(list(prompt[: i + 1]), states[i].clone()) for i in range(len(prompt))]
        self._score(row, [0])

    def score(self, wanted: Mapping[int, Sequence[int]]) -> int:
        """One small product for all new nodes of a row."""
        began, count = time.perf_counter(), 0
        for row, nodes in wanted.items():
            fresh = [node for node in dict.fromkeys(nodes) if node not in self._held(row).log_probs]
            if fresh:
                self._held(row).calls += 1
                self._score(row, fresh)
                count += len(fresh)
        self.model_seconds += time.perf_counter() - began
        return count

    def _score(self, row: int, nodes: list[int]) -> None:
        held, forest = self._held(row), self._held(row).forest
        anchors = [self._anchor(row, node) for node in nodes]
        states = self.target.layer_states(row, anchors)  # [N, 2, H]
        self.read += [(held.prompt + forest.path(a), s.clone()) for a, s in zip(anchors, states, strict=True)]
        tokens = torch.tensor([forest.tokens[node] if node else held.prompt[-1] for node in nodes])
        logits = states.flatten(1) @ self.draft.head.t() + self.draft.embedding[tokens.to(states.device)]
        if self.options.process is None:
            log_probs = log_probabilities(logits, self.options.temperature)
        else:
            log_probs = self.options.process(row, nodes, logits.float() / self.options.temperature)
        held.log_probs |= dict(zip(nodes, log_probs, strict=True))
        held.features |= dict(zip(nodes, states.flatten(1), strict=True))

    def _anchor(self, row: int, node: int) -> int:
        """The nearest ancestor that the target has scored."""
        while not self.target.cache.holds(row, node):
            node = self._held(row).forest.parents[node]
        return node

    def proposes(self, row: int, nodes: Sequence[int]) -> bool:
        """Whether processors leave anything."""
        return bool((self.log_probs(row, nodes) != -torch.inf).any())

    def tops(self, row: int, nodes: Sequence[int]) -> tuple[FloatArray, IntArray]:
        """The likeliest tokens, on the host."""
        assert self.top is not None
        return top_entries(self.log_probs(row, nodes), self.top)

    def log_probs(self, row: int, nodes: Sequence[int]) -> Tensor:
        """[N, V] float32."""
        return torch.stack([self._held(row).log_probs[node] for node in nodes])

    def hidden(self, row: int, nodes: Sequence[int]) -> Tensor | None:
        """What was read, [N, 2 H]."""
        found = [states for node in nodes if (states := self._held(row).features.get(node)) is not None]
        return torch.stack(found) if found else None

    def forget(self, row: int, dead: Sequence[int], live: Sequence[int]) -> None:
        """Keep what was scored at `live` beams."""
        held = self._held(row)
        held.log_probs = {node: held.log_probs[node] for node in live if node in held.log_probs}
        held.features = {node: held.features[node] for node in live if node in held.features}

    def calls(self, row: int) -> int:
        """Times that nodes of the row were scored."""
        return self._held(row).calls

    def close_row(self, row: int) -> None:
        """The prompt in a row is done."""
        self._rows[row] = None

    def close(self) -> None:
        """Nothing is borrowed."""

    def free(self) -> None:
        """Nothing is kept."""

    def _held(self, row: int) -> _Row:
        held = self._rows[row]
        assert held is not None, "the row was opened"
        return held


def own_states(model: Any, path: Sequence[int], layers: Sequence[int]) -> Tensor:
    """States of some layers at the last token of a path, by transformers alone; [K, H]."""
    with torch.inference_mode():
        output = model(input_ids=torch.tensor([list(path)], device=model.device), output_hidden_states=True)
    return torch.stack([output.hidden_states[layer][0, -1] for layer in layers])
