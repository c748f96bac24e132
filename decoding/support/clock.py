"""The clock that decodings are timed by."""

from __future__ import annotations

import time

import torch


def now(device: torch.device) -> float:
    """Seconds of the clock once all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
