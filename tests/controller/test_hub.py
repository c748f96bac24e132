"""Controllers on a stand-in of the hub: what goes up loads again, its card says what it is, refusals are sentences."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from controller import LearnedWidth, WidthNet, publish
from controller.checkpoint import load_controller, save_controller
from controller.hub import card
from decoding import UserError
from tests.controller.hub_server import Hub, serving
from tests.controller.synthetic import ABOUT, CONFIG, random_net, random_policy
from tests.small_pair import small_pair

TOKEN = "hf_" + "Q" * 34
ABOUT_ALL: dict[str, Any] = {
    "features": ABOUT,
    "pair": small_pair().describe(),
    "decoding": asdict(CONFIG),
    "traces": [{"task": {"name": "stdlib", "split": "a|b"}, "rows": 123, "prompts": 8, "seed": 0, "policy": None}],
    "metrics": {"val/loss": 0.25, "test/loss": 0.5},
    "date": "2026-11-26T00:00:00+00:00",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """The hub that this process talks to."""
    with serving() as (address, served):
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_controller(random_net(), tmp_path / "controller", ABOUT_ALL)


def test_what_is_published_loads_again(hub: type[Hub], saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    publish.main([str(saved), "someone/widths"])
    assert "controller published: http://127.0.0.1" in capsys.readouterr().out
    policy = LearnedWidth.load("someone/widths", small_pair())
    assert policy.net.fingerprint == random_net().fingerprint
    assert policy.provenance == load_controller(saved)[1]
    (files,) = hub.repos["someone/widths"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert json.loads(files["config.json"])["format"] == "dsbd-controller"
    assert all(TOKEN.encode() not in content for content in files.values())
    assert any(TOKEN in headers.get("authorization", "") for _, _, headers in hub.requests)


def test_a_policy_is_pushed_and_pushed_again(hub: type[Hub]) -> None:
    first = random_policy(1)
    assert "/someone/widths/commit/" in first.push_to_hub("someone/widths", private=True)
    assert LearnedWidth.load("someone/widths").net.fingerprint == first.net.fingerprint
    random_policy(2).push_to_hub("someone/widths")
    assert len(hub.repos["someone/widths"]) == 2
    assert LearnedWidth.load("someone/widths").net.fingerprint == random_net(2).fingerprint


def test_nothing_uploads_less() -> None:
    """A network alone, which cannot be loaded as a policy, has no way to the hub."""
    assert not hasattr(WidthNet, "push_to_hub") and not hasattr(WidthNet, "save_pretrained")


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_refusal_is_a_sentence(hub: type[Hub], saved: Path, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuses = status
    with pytest.raises(SystemExit) as end:
        publish.main([str(saved), "someone/widths"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: The controller was not uploaded to someone/widths (")
    assert error.count("\n") == 1 and "hf auth login" in error and TOKEN not in error and not hub.repos.get("x")


def test_without_a_network_it_is_a_sentence(hub: type[Hub], saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as (address, _):
        pass
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)  # nobody listens there any more
    with pytest.raises(UserError, match=r"was not uploaded to someone/widths .* can be reached"):
        random_policy().push_to_hub("someone/widths")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"was not uploaded to someone/widths .*HF_HUB_OFFLINE"):
        random_policy().push_to_hub("someone/widths")


@pytest.mark.parametrize("name", ["widths", "a/b/c", "../x/y", "", "a b/c"])
def test_a_name_that_cannot_be_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="give owner/name"):
        random_policy().push_to_hub(name)


def test_what_is_no_controller_is_not_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for directory in (tmp_path, tmp_path / "absent"):
        with pytest.raises(SystemExit):
            publish.main([str(directory), "someone/widths"])
        assert capsys.readouterr().err.startswith("error: ")


def test_the_card_says_what_it_is() -> None:
    text = card(random_net(), ABOUT_ALL, "someone/widths")
    data = ModelCard(text).data
    assert data.library_name == "dsbd" and data.license == "apache-2.0" and "speculative-decoding" in data.tags
    for expected in (
        "# Width controller for small",
        "LearnedWidth.load('someone/widths', pair=pair)",
        "target_width=3",
        f"| fingerprint | {small_pair().fingerprint} |",
        "| task.split | a\\|b |",
        "| rows | 123 |",
        "| val/loss | 0.2500 |",
    ):
        assert expected in text
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 4
    compile(code, "card", "exec")


def test_a_card_with_an_evaluation() -> None:
    ends = {"value": 100.0, "low": 90.0, "high": 110.0}
    row = {"name": "learned M=4", "method": "learned", "settings": {}, "config": {}, "prompts": []}
    results = {
        "schema_version": 2,
        "rows": [row | {"summary": {"tokens_per_second": ends, "log_prob": ends | {"value": -0.5}}}],
        "provenance": {
            "task": {"name": "stdlib", "prompts": 40},
            "machine": {"gpu": None, "cpu": "a CPU", "cores": 2, "system": "Linux"},
            "date": "2026-11-26",
        },
    }
    text = card(random_net(), ABOUT_ALL, None, results)
    assert "stdlib, 40 prompts, a CPU, 2 cores, Linux, 2026-11-26." in text
    assert "| learned M=4 | 100 [90, 110] | -0.500" in text
    with pytest.raises(UserError, match="schema version"):
        card(random_net(), ABOUT_ALL, None, {})
