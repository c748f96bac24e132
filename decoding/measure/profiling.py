"""The time of a decoding by operator: torch's profiler around a few iterations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from decoding.measure.methods import Generate
from decoding.measure.summary import overhead
from decoding.results import DecodeResult

TOP = 15  # operators reported


def profile_decoding(
    generate: Generate, prompts: Sequence[Sequence[int]], seed: int, device: torch.device, trace: Path
) -> dict[str, Any]:
    """Decode prompts under torch's profiler and write its trace.

    The decoding runs three times: to warm up, for the share of time in neither model (which the
    profiler would inflate), and under the profiler.

    Args:
        trace: file to write, in Chrome's trace format.

    Returns:
        trace, iterations, overhead_share (None where no phase but "other" is known), and the `TOP`
        host operators and GPU kernels that took longest, each with name, calls, seconds (without
        what it calls) and share of the sum.
    """

    def decode() -> list[DecodeResult]:
        return generate(list(prompts), torch.Generator().manual_seed(seed))

    decode()
    results = decode()
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        decode()
        if on_gpu:
            torch.cuda.synchronize(device)
    profiler.export_chrome_trace(str(trace))
    events = profiler.key_averages()
    beside, all_seconds = np.sum([overhead(result.stats) for result in results], axis=0).tolist()
    return {
        "trace": str(trace),
        "iterations": sum(result.stats.iterations for result in results),
        "overhead_share": beside / all_seconds if all_seconds else None,
        "operators": _longest(events, DeviceType.CPU, "self_cpu_time_total"),
        "kernels": _longest(events, DeviceType.CUDA, "self_device_time_total"),
    }


def _longest(events: Iterable[Any], device: DeviceType, field: str) -> list[dict[str, Any]]:
    """The events of a device that took longest, in seconds without what they call, and as shares of
    all of them.
    """
    taken = [(getattr(event, field) / 1e6, event) for event in events if event.device_type == device]
    total = sum(seconds for seconds, _ in taken) or 1.0
    longest = sorted(taken, key=lambda item: -item[0])[:TOP]
    return [
        {"name": event.key, "calls": event.count, "seconds": seconds, "share": seconds / total}
        for seconds, event in longest
    ]
