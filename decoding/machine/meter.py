"""Joules of a stretch of work, from NVIDIA's total-energy counter (NVML); None where the machine
cannot tell.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch


class EnergyMeter:
    """Measures the energy that one GPU takes between entry and exit of a `with` block.

    The counter covers the whole board, other processes included, and moves in steps of some 20 to
    100 milliseconds: measure windows much longer than that, or sum many.

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
        """True if this machine can tell the joules."""
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
    """Open NVML: (pynvml, handle of the device), or (None, None)."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        # CUDA_VISIBLE_DEVICES renumbers devices for torch but not for NVML; the UUID is the same
        # for both.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
    except (pynvml.NVMLError, AttributeError):
        return None, None
