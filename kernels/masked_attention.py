"""Attention with a gate on every head: flash-attention forward in Triton, and what the backward shares with it.

Scores live in log2 units, so that exponentials are `exp2`. Keys that all queries of a block see are taken without a
mask or a bound, which leaves little to compute beside the products.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymape.kernels.launch import capability, device_of

__all__ = ["MAX_HEAD_SIZE", "masked_attention_forward"]

MAX_HEAD_SIZE = 256
# (BLOCK_M, BLOCK_N, warps) by element size and padded head size, for 2 stages. They fit the 99 KiB of shared memory of
# sm_86 and sm_89, and no kernel runs out of registers (docs/results/compile.md). Fixed, not timed: no result depends on
# a race.
_TILES = {
    ("fwd", 2): {32: (128, 64, 8), 64: (128, 64, 8), 128: (64, 64, 8), 256: (64, 32, 8)},
    ("fwd", 4): {32: (64, 32, 8), 64: (64, 32, 8), 128: (32, 16, 8), 256: (32, 16, 8)},
    ("bwd_query", 2): {32: (64, 64, 8), 64: (64, 64, 8), 128: (64, 32, 8), 256: (32, 32, 8)},
    ("bwd_query", 4): {32: (32, 32, 4), 64: (32, 32, 4), 128: (32, 32, 8), 256: (16, 16, 8)},
    ("bwd_key_value", 2): {32: (32, 64, 4), 64: (64, 32, 8), 128: (32, 64, 8), 256: (16, 32, 8)},
    ("bwd_key_value", 4): {32: (32, 32, 8), 64: (32, 32, 8), 128: (16, 16, 8), 256: (16, 16, 8)},
}
# Where sm_90 has the room: a warp group takes 64 rows of a product, and splits the columns with a second one.
_TILES_90 = {
    ("fwd", 2, 128): (128, 64, 8),
    ("bwd_query", 2, 64): (64, 64, 4),
    ("bwd_query", 2, 128): (64, 64, 4),
    ("bwd_key_value", 2, 64): (32, 64, 4),
}
LOG2E = tl.constexpr(math.log2(math.e))
_CACHED = tl.constexpr(1 << 23)  # elements of the keys: with the values 32 MiB in 16 bits, which the H100's cache holds
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
NO_MASK, _BOOL_MASK, _ADDITIVE_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def block_and_head(blocks, length, BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Return the block and the head, counted over all samples, of this program; `length` keys or queries pass by it.

    Causal blocks differ in their work. Those of one number follow each other, for as many heads as the cache holds, so
    that the heaviest come first and none is left with much to do in the end.
    """
    program = tl.program_id(0)
    if IS_CAUSAL:
        heads = tl.num_programs(0) // blocks
        together = tl.maximum(_CACHED // (tl.maximum(length, 1) * BLOCK_D), 1)
        first = program // (together * blocks) * together
        together = tl.minimum(together, heads - first)
        program -= first * blocks
        block, head = program // together, first + program % together
    else:
        block, head = program % blocks, program // blocks
    return block, head.to(tl.int64)


@triton.jit
def load_rows(
    pointer, rows, stride, count, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BOUNDED: tl.constexpr = True
):
    d = tl.arange(0, BLOCK_D)
    pointers = pointer + rows[:, None].to(tl.int64) * stride + d[None, :]  # [rows, D]
    if BOUNDED:
        loaded = tl.load(pointers, mask=(rows[:, None] < count) & (d[None, :] < HEAD_SIZE), other=0.0)
    elif HEAD_SIZE == BLOCK_D:
        loaded = tl.load(pointers)
    else:
        loaded = tl.load(pointers, mask=d[None, :] < HEAD_SIZE, other=0.0)
    return loaded


@triton.jit
def store_rows(pointer, values, rows, stride, count, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < count) & (d[None, :] < HEAD_SIZE)
    offsets = rows[:, None].to(tl.int64) * stride + d[None, :]
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def masked_scores(products, mask, stride_mt, t, s, T, S, qk_scale, MASK: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Return scores in log2 units, -inf where query t must not see key s or one of them lies outside.

    t and s have the shapes [M, 1] and [1, N], or [1, M] and [N, 1] where products of keys and queries are wanted.
    """
    scores = products * qk_scale
    visible = (t < T) & (s < S)
    if IS_CAUSAL:
        visible = visible & (s <= t)
    if MASK != NO_MASK:
        offsets = t.to(tl.int64) * stride_mt + s
        if MASK == _BOOL_MASK:
            visible = visible & (tl.load(mask + offsets, mask=visible, other=0) != 0)
        else:
            bias = tl.load(mask + offsets, mask=visible, other=0.0).to(tl.float32)
            # A finite bias must stay finite in log2 units: rows that are at the lowest number throughout are uniform.
            scores += tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2E, _LOWEST))
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def block_scores(
    q, k, mask, rows, columns, stride_mt, T, S, qk_scale,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Return the scores of some queries and keys in log2 units; not BOUNDED: all are there and every query sees all."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    if BOUNDED:
        t, s = rows[:, None], columns[None, :]
        scores = masked_scores(products, mask, stride_mt, t, s, T, S, qk_scale, MASK, IS_CAUSAL)
    else:
        scores = products * qk_scale
    return scores


@triton.jit
def _attend(
    acc, largest, total, q, key, value, mask, rows, first, last, stride_ks, stride_vs, stride_mt, T, S, qk_scale,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Take the keys first to last into the softmax; not BOUNDED: all of them are there, and every query sees them."""
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, columns, stride_ks, S, HEAD_SIZE, BLOCK_D, BOUNDED)
        scores = block_scores(q, k, mask, rows, columns, stride_mt, T, S, qk_scale, MASK, IS_CAUSAL, BOUNDED)
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = new_largest
        if BOUNDED:
            shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # no key so far: -inf - -inf is NaN
        p = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(largest - shift)
        v = load_rows(value, columns, stride_vs, S, HEAD_SIZE, BLOCK_D, BOUNDED)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        largest = new_largest
    return acc, largest, total


@triton.jit
def _masked_attention_fwd_kernel(
    query, key, value, gate, mask, output, ungated, row_max, row_norm,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh,
    stride_mb, stride_mh, stride_mt,
    stride_ob, stride_oh, stride_ot,
    H, T, S, qk_scale,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_GATE: tl.constexpr, GATE_GRAD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    block, bh = block_and_head(blocks, S, BLOCK_D, IS_CAUSAL)
    block = blocks - 1 - block  # the last rows see most keys
    b, h = bh // H, bh % H
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    key += b * stride_kb + h // GROUP * stride_kh
    value += b * stride_vb + h // GROUP * stride_vh
    if MASK != NO_MASK:
        mask += b * stride_mb + h * stride_mh

    end, full = S, 0  # every query of the block sees the keys below `full`
    if IS_CAUSAL:
        end = tl.minimum(S, (block + 1) * BLOCK_M)
    if MASK == NO_MASK:
        full = (tl.minimum(S, block * BLOCK_M) if IS_CAUSAL else S) // BLOCK_N * BLOCK_N
    if HAS_GATE:
        g = tl.load(gate + b * stride_gb + h * stride_gh).to(tl.float32)
        if not GATE_GRAD:
            end = tl.where(g == 0.0, 0, end)  # a closed head that does not learn sees no key
            full = tl.minimum(full, end)

    q = load_rows(query + b * stride_qb + h * stride_qh, rows, stride_qt, T, HEAD_SIZE, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if MASK == NO_MASK:
        acc, largest, total = _attend(
            acc, largest, total, q, key, value, mask, rows, 0, full, stride_ks, stride_vs, stride_mt, T, S, qk_scale,
            HEAD_SIZE, BLOCK_D, BLOCK_N, MASK, IS_CAUSAL, BOUNDED=False,
        )  # fmt: skip
    acc, largest, total = _attend(
        acc, largest, total, q, key, value, mask, rows, full, end, stride_ks, stride_vs, stride_mt, T, S, qk_scale,
        HEAD_SIZE, BLOCK_D, BLOCK_N, MASK, IS_CAUSAL, BOUNDED=True,
    )  # fmt: skip

    norm = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    acc *= norm[:, None]
    offset = b * stride_ob + h * stride_oh
    if GATE_GRAD:
        store_rows(ungated + offset, acc, rows, stride_ot, T, HEAD_SIZE, BLOCK_D)
    if HAS_GATE:
        acc *= g
    store_rows(output + offset, acc, rows, stride_ot, T, HEAD_SIZE, BLOCK_D)
    tl.store(row_max + bh * T + rows, tl.where(total == 0.0, 0.0, largest), mask=rows < T)
    tl.store(row_norm + bh * T + rows, norm, mask=rows < T)


def tile_of(kernel: str, query: Tensor) -> dict[str, int]:
    block_d = max(16, triton.next_power_of_2(query.shape[3]))
    size, column = query.dtype.itemsize, max(32, block_d)
    m, n, warps = _TILES[kernel, size][column]
    if (kernel, size, column) in _TILES_90 and capability(query) >= 90:
        m, n, warps = _TILES_90[kernel, size, column]
    return {"BLOCK_D": block_d, "BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 2}


def options_of(
    query: Tensor, key: Tensor, gate: Tensor | None, attn_mask: Tensor | None, is_causal: bool, gate_grad: bool
) -> dict[str, int | bool]:
    mask = NO_MASK if attn_mask is None else _BOOL_MASK if attn_mask.dtype == torch.bool else _ADDITIVE_MASK
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_SIZE": query.shape[3],
        "MASK": mask.value,
        "IS_CAUSAL": is_causal,
        "HAS_GATE": gate is not None,
        "GATE_GRAD": gate_grad,
    }


def gate_and_mask_strides(gate: Tensor | None, attn_mask: Tensor | None) -> tuple[int, ...]:
    gate_strides = (0, 0) if gate is None else gate.stride()
    return (*gate_strides, *((0, 0, 0) if attn_mask is None else attn_mask.stride()[:3]))


def in_rows(x: Tensor) -> Tensor:
    """Copy only what the kernels cannot read in place: a last dimension that is not contiguous."""
    return x if x.stride(3) == 1 or x.shape[3] <= 1 else x.contiguous()


def masked_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
    gate_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gated output, the ungated one if `gate_grad` (else an empty tensor), and the softmax's row terms.

    Args:
        query: [B, H, T, D]; key, value: [B, Hkv, S, D]; fp32, bf16 or fp16.
        gate: [B, H] in fp32, any strides, or None.
        attn_mask: [B, H, T, S], bool or additive, or None; the last dimension contiguous, any other strides (0 where it
            broadcasts).
        gate_grad: the gate will want its gradient, so that no head may be skipped.

    Returns:
        output and ungated output [B, H, T, D], laid out in memory as [B, T, H, D]; row_max and row_norm
        [B, H, T] in fp32.
    """
    query, key, value = in_rows(query), in_rows(key), in_rows(value)
    attn_mask = None if attn_mask is None else in_rows(attn_mask)
    batch, heads, tokens, size = query.shape
    output = query.new_empty((batch, tokens, heads, size)).transpose(1, 2)
    ungated = query.new_empty((batch, tokens, heads, size)).transpose(1, 2) if gate_grad else query.new_empty(0)
    row_max = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    row_norm = torch.empty_like(row_max)
    if output.numel() == 0:
        return output, ungated, row_max, row_norm
    with device_of(query):
        tile = tile_of("fwd", query)
        _masked_attention_fwd_kernel[(triton.cdiv(tokens, tile["BLOCK_M"]) * batch * heads,)](
            query, key, value, gate, attn_mask, output, ungated, row_max, row_norm,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *gate_and_mask_strides(gate, attn_mask),
            *output.stride()[:3],
            heads, tokens, key.shape[2], scale * LOG2E.value,
            **tile, **options_of(query, key, gate, attn_mask, is_causal, gate_grad),
        )  # fmt: skip
    return output, ungated, row_max, row_norm
