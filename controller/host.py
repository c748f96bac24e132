"""WidthNet on the host: one layer at a time, compiled where numba is installed, the same numbers where it is not."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from controller.network import CUT, LEAST, LIMIT, SOFT, PassRule, WidthNet
from controller.plan import LEAST_CHANCE, SCORED, best_count, worth
from decoding.errors import UserError
from decoding.support.arrays import FloatArray, FloatVector, IntArray
from decoding.support.compiled import COMPILED, compiled


@compiled
def _looped(state, weight, bias):  # type: ignore[no-untyped-def]
    """ReLU of weight' state + bias, [b, C] of [a, C]; numba would ask scipy for the product."""
    made = np.empty((weight.shape[1], state.shape[1]), np.float32)
    for unit in range(weight.shape[1]):
        row = made[unit]
        row[:] = bias[unit]
        for k in range(state.shape[0]):
            factor, values = weight[k, unit], state[k]
            for place in range(len(row)):
                row[place] += factor * values[place]
        for place in range(len(row)):
            row[place] = max(row[place], np.float32(0.0))
    return made


def _multiplied(state: FloatVector, weight: FloatVector, bias: FloatVector) -> FloatVector:
    return np.maximum(weight.T @ state + bias[:, None], np.float32(0.0))


_relu = _looped if COMPILED else _multiplied


@compiled
def log_chances(candidates, features, log_parent, of, target_width, mean, inverse, hidden, top, bias):  # type: ignore[no-untyped-def]
    """log π of a layer's candidates, [C] float32; see `WidthNet.layer`.

    Args:
        candidates, features, log_parent: [C, G], [F], [C] float32.
        of: the columns of log_q and log_key.
        target_width: R.
        mean, inverse: [I] of the inputs.
        hidden: (weight [a, b], bias [b]) of each layer but the last.
        top, bias: [h] and [1], of the last; divided by the temperature.
    """
    count, first = candidates.shape
    log_q, log_key = candidates[:, of[0]], candidates[:, of[1]]
    chance, race = log_q + log_parent, log_key - log_parent
    by_chance, by_race = np.argsort(-chance, kind="mergesort"), np.argsort(race, kind="mergesort")
    nth, cut = min(target_width, count) - 1, min(CUT, count) - 1
    state = np.empty((first + 9, count), np.float32)
    state[:first] = candidates.T
    state[first] = log_parent
    state[first + 1] = log_key - np.sort(log_key)[nth]
    state[first + 3] = chance
    state[first + 4] = chance - chance[by_chance[cut]]
    state[first + 6] = race - race[by_race[nth]]
    state[first + 8] = log_key + log_q
    for place in range(count):
        rank = math.log(place + 1.0)
        state[first + 2, place] = rank
        state[first + 5, by_chance[place]] = rank
        state[first + 7, by_race[place]] = rank
    for k in range(len(state)):
        row = state[k]
        for place in range(count):
            row[place] = min(max((row[place] - mean[k]) * inverse[k], np.float32(-LIMIT)), np.float32(LIMIT))
    weight, shift = hidden[0]
    shift = shift.copy()
    for place in range(len(features)):  # all candidates share them
        k = len(state) + place
        value = min(max((features[place] - mean[k]) * inverse[k], np.float32(-LIMIT)), np.float32(LIMIT))
        shift += value * weight[k]
    state = _relu(state, weight[: len(state)], shift)
    for weight, shift in hidden[1:]:
        state = _relu(state, weight, shift)
    found = np.empty(count, np.float32)
    for place in range(count):
        odds = bias[0]
        for k in range(len(top)):
            odds += top[k] * state[k, place]
        found[place] = log_parent[place] - math.log1p(math.exp(min(-odds, np.float32(80.0))))
    return found


@compiled
def leftovers(chances, drafted, target_width):  # type: ignore[no-untyped-def]
    """`network.leftovers` of one layer."""
    left_out, missing = 0.0, float(target_width)
    for place in range(len(chances)):
        if drafted[place]:
            missing -= chances[place]
        else:
            left_out -= math.log1p(-min(chances[place], 1.0 - LEAST))
    return left_out, missing


@compiled
def chance_of(rule, odds, target_width):  # type: ignore[no-untyped-def]
    """P that drafts hold the whole selection, by the log-odds before the steps; `rule` as in `HostNet`."""
    steps = rule[3]
    return 1.0 / (1.0 + math.exp(min(steps[target_width - 1] - odds, 80.0)))


@compiled
def passes(rule, features, left_out, missing, target_width):  # type: ignore[no-untyped-def]
    """P that drafts hold the whole selection, with the candidates in hand."""
    weights, bias, rates, _, mean, scale = rule
    odds = bias - rates[0] * math.log(left_out + SOFT) - rates[1] * missing
    for place in range(len(features)):
        odds += weights[place] * min(max((features[place] - mean[place]) / scale[place], -LIMIT), LIMIT)
    return chance_of(rule, odds, target_width)


@compiled
def expects(rule, context, width, target_width):  # type: ignore[no-untyped-def]
    """P that `width` drafts hold the whole selection, before the layer is drafted, by BEFORE."""
    weights, bias, rates, _ = rule
    odds = bias + rates[0] * math.log(width)
    for place in range(len(weights)):
        odds += weights[place] * context[place]
    return chance_of(rule, odds, target_width)


@compiled
def decide(net, rules, candidates, features, log_parent, root, widths, reach, nodes, rate, costs):  # type: ignore[no-untyped-def]
    """What to draft of a layer, and what follows from it.

    Args:
        net, rules: as in `HostNet`.
        candidates, features, log_parent: as for `log_chances`.
        root: what `root_features` gives.
        widths: the layer, from 1; R of the decoding; the most that may be drafted.
        reach: the chance that all layers above pass.
        nodes: of the pass so far.
        rate, costs: as for `best_count`.

    Returns:
        As `HostNet.layer`.
    """
    layer, target_width, most = widths
    found = log_chances(candidates, features, log_parent, *net)
    chances = np.exp(found)
    scored = candidates[:, net[0][2]] > 0
    order = np.argsort(-chances, kind="mergesort")[:most]
    values = np.empty(len(order), np.float64)
    likely, fresh = 0, 0
    for place in order:
        if chances[place] < LEAST_CHANCE:
            break
        likely += 1
        if not scored[place]:
            values[fresh] = worth(chances[place], reach)
            fresh += 1
    sent = best_count(values[:fresh], nodes, costs, rate)
    picks = np.empty(max(likely, 1), np.int64)
    picks[0] = order[0]  # if it is the only one
    count = 0
    for place in order[:likely]:
        if scored[place] or sent > 0:
            picks[count] = place
            count += 1
        if not scored[place]:
            sent -= 1
    picks = picks[: max(count, 1)]
    drafted = scored.copy()
    drafted[picks] = True
    left_out, missing = leftovers(chances, drafted, target_width)
    fresh, unknown, total = 0, 0.0, 1e-6
    values = values[: len(picks)]
    for place in range(len(picks)):
        chance = chances[picks[place]]
        total += chance
        values[place] = SCORED
        if not scored[picks[place]]:
            values[place] = worth(chance, reach)
            fresh, unknown = fresh + 1, unknown + chance
    passing = reach * passes(rules[1], features, left_out, missing, target_width)
    left = math.log(left_out + SOFT), missing, unknown / total
    below = expects(rules[0], (0.0, layer + 1.0, *root, *left), len(picks), target_width)
    return picks, found[picks], values, fresh, left, passing, below


class Layer(NamedTuple):
    """A layer that was decided."""

    picks: IntArray  # [w] candidates to draft, in order
    log_chances: FloatVector  # [w] log π
    values: FloatArray  # [w] tokens that each is worth; SCORED where the target has scored it
    fresh: int  # of them, that it has not
    left: tuple[float, float, float]  # what BEFORE says of this layer at the one below
    passing: float  # the chance that it passes, and all above
    below: float  # that the next one does, if as many are drafted


class HostNet:
    """A WidthNet's weights, and what it says of one layer.

    Args:
        net: its weights are copied; later changes to it are not seen.
    """

    def __init__(self, net: WidthNet) -> None:
        linears = [block[0] for block in list(net.mlp)[:-1]]  # type: ignore[index]
        last: Any = net.mlp[-1]
        self.target_width, self.sizes = net.target_width, net.sizes
        hidden = tuple((_host(linear.weight.T), _host(linear.bias)) for linear in linears)
        inputs = _host(net.mean), _host(1.0 / net.scale)
        top = _host(last.weight[0] / net.temperature), _host(last.bias / net.temperature)
        self._net = tuple(net.of_candidate), net.target_width, *inputs, hidden, *top
        before, after = _rule(net.before), _rule(net.after)
        standard = _host(net.after_mean).astype(np.float64), _host(net.after_scale).astype(np.float64)
        self._rules = before, (*after, *standard)

    def layer(
        self,
        candidates: FloatVector,
        features: FloatVector,
        log_parent: FloatVector,
        root: tuple[float, float, float, float],
        widths: tuple[int, int, int],
        reach: float,
        nodes: int,
        rate: float,
        costs: FloatArray,
    ) -> Layer:
        """Decide what to draft of a layer; arguments as for `decide`."""
        self._check(candidates, features)
        given = candidates, features, log_parent, root, widths, float(reach), nodes, float(rate), costs
        return Layer(*decide(self._net, self._rules, *given))

    def passes(self, features: FloatVector, left_out: float, missing: float, target_width: int) -> float:
        """P that drafts hold the first `target_width` of the selection, with the candidates in hand."""
        return float(passes(self._rules[1], features, left_out, missing, target_width))

    def expects(self, context: tuple[float, ...], width: int, target_width: int) -> float:
        """P that `width` drafts hold the first `target_width`, before the layer is drafted, by BEFORE."""
        return float(expects(self._rules[0], context, width, target_width))

    def _check(self, candidates: FloatVector, features: FloatVector) -> None:
        if (candidates.shape[1:], features.shape) != ((self.sizes[0],), (self.sizes[1],)):  # compiled code reads on
            raise UserError(
                f"The features are {candidates.shape[1:]} of a candidate and {features.shape} of a layer, the "
                f"controller was trained with {self.sizes[0]} and {self.sizes[1]}. Give the features that it names."
            )


def _rule(rule: PassRule) -> tuple[FloatArray, float, FloatArray, FloatArray]:
    """A PassRule as numbers: weights, bias, rates of the evidence, steps."""
    steps, rates = (np.logaddexp(0.0, np.array(part.tolist())) for part in (rule.steps, rule.rates))  # of any size
    return np.array(rule.linear.weight[0].tolist()), float(rule.linear.bias.detach()), rates, np.cumsum(steps)


def _host(tensor: Tensor) -> FloatVector:
    return np.ascontiguousarray(tensor.detach().float().cpu().numpy()).copy()
