"""selected_weight_grad: the weight gradient of a linear layer for selected rows or columns only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pymape.backends import resolve_backend
from pymape.ops.common import check_alike, check_device, check_float, no_fp64

__all__ = ["selected_weight_grad", "selected_weight_grad_reference"]

# Scattered columns are loaded 2 bytes at a time, so that gathering them once beats gathering in every tile.
_SUPPORTED = ("cpu", "cuda", "triton", "reference")
_AXES = ("rows", "columns")


def selected_weight_grad(x: Tensor, dy: Tensor, index: Tensor | None, axis: str, *, backend: str = "auto") -> Tensor:
    """Return the gradient of selected rows or columns of W in y = x W^T.

    rows:    dW[index, :]   = dy[:, index]^T x      [n, in]
    columns: dW[:, index]^T = x[:, index]^T dy      [n, out]

    Args:
        x: inputs of the layer, [N, in]; fp64, fp32, bf16 or fp16.
        dy: gradient of its outputs, [N, out], dtype of x.
        index: int64 [n], which rows (or columns) of W, in any order, each within it; None where dy (or x) holds only
            theirs already.
        axis: `rows` or `columns`.
        backend: `auto`, `cpu` and `cuda` (a GEMM on gathered entries), `triton` (gathers while it loads, which saves
            the copy but not the time; not for fp64) or `reference`.

    Returns:
        [n, in] or [n, out], columns transposed, contiguous, in fp32 (fp64 for fp64), on a GPU accumulated in it.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the axis or backend is unknown.
        RuntimeError: the backend cannot run here.

    Source: updating selected modules only, MAPE-Unlearn (arXiv 2508.17233); compact sparse fine-tuning as in S2FT
    (arXiv 2412.06289).
    """
    _check(x, dy, index, axis)
    chosen = resolve_backend(
        "selected_weight_grad", backend, x.device, supported=_SUPPORTED, needs_core=False, no_triton=no_fp64(x)
    )  # its `cuda` is torch's own
    if chosen == "reference":
        return selected_weight_grad_reference(x, dy, index, axis)
    return torch.ops.pymape.selected_weight_grad(x, dy, index, axis, chosen)


def selected_weight_grad_reference(x: Tensor, dy: Tensor, index: Tensor | None, axis: str) -> Tensor:
    """Plain torch specification of `selected_weight_grad`: the full gradient, then the selection."""
    weight_grad = dy.t() @ x if axis == "rows" else x.t() @ dy  # [out, in], or its transpose
    selected = weight_grad if index is None else weight_grad.index_select(0, index)
    return selected.to(_accumulator(x))


def _sides(x: Tensor, dy: Tensor, axis: str) -> tuple[Tensor, Tensor]:
    """The side that is gathered and the one that is taken in full."""
    return (dy, x) if axis == "rows" else (x, dy)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


torch.library.define(
    "pymape::selected_weight_grad", "(Tensor x, Tensor dy, Tensor? index, str axis, str backend) -> Tensor"
)


@torch.library.impl("pymape::selected_weight_grad", "CompositeExplicitAutograd")
def _forward(x: Tensor, dy: Tensor, index: Tensor | None, axis: str, backend: str) -> Tensor:
    gathered, full = _sides(x.detach(), dy.detach(), axis)
    if backend != "triton":
        selected = gathered if index is None else gathered.index_select(1, index)  # [N, n]
        if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
            return torch.mm(selected.t(), full, out_dtype=torch.float32)
        return (selected.t() @ full).to(_accumulator(x))
    import pymape.kernels.selected_weight_grad as kernels

    result = _fake(x, dy, index, axis, backend)
    kernels.selected_weight_grad(gathered, full, None if index is None else index.contiguous(), result)
    return result


@torch.library.register_fake("pymape::selected_weight_grad")
def _fake(x: Tensor, dy: Tensor, index: Tensor | None, axis: str, backend: str) -> Tensor:
    gathered, full = _sides(x, dy, axis)
    rows = gathered.shape[1] if index is None else index.shape[0]
    return x.new_empty((rows, full.shape[1]), dtype=_accumulator(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dy, index, ctx.axis, _ = inputs
    ctx.save_for_backward(x, dy, index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, index = ctx.saved_tensors
    gathered, full = _sides(x, dy, ctx.axis)
    x_needed, dy_needed = ctx.needs_input_grad[:2]
    gathered_needed, full_needed = (dy_needed, x_needed) if ctx.axis == "rows" else (x_needed, dy_needed)
    grad = grad.to(x.dtype)
    d_gathered = d_full = None
    if gathered_needed:
        d_gathered = full @ grad.t()  # [N, n]
        if index is not None:
            d_gathered = torch.zeros_like(gathered).index_add(1, index, d_gathered)
    if full_needed:
        d_full = (gathered if index is None else gathered.index_select(1, index)) @ grad
    d_x, d_dy = (d_full, d_gathered) if ctx.axis == "rows" else (d_gathered, d_full)
    return d_x, d_dy, None, None, None


torch.library.register_autograd("pymape::selected_weight_grad", _backward, setup_context=_setup)


def _check(x: Tensor, dy: Tensor, index: Tensor | None, axis: str) -> None:
    if axis not in _AXES:
        raise ValueError(f"axis must be one of {', '.join(_AXES)}, got {axis!r}")
    if x.dim() != 2:
        raise ValueError(f"x must have shape (N, in), got {tuple(x.shape)}")
    if dy.dim() != 2 or dy.shape[0] != x.shape[0]:
        raise ValueError(f"dy must have shape ({x.shape[0]}, out), got {tuple(dy.shape)}")
    check_float("x", x)
    check_alike("dy", dy, "x", x)
    if index is None:
        return
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 of shape (n,), got {index.dtype} of shape {tuple(index.shape)}")
    check_device("index", index, "x", x)
