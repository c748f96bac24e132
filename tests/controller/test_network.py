"""WidthNet: size, first prediction, saving and loading, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from controller.network import CONFIG, WEIGHTS, HostNet, WidthNet, load_controller, save_controller
from decoding.errors import UserError

PROVENANCE = {"features": {"version": 1, "names": ["a", "b", "c"]}, "pair": {"name": "x"}, "decoding": {}}


def net(**changes: int) -> WidthNet:
    torch.manual_seed(0)
    made = WidthNet(
        **{"features": 3, "draft_width": 6, "target_width": 4, "draft_hidden": 5, "target_hidden": 7} | changes
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


@pytest.mark.parametrize(("draft_hidden", "target_hidden"), [(0, 0), (128, 256), (2048, 8192)])
def test_small_whatever_the_pair(draft_hidden: int, target_hidden: int) -> None:
    made = WidthNet(24, 32, 16, draft_hidden, target_hidden)
    assert made.parameter_count() <= 300_000


def test_starts_at_the_constants() -> None:
    made = WidthNet(3, 4, 3)
    rate, ranks = torch.rand(4, 4) * 0.8 + 0.1, torch.tensor([0.6, 0.3, 0.1])
    made.start_from(torch.zeros(3), torch.ones(3), rate, ranks)
    logits = made.eval()(torch.randn(5, 3))
    torch.testing.assert_close(logits.accept.sigmoid(), rate.expand(5, -1, -1))
    torch.testing.assert_close(logits.survivor.softmax(-1), ranks.expand(5, -1))


@pytest.mark.parametrize("sizes", [{}, {"draft_hidden": 0, "target_hidden": 0}, {"draft_hidden": 0}])
def test_one_row_on_the_host_is_the_same_network(sizes: dict[str, int]) -> None:
    made = net(**sizes)
    made.start_from(torch.randn(3), torch.rand(3) + 0.5, torch.rand(6, 6), torch.rand(4))
    made.accept_temperature.fill_(1.7)
    made.survivor_temperature.fill_(0.6)
    rows = [torch.randn(5, 3) * 4, torch.randn(5, 5) * 10, torch.randn(5, 7)]
    rows[2][0] = 0  # unknown hidden state
    logits, host = made(*rows), HostNet(made)
    for i in range(5):
        accept, survivor = host(*(row[i].numpy() for row in rows))
        torch.testing.assert_close(torch.from_numpy(accept), logits.accept[i].detach(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.from_numpy(survivor), logits.survivor[i].detach(), atol=1e-4, rtol=1e-4)


def test_save_and_load_are_bit_equal(tmp_path: Path) -> None:
    made = net()
    made.accept_temperature.fill_(1.3)
    save_controller(made, tmp_path / "controller", PROVENANCE)
    loaded, provenance = load_controller(tmp_path / "controller")
    assert provenance["pair"] == {"name": "x"} and provenance["temperatures"]["accept"] == pytest.approx(1.3)
    for (name, ours), theirs in zip(made.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    rows = torch.randn(4, 3), torch.randn(4, 5), torch.randn(4, 7)
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
    (path / CONFIG).write_text(json.dumps(config))
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:100])
    with pytest.raises(UserError, match="damaged"):
        load_controller(path)


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_controller(net(), tmp_path / "controller", PROVENANCE)
    monkeypatch.setattr("controller.network.snapshot_download", lambda *_, **__: str(path))
    assert load_controller("someone/a-controller")[0].sizes["draft_width"] == 6

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("controller.network.snapshot_download", offline)
    with pytest.raises(UserError, match="no network"):
        load_controller("someone/a-controller")
