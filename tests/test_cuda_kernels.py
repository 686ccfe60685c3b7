"""The CUDA kernels, run by the emulator on a CPU: against the fp64 references, at odd sizes, strides and alignments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import FLOATS, assert_as_good_as_torch
from cuda_emulation import emulated_cuda, requires_compiler  # noqa: F401 (a fixture)
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are run from the repository, never installed

from benchmarks.gpu_operators import Case, cases, gradients  # noqa: E402
from pymape import ops  # noqa: E402

pytestmark = [requires_compiler, pytest.mark.usefixtures("emulated_cuda", "poisoned_memory")]

# Attention on CUDA is torch's and then the gate, which has cases of its own.
SMALL = [
    case
    for case in cases()
    if "cuda" in case.backends and case.name.split()[0] in ("tiny", "odd") and "attention" not in case.name
]


@pytest.fixture(params=["forward", "reverse"], autouse=True)
def order_of_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_EMULATOR_ORDER", request.param)


def check(op: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare results and the gradients of all inputs."""
    on_cuda = partial(op, backend="cuda")
    assert_as_good_as_torch(on_cuda(*inputs), reference, *inputs)
    for i, gradient in enumerate(gradients(on_cuda, *inputs)):
        assert_as_good_as_torch(gradient, lambda *xs, i=i: gradients(reference, *xs)[i], *inputs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_matches_the_reference(case: Case, dtype: torch.dtype) -> None:
    check(case.op, case.reference, *case.draw(dtype))


def views(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same shape [B, T, H, D] laid out in the ways that decide whether 16 bytes can be loaded at once."""
    batch, tokens, heads, width = shape
    wide = torch.randn(batch, tokens, heads, width + 8).to(dtype)
    return {
        "dense": torch.randn(shape).to(dtype),
        "heads first": torch.randn(batch, heads, tokens, width).to(dtype).transpose(1, 2),
        "wider rows": wide[..., :width],
        "off by one element": torch.randn(batch * tokens * heads * width + 1).to(dtype)[1:].view(shape),
        "shifted rows": wide[..., 1 : width + 1],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 12, 1])
def test_layouts(width: int, dtype: torch.dtype) -> None:
    shape = (2, 37, 8, width)
    for output in views(shape, dtype).values():
        for grad in views(shape, dtype).values():
            reference = ops.module_scores_reference
            assert_as_good_as_torch(ops.module_scores(output, grad, backend="cuda"), reference, output, grad)
        if width > 1:  # else there is no head to gate
            check(ops.gate_heads, ops.gate_heads_reference, output, torch.rand(2, 8))
        check(ops.masked_activation, ops.masked_activation_reference, output.flatten(2), torch.rand(2, 8 * width))


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8), (2, 5, 3, 0)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(ops.module_scores(x, x, backend="cuda"), torch.zeros(shape[0], shape[2]))
    gate = torch.ones(shape[2])
    check(ops.gate_heads, ops.gate_heads_reference, x, gate)
    check(ops.masked_activation, ops.masked_activation_reference, x.flatten(2), torch.ones(shape[2] * shape[3]))


def test_gates_that_samples_share() -> None:
    x, bias = torch.randn(3, 33, 40), torch.randn(40)
    gate = torch.tensor([0.0, 0.5, 1.0, 1.5]).repeat(10)
    check(partial(ops.masked_activation, bias=bias), partial(_with_bias, bias), x, gate)
    check(ops.gate_heads, ops.gate_heads_reference, x.view(3, 33, 5, 8), torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0]))


@pytest.mark.parametrize("first", [0, 1])
def test_vectors_of_any_alignment(first: int) -> None:
    x, bias, gate = torch.randn(2, 9, 16), torch.randn(17)[first:][:16], torch.rand(2, 17)[:, first:][:, :16]
    check(partial(ops.masked_activation, bias=bias), partial(_with_bias, bias), x, gate)


def _with_bias(bias: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    return ops.masked_activation_reference(x, gate, bias=bias.to(x.dtype))


@pytest.mark.parametrize("mode", ["swap", "rearrange"])
@pytest.mark.parametrize(
    ("layers", "modules", "samples"), [(1, 5, (9, 7)), (2, 61, (9, 7)), (1, 33, (64, 32)), (1, 40, (40, 0))]
)
def test_greedy_swap(layers: int, modules: int, samples: tuple[int, int], mode: str) -> None:
    forget, retain = (torch.randint(-3, 4, (count, layers, modules)).float() for count in samples)
    arguments = forget, retain if samples[1] else None, torch.rand(layers, modules) < 0.3
    linear = torch.randint(-3, 4, (layers, modules)).float()
    result = ops.greedy_swap(*arguments, linear=linear, mode=mode, max_swaps=20, backend="cuda")
    expected = ops.greedy_swap_reference(*arguments, linear=linear, mode=mode, max_swaps=20)
    for name in expected._fields:
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
    assert expected.swaps.sum() > 0


def test_greedy_swap_of_more_modules_than_a_scan_takes() -> None:
    forget, retain = (torch.randint(-3, 4, (count, 1, 1700)).float() for count in (9, 7))
    mask = torch.rand(1, 1700) < 0.8
    result = ops.greedy_swap(forget, retain, mask, max_swaps=3, backend="cuda")
    expected = ops.greedy_swap_reference(forget, retain, mask, max_swaps=3)
    for name in expected._fields:
        assert torch.equal(getattr(result, name), getattr(expected, name)), name
