"""Which backends can run here, and the one rule that chooses among them.

The rule for `backend="auto"`: CPU tensors take `cpu`; CUDA tensors take `triton` where the operator has a Triton kernel
and triton is installed, and `cuda` otherwise, or, with a warning, `reference` where the CUDA kernels were not built;
tensors of any other device take `reference`. One operator differs: `selected_weight_grad` takes `cuda`, since gathering
once is less work there than in every tile. A backend asked for by name either runs or raises with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType

import torch

__all__ = ["BACKENDS", "native", "resolve_backend"]

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")


@functools.cache
def native() -> ModuleType:
    """Return the native core, `pymape._C`.

    Raises:
        ImportError: the extension was not built.
    """
    try:
        from pymape import _C
    except ImportError as error:
        raise ImportError(f"pymape._C cannot be loaded ({error}); build it with `pip install .`") from error
    return _C


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _triton_interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _why_not(backend: str, device: torch.device) -> str | None:
    """Return why `backend` cannot work on tensors of `device`, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device.type == "cpu" else f"it needs CPU tensors, got tensors on {device}"
    if backend == "cuda":
        if device.type != "cuda":
            return f"it needs CUDA tensors, got tensors on {device}"
        return None if native().has_cuda else "this build has no CUDA kernels (it was built without nvcc 12 or newer)"
    if not _has_triton():
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and _triton_interpreted()):
        return f"it needs CUDA tensors, got tensors on {device}"
    return None


def resolve_backend(op: str, backend: str, device: torch.device, *, supported: tuple[str, ...]) -> str:
    """Turn a `backend` argument into the backend to run.

    Args:
        op: the operator's name, for messages.
        backend: one of `BACKENDS`.
        device: where the operator's tensors are.
        supported: the backends that implement the operator, without `auto`.

    Returns:
        One of `supported`.

    Raises:
        ValueError: the name is unknown, or the operator has no such backend.
        RuntimeError: the backend was asked for and cannot run here.
    """
    if backend == "auto":
        if device.type == "cpu":
            return "cpu"
        if device.type == "cuda":
            return "triton" if "triton" in supported and _has_triton() else _cuda_or_reference(op, device, supported)
        return "reference"
    if backend not in supported:
        valid = ", ".join(("auto", *supported))
        raise ValueError(f"backend of {op} must be one of {valid}, got {backend!r}")
    reason = _why_not(backend, device)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} of {op} cannot run: {reason}")
    return backend


def _cuda_or_reference(op: str, device: torch.device, supported: tuple[str, ...]) -> str:
    reason = _why_not("cuda", device) if "cuda" in supported else "triton is not installed"
    if reason is None:
        return "cuda"
    if not torch.compiler.is_compiling():  # under torch.compile a warning would break the graph
        warnings.warn(f"{op} runs in plain torch: {reason}", stacklevel=3)
    return "reference"
