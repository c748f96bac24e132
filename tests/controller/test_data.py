"""TraceDataModule: padding, splits, batches, few rows, and traces that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from controller.data import TraceDataModule
from controller.features import ContextFeatures
from decoding.errors import UserError
from decoding.traces import TRACE_FEATURES, load_traces, read_manifest, write_manifest, write_shard
from tests.controller.synthetic import CONFIG, H_P, H_Q, write_traces

NAMES = ContextFeatures().names + ContextFeatures().target_names


def rewrite(directory: Path, **columns: object) -> None:
    """Write the shard again with one value in every row of some columns; a list gives the first rows theirs."""
    rows, manifest = load_traces(directory)
    changed = [dict(row) for row in rows]
    for name, values in columns.items():
        for i, row in enumerate(changed):
            row[name] = values[i] if isinstance(values, list) and i < len(values) else row[name]
    assert set(columns) <= set(TRACE_FEATURES)
    manifest["shards"] = [write_shard(directory, "traces-00000.parquet", changed, {"trace_key": "key"})]
    write_manifest(directory, manifest)


def test_rows_are_padded_and_split_by_prompt(tmp_path: Path) -> None:
    data = TraceDataModule(write_traces(tmp_path, prompts=10), NAMES, batch_size=16, use_hidden=True)
    assert data.sizes == {
        "features": len(ContextFeatures().names),
        "draft_width": CONFIG.draft_width,
        "target_width": CONFIG.target_width,
        "draft_hidden": H_Q,
        "target_hidden": H_P,
        "target_features": len(ContextFeatures().target_names),
    }
    assert [len(data.rows[split]) for split in ("train", "val", "test")] == [160, 40, 0]
    table, _ = load_traces(tmp_path)
    first = next(row for row in table if row["split"] == "train")
    columns = data.rows["train"].columns
    w = first["draft_width"]
    assert columns["bits"][0].tolist() == first["accept_bits"] + [False] * (CONFIG.draft_width - w)
    torch.testing.assert_close(columns["accept_probs"][0, :w], torch.tensor(first["accept_probs"]))
    assert columns["features"][0].tolist() == first["features"]
    assert columns["target_features"][0].tolist() == first["target_features"]
    assert columns["survivor_slot"][0] == first["survivor_slot"]
    kept, padded = first["kept_width"], columns["slot_deficits"][0]
    assert padded.tolist() == pytest.approx(first["slot_deficits"] + [0.0] * (CONFIG.target_width - kept))


def test_batches_cover_every_row_once(tmp_path: Path) -> None:
    data = TraceDataModule(write_traces(tmp_path, prompts=10), batch_size=50)
    batches = list(data.train_dataloader())
    assert [len(batch["bits"]) for batch in batches] == [50, 50, 50, 10]
    seen = torch.cat([batch["features"] for batch in batches])
    torch.testing.assert_close(seen.sort(0).values, data.rows["train"].columns["features"].sort(0).values)
    assert torch.equal(next(iter(data.val_dataloader()))["bits"], data.rows["val"].columns["bits"][:50])


def test_hidden_vectors_can_be_left_out(tmp_path: Path) -> None:
    sizes = TraceDataModule(write_traces(tmp_path, prompts=10), use_hidden=False).sizes
    assert sizes["draft_hidden"] == sizes["target_hidden"] == 0


def test_hidden_vectors_that_were_not_logged_cannot_be_asked_for(tmp_path: Path) -> None:
    directory = write_traces(tmp_path, prompts=10, hidden=False)
    assert TraceDataModule(directory).sizes["target_hidden"] == 0
    with pytest.raises(UserError, match=r"hold no hidden states.* collect.hidden=true, or leave use_hidden=false"):
        TraceDataModule(directory, use_hidden=True)


@pytest.mark.parametrize(("limit", "prompts"), [(1, 1), (20, 1), (39, 1), (40, 2), (10_000, 16), (None, 16)])
def test_few_rows_are_the_first_prompts_and_whole(tmp_path: Path, limit: int | None, prompts: int) -> None:
    directory = write_traces(tmp_path / "traces", prompts=20)  # of 20 rows each; every fifth is validation
    full, few = TraceDataModule(directory), TraceDataModule(directory, max_train_rows=limit)
    assert len(few.rows["train"]) == 20 * prompts
    assert torch.equal(few.rows["train"].columns["features"], full.rows["train"].columns["features"][: 20 * prompts])
    assert torch.equal(few.rows["val"].columns["features"], full.rows["val"].columns["features"])


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no traces were logged"):
        TraceDataModule(tmp_path / "absent")
    with pytest.raises(UserError, match="max_train_rows is 0; give a whole number of at least 1"):
        TraceDataModule(tmp_path / "absent", max_train_rows=0)
    with pytest.raises(UserError, match="no rows in split 'val'"):
        TraceDataModule(only_train(write_traces(tmp_path / "a", prompts=5)))
    names, target_names = ContextFeatures().names, ContextFeatures().target_names
    other: dict[str, object] = {"version": 2, "names": ["x", *names[1:]], "target_names": target_names}
    with pytest.raises(UserError, match="with the unknown x"):
        TraceDataModule(write_traces(tmp_path / "b", prompts=5, features=other), NAMES)
    other = {"version": 2, "names": names, "target_names": target_names[:-1]}
    with pytest.raises(UserError, match=f"without {target_names[-1]}"):
        TraceDataModule(write_traces(tmp_path / "g", prompts=5, features=other), NAMES)
    with pytest.raises(UserError, match=r"without log_target_support, target_prob_1, .*"):  # as an older version logged
        TraceDataModule(write_traces(tmp_path / "h", prompts=5, features={"version": 1, "names": names}), NAMES)
    rewrite(write_traces(tmp_path / "c", prompts=5), prompt_id=["prompt-1"])
    with pytest.raises(UserError, match="'prompt-1' is in the splits"):
        TraceDataModule(tmp_path / "c")
    rewrite(write_traces(tmp_path / "d", prompts=5), features=[[float("nan")] * len(ContextFeatures().names)])
    with pytest.raises(UserError, match="not finite"):
        TraceDataModule(tmp_path / "d")
    rewrite(write_traces(tmp_path / "e", prompts=5), accept_bits=[[True] * 9])
    with pytest.raises(UserError, match=r"accept_bits .* does not match its widths"):
        TraceDataModule(tmp_path / "e")
    rewrite(write_traces(tmp_path / "i", prompts=5), slot_deficits=[[0.0] * 9])
    with pytest.raises(UserError, match=r"slot_deficits .* does not match its widths"):
        TraceDataModule(tmp_path / "i")
    rewrite(write_traces(tmp_path / "j", prompts=5), target_features=[[float("inf")] * len(target_names)])
    with pytest.raises(UserError, match=r"target_features .* not finite"):
        TraceDataModule(tmp_path / "j")
    rewrite(write_traces(tmp_path / "f", prompts=5), split=["dev"])
    with pytest.raises(UserError, match="a split 'dev'"):
        TraceDataModule(tmp_path / "f")


def only_train(directory: Path) -> Path:
    """The same traces with every prompt in train."""
    manifest = read_manifest(directory)
    assert manifest is not None
    rewrite(directory, split=["train"] * manifest["rows"])
    return directory
