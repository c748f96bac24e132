"""Calibration: bins and scores by hand, temperatures that improve likelihood, batches that add up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from controller.calibration import (
    bin_sums,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    ranked_probability_score,
    reliability,
    width_events,
)
from controller.data import TraceDataModule
from controller.module import ControllerModule
from tests.controller.synthetic import write_traces


def test_bins_by_hand() -> None:
    predicted, happened = torch.tensor([0.1, 0.2, 0.9, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    bins = reliability(predicted, happened, bins=2)
    np.testing.assert_allclose(bins.predicted, [0.15, 0.95], atol=1e-7)
    np.testing.assert_allclose(bins.observed, [0.5, 1.0])
    assert bins.error == expected_calibration_error(bins) == pytest.approx(0.5 * 0.35 + 0.5 * 0.05)
    halves = bin_sums(predicted[:2], happened[:2], 2) + bin_sums(predicted[2:], happened[2:], 2)
    torch.testing.assert_close(halves, bin_sums(predicted, happened, 2))


def test_a_true_probability_is_calibrated_and_a_shifted_one_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(50_000, generator=generator)
    happened = (torch.rand(50_000, generator=generator) < p).float()
    assert reliability(p, happened).error < 0.01  # 15 bins of 3,300: a standard error of 0.008 each, averaged
    assert reliability((p + 0.1).clamp(max=1), happened).error > 0.08


def test_width_events_and_ranked_probability_score_by_hand() -> None:
    at_least = torch.zeros(2, 4, 4)
    at_least[0, 2] = torch.tensor([1.0, 0.8, 0.3, 0.0])
    at_least[1, 3] = torch.tensor([1.0, 0.9, 0.5, 0.2])
    bits = torch.tensor([[True, False, False], [True, True, False]])
    predicted, happened = width_events(at_least, bits, torch.tensor([2, 3]))
    torch.testing.assert_close(predicted, torch.tensor([0.8, 0.3, 0.9, 0.5, 0.2]))
    assert happened.tolist() == [1, 0, 1, 1, 0]
    score = ranked_probability_score(at_least, bits, torch.tensor([2, 3]))
    assert score.item() == pytest.approx((0.04 + 0.09 + 0.01 + 0.25 + 0.04) / 5)


def test_temperature_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50_000, dtype=torch.float64, generator=generator)
    labels = (torch.rand(50_000, generator=generator) < logits.sigmoid()).double()
    score = torch.nn.functional.binary_cross_entropy_with_logits
    assert fit_temperature(lambda t: score(3 * logits / t, labels)) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(lambda t: t * float("nan")) == 1.0


@pytest.mark.parametrize("soft", [True, False])
def test_calibration_improves_held_out_likelihood(tmp_path: Path, soft: bool) -> None:
    data = TraceDataModule(write_traces(tmp_path, prompts=40))
    module = ControllerModule(**data.sizes)
    module.start_from(data.rows["train"].columns)
    with torch.no_grad():  # over-confident heads
        module.net.accept_bias.mul_(5)
        module.net.survivor_head.bias.mul_(5)
    rows = data.rows["val"].columns
    before = module.evaluate(rows)
    temperatures = calibrate(module.net, rows, soft)
    after = module.evaluate(rows)
    assert temperatures["accept"] > 1.5 and temperatures["survivor"] > 1.5
    assert after["val/count_nll"] < before["val/count_nll"] - 0.05
    assert after["val/survivor_nll"] < before["val/survivor_nll"] - 0.01
    assert after["val/count_ece"] < before["val/count_ece"]
    assert calibrate(module.net, rows, soft) == pytest.approx(temperatures)  # not compounded
