"""Joint distributions that stay on the device: P and Q over the whole grid of (beam, token). Design 5.1.

The same meaning as `sampling.py`'s, on the host over the support that top-k or top-p leave. Without a cut the support
is all B * V pairs: here nothing is sorted or brought to the host but what is drawn, in one wait (`selection.py`).
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
from decoding.dice.sampling import FloatArray, IntArray, Joint, NotNumbers, nan_message


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


def _send(numbers: NDArray[np.generic], device: torch.device) -> Tensor:
    """Host array to the device; does not wait for it (ordinary memory is staged before the call returns)."""
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(device, non_blocking=True)


def check_numbers(numbers: FloatArray, model_name: str) -> None:
    if np.isnan(numbers).any():
        raise NotNumbers(nan_message(model_name))
