"""Traces: one row per drafted layer of an iteration, in Parquet shards beside a manifest. Design section 7.

At full widths what the target selects does not depend on what was drafted. So once a prompt is decoded, every layer
that was drafted can be labelled by its paths, those below a layer that failed too.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value

from decoding.errors import UserError
from decoding.files import write_whole
from decoding.forest import TokenForest
from decoding.results import LayerEvent
from decoding.sampling import Dice
from decoding.verdict import NEVER, needs
from decoding.widths import DraftContext

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"

TRACE_FEATURES = Features(
    {
        "prompt_id": Value("string"),
        "split": Value("string"),  # of the task: train / val / test
        "iteration": Value("int32"),
        "layer": Value("int32"),  # from 1
        "reached": Value("bool"),  # all layers above passed
        "drafts": Value("int32"),  # drafted and sent to the target
        "features": List(Value("float32")),  # [F] of the layer, named in the manifest
        "candidates": List(Value("float32")),  # [C * G], in draft order; the G are named in the manifest
        "parents": List(Value("int32")),  # [C] place among the candidates of the layer above; -1 at the first layer
        "places": List(Value("int32")),  # [C] in the target's selection, from 1; 0: not selected
        "need": List(Value("int32")),  # [<= R] drafts, in draft order, that hold the first j selected; -1: not ranked
    }
)


class ContextFeatures(Protocol):
    """What turns a context into the features of a row; the controller's own when logging for it."""

    names: list[str]
    candidate_names: list[str]
    version: int

    def of_layer(self, context: DraftContext) -> np.ndarray:
        """What is known of a layer as a whole, [F] float32."""
        ...

    def of_candidates(self, context: DraftContext) -> np.ndarray:
        """What is known of each candidate by itself, [C, G] float32."""
        ...


@dataclass
class _Drafted:
    """A drafted layer that waits for its labels."""

    row: dict[str, Any]
    depth: int  # tokens after the prompt
    paths: list[int]  # of its candidates, as `_Paths` names them
    scored: list[bool]  # before the iteration


class _Paths:
    """A name for the tokens of each path: a node that died and came back is another node, but the same path."""

    def __init__(self, forest: TokenForest) -> None:
        self._forest = forest
        self._names: dict[int, int] = {0: 0}
        self._known: dict[tuple[int, int], int] = {}

    def of(self, node: int) -> int:
        """Of the path that ends in a node."""
        if node not in self._names:
            self._names[node] = self.child(self._forest.parents[node], self._forest.tokens[node])
        return self._names[node]

    def child(self, parent: int, token: int) -> int:
        """Of a node's path and one token more."""
        return self._known.setdefault((self.of(parent), token), len(self._known) + 1)


class TraceRecorder:
    """A decoder's recorder that turns drafted layers into rows.

    Args:
        features: computes the feature columns.
    """

    needs_hidden = False
    shadow: Dice | None = None  # under shared noise there are no coins

    def __init__(self, features: ContextFeatures) -> None:
        self._features = features
        self.rows: list[dict[str, Any]] = []
        self._prompt_id, self._split = "", ""

    def start(self, prompt_id: str, split: str) -> None:
        """A prompt begins."""
        self._prompt_id, self._split = prompt_id, split
        self._waiting: list[_Drafted] = []
        self._selected: list[dict[int, int]] = []  # by depth: the place of each path that the target selected
        self._paths: _Paths | None = None

    def drafted(
        self,
        forest: TokenForest,
        beams: list[tuple[int, float]],
        layers: list[list[tuple[int, float]]],
        contexts: list[DraftContext],
    ) -> None:
        """Make a row of each layer; its labels come when the prompt is done."""
        self._forest = forest
        if self._paths is None:
            self._paths = _Paths(forest)
        start, above = len(self._selected), {node: -1 for node, _ in beams}
        for i, context in enumerate(contexts):
            found = context.candidates
            assert found is not None, "traces are logged under shared noise"
            row = {
                "prompt_id": self._prompt_id,
                "split": self._split,
                "iteration": context.root.iteration,
                "layer": context.layer,
                "reached": i == 0,
                "drafts": len(layers[i]) if i < len(layers) else 0,
                "features": self._features.of_layer(context),
                "candidates": self._features.of_candidates(context).ravel(),
                "parents": [above.get(node, -1) for node in found.parents.tolist()],
            }
            pairs = list(zip(found.parents.tolist(), found.tokens.tolist(), strict=True))
            paths = [self._paths.child(*pair) for pair in pairs]
            self._waiting.append(_Drafted(row, start + i, paths, found.scored.tolist()))
            children = [forest.find(*pair) for pair in pairs]
            above = {node: place for place, node in enumerate(children) if node is not None}
        self._open = self._waiting[len(self._waiting) - len(contexts) :]

    def layer(self, event: LayerEvent) -> None:
        """Note what the target selected."""
        assert self._paths is not None
        paths = [self._paths.of(node) for node in event.slots]
        self._selected.append({path: place for place, path in enumerate(paths, 1)})
        below = event.record.layer  # the layer below this one, counted from 0
        if event.record.draft_width and event.record.passed and below < len(self._open):
            self._open[below].row["reached"] = True

    def end(self, best_path: list[int]) -> None:
        """Label the layers that the target came to."""
        for drafted in self._waiting:
            if drafted.depth < len(self._selected):
                selected = self._selected[drafted.depth]
                places = [selected.get(path, 0) for path in drafted.paths]
                drafted.row |= {"places": places, "need": _needs(places, drafted.scored, len(selected))}
                self.rows.append(drafted.row)
        self._waiting = []

    def take_rows(self) -> list[dict[str, Any]]:
        """Hand over the finished rows."""
        rows, self.rows = self.rows, []
        return rows


def _needs(places: list[int], scored: list[bool], size: int) -> list[int]:
    """need_1..need_size of a layer; what the target had scored needs no draft, what is no candidate is NEVER held."""
    rank_of = {place: 0 if known else rank for rank, (place, known) in enumerate(zip(places, scored, strict=True), 1)}
    return needs(list(range(size)), [rank_of.get(place, NEVER) for place in range(1, size + 1)], size)


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
