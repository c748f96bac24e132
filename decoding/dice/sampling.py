"""The dice: warping, joint distributions over (beam, token), draws with and without replacement.

Logits live on the device; the support of a joint distribution is brought to the host once, as float64,
and everything after that is small numpy. Design section 5.1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.config import DecodingConfig
from decoding.errors import UserError
from decoding.support.arrays import FloatArray, IntArray
from decoding.support.compiled import compiled

DICE_BLOCK = 256
_TINY = 1e-300  # anything below may overflow as a divisor
HOST_VOCABULARY = 2048  # with more tokens than this and no top-k, a joint distribution stays on the device


class Distribution(Protocol):
    """A distribution over (beam, token), wherever it lives; arrays on its support of size S, on the host."""

    @property
    def parents(self) -> IntArray:
        """[S] node of the beam."""

    @property
    def tokens(self) -> IntArray:
        """[S]."""

    @property
    def probs(self) -> FloatArray:
        """[S], positive, sums to one."""

    @property
    def weights(self) -> FloatArray:
        """[S] the child's log-weight, s_i + log p(v | x_i), before any cut."""

    def __len__(self) -> int:
        """S."""


@dataclass(frozen=True)
class Joint:
    """A distribution over (beam, token), on its support of size S."""

    parents: IntArray  # [S] node of the beam
    tokens: IntArray  # [S]
    probs: FloatArray  # [S], positive, sums to one
    weights: FloatArray  # [S] the child's log-weight, s_i + log p(v | x_i), before any cut

    def __len__(self) -> int:
        return len(self.probs)

    def entries(self, index: IntArray | list[int]) -> list[tuple[int, int, float]]:
        """(parent node, token, weight) of some entries."""
        lists = self.parents[index].tolist(), self.tokens[index].tolist(), self.weights[index].tolist()
        return list(zip(*lists, strict=True))


class Dice:
    """Uniform numbers of one random stream, as host float64; drawn from it in blocks."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self._block: FloatArray = np.empty(0)
        self._used = 0

    def uniform(self, count: int) -> FloatArray:
        """`count` numbers in [0, 1)."""
        if self._used + count > len(self._block):
            generator = self.generator
            size = max(count, DICE_BLOCK)
            fresh = torch.rand(size, dtype=torch.float64, generator=generator, device=generator.device).cpu().numpy()
            self._block, self._used = np.concatenate([self._block[self._used :], fresh]), 0
        self._used += count
        return self._block[self._used - count : self._used]


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Temperature-scaled log-probabilities; [N, V] any float -> [N, V] float32."""
    logits = logits.float()
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def entries_needed(config: DecodingConfig, vocabulary: int) -> int | None:
    """How many of a node's likeliest tokens hold its part of the joint distribution; None: all of them.

    The joint's top k are among the rows' top k. Without top-k the whole vocabulary counts, and only a small one is
    handled on the host.
    """
    if config.top_k is not None:
        return min(config.top_k, vocabulary)
    return vocabulary if vocabulary <= HOST_VOCABULARY else None


def top_entries(log_probs: Tensor, count: int) -> tuple[FloatArray, IntArray]:
    """Each row's `count` likeliest tokens, best first, on the host; [N, V] float32 -> values and tokens, [N, count].

    All of the vocabulary, in its own order, if `count` is as large.
    """
    vocabulary = log_probs.shape[1]
    if count >= vocabulary:
        values = log_probs.double().cpu().numpy()
        return values, np.broadcast_to(np.arange(vocabulary), values.shape)
    best, index = log_probs.topk(count, dim=-1)
    if best.device.type == "cpu":
        return best.numpy().astype(np.float64), index.numpy()
    both = torch.stack([best.double(), index.double()]).cpu().numpy()  # one transfer
    return both[0], both[1].astype(np.int64)


def compact_joint(
    values: FloatArray,  # [B, K] log-probabilities, from top_entries; -inf where there is no token
    tokens: IntArray,  # [B, K]
    nodes: Sequence[int],  # B nodes
    weights: Sequence[float],  # B log-weights
    config: DecodingConfig,
    model_name: str = "model",
) -> Joint:
    """The joint distribution P(i, v) ∝ exp(s_i) p(v | x_i) after top-k and top-p, from each row's likeliest tokens.

    `warp="joint"` cuts the joint; `warp="beam"` masks each row as transformers' warpers do, before the
    weights are added and without re-normalising the row. Exactly `top_k` entries stay; of equal ones at the edge, any.

    Raises:
        UserError: the model returned NaN, or no token at all is possible.
    """
    best = values.max()
    if not best > -np.inf:
        if np.isnan(best):
            raise NotNumbers(nan_message(model_name))
        raise UserError(nothing_left_message(model_name))
    base = np.asarray(weights, dtype=np.float64)  # [B]
    cut = config.top_k if config.warp == "joint" else None
    if config.top_p is None or config.top_p == 1:
        entries, score, probs = _cut(np.ascontiguousarray(values), base, cut or values.size)
    else:
        entries, score, probs = _nucleus_cut(values, base, cut or values.size, config)
    probs.flags.writeable = False  # policies are shown this very array
    rows = _row_of_entry(*values.shape)[entries]
    return Joint(np.asarray(nodes, dtype=np.int64)[rows], tokens.ravel()[entries], probs, score)


@compiled
def _cut(values: FloatArray, base: FloatArray, count: int) -> tuple[IntArray, FloatArray, FloatArray]:
    """The `count` likeliest entries of a flattened [B, K] table, their log-weights and probabilities."""
    score = (values + base.reshape(-1, 1)).ravel()
    entries = np.arange(len(score))
    if count < len(score):
        entries = np.argpartition(-score, count - 1)[:count]
        entries.sort()  # the same order whatever rounding does: draws go by place
        score = score[entries]
    share = np.exp(score - score.max())
    if share.min() <= 0:  # underflow, far behind
        keep = share > 0
        entries, score, share = entries[keep], score[keep], share[keep]
    return entries, score, share / share.sum()


def _nucleus_cut(
    values: FloatArray, base: FloatArray, count: int, config: DecodingConfig
) -> tuple[IntArray, FloatArray, FloatArray]:
    """As `_cut`, with top-p."""
    assert config.top_p is not None
    if config.warp == "beam":
        kept = [_nucleus(share / (share.sum() or 1.0), config.top_p) for share in np.exp(values)]
        return _cut(np.where(np.stack(kept), values, -np.inf), base, count)
    entries, score, probs = _cut(values, base, count)
    keep = _nucleus(probs, config.top_p)
    return entries[keep], score[keep], probs[keep] / probs[keep].sum()


@functools.lru_cache(64)
def _row_of_entry(rows: int, count: int) -> IntArray:
    """Row of each entry of a flattened [rows, count] table."""
    index = np.arange(rows).repeat(count)
    index.flags.writeable = False
    return index


def nothing_left_message(model_name: str) -> str:
    """What to say of a model, or of its processors, where nothing can follow."""
    return (
        f"The {model_name} model gives every continuation the probability 0, as it does where logits processors forbid "
        "all tokens. Change them."
    )


class NotNumbers(UserError):
    """A model returned NaN: at this prompt, or at all."""


def nan_message(model_name: str) -> str:
    """What to say of a model whose logits are not numbers."""
    return (
        f"The {model_name} model returned NaN logits; its outputs cannot be sampled. Check its weights and try "
        "dtype=float32 (float16 overflows in models trained in bfloat16)."
    )


def _nucleus(share: FloatArray, top_p: float) -> NDArray[np.bool_]:
    """Mask of the smallest set of largest shares whose sum reaches `top_p`; share [S] sums to one."""
    order = np.argsort(-share, kind="stable")
    before = np.cumsum(share[order]) - share[order]
    keep = np.zeros(len(share), dtype=bool)
    keep[order[~(before >= top_p)]] = True  # NaN stays, for the caller to see
    return keep


def draw(probs: FloatArray, count: int, replacement: bool, dice: Dice) -> IntArray:
    """Draw `count` indices in order; without replacement at most as many as have positive probability.

    Without replacement this is an exponential race, whose finishing order is distributed as successive
    draws from what is left (1903.06059, section 2), as in `torch.multinomial(probs, count)`.
    """
    if replacement:
        edges = probs.cumsum()
        picks = edges.searchsorted(dice.uniform(count) * edges[-1], side="right")
        return picks if picks.max() < len(probs) else np.minimum(picks, np.flatnonzero(probs)[-1])
    race = -np.log1p(-dice.uniform(len(probs)))  # [S] exponential
    if probs.min() > _TINY:
        return np.argsort(race / probs, kind="stable")[:count]
    with np.errstate(all="ignore"):  # a tiny probability overflows, none divides by zero
        finish = np.minimum(race / probs, np.finfo(np.float64).max)
    order = np.argsort(np.where(probs > 0, finish, np.inf), kind="stable")
    return order[: min(count, int(np.count_nonzero(probs)))]
