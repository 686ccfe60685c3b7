"""Every operator with a GPU backend against its fp64 reference on the device, gradients included; a pytest module.

`python -m benchmarks.gpu operators` runs it, and compute-sanitizer runs its `tiny` half. Without a GPU the same cases
run on the CPU backend, so that the cases themselves are known to be right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from conftest import assert_as_good_as_torch
from torch import Tensor

from pymape import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GATES = (0.0, 0.5, 1.0)


class Case(NamedTuple):
    """An operator as a function of its tensors, with its reference and the shapes of the tensors."""

    name: str
    op: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    backends: tuple[str, ...]
    gate: int | None = None  # which tensor holds gates
    library: tuple[str, ...] = ()  # backends in which torch's own kernel does the sums, in an order of its own

    def slack(self, backend: str) -> float:
        """How many times the error of the reference in plain torch is allowed."""
        return 4.0 if backend in self.library else 2.0

    def draw(self, dtype: torch.dtype) -> list[Tensor]:
        tensors = [torch.randn(shape, device=DEVICE).to(dtype) for shape in self.shapes]
        if self.gate is not None:
            shape = self.shapes[self.gate]
            values = torch.tensor(GATES, device=DEVICE)[torch.randint(len(GATES), shape, device=DEVICE)]
            tensors[self.gate] = values.to(dtype)
        return tensors


def cases() -> Iterator[Case]:
    for size, batch, tokens, width in (
        ("tiny", 1, 5, 17),
        ("tiny", 2, 33, 64),
        ("odd", 3, 129, 130),
        ("wide", 2, 128, 768),
    ):
        shape = (batch, tokens, width)
        yield Case(f"{size} filters", ops.module_scores, ops.module_scores_reference, (shape, shape), ("cuda",))
        heads = (batch, tokens, 3, width)
        yield Case(f"{size} heads", ops.module_scores, ops.module_scores_reference, (heads, heads), ("cuda",))
        yield Case(f"{size} gate", ops.gate_heads, ops.gate_heads_reference, (heads, (batch, 3)), ("cuda",), gate=1)
        for activation, gated in (("gelu", False), ("gelu_tanh", False), ("relu", False), ("silu", True)):
            yield _activation(f"{size} {activation}", shape, activation, gated)
            yield _ffn(f"{size} {activation}", shape, activation, gated)
        for axis in ("rows", "columns"):
            index = torch.randperm(width, generator=torch.Generator().manual_seed(0))[: width // 2 + 1]
            yield Case(
                f"{size} {axis}",
                lambda x, dy, backend, axis=axis, index=index: ops.selected_weight_grad(
                    x, dy, index.to(x.device), axis, backend=backend
                ),
                lambda x, dy, axis=axis, index=index: ops.selected_weight_grad_reference(
                    x, dy, index.to(x.device), axis
                ),
                ((batch * tokens, width), (batch * tokens, width)),
                ("cuda", "triton"),
            )
    for size, tokens, keys, head_size in (
        ("tiny", 5, 7, 32),
        ("tiny", 65, 63, 64),
        ("odd", 129, 129, 80),
        ("long", 257, 257, 128),
        ("largest", 65, 65, 256),
    ):
        for causal in (False, True):
            query, key = (2, 4, tokens, head_size), (2, 2, keys, head_size)
            yield Case(
                f"{size} attention {head_size}{' causal' * causal}",
                partial(ops.masked_attention, is_causal=causal),
                partial(ops.masked_attention_reference, is_causal=causal),
                (query, key, key, (2, 4)),
                ("cuda", "triton"),
                gate=3,
                library=("cuda", "cpu"),
            )
    for size, rows, inputs, outputs, rank in (
        ("tiny", 7, 33, 130, 8),
        ("odd", 129, 129, 65, 16),
        ("wide", 256, 768, 768, 64),
    ):
        fixed = {"offsets": [0, 3, 3, rows], "adapters": [1, 0, 0], "scale": [2.0, -0.3]}
        yield Case(
            f"{size} lora",
            partial(ops.segmented_lora, **fixed),
            partial(ops.segmented_lora_reference, **fixed),
            ((rows, inputs), (rows, outputs), (2, rank, inputs), (2, outputs, rank)),
            ("triton",),
        )


def _activation(name: str, shape: tuple[int, ...], activation: str, gated: bool) -> Case:
    def call(op: Callable[..., Tensor], pre: Tensor, gate: Tensor, bias: Tensor, *up: Tensor, **backend: str) -> Tensor:
        return op(pre, gate, bias=bias, up=up[0] if up else None, activation=activation, **backend)

    shapes = (shape, (shape[0], shape[2]), (shape[2],), *([shape] if gated else []))
    pair = partial(call, ops.masked_activation), partial(call, ops.masked_activation_reference)
    return Case(f"{name} activation", *pair, shapes, ("cuda", "triton"), gate=1)


def _ffn(name: str, shape: tuple[int, ...], activation: str, gated: bool) -> Case:
    def call(op: Callable[..., Tensor], x: Tensor, weight: Tensor, gate: Tensor, *up: Tensor, **backend: str) -> Tensor:
        weight, up = weight / width**0.5, tuple(w / width**0.5 for w in up)
        return op(x, weight, None, gate, up_weight=up[0] if up else None, activation=activation, **backend)

    batch, _, width = shape
    weight = (2 * width + 1, width)
    shapes = (shape, weight, (batch, weight[0]), *([weight] if gated else []))
    pair = partial(call, ops.masked_ffn), partial(call, ops.masked_ffn_reference)
    return Case(f"{name} ffn", *pair, shapes, ("cuda", "triton"), gate=2)


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    result = function(*leaves)
    # Quarters are exact in every dtype, so that all precisions see the same gradient come in.
    incoming = (torch.arange(result.numel(), device=result.device) % 7 - 3) / 4
    return torch.autograd.grad(result, leaves, incoming.to(result.dtype).view(result.shape))


PARAMETERS = [
    pytest.param(case, backend if DEVICE == "cuda" else "cpu", id=f"{case.name} {backend}".replace(" ", "-"))
    for case in cases()
    for backend in case.backends
]


@pytest.fixture(autouse=True)
def _seeded_and_poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every `torch.empty` with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, backend", PARAMETERS)
def test_result(case: Case, backend: str, dtype: torch.dtype) -> None:
    inputs = case.draw(dtype)
    assert_as_good_as_torch(case.op(*inputs, backend=backend), case.reference, *inputs, slack=case.slack(backend))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case, backend", [p for p in PARAMETERS if p.id.split("-")[1] != "lora"])  # forward only
def test_gradients(case: Case, backend: str, dtype: torch.dtype) -> None:
    inputs = case.draw(dtype)
    for i, gradient in enumerate(gradients(partial(case.op, backend=backend), *inputs)):
        reference = lambda *xs, i=i: gradients(case.reference, *xs)[i]  # noqa: E731
        assert_as_good_as_torch(gradient, reference, *inputs, slack=case.slack(backend))


@pytest.mark.parametrize("mode", ["swap", "rearrange"])
@pytest.mark.parametrize("layers, modules", [(1, 5), (3, 129), (2, 1536)], ids=["tiny", "odd", "wide"])
def test_greedy_swap(layers: int, modules: int, mode: str) -> None:
    forget, retain = (torch.randint(-3, 4, (count, layers, modules), device=DEVICE).float() for count in (9, 7))
    mask = torch.rand(layers, modules, device=DEVICE) < 0.3
    result = ops.greedy_swap(forget, retain, mask, mode=mode, max_swaps=50)
    expected = ops.greedy_swap_reference(forget, retain, mask, mode=mode, max_swaps=50)
    for name in expected._fields:
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=0)
