"""The head gate behind attention and its backward with head scores, against eager torch and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.harness import Case, Report, alternate, gigabytes_per_second
from pymape.ops import gate_heads, gate_heads_reference, masked_attention, masked_attention_reference

SHAPES = {"BERT-base": (32, 128, 12, 64), "ViT-B/16": (16, 197, 12, 64)}  # [B, T, H, D]


def run(device: str, arguments: Sequence[str] = ()) -> Report:
    report = Report("masked_attention", device)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for name, shape in SHAPES.items():
        output, grad = torch.randn(2, *shape, device=device).to(dtype)
        gate = torch.rand(shape[0], shape[2], device=device)
        inputs = output.requires_grad_(), gate.requires_grad_()
        gates = {
            "pymape": gate_heads,
            "eager": gate_heads_reference,
            "torch.compile": torch.compile(gate_heads_reference),
        }
        # The forward reads and writes one tensor; the backward reads two and writes one.
        report.cases += _measure(f"gate_heads {name}", gates, inputs, grad, 5 * output.numel() * output.element_size())

        heads = torch.randn(3, shape[0], shape[2], shape[1], shape[3], device=device).to(dtype)
        inputs = *(x.requires_grad_() for x in heads), gate
        attentions = {
            "pymape": masked_attention,
            "SDPA, gate": _attention_and_gate,
            "SDPA, gate, torch.compile": torch.compile(_attention_and_gate),
        }
        torch.testing.assert_close(masked_attention(*inputs), masked_attention_reference(*inputs), rtol=1e-2, atol=1e-2)
        report.cases += _measure(f"masked_attention {name}", attentions, inputs, grad.transpose(1, 2), None)
    return report


def _attention_and_gate(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return (output * gate[..., None, None]).to(output.dtype)


def _measure(
    name: str, providers: dict[str, Callable[..., Tensor]], inputs: Sequence[Tensor], grad: Tensor, moved: int | None
) -> list[Case]:
    """Time forward plus backward of every provider, after checking that all agree with the first."""

    def step(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*inputs), inputs, grad)

    expected = step(next(iter(providers.values())))
    for function in providers.values():
        torch.testing.assert_close(step(function), expected, rtol=2e-2, atol=2e-2)
    cases = alternate(name, {provider: lambda f=function: step(f) for provider, function in providers.items()})
    for case in cases:
        if moved is not None:
            case.figures["GB/s"] = gigabytes_per_second(case, moved)
    cases[0].figures["speed-up"] = cases[1].median_s / cases[0].median_s
    return cases
