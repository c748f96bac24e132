"""Judging drafts: the sequential verification rules of the paper.

2409.16560 sections 3.2-3.3; without replacement also 2402.14160. Design section 5.6. Everything here is numpy
on the support of P and Q; `sampling.py` rolls, this module judges, `closed_form.py` says what to expect.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from decoding.dice.sampling import Dice, Distribution, draw
from decoding.support.arrays import FloatArray, IntArray

VOCABULARY_LIMIT = 1 << 32  # node * limit + token is one sortable key


def joint_keys(joint: Distribution) -> IntArray:
    """One integer per (parent node, token); [S]."""
    return joint.parents * VOCABULARY_LIMIT + joint.tokens


@dataclass(frozen=True)
class Aligned:
    """P and Q of a layer on the union of their supports, size U."""

    p: FloatArray  # [U], zero where only Q has mass
    q: FloatArray  # [U], zero where only P has mass
    of_target: IntArray  # [S_p] where P's entries stand in the union
    of_draft: IntArray  # [S_q] where Q's do

    def in_target(self, index: list[int]) -> IntArray:
        """Entries of the union -> entries of P's support, which must hold them."""
        entry = np.empty(len(self.p), dtype=np.int64)
        entry[self.of_target] = np.arange(len(self.of_target))
        return entry[index]


def align(target: Distribution, draft: Distribution) -> Aligned:
    """Put P and Q on the union of their supports."""
    keys = np.concatenate([joint_keys(target), joint_keys(draft)])
    order = keys.argsort(kind="stable")
    keys = keys[order]
    first = np.ones(len(keys), dtype=bool)  # of its key: what np.unique does, in half the time
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    place = np.empty(len(keys), dtype=np.int64)
    place[order] = first.cumsum() - 1
    of_target, of_draft = place[: len(target)], place[len(target) :]
    size = int(place[order[-1]]) + 1
    p, q = np.zeros(size), np.zeros(size)
    p[of_target] = target.probs
    q[of_draft] = draft.probs
    return Aligned(p, q, of_target, of_draft)


@dataclass
class LayerVerdict:
    """What verification made of one layer; indices are into the union support of P and Q."""

    slots: list[int] = field(default_factory=list)  # chosen, in slot order
    accepted: int = 0  # how many of `slots` are drafts
    passed: bool = False
    bits: list[bool] = field(default_factory=list)  # every draft that was judged, in draw order
    probabilities: list[float] = field(default_factory=list)  # Σ min(R, Q_i) before draft i was seen


def verify_layer(
    p: FloatArray,  # [U] P
    q: FloatArray,  # [U] Q
    drafts: IntArray,  # [w] in draw order
    target_width: int,  # M
    limit: int,  # slots that accepted drafts may fill, at least M
    refill: int,  # slots after a failed layer, at least M
    replacement: bool,
    dice: Dice,
    shadow: Dice | None = None,
) -> LayerVerdict:
    """Accept or reject the drafts of a layer in turn, then fill what is left of a failed layer.

    The first M slots, in slot order, are distributed as M successive draws from P (with or without
    replacement): 5.2 and 5.3. Coins are drawn from `dice`. With `shadow`, drafts that the decoder no longer
    needs are judged too, by coins of that stream, so that a trace holds a bit for each draft; what is returned in
    `slots` does not change.
    """
    judge = _Judge(p, q, replacement)
    goal = target_width if replacement else min(target_width, int(np.count_nonzero(p)))
    verdict = LayerVerdict()
    coins = dice.uniform(len(drafts))
    shadow_coins = shadow.uniform(len(drafts)) if shadow else None
    for i, draft in enumerate(drafts):
        real = len(verdict.slots) < limit and judge.anything_left
        if not real and shadow_coins is None:
            break
        if shadow_coins is not None:
            verdict.probabilities.append(judge.accept_share())
        coin = coins[i] if real or shadow_coins is None else shadow_coins[i]
        accepted = judge.judge(int(draft), float(coin))
        verdict.bits.append(accepted)
        if real and accepted:
            verdict.slots.append(int(draft))
    verdict.accepted = len(verdict.slots)
    verdict.passed = len(verdict.slots) >= goal
    while not verdict.passed and len(verdict.slots) < refill and judge.anything_left:
        verdict.slots.append(judge.fill(dice))
    return verdict


_FAINT = 1e-200  # of Q, left by a cold one: a scale that makes up for less would be infinite


class _Judge:
    """The state of a layer's verification: T (the open slot's distribution), R (what is left of it), Q_i.

    T, R and Q_i are kept as shares with their sums apart: a draft is judged in a few operations in place.
    """

    def __init__(self, p: FloatArray, q: FloatArray, replacement: bool) -> None:
        self.replacement = replacement
        self._slot, self._slot_sum = p.copy(), float(p.sum())  # T [U]
        self._draft, self._draft_sum = q.copy(), float(q.sum())  # Q_i [U]
        self._residual, self._residual_sum = p.copy(), self._slot_sum  # R [U]
        self._fresh = True  # R = T
        self.anything_left = True  # a further slot can be filled at all

    def accept_share(self) -> float:
        """Σ min(R, Q_i): the probability that the next draft will be accepted, before it is drawn."""
        if not self.anything_left:
            return 0.0
        residual, draft = self._residual / self._residual_sum, self._draft / self._draft_sum
        return float(np.minimum(residual, draft).sum())

    def judge(self, x: int, coin: float) -> bool:
        """Accept draft x with probability min(1, R(x) / Q_i(x)); either way move on to Q_{i+1}."""
        accepted = False
        if self.anything_left:
            scale = self._residual_sum / self._draft_sum  # Q_i in the units of R's shares
            accepted = bool(coin * scale * self._draft[x] < self._residual[x])
            if accepted:
                self._close(x)
            else:
                self._residual -= scale * self._draft
                np.maximum(self._residual, 0.0, out=self._residual)
                self._residual_sum, self._fresh = float(self._residual.sum()), False
                if not self._residual_sum > 0:
                    # Nothing left means R = Q_i up to rounding: that draft had accept probability 1.
                    self._afresh()
        if not self.replacement:
            before, self._draft[x] = float(self._draft[x]), 0.0
            rest = float(self._draft.sum())
            if rest > 0:
                if rest < _FAINT:
                    self._draft /= rest
                    rest = float(self._draft.sum())
                self._draft_sum = rest
            else:
                self._draft[x] = before
        return accepted

    def fill(self, dice: Dice) -> int:
        """Draw the open slot from R, and open the next one."""
        x = int(draw(self._residual, 1, True, dice)[0])
        self._close(x)
        return x

    def _close(self, x: int) -> None:
        """Slot filled by x: without replacement T loses x; R starts again from T."""
        if not self.replacement:
            self._slot[x] = 0.0
            self._slot_sum = float(self._slot.sum())
            self.anything_left = self._slot_sum > 0
        elif self._fresh:
            return
        self._afresh()

    def _afresh(self) -> None:
        self._residual[:] = self._slot
        self._residual_sum, self._fresh = self._slot_sum, True
