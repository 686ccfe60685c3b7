"""Second derivatives: right, or refused where a fused backward pass has none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from triton_tools import interpreted

from pymape.ops import gate_heads, masked_activation, masked_attention, masked_ffn

SHAPE = (2, 3, 4, 5)


def differentiate_twice(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Differentiate a loss and the squares of its gradients, which must depend on their inputs."""
    inputs = [torch.randn(shape, requires_grad=True) for shape in shapes]
    first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    assert all(grad.requires_grad for grad in first)
    return torch.autograd.grad(sum(grad.square().sum() for grad in first), inputs)


@pytest.mark.parametrize(
    ("name", "function", "shapes"),
    [
        ("gate_heads", gate_heads, (SHAPE, (4,))),
        ("masked_activation", masked_activation, (SHAPE, (5,))),
        ("masked_activation", masked_ffn, (SHAPE, (7, 5), (7,), (7,))),
    ],
)
def test_fused_backward_passes_refuse(
    name: str, function: Callable[..., Tensor], shapes: list[tuple[int, ...]]
) -> None:
    with pytest.raises(RuntimeError, match=f"^{name} has no second derivative; use backend='reference'$"):
        differentiate_twice(function, *shapes)
    assert differentiate_twice(lambda *xs: function(*xs, backend="reference"), *shapes)


@interpreted
def test_those_of_triton_refuse_too() -> None:
    for name, function, shapes in [
        ("masked_activation", masked_ffn, (SHAPE, (7, 5), (7,), (7,))),
        ("masked_attention", masked_attention, (SHAPE, SHAPE, SHAPE, (3,))),
    ]:
        with pytest.raises(RuntimeError, match=f"^{name} has no second derivative; use backend='reference'$"):
            differentiate_twice(lambda *xs, f=function: f(*xs, backend="triton"), *shapes)
