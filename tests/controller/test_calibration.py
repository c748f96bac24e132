"""Calibration: bins, scores and curves, temperatures that improve likelihood, batches that add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from controller.calibration import (
    bin_sums,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    inputs,
    prefix_events,
    reliability,
    reliability_curves,
    survivor_events,
    width_events,
)
from controller.data import Batch, TraceDataModule
from controller.losses import regret_steps
from controller.module import ControllerModule
from controller.network import WidthNet
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


def test_width_events_by_hand() -> None:
    at_least = torch.zeros(2, 4, 4)
    at_least[0, 2] = torch.tensor([1.0, 0.8, 0.3, 0.0])
    at_least[1, 3] = torch.tensor([1.0, 0.9, 0.5, 0.2])
    bits = torch.tensor([[True, False, False], [True, True, False]])
    predicted, happened = width_events(at_least, bits, torch.tensor([2, 3]))
    torch.testing.assert_close(predicted, torch.tensor([0.8, 0.3, 0.9, 0.5, 0.2]))
    assert happened.tolist() == [1, 0, 1, 1, 0]


def test_events_of_a_width_are_those_of_every_row_with_as_many_drafts() -> None:
    at_least = torch.rand(3, 4, 4)
    bits = torch.tensor([[True, False, False], [False, True, True], [True, True, False]])
    predicted, happened = prefix_events(at_least, bits, torch.tensor([1, 3, 2]), 2)  # the first row has one draft only
    torch.testing.assert_close(predicted, torch.stack([*at_least[1, 2, 1:3], *at_least[2, 2, 1:3]]))
    assert happened.tolist() == [1, 0, 1, 1]


def test_survivor_events_by_hand() -> None:
    """Given that the survivor is among the c slots kept, whether it is among the first k, k = 1..c - 1."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log().repeat(4, 1)
    slot, kept = torch.tensor([2, 1, 1, 0]), torch.tensor([4, 2, 1, 4])  # the last two say nothing
    predicted, happened = survivor_events(logits, slot, kept)
    torch.testing.assert_close(predicted, torch.tensor([0.4, 0.7, 0.9, 0.4 / 0.7]))
    assert happened.tolist() == [0, 1, 1, 1]


def test_survivor_events_of_the_truth_are_calibrated_though_censored() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30_000, 4, generator=generator)
    kept = torch.randint(1, 5, (30_000,), generator=generator)
    shares = logits.exp() * (torch.arange(1, 5) <= kept[:, None])
    slot = torch.multinomial(shares, 1, generator=generator)[:, 0] + 1
    assert reliability(*survivor_events(logits, slot, kept)).error < 0.01  # 45,000 events in 15 bins
    assert reliability(*survivor_events(3 * logits, slot, kept)).error > 0.05


def test_temperature_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(50_000, dtype=torch.float64, generator=generator)
    labels = (torch.rand(50_000, generator=generator) < logits.sigmoid()).double()
    score = torch.nn.functional.binary_cross_entropy_with_logits
    assert fit_temperature(lambda t: score(3 * logits / t, labels)) == pytest.approx(3.0, rel=0.05)
    assert fit_temperature(lambda t: t * float("nan")) == 1.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TraceDataModule:
    return TraceDataModule(write_traces(tmp_path_factory.mktemp("traces"), prompts=40))


def overconfident(data: TraceDataModule) -> ControllerModule:
    """At the constants, with survivor and accept logits five times too large and regrets off by known factors."""
    module = ControllerModule(**data.sizes)
    module.start_from(data.rows["train"].columns)
    with torch.no_grad():
        for bias in (module.net.accept_bias, module.net.survivor_head.bias, module.net.late_survivor_head.bias):
            bias.mul_(5)
        module.net.regret_head.bias.add_(2.0)
        module.net.late_regret_head.bias.sub_(1.0)
        torch.nn.init.normal_(module.net.late_regret_head.weight, std=0.1)
    return module


def mean_regrets(net: WidthNet, rows: Batch) -> tuple[list[float], float]:
    """What both heads say on average of the steps that were seen, and what these were."""
    steps, seen = regret_steps(rows["slot_deficits"], rows["survivor_slot"], rows["kept_width"])
    with torch.no_grad():
        logits = net(*inputs(rows))
    return [float(head.exp()[seen].mean()) for head in (logits.regret, logits.late_regret)], float(steps[seen].mean())


@pytest.mark.parametrize("soft", [True, False])
def test_calibration_improves_held_out_likelihood(data: TraceDataModule, soft: bool) -> None:
    module, rows = overconfident(data), data.rows["val"].columns
    before = module.evaluate(rows)
    said, seen = mean_regrets(module.net, rows)
    assert said[0] > 3 * seen and said[1] < 0.7 * seen
    fitted = calibrate(module.net, rows, soft)
    after = module.evaluate(rows)
    assert fitted == {name: pytest.approx(float(module.net.get_buffer(name))) for name in fitted}
    for name in ("accept", "survivor", "late_survivor"):
        assert fitted[f"{name}_temperature"] > 1.5
    assert fitted["regret_shift"] == pytest.approx(-2.0, abs=0.3)  # the validation rows' mean is not the training rows'
    assert fitted["late_regret_shift"] > 0.5
    said, seen = mean_regrets(module.net, rows)
    assert said == pytest.approx([seen, seen], rel=1e-4)
    for name, least in (("count", 0.05), ("survivor", 0.01), ("late_survivor", 0.01), ("regret", 0.1)):
        assert after[f"val/{name}_nll"] < before[f"val/{name}_nll"] - least, name
    assert after["val/late_regret_nll"] < before["val/late_regret_nll"]
    assert after["val/count_ece"] < before["val/count_ece"]
    assert calibrate(module.net, rows, soft) == pytest.approx(fitted)  # not compounded


def test_calibration_without_anything_to_learn_from_leaves_the_network_as_it_is(data: TraceDataModule) -> None:
    module, rows = overconfident(data), data.rows["val"].columns
    nothing = rows | {name: torch.zeros_like(rows[name]) for name in ("survivor_slot", "draft_width", "slot_deficits")}
    fitted = calibrate(module.net, nothing)
    assert {name: 0.0 if name.endswith("shift") else 1.0 for name in fitted} == fitted
    sure = rows | {"slot_deficits": torch.zeros_like(rows["slot_deficits"])}  # no slot ever added anything
    assert np.isfinite(list(calibrate(module.net, sure).values())).all()


# Curves of every head.


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[WidthNet, TraceDataModule]:
    data = TraceDataModule(write_traces(tmp_path_factory.mktemp("traces"), prompts=60))
    sizes: dict[str, Any] = data.sizes
    module = ControllerModule(**sizes).eval()
    module.start_from(data.rows["train"].columns)
    return module.net, data


def test_curves_of_every_head(fitted: tuple[WidthNet, TraceDataModule]) -> None:
    net, data = fitted
    rows = data.rows["val"].columns
    curves = reliability_curves(net, rows)
    assert set(curves) == {
        "count", "count_w1_2", "count_w3_5", "count_w6_up", "count_layer1", "survivor", "late_survivor"
    }  # fmt: skip
    width = rows["draft_width"]
    assert curves["count"].bins.rows.sum() == width.sum()
    for name, widths in (("1_2", (1, 2)), ("3_5", (3, 4, 5)), ("6_up", (6,))):
        events = sum(w * int((width >= w).sum()) for w in widths)  # of all rows with as many drafts
        assert curves[f"count_w{name}"].bins.rows.sum() == events
    assert curves["count"].bins.error < 0.1  # the constants are calibrated on average


def test_a_curve_shows_a_head_that_is_too_sure(fitted: tuple[WidthNet, TraceDataModule]) -> None:
    net, data = fitted
    rows = data.rows["val"].columns
    right = reliability_curves(net, rows)
    net.accept_temperature.fill_(0.1)
    wrong = reliability_curves(net, rows)
    net.accept_temperature.fill_(1.0)
    assert wrong["count"].bins.error > right["count"].bins.error + 0.1
    assert wrong["count"].score > right["count"].score
    assert wrong["survivor"].score == right["survivor"].score
