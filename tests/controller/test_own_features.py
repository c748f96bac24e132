"""Features of anybody's own: logged, trained on, named in the controller, and decoded with."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import open_dict

import train
from controller import LearnedWidth
from controller.features import ContextFeatures, FloatVector, describe_features, features_of
from decoding import DSBDDecoder, UserError
from decoding.entry import CONF_DIR
from decoding.widths import DraftContext, TargetContext
from tests.small_pair import small_pair

OWN = f"{__name__}.Features"


class Features(ContextFeatures):
    """Two more numbers: the share of the beams that are left, and the same of P."""

    version = "own 1"

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.names = [*self.names, "beams_share"]
        self.target_names = [*self.target_names, "support_share"]

    def __call__(self, context: DraftContext) -> FloatVector:
        share = len(context.weights) / context.root.config.target_width
        return np.append(super().__call__(context), np.float32(self.scale * share))

    def of_target(self, context: TargetContext) -> FloatVector:
        return np.append(super().of_target(context), np.float32(1 / len(context.target)))


def test_collect_train_load_and_decode(tmp_path: Path) -> None:
    settings = [f"paths.output_dir={tmp_path}", f"collect.traces_dir={tmp_path / 'traces'}", "logger=none"]
    settings += [
        "collect.train_prompts=3",
        "collect.val_prompts=2",
        "trainer.max_epochs=1",
        "callbacks.progress_bar=null",
    ]
    settings += ["+trainer.enable_progress_bar=false", "decoding.max_new_tokens=8", "decoding.draft_depth=2"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose("train", settings)
    with open_dict(cfg):
        cfg.pair = {"_target_": "tests.small_pair.small_pair"}
        cfg.data = {"_target_": "tests.test_configs.Poems"}
        cfg.features = {"_target_": OWN, "scale": 2.0}
    train.main(cfg)
    saved = tmp_path / "controller"
    about = json.loads((saved / "config.json").read_text())["provenance"]["features"]
    assert (about["class"], about["arguments"], about["version"]) == (OWN, {"scale": 2.0}, "own 1")
    assert about["names"][-1] == "beams_share" and about["target_names"][-1] == "support_share"
    policy = LearnedWidth.load(saved)
    assert isinstance(policy.features, Features) and policy.features.scale == 2.0
    assert policy.net.sizes["features"] == len(ContextFeatures().names) + 1
    config = instantiate(cfg.decoding)
    (result,) = DSBDDecoder(small_pair(), config, policy).generate([[5, 6, 7]], torch.Generator().manual_seed(0))
    assert len(result.sequences[0]) == 8 or result.finished[0]
    with pytest.raises(UserError, match=r"unknown beams_share, support_share"):
        LearnedWidth.load(saved, features=ContextFeatures())


def test_a_controller_names_a_class_and_brings_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "downloaded_features.py").write_text(
        "from controller.features import ContextFeatures\nclass Features(ContextFeatures):\n    version = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    about = {"class": "downloaded_features.Features", "arguments": {}}
    with pytest.raises(UserError, match=r"no module is imported because a controller from the hub names it.*features="):
        features_of(about)
    assert "downloaded_features" not in sys.modules
    assert features_of(about, may_import=True).version == 3
    assert features_of(about).version == 3, "it is imported now"


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
