"""States that are kept: as many as there is room for, the same values either way; a fit's clock and its ids."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from decoding.train_draft import fit
from decoding.train_draft.model import ModelModule, small_model
from decoding.train_draft.states import TargetStates
from tests.decoding.pairs.test_eagle3 import target_of
from tests.decoding.train_draft.test_eagle3 import texts_of

BATCHES = [list(range(first, first + 4)) for first in range(0, 40, 4)]


def passes(states: TargetStates, batches: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many target passes an epoch over some batches takes."""
    keep, count = states._keep, []

    def counted(*args: Any) -> None:
        count.append(1)
        keep(*args)

    with monkeypatch.context() as patch:
        patch.setattr(states, "_keep", counted)
        for batch in batches:
            states(batch)
    return len(count)


def test_what_fits_is_kept_epoch_after_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of()
    texts = texts_of(target, 40)
    room = 1e9
    alone = TargetStates(target, (1,), texts, room)
    alone(BATCHES[0])
    batch = room - alone._room
    states = TargetStates(target, (1,), texts, 5.5 * batch)  # texts are of one length
    assert [passes(states, BATCHES, monkeypatch) for _ in range(3)] == [10, 5, 5]
    assert 0 <= states._room < batch
    assert passes(TargetStates(target, (1,), texts, 10.5 * batch), BATCHES * 2, monkeypatch) == 10, "all fit"
    assert passes(TargetStates(target, (1,), texts, 0), BATCHES * 2, monkeypatch) == 20, "none fits"


def test_a_batch_of_kept_and_new_texts_is_counted_once() -> None:
    target = target_of()
    texts = texts_of(target, 40)
    states, whole = (TargetStates(target, (1,), texts, 1e9) for _ in range(2))
    for batch in ([0, 1, 2, 3], [2, 3, 4, 5], [0, 5]):
        states(batch)
    whole(list(range(6)))
    assert states._room == whole._room
    torch.testing.assert_close(states([1, 4]).states, whole([1, 4]).states)


def module_of(max_seconds: float | None = None) -> ModelModule:
    target = target_of()
    return ModelModule(small_model(target, 64, 1), TargetStates(target, (), []), max_seconds=max_seconds)


def test_ids_of_a_small_model_are_where_it_is() -> None:
    module = module_of()
    assert "_ids" not in module.state_dict()
    assert module.to("meta").token_ids.is_meta


def test_a_fit_that_goes_on_has_the_rest_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(fit.time, "monotonic", lambda: now[0])
    first, second = module_of(60), module_of(60)
    first.on_fit_start()
    now[0] += 25
    checkpoint: dict[str, Any] = {}
    first.on_save_checkpoint(checkpoint)
    now[0] += 10_000
    second.on_load_checkpoint(checkpoint)
    second.on_fit_start()
    assert now[0] - second._began == 25
    second.on_load_checkpoint({})
    second.on_fit_start()
    assert now[0] == second._began, "an older checkpoint has no time in it"
