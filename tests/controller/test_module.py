"""ControllerModule: metrics between constant and closed form, a fit that learns, resuming, and a loss that breaks."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from controller.calibration import calibrate, inputs, reliability, survivor_events, width_events
from controller.data import TraceDataModule
from controller.losses import bernoulli_nll, count_table, tails
from controller.metrics import accept_rates
from controller.module import ControllerModule
from decoding.errors import UserError
from tests.controller.synthetic import CONFIG, U, V, survivor_shares, write_traces


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TraceDataModule:
    return TraceDataModule(write_traces(tmp_path_factory.mktemp("traces"), prompts=150), batch_size=128)


WEIGHTS = {"survivor_weight": 0.5, "regret_weight": 0.5}


def trainer(directory: Path, epochs: int, **options: object) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=directory, **quiet | options)


def test_starts_at_the_constant_predictor(data: TraceDataModule) -> None:
    module = ControllerModule(**data.sizes)
    module.start_from(data.rows["train"].columns)
    metrics = module.evaluate(data.rows["val"].columns)
    assert metrics["val/count_nll"] == pytest.approx(metrics["val/count_nll_history"], rel=1e-4)
    for when in ("", "late_"):
        assert metrics[f"val/{when}survivor_nll"] == pytest.approx(metrics["val/survivor_nll_constant"], rel=1e-4)
        assert metrics[f"val/{when}regret_nll"] == pytest.approx(metrics["val/regret_nll_constant"], rel=1e-4)
    assert metrics["val/count_nll_floor"] < metrics["val/count_nll_constant"]
    rows = data.rows["val"].columns
    drafted = torch.arange(rows["bits"].shape[1]) < rows["draft_width"][:, None]
    by_hand = bernoulli_nll(rows["accept_probs"].clamp(0, 1), rows["bits"])[drafted].mean()
    assert metrics["val/count_nll_floor"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_metrics_of_batches_equal_those_of_all_rows(data: TraceDataModule) -> None:
    module = ControllerModule(**data.sizes).eval()
    module.start_from(data.rows["train"].columns)
    whole = module.evaluate(data.rows["val"].columns)
    with torch.no_grad():
        for batch in data.val_dataloader():
            module.val_metrics.update(batch, module.net(*inputs(batch)))
    parts = module.val_metrics.compute()
    assert {f"val/{name}" for name in parts} == set(whole) - {"val/loss"}
    for name, value in parts.items():
        assert value == pytest.approx(whole[f"val/{name}"], rel=1e-4, abs=1e-5), name


def test_each_heads_calibration_goes_by_its_own_name(data: TraceDataModule) -> None:
    module = ControllerModule(**data.sizes).eval()
    for i, parameter in enumerate(module.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(i))
    rows = data.rows["val"].columns
    metrics = module.evaluate(rows)
    with torch.no_grad():
        logits = module.net(*inputs(rows))
    at_least = tails(count_table(logits.accept.sigmoid()))
    slot, kept = rows["survivor_slot"], rows["kept_width"]
    events = {
        "count": width_events(at_least, rows["bits"], rows["draft_width"]),
        "survivor": survivor_events(logits.survivor, slot, kept),
        "late_survivor": survivor_events(logits.late_survivor, slot, kept),
    }
    for name, (predicted, happened) in events.items():
        assert metrics[f"val/{name}_ece"] == pytest.approx(reliability(predicted, happened).error)
        assert metrics[f"val/{name}_rps"] == pytest.approx((predicted - happened).square().mean().item(), rel=1e-5)
    assert len({round(metrics[f"val/{name}_ece"], 6) for name in events}) == 3


@pytest.mark.parametrize("soft", [True, False])
def test_learns_what_there_is_to_learn(data: TraceDataModule, tmp_path: Path, soft: bool) -> None:
    seed_everything(0, verbose=False)
    module = ControllerModule(**data.sizes, **WEIGHTS, soft_labels=soft, use_hidden=False, lr=3e-3, dropout=0.0)
    fit = trainer(tmp_path, 12, enable_checkpointing=False)
    fit.fit(module, data)
    metrics = module.evaluate(data.rows["val"].columns)
    assert metrics["val/count_explained"] > (0.8 if soft else 0.5)  # bits are noisier than the closed form
    assert metrics["val/count_nll_floor"] - 0.02 < metrics["val/count_nll"] < metrics["val/count_nll_constant"]
    for name in ("survivor", "regret"):
        constant = metrics[f"val/{name}_nll_constant"]
        assert metrics[f"val/{name}_nll"] < constant - 0.03 and metrics[f"val/late_{name}_nll"] < constant - 0.03
    assert fit.callback_metrics["val/loss"].item() == pytest.approx(metrics["val/loss"], rel=1e-5)
    # The world's own truth: feature U is u, and a draft is accepted with 0.1 + 0.8 u - 0.05 k.
    features = data.rows["val"].columns["features"][:1].repeat(2, 1)
    features[:, U] = torch.tensor([0.2, 0.8])
    accept = module.net(features).accept.sigmoid()
    assert accept[:, 0, 0].tolist() == pytest.approx([0.26, 0.74], abs=0.08 if soft else 0.1)
    check_late_heads(module, data)


def expected_step(v: float, step: int) -> float:
    """Mean nats that slot `step` + 1 adds, of rows that saw it: one where the survivor lies beyond slot `step`."""
    beyond = [survivor_shares(v, kept)[step:].sum() for kept in range(step + 1, CONFIG.target_width + 1)]
    return float(sum(beyond) / len(beyond))


def check_late_heads(module: ControllerModule, data: TraceDataModule) -> None:
    """Survivors and regrets follow target feature V, whatever else a row holds."""
    rows = data.rows["val"].columns
    late = rows["target_features"][:50].clone()
    found = []
    for v in (0.15, 0.5, 0.85):
        late[:, V] = v
        logits = module.net(rows["features"][:50], target_features=late)
        shares, steps = logits.late_survivor.softmax(-1).mean(0), logits.late_regret.exp().mean(0)
        assert shares.tolist() == pytest.approx(survivor_shares(v, CONFIG.target_width).tolist(), abs=0.12)
        assert steps[0].item() == pytest.approx(expected_step(v, 1), abs=0.12)
        found.append((shares[0].item(), -steps[0].item()))
    assert found == sorted(found)


def test_one_beam_has_no_survivors_or_regrets(tmp_path: Path) -> None:
    """Traces of target_width 1: the counts are learned, and there is nothing to learn of slots."""
    data = TraceDataModule(write_traces(tmp_path / "traces", prompts=10, target_width=1), batch_size=64)
    assert data.sizes["target_width"] == 1
    module = ControllerModule(**data.sizes, use_hidden=False)
    trainer(tmp_path, 1, enable_checkpointing=False).fit(module, data)
    fitted = calibrate(module.net, data.rows["val"].columns)
    assert fitted["survivor_temperature"] == 1.0 and fitted["regret_shift"] == 0.0
    metrics = module.evaluate(data.rows["val"].columns)
    assert metrics["val/count_nll"] > 0 and not any("survivor" in name or "regret" in name for name in metrics)


def test_resumes_from_a_checkpoint_with_weights_only(data: TraceDataModule, tmp_path: Path) -> None:
    module = ControllerModule(**data.sizes)
    keep = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    trainer(tmp_path, 1, callbacks=[keep]).fit(module, data)
    again = ControllerModule(**data.sizes)
    resumed = trainer(tmp_path, 2, enable_checkpointing=False)
    resumed.fit(again, data, ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True)
    steps = len(data.train_dataloader())
    assert resumed.global_step == 2 * steps and resumed.current_epoch == 2
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert all(name.startswith("net.") for name in state)


class Rates(Callback):
    """Keeps the learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, *_: object) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("epochs", [2, 3, 6])
def test_a_longer_fit_that_resumes_falls_to_zero_once(data: TraceDataModule, tmp_path: Path, epochs: int) -> None:
    """From the rate that a fit of this length has where the shorter one ended, which had come down to 0 there."""
    keep = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    trainer(tmp_path, 2, callbacks=[keep, short := Rates()]).fit(ControllerModule(**data.sizes), data)
    total = epochs * len(data.train_dataloader())
    cosine = [3e-3 * (1 + math.cos(math.pi * step / total)) / 2 for step in range(total)]
    if epochs == 2:
        assert short.seen == pytest.approx(cosine)
        return
    resumed = trainer(tmp_path, epochs, enable_checkpointing=False, callbacks=[rates := Rates()])
    last = str(tmp_path / "last.ckpt")
    resumed.fit(ControllerModule(**data.sizes), data, ckpt_path=last, weights_only=True)
    assert rates.seen == pytest.approx(cosine[len(short.seen) :])


def test_a_broken_loss_is_named(data: TraceDataModule, tmp_path: Path) -> None:
    module = ControllerModule(**data.sizes)
    trained = trainer(tmp_path, 1, enable_checkpointing=False)
    with torch.no_grad():
        module.net.accept_basis.fill_(float("inf"))
        module.net.accept_head.bias.fill_(1.0)
    with pytest.raises(UserError, match=r"training loss is (nan|inf)"):
        trained.fit(module, data)


def test_a_batch_without_drafts_or_survivors_counts_nothing(data: TraceDataModule) -> None:
    module = ControllerModule(**data.sizes)
    rows = data.rows["train"].columns
    drawn = {name: column[rows["draft_width"] == 0] for name, column in rows.items()}
    drawn["survivor_slot"] = torch.zeros_like(drawn["survivor_slot"])
    assert module.training_step(drawn, 0).item() == 0.0
    assert module.evaluate(drawn) == {"val/loss": 0.0}


def test_accept_rates_of_unseen_cells_lean_on_their_position() -> None:
    rows = {
        "bits": torch.tensor([[True, False], [True, True]]).repeat(500, 1),
        "accept_probs": torch.tensor([[0.9, 0.4], [0.9, 0.4]]).repeat(500, 1),
        "draft_width": torch.full((1000,), 2),
    }
    position, history = accept_rates(rows)
    assert position.tolist() == pytest.approx([0.9, 0.4], abs=1e-3)
    assert history[1].tolist() == pytest.approx([0.4, 0.4], abs=1e-3)  # k = 0 at draft 1 was never seen
