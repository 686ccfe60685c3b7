"""The first half of a feed-forward block with gated filters, in Triton.

Forward is one GEMM, or two that share the loads of x, whose epilogue adds the bias, activates and gates. Backward is an
elementwise pass that yields the gradients of both projections and the filter scores; what is left is plain GEMMs.

Every activation is x P(x) with P(-x) = 1 - P(x). With q = P(-|x|) and p = P'(x): act(x) = max(x, 0) - |x| q, and
act'(x) = [x > 0] + sign(x) (|x| p - q), in which nothing cancels.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymape.kernels.launch import device_of

__all__ = ["masked_activation_backward", "masked_activation_forward", "masked_ffn_forward"]

_LOG2E = tl.constexpr(math.log2(math.e))
_INV_SQRT_2PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
_TANH_SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))  # tanh-GELU is x sigmoid(scale (x + cubic x^3))
_TANH_CUBIC = tl.constexpr(0.044715)
_BLOCK_F, _BLOCK_T = 128, 16
# (one accumulator and one row of gates, bytes of an element) -> tile of the GEMM. A second accumulator, or a gate for
# every row and filter, needs registers that a wide tile does not leave; so does fp32, which uses no tensor cores.
_TILES = {
    (True, 2): {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    (False, 2): {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    (True, 4): {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
    (False, 4): {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2},
}
_BLOCK_M = {2: 128, 4: 64}  # of either tile


@triton.jit
def _tail(x, ACTIVATION: tl.constexpr):
    """Return |x|, clamped where the tail is negligible, with q and p there; NaN stays NaN."""
    reach = 13.0 if ACTIVATION == "gelu" else 9.8 if ACTIVATION == "gelu_tanh" else 87.0
    d = tl.where(x < 0, -x, x)
    d = tl.where(d > reach, reach, d)
    if ACTIVATION == "gelu":
        # exp(-d^2 / 2) times the Mills ratio, a rational minimax fit: relative error 5e-8 up to 5.6, 4e-5 beyond.
        e = tl.exp2(d * d * (-0.5 * _LOG2E))
        top = ((1.33411291e-02 * d + 1.03130855e-01) * d + 3.32013394e-01) * d + 4.99999975e-01
        bottom = ((3.34642623e-02 * d + 2.57911889e-01) * d + 8.72724836e-01) * d + 1.46190837
        q = e * top / (bottom * d + 1.0)
        p = _INV_SQRT_2PI * e
    else:
        v = d
        v_slope = 1.0
        if ACTIVATION == "gelu_tanh":
            v = d * (_TANH_SCALE + _TANH_SCALE * _TANH_CUBIC * d * d)
            v_slope = _TANH_SCALE + 3 * _TANH_SCALE * _TANH_CUBIC * d * d
        e = tl.exp2(v * -_LOG2E)
        rest = 1.0 / (1.0 + e)
        q = e * rest
        p = q * rest * v_slope
    return d, q, p


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    positive = tl.where(x < 0, 0.0, x)
    if ACTIVATION == "relu":
        value = positive
    else:
        d, q, _ = _tail(x, ACTIVATION)
        value = positive - d * q
    return value


@triton.jit
def _activate_with_slope(x, ACTIVATION: tl.constexpr):
    positive = tl.where(x < 0, 0.0, x)
    if ACTIVATION == "relu":
        value = positive
        slope = tl.where(x > 0, 1.0, 0.0)
    else:
        d, q, p = _tail(x, ACTIVATION)
        value = positive - d * q
        slope = tl.where(x > 0, 1.0 + (d * p - q), q - d * p)
    return value, slope


@triton.jit
def _load_vector(pointer, columns, inside, otherwise, PRESENT: tl.constexpr):
    """Return one value per filter [1, BLOCK], or the constant where the caller has none."""
    if PRESENT:
        return tl.load(pointer + columns, mask=inside, other=0.0)[None, :]
    else:
        return tl.full([1, 1], otherwise, tl.float32)


@triton.jit
def _masked_ffn_fwd_kernel(
    x, weight, bias, up_weight, up_bias, gate, result, pre, up,
    stride_xm, stride_xk, stride_wn, stride_wk, stride_un, stride_uk, stride_gb,
    M, N, K, T,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, ONE_SAMPLE: tl.constexpr, MAY_SKIP: tl.constexpr, KEEP_PRE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs share a few rows of x and sweep the filters, so that weights are read from cache.
    blocks_m = tl.cdiv(M, BLOCK_M)
    group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tl.program_id(0) // group * GROUP_M
    rows_in_group = tl.minimum(blocks_m - first_m, GROUP_M)
    block_m = first_m + tl.program_id(0) % group % rows_in_group
    block_n = tl.program_id(0) % group // rows_in_group
    rows = block_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, column_inside = rows < M, columns < N
    inside = row_inside[:, None] & column_inside[None, :]

    end = K
    if HAS_GATE:
        if ONE_SAMPLE:
            gates = gate + (block_m.to(tl.int64) * BLOCK_M // T * stride_gb + columns)[None, :]  # [1, BLOCK_N]
            gate_inside = column_inside[None, :]
        else:
            gates = gate + (rows // T)[:, None] * stride_gb + columns[None, :]  # [BLOCK_M, BLOCK_N]
            gate_inside = inside
        if MAY_SKIP:
            is_open = tl.load(gates, mask=gate_inside, other=0.0) != 0.0
            end = tl.where(tl.max(tl.max(is_open.to(tl.int32), 1), 0) > 0, K, 0)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if GATED:
        up_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    k = tl.arange(0, BLOCK_K)
    x += rows[:, None] * stride_xm + k[None, :] * stride_xk
    weight += k[:, None] * stride_wk + columns[None, :] * stride_wn
    if GATED:
        up_weight += k[:, None] * stride_uk + columns[None, :] * stride_un
    for start in range(0, end, BLOCK_K):
        x_inside = row_inside[:, None] & (k[None, :] < K - start)
        w_inside = (k[:, None] < K - start) & column_inside[None, :]
        tile = tl.load(x, mask=x_inside, other=0.0)
        acc = tl.dot(tile, tl.load(weight, mask=w_inside, other=0.0), acc, input_precision=PRECISION)
        x += BLOCK_K * stride_xk
        weight += BLOCK_K * stride_wk
        if GATED:
            up_acc = tl.dot(tile, tl.load(up_weight, mask=w_inside, other=0.0), up_acc, input_precision=PRECISION)
            up_weight += BLOCK_K * stride_uk

    offsets = rows[:, None] * N + columns[None, :]
    if KEEP_PRE:
        tl.store(pre + offsets, acc.to(pre.dtype.element_ty), mask=inside)
        if GATED:
            tl.store(up + offsets, up_acc.to(up.dtype.element_ty), mask=inside)
    value = _activate(acc + _load_vector(bias, columns, column_inside, 0.0, HAS_BIAS), ACTIVATION)
    if GATED:
        value *= up_acc + _load_vector(up_bias, columns, column_inside, 0.0, HAS_UP_BIAS)
    if HAS_GATE:
        value *= tl.load(gates, mask=gate_inside, other=0.0)
    tl.store(result + offsets, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _masked_activation_fwd_kernel(
    pre, bias, up, up_bias, gate, result,
    stride_pb, stride_pt, stride_ub, stride_ut, stride_gb,
    T, F,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    blocks_f, blocks_t = tl.cdiv(F, BLOCK_F), tl.cdiv(T, BLOCK_T)
    f = tl.program_id(0) % blocks_f * BLOCK_F + tl.arange(0, BLOCK_F)
    t = (tl.program_id(0) // blocks_f % blocks_t).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    b = (tl.program_id(0) // blocks_f // blocks_t).to(tl.int64)
    f_inside = f < F
    inside = (t < T)[:, None] & f_inside[None, :]
    z = tl.load(pre + b * stride_pb + t[:, None] * stride_pt + f[None, :], mask=inside, other=0.0).to(tl.float32)
    value = _activate(z + _load_vector(bias, f, f_inside, 0.0, HAS_BIAS), ACTIVATION)
    if GATED:
        u = tl.load(up + b * stride_ub + t[:, None] * stride_ut + f[None, :], mask=inside, other=0.0).to(tl.float32)
        value *= u + _load_vector(up_bias, f, f_inside, 0.0, HAS_UP_BIAS)
    value *= _load_vector(gate + b * stride_gb if HAS_GATE else gate, f, f_inside, 1.0, HAS_GATE)
    tl.store(result + (b * T + t)[:, None] * F + f[None, :], value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _masked_activation_bwd_kernel(
    grad, pre, bias, up, up_bias, gate, d_pre, d_up, partial,
    stride_yb, stride_yt, stride_pb, stride_pt, stride_ub, stride_ut, stride_gb,
    T, F, splits, tokens_per_split,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, WANT_PRE: tl.constexpr, WANT_UP: tl.constexpr, WANT_SCORES: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    blocks_f = tl.cdiv(F, BLOCK_F)
    f = tl.program_id(0) % blocks_f * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(0) // blocks_f % splits
    b = (tl.program_id(0) // blocks_f // splits).to(tl.int64)
    f_inside = f < F
    bias_row = _load_vector(bias, f, f_inside, 0.0, HAS_BIAS)
    up_bias_row = _load_vector(up_bias, f, f_inside, 0.0, HAS_UP_BIAS)
    gate_row = _load_vector(gate + b * stride_gb if HAS_GATE else gate, f, f_inside, 1.0, HAS_GATE)
    scores = tl.zeros([BLOCK_F], tl.float32)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, T)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        inside = (t < last)[:, None] & f_inside[None, :]
        g = tl.load(grad + b * stride_yb + t[:, None] * stride_yt + f[None, :], mask=inside, other=0.0).to(tl.float32)
        z = tl.load(pre + b * stride_pb + t[:, None] * stride_pt + f[None, :], mask=inside, other=0.0).to(tl.float32)
        value, slope = _activate_with_slope(z + bias_row, ACTIVATION)
        gated = g * gate_row
        offsets = (b * T + t)[:, None] * F + f[None, :]
        if GATED:
            u = tl.load(up + b * stride_ub + t[:, None] * stride_ut + f[None, :], mask=inside, other=0.0)
            u = u.to(tl.float32) + up_bias_row
            if WANT_UP:
                tl.store(d_up + offsets, (gated * value).to(d_up.dtype.element_ty), mask=inside)
            value *= u
            slope *= u
        if WANT_PRE:
            tl.store(d_pre + offsets, (gated * slope).to(d_pre.dtype.element_ty), mask=inside)
        scores += tl.sum(g * value, 0)
    if WANT_SCORES:
        tl.store(partial + (b * splits + split) * F + f, scores, mask=f_inside)


def masked_ffn_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    keep_pre: bool,
    may_skip: bool,
    result: Tensor,
    pre: Tensor,
    up: Tensor,
) -> None:
    """Write act(x W^T + b) [* (x W_up^T + b_up)] * gate, and on demand the projections without their biases.

    Args:
        x: [B, T, K]; weight, up_weight: [F, K], any strides; all of one dtype of fp32, bf16, fp16.
        bias, up_bias: [F]; gate: [B, F]; fp32 and contiguous over F.
        keep_pre: write `pre` and, with up_weight, `up`.
        may_skip: a tile whose gates are all 0 is not computed; its `pre` and `up` are 0.
        result, pre, up: contiguous [B, T, F] of the dtype of x.
    """
    batch, tokens, width = x.shape
    filters = weight.shape[0]
    x = x.reshape(batch * tokens, width)
    one_sample = batch == 1 or tokens % _BLOCK_M[x.element_size()] == 0
    tile = _TILES[up_weight is None and (gate is None or one_sample), x.element_size()]
    grid = (triton.cdiv(batch * tokens, tile["BLOCK_M"]) * triton.cdiv(filters, tile["BLOCK_N"]),)
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    with device_of(x):
        _masked_ffn_fwd_kernel[grid](
            x, weight, bias, up_weight, up_bias, gate, result, pre, up,
            *x.stride(), *weight.stride(), *((0, 0) if up_weight is None else up_weight.stride()), _gate_stride(gate),
            batch * tokens, filters, width, tokens,
            **_present(bias, up_weight, up_bias, gate, activation),
            ONE_SAMPLE=one_sample, MAY_SKIP=may_skip, KEEP_PRE=keep_pre, PRECISION="tf32" if tf32 else "ieee",
            GROUP_M=8, **tile,
        )  # fmt: skip


def masked_activation_forward(
    pre: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    result: Tensor,
) -> None:
    """Write act(pre + bias) [* (up + up_bias)] * gate.

    Args:
        pre, up: [B, T, F], contiguous over F; fp32, bf16 or fp16.
        bias, up_bias: [F]; gate: [B, F]; fp32 and contiguous over F.
        result: contiguous [B, T, F] of the dtype of pre.
    """
    batch, tokens, filters = pre.shape
    with device_of(pre):
        _masked_activation_fwd_kernel[(triton.cdiv(filters, _BLOCK_F) * triton.cdiv(tokens, _BLOCK_T) * batch,)](
            pre, bias, up, up_bias, gate, result,
            *pre.stride()[:2], *((0, 0) if up is None else up.stride()[:2]), _gate_stride(gate),
            tokens, filters,
            **_present(bias, up, up_bias, gate, activation), BLOCK_T=_BLOCK_T, BLOCK_F=_BLOCK_F,
        )  # fmt: skip


def masked_activation_backward(
    grad: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    d_pre: Tensor | None,
    d_up: Tensor | None,
    scores: Tensor | None,
    workspace: Tensor | None,
) -> None:
    """Write the gradients that are wanted, in one pass over grad, pre and up.

    Args:
        grad: [B, T, F], contiguous over F, like pre; the other inputs are those of the forward.
        d_pre, d_up: contiguous [B, T, F], or None.
        scores: [B, F], or [1, F] to sum over samples too, in fp32, or None.
        workspace: [B, splits, F] in fp32, needed with scores.
    """
    batch, tokens, filters = pre.shape
    splits = max(1, triton.cdiv(tokens, 2 * _BLOCK_T)) if workspace is None else workspace.shape[1]
    with device_of(pre):
        _masked_activation_bwd_kernel[(triton.cdiv(filters, _BLOCK_F) * splits * batch,)](
            grad, pre, bias, up, up_bias, gate, d_pre, d_up, workspace,
            *grad.stride()[:2], *pre.stride()[:2], *((0, 0) if up is None else up.stride()[:2]), _gate_stride(gate),
            tokens, filters, splits, triton.cdiv(tokens, splits),
            **_present(bias, up, up_bias, gate, activation),
            WANT_PRE=d_pre is not None, WANT_UP=d_up is not None, WANT_SCORES=scores is not None,
            BLOCK_T=_BLOCK_T, BLOCK_F=_BLOCK_F,
        )  # fmt: skip
    if scores is not None and workspace is not None:
        torch.sum(workspace.view(scores.shape[0], -1, filters), 1, out=scores)


def _present(
    bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, gate: Tensor | None, activation: str
) -> dict[str, bool | str]:
    return {
        "ACTIVATION": activation,
        "GATED": up is not None,
        "HAS_BIAS": bias is not None,
        "HAS_UP_BIAS": up_bias is not None,
        "HAS_GATE": gate is not None,
    }


def _gate_stride(gate: Tensor | None) -> int:
    return 0 if gate is None else gate.stride(0)
