"""Joules of a stretch of work, from NVIDIA's total-energy counter (NVML); None where the machine cannot tell."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from decoding.errors import UserError
from decoding.latency import (
    NODE_COUNTS,
    ForestPasses,
    LatencyTable,
    check_measurable,
    forest_passes,
    kept_or,
    now,
    rising,
    synthetic_prompt,
)
from decoding.pair import ModelPair
from decoding.table_cache import cache_key, device_name

_WARM_UP = 3  # passes of each size before they are counted


class EnergyMeter:
    """Measures the energy that one GPU takes between entry and exit of a `with` block.

    The counter covers the whole board, other processes included, and moves in steps of some 20 to 100
    milliseconds: measure windows much longer than that, or sum many.

    Args:
        device: the torch device that works; anything but CUDA gives None.

    Attributes:
        joules: of the last window, or None.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.joules: float | None = None
        self._device = torch.device(device)
        self._nvml, self._handle = _open(self._device)

    def __enter__(self) -> EnergyMeter:
        self._before = self._millijoules()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        after = self._millijoules()
        known = self._before is not None and after is not None
        self.joules = (after - self._before) / 1000 if known else None  # type: ignore[operator]

    @property
    def available(self) -> bool:
        """Whether this machine can tell."""
        return self._millijoules() is not None

    def _millijoules(self) -> int | None:
        if self._handle is None:
            return None
        torch.cuda.synchronize(self._device)
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:
            return None


def _open(device: torch.device) -> tuple[Any, Any]:
    """(pynvml, handle of the device), or (None, None)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers devices for torch but not for NVML; the UUID is the same for both.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except (pynvml.NVMLError, AttributeError):
        return None, None


def measure_joules(
    pair: ModelPair,
    prompt_tokens: int = 128,
    window_seconds: float = 1.0,
    cache_dir: str | Path | None = None,
    fresh: bool = False,
    meter: Callable[[torch.device], EnergyMeter] = EnergyMeter,
) -> LatencyTable:
    """A table in joules: of a pass over forests of several sizes, and of the board while it waits for the host.

    Joules of the whole board, nothing subtracted: that is what is paid for. Passes of one size are repeated until a
    window is over, because the counter moves in steps. The host's joules are the watts that the board takes idle, right
    after the passes, times the host's seconds. Kept and read as `LatencyTable.measure` keeps its tables.

    Args:
        pair: on an NVIDIA GPU.
        prompt_tokens, cache_dir, fresh: as for `LatencyTable.measure`.
        window_seconds: of each size, model, and of waiting; much longer than the counter's step (0.1 seconds at most).
        meter: makes what measures a window on a device.

    Raises:
        UserError: a machine that cannot tell joules, or a pair without a draft.
    """
    check_measurable(pair, prompt_tokens=prompt_tokens)
    if isinstance(window_seconds, bool) or not isinstance(window_seconds, int | float) or not window_seconds > 0:
        raise UserError(f"window_seconds is {window_seconds!r}; give a number above 0 (1 suits NVIDIA's counter).")
    window = meter(pair.device)
    if not window.available:
        raise _cannot_tell(pair)
    key = cache_key(pair, unit="joules", prompt_tokens=prompt_tokens, window_seconds=window_seconds)

    @torch.inference_mode()
    def measure() -> LatencyTable:
        seconds = LatencyTable.measure(pair, prompt_tokens, cache_dir=cache_dir, fresh=fresh)  # checks passes, too
        prompt = synthetic_prompt(pair, prompt_tokens)

        def in_window(work: Callable[[], object]) -> tuple[float, float]:
            return _window_joules(work, window, window_seconds, pair)

        target, draft = (_pass_joules(forest_passes(pair, role, prompt), in_window) for role in ("target", "draft"))
        watts = in_window(lambda: time.sleep(0.01))[1]
        return LatencyTable(
            NODE_COUNTS,
            target,
            draft,
            device_name(pair),
            watts * seconds.iteration,
            watts * seconds.layer,
            unit="joules",
            measured=now(),
        )

    return kept_or(measure, key, cache_dir, fresh)


def _pass_joules(
    passes: ForestPasses, in_window: Callable[[Callable[[], object]], tuple[float, float]]
) -> tuple[float, ...]:
    """Joules of a pass for each of NODE_COUNTS; never decreasing in the number of nodes."""
    joules = []
    with passes:
        for count in NODE_COUNTS:
            work = functools.partial(passes.run, count)
            for _ in range(_WARM_UP):
                work()
            joules.append(in_window(work)[0])
    return rising(joules)


def _window_joules(
    work: Callable[[], object], window: EnergyMeter, seconds: float, pair: ModelPair
) -> tuple[float, float]:
    """Joules of one call of `work`, which is repeated until the window is over; and watts meanwhile."""
    calls = 0
    with window:
        began = time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds:
            work()
            calls += 1
    if window.joules is None:
        raise _cannot_tell(pair)
    if window.joules <= 0:
        raise UserError(
            f"The energy counter did not move in {spent:.2f} seconds; raise window_seconds, or use objective=seconds."
        )
    return window.joules / calls, window.joules / spent


def _cannot_tell(pair: ModelPair) -> UserError:
    return UserError(
        f"The pair is on {pair.device}, whose joules cannot be read: objective=joules needs an NVIDIA GPU with NVML "
        "(pip install nvidia-ml-py); objective=seconds works anywhere."
    )
