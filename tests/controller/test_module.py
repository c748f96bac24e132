"""ControllerModule: metrics between constant and closed form, a fit that learns, resuming, and a loss that breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from controller.calibration import inputs
from controller.counts import bernoulli_nll
from controller.data import TraceDataModule
from controller.module import ControllerModule, accept_rates
from decoding.errors import UserError
from tests.controller.synthetic import write_traces


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TraceDataModule:
    return TraceDataModule(write_traces(tmp_path_factory.mktemp("traces"), prompts=150), batch_size=128)


def trainer(directory: Path, epochs: int, **options: object) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(max_epochs=epochs, accelerator="cpu", logger=False, default_root_dir=directory, **quiet | options)


def test_starts_at_the_constant_predictor(data: TraceDataModule) -> None:
    module = ControllerModule(**data.sizes)
    module.start_from(data.rows["train"].columns)
    metrics = module.evaluate(data.rows["val"].columns)
    assert metrics["val/count_nll"] == pytest.approx(metrics["val/count_nll_history"], rel=1e-4)
    assert metrics["val/survivor_nll"] == pytest.approx(metrics["val/survivor_nll_constant"], rel=1e-4)
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
    assert parts["count_ece"] == pytest.approx(whole["val/count_ece"], rel=1e-5)
    assert parts["count_explained"] == pytest.approx(whole["val/count_explained"], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("soft", [True, False])
def test_learns_what_there_is_to_learn(data: TraceDataModule, tmp_path: Path, soft: bool) -> None:
    seed_everything(0, verbose=False)
    module = ControllerModule(**data.sizes, soft_labels=soft, use_hidden=False, lr=3e-3, dropout=0.0)
    fit = trainer(tmp_path, 12, enable_checkpointing=False)
    fit.fit(module, data)
    metrics = module.evaluate(data.rows["val"].columns)
    assert metrics["val/count_explained"] > (0.8 if soft else 0.5)  # bits are noisier than the closed form
    assert metrics["val/count_nll_floor"] - 0.02 < metrics["val/count_nll"] < metrics["val/count_nll_constant"]
    assert metrics["val/survivor_nll"] < metrics["val/survivor_nll_constant"]
    assert fit.callback_metrics["val/loss"].item() == pytest.approx(metrics["val/loss"], rel=1e-5)
    # The world's own truth: feature 6 is u, and a draft is accepted with 0.1 + 0.8 u - 0.05 k.
    features = data.rows["val"].columns["features"][:1].repeat(2, 1)
    features[:, 6] = torch.tensor([0.2, 0.8])
    accept = module.net(features).accept.sigmoid()
    assert accept[:, 0, 0].tolist() == pytest.approx([0.26, 0.74], abs=0.08)


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
    drawn["survivor_rank"] = torch.zeros_like(drawn["survivor_rank"])
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
