"""Weight gradient of selected rows or columns: a GEMM over the tokens that gathers one operand while it loads.

result[i, k] = sum over tokens t of gathered[t, index[i]] * full[t, k], accumulated in fp32. Where the result alone has
too few tiles to fill a GPU, the tokens are split over blocks; the parts are added in a fixed order: results repeat.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymape.kernels.launch import device_of

__all__ = ["selected_weight_grad"]

# (BLOCK_N, BLOCK_K, BLOCK_T, warps, stages) by element size; fixed, not timed: no result depends on a race.
_TILES = {2: (64, 128, 64, 4, 3), 4: (64, 64, 16, 4, 3)}
_WANTED_BLOCKS = 264  # two for every multiprocessor of the largest GPUs
_LEAST_TOKENS = 512  # a block's share of the tokens


@triton.jit
def _selected_weight_grad_kernel(
    gathered, full, index, result,
    stride_gt, stride_gc,
    stride_ft, stride_fk,
    N, C, K, T, share,
    HAS_INDEX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    blocks_k = tl.cdiv(K, BLOCK_K)
    rows = tl.program_id(0) // blocks_k * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(0) % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1)
    source = rows.to(tl.int64)
    if HAS_INDEX:
        source = tl.load(index + rows, mask=rows < N, other=0)
    selected = (rows < N) & (source >= 0) & (source < C)  # no index makes the kernel read outside the tensor
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    end = tl.minimum(T, (split + 1) * share)
    for start in range(split * share, end, BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        t = tokens[:, None].to(tl.int64)
        a = tl.load(
            gathered + t * stride_gt + source[None, :] * stride_gc,
            mask=(tokens[:, None] < end) & selected[None, :],
            other=0.0,
        )  # [BLOCK_T, BLOCK_N]
        b = tl.load(
            full + t * stride_ft + columns[None, :].to(tl.int64) * stride_fk,
            mask=(tokens[:, None] < end) & (columns[None, :] < K),
            other=0.0,
        )  # [BLOCK_T, BLOCK_K]
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    offsets = (split.to(tl.int64) * N + rows[:, None]) * K + columns[None, :]
    tl.store(result + offsets, acc, mask=(rows[:, None] < N) & (columns[None, :] < K))


def selected_weight_grad(gathered: Tensor, full: Tensor, index: Tensor | None, result: Tensor) -> None:
    """Fill result [n, K] in fp32 from gathered [T, C], full [T, K] and index [n] (None: C is n)."""
    tokens, (rows, columns) = full.shape[0], result.shape
    if result.numel() == 0:
        return
    block_n, block_k, block_t, warps, stages = _TILES[full.element_size()]
    tiles = triton.cdiv(rows, block_n) * triton.cdiv(columns, block_k)
    splits = max(1, min(_WANTED_BLOCKS // tiles, tokens // _LEAST_TOKENS))
    share = triton.cdiv(triton.cdiv(tokens, splits), block_t) * block_t
    splits = max(1, triton.cdiv(tokens, share)) if tokens else 1
    parts = result if splits == 1 else result.new_empty((splits, rows, columns))
    with device_of(full):
        _selected_weight_grad_kernel[(tiles, splits)](
            gathered, full, index, parts,
            gathered.stride(0), gathered.stride(1),
            full.stride(0), full.stride(1),
            rows, gathered.shape[1], columns, tokens, share,
            HAS_INDEX=index is not None, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_T=block_t,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    if splits > 1:
        torch.sum(parts, 0, out=result)
