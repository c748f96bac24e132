"""WidthNet on the host: one row at a time, in compiled functions, at a fraction of the call overhead.

A policy is asked for a few small numbers between passes of large models, when little of Python and numpy is left in a
processor's caches: each call costs several times what it does in a loop. Compiled, a decision is one call.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from controller.features import Packed
from controller.network import LIMIT, WidthNet
from decoding.support.arrays import FloatArray, FloatVector
from decoding.support.compiled import COMPILED, compiled

NATS = 0.5  # share of the loss that is in nats; the rest is in the chance that the best hypothesis is lost


class HostNet:
    """A WidthNet's weights for the functions below.

    `early` and `late` have the fields of `EarlyWeights` and `LateWeights`.

    Args:
        net: its weights are copied; later changes to it are not seen.
    """

    def __init__(self, net: WidthNet) -> None:
        def host(tensor: Tensor) -> FloatVector:
            return np.ascontiguousarray(tensor.detach().float().cpu().numpy()).copy()

        def linears(trunk: nn.Sequential) -> list[tuple[FloatVector, FloatVector]]:
            found = [module for module in trunk if isinstance(module, nn.Linear)]
            return [(host(linear.weight.T), host(linear.bias)) for linear in found]

        def projection(linear: nn.Linear | None) -> FloatVector:
            return host(linear.weight.T) if linear is not None else np.zeros((0, 0), np.float32)

        def quality(survivor: nn.Linear, temperature: Tensor, regret: nn.Linear, shift: Tensor) -> Any:
            weight = torch.cat([survivor.weight / temperature, regret.weight])  # [2 R - 1, hidden]
            return host(weight.T), host(torch.cat([survivor.bias / temperature, regret.bias + shift]))

        # The accept head and its basis are two linear maps in a row, and temperatures only scale: one map each.
        accept = net.accept_basis.T / net.accept_temperature  # [W * W, bases]
        bias = (accept @ net.accept_head.bias).view_as(net.accept_bias) + net.accept_bias / net.accept_temperature
        early = EarlyWeights(
            host(net.feature_mean),
            host(1.0 / net.feature_std),
            projection(net.draft_projection),
            projection(net.target_projection),
            tuple(linears(net.trunk)),
            host((accept @ net.accept_head.weight).T),
            host(bias),
            *quality(net.survivor_head, net.survivor_temperature, net.regret_head, net.regret_shift),
        )
        late = net.late_survivor_head, net.late_survivor_temperature, net.late_regret_head, net.late_regret_shift
        layers = (*linears(net.late_trunk), quality(*late))
        # Plain tuples, as compiled functions take them: numba works out the type of a named one anew each time.
        self.early = tuple(early)
        self.late = tuple(LateWeights(host(net.late_mean), host(1.0 / net.late_std), layers))


def _times(rows: FloatVector, matrix: FloatVector) -> FloatVector:
    """[N, I] times [I, J]; numba's own product would need SciPy."""
    out = np.zeros((rows.shape[0], matrix.shape[1]), np.float32)
    for n in range(rows.shape[0]):
        for i in range(matrix.shape[0]):
            value = rows[n, i]
            if value != 0:  # half of what a rectifier lets through
                for j in range(matrix.shape[1]):
                    out[n, j] += value * matrix[i, j]
    return out


times = compiled(_times) if COMPILED else np.dot


class EarlyWeights(NamedTuple):
    """Of the network that sees a layer before its drafts are drawn. Matrices are [inputs, outputs]."""

    mean: FloatVector  # [F]
    scale: FloatVector  # [F]
    draft_projection: FloatVector  # [H_q, p]; p is 0 where that hidden vector is not used
    target_projection: FloatVector  # [H_p, p]
    layers: tuple[tuple[FloatVector, FloatVector], ...]  # weight, bias
    accept: FloatVector  # [hidden, W * W] logits
    accept_bias: FloatVector  # [W, W]
    quality: FloatVector  # [hidden, 2 R - 1] survivor logits before log regret steps
    quality_bias: FloatVector  # [2 R - 1]


class LateWeights(NamedTuple):
    """Of the network that has seen P: both heads as one map, survivor logits before log regret steps."""

    mean: FloatVector  # [G]
    scale: FloatVector  # [G]
    layers: tuple[tuple[FloatVector, FloatVector], ...]


@compiled
def _standardised(features: FloatVector, mean: FloatVector, scale: FloatVector) -> FloatVector:
    return np.minimum(np.maximum((features - mean) * scale, np.float32(-LIMIT)), np.float32(LIMIT))


@compiled
def _normalised(vector: FloatVector) -> FloatVector:
    """F.layer_norm without weights, [H]."""
    if len(vector) == 0:
        return vector
    centred = vector - vector.sum() / np.float32(len(vector))
    return centred * np.float32(1.0 / math.sqrt((centred * centred).sum() / len(vector) + 1e-5))


@compiled
def early(
    features: FloatVector, draft_hidden: FloatVector, target_hidden: FloatVector, weights: EarlyWeights
) -> tuple[FloatVector, FloatVector]:
    """[F], [H_q], [H_p] -> accept logits [W, W]; survivor logits and log regret steps [R + R - 1]."""
    row = np.concatenate(
        (
            _standardised(features, weights.mean, weights.scale),
            times(_normalised(draft_hidden).reshape(1, -1), weights.draft_projection)[0],
            times(_normalised(target_hidden).reshape(1, -1), weights.target_projection)[0],
        )
    ).reshape(1, -1)
    for weight, bias in weights.layers:
        row = np.maximum(times(row, weight) + bias, np.float32(0))
    accept = times(row, weights.accept)[0].reshape(weights.accept_bias.shape) + weights.accept_bias
    return accept, times(row, weights.quality)[0] + weights.quality_bias


@compiled
def late(features: FloatVector, weights: LateWeights) -> FloatVector:
    """[G] -> [R + R - 1], survivor logits and log regret steps."""
    row = _standardised(features, weights.mean, weights.scale).reshape(1, -1)
    for weight, bias in weights.layers[:-1]:
        row = np.maximum(times(row, weight) + bias, np.float32(0))
    weight, bias = weights.layers[-1]
    return times(row, weight)[0] + bias


@compiled
def expected_loss(quality: FloatVector, target_width: int) -> FloatArray:
    """L(0) = L(1), ..., L(target_width) = 0 from a quality head; [2 R - 1] -> [R + 1].

    L(k) is the mean of the nats that are lost without the slots from k + 1 on and of the probability that the survivor
    is among these. Nothing is lost at target_width: what more slots would have held was never to be had.

    Args:
        quality: survivor logits [R], then log regret steps [R - 1].
        target_width: of the config, at most R.
    """
    ranks = (len(quality) + 1) // 2
    loss = np.zeros(ranks + 1)
    odds = np.exp(quality[:ranks].astype(np.float64) - quality[:ranks].max())
    total = odds.sum()
    nats = beyond = 0.0
    for k in range(ranks - 1, 0, -1):
        nats += math.exp(np.float64(quality[ranks + k - 1]))
        beyond += odds[k] / total
        loss[k] = NATS * nats + (1.0 - NATS) * beyond
    loss[0] = loss[1]
    return np.maximum(loss - loss[target_width], 0.0)


@compiled
def foreseen_counts(accept_logits: FloatVector) -> FloatArray:
    """P(K_w >= M) from the accept head; [W, W] -> [W + 1, W + 1] at [w, M].

    What `losses.count_table` and `losses.tails` give: P(K_{w+1} >= M) = P(K_w >= M) + P(K_w = M - 1) a[w, M - 1].
    """
    widest = len(accept_logits)
    accept = 1.0 / (1.0 + np.exp(-np.maximum(accept_logits.astype(np.float64), -30.0)))
    at_least = np.zeros((widest + 1, widest + 1))
    at_least[:, 0] = 1.0
    for w in range(widest):
        at_least[w + 1, 1:] = at_least[w, 1:] + (at_least[w, :-1] - at_least[w, 1:]) * accept[w]
    return at_least


@compiled
def foresee(
    features: FloatVector, draft_hidden: FloatVector, target_hidden: FloatVector, weights: Packed, target_width: int
) -> tuple[FloatArray, FloatArray]:
    """P(K_w >= M) and L(k) from features [F] by `EarlyWeights`; [W + 1, W + 1], [R + 1]. See `expected_loss`."""
    said = early(features, draft_hidden, target_hidden, EarlyWeights(*weights))
    return foreseen_counts(said[0]), expected_loss(said[1], target_width)


@compiled
def late_loss(features: FloatVector, weights: LateWeights, target_width: int) -> FloatArray:
    """[G] -> [R + 1] L(k); see `expected_loss`."""
    return expected_loss(late(features, weights), target_width)
