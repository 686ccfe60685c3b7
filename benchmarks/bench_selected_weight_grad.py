"""selected_weight_grad against the full weight gradient, of which most is thrown away, and against gathering first."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Case, Report, add_rates, compare, compiled
from benchmarks.shapes import LAYERS
from pymape.ops import selected_weight_grad, selected_weight_grad_reference

SHARE = 0.1
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    report.notes += [
        f"{SHARE:.0%} of the filters, drawn at random; operations are those of the selected part",
        "full: dy^T x, then index_select of the gradient; gather: index_select of the activations, then a GEMM",
    ]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for name, layer in LAYERS.items():
        batch, tokens = layer.samples_and_tokens(device)
        for axis in ("rows", "columns"):  # of the projection to the filters, and of the one behind them
            compiles = device != "cpu" or layer.compiled_on_cpu
            report.add(_compare(name, batch * tokens, layer.width, layer.filters, axis, dtype, device, compiles))


def _compare(
    name: str, tokens: int, width: int, filters: int, axis: str, dtype: torch.dtype, device: str, compiles: bool
) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(filters, generator=generator)[: round(SHARE * filters)].to(device)
    inputs, outputs = (width, filters) if axis == "rows" else (filters, width)
    x, dy = (torch.randn(tokens, size, device=device).to(dtype) for size in (inputs, outputs))
    providers: dict[str, Callable[[], Tensor]] = {
        "pymape": lambda: selected_weight_grad(x, dy, index, axis),
        "full, then select": lambda: selected_weight_grad_reference(x, dy, index, axis),
        "gather, then product": lambda: _gathered(x, dy, index, axis),
    }
    if device != "cpu":
        providers["pymape, triton"] = lambda: selected_weight_grad(x, dy, index, axis, backend="triton")
    if compiles:
        providers["gather, then product, torch.compile"] = functools.partial(compiled(_gathered), x, dy, index, axis)
    cases = compare(
        f"{name} {axis}, {tokens} tokens, {len(index)} of {filters}, width {width} {str(dtype)[6:]}",
        providers,
        exact=lambda: selected_weight_grad_reference(x.double(), dy.double(), index, axis),
        tolerance=TOLERANCE[dtype],
        seconds=0.4,
    )
    add_rates(cases, device, dtype, operations=2 * tokens * len(index) * width)
    return cases


def _gathered(x: Tensor, dy: Tensor, index: Tensor, axis: str) -> Tensor:
    side, full = (dy, x) if axis == "rows" else (x, dy)
    return side.index_select(1, index).t() @ full
