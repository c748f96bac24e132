"""What a policy computes at every layer: compiled where numba is installed, plain numpy where it is not, one source.

A policy is asked for a few small numbers between passes of large models, when little of Python and numpy is left in a
processor's caches: each call costs several times what it does in a loop. Compiled, a decision is one call. Records
cross into compiled code as plain tuples, since numba works out the type of a named one anew each time, in Python.

Both ways give the same numbers up to rounding. numba comes with `pip install -e ".[fast]"`.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from decoding.acceptance import VOCABULARY_LIMIT

FloatArray = NDArray[np.float64]
FloatVector = NDArray[np.float32]
IntArray = NDArray[np.int64]
Packed = tuple[Any, ...]  # the fields of a record
Function = TypeVar("Function", bound=Callable[..., Any])

COMPILED = importlib.util.find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") == "0"
TOP = 10  # likeliest continuations of P that are looked at once it is known
GAP_LIMIT = 20.0  # nats that gaps between weights are cut at, and what they are with one beam
LEAST_LOG = -12.0  # log-probability of a continuation that is not there, and the least of those that are
LIMIT = 5.0  # standardised inputs are clipped here, as in WidthNet
NATS = 0.5  # share of the loss that is in nats; the rest is in the chance that the best hypothesis is lost


def compiled(function: Function) -> Function:
    """The function as machine code, which is kept on disk for the next run; itself without numba."""
    if not COMPILED:
        return function
    import numba

    try:
        return cast(Function, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # no directory that it could be kept in
        return cast(Function, numba.njit(error_model="numpy")(function))


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


# ------------------------------------------------------------------------------------------ features


@compiled
def _describe_weights(out: FloatVector, weights: FloatArray) -> None:
    """Number of beams, and how far the second and the last are behind the best; [3], [B] best first."""
    count = len(weights)
    out[0] = count
    out[1] = min(weights[0] - weights[1], GAP_LIMIT) if count > 1 else GAP_LIMIT
    out[2] = min(weights[0] - weights[-1], GAP_LIMIT) if count > 1 else GAP_LIMIT


class Target(NamedTuple):
    """A layer once its P is known."""

    drafted: bool
    layer: int
    remaining: int  # tokens that the beams may still grow by
    weights: FloatArray  # [B] log-weights of the beams, best first
    probs: FloatArray  # [S] likeliest entries of P, in any order
    parents: IntArray  # [S] the beams that they continue
    support: int  # entries that P has in all


class Context(NamedTuple):
    """A layer before its drafts are drawn; the first seven as in `Target`, of the parents and of Q."""

    drafted: bool
    layer: int
    remaining: int
    weights: FloatArray
    probs: FloatArray
    parents: IntArray
    support: int  # the tail enters the entropy as if it were uniform
    above: int  # draft width of the layer above
    widths: int  # of all layers above together
    layers: int  # committed by the iteration before
    accepted: float  # share of its drafts
    passed: bool  # every layer of it


@compiled
def describe_context(packed: Packed) -> FloatVector:
    """A `Context` in the order of `features.NAMES`, which says what each is; [F]."""
    context = Context(*packed)
    weights, probs, parents, support = context.weights, context.probs, context.parents, context.support
    out = np.empty(21, np.float32)
    out[0], out[1], out[2] = context.drafted, context.layer, math.log1p(context.remaining)
    _describe_weights(out[3:6], weights)
    best, count = weights[0], len(weights)
    total, mean = 0.0, 0.0
    for weight in weights:
        share = math.exp(weight - best)
        total += share
        if share > 0:
            mean += share * (weight - best)
    out[6] = math.log(total) - mean / total if count > 1 else 0.0
    order = np.argsort(-probs, kind="mergesort")
    entropy, mass = 0.0, 0.0
    for place, entry in enumerate(order):
        prob = probs[entry]
        mass += prob
        entropy -= prob * math.log(prob) if prob > 0 else 0.0  # shares of a beam search may be too small for a float
        if place <= 1:
            out[10] = mass
        if place <= 3:
            out[11] = mass
        if place <= 7:
            out[12] = mass
    tail = 1.0 - mass
    if support > len(probs) and tail > 0:
        entropy -= tail * math.log(tail / (support - len(probs)))
    out[7], out[8] = entropy, probs[order[0]]
    out[9] = probs[order[1]] if len(order) > 1 else 0.0
    out[13] = math.log(support)
    heaviest, share, last = 0.0, 0.0, -1
    for entry in np.argsort(parents, kind="mergesort"):
        share = share + probs[entry] if parents[entry] == last else probs[entry]
        last = parents[entry]
        heaviest = max(heaviest, share)
    out[14] = heaviest / mass
    distinct = 0
    head = parents[order[:8]]
    for i in range(len(head)):
        new = True
        for j in range(i):
            if head[j] == head[i]:
                new = False
        distinct += new
    out[15], out[16], out[17] = distinct, context.above, context.widths
    out[18], out[19], out[20] = context.layers, context.accepted, context.passed
    return out


@compiled
def describe_target(packed: Packed) -> FloatVector:
    """A `Target` in the order of `features.TARGET_NAMES`; [G]."""
    target = Target(*packed)
    probs, parents = target.probs, target.parents
    out = np.zeros(7 + 3 * TOP - 1, np.float32)
    out[0], out[1], out[2] = target.drafted, target.layer, math.log1p(target.remaining)
    _describe_weights(out[3:6], target.weights)
    out[6] = math.log(target.support)
    out[7 + TOP : 7 + 2 * TOP] = LEAST_LOG
    order = np.argsort(-probs, kind="mergesort")[:TOP]
    for place, entry in enumerate(order):
        out[7 + place] = probs[entry]
        out[7 + TOP + place] = max(math.log(probs[entry]), LEAST_LOG) if probs[entry] > 0 else LEAST_LOG
        if place > 0:
            out[6 + 2 * TOP + place] = parents[entry] == parents[order[0]]
    return out


# ------------------------------------------------------------------------------------------ network


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

    What `counts.count_table` and `counts.tails` give: P(K_{w+1} >= M) = P(K_w >= M) + P(K_w = M - 1) a[w, M - 1].
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
    context: Packed, draft_hidden: FloatVector, target_hidden: FloatVector, weights: Packed, target_width: int
) -> tuple[FloatArray, FloatArray]:
    """P(K_w >= M) and L(k) of a `Context` by `EarlyWeights`; [W + 1, W + 1], [R + 1]. See `expected_loss`."""
    said = early(describe_context(context), draft_hidden, target_hidden, EarlyWeights(*weights))
    return foreseen_counts(said[0]), expected_loss(said[1], target_width)


@compiled
def late_loss(features: FloatVector, weights: LateWeights, target_width: int) -> FloatArray:
    """[G] -> [R + 1] L(k); see `expected_loss`."""
    return expected_loss(late(features, weights), target_width)


# ------------------------------------------------------------------------------------------ closed form


@compiled
def matched(target: Packed, draft: Packed) -> FloatArray:
    """Q at the entries of P, 0 where it has none; both are (parents, tokens, probabilities).

    What Q has elsewhere plays no part in `accept_chances`: P is nothing there.
    """
    wanted, keys = target[0] * VOCABULARY_LIMIT + target[1], draft[0] * VOCABULARY_LIMIT + draft[1]
    order = np.argsort(keys)
    found = order[np.minimum(np.searchsorted(keys[order], wanted), len(keys) - 1)]
    return np.where(keys[found] == wanted, draft[2][found], 0.0)


@compiled
def accept_chances(p: FloatArray, q: FloatArray, draft_width: int) -> FloatArray:
    """`decoding.acceptance.accept_probabilities` (design 5.3); P and Q on P's support [S] -> [w]."""
    accept = np.ones(draft_width)
    c, left = 0.0, 1.0
    for draft in range(draft_width):
        c += left
        after = np.maximum(p - c * q, 0.0).sum()
        accept[draft] = 1.0 - after / left
        left = after
        if left <= 0.0:
            break
    return accept


@compiled
def renewed_counts(accept: FloatArray) -> FloatArray:
    """P(K_w >= M) by the renewal recursion of design 5.3; chances after rejections in a row [w] -> [w + 1].

    With the first acceptance at draft i, M - 1 more are needed of the w - i drafts that follow.
    """
    width = len(accept)
    first, rejected = np.empty(width), 1.0  # probability that draft i is the first one accepted
    for i in range(width):
        first[i] = rejected * accept[i]
        rejected *= 1.0 - accept[i]
    at_least, reached = np.ones(width + 1), np.ones(width + 1)  # reached: P(K_m >= M) at [m], one M after another
    for asked in range(1, width + 1):
        for drafts in range(width, asked - 2, -1):  # downwards: entries below are of the M before
            chance = 0.0
            for i in range(drafts - asked + 1):
                chance += first[i] * reached[drafts - 1 - i]
            reached[drafts] = chance
        at_least[asked] = min(reached[width], 1.0)
    return at_least


# ------------------------------------------------------------------------------------------ plan


class Rules(NamedTuple):
    """Which M there are, and how many beams go on."""

    least: int
    most: int  # the config's target_width
    keep: bool  # accepted drafts beyond M go on, up to `most`; else M beams
    full: bool  # a failed layer is filled to `most`; else to its own M


class CostTable(NamedTuple):
    """Seconds by nodes, up to the longest forest; the last entry counts beyond."""

    draft: FloatArray
    target: FloatArray
    layer: float  # the host's, of a drafted layer


class Prospect(NamedTuple):
    """What is known of layers that nobody has looked at."""

    passing: FloatArray  # [layers] probability to pass once reached
    start: float  # the same of layers beyond these
    earned: float  # mean reward of a committed layer
    left: float  # share of what a pass brings that is left after its loss
    correction: float  # of promised probabilities to pass, by experience


@compiled
def ahead(
    prospect: Prospect, costs: CostTable, layer: int, deepest: int, nodes: int, width: int, parents: int
) -> tuple[FloatArray, FloatArray]:
    """Drafting from `layer` down to each depth: A_d, the reward to be had once the layer above has passed, and B_d,
    the seconds that it takes; the first entries are 0, for not at all."""
    count, last = max(deepest - layer + 1, 0), len(costs.target) - 1
    gained, spent = np.zeros(count + 1), np.zeros(count + 1)
    passed = prospect.left * prospect.earned
    scored = costs.target[min(nodes, last)]
    seconds = costs.layer + costs.draft[min(parents, last)]
    for d in range(count):
        known = layer - 1 + d < len(prospect.passing)
        passed *= prospect.passing[layer - 1 + d] if known else prospect.start
        nodes += width
        after = costs.target[min(nodes, last)]
        gained[d + 1] = gained[d] + passed
        spent[d + 1] = spent[d] + seconds + after - scored
        scored, seconds = after, costs.layer + costs.draft[min(width, last)]
    return gained, spent


@compiled
def best_depth(likely: float, gained: FloatArray, rate: float, spent: FloatArray) -> tuple[int, float]:
    """The d at which likely · A_d - rate · B_d is largest, the shallowest of equals, and what it is; see `ahead`."""
    chosen, best = 0, -math.inf
    for d in range(len(gained)):
        net = likely * gained[d] - rate * spent[d]
        if net > best:
            chosen, best = d, net
    return chosen, best


@compiled
def worth_drafting(
    prospect: Packed,
    costs: Packed,
    rate: float,
    reach: float,
    layer: int,
    deepest: int,
    parents: int,
    nodes: int,
    width: int,
) -> bool:
    """See `Planner.worth_drafting`; of a `Prospect` and a `CostTable`."""
    gained, spent = ahead(Prospect(*prospect), CostTable(*costs), layer, deepest, nodes, width, parents)
    return bool(best_depth(reach, gained, rate, spent)[1] > 0)


class Decision(NamedTuple):
    """A layer's decision before its drafts are drawn."""

    draft_width: int  # w
    target_width: int  # M, as far as it is known by then
    passing: float  # P(K_w >= M)
    further: float  # reward that a pass brings: of the next layer, and of those planned below it
    onward: float  # probability that this layer and all above it pass
    deeper: bool  # whether the next layer is to be drafted too


@compiled
def kept_loss(at_least: FloatArray, loss: FloatArray, rules: Rules) -> FloatArray:
    """Mean of L over the beams that go on, at every M from the least; [counts] P(K >= k), [R + 1] -> [most + 1]."""
    counts = len(at_least)
    lost, going = np.zeros(rules.most + 1), 0.0  # going: Σ P(K = k) L(k) over k >= M, all of which go on
    for k in range(max(counts - 1, rules.most), rules.least - 1, -1):
        chance = at_least[k] if k < counts else 0.0
        going += (chance - (at_least[k + 1] if k + 1 < counts else 0.0)) * loss[min(k, rules.most)]
        if k <= rules.most:
            passed = going if rules.keep else chance * loss[k]
            lost[k] = passed + (1.0 - chance) * loss[rules.most if rules.full else k]
    return lost


@compiled
def plan_widths(
    at_least: FloatArray,
    loss: FloatArray,
    prospect: Prospect,
    costs: CostTable,
    rules: Rules,
    width_value: float,
    rate: float,
    reach: float,
    layer: int,
    deepest: int,
    nodes: int,
    widest: int,
) -> Decision:
    """See `Planner.widths`; [W + 1, W + 1] P(K_w >= M), [R + 1] L(k)."""
    last = len(costs.target) - 1
    gained, spent = ahead(prospect, costs, layer + 1, deepest, nodes + widest, widest, rules.least)
    w, m, below, best = rules.least, rules.least, 0, -math.inf
    for width in range(rules.least, widest + 1):
        if width > rules.least:  # what is drafted below begins with a pass over this layer
            spent[1:] += costs.draft[width] - costs.draft[width - 1]
        seconds = costs.target[min(nodes + width, last)] - costs.target[min(nodes, last)]
        lost = kept_loss(at_least[width], loss, rules)
        for asked in range(rules.least, min(width, rules.most) + 1):
            chance = min(1.0, at_least[width, asked] * prospect.correction)
            depth, more = best_depth(reach * chance, gained, rate, spent)
            net = reach * (chance * prospect.earned - width_value * lost[asked]) - rate * seconds + more
            if net > best:
                w, m, below, best = width, asked, depth, net
    promised = float(at_least[w, m])
    onward = reach * min(1.0, promised * prospect.correction)
    gains, seconds_below = ahead(prospect, costs, layer + 1, deepest, nodes + w, w, w)
    deeper = best_depth(onward, gains, rate, seconds_below)[1] > 0
    return Decision(w, m, promised, prospect.earned + gained[below], onward, bool(deeper))


@compiled
def plan_context(
    context: Packed,
    draft_hidden: FloatVector,
    target_hidden: FloatVector,
    weights: Packed,
    prospect: Packed,
    costs: Packed,
    rules: Packed,
    width_value: float,
    rate: float,
    reach: float,
    deepest: int,
    nodes: int,
    widest: int,
) -> Decision:
    """`plan_widths` of a `Context` by what `foresee` says of it, in one call.

    Of `EarlyWeights`, a `Prospect`, a `CostTable` and `Rules`.
    """
    choice = Rules(*rules)
    at_least, loss = foresee(context, draft_hidden, target_hidden, weights, choice.most)
    known = Prospect(*prospect), CostTable(*costs), choice
    layer = context[1]
    return plan_widths(at_least, loss, *known, width_value, rate, reach, layer, deepest, nodes, widest)


@compiled
def least_bearable(loss: FloatArray, width_value: float, brought: float, least: int, most: int) -> int:
    """The smallest M whose loss a pass outweighs, `most` where none does; loss is [R + 1] L(k)."""
    for width in range(least, most + 1):
        if width_value * (loss[width] - loss[most]) <= brought:
            return width
    return most


@compiled
def best_width(loss: FloatArray, at_least: FloatArray, width_value: float, brought: float, rules: Packed) -> int:
    """The M whose passes bring most, less what is lost with the beams that go on; of `Rules`.

    Args:
        loss: [R + 1] L(k).
        at_least: [w + 1] P(K_w >= M). More than w may be asked for: the layer cannot pass, and is filled.
        brought: by a pass.
    """
    choice = Rules(*rules)
    lost = kept_loss(at_least, loss, choice)
    chosen, best = choice.least, -math.inf
    for asked in range(choice.least, choice.most + 1):
        net = (at_least[asked] * brought if asked < len(at_least) else 0.0) - width_value * lost[asked]
        if net > best:
            chosen, best = asked, net
    return chosen


@compiled
def cheapest_width(
    loss: FloatArray, width_value: float, rate: float, costs: Packed, drafts: bool, least: int, most: int
) -> int:
    """M of the layer that the target draws: what is lost, against carrying M beams into the next iteration."""
    chosen, best, table = least, math.inf, CostTable(*costs)
    for width in range(least, most + 1):
        seconds = table.target[width] + (table.draft[width] if drafts else 0.0)
        price = width_value * loss[width] + rate * seconds
        if price < best:
            chosen, best = width, price
    return chosen


# M of a layer in one call, with the L(k) that it was set by; of a `Target` and `LateWeights`.


@compiled
def judge_bearable(
    target: Packed, weights: Packed, width_value: float, brought: float, least: int, most: int
) -> tuple[int, FloatArray]:
    """M where each count speaks for itself; see `least_bearable`."""
    loss = late_loss(describe_target(target), LateWeights(*weights), most)
    return least_bearable(loss, width_value, brought, least, most), loss


@compiled
def judge_counted(
    target: Packed,
    target_joint: Packed,
    draft_joint: Packed,
    draft_width: int,
    weights: Packed,
    width_value: float,
    brought: float,
    rules: Packed,
) -> tuple[int, FloatArray]:
    """M where P(K_w >= M) matters, which is that of P and Q in closed form; see `best_width`, `matched` and `Rules`."""
    loss = late_loss(describe_target(target), LateWeights(*weights), rules[1])
    at_least = renewed_counts(accept_chances(target_joint[2], matched(target_joint, draft_joint), draft_width))
    return best_width(loss, at_least, width_value, brought, rules), loss


@compiled
def judge_final(
    target: Packed,
    weights: Packed,
    width_value: float,
    rate: float,
    costs: Packed,
    drafts: bool,
    least: int,
    most: int,
) -> tuple[int, FloatArray]:
    """M of the layer that the target draws; see `cheapest_width`."""
    loss = late_loss(describe_target(target), LateWeights(*weights), most)
    return cheapest_width(loss, width_value, rate, costs, drafts, least, most), loss
