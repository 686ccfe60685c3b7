"""How much memory a piece of work adds to what was in use before it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

from pymape.metrics import Cost

__all__ = ["added_memory"]

_STATUS = Path("/proc/self/status")


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
    resident = _resident()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
    allocated = sum(torch.cuda.memory_allocated(device) for device in devices) / 2**20

    def added(cost: Cost) -> dict[str, float]:
        figures = {}
        if resident is not None and not cost.whole_process:
            figures["added_mib"] = cost.peak_cpu_mib - resident
        if cost.peak_gpu_mib is not None:
            figures["added_gpu_mib"] = cost.peak_gpu_mib - allocated
        return figures

    return added


def _resident() -> float | None:
    """MiB of this process in memory."""
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024
