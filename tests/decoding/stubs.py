"""Models small enough to enumerate, and an independent implementation of beam sampling to compare with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import permutations, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from decoding import DecodingConfig, ModelPair

MAX_POSITIONS = 16


class TableModel(nn.Module):
    """A causal LM whose next-token logits are a table of (position, last token): [positions, V, V]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        vocabulary = table.shape[-1]
        self.table = nn.Parameter(table.clone())
        self.head = nn.Identity()
        self.config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            max_position_embeddings=MAX_POSITIONS, bos_token_id=None, eos_token_id=None,
        )
        self.calls: list[int] = []  # nodes of each pass

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> SimpleNamespace:
        self.calls.append(input_ids.shape[1])
        return SimpleNamespace(logits=self.head(self.table[position_ids[0], input_ids[0]][None]))


def random_pair(vocabulary: int, seed: int = 0, closeness: float = 0.5, scale: float = 1.5) -> ModelPair:
    """A target and a draft with random tables; the draft's is the target's plus noise, 0: unrelated, 1: equal."""
    generator = torch.Generator().manual_seed(seed)
    shape = (MAX_POSITIONS, vocabulary, vocabulary)
    target = scale * torch.randn(shape, generator=generator)
    noise = scale * torch.randn(shape, generator=generator)
    return ModelPair(TableModel(target), TableModel(closeness * target + (1 - closeness) * noise))


Beams = frozenset[tuple[int, ...]]


class Reference:
    """Exact beam sampling by enumeration, written from design 5.1 alone: dictionaries and loops, float64."""

    def __init__(self, model: TableModel, prompt: list[int], config: DecodingConfig) -> None:
        self.table = model.table.detach().double().numpy()
        self.prompt, self.config = prompt, config

    def log_p(self, path: tuple[int, ...]) -> np.ndarray:
        """Temperature-scaled log-probabilities after prompt + path, [V]."""
        sequence = [*self.prompt, *path]
        logits = self.table[len(sequence) - 1, sequence[-1]] / self.config.temperature
        return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

    def weight(self, path: tuple[int, ...]) -> float:
        return sum(self.log_p(path[:i])[token] for i, token in enumerate(path))

    def joint(self, beams: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], float]:
        """P over children of `beams`, cut as the config says."""
        config = self.config
        shares: dict[tuple[int, ...], float] = {}
        for beam in beams:
            row = {(*beam, v): float(np.exp(lp)) for v, lp in enumerate(self.log_p(beam))}
            if config.warp == "beam":
                row = _cut(row, config)
            shares |= {child: np.exp(self.weight(beam)) * share for child, share in row.items()}
        if config.warp == "joint":
            shares = _cut(shares, config)
        total = sum(shares.values())
        return {child: share / total for child, share in shares.items()}

    def step(self, beams: Beams, width: int) -> dict[Beams, float]:
        """Distribution of the next set of beams."""
        joint = self.joint(sorted(beams))
        out: dict[Beams, float] = defaultdict(float)
        if self.config.replacement:
            for draws in product(joint, repeat=width):
                out[frozenset(draws)] += float(np.prod([joint[x] for x in draws]))
            return out
        for draws in permutations(joint, min(width, len(joint))):
            chance, left = 1.0, 1.0
            for x in draws:
                chance *= joint[x] / left
                left -= joint[x]
            out[frozenset(draws)] += chance
        return out

    def distribution(self, steps: int, width_of: Callable[[Reference, Beams, int], int]) -> dict[Beams, float]:
        """Distribution of the set of beams after `steps` layers of widths `width_of(reference, beams, layer)`."""
        now: dict[Beams, float] = {frozenset({()}): 1.0}
        for layer in range(steps):
            after: dict[Beams, float] = defaultdict(float)
            for beams, chance in now.items():
                for children, share in self.step(beams, width_of(self, beams, layer)).items():
                    after[children] += chance * share
            now = after
        return dict(now)


def _cut(shares: dict[tuple[int, ...], float], config: DecodingConfig) -> dict[tuple[int, ...], float]:
    """Top-k, then top-p, of un-normalised shares; what stays keeps its share."""
    ranked = sorted(shares, key=lambda child: -shares[child])[: config.top_k]
    if config.top_p is not None:
        total, before, keep = sum(shares[c] for c in ranked), 0.0, []
        for child in ranked:
            if before < config.top_p * total:
                keep.append(child)
            before += shares[child]
        ranked = keep
    return {child: shares[child] for child in ranked}


def chi_square_p(counts: Counter[Any], expected: dict[Any, float], least: float = 5.0) -> float:
    """p-value of observed counts under exact probabilities; rare outcomes are pooled to at least `least` expected.

    An outcome that the exact distribution excludes gives 0.
    """
    if any(outcome not in expected for outcome in counts):
        return 0.0
    total = sum(counts.values())
    rows, pooled = [], [0.0, 0.0]
    for outcome, chance in expected.items():
        seen, mean = counts.get(outcome, 0), chance * total
        if mean < least:
            pooled[0] += seen
            pooled[1] += mean
        else:
            rows.append((seen, mean))
    if pooled[1] > 0:
        rows.append((pooled[0], pooled[1]))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in rows)
    freedom = torch.tensor(max(len(rows) - 1, 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))
