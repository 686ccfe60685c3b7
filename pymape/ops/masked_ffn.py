"""masked_ffn: the first half of a feed-forward block, with a gate on every filter."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymape.ops.masked_activation import (
    ACTIVATIONS,
    apply_activation,
    apply_gate,
    check_dtypes_and_devices,
    check_vectors,
    inner_contiguous,
    masked_activation,
    masked_activation_reference,
    per_sample,
    resolve_ffn_backend,
    run_activation,
    sum_tokens,
    token_rows,
)

__all__ = ["ACTIVATIONS", "masked_activation", "masked_activation_reference", "masked_ffn", "masked_ffn_reference"]


def masked_ffn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    up_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:
    """Return the gated filters of a feed-forward block: its first half, before the output projection.

    y = act(x W^T + b) [* (x W_up^T + b_up)] * gate

    Args:
        x: [..., K] in fp64, fp32, bf16 or fp16.
        weight: [F, K] as in `nn.Linear`; the transposed view of a GPT-2 `Conv1D` weight is read in place.
        bias: [F].
        gate: one factor per filter, [F], or per sample and filter, [B, F] with x of shape [B, ..., K], any float dtype;
            1 gives the original block, None skips the multiplication.
        up_weight: [F, K], the up projection of a gated block.
        up_bias: [F].
        activation: `gelu`, `gelu_tanh`, `relu` or `silu`.
        backend: `auto`, `cpu`, `cuda`, `triton` or `reference`. `cpu` and `cuda` fuse what follows torch's GEMM;
            `triton` does it in the GEMM's epilogue and skips tiles of filters whose gates are all 0 and do not learn.

    Returns:
        [..., F] in the dtype of x (under autocast in autocast's dtype). Backward yields the gate's gradient, the sum
        over tokens of dy times the ungated output, from the pass that computes the activation's gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the activation or backend is unknown.
        RuntimeError: the backend cannot run here.

    Source: filter masks of MAPE-Unlearn (arXiv 2508.17233) and of Kwon et al. 2022 (arXiv 2204.09656).
    """
    _check_ffn(x, weight, bias, gate, up_weight, up_bias, activation)
    chosen = resolve_ffn_backend("masked_ffn", backend, x)
    if chosen == "reference":
        return masked_ffn_reference(x, weight, bias, gate, up_weight=up_weight, up_bias=up_bias, activation=activation)
    if chosen == "triton":
        return _masked_ffn_triton(x, weight, bias, gate, up_weight, up_bias, activation)
    pre = F.linear(x, weight)
    up = None if up_weight is None else F.linear(x, up_weight)
    return run_activation(pre, gate, bias, up, up_bias, activation, chosen)


def masked_ffn_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    *,
    up_weight: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """Plain torch specification of `masked_ffn`: the original operations, then `* gate`."""
    hidden = apply_activation(F.linear(x, weight, bias), activation)
    if up_weight is not None:
        hidden = hidden * F.linear(x, up_weight, up_bias)
    return apply_gate(hidden, gate)


def _masked_ffn_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        up_weight = None if up_weight is None else up_weight.to(dtype)
    accumulator = torch.promote_types(x.dtype, torch.float32)
    gate, bias, up_bias = (v if v is None else v.to(accumulator) for v in (gate, bias, up_bias))
    inputs = (token_rows(x, gate), weight, bias, up_weight, up_bias, gate)
    keep_pre = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in inputs)
    may_skip = gate is None or not (torch.is_grad_enabled() and gate.requires_grad)
    result, _, _ = torch.ops.pymape.masked_ffn(*inputs, activation, keep_pre, may_skip)
    return result.view(*x.shape[:-1], weight.shape[0])


# pre and up are the projections without their biases, kept for backward if asked for and else empty; a skipped tile of
# them is 0.
torch.library.define(
    "pymape::masked_ffn",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? up_weight, Tensor? up_bias, Tensor? gate, str activation, "
    "bool keep_pre, bool may_skip) -> (Tensor result, Tensor pre, Tensor up)",
)


@torch.library.impl("pymape::masked_ffn", "CompositeExplicitAutograd")
def _ffn_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    keep_pre: bool,
    may_skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    import pymape.kernels.masked_ffn as kernels

    outputs = _ffn_fake(x, weight, bias, up_weight, up_bias, gate, activation, keep_pre, may_skip)
    if outputs[0].numel() == 0:
        return outputs
    vectors = (
        None if v is None else inner_contiguous(v.detach()) for v in (bias, up_bias, per_sample(gate, x.shape[0]))
    )
    bias, up_bias, gate = vectors
    x, weight = x.detach(), weight.detach()
    up_weight = None if up_weight is None else up_weight.detach()
    kernels.masked_ffn_forward(x, weight, bias, up_weight, up_bias, gate, activation, keep_pre, may_skip, *outputs)
    return outputs


@torch.library.register_fake("pymape::masked_ffn")
def _ffn_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    keep_pre: bool,
    may_skip: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    keep_up = keep_pre and up_weight is not None
    return x.new_empty(shape), x.new_empty(shape if keep_pre else (0,)), x.new_empty(shape if keep_up else (0,))


def _setup_ffn(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, up_weight, up_bias, gate, ctx.activation, _, _ = inputs
    _, pre, up = output
    ctx.mark_non_differentiable(pre, up)
    ctx.set_materialize_grads(False)
    weights_learn = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
    ctx.save_for_backward(
        x if weights_learn else None, weight, bias, up_weight, up_bias, gate, pre, None if up_weight is None else up
    )


def _backward_ffn(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, weight, bias, up_weight, up_bias, gate, pre, up = ctx.saved_tensors
    x_wanted, weight_wanted, bias_wanted, up_weight_wanted, up_bias_wanted, gate_wanted = ctx.needs_input_grad[:6]
    need_pre = x_wanted or weight_wanted or bias_wanted
    need_up = up is not None and (x_wanted or up_weight_wanted or up_bias_wanted)
    if grad is None:
        return (None,) * 9
    d_pre, d_up, d_gate = torch.ops.pymape.masked_activation_backward(
        grad, pre, bias, up, up_bias, gate, ctx.activation, need_pre, need_up, gate_wanted, "triton"
    )
    d_x = None
    if x_wanted:
        d_x = d_pre @ weight
        if up is not None:
            d_x.flatten(0, 1).addmm_(d_up.flatten(0, 1), up_weight)  # the second product is added while it is stored
    return (
        d_x,
        _weight_grad(d_pre, x) if weight_wanted else None,
        sum_tokens(d_pre) if bias_wanted else None,
        _weight_grad(d_up, x) if up_weight_wanted else None,
        sum_tokens(d_up) if up_bias_wanted else None,
        d_gate if gate_wanted else None,
        None,
        None,
        None,
    )


def _weight_grad(d_pre: Tensor, x: Tensor) -> Tensor:
    return d_pre.flatten(0, 1).T @ x.flatten(0, 1)  # [F, B * T] @ [B * T, K]


torch.library.register_autograd("pymape::masked_ffn", _backward_ffn, setup_context=_setup_ffn)


def _check_ffn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    up_weight: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> None:
    if weight.dim() != 2 or x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must have shape (F, {x.shape[-1] if x.dim() else 'K'}), got {tuple(weight.shape)}")
    if up_weight is not None and up_weight.shape != weight.shape:
        raise ValueError(f"up_weight must have the shape of weight {tuple(weight.shape)}, got {tuple(up_weight.shape)}")
    if up_bias is not None and up_weight is None:
        raise ValueError("up_bias must come with up_weight, got up_weight=None")
    filters = weight.shape[0]
    check_vectors((*x.shape[:-1], filters), gate, bias, up_bias, activation)
    if not torch.is_autocast_enabled(x.device.type):
        for name, matrix in (("weight", weight), ("up_weight", up_weight)):
            if matrix is not None and matrix.dtype != x.dtype:
                raise ValueError(f"{name} must have the dtype of x {x.dtype}, got {matrix.dtype}")
    others = {"weight": weight, "bias": bias, "gate": gate, "up_weight": up_weight, "up_bias": up_bias}
    check_dtypes_and_devices("x", x, others)
