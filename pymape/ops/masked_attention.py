"""masked_attention: attention with a gate on every head; gate_heads: the gate alone, behind any attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pymape.backends import native, resolve_backend
from pymape.ops.common import check_alike, check_device, check_float, no_fp64
from pymape.ops.second_derivative import refuse_second_derivative

__all__ = ["gate_heads", "gate_heads_reference", "masked_attention", "masked_attention_reference"]

SUPPORTED = ("cpu", "triton", "cuda", "reference")
_GATE_BACKENDS = ("cpu", "cuda", "reference")


def gate_heads(output: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """Multiply the output of every attention head by its gate.

    result[b, t, h, d] = output[b, t, h, d] * gate[b, h]

    The backward pass reads the gradient and `output` once for both results: d output = d result * gate, and
    d gate[b, h] = sum over t, d of d result * output, with the ungated output, hence right at a gate of 0. Only what
    needs a gradient is computed, and `output` is kept only if the gate needs one.

    Args:
        output: attention outputs, [B, T, H, D]; fp64, fp32, bf16 or fp16, any strides (a copy is made unless the last
            dimension is contiguous).
        gate: [H], or [B, H] for a gate of every sample; any floating point dtype, read in fp32 (fp64 for fp64 outputs).
        backend: `auto`, `cpu`, `cuda` or `reference`.

    Returns:
        [B, T, H, D] in the dtype of `output`, contiguous unless the backend is `reference`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.

    Source: head gates of MAPE-Unlearn (arXiv 2508.17233) and of Kwon et al. 2022 (arXiv 2204.09656).
    """
    if output.dim() != 4:
        raise ValueError(f"output must have shape (B, T, H, D), got {tuple(output.shape)}")
    check_float("output", output)
    _check_gate(gate, "output", output, batch=output.shape[0], heads=output.shape[2])
    chosen = resolve_backend("gate_heads", backend, output.device, supported=_GATE_BACKENDS)
    if chosen == "reference":
        return gate_heads_reference(output, gate)
    return torch.ops.pymape.gate_heads(output, gate, chosen)


def gate_heads_reference(output: Tensor, gate: Tensor) -> Tensor:
    """Plain torch specification of `gate_heads`."""
    return (output * gate.unsqueeze(-1).unsqueeze(-3)).to(output.dtype)  # [H] -> [1, H, 1], [B, H] -> [B, 1, H, 1]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Scaled dot-product attention with every head's output multiplied by its gate.

    output[b, h] = gate[b, h] * softmax(scale * query[b, h] key[b, g]^T + attn_mask[b, h]) value[b, g], where
    g = h // (H / Hkv) is the head's key/value head

    A query that may see no key gets 0, and so do its gradients. `triton` skips a head gated to 0 if the gate needs no
    gradient; it takes no fp64, no head size above 256 and no `attn_mask` that needs a gradient, and `auto` takes `cuda`
    for these. Under autocast, query, key and value are cast as for torch's own attention.

    Args:
        query: [B, H, T, D]; fp64, fp32, bf16 or fp16.
        key, value: [B, Hkv, S, D] in the dtype of `query`, H a multiple of Hkv (grouped-query attention).
        gate: [H], or [B, H] for a gate of every sample, any floating point dtype; None multiplies by nothing.
        attn_mask: broadcastable to [B, H, T, S]: bool, True where a query sees a key, or floating point, added to the
            scaled scores.
        is_causal: query t sees keys 0 to t only (on top of `attn_mask`).
        scale: factor of the scores, 1 / sqrt(D) if None.
        backend: `auto`, `cpu` and `cuda` (torch's attention, then `gate_heads`), `triton` or `reference`.

    Returns:
        [B, H, T, D] in the dtype of `query`.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        RuntimeError: the backend was asked for by name and cannot run.

    Source: head gates of MAPE-Unlearn (arXiv 2508.17233) in FlashAttention-2 (arXiv 2307.08691).
    """
    if query.dim() != 4:
        raise ValueError(f"query must have shape (B, H, T, D), got {tuple(query.shape)}")
    batch, heads, tokens, size = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != size:
        raise ValueError(f"key must have shape ({batch}, Hkv, S, {size}), got {tuple(key.shape)}")
    if key.shape[1] == 0 or heads % key.shape[1] != 0:
        raise ValueError(f"key must have a number of heads that divides {heads}, got {key.shape[1]}")
    if value.shape != key.shape:
        raise ValueError(f"value must have the shape of key {tuple(key.shape)}, got {tuple(value.shape)}")
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    check_float("query", query)
    for name, tensor in (("key", key), ("value", value)):
        check_alike(name, tensor, "query", query)
    if gate is not None:
        _check_gate(gate, "query", query, batch=batch, heads=heads)
    if attn_mask is not None:
        attn_mask = _four_dimensional(attn_mask, query, (batch, heads, tokens, key.shape[2]))
    scale = size**-0.5 if scale is None else float(scale)

    no_triton = _why_no_triton(query, attn_mask)
    chosen = resolve_backend("masked_attention", backend, query.device, supported=SUPPORTED, no_triton=no_triton)
    if chosen == "reference":
        return masked_attention_reference(
            query, key, value, gate, attn_mask=attn_mask, is_causal=is_causal, scale=scale
        )
    if chosen == "triton":
        if attn_mask is not None:
            attn_mask = _aligned_rows(attn_mask).expand(batch, heads, tokens, key.shape[2])
        gate_grad = gate is not None and gate.requires_grad and torch.is_grad_enabled()
        return torch.ops.pymape.masked_attention(query, key, value, gate, attn_mask, is_causal, scale, gate_grad)[0]
    if attn_mask is not None and is_causal:
        causal = torch.ones((tokens, key.shape[2]), dtype=torch.bool, device=query.device).tril()
        is_bool = attn_mask.dtype == torch.bool
        attn_mask, is_causal = attn_mask & causal if is_bool else attn_mask.masked_fill(~causal, -torch.inf), False
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = _in_range(attn_mask, query.dtype).to(query.dtype)
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=heads != key.shape[1]
    )
    return output if gate is None else gate_heads(output.transpose(1, 2), gate, backend=chosen).transpose(1, 2)


def masked_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Plain torch specification of `masked_attention`, the scores written out."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)  # [B, H, T, S]
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    if is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~causal, -torch.inf)
    keyless = (scores == -torch.inf).all(dim=-1, keepdim=True)  # the softmax over no key is 0 / 0
    weights = F.softmax(scores.masked_fill(keyless, 0.0), dim=-1).masked_fill(keyless, 0.0)
    output = weights.to(value.dtype) @ value  # [B, H, T, D]
    return output if gate is None else (output * gate[..., None, None]).to(output.dtype)


def _check_gate(gate: Tensor, name: str, like: Tensor, *, batch: int, heads: int) -> None:
    if tuple(gate.shape) not in ((heads,), (batch, heads)):
        raise ValueError(f"gate must have shape ({heads},) or ({batch}, {heads}), got {tuple(gate.shape)}")
    if not gate.is_floating_point():
        raise ValueError(f"gate must be floating point, got {gate.dtype}")
    check_device("gate", gate, name, like)


def _four_dimensional(attn_mask: Tensor, query: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Check the mask and give it four dimensions, the last one contiguous (what kernels read in rows)."""
    fits = attn_mask.dim() <= 4 and all(have in (1, want) for have, want in zip(attn_mask.shape[::-1], shape[::-1]))
    if not fits:
        raise ValueError(f"attn_mask must be broadcastable to {shape}, got {tuple(attn_mask.shape)}")
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
    check_device("attn_mask", attn_mask, "query", query)
    attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
    return (
        attn_mask.expand(*attn_mask.shape[:3], shape[3]).contiguous() if attn_mask.shape[3] != shape[3] else attn_mask
    )


def _aligned_rows(attn_mask: Tensor) -> Tensor:
    """Copy a mask whose rows the kernels cannot load 16 elements at a time: they would run out of registers."""
    _, _, rows, keys = attn_mask.shape
    if rows <= 1 or (attn_mask.stride(2) % 16 == 0 and attn_mask.stride(3) == 1):
        return attn_mask
    return F.pad(attn_mask, (0, -keys % 16)).contiguous()[..., :keys]


def _in_range(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Keep from -inf, which hides a key, the finite values of the mask that lie below the range of `dtype`."""
    lowest = torch.finfo(dtype).min
    if torch.finfo(attn_mask.dtype).min >= lowest:
        return attn_mask
    return attn_mask.clamp(min=lowest).masked_fill(attn_mask == -torch.inf, -torch.inf)


def _why_no_triton(query: Tensor, attn_mask: Tensor | None) -> str | None:
    if query.shape[3] > 256:
        return f"it takes head sizes up to 256, got {query.shape[3]}"
    if attn_mask is not None and attn_mask.requires_grad:
        return "it has no gradient for attn_mask, got one that requires it"
    return no_fp64(query)


def _gate_per_sample(gate: Tensor, output: Tensor, batch: int) -> Tensor:
    """Return the gate in the kernels' dtype as [B, H], without a copy of a shared gate for every sample."""
    return gate.detach().to(torch.promote_types(output.dtype, torch.float32)).expand(batch, gate.shape[-1])


def _gate_gradient(scores: Tensor, gate_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (scores.sum(0) if len(gate_shape) == 1 else scores).to(dtype)


def _rows(x: Tensor) -> Tensor:
    """Copy only what the kernels cannot read in place: a last dimension that is not contiguous."""
    return x if x.shape[3] <= 1 or x.stride(3) == 1 else x.contiguous()


torch.library.define("pymape::gate_heads", "(Tensor output, Tensor gate, str backend) -> Tensor")
torch.library.define(
    "pymape::gate_heads_backward", "(Tensor grad, Tensor output, Tensor gate, str backend) -> (Tensor, Tensor)"
)
torch.library.define(
    "pymape::masked_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? attn_mask, bool is_causal, float scale, "
    "bool gate_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "pymape::masked_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? attn_mask, Tensor output, "
    "Tensor row_max, Tensor row_norm, bool is_causal, float scale, bool gate_grad, bool query_grad, "
    "bool key_value_grad) -> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("pymape::gate_heads", "CompositeExplicitAutograd")
def _gate_forward(output: Tensor, gate: Tensor, backend: str) -> Tensor:
    output = _rows(output.detach())
    result = torch.empty_like(output, memory_format=torch.contiguous_format)
    per_sample = _gate_per_sample(gate, output, output.shape[0])
    if backend == "cpu":
        native().gate_heads(output, per_sample, result, torch.get_num_threads())
    else:
        native().gate_heads_cuda(output, per_sample, result, torch.cuda.current_stream(output.device).cuda_stream)
    return result


@torch.library.register_fake("pymape::gate_heads")
def _gate_fake(output: Tensor, gate: Tensor, backend: str) -> Tensor:
    return torch.empty_like(output, memory_format=torch.contiguous_format)


@torch.library.impl("pymape::gate_heads_backward", "CompositeExplicitAutograd")
def _gate_backward_fused(grad: Tensor, output: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    grad, output = _rows(grad.detach()), _rows(output.detach())
    batch, tokens, heads, size = output.shape
    d_output = torch.empty_like(output, memory_format=torch.contiguous_format)
    per_sample = _gate_per_sample(gate, output, batch)
    scores = per_sample.new_empty((batch, heads))
    if backend == "cpu":
        native().gate_heads_backward(grad, output, per_sample, d_output, scores, torch.get_num_threads())
    else:
        # About 64k threads of four elements in flight, at least 8 tokens each.
        splits = max(1, min(65536 * 4 // max(1, batch * heads * size), tokens // 8))
        workspace = scores.new_empty((batch, splits, heads * size))
        stream = torch.cuda.current_stream(output.device).cuda_stream
        native().gate_heads_backward_cuda(grad, output, per_sample, d_output, scores, workspace, stream)
    return d_output, scores


@torch.library.register_fake("pymape::gate_heads_backward")
def _gate_backward_fake(grad: Tensor, output: Tensor, gate: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    scores = output.new_empty(
        (output.shape[0], output.shape[2]), dtype=torch.promote_types(output.dtype, torch.float32)
    )
    return torch.empty_like(output, memory_format=torch.contiguous_format), scores


def _gate_setup(ctx, inputs, output) -> None:
    attention, gate, ctx.backend = inputs
    ctx.save_for_backward(gate, attention if ctx.needs_input_grad[1] else None)


def _gate_backward(ctx, grad: Tensor):
    gate, output = ctx.saved_tensors
    needs_output, needs_gate, _ = ctx.needs_input_grad
    d_output = d_gate = None
    if needs_output and needs_gate:
        d_output, scores = torch.ops.pymape.gate_heads_backward(grad, output, gate, ctx.backend)
        d_gate = _gate_gradient(scores, gate.shape, gate.dtype)
    elif needs_gate:
        d_gate = _gate_gradient(torch.ops.pymape.module_scores(output, grad, ctx.backend), gate.shape, gate.dtype)
    elif needs_output:
        d_output = torch.ops.pymape.gate_heads(grad, gate, ctx.backend)
    return d_output, d_gate, None


torch.library.register_autograd("pymape::gate_heads", _gate_backward, setup_context=_gate_setup)
refuse_second_derivative("gate_heads")


@torch.library.impl("pymape::masked_attention", "CompositeExplicitAutograd")
def _attention_forward(query, key, value, gate, *mask_and_options):
    from pymape.kernels.masked_attention import masked_attention_forward

    per_sample = None if gate is None else _gate_per_sample(gate, query, query.shape[0])
    return masked_attention_forward(query, key, value, per_sample, *mask_and_options)


@torch.library.register_fake("pymape::masked_attention")
def _attention_fake(query, key, value, gate, attn_mask, is_causal, scale, gate_grad):
    batch, heads, tokens, size = query.shape
    output = query.new_empty((batch, tokens, heads, size)).transpose(1, 2)
    ungated = torch.empty_like(output) if gate_grad else query.new_empty(0)
    row_max = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    return output, ungated, row_max, torch.empty_like(row_max)


@torch.library.impl("pymape::masked_attention_backward", "CompositeExplicitAutograd")
def _attention_backward_kernels(grad, query, key, value, gate, *mask_and_options):
    from pymape.kernels.masked_attention_backward import masked_attention_backward

    per_sample = None if gate is None else _gate_per_sample(gate, query, query.shape[0])
    return masked_attention_backward(grad, query, key, value, per_sample, *mask_and_options)


@torch.library.register_fake("pymape::masked_attention_backward")
def _attention_backward_fake(grad, query, key, value, gate, *mask_and_options):
    query_grad, key_value_grad = mask_and_options[-2:]
    d_query = torch.empty_like(_rows(query)) if query_grad else query.new_empty(0)
    d_key = torch.empty_like(_rows(key)) if key_value_grad else key.new_empty(0)
    return d_query, d_key, torch.empty_like(d_key), query.new_empty(query.shape[:2], dtype=torch.float32)


def _attention_setup(ctx, inputs, output) -> None:
    query, key, value, gate, attn_mask, ctx.is_causal, ctx.scale, ctx.gate_grad = inputs
    gated, ungated, row_max, row_norm = output
    ctx.mark_non_differentiable(ungated, row_max, row_norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, gate, attn_mask, ungated if ctx.gate_grad else gated, row_max, row_norm)


def _attention_backward(ctx, grad: Tensor | None, *_unused: None):
    if grad is None:
        return (None,) * 8
    query, key, value, gate, attn_mask, output, row_max, row_norm = ctx.saved_tensors
    needs_query, needs_key, needs_value, needs_gate = ctx.needs_input_grad[:4]
    d_query, d_key, d_value, scores = torch.ops.pymape.masked_attention_backward(
        grad, query, key, value, gate, attn_mask, output, row_max, row_norm,
        ctx.is_causal, ctx.scale, ctx.gate_grad, needs_query, needs_key or needs_value,
    )  # fmt: skip
    return (
        d_query if needs_query else None,
        d_key if needs_key else None,
        d_value if needs_value else None,
        _gate_gradient(scores, gate.shape, gate.dtype) if needs_gate else None,
        *(None,) * 4,
    )


torch.library.register_autograd("pymape::masked_attention", _attention_backward, setup_context=_attention_setup)
refuse_second_derivative("masked_attention")
