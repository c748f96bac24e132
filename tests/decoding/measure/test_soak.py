"""Memory over many prompts."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decoding import DecodingConfig, DSBDDecoder
from decoding.engine.runner import runner_of
from decoding.measure import soak as module
from decoding.measure.soak import soak
from decoding.tasks.base import Prompt
from tests.small_pair import small_pair


def live_tensors() -> int:
    """Tensors of this process that somebody holds."""
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("leaks", [False, True])
def test_memory_and_time_are_looked_at_ten_times_and_nothing_is_kept(
    leaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock and the memory of the process are scripted: 1 s a look at the clock, 5 MB a look at memory."""
    clock, memory = itertools.count(100.0), itertools.count(1_000_000_000, 5_000_000)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(module, "peak_resident_bytes", lambda: next(memory))
    pair = small_pair()
    config = DecodingConfig(target_width=2, draft_width=3, draft_depth=2, max_new_tokens=4, top_k=5)
    decoder = DSBDDecoder(pair, config)
    prompts = [Prompt(str(i), [1, 2, 3 + i], None) for i in range(3)]
    seen: list[int] = []
    kept: list[Any] = []
    tensors: list[int] = []

    def generate(rows, streams):  # type: ignore[no-untyped-def]
        tensors.append(live_tensors())
        seen.append(len(rows))
        kept.append(torch.zeros(3) if leaks else None)
        return decoder.generate(rows, streams)

    found = soak(generate, pair, prompts, count=47, batch_size=4, seed=0)
    assert sum(seen) == 47
    assert set(seen) == {4, 3}
    assert len(found["prompts"]) == 10
    assert found["prompts"][-1] == 47
    assert found["resident_megabytes"] == [1000.0 + 5 * look for look in range(10)]
    assert found["seconds"] == [1.0] * 10, "since the look before, not since the start"
    assert (max(tensors[2:]) > min(tensors[2:])) == leaks, "the first two batches make the buffers"
    assert found["device_megabytes"] == [None] * 10
    buffers = sum(runner_of(model, "auto").kv_bytes for model in (pair.target, pair.draft)) / 1e6
    assert found["kv_megabytes"][0] > 0
    assert len(set(found["kv_megabytes"][:-1])) == 1, "one buffer a model, used again"
    assert buffers == found["kv_megabytes"][-1]
