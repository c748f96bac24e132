"""How many drafts of a layer the paper's rule accepts, in closed form (2409.16560, with replacement; design 5.6)."""

from __future__ import annotations

import numpy as np

from decoding.support.arrays import FloatArray


def accept_probabilities(p: FloatArray, q: FloatArray, width: int, as_shipped: bool = False) -> FloatArray:
    """α_1..α_w: probability that a draft is accepted after j - 1 rejections in a row.

    One curve holds it all: with Z(c) = Σ max(P - c Q, 0), c_0 = 0 and c_{j+1} = c_j + Z(c_j), the residual
    after j rejections is proportional to max(P - c_j Q, 0) and α_{j+1} = 1 - Z(c_{j+1}) / Z(c_j).

    Args:
        p, q: P and Q at the entries of P, both [S].
        width: w.
        as_shipped: subtract Q twice per rejection, as the published code does (not the true probabilities).

    Returns:
        [w] float64; after the residual is used up, the remaining entries are 1.
    """
    accept = np.ones(width)
    c, left = 0.0, 1.0  # left: Z(c)
    for j in range(width):
        c += left
        after = np.maximum(p - c * q, 0.0).sum()
        accept[j] = 1.0 - after / left
        if as_shipped:
            c += left
            after = np.maximum(p - c * q, 0.0).sum()
        left = after
        if left <= 0.0:
            break
    return accept


def accepted_count_table(accept: FloatArray) -> FloatArray:
    """P(K_m = k) for all m, k ≤ w by renewal: the first acceptance at draft i leaves k - 1 for the m - i that follow.

    Args:
        accept: α_1..α_w, [w], from `accept_probabilities`.

    Returns:
        [w + 1, w + 1] float64; row m is the distribution of the accepted count among m drafts.
    """
    width = len(accept)
    table = np.zeros((width + 1, width + 1))
    first, rejected = np.empty((width, 1)), 1.0  # first: probability that draft i is the first one accepted
    table[0, 0] = 1.0
    for m in range(width):
        first[m, 0] = rejected * accept[m]
        rejected *= 1.0 - accept[m]
        table[m + 1, 0] = rejected
        table[m + 1, 1:] = (first[: m + 1] * table[m::-1, :-1]).sum(axis=0)
    return table
