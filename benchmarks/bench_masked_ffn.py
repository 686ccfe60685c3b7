"""The first half of a feed-forward block with gated filters, and its elementwise part alone, forward and backward.

A step is a forward and a backward pass that yields the gradient of the input and the filter scores, with frozen
weights: what an importance pass does. Gates are in fp32; eager rounds them, and a bias, to the model's dtype first, as
a user would: multiplied as they are, they would turn every tensor behind them to fp32.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Case, Report, add_rates, compare, compiled, doubled, other_backends, step
from benchmarks.shapes import LAYERS, LayerShape
from pymape.ops import masked_activation, masked_activation_reference, masked_ffn, masked_ffn_reference
from pymape.ops.masked_activation import SUPPORTED

PARTS = ("activation", "block")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def add_options(parser: argparse.ArgumentParser, device: str) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    report.notes += [
        "per-sample gates that want their gradient; activation alone: no bias, gate, up projection or scores",
        "block: bias, one or two projections, activation, gate; operations are those of the products",
        "cuBLASLt epilogue: on a GPU, torch._addmm_activation, whose GELU is the tanh form; forward only",
        "Liger: its kernel for SiLU times up, behind two products",
    ]
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    for name in options.layers:
        layer = LAYERS[name]
        for dtype in dtypes:
            if "activation" in options.parts:
                report.add(_activation(name, layer, dtype, device))
        if "block" in options.parts:
            report.add(_block(name, layer, dtypes[0], device))


def _activation(name: str, layer: LayerShape, dtype: torch.dtype, device: str) -> list[Case]:
    batch, tokens = layer.samples_and_tokens(device)
    shape = (batch, tokens, layer.filters)
    pre, up, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    bias, gate = torch.randn(layer.filters, device=device), torch.rand(batch, layer.filters, device=device)
    inputs = [pre.requires_grad_(), gate.requires_grad_(), *([up.requires_grad_()] if layer.gated else [])]

    def call(op: Callable[..., Tensor], pre: Tensor, gate: Tensor, *up: Tensor) -> Tensor:
        return op(pre, gate, bias=bias.to(gate.dtype), up=up[0] if up else None, activation=layer.activation)

    ops: dict[str, Callable[..., Tensor]] = {"pymape": masked_activation, "eager": _eager_activation}
    if device != "cpu" or layer.compiled_on_cpu:
        ops["torch.compile"] = compiled(_eager_activation)
    alone = _plain_activation(layer.activation)
    cases = compare(
        f"activation, {name} {'x'.join(map(str, shape))} {str(dtype)[6:]}",
        {provider: functools.partial(step, functools.partial(call, op), inputs, grad) for provider, op in ops.items()},
        exact=lambda: step(functools.partial(call, masked_activation_reference), doubled(inputs), grad.double()),
        tolerance=TOLERANCE[dtype],
        unchecked={"activation alone": lambda: step(alone, [pre], grad)},
        seconds=0.4,
    )
    # Forward: read pre (and up), write the result. Backward: read the gradient and these, write their gradients.
    moved = (3 + 5 if layer.gated else 2 + 3) * pre.numel() * pre.element_size()
    add_rates(cases[:1], device, dtype, moved=moved)
    return cases


def _block(name: str, layer: LayerShape, dtype: torch.dtype, device: str) -> list[Case]:
    batch, tokens = layer.samples_and_tokens(device)
    scale = layer.width**-0.5
    weights = [scale * torch.randn(layer.filters, layer.width, device=device) for _ in range(1 + layer.gated)]
    weight, *up_weight = (x.to(dtype) for x in weights)
    bias = None if layer.gated else torch.randn(layer.filters, device=device).to(dtype)
    x, gate = torch.randn(batch, tokens, layer.width, device=device), torch.rand(batch, layer.filters, device=device)
    inputs = [x.to(dtype).requires_grad_(), gate.requires_grad_()]
    grad = torch.randn(batch, tokens, layer.filters, device=device).to(dtype)
    block = {"up_weight": up_weight[0] if up_weight else None, "activation": layer.activation}
    compiles = device != "cpu" or layer.compiled_on_cpu
    functions = dict(_block_providers(weight, bias, block, device, compiles))
    exact = _in_double(weight, bias, block)
    products = 2 * batch * tokens * layer.width * layer.filters * (1 + layer.gated)
    shape = f"{name} {batch * tokens}x{layer.width} to {layer.filters} {str(dtype)[6:]}"
    options: dict[str, Any] = {"tolerance": TOLERANCE[dtype], "seconds": 0.6}

    steps = {provider: functools.partial(step, function, inputs, grad) for provider, function in functions.items()}
    backward = compare(
        f"block step, {shape}", steps, exact=lambda: step(exact, doubled(inputs), grad.double()), **options
    )
    add_rates(backward, device, dtype, operations=2 * products)
    with torch.no_grad():
        calls = {provider: functools.partial(function, *inputs) for provider, function in functions.items()}
        if device != "cpu" and bias is not None and layer.activation == "gelu_tanh":
            calls["cuBLASLt epilogue, gate"] = functools.partial(_epilogue, weight, bias, *inputs)
        forward = compare(f"block forward, {shape}", calls, exact=lambda: exact(*doubled(inputs)), **options)
    add_rates(forward, device, dtype, operations=products)
    return [*backward, *forward]


def _block_providers(
    weight: Tensor, bias: Tensor | None, block: dict[str, Any], device: str, compiles: bool
) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    yield "pymape", lambda x, gate: masked_ffn(x, weight, bias, gate, **block)
    for backend in other_backends("masked_ffn", SUPPORTED, device):
        yield f"pymape, {backend}", lambda x, gate, b=backend: masked_ffn(x, weight, bias, gate, **block, backend=b)

    def eager(x: Tensor, gate: Tensor) -> Tensor:
        return masked_ffn_reference(x, weight, bias, gate.to(x.dtype), **block)

    yield "eager", eager
    if compiles:
        yield "torch.compile", compiled(eager)
    if block["up_weight"] is not None:
        yield "Liger, gate", functools.partial(_liger, weight, block["up_weight"])


def _epilogue(weight: Tensor, bias: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """Bias and GELU in the product's epilogue; torch has no derivative of it."""
    hidden = torch._addmm_activation(bias, x.flatten(0, 1), weight.t(), use_gelu=True).view(*x.shape[:2], -1)
    return hidden * gate.to(x.dtype).unsqueeze(1)


def _liger(weight: Tensor, up_weight: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    hidden = LigerSiLUMulFunction.apply(F.linear(x, weight), F.linear(x, up_weight))
    return hidden * gate.to(x.dtype).unsqueeze(1)


def _in_double(weight: Tensor, bias: Tensor | None, block: dict[str, Any]) -> Callable[..., Tensor]:
    up_weight = block["up_weight"]
    wide = block | {"up_weight": None if up_weight is None else up_weight.double()}
    return lambda x, gate: masked_ffn_reference(
        x, weight.double(), None if bias is None else bias.double(), gate, **wide
    )


def _eager_activation(pre: Tensor, gate: Tensor, *, bias: Tensor, up: Tensor | None, activation: str) -> Tensor:
    gate, bias = gate.to(pre.dtype), bias.to(pre.dtype)
    return masked_activation_reference(pre, gate, bias=bias, up=up, activation=activation)


def _plain_activation(activation: str) -> Callable[[Tensor], Tensor]:
    if activation == "gelu_tanh":
        return lambda pre: F.gelu(pre, approximate="tanh")
    return F.silu if activation == "silu" else F.gelu
