"""After a fit: the rules for layers, and the temperature at which as many candidates are selected as was said."""

from __future__ import annotations

import torch
from torch import Tensor

from controller.data import Batch
from controller.losses import after_events, before_events, candidate_events, loss_of
from controller.network import WidthNet

_TEMPERATURES = torch.linspace(-0.5, 0.5, 21).exp().tolist()  # 0.6 to 1.65
_STEPS = 60


@torch.no_grad()
def calibrate(net: WidthNet, rows: Batch) -> float:
    """Set the temperature of a candidate's log-odds to where the loss is least.

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


def fit_rules(net: WidthNet, rows: Batch) -> None:
    """Fit the rules for layers to the chances that the network gives its candidates.

    They are logistic regressions of a few numbers: LBFGS finds their optimum in seconds, where the steps that suit the
    network leave them half-way.

    Args:
        net: in eval mode, its temperature set; its rules are replaced, nothing else.
        rows: all rows of the train split.
    """
    rules = [*net.before.parameters(), *net.after.parameters()]
    with torch.no_grad():
        log_chances = net(rows)
    optimiser = torch.optim.LBFGS(rules, max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = after_events(net, log_chances, rows), before_events(net, log_chances, rows)
        loss = torch.stack([loss_of(events) for events in found if len(events.chances)]).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
