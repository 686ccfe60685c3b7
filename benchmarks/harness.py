"""The one way a benchmark is timed, printed and written: rounds that alternate the contenders, medians, JSON."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pymape
from pymape.files import atomic_write

__all__ = ["Case", "Report", "alternate", "gigabytes_per_second", "measure"]


_SHORT = 0.05  # seconds


@dataclass
class Case:
    """One measured line of a benchmark."""

    shape: str
    provider: str
    median_s: float
    p20_s: float
    p80_s: float
    figures: dict[str, float] = field(default_factory=dict)  # e.g. {"GB/s": 21.3, "speed-up": 2.1}


@dataclass
class Report:
    """All lines of one benchmark, with what is needed to read them later."""

    name: str
    device: str
    notes: list[str] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)

    def show(self) -> None:
        threads, version = torch.get_num_threads(), torch.__version__
        print(f"\n{self.name} on {self.device}: {_processor()}, {threads} threads, torch {version}")
        figures = list(dict.fromkeys(name for case in self.cases for name in case.figures))
        header = ["shape", "provider", "median ms", "p20", "p80", *figures]
        rows = [
            [case.shape, case.provider, *(f"{1e3 * t:.3f}" for t in (case.median_s, case.p20_s, case.p80_s))]
            + [f"{case.figures[name]:.3g}" if name in case.figures else "" for name in figures]
            for case in self.cases
        ]
        widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
        for row in [header, *rows]:
            cells = [
                cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            ]
            print("  ".join(cells))
        for note in self.notes:
            print(f"  {note}")

    def write(self, path: str | Path) -> None:
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps({**asdict(self), "machine": machine()}, indent=1) + "\n")


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge the times: processor, threads, versions, commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pymape": pymape.__version__,
        "commit": commit,
        "command": " ".join(sys.orig_argv[1:]),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def measure(
    contenders: Mapping[str, Callable[[], Any]], *, seconds: float = 2.0, least: int = 5
) -> dict[str, np.ndarray]:
    """Time the contenders in alternation, so that drift of the machine hits all alike.

    A short call is timed right after an untimed one of its own, and finds its own data in the caches.

    Args:
        contenders: name -> call to time.
        seconds: about how long each contender is measured, after two warm-up calls.
        least: the least number of rounds.

    Returns:
        name -> seconds of every round, in order.
    """
    warm = {name: min(_once(call), _once(call)) for name, call in contenders.items()}
    rounds = max(least, int(seconds / max(max(warm.values()), 1e-6)))
    rounds = min(rounds, 2000)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            if warm[name] < _SHORT:
                call()
            times[name].append(_once(call))
    return {name: np.array(values) for name, values in times.items()}


def alternate(shape: str, contenders: Mapping[str, Callable[[], Any]], **options: Any) -> list[Case]:
    """Measure the contenders and return a `Case` for each."""
    return [
        Case(shape, name, *(float(np.percentile(times, q)) for q in (50, 20, 80)))
        for name, times in measure(contenders, **options).items()
    ]


def gigabytes_per_second(case: Case, bytes_moved: int) -> float:
    """Return the rate at the median time, in 1e9 bytes a second."""
    return bytes_moved / case.median_s / 1e9


def _once(call: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
