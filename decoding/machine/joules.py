"""Joules of a pair's passes and of the board that waits for the host, by NVML, as a `LatencyTable`."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

import torch

from decoding.cost_table import NODE_COUNTS, LatencyTable
from decoding.errors import UserError
from decoding.machine.meter import EnergyMeter
from decoding.machine.passes import ForestPasses, check_draft, forest_passes, rising, synthetic_prompt
from decoding.machine.seconds import measure_seconds
from decoding.machine.store import cache_key, device_name, kept_or, timestamp
from decoding.pairs.pair import ModelPair
from decoding.support.checks import number, whole

_WARM_UP = 3  # passes of each size before they are counted


def measure_joules(
    pair: ModelPair,
    prompt_tokens: int = 128,
    window_seconds: float = 1.0,
    cache_dir: str | Path | None = None,
    fresh: bool = False,
    meter: Callable[[torch.device], EnergyMeter] = EnergyMeter,
) -> LatencyTable:
    """A table in joules: of a pass over forests of several sizes, and of the board while it waits
    for the host.

    Joules of the whole board, nothing subtracted: that is what is paid for. Passes of one size are
    repeated until a window is over, because the counter moves in steps. The host's joules are the
    watts that the board takes idle, right after the passes, times the host's seconds. Kept and read
    as `measure_seconds` keeps its tables.

    Args:
        pair: on an NVIDIA GPU.
        prompt_tokens, cache_dir, fresh: as for `measure_seconds`.
        window_seconds: of each size, model, and of waiting; much longer than the counter's step
            (0.1 seconds at most).
        meter: makes what measures a window on a device.

    Raises:
        UserError: a machine that cannot tell joules, or a pair without a draft.
    """
    check_draft(pair)
    prompt_tokens = whole("prompt_tokens of a latency table", prompt_tokens, least=1)
    number("window_seconds", window_seconds, above=0, hint="1 suits NVIDIA's counter")
    window = meter(pair.device)
    if not window.available:
        raise _cannot_tell(pair)
    key = cache_key(pair, unit="joules", prompt_tokens=prompt_tokens, window_seconds=window_seconds)

    @torch.inference_mode()
    def measure() -> LatencyTable:
        seconds = measure_seconds(pair, prompt_tokens, cache_dir=cache_dir, fresh=fresh)  # checks passes, too
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
            measured=timestamp(),
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
    """Joules of one call of `work`, repeated until the window is over; and watts meanwhile."""
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
