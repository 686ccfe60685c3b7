"""gate_heads and masked_attention: every backend against the fp64 reference, gradients at any gate, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import FLOATS, assert_as_good_as_torch, threads
from cuda_tools import compile_cu, requires_nvcc
from torch import Tensor
from triton_launches import attention
from triton_tools import LARGEST_SHARED, compiled_launches, interpreted, requires_triton

from pymape.ops import gate_heads, gate_heads_reference, masked_attention, masked_attention_reference

GATED_SHAPES = [(1, 1, 1, 1), (2, 63, 3, 64), (3, 129, 12, 33), (1, 5, 130, 16), (2, 1, 2, 257), (2, 200, 4, 48)]

# batch, heads, key/value heads, queries, keys, head size, causal, mask
ATTENTION_CASES = [
    (2, 2, 2, 5, 7, 32, False, None),
    (1, 4, 2, 65, 63, 40, True, "bool"),
    (1, 4, 1, 33, 130, 64, False, "additive"),
    (1, 2, 2, 129, 129, 16, True, "additive"),
    (1, 2, 1, 17, 40, 256, False, "padding"),
    (3, 2, 2, 1, 9, 8, False, "padding"),
    (1, 3, 3, 63, 63, 80, True, None),
]


def make_gate(*shape: int) -> Tensor:
    """Return gates of 0, 1/2 and 1 in turn, then random ones."""
    gate = torch.rand(shape)
    special = torch.tensor([0.0, 0.5, 1.0])[: gate.numel()]
    gate.view(-1)[: len(special)] = special
    return gate


def make_mask(kind: str | None, batch: int, heads: int, tokens: int, keys: int, dtype: torch.dtype) -> Tensor | None:
    if kind is None:
        return None
    if kind == "padding":
        lengths = torch.randint(1, keys + 1, (batch,))
        return (torch.arange(keys) < lengths[:, None])[:, None, None]  # [B, 1, 1, S]
    visible = torch.rand(batch, heads, tokens, keys) > 0.3
    visible[0, :, 0] = False  # a query without a key
    if kind == "bool":
        return visible
    mask = torch.randn(visible.shape).to(dtype).masked_fill(~visible, -torch.inf)
    mask[0, 0, 1] = torch.finfo(dtype).min  # a query to which all keys are equal
    return mask


def with_gradients(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Turn function(*inputs) into one of (*inputs, grad) that returns its output and the gradients of the inputs."""

    def run(*inputs_and_grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, grad = inputs_and_grad
        inputs = [x.detach().requires_grad_() for x in inputs]
        output = function(*inputs)
        return output.detach(), *torch.autograd.grad(output, inputs, grad.to(output.dtype))

    return run


def assert_all_as_good_as_torch(
    function: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor, slack: float = 2.0
) -> None:
    """Compare function(*inputs[:-1]) and its gradients, where the last of `inputs` is the gradient of the output."""
    expected = with_gradients(reference)
    for i, actual in enumerate(with_gradients(function)(*inputs)):
        assert_as_good_as_torch(actual, lambda *xs, i=i: expected(*xs)[i], *inputs, slack=slack)


def check_attention(
    backend: str, case: tuple[Any, ...], dtype: torch.dtype, per_sample: bool, slack: float = 2.0
) -> None:
    batch, heads, kv_heads, tokens, keys, size, is_causal, kind = case
    query = torch.randn(batch, tokens, heads, size).transpose(1, 2)
    key, value = torch.randn(2, batch, keys, kv_heads, size).transpose(2, 3)
    grad = torch.randn(batch, tokens, heads, size).transpose(1, 2)
    tensors = [x.to(dtype) for x in (query, key, value)]
    gate = make_gate(batch, heads) if per_sample else make_gate(heads)
    options: dict[str, Any] = {"attn_mask": make_mask(kind, batch, heads, tokens, keys, dtype), "is_causal": is_causal}
    assert_all_as_good_as_torch(
        lambda *xs: masked_attention(*xs, **options, backend=backend),
        lambda *xs: masked_attention_reference(*xs, **options),
        *tensors,
        gate,
        grad.to(dtype),
        slack=slack,
    )


class TestGateHeads:
    @pytest.mark.usefixtures("poisoned_memory")
    @pytest.mark.parametrize("dtype", FLOATS)
    @pytest.mark.parametrize("shape", GATED_SHAPES)
    @pytest.mark.parametrize("per_sample", [False, True])
    def test_matches_the_reference(self, shape: tuple[int, ...], dtype: torch.dtype, per_sample: bool) -> None:
        output, grad = torch.randn(2, *shape).to(dtype)
        gate = make_gate(shape[0], shape[2]) if per_sample else make_gate(shape[2])
        assert_all_as_good_as_torch(gate_heads, gate_heads_reference, output, gate, grad)

    @pytest.mark.parametrize("gate_dtype", FLOATS)
    def test_gate_dtypes(self, gate_dtype: torch.dtype) -> None:
        output, grad = torch.randn(2, 2, 5, 3, 16)
        gate = make_gate(2, 3).to(gate_dtype).requires_grad_()
        result = gate_heads(output, gate)
        result.backward(grad)
        assert result.dtype == output.dtype
        assert gate.grad is not None
        assert gate.grad.dtype == gate_dtype

    def test_integers_are_exact(self) -> None:
        output, grad = torch.randint(-8, 9, (2, 3, 129, 12, 64)).float()
        inputs = output, torch.randint(0, 3, (3, 12)).float(), grad
        expected = with_gradients(gate_heads_reference)(*inputs)
        for ours, theirs in zip(with_gradients(gate_heads)(*inputs), expected, strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("order", [(0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2)])
    def test_strides(self, order: tuple[int, ...]) -> None:
        shape = (3, 70, 4, 48)
        inverse = [order.index(i) for i in range(4)]
        output = torch.randn(*[shape[i] for i in order]).permute(inverse)
        expanded = torch.randn(3, 1, 4, 1).expand(shape)
        for grad in (torch.randn(shape), expanded, torch.randn(3, 70, 4, 96)[..., ::2]):
            assert_all_as_good_as_torch(gate_heads, gate_heads_reference, output, make_gate(3, 4), grad)

    @pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 0, 3, 8), (2, 4, 0, 8)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        output, gate = torch.empty(shape, requires_grad=True), torch.ones(shape[2], requires_grad=True)
        gate_heads(output, gate).sum().backward()
        assert output.grad is not None
        assert output.grad.shape == shape
        assert gate.grad is not None
        assert torch.equal(gate.grad, torch.zeros(shape[2]))

    @pytest.mark.parametrize("wanted", [(True, False), (False, True)])
    def test_computes_only_what_needs_a_gradient(self, wanted: tuple[bool, bool]) -> None:
        output = torch.randn(2, 5, 3, 16, requires_grad=wanted[0])
        gate = make_gate(2, 3).requires_grad_(wanted[1])
        result = gate_heads(output, gate)
        kept = [x for x in result.grad_fn.saved_tensors if x is not None]
        assert len(kept) == (2 if wanted[1] else 1)
        ours = torch.autograd.grad(result.square().sum(), [x for x in (output, gate) if x.requires_grad])
        result = gate_heads_reference(output, gate)
        theirs = torch.autograd.grad(result.square().sum(), [x for x in (output, gate) if x.requires_grad])
        torch.testing.assert_close(ours, theirs)

    def test_does_not_depend_on_the_number_of_threads(self) -> None:
        inputs = torch.randn(3, 300, 7, 33), make_gate(3, 7), torch.randn(3, 300, 7, 33)
        with threads(3):
            three = with_gradients(gate_heads)(*inputs)
        one = with_gradients(gate_heads)(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))

    @pytest.mark.parametrize("shape", [(3,), (2, 3)])
    def test_gradcheck(self, shape: tuple[int, ...]) -> None:
        output = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(gate_heads, (output, make_gate(*shape).double().requires_grad_()))

    @pytest.mark.parametrize("shape", [(3,), (2, 3)])
    @pytest.mark.parametrize("requires_grad", [(False, False), (True, False), (False, True), (True, True)])
    def test_opcheck(self, shape: tuple[int, ...], requires_grad: tuple[bool, bool]) -> None:
        output = torch.randn(2, 3, 5, 4).transpose(1, 2).requires_grad_(requires_grad[0])
        gate = torch.rand(shape, requires_grad=requires_grad[1])
        torch.library.opcheck(torch.ops.pymape.gate_heads, (output, gate, "cpu"))
        backward = (torch.randn(2, 5, 3, 4), output.detach(), gate.detach(), "cpu")
        torch.library.opcheck(torch.ops.pymape.gate_heads_backward, backward)

    def test_ones_are_bit_exact_in_the_reference(self) -> None:
        output = torch.randn(2, 5, 3, 16, dtype=torch.bfloat16)
        assert torch.equal(gate_heads(output, torch.ones(3), backend="reference"), output)

    @pytest.mark.parametrize(
        ("output", "gate", "message"),
        [
            (torch.zeros(2, 3, 4), torch.zeros(4), r"output must have shape \(B, T, H, D\), got \(2, 3, 4\)"),
            (torch.zeros(2, 3, 4, 5).int(), torch.zeros(4), "output must be fp64, fp32, bf16 or fp16, got torch.int32"),
            (torch.zeros(2, 3, 4, 5), torch.zeros(3), r"gate must have shape \(4,\) or \(2, 4\), got \(3,\)"),
            (torch.zeros(2, 3, 4, 5), torch.zeros(1, 4), r"gate must have shape \(4,\) or \(2, 4\), got \(1, 4\)"),
            (torch.zeros(2, 3, 4, 5), torch.ones(4).bool(), "gate must be floating point, got torch.bool"),
        ],
    )
    def test_bad_input(self, output: Tensor, gate: Tensor, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            gate_heads(output, gate)


class TestCpu:
    @pytest.mark.parametrize("dtype", FLOATS[1:])
    @pytest.mark.parametrize("case", ATTENTION_CASES)
    def test_matches_the_reference(self, case: tuple[Any, ...], dtype: torch.dtype) -> None:
        # The attention is torch's, whose rounding differs from that of the reference's plain matrix products.
        check_attention("cpu", case, dtype, per_sample=True, slack=4.0)

    def test_equals_the_reference_in_fp64(self) -> None:
        query, key, value, grad = torch.randn(4, 2, 4, 65, 16, dtype=torch.float64)
        visible = make_mask("bool", 2, 4, 65, 65, torch.float64)
        inputs = query, key[:, :2], value[:, :2], make_gate(2, 4).double(), grad
        ours = with_gradients(lambda *xs: masked_attention(*xs, attn_mask=visible, is_causal=True))(*inputs)
        theirs = with_gradients(lambda *xs: masked_attention_reference(*xs, attn_mask=visible, is_causal=True))(*inputs)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_mask_of_a_wider_range_hides_no_more_keys(self, dtype: torch.dtype) -> None:
        query, key, value = torch.randn(3, 2, 3, 5, 16).to(dtype)
        visible = torch.zeros(2, 1, 1, 5)
        visible[0, ..., 3:] = torch.finfo(torch.float32).min
        visible[1] = torch.finfo(torch.float32).min  # alike for all keys, which -inf would hide
        if dtype == torch.float16:
            query[1] = 0  # the lowest fp16 does not swallow the scores, as that of fp32 does
        ours = masked_attention(query, key, value, attn_mask=visible)
        theirs = masked_attention_reference(query.double(), key.double(), value.double(), attn_mask=visible)
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=2e-2)
        hidden = visible.masked_fill(visible != 0, -torch.inf)
        assert torch.equal(masked_attention(query, key, value, attn_mask=hidden)[1], torch.zeros_like(query[1]))

    def test_without_a_gate(self) -> None:
        query, key, value, grad = torch.randn(4, 2, 3, 5, 16)
        assert_all_as_good_as_torch(masked_attention, masked_attention_reference, query, key, value, grad)

    def test_scale(self) -> None:
        query, key, value = torch.randn(3, 2, 3, 5, 16)
        scaled = masked_attention(query, key, value, scale=0.5)
        torch.testing.assert_close(scaled, masked_attention(query * 2, key, value))

    @pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        query, gate = torch.empty(shape, requires_grad=True), torch.ones(2, requires_grad=True)
        masked_attention(query, torch.randn(shape[0], 2, 3, 8), torch.randn(shape[0], 2, 3, 8), gate).sum().backward()
        assert gate.grad is not None
        assert torch.equal(gate.grad, torch.zeros(2))

    def test_autocast(self) -> None:
        query, key, value = torch.randn(3, 2, 3, 5, 16)
        gate = make_gate(2, 3).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = masked_attention(query, key, value, gate)
        assert output.dtype == torch.bfloat16
        output.sum().backward()
        assert gate.grad is not None
        assert gate.grad.dtype == torch.float32

    def test_compiles_without_a_graph_break(self) -> None:
        query, key, value = torch.randn(3, 2, 3, 5, 16)
        inputs = query, key, value, make_gate(2, 3), torch.randn(2, 3, 5, 16)
        compiled = torch.compile(masked_attention, fullgraph=True, backend="aot_eager")
        for ours, theirs in zip(
            with_gradients(compiled)(*inputs), with_gradients(masked_attention)(*inputs), strict=True
        ):
            torch.testing.assert_close(ours, theirs)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"query": torch.zeros(2, 4, 8)}, r"query must have shape \(B, H, T, D\), got \(2, 4, 8\)"),
            ({"key": torch.zeros(2, 2, 6, 9)}, r"key must have shape \(2, Hkv, S, 8\), got \(2, 2, 6, 9\)"),
            ({"key": torch.zeros(2, 3, 6, 8)}, "key must have a number of heads that divides 4, got 3"),
            (
                {"value": torch.zeros(2, 2, 5, 8)},
                r"value must have the shape of key \(2, 2, 6, 8\), got \(2, 2, 5, 8\)",
            ),
            (
                {"value": torch.zeros(2, 2, 6, 8).half()},
                "value must have the dtype of query torch.float32, got torch.float16",
            ),
            ({"gate": torch.zeros(2)}, r"gate must have shape \(4,\) or \(2, 4\), got \(2,\)"),
            (
                {"attn_mask": torch.ones(5, 5).bool()},
                r"attn_mask must be broadcastable to \(2, 4, 5, 6\), got \(5, 5\)",
            ),
            ({"attn_mask": torch.ones(6).long()}, "attn_mask must be bool or floating point, got torch.int64"),
        ],
    )
    def test_bad_input(self, changes: dict[str, Tensor], message: str) -> None:
        arguments = {"query": torch.zeros(2, 4, 5, 8), "key": torch.zeros(2, 2, 6, 8), "value": torch.zeros(2, 2, 6, 8)}
        with pytest.raises(ValueError, match=message):
            masked_attention(**(arguments | changes))

    @pytest.mark.parametrize("backend", ["cuda", "triton"])
    def test_a_backend_that_cannot_run_says_why(self, backend: str) -> None:
        x = torch.zeros(1, 2, 3, 8)
        with pytest.raises(RuntimeError, match=f"backend '{backend}' of masked_attention cannot run: "):
            masked_attention(x, x, x, backend=backend)


class TestTriton:
    @interpreted
    @pytest.mark.parametrize(("dtype", "per_sample"), [(torch.float32, True), (torch.float16, False)])
    @pytest.mark.parametrize("case", ATTENTION_CASES)
    def test_matches_the_reference(self, case: tuple[Any, ...], dtype: torch.dtype, per_sample: bool) -> None:
        check_attention("triton", case, dtype, per_sample)

    @interpreted
    @pytest.mark.parametrize("case", [(2, 4, 2, 33, 17, 16, True, "bool"), (1, 2, 1, 5, 40, 8, False, "additive")])
    def test_frozen_gates(self, case: tuple[Any, ...]) -> None:
        batch, heads, kv_heads, tokens, keys, size, is_causal, kind = case
        query, grad = torch.randn(2, batch, heads, tokens, size)
        key, value = torch.randn(2, batch, kv_heads, keys, size)
        options = {"attn_mask": make_mask(kind, batch, heads, tokens, keys, query.dtype), "is_causal": is_causal}
        for gate in (None, make_gate(heads), make_gate(batch, heads), torch.zeros(heads)):
            assert_all_as_good_as_torch(
                lambda *xs, gate=gate: masked_attention(*xs, gate, **options, backend="triton"),
                lambda *xs, gate=gate: masked_attention_reference(*xs, gate, **options),
                *(query, key, value, grad),
            )

    @interpreted
    def test_an_absent_gradient_stays_absent(self) -> None:
        class Constant(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> None:
                return None

        query, key, value = (x.requires_grad_() for x in torch.randn(3, 1, 2, 5, 16))
        Constant.apply(masked_attention(query, key, value, make_gate(2), backend="triton")).sum().backward()
        assert query.grad is key.grad is value.grad is None

    @interpreted
    def test_skips_a_closed_head_whose_gate_is_frozen(self) -> None:
        query, key, value = (x.requires_grad_() for x in torch.randn(3, 2, 3, 5, 16))
        gate = torch.tensor([1.0, 0.0, 1.0])
        with torch.no_grad():
            value[:, 1] = torch.nan
        output = masked_attention(query, key, value, gate, backend="triton")
        assert torch.equal(output[:, 1], torch.zeros(2, 5, 16))
        for grad in torch.autograd.grad(output.sum(), (query, key, value)):
            assert torch.isfinite(grad).all()
            assert torch.equal(grad[:, 1], torch.zeros(2, 5, 16))
        learning = masked_attention(query, key, value, gate.requires_grad_(), backend="triton")
        assert torch.isnan(learning[:, 1]).all()

    @interpreted
    def test_only_the_gate_needs_a_gradient(self) -> None:
        query, key, value = torch.randn(3, 2, 3, 5, 16)
        gate = make_gate(3).requires_grad_()
        (ours,) = torch.autograd.grad(masked_attention(query, key, value, gate, backend="triton").square().sum(), gate)
        (theirs,) = torch.autograd.grad(masked_attention_reference(query, key, value, gate).square().sum(), gate)
        torch.testing.assert_close(ours, theirs)

    @interpreted
    @pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
    def test_empty(self, shape: tuple[int, ...]) -> None:
        query, gate = torch.empty(shape, requires_grad=True), torch.ones(2, requires_grad=True)
        key, value = torch.randn(2, shape[0], 2, 3, 8).requires_grad_()
        gradients = torch.autograd.grad(masked_attention(query, key, value, gate, backend="triton").sum(), (key, gate))
        assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)

    @interpreted
    def test_no_keys(self) -> None:
        query, gate = torch.randn(2, 2, 5, 8, requires_grad=True), torch.ones(2, requires_grad=True)
        key = torch.empty(2, 2, 0, 8)
        output = masked_attention(query, key, key, gate, backend="triton")
        assert all(
            torch.equal(x, torch.zeros_like(x)) for x in (output, *torch.autograd.grad(output.sum(), (query, gate)))
        )

    @interpreted
    def test_strides(self) -> None:
        grad = torch.randn(2, 1, 5, 1).expand(2, 3, 5, 16)
        query, key, value = torch.randn(3, 16, 5, 3, 2).permute(0, 4, 3, 2, 1)
        mask = (torch.rand(5, 5) > 0.3).T
        assert_all_as_good_as_torch(
            lambda *xs: masked_attention(*xs, attn_mask=mask, backend="triton"),
            lambda *xs: masked_attention_reference(*xs, attn_mask=mask),
            *(query, key, value, make_gate(6).view(3, 2).T, grad),
        )

    @interpreted
    def test_same_result_every_time(self) -> None:
        query, key, value, grad = torch.randn(4, 2, 4, 65, 32)
        run = with_gradients(lambda *xs: masked_attention(*xs, backend="triton"))
        first, second = (run(query, key[:, :2], value[:, :2], make_gate(4) * 0 + 0.3, grad) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @interpreted
    def test_heads_that_the_cache_does_not_hold_together(self) -> None:
        import triton.language as tl

        from pymape.kernels import masked_attention as kernels

        query, key, value, grad = torch.randn(4, 3, 3, 150, 16)
        run = with_gradients(lambda *xs: masked_attention(*xs, is_causal=True, backend="triton"))
        together = run(query, key, value, make_gate(3), grad)
        for heads in (1, 2, 4):
            with mock.patch.object(kernels, "_CACHED", tl.constexpr(150 * 16 * heads)):
                apart = run(query, key, value, make_gate(3), grad)
            assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))

    @interpreted
    @pytest.mark.parametrize("rows", [1, 5])
    def test_gradients_are_laid_out_as_inputs(self, rows: int) -> None:
        fused = torch.randn(2, 5, 3, 4, 16).permute(2, 0, 3, 1, 4)  # [3, B, H, T, D], as one projection gives them
        query, key, value = (x.detach().requires_grad_() for x in fused)
        visible = torch.ones(rows, 5, dtype=torch.bool)
        output = masked_attention(query, key, value, torch.ones(4), attn_mask=visible, backend="triton")
        for gradient in torch.autograd.grad(output.sum(), (query, key, value)):
            assert gradient.transpose(1, 2).is_contiguous()

    @interpreted
    @pytest.mark.parametrize(("gate_grad", "transposed"), [(False, False), (True, False), (True, True)])
    def test_opcheck(self, gate_grad: bool, transposed: bool) -> None:
        shape = (3, 2, 5, 4, 16) if transposed else (3, 2, 4, 5, 16)
        query, key, value = (
            (x.transpose(1, 2) if transposed else x).detach().requires_grad_() for x in torch.randn(shape)
        )
        gate = torch.rand(4, requires_grad=gate_grad)
        mask = torch.ones(2, 1, 1, 5, dtype=torch.bool).expand(2, 4, 5, 5)
        torch.use_deterministic_algorithms(False)  # opcheck compares two runs, NaN and all
        torch.library.opcheck(torch.ops.pymape.masked_attention, (query, key, value, gate, mask, True, 0.25, gate_grad))

    @interpreted
    def test_compiles_without_a_graph_break(self) -> None:
        def attention(*xs: Tensor) -> Tensor:
            return torch.ops.pymape.masked_attention(*xs, None, True, 0.25, True)[0]

        inputs = *torch.randn(3, 2, 3, 5, 16), make_gate(2, 3), torch.randn(2, 3, 5, 16)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(with_gradients(compiled)(*inputs), with_gradients(attention)(*inputs))

    @interpreted
    def test_what_it_cannot_run_says_why(self) -> None:
        x = torch.zeros(1, 2, 3, 8)
        with pytest.raises(RuntimeError, match="'triton' of masked_attention cannot run: it takes fp32, bf16 and fp16"):
            masked_attention(*[x.double()] * 3, backend="triton")
        with pytest.raises(RuntimeError, match="it takes head sizes up to 256, got 257"):
            masked_attention(*[torch.zeros(1, 2, 3, 257)] * 3, backend="triton")
        with pytest.raises(RuntimeError, match="it has no gradient for attn_mask"):
            masked_attention(x, x, x, attn_mask=torch.zeros(3, 3, requires_grad=True), backend="triton")

    @requires_triton
    @pytest.mark.parametrize("sm", [80, 90])
    @pytest.mark.parametrize(("size", "mask"), [(32, "padding"), (64, "additive"), (128, "additive"), (256, "none")])
    def test_compiled_kernels_spill_nothing(self, size: int, mask: str, sm: int) -> None:
        with compiled_launches(sm) as kernels:
            attention(torch.bfloat16, size, mask)
        assert len(kernels) == 4
        for kernel in kernels:
            assert kernel.stack == 0, kernel
            assert kernel.shared <= LARGEST_SHARED[sm], kernel


@requires_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_cuda_kernels_spill_nothing(arch: int) -> None:
    usage = compile_cu("csrc/masked_attention.cu", arch)
    assert len(usage) == 18  # forward and backward, four dtypes, with and without 16-byte loads; two folds
    for kernel, needs in usage.items():
        assert needs["stack"] == needs["spill_stores"] == needs["spill_loads"] == 0, kernel
        assert needs["registers"] <= 128, kernel
