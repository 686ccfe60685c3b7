"""module_scores: every backend against the fp64 reference, the operator's registration, and its bad input."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOATS, assert_as_good_as_torch, threads

from pymape.ops import module_scores, module_scores_reference

SHAPES = [(1, 1, 1, 1), (2, 63, 3, 64), (3, 129, 129), (2, 7, 4096), (1, 5, 1, 4100), (4, 1, 12, 33), (2, 200, 2050)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    output, grad = torch.randn(2, *shape).to(dtype)
    scores = module_scores(output, grad, backend="cpu")
    assert scores.dtype == torch.promote_types(dtype, torch.float32)
    assert_as_good_as_torch(scores, module_scores_reference, output, grad)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (0, 4, 3, 8), (2, 0, 3, 8)])
def test_empty_sums_are_zero(shape: tuple[int, ...]) -> None:
    empty = torch.empty(shape)
    scores = module_scores(empty, empty)
    assert scores.shape == (shape[0], shape[2])
    assert torch.equal(scores, torch.zeros_like(scores))


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
def test_strides(order: tuple[int, ...]) -> None:
    stored = torch.randn(2, *(torch.empty(3, 5, 4, 8).permute(order).shape))
    inverse = [order.index(i) for i in range(4)]
    output, grad = stored[0].permute(inverse), stored[1].permute(inverse).contiguous()
    assert_as_good_as_torch(module_scores(output, grad), module_scores_reference, output, grad)


def test_integers_are_exact() -> None:
    output, grad = torch.randint(-8, 9, (2, 3, 129, 12, 64)).float()
    assert torch.equal(module_scores(output, grad), module_scores_reference(output, grad))


def test_does_not_depend_on_the_number_of_threads() -> None:
    output, grad = torch.randn(2, 3, 65, 300)
    with threads(3):
        three = module_scores(output, grad)
    assert torch.equal(module_scores(output, grad), three)


def test_gradients() -> None:
    output, grad = (torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(module_scores, (output, grad))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad: bool) -> None:
    output, grad = (torch.randn(2, 5, 3, 4, requires_grad=requires_grad) for _ in range(2))
    torch.library.opcheck(torch.ops.pymape.module_scores, (output, grad, "cpu"))


def test_compiles_without_a_graph_break() -> None:
    output, grad = torch.randn(2, 2, 5, 12)
    compiled = torch.compile(module_scores, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(output, grad), module_scores(output, grad))


@pytest.mark.parametrize(
    ("output", "grad", "message"),
    [
        (torch.zeros(3), torch.zeros(3), r"output must have shape \(B, T, M\) or \(B, T, M, D\), got \(3,\)"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2), r"grad must have the shape of output \(1, 2, 3\), got \(1, 2\)"),
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).half(), "grad must have the dtype of output"),
        (
            torch.zeros(1, 2, 3).int(),
            torch.zeros(1, 2, 3).int(),
            "output must be fp64, fp32, bf16 or fp16, got torch.i",
        ),
    ],
)
def test_bad_input(output: torch.Tensor, grad: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module_scores(output, grad)


def test_a_backend_that_cannot_run_says_why() -> None:
    x = torch.zeros(1, 2, 3)
    with pytest.raises(RuntimeError, match="backend 'cuda' of module_scores cannot run: it needs CUDA tensors"):
        module_scores(x, x, backend="cuda")
    with pytest.raises(ValueError, match="must be one of auto, cpu, cuda, reference, got 'triton'"):
        module_scores(x, x, backend="triton")
