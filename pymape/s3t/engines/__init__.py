"""What trains stages: this process, worker processes of this machine, or a Ray cluster (`engines.ray`)."""

from __future__ import annotations

import os
from typing import Literal

import torch

from pymape.s3t.engines.base import Engine, InlineEngine, WorkerLostError
from pymape.s3t.engines.local import LocalEngine

__all__ = ["Engine", "InlineEngine", "LocalEngine", "WorkerLostError", "make_engine"]


def make_engine(
    name: Literal["local", "inline", "ray"],
    workers: int | None = None,
    address: str | None = None,
    device: Literal["cpu", "cuda"] = "cpu",
) -> Engine:
    """The engine of a name.

    Args:
        name: "local" (worker processes), "inline" (this process) or "ray".
        workers: stages trained at the same time; default: as many as there are CPUs, or GPUs.
        address: of a Ray cluster; default: a Ray started on this machine for as long as the engine is open.
        device: that the stages are trained on.

    Raises:
        ValueError: another name, no workers, or an address for an engine that has none.
        ImportError: Ray is not installed.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if address is not None and name != "ray":
        raise ValueError(f"address must be given with the engine 'ray' only, got {address!r} with {name!r}")
    if name == "inline":
        return InlineEngine()
    if name == "local":
        most = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
        return LocalEngine(workers or max(1, most))
    if name == "ray":
        from pymape.s3t.engines.ray import RayEngine

        return RayEngine(workers, address, device=device)
    raise ValueError(f"engine must be 'local', 'inline' or 'ray', got {name!r}")
