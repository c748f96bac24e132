"""evaluate.py from a config to files: rows, provenance, tracking, mistakes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

import evaluate
from controller.checkpoint import save_controller
from decoding import UserError
from decoding.measure import turns
from decoding.measure.methods import METHODS
from decoding.measure.turns import Record, log_probability
from decoding.support.in_use import in_use
from tests.controller.synthetic import ABOUT, random_net
from tests.small_pair import small_pair

ROOT = Path(evaluate.__file__).parent


def config(output: Path, *overrides: str, prompts: int = 6) -> DictConfig:
    """evaluate.yaml on random models and prompts of the test's own, without what only Hydra's job knows."""
    path = output / "prompts.jsonl"
    rows = [{"prompt": f"def f{i}(x):\n", "reference": f"    return x + {i}\n"} for i in range(prompts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    settings = [
        "data=jsonl",
        f"data.path={path}",
        "data.reference_field=reference",
        "data.shares=null",
        f"paths.output_dir={output / 'out'}",
        "decoding.target_width=2",
        "decoding.max_new_tokens=6",
        "bootstrap=50",
        "prompts.warmup=1",
        "grid.widths=[2]",
        "grid.thresholds=[0.9]",
        "policies=[fixed,threshold]",
    ]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("evaluate", [*settings, *overrides])
    with open_dict(cfg):
        cfg.pair = {"_target_": "tests.small_pair.small_pair"}
    return cfg


def test_results_hold_every_row_and_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    returned = evaluate.main(config(tmp_path, "prompts.limit=4"))
    out = tmp_path / "out"
    read = json.loads((out / "results.json").read_text())
    assert {p.name for p in out.iterdir()} == {"results.json", "results.md", "frontier.png"}
    assert [row["name"] for row in read["rows"]] == [
        "beam_sample M=2",
        "hf_beam_sample M=2",
        "fixed M=2 w=8 γ=3",
        "threshold M=2 w=8 γ=3 threshold=0.9",
    ]
    assert json.loads(json.dumps(returned)) == {name: value for name, value in read.items() if name != "sha256"}
    source = read["provenance"]
    assert source["pair"]["name"] == "small" and source["task"]["prompts"] == 4
    assert source["config"]["decoding"]["max_new_tokens"] == 6
    pair = small_pair()
    for row in read["rows"]:
        assert row["config"]["target_width"] == 2
        for i, prompt in enumerate(row["prompts"]):
            assert len(prompt["tokens"]) == 6 or prompt["finished"]
            tokens = pair.tokenizer(f"def f{i}(x):\n")["input_ids"]
            assert prompt["log_prob"] == pytest.approx(log_probability(pair.target, tokens, prompt["tokens"]))
            assert set(prompt["metrics"]) == {"exact_match", "edit_similarity"}
    printed = capsys.readouterr().out
    assert "threshold M=2" in printed and str(out / "frontier.png") in printed


SHARED = "decoding.verification=shared_noise"  # what controllers decide under


def saved_controller(directory: Path) -> Path:
    """An untrained network for the small pair."""
    about = {
        "features": ABOUT,
        "pair": small_pair().describe(),
        "decoding": {},
        "reliability": {"predicted": [0.1, None], "observed": [0.2, None], "rows": [5, 0]},
    }
    return save_controller(random_net(), directory / "controller", about)


def test_learned_rows_and_their_calibration(tmp_path: Path) -> None:
    settings = [f"controller_path={saved_controller(tmp_path)}", "policies=[learned]", SHARED]
    settings.append("prompts.limit=2")
    found = evaluate.main(config(tmp_path, *settings))
    names = [row["name"] for row in found["rows"]]
    assert names == ["beam_sample M=2", "hf_beam_sample M=2", "learned M=2 w=8 γ=3"]
    assert (tmp_path / "out" / "calibration.png").is_file()
    assert found["provenance"]["latency"]["nodes"]
    table = tmp_path / "latency.json"
    table.write_text(json.dumps(found["provenance"]["latency"]))
    fixed = [*settings, "latency=file", f"latency.path={table}", "learned.clock=table"]
    runs = [evaluate.main(config(tmp_path, *fixed)) for _ in range(2)]
    assert runs[0]["provenance"]["latency"] == found["provenance"]["latency"]
    assert [row["counts"] for row in runs[0]["rows"]] == [row["counts"] for row in runs[1]["rows"]]


def test_two_devices_and_settings_tuned_for_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One controller plans for two tables; hand-set settings that are undominated on either device go on."""
    settings = [
        f"controller_path={saved_controller(tmp_path)}",
        "policies=[learned]",
        "references=[beam_sample]",
        "latency@also=h200_8b_1b",
        SHARED,
        "tune.grids=[{policies: [fixed, mass], widths: [2], depths: [0, 2], shares: [0.5], final_widths: [2]}]",
        "tune.prompts=2",
        "tune.split=test",
        "tune.keep=1",
        "prompts.limit=3",
    ]
    found = evaluate.main(config(tmp_path, *settings))
    names = [row["name"] for row in found["rows"]]
    assert names[:3] == ["beam_sample M=2", "learned M=2 w=8 γ=3", "learned_also M=2 w=8 γ=3"]
    grid = found["tuned"]["grid"]
    assert len(grid) == 4 and all(set(point["speeds"]) == {"modelled", "also"} for point in grid)
    assert names[3:] == [point["name"] for point in grid if point["kept"]]
    assert {"fixed", "mass"} == {row["method"] for row in found["rows"][3:]}
    for row in found["rows"]:
        modelled = [row["summary"][f"{name}_tokens_per_second"]["value"] for name in ("modelled", "also")]
        assert all(value > 0 for value in modelled)
        assert row["summary"]["also_hindsight"]["value"] >= modelled[1] - 1e-9  # hindsight drafts no layer in vain
    assert set(found["comparisons"]) == {"clock", "modelled", "also"}
    assert (tmp_path / "out" / "frontier_also.png").is_file()
    page = (tmp_path / "out" / "results.md").read_text()
    assert "Hand-set settings were chosen on 2 prompts of split test" in page
    assert "fixed M=2 w=8 γ=2 last=2" in capsys.readouterr().err


def test_a_modelled_device_is_planned_for_without_a_clock(tmp_path: Path) -> None:
    settings = [f"controller_path={saved_controller(tmp_path)}", "policies=[learned]", SHARED, "latency=h200_8b_1b"]
    runs = [evaluate.main(config(tmp_path, *settings, "prompts.limit=2")) for _ in range(2)]
    assert [row["counts"] for row in runs[0]["rows"]] == [row["counts"] for row in runs[1]["rows"]]
    assert runs[0]["provenance"]["latency"]["measured"] is None


def test_same_seed_same_texts(tmp_path: Path) -> None:
    def texts(*overrides: str) -> list[list[int]]:
        found = evaluate.main(config(tmp_path, "prompts.limit=2", *overrides))
        return [prompt["tokens"] for row in found["rows"] for prompt in row["prompts"]]

    first = texts()
    assert texts() == first
    assert texts("seed=1") != first


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["policies=[learned]"], "give controller=<directory>"),
        (["policies=[learned]", "controller_path=/nowhere/at/all"], "/nowhere/at/all"),
        (["prompts.split=model"], "train, val, test"),
        (["policies=[learned_also]"], "give controller=<directory>"),
        (["references=[learned]"], "give controller=<directory>"),
        (["policies=[learned_also]", "controller_path=/some/where"], "latency@also="),
        (["prompts.limit=0"], "prompts.limit is 0"),
        (["bootstrap=0"], "bootstrap is 0; give a whole number of at least 1"),
        (["batch_size=null"], "batch_size is None"),
        (["tune.keep=0"], "tune.keep is 0"),
        (["tune.grids=[{widths: [4]}]"], "tune.grids holds {'widths': [4]}; give each as {policies:"),
        (["tune.grids=[{policies: [fixed], widths: 4}]"], "grid.widths is 4; give a list"),
        (["grid.widths=[9]"], "is less than target_width"),
    ],
)
def test_mistakes_are_sentences_and_write_nothing(tmp_path: Path, overrides: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        evaluate.main(config(tmp_path, *overrides))
    assert not (tmp_path / "out").exists()


def test_without_widths_there_are_powers_of_two_up_to_the_configs(tmp_path: Path) -> None:
    for width, expected in ((4, [1, 2, 4]), (6, [1, 2, 4, 6]), (1, [1])):
        cfg = config(tmp_path, f"decoding.target_width={width}", "grid.widths=null")
        assert evaluate.grid_of(cfg, instantiate(cfg.decoding), [], METHODS)["widths"] == expected


def test_an_interrupted_evaluation_is_scored_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_turns = turns.take_turns

    def interrupted(records: list[Record], *given: Any, **options: Any) -> Iterator[int]:
        yield from take_turns(records, *given, **options)
        for each in records:
            del each.repeats[0][2:]
        raise KeyboardInterrupt

    monkeypatch.setattr(turns, "take_turns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(config(tmp_path, "prompts.limit=4", "policies=[fixed]"))
    read = json.loads((tmp_path / "out" / "results.json").read_text())
    assert not read["complete"] and read["provenance"]["task"]["prompts"] == 2
    assert {len(row["prompts"]) for row in read["rows"]} == {2}
    assert all(prompt["log_prob"] < 0 for row in read["rows"] for prompt in row["prompts"])


def test_a_policy_of_ones_own_is_a_row(tmp_path: Path) -> None:
    """Its own grid where the config says nothing of it, and the config's where it does."""
    policy = "tests.decoding.measure.test_rows.HalfWidth"
    settings = [f"policies=[{policy}]", "references=[]", "prompts.limit=1"]
    found = evaluate.main(config(tmp_path, *settings))
    assert [row["settings"]["fraction"] for row in found["rows"]] == [0.25, 0.5]
    assert {row["family"] for row in found["rows"]} == {"hand-set"}
    found = evaluate.main(config(tmp_path, *settings, "+grid.fraction=[0.75]"))
    assert [row["name"] for row in found["rows"]] == [f"{policy} M=2 w=8 γ=3 f=0.75"]


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    cfg = config(tmp_path, "policies=[multinomial]", "references=[]", "prompts.limit=2")
    with open_dict(cfg):
        cfg.data = {"_target_": "tests.test_configs.Poems", "lines": 2}
    found = evaluate.main(cfg)
    assert found["provenance"]["task"] == {"name": "poems", "lines": 2, "split": "test", "prompts": 2}
    assert 0 <= found["rows"][0]["summary"]["lines"]["value"] <= 1


def test_rows_that_a_plot_cannot_show_leave_it_out(tmp_path: Path) -> None:
    settings = ["policies=[hf_sample]", "references=[]", "latency=h200_8b_1b", "prompts.limit=2"]
    out = tmp_path / "out"
    out.mkdir()
    for stale in ("frontier.png", "calibration.png", "calibration.svg"):  # of an earlier run in this folder
        (out / stale).touch()
    evaluate.main(config(tmp_path, *settings))
    assert {path.name for path in out.iterdir()} == {"results.json", "results.md"}


class Recorded(dict[str, Any]):
    """The config of a wandb run."""

    def update(self, values: dict[str, Any], allow_val_change: bool) -> None:  # type: ignore[override]
        super().update(values)


class Wandb:
    """What evaluate.py asks of a wandb run."""

    offline = True

    def __init__(self, folder: Path) -> None:
        self.settings = OmegaConf.create({"sync_dir": str(folder)})
        self.logged: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.config = Recorded()
        self.exit_code: int | None = None

    def log(self, values: dict[str, Any]) -> None:
        self.logged |= values

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wandb:
    fake = Wandb(tmp_path / "offline-run-1")
    monkeypatch.setattr("wandb.init", lambda **_: fake)
    return fake


def test_tracking_logs_the_frontier_and_says_how_to_upload(
    tmp_path: Path, run: Wandb, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(config(tmp_path, "logger=wandb", "prompts.limit=2", "+api_key=hidden"))
    assert run.config["bootstrap"] == 50 and "hidden" not in json.dumps(run.config)
    assert len(run.logged["frontier_table"].data) == 4
    assert "frontier" in run.logged  # the image
    assert any("tokens_per_second" in name for name in run.summary)
    assert run.exit_code == 0
    assert f"wandb sync {tmp_path / 'offline-run-1'}" in capsys.readouterr().err


def test_a_crash_closes_the_run(tmp_path: Path, run: Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(evaluate, "summarise", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate.main(config(tmp_path, "logger=wandb", "prompts.limit=1"))
    assert run.exit_code == 1
    assert not list(tmp_path.glob("out/*.json"))


class Killed(BaseException):
    """SIGKILL, as far as a test can survive it: nothing is scored or written after it."""


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the process die in the turn after so many; returns the rows of the turns that are taken."""
    taken: list[str] = []
    take_turn = turns._take_turn

    def dies(record: Record, *given: Any) -> Any:
        if len(taken) == count:
            raise Killed
        found = take_turn(record, *given)
        taken.append(record.row.name)
        return found

    monkeypatch.setattr(turns, "_take_turn", dies)
    return taken


QUICK = ("prompts.limit=3", "prompts.warmup=0", "policies=[fixed]", "references=[beam_sample]")


def told(results: dict[str, Any]) -> list[Any]:
    """The texts and counts of results, without what the clock said."""
    rows = [
        (row["name"], row["counts"], [(p["prompt_id"], p["tokens"]) for p in row["prompts"]]) for row in results["rows"]
    ]
    return json.loads(json.dumps(rows))


def test_a_killed_evaluation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rerun takes the turns that are left and no other; what it read of the others is what they gave."""
    whole = evaluate.main(config(tmp_path, *QUICK))
    out = tmp_path / "out"
    (out / "results.json").unlink()
    with monkeypatch.context() as patch:
        assert len(killed_after(5, patch)) == 0
        with pytest.raises(Killed):
            evaluate.main(config(tmp_path, *QUICK))
    assert not (out / "results.json").exists()
    assert (out / "progress.md").read_text().startswith("2 of 3 prompts are in.")
    (kept,) = out.glob("unfinished-*.jsonl")
    lines = kept.read_bytes().splitlines(keepends=True)
    first = json.loads(lines[0][17:])["measured"][0]
    kept.write_bytes(b"".join(lines[:3]) + lines[3].replace(b"true", b"null") + lines[4][:50])  # flipped; cut short
    taken = killed_after(99, monkeypatch)
    again = evaluate.main(config(tmp_path, *QUICK))
    assert len(taken) == 3 and told(again) == told(whole) and again["complete"]
    assert again["rows"][0]["prompts"][0]["stats"]["seconds"] == first["stats"]["seconds"]
    assert "Going on from 3 turns" in capsys.readouterr().err
    assert {p.name for p in out.iterdir()} == {"results.json", "results.md", "frontier.png"}
    taken.clear()
    evaluate.main(config(tmp_path, *QUICK))
    assert len(taken) == 6, "a finished run is measured anew"


def test_other_settings_do_not_go_on_from_a_killed_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They begin anew, and leave what is there to the settings that it is of; so does other code."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(4, patch)
        evaluate.main(config(tmp_path, *QUICK))
    taken = killed_after(99, monkeypatch)
    for change in ("seed=5", "decoding.max_new_tokens=5"):
        taken.clear()
        evaluate.main(config(tmp_path, *QUICK, change))
        assert len(taken) == 6 and "is of other settings, code or prompts" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        taken.clear()
        patch.setattr(evaluate, "code_sha256", lambda config: "another commit")
        evaluate.main(config(tmp_path, *QUICK))
        assert len(taken) == 6
    taken.clear()
    elsewhere = config(tmp_path, *QUICK, f"paths.output_dir={tmp_path / 'out-2'}")  # the next folder of a run
    assert evaluate.main(elsewhere)["complete"] and len(taken) == 2
    assert not list(tmp_path.glob("*/unfinished-*"))


def test_a_living_evaluation_keeps_its_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_after(4, patch)
        evaluate.main(config(tmp_path, *QUICK))
    taken = killed_after(99, monkeypatch)
    with in_use(tmp_path / "out"):
        evaluate.main(config(tmp_path, *QUICK, f"paths.output_dir={tmp_path / 'out-2'}"))
    assert len(taken) == 6 and list((tmp_path / "out").glob("unfinished-*"))


def test_an_interrupted_evaluation_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(globals(), "Killed", KeyboardInterrupt)
        killed_after(5, patch)
        evaluate.main(config(tmp_path, *QUICK))
    sentence = "The run was interrupted: 2 of 3 prompts are in; the same command goes on from there."
    assert sentence in (tmp_path / "out" / "results.md").read_text()
    taken = killed_after(99, monkeypatch)
    assert evaluate.main(config(tmp_path, *QUICK))["stopped"] is None and len(taken) == 1
