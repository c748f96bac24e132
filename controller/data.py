"""TraceDataModule: logged traces as in-memory tensors, split by prompt. Rows are read once; a batch is one index."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from controller.features import check_features
from decoding.errors import UserError
from decoding.traces import load_traces

SPLITS = ("train", "val", "test")
Batch = dict[str, Tensor]


class TraceRows(Dataset[Batch]):
    """Rows of one split as tensors of equal length; indexed with a list it gives a batch.

    Columns: features [N, F], draft_hidden [N, H_q], target_hidden [N, H_p] float32; bits [N, W] bool;
    target_features [N, G], accept_probs [N, W], slot_deficits [N, R] float32; layer, draft_width, target_width,
    kept_width, survivor_slot [N] int64. W pads to the widest draft width, R to the widest target width.
    """

    def __init__(self, columns: Batch) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["draft_width"])

    def __getitem__(self, index: Any) -> Batch:
        return {name: column[index] for name, column in self.columns.items()}


class TraceDataModule(LightningDataModule):
    """The traces of a directory.

    Args:
        directory: with Parquet shards and manifest.json.
        feature_names: what the network will be given when it decides; traces with others are refused. None: no check.
        batch_size: rows per batch.
        use_hidden: load the hidden vectors, which must have been logged; without them their sizes are 0.
        max_train_rows: train on the first prompts only, as many as have at most so many rows together. None: on all.

    Raises:
        UserError: no rows, other features, no hidden vectors, values that are not finite, or a prompt in two splits.
    """

    def __init__(
        self,
        directory: str | Path,
        feature_names: list[str] | None = None,
        batch_size: int = 512,
        use_hidden: bool = False,
        max_train_rows: int | None = None,
    ) -> None:
        super().__init__()
        if max_train_rows is not None and max_train_rows < 1:
            raise UserError(
                f"max_train_rows is {max_train_rows}; give a whole number of at least 1, or null to train on all."
            )
        where = str(directory)  # in messages
        rows, self.manifest = load_traces(Path(directory))
        self.batch_size = batch_size
        if feature_names is not None:
            features = self.manifest["features"]
            found = [*features["names"], *features.get("target_names", [])]
            check_features(found, feature_names, f"The traces in {where} have")
        if use_hidden and not self.manifest.get("hidden"):
            raise UserError(
                f"The traces in {where} hold no hidden states, and use_hidden is true. Collect traces with "
                "collect.hidden=true, or leave use_hidden=false."
            )
        table: pa.Table = rows.with_format("arrow")[:]
        prompts, split = table["prompt_id"].to_pylist(), np.asarray(table["split"].to_pylist())
        _check_splits(prompts, split, where)
        if max_train_rows is not None:
            split[_beyond(prompts, split == "train", max_train_rows)] = "unused"
        columns = _columns(table, self.manifest, use_hidden, where)
        self.rows = {
            name: TraceRows({key: column[torch.from_numpy(split == name)] for key, column in columns.items()})
            for name in SPLITS
        }
        for name in ("train", "val"):
            if not len(self.rows[name]):
                raise UserError(
                    f"The traces in {where} have no rows in split {name!r}; a controller needs both train and val. "
                    f"Raise collect.{name}_prompts and collect again."
                )

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of a WidthNet for these traces."""
        columns = self.rows["train"].columns
        return {
            "features": columns["features"].shape[1],
            "draft_width": columns["bits"].shape[1],
            "target_width": columns["slot_deficits"].shape[1],
            "draft_hidden": columns["draft_hidden"].shape[1],
            "target_hidden": columns["target_hidden"].shape[1],
            "target_features": columns["target_features"].shape[1],
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test")

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Batch]:
        rows = self.rows[split]
        order: Any = RandomSampler(rows) if shuffle else SequentialSampler(rows)
        batches: Any = BatchSampler(order, self.batch_size, drop_last=False)
        return DataLoader(rows, sampler=batches, batch_size=None)  # no collating: an index list is a batch


def _beyond(prompts: list[str], train: np.ndarray, limit: int) -> np.ndarray:
    """Train rows [N] of the prompts after the first ones that have at most `limit` rows; the first is kept."""
    rows = Counter(prompt for prompt, used in zip(prompts, train.tolist(), strict=True) if used)  # in order
    kept = {prompt for prompt, total in zip(rows, accumulate(rows.values()), strict=True) if total <= limit}
    kept |= {*list(rows)[:1]}
    return train & np.asarray([prompt not in kept for prompt in prompts])


def _check_splits(prompts: list[str], split: np.ndarray, directory: str) -> None:
    home: dict[str, str] = {}
    for prompt, name in zip(prompts, split.tolist(), strict=True):
        if name not in SPLITS:
            raise UserError(f"The traces in {directory} have a split {name!r}; allowed are {', '.join(SPLITS)}.")
        if home.setdefault(prompt, name) != name:
            raise UserError(
                f"Prompt {prompt!r} is in the splits {home[prompt]!r} and {name!r} of {directory}: validation would "
                "be optimistic. Give each prompt one split (data.shares=null is for evaluation only) and collect again."
            )


def _columns(table: pa.Table, manifest: dict[str, Any], use_hidden: bool, directory: str) -> Batch:
    """All rows as tensors."""
    decoding = manifest.get("decoding", {})
    counts = {
        name: torch.from_numpy(table[name].to_numpy().astype(np.int64))
        for name in ("layer", "draft_width", "target_width", "kept_width", "survivor_slot")
    }
    widest = max(int(decoding.get("target_width", 1)), int(counts["kept_width"].max()))  # R
    width = max(int(decoding.get("draft_width", 1)), int(counts["draft_width"].max()))  # W
    columns = counts | {
        "features": _matrix(table, "features", directory),
        "target_features": _matrix(table, "target_features", directory),
        "slot_deficits": _padded(table, "slot_deficits", counts["kept_width"], widest, directory),
        "bits": _padded(table, "accept_bits", counts["draft_width"], width, directory).bool(),
        "accept_probs": _padded(table, "accept_probs", counts["draft_width"], width, directory),
    }
    for name in ("draft_hidden", "target_hidden"):
        columns[name] = _matrix(table, name, directory) if use_hidden else torch.zeros(len(table), 0)
    return columns


def _matrix(table: pa.Table, name: str, directory: str) -> Tensor:
    """A column of equally long lists; [N, length] float32."""
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    if len(flat) % len(table) or not np.isfinite(flat).all():
        raise UserError(
            f"Column {name} of the traces in {directory} has rows of unequal length or values that are not finite. "
            "Collect the traces again."
        )
    return torch.from_numpy(flat.reshape(len(table), -1))


def _padded(table: pa.Table, name: str, lengths: Tensor, width: int, directory: str) -> Tensor:
    """A column of lists of the given lengths, padded with zeros; [N, width] float32."""
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    inside = torch.arange(width) < lengths[:, None]  # [N, width]
    if int(inside.sum()) != len(flat):
        raise UserError(
            f"Column {name} of the traces in {directory} does not match its widths: {len(flat)} entries, "
            f"{int(inside.sum())} expected. Collect the traces again."
        )
    padded = torch.zeros(len(lengths), width)
    padded[inside] = torch.from_numpy(flat)
    return padded
