"""TraceDataModule: logged traces as in-memory tensors, split by prompt. One row is one iteration, layer by layer."""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from controller.features import ContextFeatures, check_columns, check_features
from decoding.errors import UserError, reading
from decoding.traces import load_traces

SPLITS = ("train", "val", "test")
Batch = dict[str, Tensor]


class TraceRows(Dataset[Batch]):
    """Iterations of one split; indexed with a list it gives a batch.

    Columns: candidates [N, L, C, G], features [N, L, F] float32; parents, places [N, L, C], need [N, L, R], drafts,
    size [N, L] int64; valid [N, L, C], there, reached [N, L] bool. `need` is padded with 0, `size` its length.
    """

    def __init__(self, columns: Batch) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["drafts"])

    def __getitem__(self, index: Any) -> Batch:
        return {name: column[index] for name, column in self.columns.items()}


class TraceDataModule(LightningDataModule):
    """The traces of a directory.

    Args:
        directory: with Parquet shards and manifest.json.
        batch_size: iterations per batch.
        max_train_rows: train on the first prompts only, as many as have at most so many iterations together; None: all.
        features: those that the network will be given when it decides; None: the built-in ones.

    Raises:
        UserError: no rows, other features, values that are not finite, or a prompt in two splits.
    """

    def __init__(
        self,
        directory: str | Path,
        batch_size: int = 64,
        max_train_rows: int | None = None,
        features: ContextFeatures | None = None,
    ) -> None:
        super().__init__()
        if max_train_rows is not None and max_train_rows < 1:
            raise UserError(
                f"max_train_rows is {max_train_rows}; give a whole number of at least 1, or null to train on all."
            )
        rows, self.manifest = load_traces(Path(directory))
        self.batch_size = batch_size
        with reading(f"What was collected in {directory}", "Collect the traces again."):
            self._fill(rows, str(directory), max_train_rows, features)

    def _fill(self, rows: Any, directory: str, max_train_rows: int | None, features: ContextFeatures | None) -> None:
        """Sort the rows of a `datasets.Dataset` by split, checked."""
        features, logged = features or ContextFeatures(), self.manifest["features"]
        check_columns(features)
        found = [*logged.get("names", []), *logged.get("candidate_names", [])]
        check_features(found, [*features.names, *features.candidate_names], f"The traces in {directory} have")
        if logged.get("version") != features.version:
            raise UserError(f"The traces in {directory} are of other features; collect them again.")
        table: pa.Table = rows.with_format("arrow")[:]
        prompts, split = table["prompt_id"].to_pylist(), table["split"].to_pylist()
        _check_splits(prompts, split, directory)
        self.target_width = int(self.manifest["decoding"]["target_width"])
        sizes = len(features.names), len(features.candidate_names)
        columns, first = _columns(table, self.target_width, sizes, directory)
        prompts, splits = [prompts[i] for i in first], np.asarray([split[i] for i in first])
        if max_train_rows is not None:
            splits[_beyond(prompts, splits == "train", max_train_rows)] = "unused"
        self.rows = {
            name: TraceRows({key: column[torch.from_numpy(splits == name)] for key, column in columns.items()})
            for name in SPLITS
        }
        for name in ("train", "val"):
            if not len(self.rows[name]):
                raise UserError(
                    f"The traces in {directory} have no rows in split {name!r}; a controller needs both train and val. "
                    f"Raise collect.{name}_prompts and collect again."
                )

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


def _check_splits(prompts: list[str], split: list[str], directory: str) -> None:
    home: dict[str, str] = {}
    for prompt, name in zip(prompts, split, strict=True):
        if name not in SPLITS:
            raise UserError(
                f"The traces in {directory} have a split {name!r}; allowed are {', '.join(SPLITS)}. Collect them again."
            )
        if home.setdefault(prompt, name) != name:
            raise UserError(
                f"Prompt {prompt!r} is in the splits {home[prompt]!r} and {name!r} of {directory}: validation would "
                "be optimistic. Give each prompt one split (data.shares=null is for evaluation only) and collect again."
            )


def _columns(table: pa.Table, target_width: int, counted: tuple[int, int], directory: str) -> tuple[Batch, list[int]]:
    """All iterations as tensors, and the first row of each; `counted` are F and G."""
    layer = table["layer"].to_numpy().astype(np.int64)
    first = np.flatnonzero(layer == 1)
    iteration = np.cumsum(layer == 1) - 1  # [rows]
    counts = np.asarray([len(row) for row in table["places"]])
    needs = np.asarray([len(row) for row in table["need"]])
    shape = len(first), int(layer.max()), int(counts.max())
    at = torch.from_numpy(iteration), torch.from_numpy(layer - 1)

    def laid_out(name: str, trailing: tuple[int, ...], lengths: np.ndarray | None, dtype: torch.dtype) -> Tensor:
        flat = table[name].combine_chunks()
        values = (flat if lengths is None and not trailing else flat.flatten()).to_numpy(zero_copy_only=False)
        if not np.isfinite(np.asarray(values, dtype=np.float64)).all():
            raise UserError(f"Column {name} of the traces in {directory} is not finite. Collect the traces again.")
        asked = len(table) * prod(trailing) if lengths is None else int(lengths.sum()) * prod(trailing[1:])
        if len(values) != asked:
            raise UserError(
                f"Column {name} of the traces in {directory} has {len(values)} values where its names say {asked}: "
                "give the features a name for each value, and collect again."
            )
        rows = torch.zeros(len(table), *trailing, dtype=dtype)
        if lengths is None:
            rows.copy_(torch.from_numpy(np.array(values)).view(rows.shape))
        else:
            inside = torch.arange(trailing[0]) < torch.from_numpy(lengths)[:, None]
            rows[inside] = torch.from_numpy(np.array(values)).to(dtype).view(-1, *trailing[1:])
        made = torch.zeros(*shape[:2], *trailing, dtype=dtype)
        made[at] = rows
        return made

    numbers = torch.int64
    columns = {
        "features": laid_out("features", counted[:1], None, torch.float32),
        "candidates": laid_out("candidates", (shape[2], counted[1]), counts, torch.float32),
        "parents": laid_out("parents", shape[2:], counts, numbers),
        "places": laid_out("places", shape[2:], counts, numbers),
        "need": laid_out("need", (target_width,), needs, numbers),
        "drafts": laid_out("drafts", (), None, numbers),
        "reached": laid_out("reached", (), None, torch.bool),
    }
    lengths, sizes = torch.zeros(2, *shape[:2], dtype=numbers)
    lengths[at], sizes[at] = torch.from_numpy(counts), torch.from_numpy(needs)
    columns |= {"valid": torch.arange(shape[2]) < lengths[..., None], "size": sizes, "there": lengths > 0}
    return columns, first.tolist()
