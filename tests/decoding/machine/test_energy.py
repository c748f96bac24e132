"""EnergyMeter: joules from the counter's difference, None where there is no counter; tables in joules."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from decoding import ModelPair, UserError
from decoding.cost_table import NODE_COUNTS, LatencyTable
from decoding.latency import described
from decoding.machine import joules, store
from decoding.machine.joules import measure_joules
from decoding.machine.meter import EnergyMeter
from tests.decoding.stubs import small_llama


class NVMLError(Exception):
    pass


class Cards:
    """NVML and torch of a machine with several cards, by what each one's counter says in turn; None: it cannot tell."""

    NVMLError = NVMLError

    def __init__(self, monkeypatch: pytest.MonkeyPatch, counters: dict[str, list[int | None]], visible: str) -> None:
        self.counters, self.visible = counters, visible
        self.synchronized: list[Any] = []
        monkeypatch.setitem(sys.modules, "pynvml", self)  # type: ignore[arg-type]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=visible[i]))
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronized.append)

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes) -> str:
        return uuid.decode().removeprefix("GPU-")

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        value = self.counters[handle].pop(0)
        if value is None:
            raise NVMLError
        return value


def test_a_cpu_cannot_tell() -> None:
    with EnergyMeter("cpu") as window:
        pass
    assert window.joules is None and window.readings == []
    assert not window.available


def test_difference_of_the_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    Cards(monkeypatch, {"a": [1000, 3500, 9000, 9100]}, visible="a")
    window = EnergyMeter("cuda")
    with window:
        pass
    assert window.joules == 2.5
    with window:
        pass
    assert window.joules == pytest.approx(0.1)


def test_all_visible_cards_count_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Card b is hidden; torch numbers the others anew. What was read is kept as it was."""
    counters: dict[str, list[int | None]] = {"a": [100, 600], "b": [0, 10**6], "c": [7000, 9000]}
    cards = Cards(monkeypatch, counters, visible="ca")
    began = time.time()
    with EnergyMeter("cuda:1") as window:
        assert cards.synchronized == [0, 1], "all cards have done what came before"
    assert window.joules == 2.5
    told = [(reading.card, reading.millijoules) for reading in window.readings]
    assert told == [("GPU-c", 7000), ("GPU-a", 100), ("GPU-c", 9000), ("GPU-a", 600)]
    seconds = [reading.unix_seconds for reading in window.readings]
    assert began <= seconds[0] and seconds == sorted(seconds) and seconds[-1] <= time.time()
    assert counters["b"] == [0, 10**6]


@pytest.mark.parametrize("counters", [{"a": [None, 5], "c": [1, 2]}, {"a": [1, 5], "c": [2, None]}])
def test_a_card_without_the_counter(monkeypatch: pytest.MonkeyPatch, counters: Any) -> None:
    """The sum over the others would look like the whole."""
    Cards(monkeypatch, counters, visible="ac")
    with EnergyMeter("cuda") as window:
        pass
    assert window.joules is None and window.readings == []


# ------------------------------------------------------------------------------------ tables in joules


class FakeMeter(EnergyMeter):
    """Notes how long each window was open, and says so many watts; `able` and `tells` as cards may be or not."""

    def __init__(self, windows: list[float], watts: float = 100.0, able: bool = True, tells: bool = True) -> None:
        self.joules, self._windows, self._watts, self._able, self._tells = None, windows, watts, able, tells
        self.readings = []

    def __call__(self, device: torch.device) -> FakeMeter:
        return self

    @property
    def available(self) -> bool:
        return self._able

    def __enter__(self) -> FakeMeter:
        self._began = joules.time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._windows.append(joules.time.perf_counter() - self._began)
        self.joules = self._watts * self._windows[-1] if self._tells else None


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModelPair:
    """A small pair whose tables are kept for this test only, and whose host takes 2 and 1 milliseconds."""
    monkeypatch.setattr(store, "_measured", {})
    monkeypatch.setenv("DSBD_CACHE", str(tmp_path))
    seconds = LatencyTable((1, 2), (0.1, 0.1), (0.1, 0.1), iteration=0.002, layer=0.001)
    monkeypatch.setattr(joules, "measure_seconds", lambda *arguments, **settings: seconds)
    return ModelPair(small_llama(40), small_llama(40, seed=1))


def test_passes_are_repeated_until_the_counter_has_moved(pair: ModelPair) -> None:
    windows: list[float] = []
    table = measure_joules(pair, 8, window_seconds=0.02, meter=FakeMeter(windows))
    assert len(windows) == 2 * len(NODE_COUNTS) + 1 and min(windows) >= 0.02
    assert table.unit == "joules" and table.nodes == NODE_COUNTS
    assert list(table.target) == sorted(table.target) and list(table.draft) == sorted(table.draft)
    assert table.draft[0] > 0
    # Idle watts are joules over the time that waiting took, which is no more than the window was open: 100 or above.
    assert table.iteration >= 100 * 0.002 and table.layer == pytest.approx(table.iteration / 2)
    assert "target joules" in described(table) and table.host_cost(2) == table.iteration + 2 * table.layer


def test_joules_of_one_call_and_watts(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that moves by a quarter second a look: open at 0, began at 0.25, three calls, over at 1.25, shut."""
    ticks = iter(range(100))
    monkeypatch.setattr(joules, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 4))
    calls: list[int] = []
    spent, watts = joules._window_joules(lambda: calls.append(1), FakeMeter([], watts=4.0), 1.0, pair)
    assert len(calls) == 3
    assert spent == 4.0 * 1.5 / 3 and watts == 4.0 * 1.5 / 1.0


def test_joules_are_kept_apart_from_seconds(pair: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    windows: list[float] = []
    table = measure_joules(pair, 8, window_seconds=0.001, meter=FakeMeter(windows))
    monkeypatch.setattr(store, "_measured", {})
    assert measure_joules(pair, 8, window_seconds=0.001, meter=FakeMeter(windows)) == table
    assert len(windows) == 2 * len(NODE_COUNTS) + 1
    measure_joules(pair, 8, window_seconds=0.002, meter=FakeMeter(windows))
    assert len(windows) == 2 * (2 * len(NODE_COUNTS) + 1)


def test_machines_that_cannot_tell_joules(pair: ModelPair) -> None:
    sentence = (
        r"The pair is on cpu, .* NVIDIA GPU with NVML \(pip install nvidia-ml-py\); objective=seconds works anywhere"
    )
    for given in ({}, {"meter": FakeMeter([], able=False)}, {"meter": FakeMeter([], tells=False)}):
        with pytest.raises(UserError, match=sentence):
            measure_joules(pair, 8, window_seconds=0.001, **given)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"The energy counter did not move in .* raise window_seconds"):
        measure_joules(pair, 8, window_seconds=0.001, meter=FakeMeter([], watts=0.0))
    with pytest.raises(UserError, match="window_seconds is 0; give a number above 0"):
        measure_joules(pair, window_seconds=0)
    with pytest.raises(UserError, match="needs a draft"):
        measure_joules(ModelPair(small_llama(40), None))


@pytest.mark.gpu
def test_a_table_in_joules_of_a_gpu() -> None:
    pytest.importorskip("pynvml")
    if not EnergyMeter("cuda").available:
        pytest.skip("this card has no energy counter")
    table = measure_joules(ModelPair(small_llama(40).cuda(), small_llama(40, seed=1).cuda()), 8, fresh=True)
    assert table.target[0] > 0 and table.iteration > 0


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
