"""How good predicted chances are: explained deviance, calibration, and their sums over batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from controller.losses import Predicted, loss_of

BINS = 10
CURVES = ("candidate", "after", "before")


class Reliability(NamedTuple):
    """Chances in bins of equal width: mean prediction and rate of each, NaN where empty, and entries."""

    predicted: NDArray[np.float64]
    observed: NDArray[np.float64]
    rows: NDArray[np.float64]

    @property
    def error(self) -> float:
        """Expected calibration error: |predicted - observed|, weighted by rows; NaN without rows."""
        used = self.rows > 0
        gaps = np.abs(self.predicted[used] - self.observed[used])
        return float((gaps * self.rows[used]).sum() / self.rows.sum()) if used.any() else float("nan")


class StageMetrics(Metric):
    """What is measured of one stage, as sums over its batches: divided only in `compute`."""

    totals: Tensor
    bins: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(len(CURVES), 3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("bins", torch.zeros(len(CURVES), 3, BINS, dtype=torch.float64), dist_reduce_fx="sum")

    @torch.no_grad()
    def update(self, events: dict[str, Predicted]) -> None:
        """Add a batch's chances and outcomes, by curve."""
        for name, (chances, happened) in events.items():
            i = CURVES.index(name)
            if len(chances):
                entries = torch.tensor([len(chances)], dtype=torch.float64, device=chances.device)
                sums = loss_of(events[name]).double() * entries, happened.double().sum()[None], entries
                self.totals[i] += torch.cat([value.view(1) for value in sums])
                self.bins[i] += bin_sums(chances, happened)

    def compute(self) -> dict[str, float]:
        """Of each curve: nats, share of a constant's nats that is explained, calibration error."""
        metrics = {}
        for i, name in enumerate(CURVES):
            nats, hits, entries = self.totals[i].tolist()
            if not entries:
                continue
            rate = min(max(hits / entries, 1e-9), 1 - 1e-9)
            constant = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
            metrics[f"{name}_nll"] = nats / entries
            metrics[f"{name}_explained"] = float(1 - nats / entries / constant)
            metrics[f"{name}_ece"] = self.reliability(name).error
        return metrics

    def reliability(self, name: str) -> Reliability:
        """The bins of one curve."""
        predicted, observed, rows = self.bins[CURVES.index(name)].cpu().numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            return Reliability(predicted / rows, observed / rows, rows)


def bin_sums(chances: Tensor, happened: Tensor) -> Tensor:
    """Sums per bin of prediction, outcome and one; [E], [E] -> [3, BINS] float64. Sums of batches add up."""
    index = (chances * BINS).long().clamp(0, BINS - 1)
    sums = torch.zeros(3, BINS, dtype=torch.float64, device=chances.device)
    for row, values in enumerate((chances, happened, torch.ones_like(chances))):
        sums[row].index_add_(0, index, values.double())
    return sums
