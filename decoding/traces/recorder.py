"""TraceRecorder: drafted layers become rows, and are labelled when their prompt is done.

At full widths what the target selects does not depend on what was drafted. So every layer that was
drafted can be labelled by its paths, those below a layer that failed too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from decoding.dice.verdict import NEVER, needs
from decoding.errors import UserError
from decoding.forest.tree import TokenForest
from decoding.policies.base import DraftContext
from decoding.results import LayerEvent, Recorder
from decoding.traces.schema import Column, ContextFeatures


@dataclass
class _Drafted:
    """A drafted layer that waits for its labels."""

    row: dict[str, Any]
    depth: int  # tokens after the prompt
    paths: list[int]  # of its candidates, as `_Paths` names them
    scored: list[bool]  # before the iteration


class _Paths:
    """A name for the tokens of each path: a node that died and came back is another node, but the
    same path.
    """

    def __init__(self, forest: TokenForest) -> None:
        self._forest = forest
        self._names: dict[int, int] = {0: 0}
        self._known: dict[tuple[int, int], int] = {}

    def of(self, node: int) -> int:
        """The name of the path that ends in a node."""
        if node not in self._names:
            self._names[node] = self.child(self._forest.parents[node], self._forest.tokens[node])
        return self._names[node]

    def child(self, parent: int, token: int) -> int:
        """The name of a node's path and one token more."""
        return self._known.setdefault((self.of(parent), token), len(self._known) + 1)


class TraceRecorder(Recorder):
    """A decoder's recorder that turns drafted layers into rows.

    Args:
        features: computes the feature columns.
        columns: of one's own.
    """

    def __init__(self, features: ContextFeatures, columns: Sequence[Column] = ()) -> None:
        self._features, self._columns = features, columns
        self.rows: list[dict[str, Any]] = []
        self._prompt_id, self._split = "", ""

    def start(self, prompt_id: str, split: str) -> None:
        """A prompt begins."""
        self._prompt_id, self._split = prompt_id, split
        self._waiting: list[_Drafted] = []
        self._selected: list[dict[int, int]] = []  # by depth: the place of each path that the target selected
        self._paths: _Paths | None = None

    def restart(self) -> None:
        """The prompt begins anew."""
        self.start(self._prompt_id, self._split)

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
            row |= {column.name: column.of(context) for column in self._columns}
            pairs = list(zip(found.parents.tolist(), found.tokens.tolist(), strict=True))
            paths = [self._paths.child(*pair) for pair in pairs]
            self._waiting.append(_Drafted(row, start + i, paths, found.scored.tolist()))
            children = [forest.find(*pair) for pair in pairs]
            above = {node: place for place, node in enumerate(children) if node is not None}
        self._open = self._waiting[len(self._waiting) - len(contexts) :]

    def layer(self, event: LayerEvent) -> None:
        """Note what the target selected.

        Raises:
            UserError: a layer that kept fewer beams than it could: its selection would be another.
        """
        assert self._paths is not None
        asked, widest = event.record.target_width, event.context.draft.root.config.target_width
        if asked < widest:
            raise UserError(
                f"A layer asked for {asked} of {widest} beams, but traces are labelled by what full widths select. "
                "Log them under policy=exploring, or a policy of your own that asks for target_width at every layer."
            )
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
    """need_1..need_size of a layer; what the target had scored needs no draft, what is no candidate
    is NEVER held.
    """
    rank_of = {place: 0 if known else rank for rank, (place, known) in enumerate(zip(places, scored, strict=True), 1)}
    return needs(list(range(size)), [rank_of.get(place, NEVER) for place in range(1, size + 1)], size)
