"""How benchmarks are timed: rounds in alternation, and the GPU's own clock against a simulated GPU."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are run from the repository, never installed

from benchmarks import harness, timing  # noqa: E402
from benchmarks.harness import Report, compare, markdown  # noqa: E402
from benchmarks.timing import DeviceTimer, OnDevice, measure, measure_on_device  # noqa: E402


def test_contenders_alternate_and_every_round_is_timed() -> None:
    calls: list[str] = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert "".join(calls) == "aabb" + "aabb" * 3  # two calls to warm up; a short one is timed after one of its own


def test_every_contender_has_its_own_number_of_rounds_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def lasting(name: str, seconds: float) -> Callable[[], float]:
        return lambda: calls.append(name) or seconds

    monkeypatch.setattr(timing, "_once", lambda call: call())
    times = measure({"slow": lasting("s", 1.0), "fast": lasting("f", 0.1)}, seconds=2, least=5)
    assert {name: len(values) for name, values in times.items()} == {"slow": 5, "fast": 20}
    assert re.findall("f+", "".join(calls)[4:]) == ["fff", "ffff", "ffff", "ffff", "ffff", "f"]


class FakeCuda:
    """A host and a GPU with a queue: what `DeviceTimer` needs of `torch.cuda`, in seconds of two simulated clocks."""

    def __init__(self) -> None:
        self.host = self.device = 0.0  # the host's time, and when the GPU will have done all that is queued
        self.flushed = 0

    def launch(self, host: float, device: float) -> None:
        """The host takes so long to queue what takes the GPU so long."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def flush(self) -> None:
        self.flushed += 1
        self.launch(1e-5, 1e-4)

    def _sleep(self, cycles: int) -> None:
        self.launch(1e-5, cycles / timing._CYCLES)

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.launch(0, 0)
        self.passed = self.cuda.device

    def query(self) -> bool:
        return self.cuda.host >= self.passed

    def synchronize(self) -> None:
        self.cuda.host = max(self.cuda.host, self.passed)

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.passed - self.passed)


@pytest.mark.parametrize("host", [1e-5, 2e-4, 5e-3])
def test_the_time_on_a_device_does_not_hold_that_of_the_host(host: float) -> None:
    cuda = FakeCuda()
    timer = DeviceTimer(lambda: [cuda.launch(host, 5e-5) for _ in range(3)], cuda=cuda, flush=cuda.flush)
    assert timer() == pytest.approx(1.5e-4)  # of which the host needs up to a hundred times as much to queue it
    assert timer() == pytest.approx(1.5e-4)
    assert timer.gapless == timer.rounds == 2
    assert cuda.flushed >= 2


def test_a_call_that_waits_for_the_device_is_told_apart() -> None:
    cuda = FakeCuda()

    def call() -> None:
        cuda.launch(1e-4, 5e-5)
        cuda.synchronize()
        cuda.launch(1e-4, 5e-5)

    timer = DeviceTimer(call, cuda=cuda, flush=cuda.flush)
    assert timer() == pytest.approx(2.1e-4)  # the GPU works for 1e-4 of it
    start = cuda.host
    assert timer() == pytest.approx(2.1e-4)
    assert cuda.host - start < 1e-3  # not after a wait that is of no use
    assert (timer.gapless, timer.rounds) == (0, 2)


def test_times_on_a_device_come_with_those_from_outside() -> None:
    cuda = FakeCuda()
    calls = {"short": lambda: cuda.launch(1e-5, 1e-5), "waits": lambda: (cuda.launch(0, 1e-5), cuda.synchronize())}
    timer = functools.partial(DeviceTimer, cuda=cuda, flush=cuda.flush)
    found = measure_on_device(calls, seconds=0, timer=timer)
    assert {name: len(times.device) for name, times in found.items()} == {"short": 50, "waits": 50}
    assert found["short"].device == pytest.approx(1e-5)
    assert [times.gapless for times in found.values()] == [1, 0]
    assert all(len(times.wall) >= 5 and (times.wall > 0).all() for times in found.values())


def test_what_lies_on_a_gpu_is_timed_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    device, wall = np.array([0.001, 0.001, 0.002]), np.array([0.004, 0.005, 0.006])

    def on_device(contenders: Mapping[str, object], **_: object) -> dict[str, OnDevice]:
        return {name: OnDevice(n * device, wall, 1 / n) for n, name in enumerate(contenders, 1)}

    calls = {"pymape": lambda: torch.ones(2), "eager": lambda: torch.ones(2)}
    monkeypatch.setattr(harness, "measure_on_device", on_device)
    assert all(case.clock == "wall" for case in compare("2", calls, tolerance=0, seconds=0))
    monkeypatch.setattr(harness, "_on_gpu", lambda tensors: True)
    first, second = compare("2", calls, tolerance=0)
    assert (first.clock, first.median_s, second.median_s) == ("device", 0.001, 0.002)
    assert (first.figures["wall ms"], second.figures["x pymape"], second.figures["% queued"]) == (5, 2, 50)
    assert "% queued" not in first.figures
    where = {"gpu": "a GPU", "processor": "cpu", "torch": "2", "commit": "c"}
    lines = markdown({**asdict(Report("op", "cuda", cases=[first, second])), "machine": where}).splitlines()
    assert "| shape | provider | device ms | p20 | p80 | wall ms | x pymape | % queued |" in lines
    assert "| 2 | pymape | 1.000 | 1.000 | 1.600 | 5 | 1 |  |" in lines
