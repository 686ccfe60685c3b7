"""masked_ffn and masked_activation: every backend against the fp64 reference, gradients, registration, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from conftest import FLOATS, assert_as_good_as_torch, threads
from cuda_tools import compile_cu, requires_nvcc
from torch import Tensor
from triton_launches import ffn
from triton_tools import LARGEST_SHARED, compiled_launches, interpreted, requires_triton

from pymape.ops import masked_activation, masked_activation_reference, masked_ffn, masked_ffn_reference
from pymape.ops.masked_ffn import ACTIVATIONS

FFN_INPUTS = ("x", "weight", "bias", "gate", "up_weight", "up_bias")


def _activation_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, *, gated: bool, per_sample: bool
) -> dict[str, Tensor]:
    filters = shape[-1]
    gate = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (shape[0], filters) if per_sample else (filters,))]
    inputs = {"pre": 3 * torch.randn(shape), "gate": gate, "bias": torch.randn(filters)}
    if gated:
        inputs |= {"up": torch.randn(shape), "up_bias": torch.randn(filters)}
    return {name: x.to(dtype) for name, x in inputs.items()}


def _ffn_inputs(dtype: torch.dtype, *, gated: bool, per_sample: bool, tokens: int = 33) -> dict[str, Tensor]:
    batch, width, filters = 2, 40, 65
    gate = torch.tensor([0.0, 0.5, 1.0])[torch.randint(3, (batch, filters) if per_sample else (filters,))]
    inputs = {"x": torch.randn(batch, tokens, width), "weight": torch.randn(filters, width) / 4}
    inputs |= {"bias": torch.randn(filters), "gate": gate}
    if gated:
        inputs |= {"up_weight": torch.randn(filters, width) / 4, "up_bias": torch.randn(filters)}
    return {name: x.to(dtype) for name, x in inputs.items()}


def _with_gradients(
    op: Callable[..., Tensor], names: list[str], grad: Tensor, **options: Any
) -> Callable[..., list[Tensor]]:
    """Return a function of the tensors in `names` that gives the op's result and the gradient of each of them.

    What the op allocates holds NaN at first, in this process and in the one that interprets Triton.
    """

    def run(*tensors: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            result = op(**dict(zip(names, leaves)), **options)
            return [result.detach(), *torch.autograd.grad(result, leaves, grad.to(result.dtype))]
        finally:
            torch.use_deterministic_algorithms(before)

    return run


def _check(
    op: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: dict[str, Tensor], **options: Any
) -> None:
    names, backend = list(inputs), options.pop("backend", "cpu")
    grad = torch.randn(reference(**inputs, **options).shape, dtype=inputs[names[0]].dtype)
    actual = _with_gradients(op, names, grad, backend=backend, **options)(*inputs.values())
    expected = _with_gradients(reference, names, grad, **options)
    if grad.dtype == torch.float64:  # the reference's own rounding is as large as ours
        torch.testing.assert_close(actual, expected(*inputs.values()), rtol=1e-12, atol=1e-12)
        return
    for i, got in enumerate(actual):
        assert_as_good_as_torch(got, lambda *x, i=i: expected(*x)[i], *inputs.values())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_matches_the_reference(activation: str, dtype: torch.dtype, gated: bool) -> None:
    for shape, per_sample in [((2, 63, 129), True), ((3, 33, 1030), False), ((2, 1, 1), True), ((1, 129, 63), True)]:
        inputs = _activation_inputs(shape, dtype, gated=gated, per_sample=per_sample)
        _check(masked_activation, masked_activation_reference, inputs, activation=activation)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_ffn_matches_the_reference(per_sample: bool, dtype: torch.dtype, gated: bool) -> None:
    inputs = _ffn_inputs(dtype, gated=gated, per_sample=per_sample)
    _check(masked_ffn, masked_ffn_reference, inputs, activation="silu" if gated else "gelu")


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7), (2, 3, 5, 7)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_any_number_of_dimensions(shape: tuple[int, ...], per_sample: bool) -> None:
    if per_sample and len(shape) == 1:
        pytest.skip("a gate per sample needs samples")
    inputs = _activation_inputs(shape, torch.float64, gated=True, per_sample=per_sample)
    _check(masked_activation, masked_activation_reference, inputs)


@pytest.mark.parametrize("order", [(1, 0, 2), (0, 2, 1), (2, 0, 1)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_strides(order: tuple[int, ...], per_sample: bool) -> None:
    inputs = _activation_inputs((3, 5, 8), torch.float32, gated=True, per_sample=per_sample)
    inverse = [order.index(i) for i in range(3)]
    for name in ("pre", "up"):
        inputs[name] = inputs[name].permute(order).contiguous().permute(inverse)
    inputs["gate"] = inputs["gate"].repeat_interleave(2, dim=-1)[..., ::2]
    _check(masked_activation, masked_activation_reference, inputs)


def test_halves_of_a_fused_projection_and_a_transposed_weight() -> None:
    fused, gate = torch.randn(2, 5, 14), torch.rand(2, 7)
    pre, up = fused.chunk(2, dim=-1)
    torch.testing.assert_close(masked_activation(pre, gate, up=up), masked_activation_reference(pre, gate, up=up))
    x, weight = torch.randn(2, 5, 6), torch.randn(6, 7).T
    torch.testing.assert_close(masked_ffn(x, weight, gate=gate), masked_ffn_reference(x, weight, gate=gate))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 3, 0), (0, 3)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_empty(shape: tuple[int, ...], per_sample: bool) -> None:
    pre = torch.empty(shape, requires_grad=True)
    gate = torch.ones((shape[0], shape[-1]) if per_sample else shape[-1:], requires_grad=True)
    result = masked_activation(pre, gate)
    assert result.shape == pre.shape
    _, d_gate = torch.autograd.grad(result.sum(), (pre, gate))
    assert torch.equal(d_gate, torch.zeros_like(gate))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tails(activation: str) -> None:
    x = torch.cat([torch.linspace(-5.5, 5.5, 20001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    exact = masked_activation_reference(x.double(), activation=activation)
    relative = (masked_activation(x, activation=activation) - exact).abs() / exact.abs().clamp_min(1e-36)
    assert relative.max() < 4e-6  # torch's fp32 GELU loses every digit long before -5.5
    far = torch.tensor([-3e38, -100.0, -14.0, 14.0, 100.0, 3e38]).requires_grad_()
    result = masked_activation(far, activation=activation)
    torch.testing.assert_close(result, far.detach().clamp_min(0), rtol=0, atol=2e-5)
    (slope,) = torch.autograd.grad(result.sum(), far)
    torch.testing.assert_close(slope, (far > 0).float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_is_not_hidden(activation: str, dtype: torch.dtype) -> None:
    pre = torch.full((1, 2, 3), torch.nan, dtype=dtype)
    assert masked_activation(pre, activation=activation).isnan().all()


def test_does_not_depend_on_the_number_of_threads() -> None:
    inputs = _activation_inputs((3, 130, 1100), torch.float32, gated=True, per_sample=True)
    run = _with_gradients(masked_activation, list(inputs), torch.randn(3, 130, 1100))
    with threads(3):
        three = run(*inputs.values())
    assert all(torch.equal(a, b) for a, b in zip(run(*inputs.values()), three, strict=True))


@pytest.mark.parametrize("wanted", ["pre", "gate", "bias", "up", "up_bias"])
def test_gradient_of_one_input_alone(wanted: str) -> None:
    inputs = _activation_inputs((2, 5, 7), torch.float64, gated=True, per_sample=True)
    inputs[wanted].requires_grad_()
    (actual,) = torch.autograd.grad(masked_activation(**inputs).sum(), inputs[wanted])
    (expected,) = torch.autograd.grad(masked_activation_reference(**inputs).sum(), inputs[wanted])
    torch.testing.assert_close(actual, expected)


def test_backward_computes_and_saves_only_what_is_needed() -> None:
    inputs = _ffn_inputs(torch.float32, gated=False, per_sample=True)
    inputs["gate"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = masked_ffn(**inputs)
    assert sum(x.numel() >= result.numel() for x in saved) == 1  # the projection, and nothing else of its size
    calls: list[tuple[Any, ...]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            calls.append((str(func), args))
            return func(*args, **(kwargs or {}))

    with Record():
        torch.autograd.grad(result.sum(), inputs["gate"])
    assert not [name for name, _ in calls if "mm" in name]
    (args,) = [args for name, args in calls if "masked_activation_backward" in name]
    assert args[7:10] == (False, False, True)  # neither the projections' gradients, only the gate's


def test_gradcheck() -> None:
    inputs = _ffn_inputs(torch.float64, gated=True, per_sample=True, tokens=2)
    leaves = [inputs[name][..., :5].clone().requires_grad_() if name == "x" else inputs[name] for name in FFN_INPUTS]
    leaves[1:] = [(x[:4, :5] if x.shape[-1] == 40 else x[..., :4]).clone().requires_grad_() for x in leaves[1:]]

    def op(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor, up_weight: Tensor, up_bias: Tensor) -> Tensor:
        return masked_ffn(x, weight, bias, gate, up_weight=up_weight, up_bias=up_bias, activation="silu")

    assert torch.autograd.gradcheck(op, leaves)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_opcheck(requires_grad: bool, per_sample: bool) -> None:
    inputs = _activation_inputs((2, 5, 7), torch.float32, gated=True, per_sample=per_sample)
    pre, gate, bias, up, up_bias = (x.requires_grad_(requires_grad) for x in inputs.values())
    tensors = (pre, bias, up, up_bias, gate)
    torch.library.opcheck(torch.ops.pymape.masked_activation, (*tensors, "gelu", "cpu"))
    frozen = tuple(x.detach() for x in (torch.randn(2, 5, 7), *tensors))
    torch.library.opcheck(torch.ops.pymape.masked_activation_backward, (*frozen, "gelu", True, False, True, "cpu"))


@pytest.mark.parametrize("gated", [False, True])
def test_compiles_without_a_graph_break(gated: bool) -> None:
    inputs = _ffn_inputs(torch.float32, gated=gated, per_sample=True)
    compiled = torch.compile(masked_ffn, fullgraph=True, backend="aot_eager")
    grad = torch.randn(2, 33, 65)
    plain = _with_gradients(masked_ffn, list(inputs), grad)(*inputs.values())
    for a, b in zip(_with_gradients(compiled, list(inputs), grad)(*inputs.values()), plain):
        torch.testing.assert_close(a, b)


def test_autocast() -> None:
    inputs = _ffn_inputs(torch.float32, gated=True, per_sample=True)
    grad = torch.randn(2, 33, 65)
    results = []
    for op in (masked_ffn, masked_ffn_reference):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(_with_gradients(op, list(inputs), grad)(*inputs.values()))
    assert results[0][0].dtype == torch.bfloat16
    for a, b in zip(*results):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0.03 * b.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_at_one_is_the_original_bit_for_bit(activation: str) -> None:
    x, weight, bias = torch.randn(2, 5, 6), torch.randn(7, 6), torch.randn(7)
    original = {
        "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU(approximate="tanh"),
        "relu": torch.nn.ReLU(),
        "silu": torch.nn.SiLU(),
    }[activation](torch.nn.functional.linear(x, weight, bias))
    for gate in (torch.ones(7), torch.ones(2, 7), None):
        actual = masked_ffn(x, weight, bias, gate, activation=activation, backend="reference")
        assert torch.equal(actual, original)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_triton_ffn(per_sample: bool, gated: bool, dtype: torch.dtype) -> None:
    inputs = _ffn_inputs(dtype, gated=gated, per_sample=per_sample)
    _check(masked_ffn, masked_ffn_reference, inputs, activation="silu" if gated else "gelu", backend="triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_triton_activation(activation: str, dtype: torch.dtype) -> None:
    for shape, gated, per_sample in [((2, 63, 129), False, True), ((2, 33, 65), True, False), ((1, 1, 1), True, True)]:
        inputs = _activation_inputs(shape, dtype, gated=gated, per_sample=per_sample)
        _check(masked_activation, masked_activation_reference, inputs, activation=activation, backend="triton")


@interpreted
@pytest.mark.parametrize("tokens", [64, 63])
def test_triton_skips_closed_tiles(tokens: int) -> None:
    inputs = _ffn_inputs(torch.float32, gated=True, per_sample=True, tokens=tokens)
    inputs["gate"] = torch.zeros(2, 65)
    inputs["gate"][1, :32] = 1  # the tiles that hold these are computed, all others skipped
    inputs["x"][0] = torch.inf  # what is skipped is not read: inf would give NaN
    inputs["x"].requires_grad_()
    result = masked_ffn(**inputs, backend="triton")
    expected = masked_ffn_reference(inputs["x"][1:], *(inputs[name] for name in ("weight", "bias")), inputs["gate"][1:],
                                    up_weight=inputs["up_weight"], up_bias=inputs["up_bias"])  # fmt: skip
    torch.testing.assert_close(result[1:], expected)
    torch.testing.assert_close(torch.autograd.grad(result[1].sum(), inputs["x"])[0][1:],
                               torch.autograd.grad(expected.sum(), inputs["x"])[0][1:])  # fmt: skip
    if tokens == 64:  # tiles of one sample
        assert torch.equal(result[0], torch.zeros_like(result[0]))


@interpreted
def test_triton_saves_only_what_is_needed() -> None:
    inputs = _ffn_inputs(torch.float32, gated=True, per_sample=True)
    inputs["gate"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        result = masked_ffn(**inputs, backend="triton")
    assert sum(x.shape == result.shape for x in saved) == 2  # both projections
    assert not any(x.shape == inputs["x"].shape for x in saved)


@interpreted
def test_triton_empty_and_opcheck() -> None:
    for shape in [(0, 4, 6), (2, 0, 6)]:
        x, gate = torch.empty(shape, requires_grad=True), torch.ones(shape[0], 7, requires_grad=True)
        result = masked_ffn(x, torch.ones(7, 6), gate=gate, backend="triton")
        assert torch.equal(torch.autograd.grad(result.sum(), gate)[0], torch.zeros_like(gate))
    inputs = {name: x.requires_grad_() for name, x in _ffn_inputs(torch.float32, gated=True, per_sample=True).items()}
    x, weight, bias, gate, up_weight, up_bias = inputs.values()
    arguments = (x, weight, bias, up_weight, up_bias, gate, "silu", True, False)
    torch.library.opcheck(torch.ops.pymape.masked_ffn, arguments)


@requires_triton
def test_triton_takes_tf32_where_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    import pymape.kernels.masked_ffn as kernels

    kernel, matmul, inputs = (
        MagicMock(),
        torch.backends.cuda.matmul,
        _ffn_inputs(torch.float32, gated=True, per_sample=True),
    )
    monkeypatch.setattr(kernels, "_masked_ffn_fwd_kernel", kernel)

    def precision() -> str:
        x, weight, bias, gate, up_weight, up_bias = inputs.values()
        torch.ops.pymape.masked_ffn(x, weight, bias, up_weight, up_bias, gate, "silu", False, True)
        return kernel.__getitem__.return_value.call_args.kwargs["PRECISION"]

    before = matmul.fp32_precision
    try:
        for allowed in (True, False):
            matmul.allow_tf32 = allowed  # what torch has of old
            assert precision() == ("tf32" if allowed else "ieee")
        matmul.fp32_precision = "tf32"  # the old one raises when it is read after this
        assert precision() == "tf32"
    finally:
        matmul.fp32_precision = before


@requires_triton
@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("activation", "gated", "one_sample"), [("gelu", False, True), ("gelu", False, False), ("silu", True, False)]
)
def test_triton_kernels_do_not_spill(
    activation: str, gated: bool, one_sample: bool, dtype: torch.dtype, sm: int
) -> None:
    with compiled_launches(sm) as kernels:
        ffn(dtype, activation, gated, one_sample)
    assert len(kernels) == 3
    for kernel in kernels:
        assert kernel.stack == 0, kernel
        assert kernel.shared <= LARGEST_SHARED[sm], kernel


@requires_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_cuda_kernels_do_not_spill(arch: int) -> None:
    usage = compile_cu("csrc/masked_ffn.cu", arch)
    assert len(usage) == 4 * 2 * 2 * 2 + 2  # dtypes, vector or not, gated or not, forward and backward; and two folds
    assert all(kernel["spill_stores"] == kernel["spill_loads"] == 0 for kernel in usage.values())


X, W = torch.zeros(2, 3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(5, 3)}, r"weight must have shape \(F, 4\), got \(5, 3\)"),
        ({"bias": torch.zeros(4)}, r"bias must have shape \(5,\), got \(4,\)"),
        ({"gate": torch.zeros(3, 5)}, r"gate must have shape \(5,\) or \(2, 5\), got \(3, 5\)"),
        ({"up_weight": torch.zeros(4, 4)}, r"up_weight must have the shape of weight \(5, 4\), got \(4, 4\)"),
        ({"up_bias": torch.zeros(5)}, "up_bias must come with up_weight, got up_weight=None"),
        ({"activation": "tanh"}, "activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"),
        ({"weight": W.half()}, "weight must have the dtype of x torch.float32, got torch.float16"),
        ({"gate": torch.zeros(5).int()}, "gate must be fp64, fp32, bf16 or fp16, got torch.int32"),
        ({"bias": torch.zeros(5, device="meta")}, "bias must be on the device of x cpu, got meta"),
        ({"backend": "metal"}, "backend of masked_ffn must be one of auto, cpu, triton, cuda, reference, got 'metal'"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_ffn(**{"x": X, "weight": W, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": torch.zeros(2, 2, 4)}, r"gate must have shape \(4,\) or \(2, 4\), got \(2, 2, 4\)"),
        ({"up": torch.zeros(2, 3, 5)}, r"up must have the shape of pre \(2, 3, 4\), got \(2, 3, 5\)"),
        ({"up": X.half()}, "up must have the dtype of pre torch.float32, got torch.float16"),
        ({"up_bias": torch.zeros(4)}, "up_bias must come with up, got up=None"),
    ],
)
def test_bad_activation_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        masked_activation(**{"pre": X, **arguments})


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="backend 'cuda' of masked_ffn cannot run: it needs CUDA tensors"):
        masked_ffn(X, W, backend="cuda")
    with pytest.raises(RuntimeError, match="backend 'triton' of masked_activation cannot run"):
        masked_activation(X, backend="triton")
