"""Launches of every Triton kernel with tensors of no memory, for `triton_tools.compiled_launches` to compile.

Shapes are those of real models: a kernel is compiled anew for a stride that 16 divides, and tiles follow from dtype,
head size, rank and kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

__all__ = ["DTYPES", "OPERATORS", "attention", "ffn", "lora", "weight_grad"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TOKENS = 256

Launches = Iterator[tuple[str, Callable[[], None]]]


def attention(dtype: torch.dtype, size: int, mask: str = "none", causal: bool = True, gate_learns: bool = True) -> None:
    """Forward and backward with grouped-query heads; mask: none, padding or additive."""
    from pymape.kernels.masked_attention import masked_attention_forward
    from pymape.kernels.masked_attention_backward import masked_attention_backward

    query, grad = (_empty(2, _TOKENS, 8, size, dtype=dtype).transpose(1, 2) for _ in range(2))
    key, value = (_empty(2, _TOKENS, 4, size, dtype=dtype).transpose(1, 2) for _ in range(2))
    attn_mask = {
        "none": None,
        "padding": _empty(2, 1, 1, _TOKENS, dtype=torch.bool).expand(2, 8, _TOKENS, _TOKENS),
        "additive": _empty(2, 8, _TOKENS, _TOKENS, dtype=dtype),
    }[mask]
    inputs = query, key, value, _empty(2, 8), attn_mask
    options = causal, size**-0.5, gate_learns
    output, ungated, row_max, row_norm = masked_attention_forward(*inputs, *options)
    kept = ungated if gate_learns else output
    masked_attention_backward(grad, *inputs, kept, row_max, row_norm, *options, True, True)


def ffn(dtype: torch.dtype, activation: str, gated: bool, one_sample: bool) -> None:
    """The fused projection, and the activation alone forward and backward; one_sample: no tile spans two samples."""
    from pymape.kernels import masked_ffn as kernels

    batch, tokens, width, filters = 2, _TOKENS if one_sample else _TOKENS - 56, 768, 3072
    x, weight = _empty(batch, tokens, width, dtype=dtype), _empty(filters, width, dtype=dtype)
    bias, gate = _empty(filters), _empty(batch, filters)
    result, pre, up, grad, d_pre, d_up = (_empty(batch, tokens, filters, dtype=dtype) for _ in range(6))
    second = (up, bias) if gated else (None, None)
    kernels.masked_ffn_forward(
        x, weight, bias, weight if gated else None, second[1], gate, activation, True, True, result, pre, up
    )
    kernels.masked_activation_forward(pre, bias, *second, gate, activation, result)
    kernels.masked_activation_backward(
        grad, pre, bias, *second, gate, activation, d_pre, d_up if gated else None, _empty(batch, filters),
        _empty(batch, 4, filters),
    )  # fmt: skip


def weight_grad(dtype: torch.dtype, tokens: int = 4096, index: bool = True) -> None:
    """A tenth of the filters of a Llama-type layer; index: gathered from all of them."""
    from pymape.kernels.selected_weight_grad import selected_weight_grad

    gathered, full = _empty(tokens, 5632 if index else 560, dtype=dtype), _empty(tokens, 2048, dtype=dtype)
    selected_weight_grad(gathered, full, _empty(560, dtype=torch.int64) if index else None, _empty(560, 2048))


def lora(dtype: torch.dtype, rank: int) -> None:
    """Five segments of a projection to the filters of BERT-base."""
    from pymape.kernels.segmented_lora import segmented_lora

    x, base = _empty(512, 768, dtype=dtype), _empty(512, 3072, dtype=dtype)
    lora_a, lora_b = _empty(5, rank, 768, dtype=dtype), _empty(5, 3072, rank, dtype=dtype)
    segmented_lora(x, base, lora_a, lora_b, [(100 * s, 100 * s + 100, s, 1.0) for s in range(5)], base)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(dtype: torch.dtype) -> Launches:
    variants = (("none", True, True), ("none", True, False), ("padding", False, True), ("additive", True, True))
    for size in (32, 64, 128, 256):
        for mask, causal, learns in variants:
            label = f"head size {size}, mask {mask}{', causal' * causal}{', gate learns' * learns}"
            yield label, partial(attention, dtype, size, mask, causal, learns)


def _ffn(dtype: torch.dtype) -> Launches:
    for activation, gated in (("gelu", False), ("gelu_tanh", False), ("relu", False), ("silu", True)):
        for one_sample in (True, False):
            label = f"{activation}{', gated' * gated}{'' if one_sample else ', tiles across samples'}"
            yield label, partial(ffn, dtype, activation, gated, one_sample)


def _weight_grad(dtype: torch.dtype) -> Launches:
    for tokens, index in ((4096, True), (4096, False), (100, True)):
        yield f"{tokens} tokens{', index' * index}", partial(weight_grad, dtype, tokens, index)


def _lora(dtype: torch.dtype) -> Launches:
    for rank in (8, 16, 64, 128):
        yield f"rank {rank}", partial(lora, dtype, rank)


# All variants that are compiled for the report.
OPERATORS: dict[str, Callable[[torch.dtype], Launches]] = {
    "masked_attention": _attention,
    "masked_ffn": _ffn,
    "selected_weight_grad": _weight_grad,
    "segmented_lora": _lora,
}
