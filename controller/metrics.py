"""What is measured of a training stage: the losses of WidthNet beside those of constant and perfect predictors."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from controller.calibration import (
    BINS,
    bin_sums,
    expected_calibration_error,
    reliability_from_sums,
    survivor_events,
    width_events,
)
from controller.data import Batch
from controller.losses import (
    accepted_before,
    bernoulli_nll,
    count_nll,
    count_table,
    is_draft,
    knows_survivor,
    regret_nll,
    regret_steps,
    survivor_nll,
    tails,
)
from controller.network import WidthLogits

# Means over bits or rows. Each is logged as <stage>/<name>, the soft ones only as count_explained.
_MEANS = (
    "count_nll",  # of an accept bit given the bits before it, nats
    "count_nll_constant",  # under the train split's accept rate at each draft position
    "count_nll_history",  # under its rate at each (position, accepted before): the best without looking at the context
    "count_nll_floor",  # under the logged closed form: no predictor can expect less
    "soft_nll",  # these three: the same against the closed-form probabilities in place of the bits
    "soft_nll_constant",
    "soft_nll_floor",
    "count_rps",  # mean squared error of P(K_w >= M)
    "survivor_nll",  # of a survivor slot among the slots kept, nats
    "survivor_nll_constant",  # under the train split's rates
    "late_survivor_nll",  # once P is known
    "survivor_rps",  # mean squared error of P(slot <= k)
    "late_survivor_rps",
    "regret_nll",  # Poisson deviance of a slot's nats, without its constant
    "regret_nll_constant",  # under the train split's means
    "late_regret_nll",
)
_CURVES = ("count", "survivor", "late_survivor")  # of which reliability is measured


class StageMetrics(Metric):
    """Everything that is measured of one stage, as sums over its batches: divided only in `compute`.

    Args:
        draft_width, target_width: W and R.
    """

    totals: Tensor
    bins: Tensor
    position_rate: Tensor
    history_rate: Tensor
    survivor_rate: Tensor
    regret_rate: Tensor

    def __init__(self, draft_width: int, target_width: int) -> None:
        super().__init__()
        self.add_state("totals", torch.zeros(len(_MEANS), 2, dtype=torch.float64), dist_reduce_fx="sum")  # sum, count
        self.add_state("bins", torch.zeros(len(_CURVES), 3, BINS, dtype=torch.float64), dist_reduce_fx="sum")
        self.register_buffer("position_rate", torch.full((draft_width,), 0.5), persistent=False)
        self.register_buffer("history_rate", torch.full((draft_width, draft_width), 0.5), persistent=False)
        self.register_buffer("survivor_rate", torch.full((target_width,), 1.0 / target_width), persistent=False)
        self.register_buffer("regret_rate", torch.full((target_width - 1,), 0.1), persistent=False)

    def set_constants(self, rows: Batch) -> None:
        """Fit the constant predictors to the rows of the train split."""
        self.position_rate, self.history_rate = (rate.to(self.bins.device) for rate in accept_rates(rows))
        self.survivor_rate = survivor_rates(rows, len(self.survivor_rate)).to(self.bins.device)
        self.regret_rate = regret_rates(rows).to(self.bins.device)

    @torch.no_grad()
    def update(self, batch: Batch, logits: WidthLogits) -> None:
        """Add a batch and what the network says of it."""
        drafted, bits = is_draft(batch), batch["bits"]
        if drafted.any():
            self._add_counts(batch, logits.accept, drafted)
            at_least = tails(count_table(logits.accept.sigmoid()))
            predicted, happened = width_events(at_least, bits, batch["draft_width"])
            self.bins[0] += bin_sums(predicted, happened)
            self._add("count_rps", (predicted - happened).square())
        slot, kept = batch["survivor_slot"], batch["kept_width"]
        known = knows_survivor(slot, kept)
        constant = self.survivor_rate.log().expand(len(slot), -1)
        self._add("survivor_nll_constant", survivor_nll(constant, slot, kept)[known])
        steps, seen = regret_steps(batch["slot_deficits"], slot, kept)
        self._add("regret_nll_constant", regret_nll(self.regret_rate.log().expand_as(steps), steps)[seen])
        heads = (("", logits.survivor, logits.regret), ("late_", logits.late_survivor, logits.late_regret))
        for curve, (when, survivor, regret) in enumerate(heads, start=1):
            self._add(f"{when}survivor_nll", survivor_nll(survivor, slot, kept)[known])
            self._add(f"{when}regret_nll", regret_nll(regret, steps)[seen])
            predicted, happened = survivor_events(survivor, slot, kept)
            self.bins[curve] += bin_sums(predicted, happened)
            self._add(f"{when}survivor_rps", (predicted - happened).square())

    def _add_counts(self, batch: Batch, accept: Tensor, drafted: Tensor) -> None:
        bits, closed = batch["bits"], batch["accept_probs"].clamp(0, 1)
        constant = self.position_rate.expand_as(closed)
        history = self.history_rate[torch.arange(bits.shape[1], device=bits.device), accepted_before(bits)]
        self._add("count_nll", count_nll(accept, bits)[drafted])
        self._add("count_nll_constant", bernoulli_nll(constant, bits)[drafted])
        self._add("count_nll_history", bernoulli_nll(history, bits)[drafted])
        self._add("count_nll_floor", bernoulli_nll(closed, bits)[drafted])
        self._add("soft_nll", count_nll(accept, bits, closed)[drafted])
        self._add("soft_nll_constant", bernoulli_nll(constant, closed)[drafted])
        self._add("soft_nll_floor", bernoulli_nll(closed, closed)[drafted])

    def _add(self, name: str, values: Tensor) -> None:
        row = _MEANS.index(name)
        self.totals[row, 0] += values.double().sum()
        self.totals[row, 1] += values.numel()

    def compute(self) -> dict[str, float]:
        """Means and what follows from them; what was never seen is left out."""
        pairs = zip(_MEANS, self.totals.tolist(), strict=True)
        metrics = {name: total / count for name, (total, count) in pairs if count > 0}
        soft = [metrics.pop(name, 0.0) for name in ("soft_nll", "soft_nll_constant", "soft_nll_floor")]
        for name, bins in zip(_CURVES, self.bins, strict=True):
            if f"{name}_nll" in metrics:
                metrics[f"{name}_ece"] = expected_calibration_error(reliability_from_sums(bins))
        if soft[1] - soft[2] > 1e-9:
            metrics["count_explained"] = (soft[1] - soft[0]) / (soft[1] - soft[2])
        return metrics


def accept_rates(rows: Batch) -> tuple[Tensor, Tensor]:
    """Mean closed-form accept probability by draft position [W], and by position and drafts accepted before [W, W].

    A cell with few rows leans on its position's rate (worth four rows), a position on one half (worth two).
    """
    bits, drafted = rows["bits"], is_draft(rows)
    width = bits.shape[1]
    cell = (torch.arange(width) * width + accepted_before(bits))[drafted]  # [D]
    closed = rows["accept_probs"].clamp(0, 1)[drafted].double()
    count = torch.bincount(cell, minlength=width * width).view(width, width)
    total = torch.bincount(cell, closed, minlength=width * width).view(width, width)
    position = (total.sum(1) + 1.0) / (count.sum(1) + 2.0)
    history = (total + 4.0 * position[:, None]) / (count + 4.0)
    return position.float(), history.float()


def survivor_rates(rows: Batch, ranks: int) -> Tensor:
    """The constant survivor distribution of greatest censored likelihood; [R].

    A fixed point of s_r = n_r / Σ over rows with c >= r of 1 / S(c): rows with slot r over that slot's exposure. One
    uncensored pseudo-row per slot keeps every share positive.
    """
    known = knows_survivor(rows["survivor_slot"], rows["kept_width"])
    slot, kept = rows["survivor_slot"][known], rows["kept_width"][known].clamp(max=ranks)
    seen = torch.bincount(slot - 1, minlength=ranks).double() + 1.0  # [R] n_r
    rows_at = torch.bincount(kept, minlength=ranks + 1).double()[1:]  # [R] rows with c = 1..R
    rows_at[-1] += ranks  # the pseudo-counts are uncensored rows
    share = seen / seen.sum()
    for _ in range(200):
        exposure = (rows_at / share.cumsum(0)).flip(0).cumsum(0).flip(0)  # [R] Σ_{c >= r} rows(c) / S(c)
        share = seen / exposure
        share = share / share.sum()
    return share.float()


def regret_rates(rows: Batch) -> Tensor:
    """Mean nats of each regret step over the rows that saw it, with one row of 0.1 each; [R - 1]."""
    steps, seen = regret_steps(rows["slot_deficits"], rows["survivor_slot"], rows["kept_width"])
    return ((steps * seen).sum(0) + 0.1) / (seen.sum(0) + 1)
