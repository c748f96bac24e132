"""Rows of traces: every label against beam sampling of the target alone."""

from __future__ import annotations

from typing import Any

import pytest

from decoding import DecodingConfig, DSBDDecoder, ExploringWidth, FixedWidth, UserError
from decoding.dice.verdict import NEVER
from decoding.forest.tree import TokenForest
from decoding.policies.base import DraftContext
from decoding.results import LayerEvent
from decoding.traces import TraceRecorder
from tests.controller.synthetic import CONFIG, FEATURES, prompts, rows, streams
from tests.small_pair import small_pair

Path_ = tuple[int, ...]


class Selections:
    """A recorder that notes the paths that each step selected, in order."""

    shadow = None
    needs_hidden = False

    def __init__(self) -> None:
        self.layers: list[list[Path_]] = []
        self._forest = TokenForest()

    def drafted(self, forest: TokenForest, *_: Any) -> None:
        self._forest = forest

    def layer(self, event: LayerEvent) -> None:
        self.layers.append([tuple(self._forest.path(node)) for node in event.slots])

    def end(self, best_path: list[int]) -> None:
        pass


class Spy(TraceRecorder):
    """Notes the paths of all candidates beside the rows."""

    def start(self, prompt_id: str, split: str) -> None:
        super().start(prompt_id, split)
        self.candidates: list[list[Path_]] = []

    def drafted(self, forest: TokenForest, beams: Any, layers: Any, contexts: list[DraftContext]) -> None:
        super().drafted(forest, beams, layers, contexts)
        for context in contexts:
            assert context.candidates is not None
            pairs = zip(context.candidates.parents.tolist(), context.candidates.tokens.tolist(), strict=True)
            self.candidates.append([(*forest.path(parent), token) for parent, token in pairs])


def decoded(config: DecodingConfig, recorder: Any, index: int, depth: int | None = None) -> None:
    config = config if depth is None else config.with_changes(draft_depth=depth)
    policy = ExploringWidth() if depth is None else None
    DSBDDecoder(small_pair(), config, policy).generate([prompts(6)[index]], [streams(6)[index]], recorder)


def test_labels_are_the_places_of_beam_samplings_own_beams() -> None:
    below_a_failure = 0
    for index in range(6):
        alone, spy = Selections(), Spy(FEATURES)
        spy.start("p", "train")
        decoded(CONFIG, alone, index, depth=0)
        decoded(CONFIG, spy, index)
        found = spy.take_rows()
        assert found
        for row, candidates in zip(found, spy.candidates, strict=False):  # the last may lie beyond the last token
            assert len(row["places"]) == len(candidates) == len(row["parents"])
            selected = alone.layers[len(candidates[0]) - 1]
            assert row["places"] == [selected.index(path) + 1 if path in selected else 0 for path in candidates]
            below_a_failure += any(row["places"]) and not row["reached"]
    assert below_a_failure, "deep layers are labelled too"


def test_layers_that_keep_fewer_beams_are_refused() -> None:
    recorder = TraceRecorder(FEATURES)
    recorder.start("p", "train")
    decoder = DSBDDecoder(small_pair(), CONFIG, FixedWidth(target_width=CONFIG.target_width - 1))
    with pytest.raises(UserError, match=r"asked for \d of \d beams.* policy=exploring"):
        decoder.generate([prompts(1)[0]], [streams(1)[0]], recorder)


def test_need_follows_from_the_places() -> None:
    for row in rows():
        scored = [bool(value) for value in row["candidates"].reshape(-1, len(FEATURES.candidate_names))[:, 4]]
        for j, need in enumerate(row["need"], 1):
            held = {place for place, known in zip(row["places"], scored, strict=True) if known}
            drafts = 0
            while not set(range(1, j + 1)) <= held and drafts < len(row["places"]):
                held.add(row["places"][drafts])
                drafts += 1
            assert need == (drafts if set(range(1, j + 1)) <= held else NEVER)


def test_parents_are_candidates_of_the_layer_above() -> None:
    above: list[int] = []
    for row in rows():
        assert all(parent < (len(above) if row["layer"] > 1 else 0) for parent in row["parents"])
        assert all((parent == -1) == (row["layer"] == 1) for parent in row["parents"])
        for parent, place in zip(row["parents"], row["places"], strict=True):
            assert not place or parent == -1 or above[parent], "a selected candidate's parent was selected"
        above = row["places"]
