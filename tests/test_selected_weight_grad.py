"""selected_weight_grad: every backend against the fp64 reference, its registration, its gradient, its bad input."""

from __future__ import annotations

import pytest
import torch
from conftest import FLOATS, assert_as_good_as_torch
from torch import Tensor
from triton_launches import weight_grad
from triton_tools import LARGEST_SHARED, compiled_launches, interpreted, requires_triton

from pymape.ops import selected_weight_grad, selected_weight_grad_reference

# tokens, in, out, selected
SHAPES = [(1, 1, 1, 1), (63, 129, 17, 5), (129, 33, 130, 63), (7, 64, 200, 200), (1, 5, 7, 3)]


def draw(tokens: int, inputs: int, outputs: int, selected: int, axis: str, dtype: torch.dtype = torch.float32):
    """x, dy and indices that are neither sorted nor neighbours."""
    x, dy = torch.randn(tokens, inputs).to(dtype), torch.randn(tokens, outputs).to(dtype)
    width = outputs if axis == "rows" else inputs
    return x, dy, torch.randperm(width)[: min(selected, width)]


def check(backend: str, x: Tensor, dy: Tensor, index: Tensor | None, axis: str) -> None:
    actual = selected_weight_grad(x, dy, index, axis, backend=backend)
    assert actual.dtype == torch.promote_types(x.dtype, torch.float32)
    assert actual.is_contiguous()
    assert_as_good_as_torch(actual, lambda a, b: selected_weight_grad_reference(a, b, index, axis), x, dy)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_the_reference(shape: tuple[int, ...], axis: str, dtype: torch.dtype) -> None:
    x, dy, index = draw(*shape, axis, dtype)
    check("cpu", x, dy, index, axis)
    check("cpu", x, dy, None, axis)


def test_is_the_weight_gradient_of_a_linear_layer() -> None:
    layer = torch.nn.Linear(33, 20, dtype=torch.float64)
    x, index = torch.randn(9, 33, dtype=torch.float64), torch.tensor([19, 0, 7])
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    torch.testing.assert_close(selected_weight_grad(x, dy, index, "rows"), layer.weight.grad[index])
    torch.testing.assert_close(selected_weight_grad(x, dy, index, "columns"), layer.weight.grad[:, index].t())
    kept = x[:, index]  # a caller may keep the selected columns only
    torch.testing.assert_close(selected_weight_grad(kept, dy, None, "columns"), layer.weight.grad[:, index].t())


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_empty(axis: str) -> None:
    x, dy, index = draw(0, 5, 6, 2, axis)
    result = selected_weight_grad(x, dy, index, axis)
    assert torch.equal(result, torch.zeros(2, 5 if axis == "rows" else 6))
    x, dy, index = draw(4, 5, 6, 0, axis)
    assert selected_weight_grad(x, dy, index, axis).shape == (0, 5 if axis == "rows" else 6)


def test_strides() -> None:
    x, dy = torch.randn(33, 17).t(), torch.randn(20, 34).t()[::2]
    for axis in ("rows", "columns"):
        check("cpu", x, dy, torch.tensor([1, 16, 3]), axis)


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("gathered", [True, False])
def test_gradients(axis: str, gathered: bool) -> None:
    x, dy, index = draw(5, 4, 6, 3, axis, torch.float64)
    x, dy = x.requires_grad_(), dy.requires_grad_()
    chosen = None if gathered else index
    assert torch.autograd.gradcheck(lambda a, b: selected_weight_grad(a, b, chosen, axis), (x, dy))


@pytest.mark.parametrize("axis", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(axis: str, dtype: torch.dtype) -> None:
    x, dy, index = draw(5, 4, 6, 3, axis, dtype)
    arguments = (x.requires_grad_(), dy.requires_grad_(), index, axis, "cpu")
    torch.library.opcheck(torch.ops.pymape.selected_weight_grad, arguments)


def test_compiles_without_a_graph_break() -> None:
    x, dy, index = draw(5, 4, 6, 3, "rows")
    compiled = torch.compile(selected_weight_grad, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, dy, index, "rows"), selected_weight_grad(x, dy, index, "rows"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"axis": "row"}, "axis must be one of rows, columns, got 'row'"),
        ({"x": torch.zeros(2, 3, 4)}, r"x must have shape \(N, in\), got \(2, 3, 4\)"),
        ({"dy": torch.zeros(3, 4)}, r"dy must have shape \(2, out\), got \(3, 4\)"),
        ({"x": torch.zeros(2, 3).int()}, "x must be fp64, fp32, bf16 or fp16, got torch.int32"),
        ({"dy": torch.zeros(2, 4).half()}, "dy must have the dtype of x torch.float32, got torch.float16"),
        (
            {"index": torch.zeros(1, dtype=torch.int32)},
            r"index must be int64 of shape \(n,\), got torch.int32 of shape",
        ),
        ({"backend": "gpu"}, "backend of selected_weight_grad must be one of auto, cpu, cuda, triton, reference"),
    ],
)
def test_bad_input(changed: dict, message: str) -> None:
    good = {"x": torch.zeros(2, 3), "dy": torch.zeros(2, 4), "index": torch.zeros(1, dtype=torch.int64), "axis": "rows"}
    with pytest.raises(ValueError, match=message):
        selected_weight_grad(**(good | changed))


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        selected_weight_grad(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([4]), "rows")


class TestTriton:
    @interpreted
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("axis", ["rows", "columns"])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_matches_the_reference(self, shape: tuple[int, ...], axis: str, dtype: torch.dtype) -> None:
        x, dy, index = draw(*shape, axis, dtype)
        check("triton", x, dy, index, axis)
        check("triton", x, dy, None, axis)

    @interpreted
    def test_tokens_split_over_blocks(self) -> None:
        for tokens in (1025, 2048):
            x, dy, index = draw(tokens, 20, 12, 5, "rows")
            check("triton", x, dy, index, "rows")
            again = (selected_weight_grad(x, dy, index, "rows", backend="triton") for _ in range(2))
            assert torch.equal(*again)

    @interpreted
    def test_strides_and_empty(self) -> None:
        x, dy = torch.randn(33, 17).t(), torch.randn(20, 34).t()[::2]
        for axis in ("rows", "columns"):
            check("triton", x, dy, torch.tensor([1, 16, 3]), axis)
            check("triton", x, dy, torch.tensor([[1, 5], [16, 2], [3, 0]])[:, 0], axis)  # as `nonzero` gives them
        result = selected_weight_grad(x[:0], dy[:0], torch.tensor([1, 2]), "rows", backend="triton")
        assert torch.equal(result, torch.zeros(2, 33))
        assert selected_weight_grad(x, dy, torch.tensor([1])[:0], "rows", backend="triton").shape == (0, 33)

    @interpreted
    def test_opcheck_and_compile(self) -> None:
        x, dy, index = draw(5, 4, 6, 3, "columns")
        torch.use_deterministic_algorithms(False)  # opcheck compares two runs, NaN and all
        arguments = (x.requires_grad_(), dy.requires_grad_(), index, "columns", "triton")
        torch.library.opcheck(torch.ops.pymape.selected_weight_grad, arguments)

    @interpreted
    def test_fp64_is_refused_by_name(self) -> None:
        x, dy, index = draw(5, 4, 6, 3, "rows", torch.float64)
        with pytest.raises(RuntimeError, match="cannot run: it takes fp32, bf16 and fp16"):
            selected_weight_grad(x, dy, index, "rows", backend="triton")

    @requires_triton
    @pytest.mark.parametrize("sm", [80, 90])
    @pytest.mark.parametrize("dtype", FLOATS[1:])
    def test_compiled_kernel_spills_nothing(self, dtype: torch.dtype, sm: int) -> None:
        with compiled_launches(sm) as kernels:
            weight_grad(dtype)
        assert [kernel.stack for kernel in kernels] == [0]
        assert kernels[0].shared <= LARGEST_SHARED[sm]
