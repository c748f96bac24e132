"""ControllerModule: a WidthNet with its losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from controller.data import SPLITS, Batch, TraceDataModule
from controller.features import CANDIDATE, LAYER
from controller.losses import Predicted, after_events, before_events, candidate_events, loss_of
from controller.metrics import CURVES, Reliability, StageMetrics
from controller.network import LARGEST, WidthNet
from decoding.errors import UserError
from decoding.support.checks import number, whole


class ControllerModule(LightningModule):
    """Trains a WidthNet on the rows of a TraceDataModule.

    The loss is the mean binary cross entropy of candidates. The rules for layers go by the candidates' chances and do
    not move them: they are fitted afterwards (`fit_rules`).

    Args:
        target_width: R, of the traces.
        hidden, layers: of the network.
        lr, weight_decay: of AdamW; the rate follows a cosine to zero.
        batch_size: iterations per batch; read by train.py.
        names, candidate_names: of the features, in order.

    Raises:
        UserError: sizes or rates that cannot be.
    """

    def __init__(
        self,
        target_width: int,
        hidden: int = 32,
        layers: int = 2,
        lr: float = 1e-2,
        weight_decay: float = 1e-3,
        batch_size: int = 64,
        names: Sequence[str] = LAYER,
        candidate_names: Sequence[str] = CANDIDATE,
    ) -> None:
        super().__init__()
        for name, size in (("hidden", hidden), ("layers", layers)):
            whole(f"controller.{name}", size, least=1, most=LARGEST)
        whole("controller.batch_size", batch_size, least=1)
        number("controller.lr", lr, above=0)
        number("controller.weight_decay", weight_decay, least=0)
        self.net = WidthNet(target_width, hidden, layers, names, candidate_names)
        self.lr, self.weight_decay, self.batch_size = lr, weight_decay, batch_size
        self.train_metrics, self.val_metrics, self.test_metrics = (StageMetrics() for _ in SPLITS)

    def setup(self, stage: str) -> None:
        """Before a fit: standardisation from the train split (a checkpoint to resume overrides it)."""
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, TraceDataModule):
            self.start_from(data.rows["train"].columns)

    @torch.no_grad()
    def start_from(self, rows: Batch) -> None:
        """Standardise the inputs by the train split, the parents' chances as the network has them at first."""
        some = {name: column[:512] for name, column in rows.items()}
        above = torch.zeros_like(some["candidates"][..., 0])
        above[:, 1:] = -1.0
        flat = [column.flatten(0, 1) for column in (some["candidates"], some["features"], above, some["valid"])]
        self.net.start_from(self.net.inputs(*flat)[flat[3]], some["features"][some["there"]])

    def events(self, batch: Batch) -> dict[str, Predicted]:
        """Chances and outcomes, by curve."""
        log_chances = self.net(batch)
        return {
            "candidate": candidate_events(log_chances, batch),
            "after": after_events(self.net, log_chances, batch),
            "before": before_events(self.net, log_chances, batch),
        }

    def training_step(self, batch: Batch, index: int) -> Tensor:
        events = {"candidate": candidate_events(self.net(batch), batch)}
        loss = loss_of(events["candidate"])
        if not torch.isfinite(loss):
            raise UserError(
                f"The training loss is {loss.item()} at step {self.global_step}. Lower controller.lr ({self.lr:g}), or "
                "collect the traces again if their features are far out of range."
            )
        self.train_metrics.update({name: Predicted(*(v.detach() for v in found)) for name, found in events.items()})
        return loss

    def validation_step(self, batch: Batch, index: int) -> None:
        self.val_metrics.update({"candidate": candidate_events(self.net(batch), batch)})

    def test_step(self, batch: Batch, index: int) -> None:
        self.test_metrics.update(self.events(batch))

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
        metrics = self._stage(stage)
        metrics.reset()
        metrics.update(self.events(rows))
        return self._compute(stage)

    def curves(self, stage: str) -> dict[str, Reliability]:
        """Reliability of each kind of chance in a split, as last evaluated."""
        return {name: self._stage(stage).reliability(name) for name in CURVES}

    def _stage(self, stage: str) -> StageMetrics:
        metrics: StageMetrics = getattr(self, f"{stage}_metrics")
        return metrics

    def _compute(self, stage: str) -> dict[str, float]:
        """A stage's metrics from its sums."""
        metrics = self._stage(stage).compute()
        loss = {"loss": metrics["candidate_nll"]} if metrics else {}
        return {f"{stage}/{name}": value for name, value in (loss | metrics).items()}

    def _log(self, stage: str) -> None:
        metrics = self._compute(stage)
        self._stage(stage).reset()
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
