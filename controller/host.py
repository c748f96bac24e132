"""WidthNet on the host: one layer at a time, compiled where numba is installed, the same numbers where it is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from controller.network import CUT, LEAST, LIMIT, SOFT, PassRule, WidthNet
from decoding.errors import UserError
from decoding.support.arrays import FloatVector
from decoding.support.compiled import COMPILED, compiled


@compiled
def _looped(state, weight, bias):  # type: ignore[no-untyped-def]
    """state @ weight + bias; numba would ask scipy for the product."""
    made = np.empty((state.shape[0], weight.shape[1]), np.float32)
    for row in range(state.shape[0]):
        made[row] = bias
        for k in range(state.shape[1]):
            value = state[row, k]
            for column in range(weight.shape[1]):
                made[row, column] += value * weight[k, column]
    return made


def _multiplied(state: FloatVector, weight: FloatVector, bias: FloatVector) -> FloatVector:
    return state @ weight + bias


_linear = _looped if COMPILED else _multiplied


@compiled
def log_chances(candidates, features, log_parent, of, target_width, mean, inverse, hidden, top, bias):  # type: ignore[no-untyped-def]
    """log π of a layer's candidates, [C] float32; see `WidthNet.layer`.

    Args:
        candidates, features, log_parent: [C, G], [F], [C] float32.
        of: the columns of log_q and log_key.
        target_width: R.
        mean, inverse: [I] of the inputs.
        hidden: (weight [a, b], bias [b]) of each layer but the last.
        top, bias: [h, 1] and [1], of the last; divided by the temperature.
    """
    count = len(candidates)
    log_q, log_key = candidates[:, of[0]], candidates[:, of[1]]
    chance, race = log_q + log_parent, log_key - log_parent
    by_chance, by_race = np.argsort(-chance, kind="mergesort"), np.argsort(race, kind="mergesort")
    nth, cut = min(target_width, count) - 1, min(CUT, count) - 1
    inputs = np.empty((count, len(mean)), np.float32)
    first = candidates.shape[1]
    inputs[:, :first] = candidates
    inputs[:, first] = log_parent
    inputs[:, first + 1] = log_key - np.sort(log_key)[nth]
    inputs[:, first + 3] = chance
    inputs[:, first + 4] = chance - chance[by_chance[cut]]
    inputs[:, first + 6] = race - race[by_race[nth]]
    inputs[:, first + 8] = log_key + log_q
    for place in range(count):
        rank = math.log(place + 1.0)
        inputs[place, first + 2] = rank
        inputs[by_chance[place], first + 5] = rank
        inputs[by_race[place], first + 7] = rank
    for place in range(len(features)):
        inputs[:, first + 9 + place] = features[place]
    state = np.minimum(np.maximum((inputs - mean) * inverse, np.float32(-LIMIT)), np.float32(LIMIT))
    for weight, shift in hidden:
        state = np.maximum(_linear(state, weight, shift), np.float32(0.0))
    odds = _linear(state, top, bias)[:, 0]
    return log_parent - np.log1p(np.exp(np.minimum(-odds, np.float32(80.0))))


class HostNet:
    """A WidthNet's weights, and what it says of one layer.

    Args:
        net: its weights are copied; later changes to it are not seen.
    """

    def __init__(self, net: WidthNet) -> None:
        linears = [block[0] for block in list(net.mlp)[:-1]]  # type: ignore[index]
        last: Any = net.mlp[-1]
        self.target_width, self.sizes = net.target_width, net.sizes
        self._of = net.of_candidate[0], net.of_candidate[1]
        self._hidden = tuple((_host(linear.weight.T), _host(linear.bias)) for linear in linears)
        self._top = _host(last.weight.T / net.temperature)
        self._bias = _host(last.bias / net.temperature)
        self._mean, self._inverse = _host(net.mean), _host(1.0 / net.scale)
        self._before, self._after = _Rule(net.before, None), _Rule(net.after, (net.after_mean, net.after_scale))

    def chances(self, candidates: FloatVector, features: FloatVector, log_parent: FloatVector) -> FloatVector:
        """log π of a layer's candidates, [C]; arguments as for `log_chances`."""
        if (candidates.shape[1:], features.shape) != ((self.sizes[0],), (self.sizes[1],)):  # compiled code reads on
            raise UserError(
                f"The features are {candidates.shape[1:]} of a candidate and {features.shape} of a layer, the "
                f"controller was trained with {self.sizes[0]} and {self.sizes[1]}. Give the features that it names."
            )
        weights = self._mean, self._inverse, self._hidden, self._top, self._bias
        found: FloatVector = log_chances(candidates, features, log_parent, self._of, self.target_width, *weights)
        return found

    def passes(self, features: Sequence[float], left_out: float, missing: float) -> list[float]:
        """P that drafts hold the first j = 1..R of the selection, with the candidates in hand."""
        return self._after(features, (math.log(left_out + SOFT), missing))

    def expects(self, context: Sequence[float], width: int) -> list[float]:
        """The same before the layer is drafted, by BEFORE and the number of drafts."""
        return self._before(context, (-math.log(width),))


class _Rule:
    """A PassRule as numbers."""

    def __init__(self, rule: PassRule, standard: tuple[Tensor, Tensor] | None) -> None:
        softplus = [np.logaddexp(0.0, part.tolist()) for part in (rule.steps, rule.rates)]  # of any size
        self._steps, self._rates = np.cumsum(softplus[0]).tolist(), softplus[1].tolist()
        self._weights, self._bias = rule.linear.weight[0].tolist(), float(rule.linear.bias.detach())
        count = len(self._weights)
        mean, scale = ([0.0] * count, [1.0] * count) if standard is None else (part.tolist() for part in standard)
        self._standard = list(zip(mean, scale, strict=True)) if standard is not None else None

    def __call__(self, context: Sequence[float], evidence: Sequence[float]) -> list[float]:
        if self._standard is not None:
            scaled = [(value - mean) / scale for value, (mean, scale) in zip(context, self._standard, strict=True)]
            context = [min(max(value, -LIMIT), LIMIT) for value in scaled]
        odds = self._bias + sum(weight * value for weight, value in zip(self._weights, context, strict=True))
        odds -= sum(rate * value for rate, value in zip(self._rates, evidence, strict=True))
        return [1.0 / (1.0 + math.exp(min(step - odds, 80.0))) for step in self._steps]


def leftovers(chances: FloatVector, drafted: np.ndarray, target_width: int) -> tuple[float, float]:
    """`network.leftovers` of one layer."""
    others = np.minimum(chances[~drafted], 1 - LEAST)
    return float(-np.log1p(-others).sum()), float(target_width - chances[drafted].sum())


def _host(tensor: Tensor) -> FloatVector:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy()).copy()
