"""Comparisons at equal quality: speeds along undominated settings, ratios, and what bounds them."""

from __future__ import annotations

import numpy as np
import pytest

from decoding.dice.sampling import FloatArray
from decoding.measure.compare import comparisons, curve_of, fastest_at, speed_at, undominated

HAND_SET = ("beam_sample", "fixed", "threshold", "mass", "gap", "entropy")


def test_speed_lies_on_the_undominated_settings() -> None:
    speeds, qualities = np.array([100.0, 200.0, 150.0, 120.0]), np.array([-0.2, -0.8, -0.5, -0.6])
    assert speed_at(speeds, qualities, -0.5) == 150
    assert speed_at(speeds, qualities, -0.35) == pytest.approx(125)  # half way to the slow, good one
    assert speed_at(speeds, qualities, -0.65) == pytest.approx(175)  # the dominated 120 does not count
    assert speed_at(speeds, qualities, -0.1) == 100 and speed_at(speeds, qualities, -2.0) == 200


def test_more_settings_never_slow_a_family() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        speeds, qualities, quality = rng.random(6), rng.random(6), float(rng.random())
        fewer = speed_at(speeds[:5], qualities[:5], quality)
        best = qualities[:5].max()
        if quality <= best:  # a family that does not reach the quality is given its best setting's speed
            front_only = speed_at(speeds, qualities, quality)
            dominated = any((speeds[:5] >= speeds[5]) & (qualities[:5] >= qualities[5]))
            assert not dominated or front_only == pytest.approx(fewer)


def of(values: list[float], noise: float = 0.0, resamples: int = 200) -> tuple[FloatArray, FloatArray]:
    """Values, and resamples of them in which all rows move together."""
    known = np.array(values)
    moves = np.random.default_rng(0).normal(scale=noise, size=resamples)
    return known, known[:, None] + moves


def test_ratio_is_paired_and_the_hand_set_rival_is_the_fastest_family() -> None:
    methods = ["beam_sample", "fixed", "fixed", "mass", "mass", "learned", "learned"]
    speeds = of([100.0, 100.0, 200.0, 120.0, 180.0, 132.0, 240.0])
    qualities = of([-0.4, -0.4, -0.8, -0.4, -0.8, -0.4, -0.8], noise=0.05)
    (found,) = comparisons(methods, HAND_SET, {"beam_sample M=4": 0}, speeds, qualities)
    assert found["speed"] == 132 and found["quality"] == -0.4
    over = found["over"]
    assert over["hand-set"] == over["mass"] and over["mass"]["ratio"] == pytest.approx(1.1)
    assert over["fixed"]["ratio"] == pytest.approx(1.32) and over["beam_sample"]["ratio"] == pytest.approx(1.32)
    for ratio in over.values():  # all rows move together, so nothing is uncertain
        assert ratio["low"] == pytest.approx(ratio["ratio"]) == pytest.approx(ratio["high"])


def test_families_with_a_last_width_or_a_stop_are_told_apart() -> None:
    assert curve_of("fixed", {"final_width": 8}) == "fixed+last" and curve_of("fixed", {}) == "fixed"
    assert curve_of("mass", {"share": 0.5, "final_width": 8, "stop_entropy": 0.0}) == "mass+last+stop"
    assert curve_of("mass", {"final_width": None, "stop_entropy": 1.0}) == "mass+stop"
    methods = ["beam_sample", "fixed", "fixed+last", "threshold", "learned"]
    speeds = of([100.0, 110.0, 130.0, 105.0, 143.0])
    (found,) = comparisons(methods, HAND_SET, {"it": 0}, speeds, of([-0.4] * 5))
    over = {name: round(ratio["ratio"], 3) for name, ratio in found["over"].items()}
    assert over["hand-set"] == 1.1 and over["hand-set, plain"] == 1.3 == over["fixed"]
    methods[2] = "gap+last+stop"
    (found,) = comparisons(methods, HAND_SET, {"it": 0}, speeds, of([-0.4] * 5))
    over = {name: round(ratio["ratio"], 3) for name, ratio in found["over"].items()}
    assert over["hand-set"] == over["gap+last+stop"] == 1.1 and over["hand-set, plain"] == 1.3
    slow = of([150.0, 110.0, 130.0, 105.0, 143.0])  # drafting nothing is a setting too
    (found,) = comparisons(methods, HAND_SET, {"it": 0}, slow, of([-0.4] * 5))
    assert found["over"]["hand-set"]["ratio"] == pytest.approx(143 / 150)


def test_a_family_that_does_not_reach_the_quality_does_not_count_among_the_hand_set() -> None:
    methods = ["beam_sample", "fixed", "mass", "learned"]
    speeds, qualities = of([100.0, 110.0, 300.0, 121.0]), of([-0.4, -0.4, -0.9, -0.4])
    (found,) = comparisons(methods, HAND_SET, {"it": 0}, speeds, qualities)
    over = {name: round(ratio["ratio"], 3) for name, ratio in found["over"].items()}
    assert over["hand-set"] == 1.1 and over["mass"] == round(121 / 300, 3)


def test_quality_that_learned_rows_do_not_reach_is_left_out() -> None:
    methods = ["beam_sample", "beam_sample", "fixed", "learned"]
    speeds, qualities = of([90.0, 200.0, 100.0, 120.0]), of([-0.2, -0.9, -0.5, -0.5])
    found = comparisons(methods, HAND_SET, {"good": 0, "poor": 1}, speeds, qualities)
    assert [entry["reference"] for entry in found] == ["poor"]
    assert comparisons(methods[:3], HAND_SET, {"good": 0}, of([90.0, 200.0, 100.0]), of([-0.2, -0.9, -0.5])) == []


def test_gap_to_the_oracle() -> None:
    methods = ["beam_sample", "fixed", "learned"]
    speeds, qualities = of([100.0, 100.0, 115.0]), of([-0.5, -0.5, -0.5])
    (found,) = comparisons(methods, HAND_SET, {"it": 0}, speeds, qualities, hindsight=np.array([np.nan, 130.0, 120.0]))
    assert found["oracle"] == 130 and found["gap_closed"] == pytest.approx(0.5)


def test_undominated_settings_are_thinned_evenly() -> None:
    points = [(10.0 - i, float(i)) for i in range(10)] + [(1.0, 1.0)]
    assert undominated(points, 20) == list(range(10))
    assert undominated(points, 4) == [0, 3, 6, 9]
    assert undominated([(1.0, 1.0), (1.0, 1.0)], 3) == [0]


def test_the_fastest_row_is_one_of_those_that_are_good_enough() -> None:
    def row(name: str, speed: float, quality: float | None) -> dict[str, object]:
        metrics = {"tokens_per_second": speed} | ({} if quality is None else {"log_prob": quality})
        return {"name": name, "summary": {metric: {"value": value} for metric, value in metrics.items()}}

    rows = [row("slow", 100, -0.3), row("good", 150, -0.4), row("poor", 300, -0.9), row("unscored", 500, None)]
    for quality, name in ((-0.35, "slow"), (-0.4, "good"), (-2.0, "poor")):
        found = fastest_at(rows, quality, "tokens_per_second")
        assert found is not None and found["name"] == name
    assert fastest_at(rows, -0.1, "tokens_per_second") is None
