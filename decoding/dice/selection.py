"""Selections: which continuations a step keeps, as a function of a joint distribution and of the noise. Design 5.3.

Beam sampling takes the R smallest keys E / P in their order (2409.16560); with `oversample` c the likeliest R of the
c * R smallest, as transformers' `generate(do_sample=True, num_beams=R)` does. A draft makes the same choice on Q.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from decoding.dice.dense import DenseJoint, check_numbers
from decoding.dice.noise import PathNoise, child_hashes, exponentials
from decoding.dice.sampling import FloatArray, IntArray, Joint
from decoding.support.compiled import compiled, inlined

_WORTH_A_PARTITION = 512  # entries: below, sorting them all is faster


@dataclass(frozen=True)
class Race:
    """The first entries of a joint distribution in the order in which they are drawn, smallest key first."""

    picks: IntArray  # [N] entries
    keys: FloatArray  # [N] E / P
    probs: FloatArray  # [N] P
    parents: IntArray  # [N] nodes
    tokens: IntArray  # [N]
    weights: FloatArray  # [N] the children's log-weights
    noise: FloatArray | None = None  # [S] E of all entries; None where they stayed on the device

    def __len__(self) -> int:
        return len(self.picks)


def run_race(joint: Joint | DenseJoint, noise: PathNoise, count: int) -> Race:
    """The `count` smallest keys E / P of a joint distribution, or as many as it has entries.

    Raises:
        UserError: the model returned NaN.
    """
    if isinstance(joint, DenseJoint):
        return _race_on_device(joint, noise, count)
    words = noise.words(joint.parents, joint.tokens)
    with np.errstate(over="ignore"):  # a probability near the smallest float: never drawn before any other
        picks, keys, drawn = _raced(*words, joint.probs, count)
    drawn.flags.writeable = False  # policies are shown this very array
    return Race(picks, keys, joint.probs[picks], joint.parents[picks], joint.tokens[picks], joint.weights[picks], drawn)


@inlined
def smallest(keys: FloatArray, count: int) -> IntArray:
    """Indices of the `count` smallest keys, in order; of equal ones the first."""
    if count < len(keys) and len(keys) > _WORTH_A_PARTITION:
        edge = np.partition(keys, count - 1)[count - 1]
        among = np.flatnonzero(keys <= edge)
        return among[np.argsort(keys[among], kind="mergesort")[:count]]
    return np.argsort(keys, kind="mergesort")[:count]


@compiled
def _raced(hashes: IntArray, codes: IntArray, probs: FloatArray, count: int) -> tuple[IntArray, FloatArray, FloatArray]:
    """The first entries, their keys, and E of all."""
    drawn = exponentials(child_hashes(hashes, codes))
    keys = drawn / probs
    picks = smallest(keys, count)
    return picks, keys[picks], drawn


def _race_on_device(joint: DenseJoint, noise: PathNoise, count: int) -> Race:
    """One top-k call over [B, V], one transfer; what comes to the host are the entries drawn."""
    rows, vocabulary = joint.grid.shape
    keys = noise.grid(joint.nodes, joint.grid.device).div_(joint.grid).view(-1)  # inf where P is zero
    best, index = keys.topk(min(count, rows * vocabulary), largest=False)
    log_p = joint.log_p.reshape(-1)[index]
    probs = joint.grid.view(-1)[index]
    host = torch.stack([index.double(), best, log_p.double(), probs.double()]).cpu().numpy()  # the one wait
    check_numbers(host[1], joint.model_name)
    host = host[:, host[1] < np.inf]
    picks = host[0].astype(np.int64)
    joint.know(picks.tolist(), host[2])
    row, tokens = np.divmod(picks, vocabulary)
    return Race(picks, host[1], host[3], joint.nodes[row], tokens, joint.base[row] + host[2])


@dataclass(frozen=True)
class Choice:
    """A selection, as places in a list of candidates that stand in the order in which they were drawn.

    The j-th place of the selection is `growing` or `ended`, whichever has place j; both lists ascend.
    """

    growing: list[int]  # candidates that go on
    growing_places: list[int]
    ended: list[int]  # candidates that end here, and count
    ended_places: list[int]
    size: int  # places that decide whether a layer passes

    def first(self, places: int) -> tuple[list[int], list[int]]:
        """What goes on and what ended among the first places."""
        growing = [c for c, place in zip(self.growing, self.growing_places, strict=True) if place < places]
        return growing, [c for c, place in zip(self.ended, self.ended_places, strict=True) if place < places]


def choose(weights: list[float], hits: list[bool], width: int, oversample: int) -> Choice:
    """The selection of `width` among oversample * width candidates.

    Args:
        weights, hits: of each candidate, in the order in which they were drawn: its log-weight, and whether it ends.
        width: R.
        oversample: 1: the candidates in their order, ended or not. Above: the heaviest of those that go on; as in
            transformers, a candidate that ends counts if it was among the first `width` drawn, however heavy it is.
    """
    ended = [i for i, hit in enumerate(hits[:width]) if hit]
    if oversample == 1:
        growing = [i for i, hit in enumerate(hits[:width]) if not hit]
        return Choice(growing, growing, ended, ended, len(growing) + len(ended))
    growing = sorted((i for i, hit in enumerate(hits) if not hit), key=lambda i: -weights[i])[:width]
    return Choice(growing, list(range(len(growing))), ended, ended, len(growing))


def draft_order(race: Race, live: NDArray[np.bool_], width: int, oversample: int) -> IntArray:
    """Places of a race on Q in the order in which they are drafted: its selection first, then what comes next.

    Args:
        race: at least oversample * width entries, where there are as many.
        live: [N] which of its entries may go on; others are not drafted.
        width: R.
    """
    places = np.flatnonzero(live)
    if oversample == 1:
        return places
    drawn = places[places < oversample * width]
    rest = places[len(drawn) :]
    return np.concatenate([drawn[np.argsort(-race.weights[drawn], kind="stable")], rest])
