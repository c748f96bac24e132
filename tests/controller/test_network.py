"""WidthNet: chances along paths, rules that are monotone, and the same numbers on the host, compiled and plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from controller import host, plan
from controller.checkpoint import load_controller, save_controller
from controller.data import TraceDataModule
from controller.features import CANDIDATE, LAYER
from controller.host import HostNet
from controller.losses import WIDTHS, after_events, before_events, candidate_events
from controller.network import BEFORE, LEAST, SOFT, WidthNet, leftovers
from decoding import UserError
from decoding.support.compiled import COMPILED
from tests.controller.synthetic import ABOUT, random_net, write_traces


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TraceDataModule:
    return TraceDataModule(write_traces(tmp_path_factory.mktemp("traces")))


def test_no_child_is_likelier_than_its_parent(data: TraceDataModule) -> None:
    rows = data.rows["train"].columns
    chances = random_net()(rows)
    below = rows["valid"][:, 1:]
    parents = chances[:, :-1].gather(2, rows["parents"][:, 1:].clamp(min=0))
    assert (chances[:, 1:][below] <= parents[below] + 1e-6).all() and (chances[rows["valid"]] <= 0).all()


def test_chances_do_not_depend_on_padding_or_neighbours(data: TraceDataModule) -> None:
    rows, net = data.rows["train"].columns, random_net()
    together = net(rows)
    for i in (0, 3):
        most = int(rows["valid"][i].sum(-1).max())
        alone = {name: column[i : i + 1] for name, column in rows.items()}
        for name in ("candidates", "parents", "valid"):
            alone[name] = alone[name][:, :, :most]
        inside = alone["valid"]
        assert torch.allclose(net(alone)[inside], together[i : i + 1, :, :most][inside], atol=1e-5)


def test_rules_fall_in_j_and_rise_in_the_number_of_drafts(data: TraceDataModule) -> None:
    net, rows = random_net(1), data.rows["train"].columns
    log_chances = net(rows)
    layers = rows["there"] & rows["reached"]
    chances = (log_chances.exp() * rows["valid"])[layers]
    ranks = chances.argsort(dim=-1, descending=True).argsort(-1)
    before = None
    for width in WIDTHS:
        odds = net.passes(rows["features"][layers], *leftovers(chances, ranks < width, net.target_width))
        assert (odds.diff(dim=-1) <= 0).all()
        assert before is None or (odds >= before - 1e-5).all()
        before = odds
    context = torch.randn(5, len(BEFORE))
    expected = torch.stack([net.expects(context, torch.full((5,), width)) for width in WIDTHS])
    assert (expected.diff(dim=0) >= 0).all() and (expected.diff(dim=-1) <= 0).all()


def test_leftovers_of_a_layer_by_hand() -> None:
    chances, drafted = torch.tensor([[0.9, 0.5, 0.2, 0.0]]), torch.tensor([[True, False, True, False]])
    left_out, missing = leftovers(chances, drafted, 2)
    assert float(left_out) == pytest.approx(-np.log(0.5)) and float(missing) == pytest.approx(2 - 1.1)
    assert host.leftovers(chances[0].numpy(), drafted[0].numpy(), 2) == pytest.approx((float(left_out), float(missing)))
    assert torch.isfinite(leftovers(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), 2)[0])


def of_picks(ours: HostNet, candidates: Any, features: Any, log_parent: Any) -> tuple[np.ndarray, np.ndarray]:
    """What `HostNet.layer` drafts where all candidates may be drafted, and log π of these."""
    root, widths = (0.0, 0.0, 0.0, 0.0), (1, ours.target_width, len(candidates))
    decided = ours.layer(candidates, features, log_parent, root, widths, 1.0, 1, 0.0, np.arange(64.0))
    return decided.picks, decided.log_chances


@pytest.mark.parametrize("count", [1, 2, 3, 11, 64])
def test_the_host_says_what_torch_says(count: int) -> None:
    torch.manual_seed(count)
    net = random_net(count)
    net.start_from(torch.randn(50, len(net.mean)) * 2, torch.randn(50, len(LAYER)))
    net.temperature.fill_(1.3)
    candidates = torch.randn(count, len(CANDIDATE)) * 3
    features, log_parent = torch.randn(len(LAYER)), -torch.rand(count)
    ours = HostNet(net)
    odds = net.layer(candidates[None], features[None], log_parent[None], torch.ones(1, count, dtype=torch.bool))
    expected = log_parent + torch.nn.functional.logsigmoid(odds[0])
    picks, found = of_picks(ours, candidates.numpy(), features.numpy(), log_parent.numpy())
    assert len(picks) == max(int((expected.exp() >= plan.LEAST_CHANCE).sum()), 1)
    assert found == pytest.approx(expected.numpy()[picks], abs=2e-5) and found.dtype == np.float32
    context = torch.randn(len(LAYER))
    odds = net.passes(context[None], torch.tensor([0.7]), torch.tensor([0.4]))[0].sigmoid()
    for j, chance in enumerate(odds.tolist(), 1):
        assert ours.passes(context.numpy(), 0.7, 0.4, j) == pytest.approx(chance, abs=1e-5)
    context = torch.randn(len(BEFORE))
    odds = net.expects(context[None], torch.tensor([9]))[0].sigmoid()
    for j, chance in enumerate(odds.tolist(), 1):
        assert ours.expects(tuple(context.tolist()), 9, j) == pytest.approx(chance, abs=1e-5)


def situation(seed: int) -> dict[str, Any]:
    """What `HostNet.layer` is asked with."""
    draw = np.random.default_rng(seed)
    candidates = draw.standard_normal((int(draw.integers(1, 40)), len(CANDIDATE))).astype(np.float32)
    candidates[:, CANDIDATE.index("scored")] = draw.random(len(candidates)) < draw.choice([0.0, 0.3, 1.0])
    return {
        "candidates": candidates,
        "features": draw.standard_normal(len(LAYER)).astype(np.float32),
        "log_parent": -draw.random(len(candidates)).astype(np.float32),
        "root": tuple(draw.random(4)),
        "widths": (int(draw.integers(1, 4)), 2, int(draw.integers(2, 20))),
        "reach": draw.random(),
        "nodes": int(draw.integers(1, 5)),
        "rate": draw.choice([0.01, 0.5, 100.0]),
        "costs": np.arange(64) * 1.0,
    }


@pytest.mark.parametrize("seed", range(12))
def test_a_layer_is_decided_as_written_out(seed: int) -> None:
    """By whole arrays, as a reader would write it down."""
    net, given = random_net(seed), situation(seed)
    ours, scored = HostNet(net), given["candidates"][:, CANDIDATE.index("scored")] > 0
    layer, width, most = given["widths"]
    of_layer = [torch.from_numpy(given[name])[None] for name in ("candidates", "features", "log_parent")]
    odds = net.layer(*of_layer, torch.ones(1, len(scored), dtype=torch.bool))[0]
    found = given["log_parent"] + torch.nn.functional.logsigmoid(odds).numpy()
    chances = np.exp(found)
    order = np.argsort(-chances, kind="stable")[:most]
    order = order[chances[order] >= plan.LEAST_CHANCE] if (chances[order] >= plan.LEAST_CHANCE).any() else order[:1]
    fresh = order[~scored[order]]
    values = chances[fresh] * (plan.KEPT + (1 - plan.KEPT) * given["reach"])
    gains = np.cumsum(values - given["rate"] * 1.0)  # every node costs 1
    sent = int(np.argmax(gains)) + 1 if len(gains) and gains.max() > 0 else 0
    expected = [place for place in order if scored[place] or place in fresh[:sent]] or list(order[:1])
    decided = ours.layer(**given)
    assert decided.picks.tolist() == expected
    assert decided.log_chances == pytest.approx(found[expected], abs=2e-5)
    assert decided.fresh == (~scored[expected]).sum()
    worth = np.where(scored, plan.SCORED, chances * (plan.KEPT + (1 - plan.KEPT) * given["reach"]))
    assert decided.values == pytest.approx(worth[expected], abs=1e-6)
    drafted = scored.copy()
    drafted[expected] = True
    left_out, missing = leftovers(*(torch.from_numpy(value)[None] for value in (chances, drafted)), width)
    unknown = chances[expected][~scored[expected]].sum() / chances[expected].sum()
    left = np.log(float(left_out) + SOFT), float(missing), unknown
    assert decided.left == pytest.approx(left, abs=1e-4)
    odds = net.passes(torch.from_numpy(given["features"])[None], left_out, missing)[0, width - 1]
    assert decided.passing == pytest.approx(given["reach"] * float(odds.sigmoid()), abs=1e-5)
    context = torch.tensor([[0.0, layer + 1, *given["root"], *left]], dtype=torch.float32)
    below = net.expects(context, torch.tensor([len(expected)]))[0, width - 1].sigmoid()
    assert decided.below == pytest.approx(float(below), abs=1e-4)


@pytest.mark.skipif(not COMPILED, reason="numba is not installed, or disabled")
def test_compiled_and_plain_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = HostNet(random_net(4))
    compiled = [ours.layer(**situation(seed)) for seed in range(6)]
    for name in ("decide", "log_chances", "leftovers", "passes", "expects", "chance_of", "best_count", "worth"):
        monkeypatch.setattr(host, name, getattr(host, name).py_func)
    monkeypatch.setattr(host, "_relu", host._multiplied)
    for seed, expected in enumerate(compiled):
        for one, other in zip(ours.layer(**situation(seed)), expected, strict=True):
            assert one == pytest.approx(other, abs=2e-5)


def test_a_layer_passes_in_the_events_when_its_selection_was_drafted(data: TraceDataModule) -> None:
    """At a width that holds all candidates, what happened is whether all of the first j are candidates."""
    net, rows = random_net(), data.rows["train"].columns
    log_chances = net(rows)
    found = after_events(net, log_chances, rows)
    layers = rows["there"] & rows["reached"]
    places, sizes = rows["places"][layers], rows["size"][layers]
    expected = []
    for row, size in zip(places.tolist(), sizes.tolist(), strict=True):
        expected += [float(set(range(1, j + 1)) <= set(row)) for j in range(1, size + 1)]
    assert found.happened[-len(expected) :].tolist() == expected  # 48 drafts: more than there are candidates
    before = before_events(net, log_chances, rows)
    assert len(before.chances) and 0 < float(before.happened.mean()) < 1
    selected = candidate_events(log_chances, rows)
    assert int(selected.happened.sum()) == int((rows["places"] > 0).sum())


def test_small_and_saved_as_it_is(tmp_path: Path) -> None:
    net = random_net(2)
    assert net.parameter_count() < 5000
    saved = save_controller(net, tmp_path / "c", {"features": ABOUT, "pair": {}, "decoding": {}})
    loaded, about = load_controller(saved)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), loaded.state_dict().values(), strict=True))
    assert about["features"] == ABOUT and loaded.target_width == net.target_width and LEAST > 0
    (saved / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="is damaged"):
        load_controller(saved)
    assert isinstance(loaded, WidthNet)


def test_the_host_takes_steps_of_any_size() -> None:
    """Fitted to few rows, a place may be out of reach."""
    net = random_net(3)
    net.before.steps[1] = 1e4
    found = [HostNet(net).expects((0.0,) * len(BEFORE), 4, j) for j in range(1, net.target_width + 1)]
    expected = net.expects(torch.zeros(1, len(BEFORE)), torch.tensor([4]))[0].sigmoid()
    assert found == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_of_a_controller_is_noticed(tmp_path: Path, name: str) -> None:
    """In the last weight, and in a digit of what was fitted: both would load and decide otherwise."""
    about = {"features": ABOUT, "pair": {}, "decoding": {}, "metrics": {"val/loss": 0.5}}
    file = save_controller(random_net(), tmp_path / "controller", about) / name
    load_controller(file.parent)
    content = bytearray(file.read_bytes())
    content[content.index(b'"val/loss": 0.5') + 14 if name == "config.json" else len(content) - 4] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="was changed since it was written, or is damaged"):
        load_controller(file.parent)
