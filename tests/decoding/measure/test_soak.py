"""Memory over many prompts."""

from __future__ import annotations

from decoding import DecodingConfig, DSBDDecoder
from decoding.engine.runner import runner_of
from decoding.measure.soak import soak
from decoding.tasks.base import Prompt
from tests.small_pair import small_pair


def test_memory_is_looked_at_ten_times_and_buffers_do_not_grow() -> None:
    pair = small_pair()
    config = DecodingConfig(target_width=2, draft_width=3, draft_depth=2, max_new_tokens=4, top_k=5)
    prompts = [Prompt(str(i), [1, 2, 3 + i], None) for i in range(3)]
    seen: list[int] = []

    def generate(rows, streams):  # type: ignore[no-untyped-def]
        seen.append(len(rows))
        return DSBDDecoder(pair, config).generate(rows, streams)

    found = soak(generate, pair, prompts, count=47, batch_size=4, seed=0)
    assert sum(seen) == 47
    assert set(seen) == {4, 3}
    assert len(found["prompts"]) == 10
    assert found["prompts"][-1] == 47
    assert found["resident_megabytes"] == sorted(found["resident_megabytes"])
    assert len(found["seconds"]) == 10 and all(seconds > 0 for seconds in found["seconds"])
    assert found["device_megabytes"] == [None] * 10
    buffers = sum(runner_of(model, "auto").kv_bytes for model in (pair.target, pair.draft)) / 1e6
    assert found["kv_megabytes"][0] > 0
    assert len(set(found["kv_megabytes"][:-1])) == 1, "one buffer a model, used again"
    assert buffers == found["kv_megabytes"][-1]
