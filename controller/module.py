"""ControllerModule: the losses of WidthNet, and what they are worth beside a constant and a perfect predictor."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torchmetrics import Metric

from controller.calibration import (
    BINS,
    bin_sums,
    expected_calibration_error,
    inputs,
    reliability_from_sums,
    survivor_events,
    width_events,
)
from controller.counts import (
    accepted_before,
    bernoulli_nll,
    count_nll,
    count_table,
    knows_survivor,
    regret_nll,
    regret_steps,
    survivor_nll,
    tails,
)
from controller.data import SPLITS, Batch, TraceDataModule
from controller.network import WidthLogits, WidthNet
from decoding.errors import UserError

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
        drafted, bits = _drafted(batch), batch["bits"]
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


class ControllerModule(LightningModule):
    """Trains a WidthNet on the rows of a TraceDataModule.

    The optimised loss is the mean over bits of `count_nll`, plus `survivor_weight` times the means over rows of both
    `survivor_nll`, plus `regret_weight` times those of both `regret_nll`; `<stage>/loss` is the same on the hard bits.
    `<stage>/count_explained` is the share of the explainable deviance that is explained, measured against the
    closed-form probabilities: 0 for the constant, 1 for the closed form itself.

    Args:
        features, draft_width, target_width, draft_hidden, target_hidden, target_features: sizes, from
            `TraceDataModule.sizes`.
        hidden, layers, dropout, late_hidden: of the network.
        lr, weight_decay: of AdamW; the rate follows a cosine to zero.
        survivor_weight, regret_weight: weights of these losses.
        soft_labels: train on the logged closed-form accept probabilities, whose expectation the bits have.
        use_hidden: give the network the models' hidden vectors.
        batch_size: rows per batch; read by train.py.
    """

    def __init__(
        self,
        features: int,
        draft_width: int,
        target_width: int,
        draft_hidden: int = 0,
        target_hidden: int = 0,
        target_features: int = 0,
        hidden: int = 128,
        layers: int = 2,
        dropout: float = 0.2,
        late_hidden: int = 48,
        projected: int = 8,
        lr: float = 3e-3,
        weight_decay: float = 1e-2,
        survivor_weight: float = 0.25,
        regret_weight: float = 0.25,
        soft_labels: bool = True,
        use_hidden: bool = False,
        batch_size: int = 512,
    ) -> None:
        super().__init__()
        if not use_hidden:
            draft_hidden = target_hidden = 0
        sizes = (features, draft_width, target_width, draft_hidden, target_hidden, target_features)
        self.net = WidthNet(*sizes, hidden, layers, dropout, late_hidden, projected)
        self.lr, self.weight_decay = lr, weight_decay
        self.survivor_weight, self.regret_weight = survivor_weight, regret_weight
        self.soft_labels, self.batch_size = soft_labels, batch_size
        self.train_metrics, self.val_metrics, self.test_metrics = (
            StageMetrics(draft_width, target_width) for _ in SPLITS
        )

    def setup(self, stage: str) -> None:
        """Before a fit: constants and standardisation from the train split (a checkpoint to resume overrides them)."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, TraceDataModule):
            self.start_from(data.rows["train"].columns)

    def start_from(self, rows: Batch) -> None:
        """Set the constant predictors, and the network to start at them, from the rows of the train split."""
        for stage in SPLITS:
            self._stage(stage).set_constants(rows)
        early, late = (
            (rows[name].mean(0), rows[name].std(0, correction=0)) for name in ("features", "target_features")
        )
        constants = self.train_metrics
        self.net.start_from(early, late, constants.history_rate, constants.survivor_rate, constants.regret_rate)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        logits = self.net(*inputs(batch))
        slot, kept = batch["survivor_slot"], batch["kept_width"]
        labels = batch["accept_probs"].clamp(0, 1) if self.soft_labels else None
        loss = _mean(count_nll(logits.accept, batch["bits"], labels), _drafted(batch))
        known = knows_survivor(slot, kept)
        steps, seen = regret_steps(batch["slot_deficits"], slot, kept)
        for survivor, regret in ((logits.survivor, logits.regret), (logits.late_survivor, logits.late_regret)):
            loss = loss + self.survivor_weight * _mean(survivor_nll(survivor, slot, kept), known)
            loss = loss + self.regret_weight * _mean(regret_nll(regret, steps), seen)
        if not torch.isfinite(loss):
            raise UserError(
                f"The training loss is {loss.item()} at step {self.global_step}. Lower controller.lr ({self.lr:g}), or "
                "collect the traces again if their features are far out of range."
            )
        self.train_metrics.update(batch, WidthLogits(*(head.detach() for head in logits)))
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        self.val_metrics.update(batch, self.net(*inputs(batch)))

    def test_step(self, batch: Batch, index: int) -> None:
        self.test_metrics.update(batch, self.net(*inputs(batch)))

    def on_train_epoch_end(self) -> None:
        self._log("train")

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def configure_optimizers(self) -> Any:
        """AdamW (decay on weight matrices only) and a cosine over the whole fit."""
        decayed = {m.weight for m in self.net.modules() if isinstance(m, nn.Linear)}
        groups = [
            {"params": [p for p in self.net.parameters() if p in decayed], "weight_decay": self.weight_decay},
            {"params": [p for p in self.net.parameters() if p not in decayed], "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(groups, lr=self.lr)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            return optimiser
        schedule = CosineOverFit(optimiser, T_max=max(int(steps), 1))
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def evaluate(self, rows: Batch, stage: str = "val") -> dict[str, float]:
        """All metrics of a split at once, without a Trainer: for instance after calibration."""
        self.eval()
        self._stage(stage).reset()
        self._stage(stage).update(rows, self.net(*inputs(rows)))
        return self._compute(stage)

    def _stage(self, stage: str) -> StageMetrics:
        metrics: StageMetrics = getattr(self, f"{stage}_metrics")
        return metrics

    def _compute(self, stage: str) -> dict[str, float]:
        """A stage's metrics from its sums, which start again."""
        metrics = self._stage(stage).compute()
        loss = metrics.get("count_nll", 0.0)
        for when in ("", "late_"):
            loss += self.survivor_weight * metrics.get(f"{when}survivor_nll", 0.0)
            loss += self.regret_weight * metrics.get(f"{when}regret_nll", 0.0)
        self._stage(stage).reset()
        return {f"{stage}/{name}": value for name, value in ({"loss": loss} | metrics).items()}

    def _log(self, stage: str) -> None:
        metrics = self._compute(stage)
        self.log(f"{stage}/loss", metrics.pop(f"{stage}/loss"), prog_bar=stage != "test")
        self.log_dict(metrics)


class CosineOverFit(CosineAnnealingLR):
    """A cosine to zero at the end of this fit, which may be longer than the one whose state is restored."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        total = self.T_max
        super().load_state_dict({**state_dict, "T_max": total})
        if state_dict["T_max"] == total:
            return  # as if never stopped, to the last bit
        share = (1 + math.cos(math.pi * self.last_epoch / total)) / 2
        for group, rate in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = rate * share


def accept_rates(rows: Batch) -> tuple[Tensor, Tensor]:
    """Mean closed-form accept probability by draft position [W], and by position and drafts accepted before [W, W].

    A cell with few rows leans on its position's rate (worth four rows), a position on one half (worth two).
    """
    bits, drafted = rows["bits"], _drafted(rows)
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


def _drafted(rows: Batch) -> Tensor:
    """Which entries of the padded bits are drafts; [N, W] bool."""
    return torch.arange(rows["bits"].shape[1], device=rows["bits"].device) < rows["draft_width"][:, None]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where the mask is set; zero (with a gradient) where it never is."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
