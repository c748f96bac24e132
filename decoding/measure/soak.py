"""Memory and speed over many prompts: neither may depend on how many were decoded before."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from decoding.engine.runner import runner_of
from decoding.measure.methods import Generate
from decoding.measure.turns import prompt_stream
from decoding.pairs.pair import ModelPair
from decoding.tasks.base import Prompt

_CHECKPOINTS = 10


def soak(
    generate: Generate, pair: ModelPair, prompts: Sequence[Prompt], count: int, batch_size: int, seed: int
) -> dict[str, Any]:
    """Decode `count` prompts, over and over those given; look at memory and the clock ten times.

    Args:
        generate: decodes them, `batch_size` at a time.
        pair: the models that `generate` runs.

    Returns:
        prompts: decoded by then; seconds: since the look before; resident_megabytes: peak of the
        process by then; kv_megabytes: KV buffers kept then; device_megabytes: peak on the GPU by
        then, None without one.
    """
    names = ("prompts", "seconds", "resident_megabytes", "kv_megabytes", "device_megabytes")
    found: dict[str, Any] = {name: [] for name in names}
    done, began = 0, time.perf_counter()
    while done < count:
        size = min(batch_size, count - done)
        group = [prompts[(done + i) % len(prompts)] for i in range(size)]
        generate([prompt.tokens for prompt in group], [prompt_stream(seed + done + i, p) for i, p in enumerate(group)])
        before, done = done, done + size
        if before * _CHECKPOINTS // count != done * _CHECKPOINTS // count:
            found["prompts"].append(done)
            found["seconds"].append(time.perf_counter() - began)
            found["resident_megabytes"].append(peak_resident_bytes() / 1e6)
            found["kv_megabytes"].append(sum(runner_of(m, pair.engine).kv_bytes for m in pair.models.values()) / 1e6)
            on_gpu = pair.device.type == "cuda"
            found["device_megabytes"].append(torch.cuda.max_memory_allocated(pair.device) / 1e6 if on_gpu else None)
            began = time.perf_counter()
    return found


def peak_resident_bytes() -> int:
    """Most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
