"""WidthNet: size, first prediction, saving and loading, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from controller.checkpoint import CONFIG, WEIGHTS, load_controller, save_controller
from controller.features import NAMES, TARGET_NAMES
from controller.host import EarlyWeights, HostNet, LateWeights, early, late
from controller.network import CALIBRATED, WidthNet
from decoding.errors import UserError

PROVENANCE = {"features": {"version": 2, "names": ["a", "b", "c"]}, "pair": {"name": "x"}, "decoding": {}}
SIZES = {
    "features": 3,
    "draft_width": 6,
    "target_width": 4,
    "draft_hidden": 5,
    "target_hidden": 7,
    "target_features": 8,
}


def net(**changes: int) -> WidthNet:
    torch.manual_seed(0)
    made = WidthNet(**SIZES | changes)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.mark.parametrize(("draft_hidden", "target_hidden"), [(0, 0), (128, 256), (2048, 8192)])
def test_small_whatever_the_pair(draft_hidden: int, target_hidden: int) -> None:
    made = WidthNet(len(NAMES), 32, 16, draft_hidden, target_hidden, len(TARGET_NAMES))
    assert made.parameter_count() <= 300_000


def odd_start(made: WidthNet) -> None:
    """Constants and calibration that no two outputs share."""
    features, late = made.sizes["features"], made.sizes["target_features"]
    width, ranks = made.sizes["draft_width"], made.sizes["target_width"]
    made.start_from(
        (torch.randn(features), torch.rand(features) + 0.5),
        (torch.randn(late), torch.rand(late) + 0.5),
        torch.rand(width, width),
        torch.rand(ranks),
        torch.rand(ranks - 1),
    )
    for name, value in zip(CALIBRATED, (1.7, 0.6, 2.3, -0.4, 0.9), strict=True):
        made.get_buffer(name).fill_(value)


def rows_of(made: WidthNet, count: int = 5) -> list[torch.Tensor]:
    names = ("features", "draft_hidden", "target_hidden", "target_features")
    return [scale * torch.randn(count, made.sizes[name]) for scale, name in zip((4, 10, 1, 4), names, strict=True)]


def test_starts_at_the_constants() -> None:
    made = WidthNet(3, 4, 3, target_features=5)
    rate, shares, regret = torch.rand(4, 4) * 0.8 + 0.1, torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.5, 0.02])
    standard = [(torch.randn(size), torch.rand(size)) for size in (3, 5)]
    made.start_from(*standard, rate, shares, regret)
    for known in (torch.randn(5, 5), None):  # with P and without
        logits = made.eval()(torch.randn(5, 3), target_features=known)
        torch.testing.assert_close(logits.accept.sigmoid(), rate.expand(5, -1, -1))
        for survivor in (logits.survivor, logits.late_survivor):
            torch.testing.assert_close(survivor.softmax(-1), shares.expand(5, -1))
        for log_steps in (logits.regret, logits.late_regret):
            torch.testing.assert_close(log_steps.exp(), regret.expand(5, -1))


def test_early_heads_do_not_see_p_and_late_ones_see_nothing_else() -> None:
    made = net()
    rows = rows_of(made)
    before, after = made(*rows), made(*rows[:3], rows_of(made)[3])
    for name in ("accept", "survivor", "regret"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    after = made(*rows_of(made)[:3], rows[3])
    for name in ("late_survivor", "late_regret"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    assert not torch.equal(before.accept, after.accept)
    unknown, mean = made(*rows[:3]), made(*rows[:3], made.late_mean.expand(5, -1))
    assert torch.equal(unknown.late_regret, mean.late_regret)


def host_says(host: HostNet, row: list[torch.Tensor]) -> list[np.ndarray]:
    """Accept logits, and both qualities."""
    *before, after = (vector.numpy() for vector in row)
    return [
        *early(*before, EarlyWeights(*host.early)),
        late(after, LateWeights(*host.late)),
    ]


HIDDEN = [{}, {"draft_hidden": 0, "target_hidden": 0}, {"draft_hidden": 0}]


@pytest.mark.parametrize("sizes", [*HIDDEN, {"target_width": 2}, {"draft_width": 1}], ids=str)
def test_one_row_on_the_host_is_the_same_network(sizes: dict[str, int]) -> None:
    made = net(**sizes)
    odd_start(made)
    rows = rows_of(made)
    rows[2][0] = 0  # unknown hidden state
    logits, host = made(*rows), HostNet(made)
    for i in range(5):
        ours = host_says(host, [row[i] for row in rows])
        late = torch.cat([logits.late_survivor, logits.late_regret], -1)
        theirs = [logits.accept, torch.cat([logits.survivor, logits.regret], -1), late]
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.from_numpy(our), their[i].detach(), atol=1e-4, rtol=1e-4)


def test_the_host_keeps_a_copy() -> None:
    made = net()
    host, rows = HostNet(made), rows_of(made)

    def answers(row: int) -> list[np.ndarray]:
        return host_says(host, [*(column[row] for column in rows[:3]), rows[3][0]])

    before, other = answers(0), answers(1)
    assert not any(np.allclose(a, b) for a, b in zip(before[:2], other[:2], strict=True))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    for ours, theirs in zip(before, answers(0), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_save_and_load_are_bit_equal(tmp_path: Path) -> None:
    made = net()
    odd_start(made)
    save_controller(made, tmp_path / "controller", PROVENANCE)
    loaded, provenance = load_controller(tmp_path / "controller")
    assert provenance["pair"] == {"name": "x"} and set(provenance["calibration"]) == set(CALIBRATED)
    assert provenance["calibration"]["late_regret_shift"] == pytest.approx(0.9)
    for (name, ours), theirs in zip(made.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    rows = rows_of(made)
    for ours, theirs in zip(made(*rows), loaded(*rows), strict=True):
        assert torch.equal(ours, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["controller"]  # nothing half-written beside it
    files = {path.name for path in (tmp_path / "controller").iterdir()}
    assert files == {CONFIG, WEIGHTS, "README.md"}


def test_saving_again_replaces_and_a_failure_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_controller(net(), tmp_path / "controller", PROVENANCE)
    save_controller(net(target_width=3), tmp_path / "controller", PROVENANCE)
    assert load_controller(tmp_path / "controller")[0].sizes["target_width"] == 3

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(WidthNet, "_save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_controller(net(), tmp_path / "controller", PROVENANCE)
    assert load_controller(tmp_path / "controller")[0].sizes["target_width"] == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_hub_mixin_reads_the_same_directory(tmp_path: Path) -> None:
    made = net()
    save_controller(made, tmp_path / "controller", PROVENANCE)
    loaded = WidthNet.from_pretrained(str(tmp_path / "controller"))
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_what_is_not_a_controller_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No controller at"):
        load_controller(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load_controller(tmp_path)
    path = save_controller(net(), tmp_path / "controller", PROVENANCE)
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_controller(path)
    (path / CONFIG).write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="does not describe a width controller"):
        load_controller(path)
    (path / CONFIG).write_text(json.dumps(config | {"hidden": 64}))
    with pytest.raises(UserError, match="damaged or of another network"):
        load_controller(path)
    (path / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != "projected"}))
    with pytest.raises(UserError, match=r"another version of this code: config\.json says nothing of projected"):
        load_controller(path)
    (path / CONFIG).write_text(json.dumps(config))
    weights = load_file(path / WEIGHTS)
    save_file({**weights, "pass_in.bias": torch.zeros(2)}, path / WEIGHTS)
    with pytest.raises(UserError, match=r"another version of this code: of pass_in\.bias only one of the two"):
        load_controller(path)
    save_file(weights, path / WEIGHTS)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_controller(path)


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_controller(net(), tmp_path / "controller", PROVENANCE)
    monkeypatch.setattr("controller.checkpoint.snapshot_download", lambda *_, **__: str(path))
    assert load_controller("someone/a-controller")[0].sizes["draft_width"] == 6

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("controller.checkpoint.snapshot_download", offline)
    with pytest.raises(UserError, match="no network"):
        load_controller("someone/a-controller")
