"""The dice: warping, joint distributions over (beam, token), draws with and without replacement.

Logits live on the device; the support of a joint distribution is brought to the host once, as float64,
and everything after that is small numpy. Design section 5.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.config import DecodingConfig
from decoding.errors import UserError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Joint:
    """A distribution over (beam, token), on its support of size S."""

    parents: IntArray  # [S] node of the beam
    tokens: IntArray  # [S]
    probs: FloatArray  # [S], positive, sums to one
    weights: FloatArray  # [S] the child's log-weight, s_i + log p(v | x_i), before any cut

    def __len__(self) -> int:
        return len(self.probs)


class Dice:
    """Uniform numbers of one random stream, as host float64."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, count: int) -> FloatArray:
        """`count` numbers in [0, 1)."""
        generator = self.generator
        return torch.rand(count, dtype=torch.float64, generator=generator, device=generator.device).cpu().numpy()


def log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Temperature-scaled log-probabilities; [N, V] any float -> [N, V] float32."""
    logits = logits.float()
    return (logits if temperature == 1.0 else logits / temperature).log_softmax(-1)


def joint_distribution(
    log_probs: Tensor,  # [B, V] float32, from log_probabilities
    nodes: list[int],  # B nodes
    weights: list[float],  # B log-weights
    config: DecodingConfig,
    model_name: str = "model",
) -> Joint:
    """The joint distribution P(i, v) ∝ exp(s_i) p(v | x_i) after top-k and top-p.

    `warp="joint"` cuts the joint; `warp="beam"` masks each row as transformers' warpers do, before the
    weights are added and without re-normalising the row. Exactly `top_k` entries stay: ties at the edge fall
    as torch.topk orders them.

    Raises:
        UserError: the model returned NaN.
    """
    base = np.asarray(weights, dtype=np.float64)  # [B]
    top = base.max()
    shift = torch.tensor(base - top, dtype=torch.float32, device=log_probs.device)  # [B]
    if config.warp == "joint":
        rows, tokens, log_p, share = _cut_joint(log_probs, shift, config)
    else:
        rows, tokens, log_p, share = _cut_rows(log_probs, shift, config)
    if np.isnan(share).any():
        raise UserError(nan_message(model_name))
    alive = share > 0
    if not alive.all():
        rows, tokens, log_p, share = rows[alive], tokens[alive], log_p[alive], share[alive]
    probs = share / share.sum()
    probs.flags.writeable = False  # policies are shown this very array
    return Joint(np.asarray(nodes, dtype=np.int64)[rows], tokens, probs, base[rows] + log_p)


def nan_message(model_name: str) -> str:
    """What to say of a model whose logits are not numbers."""
    return (
        f"The {model_name} model returned NaN logits; its outputs cannot be sampled. Check its weights and try "
        "dtype=float32 (float16 overflows in models trained in bfloat16)."
    )


def _cut_joint(
    log_probs: Tensor, shift: Tensor, config: DecodingConfig
) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
    """Top-k then top-p over all (beam, token) pairs: rows [S], tokens [S], log p [S], shares [S]."""
    vocabulary = log_probs.shape[1]
    scores = (log_probs + shift[:, None]).flatten()  # [B * V]
    if config.top_k is not None and config.top_k < scores.numel():
        best, index = scores.topk(config.top_k)
        values = torch.stack([best.double(), index.double()]).cpu().numpy()  # one transfer
        score, flat = values[0], values[1].astype(np.int64)
    else:
        score, flat = scores.double().cpu().numpy(), np.arange(scores.numel())
    share = np.exp(score - score.max())
    if config.top_p is not None and config.top_p < 1:
        keep = _nucleus(share / share.sum(), config.top_p)
        score, flat, share = score[keep], flat[keep], share[keep]
    rows, tokens = np.divmod(flat, vocabulary)
    return rows, tokens, score - shift.double().cpu().numpy()[rows], share


def _cut_rows(
    log_probs: Tensor, shift: Tensor, config: DecodingConfig
) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
    """Top-k then top-p within each row, then the weights: rows [S], tokens [S], log p [S], shares [S]."""
    beams, vocabulary = log_probs.shape
    k = min(config.top_k or vocabulary, vocabulary)
    if k < vocabulary:
        best, index = log_probs.topk(k, dim=-1)
        values = torch.stack([best.double(), index.double()]).cpu().numpy()
        log_p, tokens = values[0], values[1].astype(np.int64)  # [B, k]
    else:
        log_p = log_probs.double().cpu().numpy()
        tokens = np.broadcast_to(np.arange(vocabulary), log_p.shape)
    keep = np.ones_like(log_p, dtype=bool)
    if config.top_p is not None and config.top_p < 1:
        for row in range(beams):
            share = np.exp(log_p[row])
            keep[row] = _nucleus(share / share.sum(), config.top_p)
    rows = np.broadcast_to(np.arange(beams)[:, None], log_p.shape)[keep]
    score = log_p[keep] + shift.double().cpu().numpy()[rows]
    return rows, tokens[keep], log_p[keep], np.exp(score - score.max())


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
        edges = np.cumsum(probs)
        picks = np.searchsorted(edges, dice.uniform(count) * edges[-1], side="right")
        return np.minimum(picks, np.flatnonzero(probs)[-1])
    with np.errstate(all="ignore"):  # a tiny probability overflows, none divides by zero
        finish = -np.log1p(-dice.uniform(len(probs))) / probs  # [S] exponential race
    finish = np.where(probs > 0, np.minimum(finish, np.finfo(np.float64).max), np.inf)
    count = min(count, int(np.count_nonzero(probs)))
    if count == 1:
        return np.asarray([np.argmin(finish)])
    return np.argsort(finish, kind="stable")[:count]
