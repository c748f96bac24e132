"""Passes against the machine: the bytes that a pass must read, the bandwidth measured here, the
seconds it took.

Generating a token reads every weight once; what that takes at the memory's bandwidth is the bound
that an engine can come close to, and that a few more nodes in the pass do not move.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from decoding.cost_table import NODE_COUNTS
from decoding.engine.placement import dtype_of
from decoding.machine.passes import forest_passes
from decoding.pairs.pair import ModelPair

BUFFER_BYTES = {"cpu": 2**28, "cuda": 2**31}  # read to measure the bandwidth; far more than caches hold
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def roofline(pair: ModelPair, prompt: Sequence[int], top: int = 1, repeats: int = 9) -> dict[str, Any]:
    """Target passes over 1 to 32 nodes behind a prompt, against what their bytes take at the
    measured bandwidth.

    Args:
        pair: only the target is run.
        prompt: the context of the passes; at least 32 tokens fewer than the model takes.
        top: likeliest tokens that a pass brings to the host.
        repeats: timed passes for each number of nodes; medians are reported.

    Returns:
        bandwidth (see `read_bandwidth`), weight_bytes, kv_bytes_per_slot, context_tokens,
        cache_bytes (None: unknown), in_cache (all bytes fit the last-level cache, so that memory
        bounds nothing), and passes: nodes, bytes, bound_seconds, pass_seconds (inside the model,
        results on the host), score_seconds (with slots and masks), share = bound_seconds /
        pass_seconds.
    """
    bandwidth = read_bandwidth(pair.device)
    weights, slot = weight_bytes(pair.target), kv_bytes_per_slot(pair.target)
    timed = pass_seconds(pair, prompt, top, repeats)
    passes = []
    for nodes, (inside, whole) in zip(NODE_COUNTS, timed, strict=True):
        read = weights + slot * (len(prompt) + nodes)
        bound = read / bandwidth["bytes_per_second"]
        passes.append(
            {
                "nodes": nodes,
                "bytes": read,
                "bound_seconds": bound,
                "pass_seconds": inside,
                "score_seconds": whole,
                "share": bound / inside,
            }
        )
    cache = cache_bytes(pair.device)
    return {
        "bandwidth": bandwidth,
        "weight_bytes": weights,
        "kv_bytes_per_slot": slot,
        "context_tokens": len(prompt),
        "cache_bytes": cache,
        "in_cache": cache is not None and passes[-1]["bytes"] <= cache,
        "passes": passes,
    }


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that a pass multiplies: all but embedding tables that are not tied to
    the head.

    Tables are looked up, a row a token. Experts of a mixture are all counted, though a pass over
    few tokens reads only some of them.
    """
    head = model.get_output_embeddings()
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if head is not None:
        tables.discard(id(head.weight))
    return sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


def kv_bytes_per_slot(model: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * config.num_hidden_layers * kv_heads * dim * dtype_of(model).itemsize)


@torch.inference_mode()
def pass_seconds(pair: ModelPair, prompt: Sequence[int], top: int, repeats: int) -> list[tuple[float, float]]:
    """(seconds in the model, seconds with slots and masks) of a pass for each of NODE_COUNTS;
    medians.
    """
    medians = []
    with forest_passes(pair, "target", prompt, top) as passes:
        for count in NODE_COUNTS:
            times = [passes.run(count) for _ in range(repeats + 2)][2:]  # the first two warm up
            inside, whole = np.median(times, axis=0)
            medians.append((float(inside), float(whole)))
    return medians


@torch.inference_mode()
def read_bandwidth(device: torch.device, repeats: int = 7) -> dict[str, Any]:
    """Measure how fast the device reads memory: the fastest of a sum and a matrix-vector product
    over a large buffer.

    Returns:
        bytes_per_second (median of `repeats`), operation, buffer_bytes.
    """
    size = _buffer_bytes(device)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)
    matrix, vector = buffer.view(-1, 4096), torch.ones(4096, device=device)
    operations: dict[str, Callable[[], Any]] = {
        "sum": buffer.sum,
        "matrix-vector product": lambda: torch.mv(matrix, vector),
    }
    speeds = {name: size / _seconds(operation, device, repeats) for name, operation in operations.items()}
    fastest = max(speeds, key=lambda name: speeds[name])
    return {"bytes_per_second": speeds[fastest], "operation": fastest, "buffer_bytes": size}


def _buffer_bytes(device: torch.device) -> int:
    size = BUFFER_BYTES.get(device.type, BUFFER_BYTES["cpu"])
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    return max(size // 2**14, 1) * 2**14  # whole rows of the matrix


def _seconds(operation: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median seconds of one call; on a GPU several are queued, so that launching them is not what
    is timed.
    """
    timer = Timer("operation()", globals={"operation": operation}, num_threads=torch.get_num_threads())
    calls = 8 if device.type == "cuda" else 1
    return float(np.median([timer.timeit(calls).mean for _ in range(repeats)]))


def cache_bytes(device: torch.device) -> int | None:
    """Size of the device's last-level cache; None where it cannot be found out."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None)
    try:
        levels = {
            int((index / "level").read_text()): (index / "size").read_text().strip()
            for index in _CPU_CACHES.glob("index*")
        }
        largest = levels[max(levels)]
        return int(largest[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[largest[-1]]
    except (OSError, ValueError, KeyError):
        return None
