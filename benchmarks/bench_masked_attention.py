"""Attention with gated heads, and the gate alone, against torch's attention kernels followed by a gate.

A step is a forward and a backward pass in which queries, keys, values and gates all get gradients: those of the gates
are the head scores. SDPA runs once with each of torch's kernels; its gate is eager, as a user would write it: rounded
to the dtype of the output first.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import Case, Report, add_rates, compare, compiled, doubled, other_backends, step
from benchmarks.shapes import LAYERS
from pymape.ops import gate_heads, gate_heads_reference, masked_attention, masked_attention_reference
from pymape.ops.masked_attention import SUPPORTED

PARTS = ("gates", "layers", "long", "closed")
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS if device != "cpu" else PARTS[:2])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024, 2048, 8192], help="of the part `long`")


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    report.notes += [
        "a step: forward and backward with gradients of queries, keys, values and per-sample gates",
        "operations: 4 B H T^2 D forward and 10 backward, half of it when causal",
        "SDPA with a named kernel: on a GPU, choosing the kernel is in the wall time, not in the device time",
    ]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if "gates" in options.parts:
        for name in ("BERT-base", "Llama-3-8B"):
            report.add(_gates(name, dtype, device))
    if "layers" in options.parts:
        for name in options.layers:
            layer = LAYERS[name]
            batch, tokens = layer.samples_and_tokens(device)
            shape = (batch, layer.heads, layer.kv_heads, tokens, layer.head_size)
            everything = device != "cpu" or layer.compiled_on_cpu
            report.add(_attention(name, shape, layer.causal, dtype, device, everything, layer.compiled_on_cpu))
            if layer.compiled_on_cpu and device == "cpu":
                report.add(_forward(name, shape, layer.causal, dtype, device))
    if "long" in options.parts:
        for size in (64, 128):
            for tokens in options.tokens:
                heads = 2048 // size
                shape = (max(1, 16384 // tokens), heads, heads, tokens, size)
                report.add(_attention("width 2048", shape, True, dtype, device, compiles=(tokens, size) == (2048, 128)))
    if "closed" in options.parts:
        for size in (64, 128):
            report.add(_closed((4, 2048 // size, 2048 // size, 2048, size), dtype, device))


def _gates(name: str, dtype: torch.dtype, device: str) -> list[Case]:
    layer = LAYERS[name]
    batch, tokens = layer.samples_and_tokens(device)
    output, grad = torch.randn(2, batch, tokens, layer.heads, layer.head_size, device=device).to(dtype)
    inputs = output.requires_grad_(), torch.rand(batch, layer.heads, device=device, requires_grad=True)
    functions = {
        "pymape": gate_heads,
        "eager": _eager_gate,
        "torch.compile": compiled(_eager_gate),
    }
    cases = compare(
        f"gate_heads step, {name} {'x'.join(map(str, output.shape))} {str(dtype)[6:]}",
        {provider: functools.partial(step, function, inputs, grad) for provider, function in functions.items()},
        exact=lambda: step(gate_heads_reference, doubled(inputs), grad.double()),
        tolerance=TOLERANCE[dtype],
        seconds=0.5,
    )
    # The forward reads and writes one tensor; the backward reads two and writes one.
    add_rates(cases, device, dtype, moved=5 * output.numel() * output.element_size())
    return cases


def _attention(
    name: str,
    shape: tuple[int, int, int, int, int],
    causal: bool,
    dtype: torch.dtype,
    device: str,
    everything: bool = True,
    compiles: bool = False,
) -> list[Case]:
    batch, heads, _, tokens, size = shape
    inputs, grad = _draw(shape, dtype, device)
    providers: dict[str, Callable[[], object]] = {}
    for provider, function in _providers(causal, tokens, device, everything, compiles):
        providers[provider] = functools.partial(step, function, inputs, grad)
    exact = functools.partial(masked_attention_reference, is_causal=causal)
    cases = compare(
        f"step, {name} {batch}x{heads}x{tokens}x{size}{', causal' * causal} {str(dtype)[6:]}",
        providers,
        # In fp32 and no wider: at 8192 tokens the scores written out fill a GPU.
        exact=lambda: step(exact, tuple(x.detach().float().requires_grad_() for x in inputs), grad.float()),
        tolerance=TOLERANCE[dtype],
        apart=("SDPA math, gate",) if device != "cpu" else (),  # far slower than the rest at 8192 tokens
        seconds=0.5,
    )
    pairs = batch * heads * tokens * tokens // (2 if causal else 1)
    add_rates(cases, device, dtype, operations=14 * pairs * size)
    return cases


def _closed(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str) -> list[Case]:
    """The forward pass with frozen gates, all open and half of them 0."""
    batch, heads, _, tokens, size = shape
    (query, key, value, _), _ = _draw(shape, dtype, device)
    query, key, value = query.detach(), key.detach(), value.detach()
    is_open = (torch.arange(heads, device=device) % 2).float()
    gates = {"pymape, half of the heads closed": is_open, "pymape, all open": torch.ones_like(is_open)}
    cases: list[Case] = []
    for provider, gate in gates.items():
        label = f"forward, {batch}x{heads}x{tokens}x{size}, causal {str(dtype)[6:]}"
        cases += compare(
            label,
            {provider: lambda gate=gate: masked_attention(query, key, value, gate, is_causal=True)},
            exact=lambda gate=gate: masked_attention_reference(query, key, value, gate, is_causal=True),
            tolerance=TOLERANCE[dtype],
            seconds=1.0,
        )
    half, full = cases
    half.figures["x faster with half closed"] = full.median_s / half.median_s
    return cases


def _forward(
    name: str, shape: tuple[int, int, int, int, int], causal: bool, dtype: torch.dtype, device: str
) -> list[Case]:
    """The forward pass alone, which is all that FlexAttention has on a CPU."""
    batch, heads, _, tokens, size = shape
    inputs = tuple(x.detach() for x in _draw(shape, dtype, device)[0])
    with torch.inference_mode():
        cases = compare(
            f"forward, {name} {batch}x{heads}x{tokens}x{size}{', causal' * causal} {str(dtype)[6:]}",
            {
                provider: functools.partial(function, *inputs)
                for provider, function in _providers(causal, tokens, device)
            },
            exact=lambda: masked_attention_reference(*(x.double() for x in inputs), is_causal=causal),
            tolerance=TOLERANCE[dtype],
            seconds=0.5,
        )
    add_rates(cases, device, dtype, operations=4 * batch * heads * tokens * tokens * size // (2 if causal else 1))
    return cases


def _providers(
    causal: bool, tokens: int, device: str, everything: bool = True, compiles: bool = True
) -> Iterator[tuple[str, Attention]]:
    """pymape first; without `everything` only what runs on a CPU, without `compiles` nothing that is compiled."""
    yield "pymape", functools.partial(masked_attention, is_causal=causal)
    for backend in other_backends("masked_attention", SUPPORTED, device):
        yield f"pymape, {backend}", functools.partial(masked_attention, is_causal=causal, backend=backend)
    gated = functools.partial(_sdpa_and_gate, causal)
    for kernel, number in KERNELS.items():
        if everything or kernel in ("flash", "math"):
            yield f"SDPA {kernel}, gate", functools.partial(_with_kernel, number, gated)
    if compiles:
        yield "SDPA, gate, torch.compile", compiled(gated)
        yield "FlexAttention, gate", _flex(causal, tokens, device)


def _with_kernel(kernel: SDPBackend, attention: Attention, *inputs: Tensor) -> Tensor:
    with sdpa_kernel(kernel):
        return attention(*inputs)


def _sdpa_and_gate(causal: bool, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
    return output * gate.to(output.dtype)[..., None, None]


def _eager_gate(output: Tensor, gate: Tensor) -> Tensor:
    return gate_heads_reference(output, gate.to(output.dtype))


def _flex(causal: bool, tokens: int, device: str) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, query, key: query >= key, None, None, tokens, tokens, device=device)

    def attention(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        output = flex_attention(query, key, value, block_mask=mask, enable_gqa=grouped)
        return output * gate.to(output.dtype)[..., None, None]

    return compiled(attention)


def _draw(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Queries, keys and values as a model makes them, [B, T, H, D] in memory, gates, and a gradient of the output."""
    batch, heads, kv_heads, tokens, size = shape
    query, key, value, grad = (
        torch.randn(batch, tokens, count, size, device=device).to(dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    gate = torch.rand(batch, heads, device=device)
    return (query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), gate.requires_grad_()), grad
