"""segmented_lora: many LoRA adapters in one batch, each on its own segment of rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pymape.backends import resolve_backend
from pymape.ops.common import check_alike, check_float

__all__ = ["segmented_lora", "segmented_lora_reference"]

_SUPPORTED = ("cpu", "triton", "reference")
_MAX_RANK = 128  # of the Triton kernel: what a program keeps on its multiprocessor grows with the rank
_ALIGNMENT = 64  # bytes; a cache line, and where torch puts what it allocates


def segmented_lora(
    x: Tensor,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Sequence[int],
    adapters: Sequence[int],
    scale: Sequence[float],
    *,
    backend: str = "auto",
) -> Tensor:
    """Add to the output of a frozen linear layer what the LoRA adapter of every segment of rows gives.

    y[i] = base[i] + (x[i] A_a^T) B_a^T scale_a     for offsets[s] <= i < offsets[s + 1] and a = adapters[s]

    The bits of a segment depend on its own rows and adapter only, not on the number, order, sizes or contents of the
    other segments. On CPU, at equal numbers of threads, they are those of PEFT's `lora.Linear` in eval mode on these
    rows. `reference` promises neither.

    Args:
        x: inputs of the layer, [N, in]; fp64, fp32, bf16 or fp16.
        base: what the frozen layer gave for x, [N, out], dtype of x.
        lora_a: the adapters' first matrices, [K, r, in], dtype of x.
        lora_b: their second matrices, [K, out, r], dtype of x.
        offsets: S + 1 rising row numbers from 0 to N: where each of S segments begins and the last one ends. Equal
            neighbours make an empty segment.
        adapters: adapter of every segment, S values in 0 .. K - 1, or -1 for none: y is base there, bit for bit.
        scale: scaling factor of every adapter, K values; alpha / r, or alpha / sqrt(r) with rank stabilisation.
        backend: `auto`, `cpu` (two GEMMs a segment), `triton` (one kernel, accumulates in fp32; not for fp64, ranks up
            to 128, not inside CUDA graphs) or `reference`, the only one that is differentiable.

    Returns:
        [N, out], contiguous, dtype of x.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a value is out of its range, or the backend is unknown.
        RuntimeError: the backend cannot run here, or a gradient is wanted from one that has none.

    Source: LoRA (arXiv 2106.09685, equation 3); segments of rows as in Punica (arXiv 2310.18547); an ensemble of
    adapters as in S3T (arXiv 2406.16257).
    """
    _check(x, base, lora_a, lora_b, offsets, adapters, scale)
    no_triton = None
    if x.dtype == torch.float64 or lora_a.shape[1] > _MAX_RANK:
        no_triton = (
            f"it takes fp32, bf16 and fp16 and ranks up to {_MAX_RANK}, got {x.dtype} and rank {lora_a.shape[1]}"
        )
    chosen = resolve_backend("segmented_lora", backend, x.device, supported=_SUPPORTED, no_triton=no_triton)
    if chosen == "reference":
        return segmented_lora_reference(x, base, lora_a, lora_b, offsets, adapters, scale)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, base, lora_a, lora_b)):
        raise RuntimeError(
            f"backend {chosen!r} of segmented_lora has no gradient: call it under torch.no_grad() or take "
            "backend='reference'"
        )
    return torch.ops.pymape.segmented_lora(x, base, lora_a, lora_b, offsets, adapters, scale, chosen)


def segmented_lora_reference(
    x: Tensor,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Sequence[int],
    adapters: Sequence[int],
    scale: Sequence[float],
) -> Tensor:
    """Plain torch specification of `segmented_lora`: PEFT's computation, segment by segment."""
    parts = [base[:0]]
    for (start, end), adapter in zip(pairwise(offsets), adapters, strict=True):
        part = base[start:end]
        if adapter >= 0:
            h = F.linear(x[start:end], lora_a[adapter])  # [n, r]
            part = part + F.linear(h, lora_b[adapter]) * scale[adapter]
        parts.append(part)
    return torch.cat(parts)


torch.library.define(
    "pymape::segmented_lora",
    "(Tensor x, Tensor base, Tensor lora_a, Tensor lora_b, SymInt[] offsets, int[] adapters, float[] scale,"
    " str backend) -> Tensor",
)


@torch.library.impl("pymape::segmented_lora", "CompositeExplicitAutograd")
def _forward(
    x: Tensor,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Sequence[int],
    adapters: Sequence[int],
    scale: Sequence[float],
    backend: str,
) -> Tensor:
    x, base, lora_a, lora_b = (tensor.detach().contiguous() for tensor in (x, base, lora_a, lora_b))
    result = torch.empty_like(base)
    segments = []
    for (start, end), adapter in zip(pairwise(offsets), adapters, strict=True):
        if adapter >= 0:
            segments.append((start, end, adapter, scale[adapter]))
        else:
            result[start:end] = base[start:end]
    if backend == "cpu":
        for start, end, adapter, factor in segments:
            rows = result[start:end]
            h = _aligned(x[start:end]) @ _aligned(lora_a[adapter]).t()  # [n, r]
            torch.mm(h, _aligned(lora_b[adapter]).t(), out=rows)
            rows.mul_(factor).add_(base[start:end])  # rounds twice, as PEFT does: `add_` with alpha would round once
        return result
    import pymape.kernels.segmented_lora as kernels

    kernels.segmented_lora(x, base, lora_a, lora_b, segments, result)
    return result


def _aligned(part: Tensor) -> Tensor:
    """A copy of what does not begin where torch would have put it: the bits of a GEMM depend on that."""
    return part if part.data_ptr() % _ALIGNMENT == 0 else part.clone()


@torch.library.register_fake("pymape::segmented_lora")
def _fake(
    x: Tensor,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Sequence[int],
    adapters: Sequence[int],
    scale: Sequence[float],
    backend: str,
) -> Tensor:
    return base.new_empty(base.shape)


def _check(
    x: Tensor,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Sequence[int],
    adapters: Sequence[int],
    scale: Sequence[float],
) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must have shape (N, in), got {tuple(x.shape)}")
    rows, inputs = x.shape
    if base.dim() != 2 or base.shape[0] != rows:
        raise ValueError(f"base must have shape ({rows}, out), got {tuple(base.shape)}")
    if lora_a.dim() != 3 or lora_a.shape[2] != inputs:
        raise ValueError(f"lora_a must have shape (K, r, {inputs}), got {tuple(lora_a.shape)}")
    count, rank, _ = lora_a.shape
    if lora_b.shape != (count, base.shape[1], rank):
        raise ValueError(f"lora_b must have shape ({count}, {base.shape[1]}, {rank}), got {tuple(lora_b.shape)}")
    check_float("x", x)
    for name, tensor in (("base", base), ("lora_a", lora_a), ("lora_b", lora_b)):
        check_alike(name, tensor, "x", x)
    if len(offsets) != len(adapters) + 1:
        raise ValueError(f"offsets must hold {len(adapters) + 1} numbers, one more than adapters, got {len(offsets)}")
    if offsets[0] != 0 or offsets[-1] != rows or any(a > b for a, b in pairwise(offsets)):
        raise ValueError(f"offsets must rise from 0 to the {rows} rows of x, got {list(offsets)}")
    for adapter in adapters:
        if not -1 <= adapter < count:
            raise ValueError(f"adapters must be between -1 and {count - 1}, got {adapter}")
    if len(scale) != count:
        raise ValueError(f"scale must hold {count} numbers, one for every adapter, got {len(scale)}")
    for factor in scale:
        if not abs(factor) < math.inf:  # torch.compile cannot trace math.isfinite
            raise ValueError(f"scale must be finite, got {factor}")
