"""Traces: one row per (iteration, committed layer), in Parquet shards beside a manifest. Design section 7."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset, Features, List, Value

from decoding.errors import UserError
from decoding.files import write_whole
from decoding.forest import TokenForest
from decoding.results import LayerEvent
from decoding.sampling import Dice
from decoding.widths import DraftContext, TargetContext

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"

TRACE_FEATURES = Features(
    {
        "prompt_id": Value("string"),
        "split": Value("string"),  # of the task: train / val / test
        "layer": Value("int32"),  # of its iteration, from 1
        "target_width": Value("int32"),  # M
        "draft_width": Value("int32"),  # w; 0 at the layer drawn from the target
        "kept_width": Value("int32"),  # beams committed, finished ones included
        "features": List(Value("float32")),  # [F], named in the manifest
        "target_features": List(Value("float32")),  # [G], named in the manifest: what is known once P is
        "draft_hidden": List(Value("float32")),  # [H_q], mean over the layer's parents; empty unless asked for
        "target_hidden": List(Value("float32")),  # [H_p], at the root; empty unless asked for
        "accept_bits": List(Value("bool")),  # [w], continued in shadow past M
        "accept_probs": List(Value("float32")),  # [w], Σ min(R, Q_i) given the layer's history before draft i
        "survivor_slot": Value("int32"),  # place of the best hypothesis's beam among the draws, from 1; 0: none
        "slot_deficits": List(Value("float32")),  # [kept_width], in the order of draws; see `deficits`
    }
)


class ContextFeatures(Protocol):
    """What turns a context into the features of a row; the controller's own when logging for it."""

    names: list[str]
    target_names: list[str]
    version: int

    def __call__(self, context: DraftContext) -> np.ndarray:
        """Features of a layer before its drafts are drawn, [F] float32."""
        ...

    def of_target(self, context: TargetContext) -> np.ndarray:
        """Features of a layer once its P is known, [G] float32."""
        ...


class TraceRecorder:
    """A decoder's recorder that turns layers into rows.

    Args:
        features: computes the feature columns.
        hidden_sizes: (H_p, H_q), for zeros where a state is unknown; None: hidden states are not logged.
        shadow_seed: seed of the coins that judge the drafts a decoder no longer needs.
    """

    def __init__(self, features: ContextFeatures, hidden_sizes: tuple[int, int] | None, shadow_seed: int) -> None:
        self.shadow: Dice | None = Dice(torch.Generator().manual_seed(shadow_seed))
        self._features = features
        self.needs_hidden = hidden_sizes is not None
        self._hidden_sizes = hidden_sizes or (0, 0)
        self.rows: list[dict[str, Any]] = []
        # This prompt's rows, with the kept beams and their slots: no more, since events hold whole distributions.
        self._open: list[tuple[dict[str, Any], list[tuple[int, float]], list[int]]] = []
        self._forest = TokenForest()
        self._prompt_id, self._split = "", ""

    def start(self, prompt_id: str, split: str) -> None:
        """A prompt begins."""
        self._prompt_id, self._split = prompt_id, split
        self._open = []

    def drafted(
        self, forest: TokenForest, beams: list[tuple[int, float]], layers: list[list[tuple[int, float]]]
    ) -> None:
        """Rows are made of what is judged; only the forest is kept."""
        self._forest = forest

    def layer(self, event: LayerEvent) -> None:
        """Add a row; what became of its beams comes later."""
        context, record = event.context.draft, event.record
        target_size, draft_size = self._hidden_sizes
        row = {
            "prompt_id": self._prompt_id,
            "split": self._split,
            "layer": context.layer,
            "target_width": record.target_width,
            "draft_width": record.draft_width,
            "kept_width": len(event.kept),
            "features": self._features(context),
            "target_features": self._features.of_target(event.context),
            "draft_hidden": _sized(context.draft_hidden, draft_size),
            "target_hidden": _sized(context.root.target_hidden, target_size),
            "accept_bits": [],
            "accept_probs": [],
        }
        if event.verdict is not None:
            row["accept_bits"] = event.verdict.bits
            row["accept_probs"] = event.verdict.probabilities
        self._open.append((row, event.kept, event.slots))

    def end(self, best_path: list[int]) -> None:
        """Fill in what became of the beams: row d committed the tokens at depth d."""
        behind = deficits([kept for _, kept, _ in self._open], self._forest.parents, best_path)
        for depth, (row, _, slots) in enumerate(self._open):
            node = best_path[depth] if depth < len(best_path) else None
            row["survivor_slot"] = slots.index(node) + 1 if node in slots else 0
            row["slot_deficits"] = [behind[depth][slot] for slot in slots]
            self.rows.append(row)
        self._open = []

    def take_rows(self) -> list[dict[str, Any]]:
        """Hand over the finished rows."""
        rows, self.rows = self.rows, []
        return rows


def deficits(
    layers: Sequence[Sequence[tuple[int, float]]], parents: Sequence[int], best_path: Sequence[int]
) -> list[dict[int, float]]:
    """How far behind the best each beam's line was when it ended, in nats.

    A beam's line are its descendants. At the last layer that holds one of them, its deficit is the weight of that
    layer's best beam less that of its heaviest descendant; beams of the best hypothesis have none. What would have been
    lost with the others, if only some had been kept, is the least deficit among these.

    Args:
        layers: each layer's beams as (node, weight).
        parents: of every node.
        best_path: nodes of the best hypothesis, by layer.

    Returns:
        [layers] of {node: deficit}, 0 or more.
    """
    found: list[dict[int, float]] = [{} for _ in layers]
    for last in reversed(range(len(layers))):
        best = max(weight for _, weight in layers[last])
        for node, weight in sorted(layers[last], key=lambda beam: -beam[1]):
            for depth in range(last, -1, -1):  # up to the ancestors of a heavier or longer line
                if node in found[depth]:
                    break
                found[depth][node] = best - weight
                node = parents[node]
    for of_layer, node in zip(found, best_path, strict=False):
        of_layer[node] = 0.0
    return found


def write_shard(directory: Path, name: str, rows: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Write rows as one Parquet file, under a temporary name until it is whole.

    Args:
        about: `trace_key` and `feature_names`, written into the file's metadata.

    Returns:
        The shard's entry for the manifest.
    """
    columns = {column: [row[column] for row in rows] for column in TRACE_FEATURES}
    table = Dataset.from_dict(columns, features=TRACE_FEATURES).data.table
    metadata = {
        **(table.schema.metadata or {}),
        b"dsbd": json.dumps(about | {"schema_version": SCHEMA_VERSION}).encode(),
    }
    target = directory / name
    partial = target.with_suffix(f".{os.getpid()}.partial")
    try:
        pq.write_table(table.replace_schema_metadata(metadata), partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return {"file": name, "rows": len(rows), "sha256": hashlib.sha256(target.read_bytes()).hexdigest()}


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, under a temporary name until it is whole."""
    write_whole(directory / MANIFEST, json.dumps(manifest, indent=2, default=str).encode() + b"\n")


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a trace directory, or None if there is none.

    Raises:
        UserError: it is not a manifest of this schema.
    """
    path = Path(directory) / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        version = manifest["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a trace manifest ({type(error).__name__}). Delete the directory to collect the traces "
            "again."
        ) from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}; this code reads version {SCHEMA_VERSION}. Collect the traces again."
        )
    return manifest


def load_traces(directory: str | Path) -> tuple[Dataset, dict[str, Any]]:
    """Read all shards of a trace directory.

    Returns:
        The rows, and the manifest.

    Raises:
        UserError: the directory, a shard or the manifest is missing, truncated, changed or foreign.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(
            f"{directory} holds no {MANIFEST}: no traces were logged there. Run python -m decoding.collect, or point "
            "collect.traces_dir elsewhere."
        )
    if not manifest.get("complete"):
        raise UserError(
            f"The traces in {directory} are incomplete ({manifest.get('rows', 0)} rows so far). Run python -m "
            "decoding.collect with the same settings: it goes on where it stopped."
        )
    tables = [_read_shard(directory / entry["file"], entry, manifest["trace_key"]) for entry in manifest["shards"]]
    if not tables:
        raise UserError(f"The traces in {directory} hold no rows. Raise collect.train_prompts and collect again.")
    return Dataset(pa.concat_tables(tables)), manifest


def _read_shard(path: Path, entry: dict[str, Any], trace_key: str) -> pa.Table:
    again = "Delete the directory to collect the traces again."
    if not path.exists():
        raise UserError(f"The trace shard {path} is named in the manifest but missing. {again}")
    content = path.read_bytes()
    try:
        table = pq.read_table(pa.BufferReader(content))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"The trace shard {path} cannot be read; it may be truncated ({error}). {again}") from error
    about = json.loads((table.schema.metadata or {}).get(b"dsbd", b"{}"))
    if about.get("trace_key") != trace_key:
        raise UserError(f"The trace shard {path} belongs to another collection than its manifest. {again}")
    if table.num_rows != entry["rows"]:
        raise UserError(
            f"The trace shard {path} holds {table.num_rows} rows; its manifest says {entry['rows']}. {again}"
        )
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise UserError(f"The trace shard {path} was changed since it was written. {again}")
    return table


def _sized(hidden: np.ndarray | None, size: int) -> np.ndarray:
    """The state, zeros where it is unknown; nothing where none is logged."""
    return np.zeros(size, dtype=np.float32) if hidden is None or not size else hidden
