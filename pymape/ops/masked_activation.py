"""masked_activation: the elementwise half of masked_ffn, for blocks that compute their own projections."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymape.backends import native, resolve_backend
from pymape.ops.common import check_device, check_float, no_fp64
from pymape.ops.second_derivative import refuse_second_derivative

__all__ = ["ACTIVATIONS", "masked_activation", "masked_activation_reference"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
SUPPORTED = ("cpu", "triton", "cuda", "reference")


def masked_activation(
    pre: Tensor,
    gate: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "gelu",
    backend: str = "auto",
) -> Tensor:
    """Return `masked_ffn` behind its projections, for blocks that compute these themselves.

    y = act(pre + bias) [* (up + up_bias)] * gate

    Args:
        pre: [..., F] in fp64, fp32, bf16 or fp16, the first projection without the bias given here.
        gate: [F], or [B, F] with pre of shape [B, ..., F]; None leaves the filters as they are.
        bias: [F].
        up: the up projection of a gated block, shape and dtype of pre.
        up_bias: [F].
        activation: `gelu`, `gelu_tanh`, `relu` or `silu`.
        backend: `auto`, `cpu`, `cuda`, `triton` or `reference`.

    Returns:
        [..., F] in the dtype of pre. Arithmetic is in fp32 (fp64 for fp64), and so are sums for the gate's gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the activation or backend is unknown.
        RuntimeError: the backend cannot run here.

    Source: filter masks of MAPE-Unlearn (arXiv 2508.17233) and of Kwon et al. 2022 (arXiv 2204.09656).
    """
    _check_activation(pre, gate, bias, up, up_bias, activation)
    chosen = resolve_ffn_backend("masked_activation", backend, pre)
    if chosen == "reference":
        return masked_activation_reference(pre, gate, bias=bias, up=up, up_bias=up_bias, activation=activation)
    return run_activation(pre, gate, bias, up, up_bias, activation, chosen)


def masked_activation_reference(
    pre: Tensor,
    gate: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    activation: str = "gelu",
) -> Tensor:
    """Plain torch specification of `masked_activation`: the original operations, then `* gate`."""
    hidden = apply_activation(pre if bias is None else pre + bias, activation)
    if up is not None:
        hidden = hidden * (up if up_bias is None else up + up_bias)
    return apply_gate(hidden, gate).to(pre.dtype)


def apply_activation(z: Tensor, activation: str) -> Tensor:
    match activation:
        case "gelu":
            return F.gelu(z)
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        case "relu":
            return F.relu(z)
        case _:
            return F.silu(z)


def apply_gate(hidden: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return hidden
    if gate.dim() == 2:  # [B, F] -> [B, 1, ..., F]
        gate = gate.view(gate.shape[0], *(1 for _ in hidden.shape[1:-1]), gate.shape[1])
    return (hidden * gate).to(hidden.dtype)


def resolve_ffn_backend(op: str, backend: str, x: Tensor) -> str:
    """Choose as `resolve_backend` does, minding that the Triton kernels have no fp64."""
    return resolve_backend(op, backend, x.device, supported=SUPPORTED, no_triton=no_fp64(x))


def run_activation(
    pre: Tensor,
    gate: Tensor | None,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    accumulator = torch.promote_types(pre.dtype, torch.float32)
    gate, bias, up_bias = (v if v is None else v.to(accumulator) for v in (gate, bias, up_bias))
    rows, up = token_rows(pre, gate), None if up is None else token_rows(up, gate)
    return torch.ops.pymape.masked_activation(rows, bias, up, up_bias, gate, activation, backend).view(pre.shape)


def token_rows(x: Tensor, gate: Tensor | None) -> Tensor:
    """View [..., F] as [B, T, F], with one B for all where they share a gate."""
    if gate is None or gate.dim() == 1:
        return x.reshape(1, x.shape[:-1].numel(), x.shape[-1])
    return x if x.dim() == 3 else x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])


def inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def per_sample(gate: Tensor | None, batch: int) -> Tensor | None:
    return None if gate is None else inner_contiguous(gate.expand(batch, -1))


torch.library.define(
    "pymape::masked_activation",
    "(Tensor pre, Tensor? bias, Tensor? up, Tensor? up_bias, Tensor? gate, str activation, str backend) -> Tensor",
)
# Gradients that are not needed come back as empty tensors.
torch.library.define(
    "pymape::masked_activation_backward",
    "(Tensor grad, Tensor pre, Tensor? bias, Tensor? up, Tensor? up_bias, Tensor? gate, str activation, bool need_pre, "
    "bool need_up, bool need_gate, str backend) -> (Tensor d_pre, Tensor d_up, Tensor d_gate)",
)


@torch.library.impl("pymape::masked_activation", "CompositeExplicitAutograd")
def _activation_forward(
    pre: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    result = pre.new_empty(pre.shape)
    if result.numel() == 0:
        return result
    inputs = _kernel_inputs(pre, bias, up, up_bias, gate)
    if backend == "cpu":
        native().masked_activation(*inputs, ACTIVATIONS.index(activation), result, torch.get_num_threads())
    elif backend == "cuda":
        native().masked_activation_cuda(*inputs, ACTIVATIONS.index(activation), result, _stream(pre))
    else:
        _kernels().masked_activation_forward(*inputs, activation, result)
    return result


@torch.library.impl("pymape::masked_activation_backward", "CompositeExplicitAutograd")
def _activation_backward(
    grad: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    need_pre: bool,
    need_up: bool,
    need_gate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, filters = pre.shape
    outputs = _empty_gradients(pre, gate, need_pre, need_up, need_gate)
    d_pre, d_up, d_gate = outputs
    if pre.numel() == 0:
        d_gate.zero_()
        return outputs
    scores = d_gate.view(-1, filters) if need_gate else None
    wanted = (d_pre if need_pre else None, d_up if need_up else None, scores)
    grad = inner_contiguous(grad.detach())
    inputs = _kernel_inputs(pre, bias, up, up_bias, gate)
    code = ACTIVATIONS.index(activation)
    if backend == "cpu":
        native().masked_activation_backward(grad, *inputs, code, *wanted, torch.get_num_threads())
        return outputs
    splits = _splits(batch, tokens, filters)
    workspace = pre.new_empty((batch, splits, filters), dtype=d_gate.dtype) if need_gate else None
    if backend == "cuda":
        native().masked_activation_backward_cuda(grad, *inputs, code, *wanted, workspace, _stream(pre))
    else:
        _kernels().masked_activation_backward(grad, *inputs, activation, *wanted, workspace)
    return outputs


def _empty_gradients(
    pre: Tensor, gate: Tensor | None, need_pre: bool, need_up: bool, need_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_pre = pre.new_empty(pre.shape if need_pre else (0,))
    d_up = pre.new_empty(pre.shape if need_up else (0,))
    accumulator = torch.promote_types(pre.dtype, torch.float32)
    d_gate = pre.new_empty(gate.shape if need_gate and gate is not None else (0,), dtype=accumulator)
    return d_pre, d_up, d_gate


def _kernel_inputs(
    pre: Tensor, bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, gate: Tensor | None
) -> tuple[Tensor | None, ...]:
    tensors = (pre, bias, up, up_bias, per_sample(gate, pre.shape[0]))
    return tuple(None if x is None else inner_contiguous(x.detach()) for x in tensors)


def _kernels() -> Any:
    import pymape.kernels.masked_ffn as kernels

    return kernels


def _stream(x: Tensor) -> int:
    return torch.cuda.current_stream(x.device).cuda_stream


def _splits(batch: int, tokens: int, filters: int) -> int:
    """Divide the tokens so that about a million filters are in flight, at least 32 tokens each."""
    wanted = (1 << 20) // max(1, batch * filters)
    return max(1, min(wanted, tokens // 32, 64))


@torch.library.register_fake("pymape::masked_activation")
def _activation_fake(
    pre: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    backend: str,
) -> Tensor:
    return pre.new_empty(pre.shape)


@torch.library.register_fake("pymape::masked_activation_backward")
def _gradient_fake(
    grad: Tensor,
    pre: Tensor,
    bias: Tensor | None,
    up: Tensor | None,
    up_bias: Tensor | None,
    gate: Tensor | None,
    activation: str,
    need_pre: bool,
    need_up: bool,
    need_gate: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(pre, gate, need_pre, need_up, need_gate)


def _setup_activation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward_activation(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    pre_wanted, bias_wanted, up_wanted, up_bias_wanted, gate_wanted = ctx.needs_input_grad[:5]
    need_pre, need_up = pre_wanted or bias_wanted, up_wanted or up_bias_wanted
    d_pre, d_up, d_gate = torch.ops.pymape.masked_activation_backward(
        grad, *ctx.saved_tensors, ctx.activation, need_pre, need_up, gate_wanted, ctx.backend
    )
    return (
        d_pre if pre_wanted else None,
        sum_tokens(d_pre) if bias_wanted else None,
        d_up if up_wanted else None,
        sum_tokens(d_up) if up_bias_wanted else None,
        d_gate if gate_wanted else None,
        None,
        None,
    )


def sum_tokens(x: Tensor) -> Tensor:
    return x.sum((0, 1), dtype=torch.promote_types(x.dtype, torch.float32))


torch.library.register_autograd("pymape::masked_activation", _backward_activation, setup_context=_setup_activation)
refuse_second_derivative("masked_activation")


def _check_activation(
    pre: Tensor, gate: Tensor | None, bias: Tensor | None, up: Tensor | None, up_bias: Tensor | None, activation: str
) -> None:
    if pre.dim() < 1:
        raise ValueError("pre must have shape (..., F), got ()")
    if up is not None and up.shape != pre.shape:
        raise ValueError(f"up must have the shape of pre {tuple(pre.shape)}, got {tuple(up.shape)}")
    if up is not None and up.dtype != pre.dtype:
        raise ValueError(f"up must have the dtype of pre {pre.dtype}, got {up.dtype}")
    if up_bias is not None and up is None:
        raise ValueError("up_bias must come with up, got up=None")
    check_vectors(tuple(pre.shape), gate, bias, up_bias, activation)
    check_dtypes_and_devices("pre", pre, {"gate": gate, "bias": bias, "up": up, "up_bias": up_bias})


def check_vectors(
    shape: tuple[int, ...], gate: Tensor | None, bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> None:
    """Check what has one value per filter against the shape of the hidden tensor [..., F]."""
    filters = shape[-1]
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, vector in (("bias", bias), ("up_bias", up_bias)):
        if vector is not None and tuple(vector.shape) != (filters,):
            raise ValueError(f"{name} must have shape ({filters},), got {tuple(vector.shape)}")
    if gate is None or tuple(gate.shape) == (filters,):
        return
    if len(shape) < 2 or tuple(gate.shape) != (shape[0], filters):
        per_sample = f" or ({shape[0]}, {filters})" if len(shape) > 1 else ""
        raise ValueError(f"gate must have shape ({filters},){per_sample}, got {tuple(gate.shape)}")


def check_dtypes_and_devices(name: str, first: Tensor, others: dict[str, Tensor | None]) -> None:
    for other, tensor in {name: first, **others}.items():
        if tensor is None:
            continue
        check_float(other, tensor)
        check_device(other, tensor, name, first)
