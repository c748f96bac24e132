"""From traces to a calibrated network: splits, refusals, that it learns, and that chances sum to what happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from controller.calibration import calibrate, fit_rules
from controller.data import TraceDataModule
from controller.losses import Predicted, candidate_events
from controller.metrics import StageMetrics
from controller.module import ControllerModule
from decoding import UserError
from tests.controller.synthetic import CONFIG, rows, write_traces


def trained(data: TraceDataModule, steps: int = 150) -> ControllerModule:
    """A few hundred steps on all rows at once."""
    torch.manual_seed(0)
    module = ControllerModule(CONFIG.target_width)
    columns = data.rows["train"].columns
    module.start_from(columns)
    optimiser = torch.optim.Adam(module.net.mlp.parameters(), 1e-2)
    for step in range(steps):
        optimiser.zero_grad()
        module.training_step(columns, step).backward()
        optimiser.step()
    module.eval()
    return module


def test_learns_and_is_calibrated(tmp_path: Path) -> None:
    data = TraceDataModule(write_traces(tmp_path, 16))
    columns = data.rows["train"].columns
    module = trained(data)
    with torch.no_grad():
        chances, happened = candidate_events(module.net(columns), columns)
    assert float(chances.sum() / happened.sum()) == pytest.approx(1, abs=0.1)  # as many are selected as was said
    first = module.evaluate(columns, "train")
    calibrate(module.net, data.rows["val"].columns)
    with torch.no_grad():
        kept = {name: value.clone() for name, value in module.net.mlp.state_dict().items()}
    fit_rules(module.net, columns)
    found = module.evaluate(columns, "train")
    assert found["train/candidate_explained"] > 0.3 and found["train/candidate_ece"] < 0.03
    assert found["train/after_nll"] < first["train/after_nll"] and found["train/after_explained"] > 0
    assert found["train/before_nll"] < first["train/before_nll"]
    assert all(torch.equal(value, kept[name]) for name, value in module.net.mlp.state_dict().items())


def test_metrics_of_known_chances() -> None:
    metrics = StageMetrics()
    even = Predicted(torch.full((4,), 0.5), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    sure = Predicted(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]))
    metrics.update({"candidate": even, "after": sure})
    found = metrics.compute()
    assert found["candidate_explained"] == pytest.approx(0, abs=1e-6) and found["candidate_ece"] == 0
    assert found["after_explained"] == pytest.approx(1, abs=1e-4) and "before_nll" not in found


def test_rows_become_iterations(tmp_path: Path) -> None:
    data = TraceDataModule(write_traces(tmp_path))
    columns = [data.rows[split].columns for split in ("train", "val")]
    assert sum(len(part["drafts"]) for part in columns) == sum(row["layer"] == 1 for row in rows())
    assert sum(int(part["there"].sum()) for part in columns) == len(rows())
    assert sum(int((part["places"] > 0).sum()) for part in columns) == sum(
        place > 0 for row in rows() for place in row["places"]
    )
    first = next(row for row in rows() if row["split"] == "train")
    part = columns[0]
    count = len(first["places"])
    assert part["places"][0, 0, :count].tolist() == first["places"] and int(part["valid"][0, 0].sum()) == count
    assert part["candidates"][0, 0, :count].numpy().ravel() == pytest.approx(first["candidates"])
    assert part["need"][0, 0, : len(first["need"])].tolist() == first["need"]


def test_what_cannot_be_learned_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_train_rows is 0"):
        TraceDataModule(write_traces(tmp_path), max_train_rows=0)
    assert len(TraceDataModule(tmp_path, max_train_rows=1).rows["train"]) > 1  # the first prompt is kept
    write_traces(tmp_path, features={"version": 3, "names": ["layer"], "candidate_names": []})
    with pytest.raises(UserError, match="features"):
        TraceDataModule(tmp_path)
    write_traces(tmp_path, 3)
    with pytest.raises(UserError, match="no rows in split 'val'"):
        TraceDataModule(tmp_path)
