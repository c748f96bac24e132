"""EnergyMeter: joules from the counter's difference; None, never an error, where there is no counter."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decoding import energy
from decoding.energy import EnergyMeter


class NVMLError(Exception):
    pass


def meter(monkeypatch: pytest.MonkeyPatch, readings: list[Any]) -> EnergyMeter:
    def read(handle: object) -> int:
        value = readings.pop(0)
        if value is None:
            raise NVMLError
        return value

    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetTotalEnergyConsumption=read)
    monkeypatch.setattr(energy, "_open", lambda device: (nvml, object()))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return EnergyMeter("cuda")


def test_a_cpu_cannot_tell() -> None:
    with EnergyMeter("cpu") as window:
        pass
    assert window.joules is None
    assert not window.available


def test_difference_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    window = meter(monkeypatch, [1000, 3500, 9000, 9100])
    with window:
        pass
    assert window.joules == 2.5
    with window:
        pass
    assert window.joules == pytest.approx(0.1)


@pytest.mark.parametrize("readings", [[None, 5], [5, None]])
def test_a_card_without_the_counter(monkeypatch: pytest.MonkeyPatch, readings: list[Any]) -> None:
    with meter(monkeypatch, readings) as window:
        pass
    assert window.joules is None


@pytest.mark.gpu
def test_a_gpu_takes_energy() -> None:
    pytest.importorskip("pynvml")
    with EnergyMeter("cuda") as window:
        x = torch.ones(4096, 4096, device="cuda")
        began = time.monotonic()
        while time.monotonic() - began < 0.5:
            x = (x @ x).clamp(max=1)
            torch.cuda.synchronize()
    if window.joules is None:
        pytest.skip("this card has no energy counter")
    assert window.joules > 0
