"""Attention and feed-forward modules with gates for plain PyTorch Transformers, and what other models share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymape.backends import resolve_backend
from pymape.model_layout import in_dim, is_projection
from pymape.ops.masked_activation import ACTIVATIONS, masked_activation
from pymape.ops.masked_attention import SUPPORTED, gate_heads, masked_attention
from pymape.ops.masked_ffn import masked_ffn

__all__ = ["MaskedFeedForward", "MaskedMultiheadAttention"]


class MaskedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with a gate on every head; parameters and state_dict are the same.

    output = sum_h gate[h] softmax(q_h k_h^T / sqrt(D) + mask) v_h W_O[:, h] + b_O

    Args:
        head_gate: argument of `forward`, or attribute of the module where the caller does not know the argument
            (`nn.TransformerEncoderLayer`): floating [H] or, per sample, [B, H]; None: `nn.MultiheadAttention` itself.
        backend: `auto`, `cpu`, `cuda`, `triton` or `reference`. Attention weights and dropout are computed by torch
            whatever the backend, which then gates the heads.
        Everything else: as in `nn.MultiheadAttention`.
    """

    head_gate: Tensor | None

    def __init__(self, *args: Any, backend: str = "auto", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backend = backend
        self.head_gate = None
        # nn.TransformerEncoderLayer has a fused path that reads the weights and would miss the gate; hooks keep it off.
        self.register_forward_pre_hook(_no_op)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        head_gate: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        gate = self.head_gate if head_gate is None else head_gate
        if gate is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("head_gate must be None with add_bias_kv or add_zero_attn")
        if query.is_nested:
            raise ValueError(
                "query must be dense with head_gate; use nn.TransformerEncoder(enable_nested_tensor=False)"
            )
        if is_causal and attn_mask is None:
            raise ValueError("attn_mask must be given with is_causal=True, got None")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif self.batch_first:
            same_key, same_value = key is query, value is key
            query = query.transpose(0, 1)
            key = query if same_key else key.transpose(0, 1)
            value = key if same_value else value.transpose(0, 1)
        q, k, v = self._project(query, key, value)  # [B, H, T, D]
        if is_causal and key_padding_mask is None and not need_weights:
            mask = None  # the hint says that attn_mask is the causal mask
        else:
            mask, is_causal = self._mask(attn_mask, key_padding_mask, q), False
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), dropout)  # [B, H, T, S]
            heads = gate_output((weights @ v).transpose(1, 2), gate, self.backend)
        elif dropout == 0 and takes_triton(self.backend, q):
            heads = masked_attention(q, k, v, gate, attn_mask=mask, is_causal=is_causal, backend=self.backend)
            heads = heads.transpose(1, 2)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)
            heads = gate_output(heads.transpose(1, 2), gate, self.backend)
        output = F.linear(heads.transpose(0, 1).flatten(2), self.out_proj.weight, self.out_proj.bias)  # [T, B, E]
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        biases: Any = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if not self._qkv_same_embed_dim:
            weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            projected: Iterable[Tensor] = map(F.linear, (query, key, value), weights, biases)
        elif query is key and key is value:
            projected = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            projected = map(F.linear, (query, key, value), self.in_proj_weight.chunk(3), biases)
        return [x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for x in projected]

    def _mask(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
        """Additive mask, broadcastable to [B, H, T, S], from the two masks in which True means: do not attend."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask.unflatten(0, (-1, self.num_heads)) if attn_mask.dim() == 3 else attn_mask)
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None, :])
        additive = [
            query.new_zeros(()).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m.to(query.dtype)
            for m in masks
        ]
        return sum(additive[1:], additive[0]) if additive else None


class MaskedFeedForward(nn.Module):
    """A Transformer feed-forward network with a gate on every filter.

    output = (act(x W_1^T + b_1) [* (x W_up^T + b_up)] * gate) W_2^T + b_2

    Args:
        d_model: size of inputs and outputs.
        d_ff: number of filters F.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        gated: whether there is a W_up (`linear_up`) beside W_1 (`linear1`).
        bias: whether the linear layers have biases.
        backend: `auto`, `cpu`, `cuda`, `triton` or `reference`.
        filter_gate: argument of `forward`, or attribute of the module: floating [F], or per sample [B, F] with x [B, T,
            d_model]; None: no gating.
    """

    filter_gate: Tensor | None

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "gelu",
        *,
        gated: bool = False,
        bias: bool = True,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.linear1 = nn.Linear(d_model, d_ff, bias, device, dtype)
        self.linear_up = nn.Linear(d_model, d_ff, bias, device, dtype) if gated else None
        self.linear2 = nn.Linear(d_ff, d_model, bias, device, dtype)
        self.activation = activation
        self.backend = backend
        self.filter_gate = None

    def forward(self, x: Tensor, filter_gate: Tensor | None = None) -> Tensor:
        gate = self.filter_gate if filter_gate is None else filter_gate
        return self.linear2(gate_filters(self.linear1, self.linear_up, x, gate, self.activation, self.backend))


def takes_triton(backend: str, tensor: Tensor) -> bool:
    """Whether attention runs as one Triton kernel; otherwise it is torch's, with the head gate behind it."""
    return resolve_backend("masked_attention", backend, tensor.device, supported=SUPPORTED) == "triton"


def gate_output(output: Tensor, gate: Tensor, backend: str) -> Tensor:
    """Gate heads [B, T, H, D] that were computed elsewhere; Triton has no kernel for that alone, so `auto` chooses."""
    return gate_heads(output, gate, backend="auto" if backend == "triton" else backend)


def gate_filters(linear: Any, up: Any, x: Tensor, gate: Tensor | None, activation: str, backend: str) -> Tensor:
    """act(linear(x)) [* up(x)] * gate, in one operator where the linear layers are no more than weights and biases."""
    if not _is_plain(linear) or (up is not None and not _is_plain(up)):
        pre, up_x = linear(x), None if up is None else up(x)
        return masked_activation(pre, gate, up=up_x, activation=activation, backend=backend)
    options = {} if up is None else {"up_weight": _weight(up), "up_bias": up.bias}
    return masked_ffn(x, _weight(linear), linear.bias, gate, activation=activation, backend=backend, **options)


def is_unhooked(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _is_plain(module: nn.Module) -> bool:
    return is_projection(module) and is_unhooked(module)


def _weight(linear: Any) -> Tensor:
    """The weight as [outputs, inputs]; Conv1D of transformers stores the transpose."""
    return linear.weight if in_dim(linear) == 1 else linear.weight.t()


def _no_op(*_: Any) -> None:
    return None
