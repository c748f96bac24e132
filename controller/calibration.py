"""Calibration: temperatures fitted on held-out rows, reliability bins of every head, ranked probability score."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from controller.data import Batch
from controller.losses import (
    bit_logits,
    censored,
    count_table,
    knows_survivor,
    regret_steps,
    survivor_nll,
    tails,
)
from controller.network import WidthNet
from decoding.support.arrays import FloatArray

BINS = 15
_MANY = 1 << 30
_WIDTH_GROUPS = (("1_2", 1, 2), ("3_5", 3, 5), ("6_up", 6, _MANY))
_LAYER_GROUPS = (("1", 1, 1), ("2", 2, 2), ("3_up", 3, _MANY))


class Reliability(NamedTuple):
    """Equal-width bins of predicted probability, [BINS] each; mean and rate are NaN in an empty bin."""

    predicted: FloatArray  # mean prediction
    observed: FloatArray  # rate of the event
    rows: FloatArray  # how many

    @property
    def error(self) -> float:
        """Expected calibration error: |predicted - observed|, weighted by rows."""
        return expected_calibration_error(self)


class Curve(NamedTuple):
    """How far the probabilities of one event can be trusted."""

    bins: Reliability
    score: float  # mean squared error: of the ordered events of a count or a slot, their ranked probability score


def bin_sums(probabilities: Tensor, outcomes: Tensor, bins: int = BINS) -> Tensor:
    """Sums per bin of prediction, outcome and one; [N], [N] -> [3, bins] float64. Sums of batches add up."""
    index = (probabilities * bins).long().clamp(0, bins - 1)
    sums = torch.zeros(3, bins, dtype=torch.float64, device=probabilities.device)
    for row, values in enumerate((probabilities, outcomes, torch.ones_like(probabilities))):
        sums[row].index_add_(0, index, values.double())
    return sums


def reliability_from_sums(sums: Tensor) -> Reliability:
    """[3, bins] sums -> means and rates."""
    predicted, observed, rows = sums.cpu().numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        return Reliability(predicted / rows, observed / rows, rows)


def reliability(probabilities: Tensor, outcomes: Tensor, bins: int = BINS) -> Reliability:
    """Reliability bins of predicted probabilities [N] of binary outcomes [N]."""
    return reliability_from_sums(bin_sums(probabilities, outcomes, bins))


def expected_calibration_error(bins: Reliability) -> float:
    """Mean over rows of |predicted - observed| of their bin; NaN without rows."""
    used = bins.rows > 0
    if not used.any():
        return float("nan")
    gaps = np.abs(bins.predicted[used] - bins.observed[used])
    return float((gaps * bins.rows[used]).sum() / bins.rows[used].sum())


def width_events(at_least: Tensor, bits: Tensor, draft_width: Tensor) -> tuple[Tensor, Tensor]:
    """Every event "at least M of the w drafts were accepted", M = 1..w, of rows with drafts.

    Args:
        at_least: [N, W + 1, W + 1] P(K_m >= M) at [m, M].
        bits: [N, W] bool, zero past the draft width.
        draft_width: [N] int64, w.

    Returns:
        Predictions [E] and outcomes [E], E = the sum of the draft widths.
    """
    row = at_least[torch.arange(len(bits), device=bits.device), draft_width][:, 1:]  # [N, W] of M = 1..W
    widths = torch.arange(1, bits.shape[1] + 1, device=bits.device)
    inside = widths <= draft_width[:, None]
    happened = bits.sum(-1, keepdim=True) >= widths
    return row[inside], happened[inside].to(row.dtype)


def prefix_events(at_least: Tensor, bits: Tensor, draft_width: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`width_events` of the first `width` drafts of all rows that have as many: later drafts do not move them."""
    chosen = draft_width >= width
    first = bits[chosen] & (torch.arange(bits.shape[1], device=bits.device) < width)
    return width_events(at_least[chosen], first, torch.full_like(draft_width[chosen], width))


def survivor_events(survivor_logits: Tensor, slot: Tensor, kept_width: Tensor) -> tuple[Tensor, Tensor]:
    """Every event "the survivor is among the first k slots", k = 1..c - 1, of rows whose survivor is known.

    Args:
        survivor_logits: [N, R].
        slot, kept_width: [N] int64; c is the latter.

    Returns:
        Predictions, given that it is among the c that were kept, and outcomes; [E] each.
    """
    among = censored(survivor_logits, kept_width).exp().cumsum(-1)  # [N, R]
    widths = torch.arange(1, survivor_logits.shape[1] + 1, device=slot.device)
    inside = (widths < kept_width[:, None]) & knows_survivor(slot, kept_width)[:, None]
    return among[inside].clamp(0, 1), (slot[:, None] <= widths)[inside].to(among.dtype)


@torch.no_grad()
def reliability_curves(net: WidthNet, rows: Batch) -> dict[str, Curve]:
    """How far each head can be trusted on held-out rows; an event that never arises has no curve.

    Args:
        net: in eval mode, calibrated.
        rows: all rows of a split that it was not trained on.

    Returns:
        By name: "count" P(K_w >= M); the same of draft widths ("count_w1_2", "count_w3_5", "count_w6_up") and of
        layers ("count_layer1", "count_layer2", "count_layer3_up"); "survivor" and "late_survivor" P(slot <= k), before
        P is known and after.
    """
    logits = net(*inputs(rows))
    at_least, width, layer = tails(count_table(logits.accept.sigmoid())), rows["draft_width"], rows["layer"]
    groups = {"count": width > 0}
    groups |= {f"count_layer{name}": (layer >= low) & (layer <= high) for name, low, high in _LAYER_GROUPS}
    events = {
        name: width_events(at_least[chosen], rows["bits"][chosen], width[chosen]) for name, chosen in groups.items()
    }
    for name, low, high in _WIDTH_GROUPS:
        most = min(high, rows["bits"].shape[1])
        found = [prefix_events(at_least, rows["bits"], width, w) for w in range(low, most + 1)]
        if found:
            events[f"count_w{name}"] = torch.cat([p for p, _ in found]), torch.cat([y for _, y in found])
    slot, kept = rows["survivor_slot"], rows["kept_width"]
    events["survivor"] = survivor_events(logits.survivor, slot, kept)
    events["late_survivor"] = survivor_events(logits.late_survivor, slot, kept)
    return {
        name: Curve(reliability(predicted, happened), float((predicted - happened).square().mean()))
        for name, (predicted, happened) in events.items()
        if len(predicted)
    }


def fit_temperature(nll: Callable[[Tensor], Tensor]) -> float:
    """The T > 0 that minimises `nll(T)`, by LBFGS on log T; 1 where nothing better is found.

    Args:
        nll: mean negative log-likelihood of logits divided by T; differentiable.
    """
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log_t], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nll(log_t.exp())
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    fitted = log_t.detach().exp().clamp(0.05, 20.0)
    better = torch.isfinite(fitted) and nll(fitted) < nll(torch.ones_like(fitted))
    return float(fitted) if better else 1.0


@torch.no_grad()
def calibrate(net: WidthNet, rows: Batch, soft_labels: bool = True) -> dict[str, float]:
    """Set the network's temperatures so that held-out likelihood is greatest, and its regrets so that means agree.

    Args:
        net: in eval mode; changed in place. What it has of these is replaced.
        rows: all rows of the validation split.
        soft_labels: judge accept logits by the closed-form probabilities rather than by the bits (less variance).

    Returns:
        The buffers' values by name.
    """
    temperatures = ("accept_temperature", "survivor_temperature", "late_survivor_temperature")
    shifts = ("regret_shift", "late_regret_shift")
    for name in temperatures:
        net.get_buffer(name).fill_(1.0)
    for name in shifts:
        net.get_buffer(name).fill_(0.0)
    logits = net(*inputs(rows))
    drafted = torch.arange(rows["bits"].shape[1], device=rows["bits"].device) < rows["draft_width"][:, None]  # [N, W]
    if drafted.any():
        taken = bit_logits(logits.accept, rows["bits"])[drafted].double()
        labels = (rows["accept_probs"].clamp(0, 1) if soft_labels else rows["bits"])[drafted].double()
        score = torch.nn.functional.binary_cross_entropy_with_logits
        net.accept_temperature.fill_(fit_temperature(lambda t: score(taken / t, labels)))
    slot, kept = rows["survivor_slot"], rows["kept_width"]
    known = knows_survivor(slot, kept)
    steps, seen = regret_steps(rows["slot_deficits"], slot, kept)
    heads = ((logits.survivor, logits.regret), (logits.late_survivor, logits.late_regret))
    for (survivor, regret), temperature, shift in zip(heads, temperatures[1:], shifts, strict=True):
        if known.any():
            of_known = survivor[known].double()

            def nll(t: Tensor, of_known: Tensor = of_known) -> Tensor:
                return survivor_nll(of_known / t, slot[known], kept[known]).mean()

            net.get_buffer(temperature).fill_(fit_temperature(nll))
        if seen.any() and steps[seen].sum() > 0:
            net.get_buffer(shift).fill_(torch.log(steps[seen].sum() / regret[seen].exp().sum()))
    return {name: float(net.get_buffer(name)) for name in (*temperatures, *shifts)}


def inputs(rows: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a WidthNet takes, from rows."""
    return rows["features"], rows["draft_hidden"], rows["target_hidden"], rows["target_features"]
