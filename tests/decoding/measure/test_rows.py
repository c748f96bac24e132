"""Rows: a grid of settings, rows one by one, and policies of anybody's own."""

from __future__ import annotations

from typing import Any

import pytest

from decoding import DecodingConfig, UserError, WidthPolicy
from decoding.measure.methods import METHODS, POLICIES, find_method
from decoding.measure.rows import axes_of, make_rows, read_rows
from decoding.policies.base import DRAFT_DEPTH, DRAFT_WIDTH, Knob, TargetContext
from decoding.support.entry import CONF_DIR
from tests.small_pair import small_pair

CONFIG = DecodingConfig(target_width=4, draft_width=6, draft_depth=3, top_k=10)
HALF = f"{__name__}.HalfWidth"


class HalfWidth(WidthPolicy):
    """A user's policy: M is a share of the widest."""

    name = "half"
    knobs = (DRAFT_WIDTH, DRAFT_DEPTH, Knob("fraction", "f", grid=(0.25, 0.5)))

    def __init__(self, fraction: float = 0.5, rounded: str = "up") -> None:
        self.fraction, self.rounded = fraction, rounded

    def target_width(self, context: TargetContext) -> int:
        return max(1, round(self.fraction * context.draft.root.config.target_width))

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "fraction": self.fraction, "rounded": self.rounded}


def names(policies: list[str], **grid: list[float]) -> list[str]:
    return [row.name for row in make_rows(policies, CONFIG, grid)]


def test_rows_are_the_grid_with_reference_rows_at_every_width() -> None:
    assert names(["fixed", "threshold"], widths=[2, 4], draft_widths=[3, 6], thresholds=[0.5, 0.9]) == [
        "beam_sample M=2",
        "beam_sample M=4",
        "hf_beam_sample M=2",
        "hf_beam_sample M=4",
        "fixed M=2 w=3 γ=3",
        "fixed M=2 w=6 γ=3",
        "fixed M=4 w=6 γ=3",  # w=3 could never pass
        "threshold M=4 w=6 γ=3 threshold=0.5",
        "threshold M=4 w=6 γ=3 threshold=0.9",
    ]


def test_rows_take_only_the_axes_of_their_method() -> None:
    found = names(
        ["speculative", "multi_draft", "hf_assisted", "fixed"], widths=[4], depths=[2, 4], asked_widths=[2, 4]
    )
    assert [name for name in found if "beam_sample" not in name] == [
        "speculative M=1 γ=2",
        "speculative M=1 γ=4",
        "multi_draft M=1 w=6 γ=2",
        "multi_draft M=1 w=6 γ=4",
        "hf_assisted M=1",
        "fixed M=2/4 w=6 γ=2",
        "fixed M=4 w=6 γ=2",
        "fixed M=2/4 w=6 γ=4",
        "fixed M=4 w=6 γ=4",
    ]
    assert names(["beam_sample"]).count("beam_sample M=4") == 1


def test_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match=r"'fixd'; choose among multinomial, beam_sample"):
        names(["fixd"])
    with pytest.raises(UserError, match=r"grid holds width; its axes are widths"):
        names(["fixed"], width=[2])
    with pytest.raises(UserError, match=r"draft_width \(6\) is less than target_width \(8\)"):
        names(["fixed"], widths=[8])
    with pytest.raises(UserError, match="no row for 'fixed': asked_widths asks for more than the target width"):
        names(["fixed"], asked_widths=[9])
    with pytest.raises(UserError, match="final_widths asks for more"):
        names(["fixed"], widths=[4], final_widths=[8])
    with pytest.raises(UserError, match=r"grid\.surpluses is given with exact=true"):
        make_rows(["fixed"], CONFIG.with_changes(exact=True), {"surpluses": ["keep", "drop"]})
    with pytest.raises(UserError, match="references holds 'hf_beam'; choose among"):
        make_rows(["fixed"], CONFIG, {}, references=["hf_beam"])
    with pytest.raises(UserError, match=r"grid\.widths is 4; give a list, such as \[4\]"):
        make_rows(["fixed"], CONFIG, {"widths": 4})


def test_rows_that_draft_nothing_are_there_once_for_each_width() -> None:
    wide = CONFIG.with_changes(target_width=8, draft_width=8)
    grid = {"widths": [4, 8], "draft_widths": [4, 8], "depths": [0, 2]}
    found = [row.name for row in make_rows(["fixed"], wide, grid, references=())]
    assert [name for name in found if "γ=0" in name] == ["fixed M=4 w=4 γ=0", "fixed M=8 w=8 γ=0"]
    grid = {"widths": [8], "draft_widths": [6, 8], "depths": [0], "shares": [0.5, 0.9]}
    assert len(make_rows(["mass"], wide, grid, references=())) == 2


@pytest.mark.parametrize(("widths", "expected"), [([], 4), ([1, 2], 4), ([6], 6)])
def test_policies_that_choose_m_have_the_configs_width_or_more(widths: list[int], expected: int) -> None:
    rows = make_rows(["threshold", "fixed"], CONFIG, {"widths": widths}, references=())
    assert {row.config.target_width for row in rows if row.method.name == "threshold"} == {expected}
    assert {row.config.target_width for row in rows if row.method.name == "fixed"} == set(widths or [4])


def test_the_paper_has_its_own_rules_where_others_are_exact() -> None:
    (row,) = make_rows(["paper"], CONFIG.with_changes(exact=True), {}, references=())
    assert (row.config.surplus, row.config.refill, row.config.exact) == ("drop", "full", False)


@pytest.mark.parametrize("name", ["beam_sample", "multinomial", "beam_search"])
def test_references_keep_their_beams_whatever_the_policies_do(name: str) -> None:
    (row,) = make_rows([name], CONFIG.with_changes(one_beam_cache=True), {}, references=())
    assert not row.config.one_beam_cache


# -------------------------------------------------------------------------------------- the registry


def test_every_policy_says_what_tables_and_command_lines_need() -> None:
    for name, policy in POLICIES.items():
        method = METHODS[name]
        assert (policy.name, policy.knobs, policy.family) == (name, method.knobs, method.family)
        assert policy.family in ("hand-set", "learned", "control")
    hand_set = {name for name, method in METHODS.items() if method.family == "hand-set"}
    assert hand_set == {"beam_sample", "fixed", "threshold", "expected", "mass", "gap", "entropy", "key_gap"}


def test_evaluate_and_bench_configs_list_what_there_is() -> None:
    """The comments and the axes of conf/ follow the registry."""
    evaluate, bench = ((CONF_DIR / f"{name}.yaml").read_text() for name in ("evaluate", "bench"))
    assert [name for name in METHODS if name not in evaluate] == [] == [name for name in METHODS if name not in bench]
    assert [axis for axis in axes_of(METHODS.values()) if f"  {axis}:" not in evaluate] == []
    for knob in axes_of(METHODS.values()).values():
        grid = ", ".join(map(str, knob.grid))
        assert grid in evaluate, f"the grid of {knob.name} is told in a comment"


def test_a_knobs_own_grid_is_taken_where_values_are_null() -> None:
    assert [name.rsplit("=")[-1] for name in names(["mass"], shares=None)[2:]] == ["0.6", "0.8", "0.95"]
    assert len(names(["mass"])) == 3


# ------------------------------------------------------------------------------------- one by one


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ({"method": "gap", "gap": 0.3, "stop_entropy": 1.5}, "gap M=4 w=6 γ=3 gap=0.3 stop=1.5"),
        ({"method": "entropy", "scale": 0.5, "exact": True}, "entropy M=4 w=6 γ=3 scale=0.5 exact"),
        ({"method": "bandit", "asked_width": 2, "batch_size": 2}, "bandit M=2/4 w=6 γ=3, batch 2"),
        ({"method": "fixed", "draft": "ngram", "surplus": "drop"}, "fixed M=4 w=6 γ=3 surplus=drop draft=ngram"),
        ({"method": HALF, "fraction": 0.25, "rounded": "no"}, f"{HALF} M=4 w=6 γ=3 f=0.25 rounded=no"),
    ],
)
def test_a_row_of_the_bench_takes_every_knob(entry: dict[str, Any], name: str) -> None:
    (row,) = read_rows([entry], CONFIG)
    assert row.name == name


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"target_width": 2}, r"rows\[0\].method is None; choose among multinomial, beam_sample, speculative,"),
        ("fixed", r"rows\[0\] is 'fixed'; give a mapping"),
        ({"method": "hf_sample", "batch_size": 8}, r"batch_size is not a setting of hf_sample.*one prompt at a time"),
        ({"method": "fixed", "batch_size": 0}, "batch_size is 0; give a whole number of at least 1"),
        ({"method": "fixed", "exact": 1}, r"rows\[0\].exact is 1; give true or false"),
        ({"method": "fixed", "draft_width": 1}, r"rows\[0\] \(fixed\): draft_width \(1\) is less than target_width"),
        ({"method": "gap", "gap": "wide"}, r"rows\[0\].gap is 'wide'; give a number"),
        ({"method": "gap", "share": 0.5}, r"rows\[0\].share is not a setting of gap; it takes draft_width, .*gap"),
        ({"method": "fixed", "asked_width": 1.5}, r"asked_width is 1.5; give a whole number"),
        ({"method": HALF, "half": 1}, r"half is not a setting of .*HalfWidth; it takes fraction, rounded"),
        ({"method": "no.such.Policy"}, r"rows\[0\].method is 'no.such.Policy', which needs no.such.Policy"),
        ({"method": "json.JSONDecoder"}, "which is no WidthPolicy; derive it from decoding.WidthPolicy"),
    ],
)
def test_a_row_of_the_bench_is_refused_in_a_sentence(entry: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        read_rows([entry], CONFIG)


def test_rows_of_the_bench_differ() -> None:
    with pytest.raises(UserError, match="rows is empty"):
        read_rows([], CONFIG)
    with pytest.raises(UserError, match=r"rows\[1\] is rows\[0\] again"):
        read_rows([{"method": "hf_sample"}] * 2, CONFIG)


# ----------------------------------------------------------------------------- policies of one's own


def test_a_policy_of_ones_own_is_a_row_like_any_other() -> None:
    rows = make_rows([HALF, "mass"], CONFIG, {"fraction": None, "depths": [2], "shares": [0.5]}, references=())
    assert [row.name for row in rows] == [
        f"{HALF} M=4 w=6 γ=2 f=0.25",
        f"{HALF} M=4 w=6 γ=2 f=0.5",
        "mass M=4 w=6 γ=2 share=0.5",
    ]
    built: Any = rows[0].build(small_pair())
    assert built.func.__self__.policy.describe() == {"name": "half", "fraction": 0.25, "rounded": "up"}
    assert rows[0].method.family == "hand-set"
    with pytest.raises(UserError, match=r"grid holds fractions; its axes are widths.*fraction"):
        make_rows([HALF], CONFIG, {"fractions": [0.5]})


def test_a_yaml_in_conf_policy_names_a_row(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy").mkdir()
    for name, lines in {
        "quarter": f"_target_: {HALF}\nfraction: 0.25\nrounded: down",
        "asking": f"_target_: {HALF}\nfraction: ???",
        "empty": "fraction: 0.25",
    }.items():
        (tmp_path / "policy" / f"{name}.yaml").write_text(lines)
    monkeypatch.setattr("decoding.measure.methods.CONF_DIR", tmp_path)
    pair = small_pair()
    (plain, changed) = read_rows([{"method": "quarter"}, {"method": "quarter", "fraction": 0.75}], CONFIG)
    built: list[Any] = [row.build(pair) for row in (plain, changed)]
    described = [generate.func.__self__.policy.describe() for generate in built]
    assert [(about["fraction"], about["rounded"]) for about in described] == [(0.25, "down"), (0.75, "down")]
    with pytest.raises(UserError, match=r"asking\.yaml has no fraction; give it in the row"):
        find_method("asking", METHODS)(pair, CONFIG)
    with pytest.raises(UserError, match=r"empty\.yaml has no _target_"):
        find_method("empty", METHODS)
    with pytest.raises(UserError, match=r"'half'; choose among multinomial, .*quarter, or give the dotted name"):
        find_method("half", METHODS)
