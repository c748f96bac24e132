"""Reports: ratios of sums, paired intervals, files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from decoding import DecodeStats, DecodingConfig, UserError, report
from decoding.measure.methods import METHODS
from decoding.measure.pages import results_page
from decoding.measure.plots import calibration_curves, plot_frontier
from decoding.measure.results_file import SCHEMA_VERSION
from decoding.measure.rows import Row
from decoding.measure.summary import summarise
from decoding.measure.turns import Measurement, Record
from decoding.policies.base import IterationRecord, LayerRecord
from decoding.report import write_report

PROVENANCE = {
    "argv": ["evaluate.py", "seed=1"],
    "git_sha": None,
    "versions": {"torch": "2"},
    "machine": {"cpu": "a CPU", "gpu": None, "cores": 2, "system": "Linux"},
    "date": "2026-01-01",
    "pair": {"name": "small"},
    "task": {"name": "stdlib"},
}
CALIBRATION = {
    f"P(K_w >= {m})": {
        "predicted": [0.05, 0.3, 0.5, 0.72, None],
        "observed": [0.04, 0.22, 0.55, 0.7, None],
        "rows": [50, 300, 800, 120, 0],
    }
    for m in (1, 2, 4)
}


def record(method: str, width: int, *repeats: list[Measurement]) -> Record:
    row = Row(METHODS[method], {}, DecodingConfig(target_width=width, draft_width=8))
    return Record(row, generate=None, pair=None, repeats=list(repeats))  # type: ignore[arg-type]


def measurement(i: int, seconds: float, tokens: int = 10, **more: Any) -> Measurement:
    layers = LayerRecord(1, 6, 2, 3, True), LayerRecord(2, 0, 4, 0, True)
    records = [IterationRecord(layers, 2, seconds, roots=1, drafts=(6,))]
    stats = DecodeStats(20, new_tokens=tokens, iterations=5, records=records, kv_slots_end=33)
    return Measurement(f"p{i}", seconds, None, stats, list(range(tokens)), False, log_prob=-1.5 * tokens, **more)


def fake_rows(seed: int = 0, prompts: int = 30) -> list[dict[str, Any]]:
    """Made-up measurements of a few families, prompts of differing difficulty."""
    random = np.random.default_rng(seed)
    hard = random.uniform(0.7, 1.3, prompts)
    records = []
    for method, cost in (("beam_sample", 1.0), ("hf_beam_sample", 1.5), ("fixed", 0.6), ("threshold", 0.55)):
        for width in (1, 2, 4):
            found = [measurement(i, 0.1 * cost * hard[i] * (1 + 0.2 * width)) for i in range(prompts)]
            for m in found:
                m.log_prob = -10 * (1.6 - 0.1 * width + 0.1 * random.standard_normal())
                m.metrics = {"exact_match": float(random.random() < 0.3)}
            records.append(record(method, width, found))
    return summarise(records, resamples=200)


def results() -> dict[str, Any]:
    head = {"schema_version": SCHEMA_VERSION, "provenance": PROVENANCE, "complete": True}
    return head | {"failed": {}, "unscored": None, "rows": fake_rows()}


def test_summary_is_a_ratio_of_sums() -> None:
    measured = [measurement(0, 1.0, tokens=10), measurement(1, 3.0, tokens=50, metrics={"exact_match": 1.0})]
    (found,) = summarise([record("beam_sample", 4, measured)], resamples=500)
    value = {name: entry["value"] for name, entry in found["summary"].items()}
    assert value["tokens_per_second"] == 60 / 4  # not the mean of 10 and 16.7
    assert value["log_prob"] == pytest.approx(-1.5)
    assert value["block_efficiency"] == 6.0
    assert (value["target_width"], value["draft_width"], value["accepted_share"]) == (3.0, 6.0, 0.5)
    assert value["kv_slots_per_token"] == 66 / 100
    assert value["exact_match"] == 1.0  # of the one prompt that has a reference
    assert value["speedup_over_beam_sample"] == 1.0
    assert "joules_per_token" not in value and "speedup_over_hf_beam_sample" not in value
    interval = found["summary"]["tokens_per_second"]
    assert (interval["low"], interval["high"]) == (10.0, pytest.approx(50 / 3))
    assert found["counts"]["draft_width"] == {"0": 2, "6": 2}


def test_speedups_are_paired_and_of_the_same_width() -> None:
    """Prompts that differ by 100x in cost, a method always twice as fast: the ratio is certain, the speeds are not."""
    cost = np.logspace(-1, 1, 12)
    rows = [("beam_sample", 2, 7.0), ("beam_sample", 4, 2.0), ("fixed", 4, 1.0)]
    records = [record(name, width, [measurement(i, by * c) for i, c in enumerate(cost)]) for name, width, by in rows]
    found = summarise(records, resamples=300)[2]["summary"]
    assert found["speedup_over_beam_sample"] == {
        "value": pytest.approx(2),
        "low": pytest.approx(2),
        "high": pytest.approx(2),
    }
    assert found["tokens_per_second"]["high"] > 2 * found["tokens_per_second"]["low"]


def test_bootstrap_covers_what_it_should() -> None:
    """The interval of a mean of 200 normal values is about ± 1.96 standard errors."""
    values = np.random.default_rng(0).normal(1.0, 0.2, 200)
    measured = [measurement(i, 1.0, metrics={"score": v}) for i, v in enumerate(values)]
    entry = summarise([record("fixed", 4, measured)], resamples=4000)[0]["summary"]["score"]
    half = 1.96 * values.std() / np.sqrt(200)
    assert (entry["high"] - entry["low"]) / 2 == pytest.approx(half, rel=0.1)  # Monte Carlo error is about 2%


def test_repeats_are_pooled_told_apart_and_paired() -> None:
    """A base with three repeats and a row that failed after two: the ratio is of the two that both have."""
    base = record("hf_beam_sample", 4, *[[measurement(i, s) for i in range(2)] for s in (1.0, 2.0, 9.0)])
    ours = record("fixed", 4, *[[measurement(i, s / 2) for i in range(2)] for s in (1.0, 2.0)])
    found = summarise([base, ours], resamples=50, reference=("hf_beam_sample", 4))
    assert [row["repeats"] for row in found] == [3, 2]
    assert [prompt["repeat"] for prompt in found[1]["prompts"]] == [0, 0, 1, 1]
    summary = found[1]["summary"]
    assert summary["speedup_over_reference"]["repeats"] == pytest.approx([2, 2])
    assert summary["speedup_over_reference"]["value"] == pytest.approx(2)
    assert summary["tokens_per_second"]["repeats"] == pytest.approx([20, 10])
    assert summary["tokens_per_second"]["value"] == pytest.approx(40 / 3)
    assert summary["log_prob_over_reference"]["value"] == 0
    assert summarise([record("fixed", 4)]) == []


def test_report_files(tmp_path: Path) -> None:
    written = results()
    written["rows"][0]["prompts"][0]["log_prob"] = float("nan")
    files = write_report(tmp_path / "out", written | {"calibration": CALIBRATION})
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(files)
    assert set(files) == {"results.json", "results.md", "frontier.png", "calibration.png"}
    read = json.loads(files["results.json"].read_text())
    assert read["rows"][0]["prompts"][0]["log_prob"] is None
    assert read["rows"][3]["summary"] == written["rows"][3]["summary"]
    page = files["results.md"].read_text()
    assert "python evaluate.py seed=1" in page and "| fixed M=4 |" in page and "calibration.png" in page
    widths = {line.count("|") for line in page.split("\n") if line.startswith("|")}
    assert len(widths) == 2  # two tables, each with as many cells in every line
    assert all(files[name].read_bytes().startswith(b"\x89PNG") for name in ("frontier.png", "calibration.png"))
    assert "calibration.png" not in write_report(tmp_path / "other", results())


def test_what_must_be_known_about_a_pair_stands_above_the_numbers() -> None:
    noted = results() | {"provenance": PROVENANCE | {"pair": {"name": "small", "note": "Not a trained model."}}}
    page = results_page({"": noted})
    assert 0 < page.index("**Not a trained model.**") < page.index("| row |")


def test_frontier_has_a_curve_a_method() -> None:
    (axes,) = plot_frontier(fake_rows()).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["beam_sample", "hf_beam_sample", "fixed", "threshold"]


def test_families_with_a_last_width_are_dashed_and_the_worst_are_left_out() -> None:
    rows = fake_rows()
    last = dict(rows[-1], settings=rows[-1]["settings"] | {"final_width": 4})
    far = json.loads(json.dumps(rows[-1]))
    far["summary"]["log_prob"] = dict.fromkeys(("value", "low", "high"), -100.0)
    (axes,) = plot_frontier([*rows, last, far]).axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["beam_sample", "hf_beam_sample", "fixed", "threshold", "threshold+last"]
    assert axes.get_ylim()[0] > -50 and "1 more below" in [text.get_text() for text in axes.texts]


def test_only_learned_rows_and_beam_sampling_are_labelled_among_many() -> None:
    rows = fake_rows()
    learned = [dict(rows[-1], method="learned", name=f"learned γ={depth}") for depth in (3, 5)]
    (axes,) = plot_frontier([*rows, *learned, *rows[2:] * 8]).axes
    labels = {text.get_text() for text in axes.texts}
    assert labels & {"γ=3", "γ=5"} and not any("w=" in label for label in labels)


def test_calibration_is_optional() -> None:
    bins = CALIBRATION["P(K_w >= 1)"]
    assert calibration_curves({"reliability": bins}) == {"candidate selected": bins}
    assert calibration_curves({}) == {} == calibration_curves({"reliability": {"predicted": []}})


# ------------------------------------------------------------------------------- reading results again


def written(directory: Path, **changes: Any) -> str:
    """A results.json of an evaluation."""
    return str(write_report(directory, results() | changes)["results.json"])


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    report.command_line(words)
    return capsys.readouterr().out


def test_results_are_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "run")
    page = (tmp_path / "run" / "results.md").read_text()
    printed = told(capsys, file, f"out={tmp_path / 'again'}", "format=svg")
    assert "threshold M=4" in printed and "x beam_sample" in printed and "do not" not in printed
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"results.md", "frontier.svg"}
    assert (tmp_path / "again" / "results.md").read_text() == page.replace("frontier.png", "frontier.svg")
    assert b"<svg" in (tmp_path / "again" / "frontier.svg").read_bytes()
    told(capsys, file, f"out={tmp_path / 'paper'}", "format=pdf")
    assert (tmp_path / "paper" / "frontier.pdf").read_bytes().startswith(b"%PDF")


def test_what_is_missing_is_told_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, failed={"fixed M=8": "The device ran out of memory."}, unscored="It ran out again.")
    printed = told(capsys, file)
    assert "fixed M=8 failed: The device ran out of memory." in printed
    assert "Log-probabilities are missing: It ran out again." in printed
    assert "fixed M=8 failed:" in (tmp_path / "results.md").read_text()


def test_the_calibration_is_drawn_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "run", calibration=CALIBRATION)
    told(capsys, file, f"out={tmp_path / 'again'}")
    assert (tmp_path / "again" / "calibration.png").is_file()


def test_rows_of_several_runs_keep_their_runs_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows stand side by side; no number of one run enters one of the other."""
    other = PROVENANCE | {"machine": {"cpu": "another CPU", "gpu": None, "cores": 8, "system": "Linux"}}
    files = [written(tmp_path / "a"), written(tmp_path / "b", provenance=other)]
    printed = told(capsys, *files, f"out={tmp_path / 'both'}", "quality=-1.5")
    for label in ("a", "b"):
        assert f"{label}: threshold M=4" in printed
        assert f"{label}, at the log-probability per token -1.500: " in printed
    assert "different machines" in printed and "another CPU" in printed
    page = (tmp_path / "both" / "results.md").read_text()
    alone = (tmp_path / "a" / "results.md").read_text()
    cells = next(line for line in alone.splitlines() if line.startswith("| threshold M=4"))
    assert page.count(cells.removeprefix("| ")) == 2, "each row as it was in its run"
    assert "# a: small" in page and "# b: small" in page
    printed = told(capsys, files[0], written(tmp_path / "c"))
    assert "did not take turns" in printed


def test_runs_are_told_apart_by_as_much_of_their_paths_as_it_takes(tmp_path: Path) -> None:
    files = [written(tmp_path / day / "evaluate") for day in ("monday", "tuesday")]
    assert list(report.read_runs(files)) == ["monday/evaluate", "tuesday/evaluate"]
    copy = Path(files[0]).with_name("copy.json")
    copy.write_bytes(Path(files[0]).read_bytes())
    assert list(report.read_runs([files[0], str(copy)])) == ["results.json", "copy.json"]


def test_the_fastest_row_at_a_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    speeds = {row["name"]: row["summary"]["tokens_per_second"]["value"] for row in results()["rows"]}
    fastest = max(speeds, key=lambda name: speeds[name])
    assert f"-9.000: {fastest} is fastest, {speeds[fastest]:.0f} [" in told(capsys, file, "quality=-9")
    assert "no row reaches it" in told(capsys, file, "quality=-0.1")
    assert "of fixed M=2: " in told(capsys, file, "quality=fixed M=2")
    assert told(capsys, file).count(" is fastest") == 6  # at the quality of each reference row


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "schema version None"),
        ('{"schema_version": 1, "rows": []}', f"schema version 1; this code reads {SCHEMA_VERSION}"),
        ('{"schema_version": %d, "rows": 3}', "hold no rows with"),
        ('{"schema_version": %d, "rows": []}', "do not say where they came from"),
    ],
)
def test_files_that_are_no_results_are_refused_in_a_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: str | None,
    sentence: str,
) -> None:
    file = tmp_path / "results.json"
    if content is not None:
        file.write_text(content.replace("%d", str(SCHEMA_VERSION)))
    monkeypatch.setattr("sys.argv", ["report", str(file), f"out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit) as stopped:
        report.main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and sentence in error and str(file) in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "No results were given: python -m decoding.report results.json"),
        (["FILE", "form=svg"], "form is not an option of the report; choose among out, format, quality, speed"),
        (["FILE", "format=gif"], "format is 'gif'; choose one of png, svg, pdf"),
        (
            ["FILE", "quality=good"],
            "quality is 'good'; give a log-probability per token, such as -0.35, or a row: ",
        ),
        (["FILE", "speed=fast"], "speed is 'fast'; choose one of tokens_per_second"),
        (["FILE", "FILE"], "was given twice"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path: Path, words: list[str], sentence: str) -> None:
    file = written(tmp_path)
    with pytest.raises(UserError, match=sentence):
        report.command_line([file if word == "FILE" else word for word in words])
