"""Time and memory that a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Cost", "added_memory", "measure_cost"]

_MIB = 2**20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc(5): sets VmHWM to the present size


@dataclass(eq=False)
class Cost:
    """What a block of `measure_cost` took; filled in when the block ends.

    Attributes:
        wall_seconds: elapsed time.
        cpu_seconds: processor time of all threads of this process.
        peak_cpu_mib: largest resident memory of this process within the block, in MiB.
        peak_gpu_mib: largest memory that PyTorch had allocated on all CUDA devices together, each at its own peak, in
            MiB; None without CUDA.
        whole_process: True where the system could not tell the block's peak: then `peak_cpu_mib` is that of the
            process since its start.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_cpu_mib: float = 0.0
    peak_gpu_mib: float | None = None
    whole_process: bool = False

    def figures(self) -> dict[str, float]:
        """The figures that there are, by name."""
        names = ("wall_seconds", "cpu_seconds", "peak_cpu_mib", "peak_gpu_mib")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def _note_peaks(self) -> None:
        self.peak_cpu_mib = max(self.peak_cpu_mib, _peak_cpu())
        if torch.cuda.is_available():
            self.peak_gpu_mib = max(self.peak_gpu_mib or 0.0, _peak_gpu())


_running: list[Cost] = []


@contextmanager
def measure_cost() -> Iterator[Cost]:
    """Measure the block: yields a `Cost` that is complete when the block has ended, also by an error.

    Blocks may be nested; the outer one's peaks include the inner one's. Work that was queued on the GPU is waited for
    at both ends, so that it is counted where it was started.
    """
    for outer in _running:  # before the inner block resets the peaks
        outer._note_peaks()
    cost = Cost(whole_process=not _reset_peaks())
    _running.append(cost)
    _wait_for_gpu()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        yield cost
    finally:
        _wait_for_gpu()
        cost.wall_seconds, cost.cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        cost._note_peaks()
        _running.remove(cost)


def added_memory() -> Callable[[Cost], dict[str, float]]:
    """Give freed memory back to the system and note what is in use.

    Without that, memory which earlier work has freed but the allocator has kept would hide what later work takes.

    Returns:
        What turns the cost of the work that follows into "added_mib", its largest resident memory less what is in use
        now, and on CUDA "added_gpu_mib"; a figure that the system does not tell is left out.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    resident = _status("VmRSS")
    allocated = sum(torch.cuda.memory_allocated(device) for device in _devices()) / _MIB

    def added(cost: Cost) -> dict[str, float]:
        figures = {}
        if resident is not None and not cost.whole_process:
            figures["added_mib"] = cost.peak_cpu_mib - resident
        if cost.peak_gpu_mib is not None:
            figures["added_gpu_mib"] = cost.peak_gpu_mib - allocated
        return figures

    return added


def _reset_peaks() -> bool:
    """Start new peaks; False where the system keeps that of the CPU."""
    for device in _devices():
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:  # not Linux, or not permitted
        return False
    return True


def _status(name: str) -> float | None:
    """A memory figure of this process in MiB, where the system tells (Linux)."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


def _peak_cpu() -> float:
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _MIB


def _peak_gpu() -> float:
    return sum(torch.cuda.max_memory_allocated(device) for device in _devices()) / _MIB


def _wait_for_gpu() -> None:
    for device in _devices():
        torch.cuda.synchronize(device)


def _devices() -> list[int]:
    """CUDA devices in use; asking others to wait would make this process claim memory on them."""
    if not torch.cuda.is_initialized():
        return []
    return [device for device in range(torch.cuda.device_count()) if torch.cuda.max_memory_reserved(device)]
