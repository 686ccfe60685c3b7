"""Attention with a gate on every head: flash-attention forward and backward in Triton.

Scores live in log2 units, so that exponentials are `exp2`. The backward pass gets the softmax back from two numbers a
row, its largest score and one over its sum: their usual fusion into one logarithm loses the sum in rows whose additive
mask is the most negative finite number everywhere.

With Y = m O and a frozen gate, delta = rowsum(dY * Y) = m rowsum(dY * O). A gate that learns keeps the ungated O,
because its gradient, the sum of rowsum(dY * O) over the rows, cannot be had from Y where m is 0.
"""

import contextlib
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_HEAD_SIZE", "masked_attention_backward", "masked_attention_forward"]

MAX_HEAD_SIZE = 256
# (BLOCK_M, BLOCK_N, warps) by element size and padded head size, for 2 stages. They fit the 99 KiB of shared memory of
# sm_86 and sm_89 and spill nothing, but for the fp32 backward at 256. Fixed, not timed: no result depends on a race.
_TILES = {
    ("fwd", 2): {64: (128, 64, 8), 128: (64, 64, 8), 256: (64, 32, 8)},
    ("fwd", 4): {64: (64, 32, 8), 128: (32, 16, 4), 256: (16, 16, 4)},
    ("bwd_query", 2): {64: (64, 64, 4), 128: (64, 32, 8), 256: (32, 32, 8)},
    ("bwd_query", 4): {64: (32, 32, 4), 128: (32, 32, 8), 256: (16, 16, 8)},
    ("bwd_key_value", 2): {64: (64, 32, 8), 128: (32, 64, 8), 256: (16, 32, 8)},
    ("bwd_key_value", 4): {64: (32, 32, 8), 128: (16, 16, 8), 256: (16, 16, 8)},
}
_LOG2E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_NO_MASK, _BOOL_MASK, _ADDITIVE_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _load_rows(pointer, rows, stride, count, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < count) & (d[None, :] < HEAD_SIZE)
    return tl.load(pointer + rows[:, None].to(tl.int64) * stride + d[None, :], mask=inside, other=0.0)  # [rows, D]


@triton.jit
def _store_rows(pointer, values, rows, stride, count, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < count) & (d[None, :] < HEAD_SIZE)
    offsets = rows[:, None].to(tl.int64) * stride + d[None, :]
    tl.store(pointer + offsets, values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _scores(q, k, mask, stride_mt, rows, columns, T, S, qk_scale, MASK: tl.constexpr, IS_CAUSAL: tl.constexpr):
    """Return scores in log2 units [BLOCK_M, BLOCK_N], -inf where a query must not see a key or lies outside."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
    visible = (rows[:, None] < T) & (columns[None, :] < S)
    if IS_CAUSAL:
        visible = visible & (columns[None, :] <= rows[:, None])
    if MASK != _NO_MASK:
        offsets = rows[:, None].to(tl.int64) * stride_mt + columns[None, :]
        if MASK == _BOOL_MASK:
            visible = visible & (tl.load(mask + offsets, mask=visible, other=0) != 0)
        else:
            bias = tl.load(mask + offsets, mask=visible, other=0.0).to(tl.float32)
            # A finite bias must stay finite in log2 units: rows that are at the lowest number throughout are uniform.
            scores += tl.where(bias == float("-inf"), bias, tl.maximum(bias * _LOG2E, _LOWEST))
    return tl.where(visible, scores, float("-inf"))


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
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    key += b * stride_kb + h // GROUP * stride_kh
    value += b * stride_vb + h // GROUP * stride_vh
    if MASK != _NO_MASK:
        mask += b * stride_mb + h * stride_mh

    end = S
    if IS_CAUSAL:
        end = tl.minimum(S, (block + 1) * BLOCK_M)
    if HAS_GATE:
        g = tl.load(gate + b * stride_gb + h * stride_gh).to(tl.float32)
        if not GATE_GRAD:
            end = tl.where(g == 0.0, 0, end)  # a closed head that does not learn sees no key

    q = _load_rows(query + b * stride_qb + h * stride_qh, rows, stride_qt, T, HEAD_SIZE, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = _load_rows(key, columns, stride_ks, S, HEAD_SIZE, BLOCK_D)
        s = _scores(q, k, mask, stride_mt, rows, columns, T, S, qk_scale, MASK, IS_CAUSAL)
        new_largest = tl.maximum(largest, tl.max(s, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # no key so far: -inf - -inf is NaN
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(largest - shift)
        v = _load_rows(value, columns, stride_vs, S, HEAD_SIZE, BLOCK_D)
        total = total * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        largest = new_largest

    norm = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    acc *= norm[:, None]
    offset = b * stride_ob + h * stride_oh
    if GATE_GRAD:
        _store_rows(ungated + offset, acc, rows, stride_ot, T, HEAD_SIZE, BLOCK_D)
    if HAS_GATE:
        acc *= g
    _store_rows(output + offset, acc, rows, stride_ot, T, HEAD_SIZE, BLOCK_D)
    tl.store(row_max + bh * T + rows, tl.where(total == 0.0, 0.0, largest), mask=rows < T)
    tl.store(row_norm + bh * T + rows, norm, mask=rows < T)


@triton.jit
def _masked_attention_bwd_dots_kernel(
    grad, output, dots,
    stride_yb, stride_yh, stride_yt,
    stride_ob, stride_oh, stride_ot,
    H, T,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    dy = _load_rows(grad + b * stride_yb + h * stride_yh, rows, stride_yt, T, HEAD_SIZE, BLOCK_D)
    o = _load_rows(output + b * stride_ob + h * stride_oh, rows, stride_ot, T, HEAD_SIZE, BLOCK_D)
    tl.store(dots + bh * T + rows, tl.sum(dy.to(tl.float32) * o.to(tl.float32), 1), mask=rows < T)


@triton.jit
def _load_row_terms(row_max, row_norm, dots, offset, rows, T, g, GATE_GRAD: tl.constexpr):
    """Return shift, a, c with gated softmax = e a and d scores = e (a dP - c), where e = exp2(scores - shift)."""
    inside = rows < T
    shift = tl.load(row_max + offset + rows, mask=inside, other=0.0)
    norm = tl.load(row_norm + offset + rows, mask=inside, other=0.0)
    dot = tl.load(dots + offset + rows, mask=inside, other=0.0)
    delta = dot * g if GATE_GRAD else dot
    return shift, norm * g, norm * delta


@triton.jit
def _masked_attention_bwd_query_kernel(
    query, key, value, gate, mask, grad, d_query, row_max, row_norm, dots,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh,
    stride_mb, stride_mh, stride_mt,
    stride_yb, stride_yh, stride_yt,
    stride_db, stride_dh, stride_dt,
    H, T, S, qk_scale, scale,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_GATE: tl.constexpr, GATE_GRAD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    block = tl.program_id(0) % blocks
    bh = (tl.program_id(0) // blocks).to(tl.int64)
    b, h = bh // H, bh % H
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    key += b * stride_kb + h // GROUP * stride_kh
    value += b * stride_vb + h // GROUP * stride_vh
    if MASK != _NO_MASK:
        mask += b * stride_mb + h * stride_mh

    end = S
    if IS_CAUSAL:
        end = tl.minimum(S, (block + 1) * BLOCK_M)
    g = 1.0
    if HAS_GATE:
        g = tl.load(gate + b * stride_gb + h * stride_gh).to(tl.float32)
        end = tl.where(g == 0.0, 0, end)  # dO = m dY is zero, whether or not the gate learns

    q = _load_rows(query + b * stride_qb + h * stride_qh, rows, stride_qt, T, HEAD_SIZE, BLOCK_D)
    dy = _load_rows(grad + b * stride_yb + h * stride_yh, rows, stride_yt, T, HEAD_SIZE, BLOCK_D)
    shift, a, c = _load_row_terms(row_max, row_norm, dots, bh * T, rows, T, g, GATE_GRAD)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = _load_rows(key, columns, stride_ks, S, HEAD_SIZE, BLOCK_D)
        v = _load_rows(value, columns, stride_vs, S, HEAD_SIZE, BLOCK_D)
        s = _scores(q, k, mask, stride_mt, rows, columns, T, S, qk_scale, MASK, IS_CAUSAL)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        ds = tl.exp2(s - shift[:, None]) * (a[:, None] * dp - c[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    _store_rows(d_query + b * stride_db + h * stride_dh, dq * scale, rows, stride_dt, T, HEAD_SIZE, BLOCK_D)


@triton.jit
def _masked_attention_bwd_key_value_kernel(
    query, key, value, gate, mask, grad, d_key, d_value, row_max, row_norm, dots,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_ks,
    stride_vb, stride_vh, stride_vs,
    stride_gb, stride_gh,
    stride_mb, stride_mh, stride_mt,
    stride_yb, stride_yh, stride_yt,
    stride_db, stride_dh, stride_ds,
    H, T, S, qk_scale, scale,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_GATE: tl.constexpr, GATE_GRAD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BLOCK_N)
    block = tl.program_id(0) % blocks
    group = (tl.program_id(0) // blocks).to(tl.int64)
    b, kv_head = group // (H // GROUP), group % (H // GROUP)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _load_rows(key + b * stride_kb + kv_head * stride_kh, columns, stride_ks, S, HEAD_SIZE, BLOCK_D)
    v = _load_rows(value + b * stride_vb + kv_head * stride_vh, columns, stride_vs, S, HEAD_SIZE, BLOCK_D)

    begin = 0
    if IS_CAUSAL:
        begin = block * BLOCK_N // BLOCK_M * BLOCK_M  # the first queries that see a key of this block
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # The query heads of a group are summed here, one after the other: no atomics, one order.
    for h in range(kv_head * GROUP, kv_head * GROUP + GROUP):
        end = T
        g = 1.0
        if HAS_GATE:
            g = tl.load(gate + b * stride_gb + h * stride_gh).to(tl.float32)
            end = tl.where(g == 0.0, 0, end)
        if MASK != _NO_MASK:
            mask_head = mask + b * stride_mb + h * stride_mh
        else:
            mask_head = mask
        for start in range(begin, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q = _load_rows(query + b * stride_qb + h * stride_qh, rows, stride_qt, T, HEAD_SIZE, BLOCK_D)
            dy = _load_rows(grad + b * stride_yb + h * stride_yh, rows, stride_yt, T, HEAD_SIZE, BLOCK_D)
            shift, a, c = _load_row_terms(row_max, row_norm, dots, (b * H + h) * T, rows, T, g, GATE_GRAD)
            s = _scores(q, k, mask_head, stride_mt, rows, columns, T, S, qk_scale, MASK, IS_CAUSAL)
            e = tl.exp2(s - shift[:, None])
            p = e * a[:, None]
            dv = tl.dot(tl.trans(p.to(dy.dtype)), dy, dv, input_precision="ieee")
            dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
            ds = p * dp - e * c[:, None]
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision="ieee")
    offset = b * stride_db + kv_head * stride_dh
    _store_rows(d_key + offset, dk * scale, columns, stride_ds, S, HEAD_SIZE, BLOCK_D)
    _store_rows(d_value + offset, dv, columns, stride_ds, S, HEAD_SIZE, BLOCK_D)


def _tile(kernel: str, head_size: int, dtype: torch.dtype) -> dict[str, int]:
    block_d = max(16, triton.next_power_of_2(head_size))
    m, n, warps = _TILES[kernel, dtype.itemsize][max(64, block_d)]
    return {"BLOCK_D": block_d, "BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": 2}


def _options(
    query: Tensor, key: Tensor, gate: Tensor | None, attn_mask: Tensor | None, is_causal: bool, gate_grad: bool
) -> dict[str, int | bool]:
    mask = _NO_MASK if attn_mask is None else _BOOL_MASK if attn_mask.dtype == torch.bool else _ADDITIVE_MASK
    return {
        "GROUP": query.shape[1] // key.shape[1],
        "HEAD_SIZE": query.shape[3],
        "MASK": mask.value,
        "IS_CAUSAL": is_causal,
        "HAS_GATE": gate is not None,
        "GATE_GRAD": gate_grad,
    }


def _gate_and_mask_strides(gate: Tensor | None, attn_mask: Tensor | None) -> tuple[int, ...]:
    gate_strides = (0, 0) if gate is None else gate.stride()
    return (*gate_strides, *((0, 0, 0) if attn_mask is None else attn_mask.stride()[:3]))


def _rows(x: Tensor) -> Tensor:
    """Copy only what the kernels cannot read in place: a last dimension that is not contiguous."""
    return x if x.stride(3) == 1 or x.shape[3] <= 1 else x.contiguous()


def _device(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()  # the interpreter takes CPU tensors


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
    query, key, value = _rows(query), _rows(key), _rows(value)
    attn_mask = None if attn_mask is None else _rows(attn_mask)
    batch, heads, tokens, size = query.shape
    output = query.new_empty((batch, tokens, heads, size)).transpose(1, 2)
    ungated = query.new_empty((batch, tokens, heads, size)).transpose(1, 2) if gate_grad else query.new_empty(0)
    row_max = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    row_norm = torch.empty_like(row_max)
    if output.numel() == 0:
        return output, ungated, row_max, row_norm
    tile = _tile("fwd", size, query.dtype)
    with _device(query):
        _masked_attention_fwd_kernel[(triton.cdiv(tokens, tile["BLOCK_M"]) * batch * heads,)](
            query, key, value, gate, attn_mask, output, ungated, row_max, row_norm,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *_gate_and_mask_strides(gate, attn_mask),
            *output.stride()[:3],
            heads, tokens, key.shape[2], scale * _LOG2E.value,
            **tile, **_options(query, key, gate, attn_mask, is_causal, gate_grad),
        )  # fmt: skip
    return output, ungated, row_max, row_norm


def masked_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    attn_mask: Tensor | None,
    output: Tensor,
    row_max: Tensor,
    row_norm: Tensor,
    is_causal: bool,
    scale: float,
    gate_grad: bool,
    query_grad: bool,
    key_value_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return d query, d key, d value (empty where not wanted) and the gate's gradient per sample, [B, H] in fp32.

    Args:
        grad: [B, H, T, D], gradient of the gated output.
        output: [B, H, T, D], ungated if `gate_grad`, else gated.

    Other arguments are those of the forward.
    """
    query, key, value, grad, output = _rows(query), _rows(key), _rows(value), _rows(grad), _rows(output)
    attn_mask = None if attn_mask is None else _rows(attn_mask)
    batch, heads, tokens, size = query.shape
    dots = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    d_query = query.new_empty(query.shape if query_grad else 0)
    # Key and value gradients are laid out alike, so that one set of strides serves both.
    d_key = key.new_empty(key.shape if key_value_grad else 0)
    d_value = torch.empty_like(d_key)
    if output.numel() == 0:  # keys without queries
        d_key.zero_()
        d_value.zero_()
        return d_query, d_key, d_value, dots.sum(-1)
    strides = (
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *_gate_and_mask_strides(gate, attn_mask),
        *grad.stride()[:3],
    )  # fmt: skip
    numbers = (heads, tokens, key.shape[2], scale * _LOG2E.value, scale)
    options = _options(query, key, gate, attn_mask, is_causal, gate_grad)
    with _device(query):
        tile = _tile("bwd_query", size, query.dtype)
        blocks = triton.cdiv(tokens, tile["BLOCK_M"]) * batch * heads
        _masked_attention_bwd_dots_kernel[(blocks,)](
            grad, output, dots, *grad.stride()[:3], *output.stride()[:3], heads, tokens,
            HEAD_SIZE=size, BLOCK_D=tile["BLOCK_D"], BLOCK_M=tile["BLOCK_M"],
        )  # fmt: skip
        if query_grad:
            _masked_attention_bwd_query_kernel[(blocks,)](
                query, key, value, gate, attn_mask, grad, d_query, row_max, row_norm, dots,
                *strides, *d_query.stride()[:3], *numbers, **tile, **options,
            )  # fmt: skip
        if key_value_grad and key.shape[2] > 0:
            tile = _tile("bwd_key_value", size, query.dtype)
            blocks = triton.cdiv(key.shape[2], tile["BLOCK_N"]) * batch * key.shape[1]
            _masked_attention_bwd_key_value_kernel[(blocks,)](
                query, key, value, gate, attn_mask, grad, d_key, d_value, row_max, row_norm, dots,
                *strides, *d_key.stride()[:3], *numbers, **tile, **options,
            )  # fmt: skip
    return d_query, d_key, d_value, dots.sum(-1)
