"""Backward of attention with a gate on every head, in Triton: one kernel for queries, one for keys and values.

The softmax comes back from two numbers a row, its largest score and one over its sum: their usual fusion into one
logarithm loses the sum in rows whose additive mask is the most negative finite number everywhere.

With Y = m O and a frozen gate, delta = rowsum(dY * Y) = m rowsum(dY * O). A gate that learns keeps the ungated O,
because its gradient, the sum of rowsum(dY * O) over the rows, cannot be had from Y where m is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymape.kernels.launch import device_of
from pymape.kernels.masked_attention import (
    LOG2E,
    NO_MASK,
    block_and_head,
    block_scores,
    gate_and_mask_strides,
    in_rows,
    load_rows,
    masked_scores,
    options_of,
    store_rows,
    tile_of,
)

__all__ = ["masked_attention_backward"]


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
    dy = load_rows(grad + b * stride_yb + h * stride_yh, rows, stride_yt, T, HEAD_SIZE, BLOCK_D)
    o = load_rows(output + b * stride_ob + h * stride_oh, rows, stride_ot, T, HEAD_SIZE, BLOCK_D)
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
def _query_gradient(
    dq, q, dy, shift, a, c, key, value, mask, rows, first, last, stride_ks, stride_vs, stride_mt, T, S, qk_scale,
    HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add what the keys first to last give; BOUNDED as in `_attend`."""
    for start in range(first, last, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(key, columns, stride_ks, S, HEAD_SIZE, BLOCK_D, BOUNDED)
        v = load_rows(value, columns, stride_vs, S, HEAD_SIZE, BLOCK_D, BOUNDED)
        scores = block_scores(q, k, mask, rows, columns, stride_mt, T, S, qk_scale, MASK, IS_CAUSAL, BOUNDED)
        dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
        ds = tl.exp2(scores - shift[:, None]) * (a[:, None] * dp - c[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


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
    block, bh = block_and_head(blocks, S, BLOCK_D, IS_CAUSAL)
    block = blocks - 1 - block  # as forward
    b, h = bh // H, bh % H
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    key += b * stride_kb + h // GROUP * stride_kh
    value += b * stride_vb + h // GROUP * stride_vh
    if MASK != NO_MASK:
        mask += b * stride_mb + h * stride_mh

    end, full = S, 0
    if IS_CAUSAL:
        end = tl.minimum(S, (block + 1) * BLOCK_M)
    if MASK == NO_MASK:
        full = (tl.minimum(S, block * BLOCK_M) if IS_CAUSAL else S) // BLOCK_N * BLOCK_N
    g = 1.0
    if HAS_GATE:
        g = tl.load(gate + b * stride_gb + h * stride_gh).to(tl.float32)
        end = tl.where(g == 0.0, 0, end)  # dO = m dY is zero, whether or not the gate learns
        full = tl.minimum(full, end)

    q = load_rows(query + b * stride_qb + h * stride_qh, rows, stride_qt, T, HEAD_SIZE, BLOCK_D)
    dy = load_rows(grad + b * stride_yb + h * stride_yh, rows, stride_yt, T, HEAD_SIZE, BLOCK_D)
    shift, a, c = _load_row_terms(row_max, row_norm, dots, bh * T, rows, T, g, GATE_GRAD)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MASK == NO_MASK:
        dq = _query_gradient(
            dq, q, dy, shift, a, c, key, value, mask, rows, 0, full, stride_ks, stride_vs, stride_mt, T, S, qk_scale,
            HEAD_SIZE, BLOCK_D, BLOCK_N, MASK, IS_CAUSAL, BOUNDED=False,
        )  # fmt: skip
    dq = _query_gradient(
        dq, q, dy, shift, a, c, key, value, mask, rows, full, end, stride_ks, stride_vs, stride_mt, T, S, qk_scale,
        HEAD_SIZE, BLOCK_D, BLOCK_N, MASK, IS_CAUSAL, BOUNDED=True,
    )  # fmt: skip
    store_rows(d_query + b * stride_db + h * stride_dh, dq * scale, rows, stride_dt, T, HEAD_SIZE, BLOCK_D)


@triton.jit
def _key_value_gradient(
    dk, dv, k, v, query, gate, mask, grad, row_max, row_norm, dots, head, terms, columns, first, last,
    stride_qh, stride_qt, stride_gh, stride_mh, stride_mt, stride_yh, stride_yt, T, S, qk_scale,
    GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    MASK: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_GATE: tl.constexpr, GATE_GRAD: tl.constexpr,
    DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Add what the queries first to last of a group's heads give.

    Without a mask, DIAGONAL blocks hold keys that some of the queries do not see, and the others none. Rows beyond the
    last query need no bound, because their terms are 0, nor do keys beyond the last one: what they get is not stored.
    """
    # The query heads of a group are summed here, one after the other: no atomics, one order.
    for h in range(head, head + GROUP):
        end = last
        g = 1.0
        if HAS_GATE:
            g = tl.load(gate + h * stride_gh).to(tl.float32)
            end = tl.where(g == 0.0, 0, last)
        mask_head = mask
        if MASK != NO_MASK:
            mask_head += h * stride_mh
        for start in range(first, end, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            q = load_rows(query + h * stride_qh, rows, stride_qt, T, HEAD_SIZE, BLOCK_D)
            dy = load_rows(grad + h * stride_yh, rows, stride_yt, T, HEAD_SIZE, BLOCK_D)
            shift, a, c = _load_row_terms(row_max, row_norm, dots, terms + h * T, rows, T, g, GATE_GRAD)
            # Products of keys and queries, [BLOCK_N, BLOCK_M]: as they come out of one product they go into the next.
            products = tl.dot(k, tl.trans(q), input_precision="ieee")
            t, s = rows[None, :], columns[:, None]
            if MASK != NO_MASK:
                scores = masked_scores(products, mask_head, stride_mt, t, s, T, S, qk_scale, MASK, IS_CAUSAL)
            else:
                scores = products * qk_scale
                if DIAGONAL:
                    scores = tl.where(s <= t, scores, float("-inf"))
            e = tl.exp2(scores - shift[None, :])
            p = e * a[None, :]
            dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
            dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
            ds = p * dp - e * c[None, :]
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


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
    block, group = block_and_head(blocks, T, BLOCK_D, IS_CAUSAL)  # the first keys are seen by most queries
    b, kv_head = group // (H // GROUP), group % (H // GROUP)
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = load_rows(key + b * stride_kb + kv_head * stride_kh, columns, stride_ks, S, HEAD_SIZE, BLOCK_D)
    v = load_rows(value + b * stride_vb + kv_head * stride_vh, columns, stride_vs, S, HEAD_SIZE, BLOCK_D)

    begin, full = 0, T  # queries from `begin` on see a key of this block, those from `full` on see all
    if IS_CAUSAL:
        begin = block * BLOCK_N // BLOCK_M * BLOCK_M
    if MASK == NO_MASK:
        full = tl.minimum(tl.cdiv((block + 1) * BLOCK_N, BLOCK_M) * BLOCK_M, T) if IS_CAUSAL else 0
    query += b * stride_qb
    grad += b * stride_yb
    head, terms = kv_head * GROUP, b * H * T
    if HAS_GATE:
        gate += b * stride_gb
    if MASK != NO_MASK:
        mask += b * stride_mb
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if MASK != NO_MASK or IS_CAUSAL:
        dk, dv = _key_value_gradient(
            dk, dv, k, v, query, gate, mask, grad, row_max, row_norm, dots, head, terms, columns, begin, full,
            stride_qh, stride_qt, stride_gh, stride_mh, stride_mt, stride_yh, stride_yt, T, S, qk_scale,
            GROUP, HEAD_SIZE, BLOCK_D, BLOCK_M, MASK, IS_CAUSAL, HAS_GATE, GATE_GRAD, DIAGONAL=True,
        )  # fmt: skip
    if MASK == NO_MASK:
        dk, dv = _key_value_gradient(
            dk, dv, k, v, query, gate, mask, grad, row_max, row_norm, dots, head, terms, columns, full, T,
            stride_qh, stride_qt, stride_gh, stride_mh, stride_mt, stride_yh, stride_yt, T, S, qk_scale,
            GROUP, HEAD_SIZE, BLOCK_D, BLOCK_M, MASK, IS_CAUSAL, HAS_GATE, GATE_GRAD, DIAGONAL=False,
        )  # fmt: skip
    offset = b * stride_db + kv_head * stride_dh
    store_rows(d_key + offset, dk * scale, columns, stride_ds, S, HEAD_SIZE, BLOCK_D)
    store_rows(d_value + offset, dv, columns, stride_ds, S, HEAD_SIZE, BLOCK_D)


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
    query, key, value, grad, output = in_rows(query), in_rows(key), in_rows(value), in_rows(grad), in_rows(output)
    attn_mask = None if attn_mask is None else in_rows(attn_mask)
    batch, heads, tokens, size = query.shape
    dots = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    # As the inputs lie in memory: what comes next undoes their transpose, which needs no copy then. Key and value
    # gradients are laid out alike, so that one set of strides serves both.
    d_query = torch.empty_like(query) if query_grad else query.new_empty(0)
    d_key = torch.empty_like(key) if key_value_grad else key.new_empty(0)
    d_value = torch.empty_like(d_key)
    if output.numel() == 0:  # keys without queries
        d_key.zero_()
        d_value.zero_()
        return d_query, d_key, d_value, dots.sum(-1)
    strides = (
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *gate_and_mask_strides(gate, attn_mask),
        *grad.stride()[:3],
    )  # fmt: skip
    numbers = (heads, tokens, key.shape[2], scale * LOG2E.value, scale)
    options = options_of(query, key, gate, attn_mask, is_causal, gate_grad)
    with device_of(query):
        tile = tile_of("bwd_query", query)
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
            tile = tile_of("bwd_key_value", query)
            blocks = triton.cdiv(key.shape[2], tile["BLOCK_N"]) * batch * key.shape[1]
            _masked_attention_bwd_key_value_kernel[(blocks,)](
                query, key, value, gate, attn_mask, grad, d_key, d_value, row_max, row_norm, dots,
                *strides, *d_key.stride()[:3], *numbers, **tile, **options,
            )  # fmt: skip
    return d_query, d_key, d_value, dots.sum(-1)
