"""module_scores against eager torch and torch.compile, and against the rate at which torch copies memory."""

from __future__ import annotations

import argparse
import functools

import torch

from benchmarks.harness import Case, Report, add_rates, compare, compiled
from benchmarks.shapes import LAYERS
from pymape.ops import module_scores, module_scores_reference


def run(report: Report, options: argparse.Namespace) -> None:
    device = report.device
    report.notes += [
        "eager: (grad * out).sum in the inputs' dtype; eager, fp32 sums: the same after both are turned into fp32",
        "GB/s counts every input once; copy_ reads and writes as much",
    ]
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    for dtype in dtypes:
        for name, layer in LAYERS.items():
            batch, tokens = layer.samples_and_tokens(device)
            if device == "cpu":
                batch *= 4  # two passes over the data are over soon: enough of it that no cache holds it
            for shape in ((batch, tokens, layer.filters), (batch, tokens, layer.heads, layer.head_size)):
                compiles = device != "cpu" or layer.compiled_on_cpu
                report.add(_compare(name, shape, dtype, device, compiles))


def _compare(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str, compiles: bool) -> list[Case]:
    output, grad = torch.randn(2, *shape, device=device).to(dtype)
    dims = (1,) if len(shape) == 3 else (1, 3)
    copy = torch.empty_like(output)
    providers = {
        "pymape": lambda: module_scores(output, grad),
        "eager": lambda: (grad * output).sum(dims),
    }
    if dtype != torch.float32:
        providers["eager, fp32 sums"] = lambda: module_scores_reference(output, grad)
    if compiles:
        providers["torch.compile, fp32 sums"] = functools.partial(compiled(module_scores_reference), output, grad)
    label = f"{name} {'heads' if len(shape) == 4 else 'filters'} {'x'.join(map(str, shape))} {str(dtype)[6:]}"
    # The sum of many products of both signs: eager bf16 rounds every product, and the sum of some is near 0.
    cases = compare(
        label,
        providers,
        exact=lambda: module_scores_reference(output.double(), grad.double()),
        tolerance=1e-5 if dtype == torch.float32 else 3e-2,
        unchecked={"copy_": lambda: copy.copy_(output)},
        seconds=0.4,
    )
    add_rates(cases, device, dtype, moved=2 * output.numel() * output.element_size())
    return cases
