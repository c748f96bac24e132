"""Joules of a stretch of work, from NVIDIA's total-energy counters (NVML); None where the machine
cannot tell.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, NamedTuple

import torch


class Reading(NamedTuple):
    """A card's counter at a moment."""

    card: str  # its UUID
    unix_seconds: float
    millijoules: int


class EnergyMeter:
    """Measures the energy that all visible GPUs take between entry and exit of a `with` block.

    Cards that torch does not see are left out, idle ones that it sees are not: CUDA_VISIBLE_DEVICES
    decides. A counter covers its whole board, other processes included, and moves in steps of some
    20 to 100 milliseconds: measure windows much longer than that, or sum many.

    Args:
        device: the torch device that works; anything but CUDA gives None.

    Attributes:
        joules: of the last window, the sum over the cards; None where one of them cannot tell.
        readings: of the last window, of every card at its entry, then at its exit; empty where
            joules is None.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.joules: float | None = None
        self.readings: list[Reading] = []
        self._nvml, self._handles = _open(torch.device(device))

    def __enter__(self) -> EnergyMeter:
        self._before = self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before, after = self._before, self._read()
        known = bool(before and after)
        self.readings = [*before, *after] if known else []
        took = sum(reading.millijoules for reading in after) - sum(reading.millijoules for reading in before)
        self.joules = took / 1000 if known else None

    @property
    def available(self) -> bool:
        """True if this machine can tell the joules."""
        return bool(self._read())

    def _read(self) -> list[Reading]:
        """The counters of all cards; empty where one of them cannot tell."""
        for index in range(len(self._handles)):
            torch.cuda.synchronize(index)
        try:
            return [
                Reading(card, time.time(), int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle)))
                for card, handle in self._handles.items()
            ]
        except self._nvml.NVMLError:
            return []


def _open(device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Open NVML: (pynvml, handles of all visible cards by UUID), or (None, nothing)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None, {}
    try:
        import pynvml
    except ImportError:
        return None, {}
    try:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers devices for torch but not for NVML; the UUID is the same
        # for both.
        cards = [f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in range(torch.cuda.device_count())]
        return pynvml, {card: pynvml.nvmlDeviceGetHandleByUUID(card.encode()) for card in cards}
    except (pynvml.NVMLError, AttributeError):
        return None, {}
