"""Which backends can run here, and the one rule that chooses among them.

The rule for `backend="auto"`: the first of the operator's backends, in its own order, that can run on the tensors.
Every order begins with `cpu` and ends with `reference`, which a CUDA tensor takes with a warning. Between them comes
`triton` before `cuda`, where an operator has both; `selected_weight_grad` has them the other way round, since gathering
once is less work there than in every tile. A backend asked for by name either runs or raises with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from types import ModuleType

import torch

__all__ = ["BACKENDS", "has_kernel", "native", "resolve_backend"]

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


def has_kernel(device: torch.device, supported: tuple[str, ...]) -> bool:
    """Whether an operator with these backends has any on a device but plain torch."""
    return any(_why_not(backend, device) is None for backend in supported[:-1])


def _why_not(backend: str, device: torch.device, needs_core: bool = True, no_triton: str | None = None) -> str | None:
    """Return why `backend` cannot work on tensors of `device`, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return None if device.type == "cpu" else f"it needs CPU tensors, got tensors on {device}"
    if backend == "cuda":
        if device.type != "cuda":
            return f"it needs CUDA tensors, got tensors on {device}"
        if needs_core and not native().has_cuda:
            return "this build has no CUDA kernels (it was built without nvcc 12 or newer)"
        return None
    if not _has_triton():
        return "triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and _triton_interpreted()):
        return f"it needs CUDA tensors, got tensors on {device}"
    return no_triton


def resolve_backend(
    op: str,
    backend: str,
    device: torch.device,
    *,
    supported: tuple[str, ...],
    needs_core: bool = True,
    no_triton: str | None = None,
) -> str:
    """Turn a `backend` argument into the backend to run.

    Args:
        op: the operator's name, for messages.
        backend: one of `BACKENDS`.
        device: where the operator's tensors are.
        supported: the backends that implement the operator, in the order in which `auto` tries them.
        needs_core: whether its `cuda` is a kernel of the native core, not torch's own.
        no_triton: why its Triton kernel cannot take these tensors, or None.

    Returns:
        One of `supported`.

    Raises:
        ValueError: the name is unknown, or the operator has no such backend.
        RuntimeError: the backend was asked for and cannot run here.
    """
    if backend == "auto":
        return _first(op, device, supported, needs_core, no_triton)
    if backend not in supported:
        valid = ", ".join(("auto", *supported))
        raise ValueError(f"backend of {op} must be one of {valid}, got {backend!r}")
    reason = _why_not(backend, device, needs_core, no_triton)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} of {op} cannot run: {reason}")
    return backend


def _first(op: str, device: torch.device, supported: tuple[str, ...], needs_core: bool, no_triton: str | None) -> str:
    reason = None
    for backend in supported[:-1]:
        reason = _why_not(backend, device, needs_core, no_triton)
        if reason is None:
            return backend
    # Under torch.compile a warning would break the graph.
    if device.type == "cuda" and not torch.compiler.is_compiling():
        warnings.warn(f"{op} runs in plain torch: {reason}", stacklevel=3)
    return supported[-1]
