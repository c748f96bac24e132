"""Dice and verdicts for uncut distributions, on the device: P and Q over the whole grid of (beam, token).

2409.16560 sections 3.2-3.3, design 5.1-5.3. The same meaning as `sampling.py` and `acceptance.py`, which work on the
host over the support that top-k or top-p leave. Without a cut the support is all B * V pairs: here nothing is sorted
or brought to the host but what was drawn, and drawing or verifying a layer waits for the device once (dice that live
on it may wait once more).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from decoding.config import DecodingConfig
from decoding.dice.acceptance import LayerVerdict
from decoding.dice.sampling import Dice, FloatArray, IntArray, Joint, nan_message
from decoding.errors import UserError


@dataclass(frozen=True, eq=False)
class DenseJoint:
    """A distribution over (beam, token) as a grid on the device.

    An entry is named by its flat index, row * V + token. A model that returned NaN makes every probability NaN; what
    brings numbers to the host looks for it there and raises a UserError.
    """

    nodes: IntArray  # [B] node of each row's beam, on the host
    grid: Tensor  # [B, V] float64, sums to one, zero where cut
    log_p: Tensor  # [B, V] float32, log p(v | x_i) before any cut
    base: FloatArray  # [B] log-weights s_i, on the host
    model_name: str = "model"
    _known: dict[int, float] = field(default_factory=dict, repr=False)  # log p of entries that came to the host

    def __len__(self) -> int:
        """Entries of positive probability; waits for the device the first time."""
        return self._support

    def find(self, parents: IntArray, tokens: IntArray) -> IntArray:
        """Flat indices of (parent node, token) pairs, -1 where the parent has no row; [N], [N] -> [N]."""
        row_of = {node: row for row, node in enumerate(self.nodes.tolist())}
        rows = np.array([row_of.get(node, -1) for node in parents.tolist()], dtype=np.int64)
        return np.where(rows < 0, -1, rows * self.grid.shape[1] + tokens)

    def entries(self, picks: Iterable[int]) -> list[tuple[int, int, float]]:
        """(parent node, token, child's log-weight) of flat indices; one transfer, none for what was just drawn."""
        picks = [int(pick) for pick in picks]
        missing = [pick for pick in picks if pick not in self._known]
        if missing:
            index = _send(np.array(missing, dtype=np.int64), self.log_p.device)
            self.know(missing, self.log_p.reshape(-1).index_select(0, index).cpu().numpy())
        places = [(pick, *divmod(pick, self.grid.shape[1])) for pick in picks]
        return [(int(self.nodes[row]), token, float(self.base[row]) + self._known[pick]) for pick, row, token in places]

    def know(self, picks: Iterable[int], log_p: NDArray[np.floating]) -> None:
        """Keep log p of entries that came to the host together with something else."""
        self._known.update(zip(picks, log_p.tolist(), strict=True))

    @property
    def parents(self) -> IntArray:
        """As in `Joint`: [S] on the support, brought to the host; so are the next three."""
        return self._compact.parents

    @property
    def tokens(self) -> IntArray:
        """[S]."""
        return self._compact.tokens

    @property
    def probs(self) -> FloatArray:
        """[S]."""
        return self._compact.probs

    @property
    def weights(self) -> FloatArray:
        """[S]."""
        return self._compact.weights

    def compact(self) -> Joint:
        """The same distribution on its support, on the host; made once. Slow where nothing was cut."""
        return self._compact

    @cached_property
    def _support(self) -> int:
        return int(torch.count_nonzero(self.grid))

    @cached_property
    def _compact(self) -> Joint:
        probs = self.grid.flatten()
        index = probs.nonzero().squeeze(1)  # NaN is not zero, so it is seen here
        values = torch.stack([index.double(), probs[index], self.log_p.reshape(-1)[index].double()]).cpu().numpy()
        check_numbers(values[1], self.model_name)
        rows, tokens = np.divmod(values[0].astype(np.int64), self.grid.shape[1])
        probs_host = values[1].copy()
        probs_host.flags.writeable = False  # policies are shown this very array
        return Joint(self.nodes[rows], tokens, probs_host, self.base[rows] + values[2])


def dense_joint(
    log_probs: Tensor,  # [B, V] float32, from log_probabilities
    nodes: Sequence[int],  # B nodes
    weights: Sequence[float],  # B log-weights
    config: DecodingConfig,
    model_name: str = "model",
) -> DenseJoint:
    """The distribution of `compact_joint`, cut in the same way, without waiting for the device.

    NaN is reported by whatever first brings a number of the result to the host.
    """
    base = np.asarray(weights, dtype=np.float64)  # [B]
    scores = log_probs.double() + _send(base - base.max(), log_probs.device)[:, None]  # [B, V]
    keep = _kept(scores.reshape(1, -1) if config.warp == "joint" else log_probs, config)
    grid = scores.sub_(scores.amax()).exp_()  # NaN in one entry makes the maximum, and so all of it, NaN
    if keep is not None:
        grid.mul_(keep.view_as(grid))
    return DenseJoint(np.asarray(nodes, dtype=np.int64), grid.div_(grid.sum()), log_probs, base, model_name)


def _kept(scores: Tensor, config: DecodingConfig) -> Tensor | None:
    """Mask of what top-k, then top-p leave of each row; [R, N] -> [R, N] bool, None without a cut."""
    size = scores.shape[-1]
    k = min(config.top_k or size, size)
    top_p = 1.0 if config.top_p is None else config.top_p
    if k == size and top_p == 1:
        return None
    best, order = scores.topk(k) if k < size else scores.sort(descending=True, stable=True)  # [R, k]
    stays = torch.ones_like(best, dtype=torch.bool)
    if top_p < 1:
        share = best.double().softmax(-1)
        stays = ~(share.cumsum(-1) - share >= top_p)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, stays)


def draw_dense(joint: DenseJoint, count: int, replacement: bool, dice: Dice) -> IntArray:
    """Draw `count` flat indices in order; without replacement at most as many as have positive probability.

    Successive draws by inverse CDF, one number of `dice` each. Without replacement `draw` runs a race instead: the
    same distribution from other numbers.

    Raises:
        UserError: the model returned NaN.
    """
    numbers = _send(dice.uniform(count), joint.grid.device)  # [count]
    urn = _Urn(_in_blocks(joint.grid))
    total = urn.blocks.sum()
    picks = urn.draw(numbers, replacement)  # [count]
    log_p = joint.log_p.reshape(-1).index_select(0, picks.clamp(min=0))
    host = torch.cat([picks.double(), log_p.double(), total[None]]).cpu().numpy()  # the one wait
    check_numbers(host[-1:], joint.model_name)
    drawn = host[:count].astype(np.int64)
    drawn, logs = drawn[drawn >= 0], host[count:-1][drawn >= 0]
    joint.know(drawn.tolist(), logs)
    return drawn


def verify_dense(
    target: DenseJoint,
    draft: DenseJoint,
    drafts: IntArray,  # [w] flat indices into the draft's grid, in draw order
    target_width: int,  # M
    limit: int,  # slots that accepted drafts may fill, at least M
    refill: int,  # slots after a failed layer, at least M
    replacement: bool,
    dice: Dice,
    shadow: Dice | None = None,
) -> LayerVerdict:
    """`verify_layer` on the device: the same rule, judged by the same coins, so the same drafts are accepted.

    Sums are added in another order, so a coin as near its threshold as rounding may fall the other way. `refill`
    numbers are taken from `dice` after the coins, needed or not. Fills follow the target's rows; where those are
    sorted by node, the fills are those of `verify_layer` too.

    Returns:
        A verdict whose slots are flat indices into the target's grid, for `target.entries`: whatever fills a slot
        has positive probability there.

    Raises:
        UserError: a model returned NaN.
    """
    width, device = len(drafts), target.grid.device
    coins = dice.uniform(width)
    shadow_coins = shadow.uniform(width) if shadow is not None else coins
    numbers = _send(np.concatenate([coins, shadow_coins, dice.uniform(refill)]), device)
    judge = _Judge(target, draft, drafts, replacement)
    filled = torch.zeros((), device=device)
    accepted, masses, rests = [], [judge.mass], []
    for i in range(width):
        coin = numbers[i]
        if shadow is not None:
            needed = (filled < limit) & (judge.mass > 0)
            coin = torch.where(needed, coin, numbers[width + i])
        bit, rest = judge.judge(i, coin)
        if shadow is not None:
            filled = filled + (needed & bit)
        accepted.append(bit)
        masses.append(judge.mass)
        rests.append(rest)
    slots = torch.cat([judge.places, judge.fill(numbers[2 * width :])])  # [D + refill] all that may fill a slot
    log_p = target.log_p.reshape(-1).index_select(0, slots.clamp(0, target.grid.numel() - 1))
    parts = [torch.stack([*judge.totals, *accepted, *masses, *rests]), slots, log_p]
    host = torch.cat([part.double() for part in parts]).cpu().numpy()  # the one wait
    totals, bits, left, rests_host, flat, logs = np.split(host, np.cumsum([2, width, width + 1, width, len(slots)]))
    check_numbers(totals[:1], target.model_name)
    check_numbers(totals[1:], draft.model_name)
    picks = flat.astype(np.int64).tolist()
    target.know(picks, logs)  # what is outside the grid is never asked for
    places = [picks[entry] for entry in judge.entry]  # [w] each draft's slot
    fills = [pick for pick in picks[len(picks) - refill :] if pick >= 0]  # negative: nothing was left
    verdict = _verdict(bits > 0, left, places, fills, target_width, limit, refill, everything=shadow is not None)
    if shadow is not None:
        # R sums to one, and so does what Q_i takes of it and leaves.
        shares = [1 - rest / mass if mass > 0 else 0.0 for rest, mass in zip(rests_host, left[:-1], strict=True)]
        verdict.probabilities = [max(0.0, float(share)) for share in shares]
    return verdict


def _verdict(
    bits: NDArray[np.bool_],  # [w] accepted
    left: FloatArray,  # [w + 1] before each draft and after the last: not positive if no slot can be filled any more
    places: list[int],  # [w] of the drafts
    fills: list[int],
    target_width: int,
    limit: int,
    refill: int,
    everything: bool,  # bits of drafts that were judged in shadow too
) -> LayerVerdict:
    """The slots of a layer: the bookkeeping of `verify_layer`, after the fact."""
    verdict = LayerVerdict()
    for i, bit in enumerate(bits.tolist()):
        real = len(verdict.slots) < limit and left[i] > 0
        if not real and not everything:
            break
        verdict.bits.append(bit)
        if real and bit:
            verdict.slots.append(places[i])
    verdict.accepted = len(verdict.slots)
    exhausted = not left[len(verdict.bits)] > 0  # all of P's support is taken
    verdict.passed = verdict.accepted >= target_width or exhausted
    if not verdict.passed:
        verdict.slots += fills[: refill - verdict.accepted]
    return verdict


class _Judge:
    """The state of a layer's verification, on the device; every number is a tensor, every choice a `where`.

    Since the drafts not yet drawn have one Q_i up to a factor, R is max(T - c Q_i, 0) up to a factor throughout
    (design 5.3, which holds without replacement too if drawn entries are looked after one by one). So a draft costs
    one pass over the grid: entries that were drafted are kept in vectors [D], and the grids, with zeros in their
    place, never change. Rows of the draft alone matter only in Q_i's normaliser, since P is zero there.
    """

    def __init__(self, target: DenseJoint, draft: DenseJoint, drafts: IntArray, replacement: bool) -> None:
        self.replacement = replacement
        picks = list(dict.fromkeys(drafts.tolist()))  # [D] equal draws once
        self.entry = [picks.index(pick) for pick in drafts.tolist()]  # [w] -> 0..D-1
        rows, tokens = np.divmod(np.array(picks, dtype=np.int64), draft.grid.shape[1])
        places = target.find(draft.nodes[rows], tokens)
        places[places < 0] = target.grid.numel()  # the spare cell behind the grid, where nothing ever is
        index = _send(np.stack([np.array(picks, dtype=np.int64), places]), target.grid.device)
        self.places = index[1]  # [D] in the target's grid

        self.p = _in_blocks(target.grid)  # P, zero at drafted entries
        self.left = self.p.view(-1)[self.places]  # [D] T at drafted entries: P, zero once accepted
        self.p.view(-1).index_fill_(0, self.places, 0.0)
        rest = draft.grid.flatten().clone()  # Q, zero at drafted entries
        self.q_own = rest[index[0]]  # [D] Q_i at drafted entries: zero once drawn
        rest.index_fill_(0, index[0], 0.0)
        self.q = torch.zeros_like(self.p)  # on the target's rows
        size, row_of = draft.grid.shape[1], {node: row for row, node in enumerate(draft.nodes.tolist())}
        for row, node in enumerate(target.nodes.tolist()):
            if node in row_of:
                self.q.view(-1)[row * size :][:size] = rest[row_of[node] * size :][:size]
        self.p_outside, self.q_outside = self.p.sum(), rest.sum()
        self.totals = torch.stack([self.p_outside + self.left.sum(), self.q_outside + self.q_own.sum()])

        masses = _draft_masses(self.q_outside, self.q_own, len(drafts), replacement)
        self.per_mass = torch.where(masses > 0, 1 / masses, 0.0)  # [w]
        self.own = self.left.clone()  # [D] as `left`, but also zero at what this slot has rejected
        self.c = torch.zeros_like(self.p_outside)  # R = max((p, own) - c (q, q_own), 0) / mass
        self.mass = self.totals[0]
        self._room = torch.empty_like(self.p)

    def judge(self, i: int, coin: Tensor) -> tuple[Tensor, Tensor]:
        """Accept draft i with probability min(1, R(x) / Q_i(x)); either way move on to Q_{i+1}.

        Returns:
            [] bool, whether it is accepted; [] float64, what R - Q_i leaves of `mass`.
        """
        k = self.entry[i]
        scale = self.mass * self.per_mass[i]  # what makes Q_i as large as R is here
        here = (self.own[k] - self.c * self.q_own[k]).clamp(min=0)
        accepted = coin * self.q_own[k] * scale < here
        c = self.c + scale
        outside, own = self._residual(c).sum(), self._own_residual(c)
        left = rest = outside + own.sum()
        if not self.replacement:
            own[k] = self.own[k] = self.q_own[k] = 0.0  # accepted, or R(x) < Q_i(x)
            self.left[k] *= ~accepted
            rest = outside + own.sum()
        # Nothing left means R = Q_i up to rounding: that draft had accept probability 1.
        self._move_on(accepted | (rest <= 0), c, rest)
        return accepted, left

    def _move_on(self, afresh: Tensor, c: Tensor, mass: Tensor) -> None:
        """R starts again from T where `afresh`, else it is what was left."""
        self.own = torch.where(afresh, self.left, self.own)
        self.c = torch.where(afresh, 0.0, c)
        self.mass = torch.where(afresh, self.p_outside + self.left.sum(), mass)

    def fill(self, numbers: Tensor) -> Tensor:
        """Draw the open slot from R and the further ones from T in turn; [F] -> [F], negative where none is left."""
        residual = self._residual(self.c)
        residual.view(-1).index_add_(0, self.places, self._own_residual(self.c))
        first = _Urn(residual).draw(numbers[:1], replacement=True)
        slot = self.p.clone()
        slot.view(-1).index_add_(0, self.places, self.left)
        urn = _Urn(slot)
        if not self.replacement:
            urn.remove(first)
        return torch.cat([first, urn.draw(numbers[1:], self.replacement)])

    def _residual(self, c: Tensor) -> Tensor:
        """max(T - c Q, 0) outside the drafted entries, in a room that the next call reuses."""
        return torch.addcmul(self.p, self.q, -c, out=self._room).relu_()

    def _own_residual(self, c: Tensor) -> Tensor:
        """The same at the drafted entries; [D]."""
        return (self.own - c * self.q_own).clamp(min=0)


def _draft_masses(outside: Tensor, own: Tensor, width: int, replacement: bool) -> Tensor:
    """Mass of Q before each draft is drawn; [], [D] -> [w]. By adding up what is left: a difference would cancel."""
    if replacement:
        return (outside + own.sum()).expand(width)
    return outside + own.flip(0).cumsum(0).flip(0)  # every draft is another entry: D = w


class _Urn:
    """Entries to draw by inverse CDF in two levels, a block and then one of its entries: no pass over all per draw."""

    def __init__(self, grid: Tensor) -> None:
        self.grid = grid  # [K, S] float64, not negative; `remove` writes to it
        self.blocks = grid.sum(1)  # [K]
        self.block_order, self.order = (torch.arange(n, device=grid.device) for n in grid.shape)

    def draw(self, numbers: Tensor, replacement: bool) -> Tensor:
        """Flat indices for numbers in [0, 1), drawn one after the other; [N] -> [N], negative where none is left."""
        if not len(numbers):
            return numbers.long()
        return torch.cat([self._draw(number, replacement) for number in numbers.split(1)])

    def _draw(self, number: Tensor, replacement: bool) -> Tensor:
        edges = self.blocks.cumsum(0)
        block, before = _first_beyond(self.blocks, edges, self.block_order, number * edges[-1])
        entries = self.grid.index_select(0, block.clamp(min=0))[0]  # [S]
        entry, _ = _first_beyond(entries, entries.cumsum(0), self.order, before)
        pick = block * self.grid.shape[1] + entry
        if not replacement:
            self.remove(pick)
        return pick

    def remove(self, pick: Tensor) -> None:
        """Take an entry out; [1], negative if nothing is left: then entry 0 is empty as well."""
        pick = pick.clamp(min=0)
        self.grid.view(-1).index_fill_(0, pick, 0.0)
        block = pick // self.grid.shape[1]
        self.blocks.index_copy_(0, block, self.grid.index_select(0, block).sum(1))


def _first_beyond(mass: Tensor, edges: Tensor, order: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """The entry in which `number` falls, never one without mass; `edges` is its cumulative sum.

    [N], [N], [N] 0..N-1, [1] -> two of [1].

    Returns:
        The index, -1 where no entry has mass; and how far inside the entry the number lies.
    """
    positive = mass > 0  # asked for apart: sums on a GPU may rise where the mass is zero
    first = torch.where(positive & (edges > number), order, len(mass)).amin(0, keepdim=True)
    last = torch.where(positive, order, -1).amax(0, keepdim=True)
    index = torch.minimum(first, last)  # beyond all edges by rounding: the last with mass
    place = index.clamp(min=0)
    return index, number - (edges.index_select(0, place) - mass.index_select(0, place))


def _in_blocks(grid: Tensor) -> Tensor:
    """A copy as about equally many blocks as entries in a block, and at least one spare zero; [B, V] -> [K, S]."""
    size = 1 << (grid.numel().bit_length() + 1) // 2
    out = grid.new_zeros(grid.numel() // size + 1, size)
    out.view(-1)[: grid.numel()] = grid.flatten()
    return out


def _send(numbers: NDArray[np.generic], device: torch.device) -> Tensor:
    """Host array to the device; does not wait for it (ordinary memory is staged before the call returns)."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(device, non_blocking=True)


def check_numbers(numbers: FloatArray, model_name: str) -> None:
    if np.isnan(numbers).any():
        raise UserError(nan_message(model_name))
