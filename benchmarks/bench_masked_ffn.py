"""masked_activation, forward and backward with scores, against torch: the activation alone, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Report, alternate, gigabytes_per_second
from pymape.ops import masked_activation, masked_activation_reference

CASES = {
    "BERT-base": ("gelu", False, (32, 128, 3072)),
    "GPT-2": ("gelu_tanh", False, (8, 512, 3072)),
    "Qwen2-0.5B": ("silu", True, (8, 256, 4864)),
}
ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda pre: F.gelu(pre, approximate="tanh"),
    "silu": F.silu,
}


def run(device: str, arguments: Sequence[str] = ()) -> Report:
    report = Report("masked_ffn", device)
    report.notes.append(
        "per-sample gates that want their gradient; 'activation alone' has no bias, gate, up projection or scores"
    )
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    for name, (activation, gated, shape) in CASES.items():
        for dtype in dtypes:
            _measure(
                report, f"{name} {'x'.join(map(str, shape))} {str(dtype)[6:]}", activation, gated, shape, dtype, device
            )
    return report


def _measure(
    report: Report,
    label: str,
    activation: str,
    gated: bool,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: str,
) -> None:
    batch, _, filters = shape
    pre, up, grad = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
    gate, bias = torch.ones(batch, filters, device=device), torch.randn(filters, device=device)
    leaves = [pre.requires_grad_(), gate.requires_grad_(), *([up.requires_grad_()] if gated else [])]

    def gated_by(op: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: op(pre, gate, bias=bias, up=up if gated else None, activation=activation)

    forward = {
        "pymape": gated_by(masked_activation),
        "activation alone": lambda: ALONE[activation](pre),
        "eager": gated_by(masked_activation_reference),
        "torch.compile": gated_by(torch.compile(masked_activation_reference)),
    }
    inputs = {provider: [pre] if provider == "activation alone" else leaves for provider in forward}
    results = {provider: call() for provider, call in forward.items()}
    backward = {
        provider: lambda provider=provider: torch.autograd.grad(
            results[provider], inputs[provider], grad, retain_graph=True
        )
        for provider in forward
    }
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for actual, expected in zip(
        (results["pymape"], *backward["pymape"]()), (results["eager"], *backward["eager"]()), strict=True
    ):
        largest = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * largest)

    size = pre.numel() * pre.element_size()
    for direction, calls, moved in (
        ("forward", forward, (3 if gated else 2) * size),
        ("backward", backward, (5 if gated else 3) * size),
    ):
        cases = alternate(f"{label} {direction}", calls)
        cases[0].figures["GB/s"] = gigabytes_per_second(cases[0], moved)
        for other in cases[1:]:
            other.figures["pymape is x faster"] = other.median_s / cases[0].median_s
        report.cases += cases
