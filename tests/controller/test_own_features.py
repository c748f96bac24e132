"""Features of anybody's own: logged, trained on, named in the controller, and decoded with."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict

import train
from controller import LearnedWidth, WidthNet
from controller.features import CANDIDATE, LAYER, ContextFeatures, check_columns, describe_features, features_of
from controller.host import HostNet
from controller.plan import Plan
from decoding import DSBDDecoder, UserError, beam_sample
from decoding.policies.base import DraftContext
from decoding.support.arrays import FloatVector
from decoding.support.entry import CONF_DIR
from tests.controller.synthetic import CONFIG, prompts, random_policy, streams
from tests.controller.test_network import of_picks
from tests.small_pair import small_pair


class Features(ContextFeatures):
    """Two more numbers, before the others: the share of the beams that are left, and Q itself."""

    version = "own 1"
    names = ["beams_share", *LAYER]  # noqa: RUF012
    candidate_names = ["q", *CANDIDATE]  # noqa: RUF012

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def of_layer(self, context: DraftContext) -> FloatVector:
        share = self.scale * len(context.weights) / context.root.config.target_width
        return np.insert(super().of_layer(context), 0, share)

    def of_candidates(self, context: DraftContext) -> FloatVector:
        assert context.candidates is not None
        return np.insert(super().of_candidates(context), 0, context.candidates.probs, axis=1)


class Fewer:
    """The same protocol without the base: what is needed, in another order, and nothing else."""

    version = 1
    names = ("known_share", "last_layers", "last_passed", "root_entropy", "roots")
    candidate_names = ("scored", "log_key", "log_q")

    def of_layer(self, context: DraftContext) -> FloatVector:
        return ContextFeatures().of_layer(context)[[LAYER.index(name) for name in self.names]]

    def of_candidates(self, context: DraftContext) -> FloatVector:
        return ContextFeatures().of_candidates(context)[:, [CANDIDATE.index(name) for name in self.candidate_names]]


def train_with(features: dict[str, Any], directory: Path) -> Path:
    """A controller of the small pair by these features."""
    settings = [f"paths.output_dir={directory}", f"collect.traces_dir={directory / 'traces'}", "logger=none"]
    settings += ["collect.train_prompts=3", "collect.val_prompts=2", "trainer.max_epochs=1"]
    settings += ["callbacks.progress_bar=null", "+trainer.enable_progress_bar=false"]
    settings += ["decoding.max_new_tokens=8", "decoding.target_width=3", "decoding.draft_width=12"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", settings)
    with open_dict(cfg):
        cfg.pair = {"_target_": "tests.small_pair.small_pair"}
        cfg.data = {"_target_": "tests.test_configs.Poems"}
        cfg.features = features
    train.main(cfg)
    return directory / "controller"


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [(Features, {"scale": 2.0}), (Fewer, {})],
)
@pytest.mark.filterwarnings("ignore:The controller was trained with")
def test_collect_train_load_and_decode(
    kind: Any, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{__name__}.{kind.__name__}"
    saved = train_with({"_target_": name, **arguments}, tmp_path)
    config = json.loads((saved / "config.json").read_text())
    about = config["provenance"]["features"]
    assert (about["class"], about["arguments"], about["version"]) == (name, arguments, kind.version)
    assert config["names"] == about["names"] == list(kind.names)
    assert config["candidate_names"] == about["candidate_names"] == list(kind.candidate_names)
    policy = LearnedWidth.load(saved)
    assert type(policy.features) is kind and vars(policy.features) == arguments
    assert policy.net.sizes == (len(kind.candidate_names), len(kind.names))
    monkeypatch.setattr(Plan, "goes_deeper", lambda *_: True)  # little has been learned in one epoch
    found = DSBDDecoder(small_pair(), CONFIG, policy).generate(prompts(3), streams(3))
    alone = beam_sample(small_pair().target, prompts(3), CONFIG, streams(3))
    assert [result.sequences for result in found] == [result.sequences for result in alone]
    assert any(record.drafts for result in found for record in result.stats.records)
    with pytest.raises(UserError, match="other features than this code computes"):
        LearnedWidth.load(saved, features=ContextFeatures())


def test_columns_are_found_by_name() -> None:
    """A network whose further columns have no weight decides as one without them, on the host too."""
    torch.manual_seed(0)
    built_in, own = WidthNet(3), WidthNet(3, names=Features.names, candidate_names=Features.candidate_names)
    given = built_in.state_dict()
    further = {"mlp.0.0.weight": (0, len(Features.candidate_names) + 9), "after.linear.weight": (0,)}
    fitting = {name: value for name, value in given.items() if value.shape == own.state_dict()[name].shape}
    own.load_state_dict(fitting | {name: _with_zeros(given[name], at) for name, at in further.items()}, strict=False)
    assert own.of_layer == [place + 1 for place in built_in.of_layer]
    candidates, features, log_parent = np.random.default_rng(0).standard_normal((3, 7, 9)).astype(np.float32)
    candidates, features, log_parent = candidates[:, :5].copy(), features[0], log_parent[:, 0].copy()
    wide = np.insert(candidates, 0, 1.0, axis=1), np.insert(features, 0, 1.0)
    picks, expected = of_picks(HostNet(built_in.eval()), candidates, features, log_parent)
    host = HostNet(own.eval())
    own_picks, found = of_picks(host, *wide, log_parent)
    assert own_picks.tolist() == picks.tolist() and len(picks) > 3
    assert found == pytest.approx(expected, abs=1e-6)
    tensors = [torch.from_numpy(value)[None] for value in (*wide, log_parent)]
    odds = own.layer(*tensors, torch.ones(1, 7, dtype=torch.bool))[0]
    chances = log_parent + torch.nn.functional.logsigmoid(odds).detach().numpy()
    assert chances[picks] == pytest.approx(expected, abs=1e-5)
    with pytest.raises(UserError, match="trained with 6 and 10"):
        of_picks(host, candidates, features, log_parent)


def _with_zeros(weight: torch.Tensor, columns: tuple[int, ...]) -> torch.Tensor:
    """A weight with columns of zeros at these places of the result."""
    for place in columns:
        weight = torch.cat([weight[:, :place], torch.zeros(len(weight), 1), weight[:, place:]], 1)
    return weight


def test_a_column_that_others_are_derived_from_must_be_there() -> None:
    with pytest.raises(UserError, match="without log_key, which the network needs"):
        WidthNet(3, candidate_names=["log_q", "scored"])
    with pytest.raises(UserError, match="without known_share, which the network needs"):
        WidthNet(3, names=LAYER[:6])
    with pytest.raises(UserError, match="JSONDecoder are none, without version"):
        check_columns(json.JSONDecoder())  # type: ignore[arg-type]


def test_a_controller_names_a_class_and_brings_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "downloaded_features.py").write_text(
        "from controller.features import ContextFeatures\nclass Features(ContextFeatures):\n    version = 7\n"
    )
    monkeypatch.chdir(tmp_path)
    about = {"class": "downloaded_features.Features", "arguments": {}}
    with pytest.raises(UserError, match=r"no module is imported because a controller from the hub names it.*features="):
        features_of(about)
    assert "downloaded_features" not in sys.modules
    assert features_of(about, may_import=True).version == 7
    assert features_of(about).version == 7, "it is imported now"
    command = {"command": f"touch {tmp_path / 'ran'}"}
    with pytest.raises(UserError, match=r"os\.system are none"):
        features_of({"class": "os.system", "arguments": command})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere.Features", "cannot be made here"),
        (f"{__name__}.Missing", "cannot be made here"),
        ("json.JSONDecoder", "are none; derive them from controller.features.ContextFeatures"),
    ],
)
def test_features_that_are_not_there_are_refused_in_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        features_of({"class": name}, may_import=True)


def test_the_built_in_features_are_those_of_controllers_that_name_none() -> None:
    assert type(features_of({})) is ContextFeatures
    assert type(features_of(describe_features(ContextFeatures(), {}))) is ContextFeatures
    assert random_policy().net.sizes == (len(CANDIDATE), len(LAYER))
