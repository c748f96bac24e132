"""Calibration: one temperature, so that on validation rows as many candidates are selected as was said."""

from __future__ import annotations

import torch

from controller.data import Batch
from controller.losses import candidate_events, loss_of
from controller.network import WidthNet

_TEMPERATURES = torch.linspace(-0.5, 0.5, 21).exp().tolist()  # 0.6 to 1.65


@torch.no_grad()
def calibrate(net: WidthNet, rows: Batch) -> float:
    """Set the temperature of a candidate's log-odds to where the validation loss is least.

    Chances multiply along a path, so each temperature is tried on whole iterations; 1 is among them.

    Args:
        net: in eval mode; its temperature is replaced.
        rows: all rows of the validation split.

    Returns:
        The temperature.
    """

    def loss(temperature: float) -> float:
        net.temperature.fill_(temperature)
        return float(loss_of(candidate_events(net(rows), rows)))

    best = min(_TEMPERATURES, key=loss)
    net.temperature.fill_(best)
    return best
