"""Training in rounds, on several trace directories or on few rows, the saved reliability, and the ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

import train
from controller import LearnedWidth, ablations
from controller.calibration import reliability_curves
from controller.data import TraceDataModule
from controller.module import ControllerModule
from controller.network import WidthNet, load_controller
from decoding import UserError
from decoding.collect import Collection
from decoding.entry import CONF_DIR
from decoding.latency import LatencyTable
from decoding.plots import calibration_curves
from decoding.pricing import iteration_seconds
from decoding.traces import read_manifest
from tests.controller.synthetic import CONFIG, PAIR, write_traces
from tests.controller.test_data import rewrite

ABLATIONS = sorted(path.stem for path in (CONF_DIR / "experiment" / "ablation").glob("*.yaml"))


def config(directory: Path, *overrides: str) -> DictConfig:
    quick = ["trainer.max_epochs=1", "callbacks.progress_bar=null", "logger=none", "+trainer.enable_progress_bar=false"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", [f"paths.output_dir={directory}", *quick, *overrides])


@pytest.fixture
def collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[DictConfig]:
    """Stands in for the collection: the configs that traces were asked for, each of which has other traces."""
    asked: list[DictConfig] = []

    def ensure(cfg: DictConfig) -> Path:
        asked.append(cfg)
        directory, policy = tmp_path / f"traces-{len(asked)}", {"round": len(asked)}
        return write_traces(directory, prompts=20, seed=len(asked), policy=policy)

    monkeypatch.setattr(train, "ensure_traces", ensure)
    return asked


def test_a_second_round_logs_the_first_controller_and_trains_on_both(
    tmp_path: Path, collected: list[DictConfig]
) -> None:
    train.main(config(tmp_path / "run", "rounds=2", "round_width_value=3"))
    first, second = collected
    assert first.policy["_target_"] == "decoding.RandomWidth"
    assert second.policy.path == str(tmp_path / "run" / "round-1" / "controller")
    assert second.collect.test_prompts == 0 and second.collect.train_prompts == first.collect.train_prompts
    policy = instantiate(second.policy)
    assert isinstance(policy, LearnedWidth) and policy.width_value == 3.0 and not policy.share
    policy.check(CONFIG)
    of_first, of_both = (load_controller(tmp_path / "run" / name)[1] for name in ("round-1/controller", "controller"))
    assert [about["policy"] for about in of_first["traces"]] == [{"round": 1}]
    assert [about["policy"] for about in of_both["traces"]] == [{"round": 1}, {"round": 2}]
    assert of_both["training"]["rows"] == 2 * of_first["training"]["rows"]
    assert (tmp_path / "run" / "round-1" / "checkpoints" / "last.ckpt").is_file()


class Pair:
    fingerprint = "pair"


def described(cfg: DictConfig) -> dict[str, Any]:
    """What the traces of a config are found by."""
    return Collection.of(cfg, Pair()).describe()  # type: ignore[arg-type]


def test_traces_of_a_round_belong_to_the_weights_that_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not to the folder of the run, which has another name every time; the same weights go on with the same traces."""
    traces, found = write_traces(tmp_path / "traces", prompts=20), []

    def ensure(cfg: DictConfig) -> Path:
        if "path" in cfg.policy:
            found.append(described(cfg)["policy"])
        return traces

    monkeypatch.setattr(train, "ensure_traces", ensure)
    for folder, rate in (("a", 1e-3), ("b", 1e-3), ("b", 1e-2)):
        train.main(config(tmp_path / folder, "rounds=2", f"controller.lr={rate}"))
    assert found[0] == found[1] != found[2]
    assert str(tmp_path) not in str(found)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["rounds=0"], "rounds is 0; give a whole number of at least 1"),
        (["rounds=1.5"], r"rounds is 1\.5; give a whole number"),
        (["rounds=2", "ckpt_path=last.ckpt"], "resumes one fit, and rounds is 2"),
        (["max_train_rows=0"], "max_train_rows is 0; give a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be(
    tmp_path: Path, collected: list[DictConfig], overrides: list[str], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        train.main(config(tmp_path / "run", *overrides))
    assert not (tmp_path / "run").exists()


def test_several_directories_are_one(tmp_path: Path) -> None:
    paths = [write_traces(tmp_path / name, prompts=20, seed=seed) for seed, name in enumerate("ab")]
    alone, together = [TraceDataModule(path) for path in paths], TraceDataModule(paths)
    for split in ("train", "val"):
        for name, column in together.rows[split].columns.items():
            assert torch.equal(column, torch.cat([data.rows[split].columns[name] for data in alone])), name
    assert together.sizes == alone[0].sizes and len(together.manifests) == 2


def pair_of(tmp_path: Path, **changes: Any) -> list[Path]:
    return [write_traces(tmp_path / "a", prompts=20), write_traces(tmp_path / "b", prompts=20, **changes)]


def test_directories_that_differ_are_refused(tmp_path: Path) -> None:
    manifest = read_manifest(write_traces(tmp_path / "plain", prompts=20)) or {}
    changes: dict[str, Any] = {
        "the pair": {"pair": PAIR | {"fingerprint": "other"}},
        "the features": {"features": manifest["features"] | {"version": 99}},
        "decoding.top_k": {"decoding": manifest["decoding"] | {"top_k": 5}},
    }
    for i, (what, change) in enumerate(changes.items()):
        with pytest.raises(UserError, match=f"differ in {what}; one controller learns from traces of one pair"):
            TraceDataModule(pair_of(tmp_path / str(i), **change))


def test_a_prompt_may_not_change_its_split_between_directories(tmp_path: Path) -> None:
    paths = pair_of(tmp_path)
    splits = ["train" if row // 20 != 1 else "val" for row in range(400)]  # prompt-0 trains there, prompt-1 does not
    rewrite(paths[1], split=splits)
    with pytest.raises(UserError, match="is in the splits"):
        TraceDataModule(paths)


@pytest.mark.parametrize(("limit", "prompts"), [(1, 1), (20, 1), (39, 1), (40, 2), (10_000, 16), (None, 16)])
def test_few_rows_are_the_first_prompts_and_whole(tmp_path: Path, limit: int | None, prompts: int) -> None:
    directory = write_traces(tmp_path / "traces", prompts=20)  # of 20 rows each; every fifth is validation
    full, few = TraceDataModule(directory), TraceDataModule(directory, max_train_rows=limit)
    assert len(few.rows["train"]) == 20 * prompts
    assert torch.equal(few.rows["train"].columns["features"], full.rows["train"].columns["features"][: 20 * prompts])
    assert torch.equal(few.rows["val"].columns["features"], full.rows["val"].columns["features"])


def test_few_rows_of_two_rounds_are_the_same_prompts(tmp_path: Path) -> None:
    both = TraceDataModule(pair_of(tmp_path), max_train_rows=100)  # a prompt has 40 rows
    assert len(both.rows["train"]) == 80


# Reliability.


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


def test_what_is_saved_of_the_curves(tmp_path: Path, collected: list[DictConfig]) -> None:
    train.main(config(tmp_path))
    _, about = load_controller(tmp_path / "controller")
    saved = about["reliability"]
    assert saved["split"] == "val" and {"survivor", "count_w1_2"} <= set(saved["curves"])
    assert saved["predicted"] == saved["curves"]["count"]["predicted"]
    assert calibration_curves(about)["P(K_w >= M)"]["rows"] == saved["rows"]
    for name, curve in saved["curves"].items():
        assert {"predicted", "observed", "rows", "error", "score"} == set(curve)
        assert about["metrics"][f"val/{name}_ece"] == pytest.approx(curve["error"])
        assert about["metrics"][f"val/{name}_rps"] == pytest.approx(curve["score"])


def test_test_rows_are_what_reliability_is_measured_on(
    tmp_path: Path, collected: list[DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_test(cfg: DictConfig) -> Path:
        directory = write_traces(tmp_path / "traces", prompts=20)
        rewrite(directory, split=[("val", "test")[i // 20 % 2] if i < 80 else "train" for i in range(400)])
        return directory

    monkeypatch.setattr(train, "ensure_traces", with_test)
    train.main(config(tmp_path / "run"))
    _, about = load_controller(tmp_path / "run" / "controller")
    assert about["reliability"]["split"] == "test"
    assert "test/count_w1_2_ece" in about["metrics"] and "val/count_w1_2_ece" not in about["metrics"]


# Ablations.


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_uses_the_traces_of_wide(tmp_path: Path, name: str) -> None:
    wide, ablation = (config(tmp_path, f"experiment={name}") for name in ("wide", f"ablation/{name}"))
    assert described(wide) | {"hidden": name == "hidden"} == described(ablation)
    assert name == "all_rows" or (wide.controller, wide.max_train_rows) != (
        ablation.controller,
        ablation.max_train_rows,
    )


def test_tables_of_a_folder(tmp_path: Path, collected: list[DictConfig], capsys: pytest.CaptureFixture[str]) -> None:
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
