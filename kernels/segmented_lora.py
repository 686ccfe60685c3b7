"""Many LoRA adapters in one launch: every tile of rows lies in one segment and meets that segment's adapter.

A program shrinks its rows, h = x A^T, which stays in registers, and expands it, base + scale h B^T, a block of columns
at a time. Where the rows alone are too few to fill a GPU, several programs take the same rows, each with its own h and
its share of the columns. Tiles depend on the dtype and the rank alone, so the bits of a row depend on its segment only.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymape.kernels.launch import device_of

__all__ = ["segmented_lora"]

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) by element size; fixed, not timed: no result depends on a race.
_TILES = {2: (32, 128, 64, 4, 3), 4: (16, 32, 32, 4, 3)}
_WANTED_BLOCKS = 264  # two for every multiprocessor of the largest GPUs


@triton.jit(do_not_specialize=["tiles"])  # one binary, whatever the batch
def _segmented_lora_kernel(
    x, base, lora_a, lora_b, segments, result,
    tiles, IN, OUT, RANK, share,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    segment = segments + tl.program_id(0) // tiles * 4
    start = tl.load(segment).to(tl.int64) + tl.program_id(0) % tiles * BLOCK_M
    end = tl.load(segment + 1).to(tl.int64)
    if start >= end:  # the segment has fewer tiles than the longest one
        return
    adapter = tl.load(segment + 2).to(tl.int64)
    scale = tl.load(segment + 3).to(tl.float32)
    rows = start + tl.arange(0, BLOCK_M)
    ranks = tl.arange(0, BLOCK_R)
    row_inside, rank_inside = (rows < end)[:, None], ranks < RANK

    h = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    k = tl.arange(0, BLOCK_K)
    x += rows[:, None] * IN + k[None, :]
    lora_a += (adapter * RANK + ranks[None, :]) * IN + k[:, None]
    for begin in range(0, IN, BLOCK_K):
        inside = k < IN - begin
        x_tile = tl.load(x, mask=row_inside & inside[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        a_tile = tl.load(lora_a, mask=inside[:, None] & rank_inside[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        h = tl.dot(x_tile, a_tile, h, input_precision="ieee")
        x += BLOCK_K
        lora_a += BLOCK_K
    h = h.to(lora_b.dtype.element_ty)

    first = tl.program_id(1) * share
    # Stages named here make Triton fetch base ahead as well, which feeds no dot.
    for begin in tl.range(first, tl.minimum(OUT, first + share), BLOCK_N, num_stages=STAGES):
        columns = begin + tl.arange(0, BLOCK_N)
        column_inside = (columns < OUT)[None, :]
        b_tile = tl.load(
            lora_b + (adapter * OUT + columns[None, :]) * RANK + ranks[:, None],
            mask=rank_inside[:, None] & column_inside,
            other=0.0,
        )  # [BLOCK_R, BLOCK_N]
        offsets = rows[:, None] * OUT + columns[None, :]
        inside = row_inside & column_inside
        value = tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
        value += tl.dot(h, b_tile, input_precision="ieee") * scale
        tl.store(result + offsets, value.to(result.dtype.element_ty), mask=inside)


def segmented_lora(
    x: Tensor,
    base: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    segments: Sequence[tuple[int, int, int, float]],
    result: Tensor,
) -> None:
    """Fill the segments' rows of result [N, out] from x [N, in], base [N, out], lora_a [K, r, in], lora_b [K, out, r].

    All are contiguous, r is at most 128. A segment: its first row, the row behind its last, its adapter, the scale.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("segmented_lora cannot be captured in a CUDA graph: it copies the segments from the host")
    inputs, outputs, rank = x.shape[1], result.shape[1], lora_a.shape[1]
    longest = max((end - start for start, end, _, _ in segments), default=0)
    if longest == 0 or outputs == 0:
        return
    block_m, block_n, block_k, warps, stages = _TILES[x.element_size()]
    tiles, blocks = triton.cdiv(longest, block_m), triton.cdiv(outputs, block_n)
    shares = max(1, min(blocks, _WANTED_BLOCKS // (tiles * len(segments))))
    share = triton.cdiv(blocks, shares) * block_n
    # fp64 holds row numbers exactly; from pinned memory the host does not wait for the copy.
    table = torch.tensor(segments, dtype=torch.float64, pin_memory=x.is_cuda).to(x.device, non_blocking=True)
    with device_of(x):
        _segmented_lora_kernel[(tiles * len(segments), triton.cdiv(outputs, share))](
            x, base, lora_a, lora_b, table, result,
            tiles, inputs, outputs, rank, share,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_R=max(16, triton.next_power_of_2(rank)),
            STAGES=stages, num_warps=warps, num_stages=stages,
        )  # fmt: skip
