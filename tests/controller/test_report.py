"""Reports: ratios of sums, paired intervals, files that are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controller import report
from controller.report import calibration_curves, plot_frontier, summarise, write_report
from decoding import DecodeStats, DecodingConfig
from decoding.measure import Measurement, Row
from decoding.widths import IterationRecord, LayerRecord

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


def row(method: str, width: int) -> Row:
    return Row(method, {}, DecodingConfig(target_width=width, draft_width=8))


def measurement(i: int, seconds: float, tokens: int = 10, **more: Any) -> Measurement:
    layers = LayerRecord(1, 6, 2, 3, True), LayerRecord(2, 0, 4, 0, True)
    records = [IterationRecord(layers, 2, seconds, roots=1, drafts=(6,))]
    stats = DecodeStats(20, new_tokens=tokens, iterations=5, records=records, kv_slots_end=33)
    return Measurement(f"p{i}", seconds, None, stats, list(range(tokens)), False, log_prob=-1.5 * tokens, **more)


def fake_rows(seed: int = 0, prompts: int = 30) -> list[dict[str, Any]]:
    """Made-up measurements of a few families, prompts of differing difficulty."""
    random = np.random.default_rng(seed)
    hard = random.uniform(0.7, 1.3, prompts)
    rows, measured = [], []
    for method, cost in (("beam_sample", 1.0), ("hf_beam_sample", 1.5), ("fixed", 0.6), ("threshold", 0.55)):
        for width in (1, 2, 4):
            rows.append(row(method, width))
            found = [measurement(i, 0.1 * cost * hard[i] * (1 + 0.2 * width)) for i in range(prompts)]
            for m in found:
                m.log_prob = -10 * (1.6 - 0.1 * width + 0.1 * random.standard_normal())
                m.metrics = {"exact_match": float(random.random() < 0.3)}
            measured.append(found)
    return summarise(rows, measured, resamples=200)


def results() -> dict[str, Any]:
    return {"schema_version": 1, "provenance": PROVENANCE, "rows": fake_rows()}


def test_summary_is_a_ratio_of_sums() -> None:
    measured = [[measurement(0, 1.0, tokens=10), measurement(1, 3.0, tokens=50, metrics={"exact_match": 1.0})]]
    (found,) = summarise([row("beam_sample", 4)], measured, resamples=500)
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
    rows = [row("beam_sample", 2), row("beam_sample", 4), row("fixed", 4)]
    measured = [[measurement(i, factor * c) for i, c in enumerate(cost)] for factor in (7.0, 2.0, 1.0)]
    found = summarise(rows, measured, resamples=300)[2]["summary"]
    assert found["speedup_over_beam_sample"] == {
        "value": pytest.approx(2),
        "low": pytest.approx(2),
        "high": pytest.approx(2),
    }
    assert found["tokens_per_second"]["high"] > 2 * found["tokens_per_second"]["low"]


def test_bootstrap_covers_what_it_should() -> None:
    """The interval of a mean of 200 normal values is about ± 1.96 standard errors."""
    values = np.random.default_rng(0).normal(1.0, 0.2, 200)
    measured = [[measurement(i, 1.0, metrics={"score": v}) for i, v in enumerate(values)]]
    entry = summarise([row("fixed", 4)], measured, resamples=4000)[0]["summary"]["score"]
    half = 1.96 * values.std() / np.sqrt(200)
    assert (entry["high"] - entry["low"]) / 2 == pytest.approx(half, rel=0.1)  # Monte Carlo error is about 2%


def test_report_files(tmp_path: Path) -> None:
    written = results()
    written["rows"][0]["prompts"][0]["log_prob"] = float("nan")
    files = write_report(tmp_path / "out", written, CALIBRATION)
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
    page = report.results_page(noted)
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
    learned = [dict(rows[-1], method="learned", settings={"width_value": value}) for value in (0.5, 2.0)]
    (axes,) = plot_frontier([*rows, *learned, *rows[2:] * 8]).axes
    labels = {text.get_text() for text in axes.texts}
    assert labels & {"0.5", "2"} and not any("w=" in label for label in labels)


def test_calibration_is_optional() -> None:
    bins = CALIBRATION["P(K_w >= 1)"]
    assert calibration_curves({"reliability": bins}) == {"P(K_w >= M)": bins}
    assert calibration_curves({}) == {} == calibration_curves({"reliability": {"predicted": []}})
