"""ControllerModule: the losses of WidthNet, and what they are worth beside a constant and a perfect predictor."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from controller.calibration import (
    inputs,
)
from controller.data import Batch, TraceDataModule
from controller.losses import (
    count_nll,
    is_draft,
    knows_survivor,
    regret_nll,
    regret_steps,
    survivor_nll,
)
from controller.metrics import StageMetrics
from controller.network import WidthLogits, WidthNet
from decoding.errors import UserError
from decoding.tasks.base import SPLITS


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
        loss = _mean(count_nll(logits.accept, batch["bits"], labels), is_draft(batch))
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


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where the mask is set; zero (with a gradient) where it never is."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)
