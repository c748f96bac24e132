"""Ablations: what they share with experiment=wide, and the tables of a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import train
from decoding import UserError
from decoding.collect import Collection
from decoding.cost_table import LatencyTable, iteration_seconds
from decoding.entry import CONF_DIR
from studies import ablations
from tests.controller.synthetic import write_traces

PAGE = (CONF_DIR.parent / "docs" / "ablations.md").read_text()
ABLATIONS = {
    name: rest.split() for name, rest in re.findall(r"wide hydra\.run\.dir=outputs/ablation/(\w+)([^#\n]*)", PAGE)
}


def config(directory: Path, *overrides: str) -> DictConfig:
    quick = ["trainer.max_epochs=1", "callbacks.progress_bar=null", "logger=none", "+trainer.enable_progress_bar=false"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", [f"paths.output_dir={directory}", *quick, *overrides])


class Pair:
    fingerprint = "pair"


def described(cfg: DictConfig) -> dict[str, Any]:
    """What the traces of a config are found by."""
    return Collection.of(cfg, Pair()).describe()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["all_rows", "hidden", "rows_1k", "hard_labels", "smaller", "larger", "plain"])
def test_an_ablation_uses_the_traces_of_wide_but_hidden_states(tmp_path: Path, name: str) -> None:
    changes = ABLATIONS[name]
    wide, ablation = (config(tmp_path, "experiment=wide", *more) for more in ([], changes))
    assert described(wide) | {"hidden": name == "hidden"} == described(ablation)
    assert (wide == ablation) == (changes == []) == (name == "all_rows")


def test_tables_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "ensure_traces", lambda cfg: write_traces(tmp_path / "traces", prompts=20))
    train.main(config(tmp_path / "small"))
    capsys.readouterr()
    ablations.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| controller | train rows | seconds | count_explained |")
    assert lines[2].startswith("| small | 320 | ") and lines[3].startswith("| constant | - |")
    with pytest.raises(UserError, match="has neither"):
        ablations.main([str(tmp_path / "small" / "checkpoints")])
    with pytest.raises(UserError, match="0 folders were given"):
        ablations.main([])


TABLE = LatencyTable((1, 8, 32), (0.010, 0.012, 0.020), (0.002, 0.003, 0.006))


def evaluation(depth: int, device: str = "some", prompts: int = 12) -> dict[str, Any]:
    """As results.json: of three learned rows the one of the narrow beam sampling's quality drafts, `depth` layers of
    two nodes an iteration, all accepted; the better one drafts nothing."""

    def row(
        method: str, log_prob: float, forests: list[list[int]], width: int = 8, **settings: float
    ) -> dict[str, Any]:
        stats = {"roots": [2] * len(forests), "forests": forests, "new_tokens": 12}
        shared = {"log_prob": log_prob, "tokens": [0] * 12, "stats": stats}
        found = [{"prompt_id": i, **shared} for i in range(prompts)]
        return {"method": method, "settings": settings, "config": {"target_width": width}, "prompts": found}

    forests = [[2] * depth] * (12 // (depth + 1))
    rows = [row("beam_sample", -6.0, [[]] * 12, width=4), row("beam_sample", -5.0, [[]] * 12)]
    drafts = {1.0: forests, 2.0: forests, 3.0: [[]] * 12}
    rows += [row("learned", value - 8.0, drafted, width_value=value) for value, drafted in drafts.items()]
    return {"provenance": {"latency": {**TABLE.to_dict(), "device": device}}, "rows": rows}


def test_decisions_are_compared_without_a_clock() -> None:
    bare, own = evaluation(1), evaluation(2)
    bare["rows"] = [row for row in bare["rows"] if row["method"] != "learned"]
    for row in own["rows"]:
        row["settings"].pop("width_value", None)
    made = {"bare": bare, "none": evaluation(0), "two": evaluation(2), "own": own, "other": evaluation(2, "another")}
    short = evaluation(2)
    short["rows"] = [row for row in short["rows"] if row["settings"].get("width_value", 1.0) == 1.0]
    made["short"] = short
    lines = ablations.decision_table(made)
    iteration = iteration_seconds(TABLE, [2, 2], 2)
    alone, two = 1 / iteration_seconds(TABLE, [], 2), 3 / iteration
    assert lines[2] == f"| none | 1, 2, 3 | {alone:.0f} [{alone:.0f}, {alone:.0f}] | 1.000 [1.000, 1.000] |"
    ratio = f"{two / alone:.3f}"
    assert lines[3] == f"| two | 1, 2, 3 | {two:.0f} [{two:.0f}, {two:.0f}] | {ratio} [{ratio}, {ratio}] |"
    assert lines[4].startswith("| own |  | ")  # a controller's own value is not known here
    assert lines[5] == "| short | 1 | - | - |"  # none of its rows reaches the quality
    assert lines[6] == "" and lines[7].startswith("Left out: bare, other (") and len(lines) == 8
    assert ablations.decision_table({"bare": bare})[0].startswith("Left out: bare (")
