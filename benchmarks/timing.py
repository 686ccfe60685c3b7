"""How calls are timed: in alternation, from outside or by the GPU's own clock."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

__all__ = ["DeviceTimer", "OnDevice", "keep_freed_memory", "measure", "measure_on_device"]

_SHORT = 0.05  # seconds
_MOST_ROUNDS = 2000
_FLUSHED = 1 << 28  # bytes, several times the second-level cache of any GPU
_CYCLES = 2e9  # a second, at the most: where the clock is slower, the GPU waits longer
_FIRST_WAIT, _LONGEST_WAIT = 1e-3, 32e-3  # seconds
Call = Callable[[], Any]


def keep_freed_memory() -> None:
    """Make the C library keep what is freed, and not give it back to the system and fetch it again page by page.

    Otherwise calls that allocate tens of megabytes take one of two times, as chance will have it, and the larger is the
    system's. It does nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, most_mappings = -1, -4
        libc.mallopt(most_mappings, 0)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def measure(contenders: Mapping[str, Call], *, seconds: float = 2.0, least: int = 5) -> dict[str, np.ndarray]:
    """Time the contenders from outside, with all that they leave to do on a GPU, in alternation.

    Drift of the machine hits all alike. A short call is timed right after an untimed one of its own, and finds its own
    data in the caches.

    Args:
        contenders: name -> call to time.
        seconds: about how long each contender is measured, after two warm-up calls.
        least: the least number of rounds.

    Returns:
        name -> seconds of every round, in order.
    """
    warm = {name: min(_once(call), _once(call)) for name, call in contenders.items()}
    timers = {
        name: functools.partial(_twice if warm[name] < _SHORT else _once, call) for name, call in contenders.items()
    }
    return _take_turns(timers, warm, seconds, least)


@dataclass(frozen=True)
class OnDevice:
    """Times of one contender on a GPU.

    Args:
        device: seconds that the GPU needs, in every round.
        wall: seconds from the call until the GPU is done, in every round of a second measurement.
        gapless: share of the `device` rounds in which all work was queued before the first began, so that the host's
            time is not in them.
    """

    device: np.ndarray
    wall: np.ndarray
    gapless: float


def measure_on_device(
    contenders: Mapping[str, Call],
    *,
    seconds: float = 2.0,
    least: int = 50,
    timer: Callable[[Call], DeviceTimer] | None = None,
) -> dict[str, OnDevice]:
    """Time the contenders by the GPU's clock, and then from outside, each in alternation.

    Args:
        contenders: name -> call that works on the GPU.
        seconds: about how long each contender is measured, after two warm-up calls, flushing and waiting included; the
            times from outside take a quarter more.
        least: the least number of rounds by the GPU's clock.
        timer: what makes a timer of a call; default `DeviceTimer`.
    """
    timers = {name: (timer or DeviceTimer)(call) for name, call in contenders.items()}
    costs = {name: min(_cost(timed), _cost(timed)) for name, timed in timers.items()}
    for timed in timers.values():
        timed.rounds = timed.gapless = 0
    device = _take_turns(timers, costs, seconds, least)
    wall = measure(contenders, seconds=seconds / 4)
    return {name: OnDevice(device[name], wall[name], t.gapless / t.rounds) for name, t in timers.items()}


class DeviceTimer:
    """Times a call by events that the GPU passes before and after its work.

    Before each, the caches are flushed and the GPU is made to wait while the host queues the work: for as long as that
    takes, so that the time in which Python and the launches run is not in the figure. A call that itself waits for the
    GPU cannot be queued, and is then timed without the wait; `gapless` counts the rounds in which everything was.

    Args:
        call: what to time.
        cuda: `torch.cuda`, or what stands for it in a test.
        flush: reads what fills the caches.
    """

    def __init__(self, call: Call, *, cuda: Any = torch.cuda, flush: Call | None = None) -> None:
        self.call, self.cuda, self.flush = call, cuda, flush or _flush
        self.wait = _FIRST_WAIT
        self.rounds = self.gapless = 0

    def __call__(self) -> float:
        while True:
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            self.cuda.synchronize()
            self.flush()
            self.cuda._sleep(int(self.wait * _CYCLES))
            start.record()
            self.call()
            end.record()
            gapless = not start.query()  # the GPU was still waiting when everything was queued
            end.synchronize()
            if gapless or not self.wait:
                break
            self.wait = 2 * self.wait if self.wait < _LONGEST_WAIT else 0.0
        self.rounds += 1
        self.gapless += gapless
        return float(start.elapsed_time(end)) / 1e3


def _take_turns(
    timers: Mapping[str, Callable[[], float]], costs: Mapping[str, float], seconds: float, least: int
) -> dict[str, np.ndarray]:
    """Every timer for about `seconds`; those with fewer rounds have them spread over all."""
    rounds = {name: min(max(least, int(seconds / max(cost, 1e-6))), _MOST_ROUNDS) for name, cost in costs.items()}
    most = max(rounds.values())
    times: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(most):
        for name, timed in timers.items():
            if (number + 1) * rounds[name] // most > number * rounds[name] // most:
                times[name].append(timed())
    return {name: np.array(values) for name, values in times.items()}


def _cost(timed: Callable[[], float]) -> float:
    start = time.perf_counter()
    timed()
    return time.perf_counter() - start


@functools.cache
def _flushed() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(_FLUSHED // 4, device="cuda"), torch.empty((), device="cuda")


def _flush() -> None:
    """Read, and write next to nothing: what fills the caches need not be written back while a call is timed."""
    data, total = _flushed()
    torch.sum(data, 0, out=total)


def _twice(call: Call) -> float:
    call()
    return _once(call)


def _once(call: Call) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
