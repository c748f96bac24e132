"""A prompt at which a model returns NaN: told of and passed over by all rows of an evaluation and of a bench; strict
stops."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from decoding import ModelPair, UserError
from decoding.dice.sampling import NotNumbers
from decoding.measure.turns import Record, leave_out
from decoding.support.entry import CONF_DIR
from tests.decoding.measure.test_turns import PROMPTS, record, run_turns
from tests.small_pair import small_pair

SIGN = "\u00a7"  # a byte of it makes the target return NaN, whatever comes after it
METHODS = {
    "evaluate": ["policies=[fixed]", "grid.widths=[2]", "references=[hf_beam_sample,beam_sample]"],
    "decoding.bench": [
        "rows=[{method: hf_sample}, {method: beam_sample, target_width: 2}, {method: fixed, target_width: 2}, "
        "{method: fixed, target_width: 2, batch_size: 2}, {method: hf_beam_search, target_width: 2}]",
        "roofline=false",
        "repeats=2",
    ],
}
COMMANDS = pytest.mark.parametrize("command", METHODS)


def with_holes(which: str = "target") -> ModelPair:
    """The small pair, one of its models with NaN in the embeddings of tokens that neither ever writes."""
    small = small_pair()
    pair = ModelPair(small.target, small.draft, small.tokenizer, engine="transformers")  # which knows of biases
    tokens = pair.tokenizer(SIGN)["input_ids"]
    with torch.no_grad():
        pair.models[which].get_input_embeddings().weight[tokens] = torch.nan
        for model in pair.models.values():
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(pair.vocab_size))
            model.lm_head.bias[tokens] = -1e4
    return pair


def draft_with_holes() -> ModelPair:
    """Holes that only rows with a draft meet."""
    return with_holes("draft")


def config(command: str, output: Path, holes: list[int], *overrides: str, pair: str = "with_holes") -> DictConfig:
    """Eight prompts, some of which hold the sign."""
    path = output / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"def f{i}(x{SIGN if i in holes else ''}):\n"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["data=jsonl", f"data.path={path}", "data.shares=null", f"paths.output_dir={output / 'out'}"]
    settings += ["decoding.max_new_tokens=4", "decoding.target_width=2", "bootstrap=20", "prompts.warmup=2"]
    name = command.rpartition(".")[2]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        cfg = compose(name, [*settings, "prompts.limit=8", *METHODS[command], *overrides])
    with open_dict(cfg):
        cfg.pair = {"_target_": f"{__name__}.{pair}"}
    return cfg


def run(command: str, cfg: DictConfig) -> dict[str, Any]:
    found: dict[str, Any] = importlib.import_module(command).main(cfg)
    return found


def ids(results: dict[str, Any]) -> dict[str, list[str]]:
    return {row["name"]: [prompt["prompt_id"] for prompt in row["prompts"]] for row in results["rows"]}


@COMMANDS
@pytest.mark.parametrize("pair", ["with_holes", "draft_with_holes"])
def test_such_prompts_are_passed_over(
    command: str, pair: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By all rows, those too that could decode them; with their lines, on the screen and in the results."""
    found = run(command, config(command, tmp_path, [2, 5], pair=pair))
    left = ["p0", "p1", "p3", "p4", "p6", "p7"]
    repeats = 2 if command == "decoding.bench" else 1
    assert set(map(tuple, ids(found).values())) == {(*left,) * repeats} and not found["failed"]
    assert [prompt["id"] for prompt in found["prompts"]] == left
    where = str(tmp_path / "prompts.jsonl")
    assert found["skipped"] == [{"id": f"p{i}", "where": f"{where}, line {i + 1}"} for i in (2, 5)]
    assert found["provenance"]["task"]["prompts"] == 6 and found["complete"]
    assert all(row["summary"]["log_prob"]["value"] < 0 for row in found["rows"])
    said = capsys.readouterr()
    assert f"Prompt 'p2' ({where}, line 3) is passed over" in said.err
    assert f"Passed over, since a model returned NaN there: p2 ({where}, line 3)" in " ".join(said.out.split())


def test_the_rest_is_as_without_them(tmp_path: Path) -> None:
    """Token for token, in batches too."""

    def texts(holes: list[int], name: str, *more: str) -> dict[str, list[Any]]:
        (tmp_path / name).mkdir()
        found = run("evaluate", config("evaluate", tmp_path / name, holes, *more))
        return {row["name"]: [(p["prompt_id"], p["tokens"]) for p in row["prompts"]] for row in found["rows"]}

    whole = texts([], "whole")
    expected = {name: [each for each in rows if each[0] not in ("p2", "p5")] for name, rows in whole.items()}
    assert texts([2, 5], "alone") == texts([2, 5], "together", "batch_size=3") == expected


@COMMANDS
def test_strict_stops(command: str, tmp_path: Path) -> None:
    with pytest.raises(NotNumbers, match="target model returned NaN"):
        run(command, config(command, tmp_path, [2], "strict=true"))


def test_a_row_that_is_hardly_able_fails_and_spoils_no_other(tmp_path: Path) -> None:
    """As a draft in 16 bits may be that overflows everywhere."""
    found = run("evaluate", config("evaluate", tmp_path, [0, 1, 2, 3, 4], pair="draft_with_holes"))
    assert len(ids(found)["beam_sample M=2"]) == 8 and found["skipped"] == []
    assert found["failed"] == {
        "fixed M=2 w=8 γ=3": "5 of 8 prompts make a model return NaN, 'p0' first; check the weights and try "
        "dtype=float32."
    }


def test_where_nothing_is_left_the_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="8 of 8 prompts make a model return NaN, 'p0' first"):
        run("evaluate", config("evaluate", tmp_path, list(range(8))))


def test_a_run_that_goes_on_knows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the turns that are kept: nothing is decoded again, and the same prompts are left out."""
    from decoding.measure.journal import Journal

    monkeypatch.setattr(Journal, "close", lambda self: None)
    cfg = config("evaluate", tmp_path, [2, 5], "prompts.warmup=0")
    first = run("evaluate", cfg)
    monkeypatch.setattr("decoding.measure.turns.measure", lambda *_: pytest.fail("decoded again"))
    again = run("evaluate", cfg)
    assert ids(again) == ids(first) and again["skipped"] == first["skipped"]


def test_readings_of_a_turn_outlive_the_prompt_that_they_were_with() -> None:
    each: Record = record("a")
    run_turns([each], PROMPTS)
    each.repeats[0][0].readings = ["reading"]  # type: ignore[list-item]
    each.unable["p0"] = None
    assert [prompt.id for prompt in leave_out([each], PROMPTS)] == ["p1", "p2"]
    assert [found.readings for found in each.repeats[0]] == [["reading"], []]
