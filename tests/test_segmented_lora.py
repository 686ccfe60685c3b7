"""segmented_lora: every backend against the fp64 reference and PEFT, bit by bit alone or in a batch; bad input."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import pytest
import torch
from conftest import FLOATS, assert_as_good_as_torch, threads
from torch import Tensor
from triton_launches import lora
from triton_tools import LARGEST_SHARED, compiled_launches, interpreted, requires_triton

from pymape.ops import segmented_lora, segmented_lora_reference

SCALE = (2.0, 16 / 8**0.5, -0.3)  # of three adapters
# rows of every segment, their adapters, in, out, rank
CASES = [
    ((1,), (0,), 1, 1, 1),
    ((63, 129, 1), (2, 0, 1), 33, 130, 8),
    ((0, 7, 0, 5, 0), (0, 1, 2, 1, -1), 129, 17, 16),
    ((3, 40), (-1, 1), 64, 63, 64),
    ((2, 3), (-1, -1), 5, 7, 4),
]


def draw(
    sizes: Sequence[int], inputs: int, outputs: int, rank: int, dtype: torch.dtype = torch.float32, adapters: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
    """x, base, lora_a, lora_b and the offsets of segments of these sizes."""
    rows = sum(sizes)
    shapes = ((rows, inputs), (rows, outputs), (adapters, rank, inputs), (adapters, outputs, rank))
    x, base, lora_a, lora_b = (torch.randn(shape).to(dtype) for shape in shapes)
    return x, base, lora_a, lora_b, [0, *accumulate(sizes)]


def check(backend: str, tensors: Sequence[Tensor], offsets: list[int], adapters: Sequence[int]) -> None:
    actual = segmented_lora(*tensors, offsets, adapters, SCALE, backend=backend)
    assert actual.dtype == tensors[0].dtype
    assert actual.is_contiguous()
    assert_as_good_as_torch(actual, lambda *t: segmented_lora_reference(*t, offsets, adapters, SCALE), *tensors)
    for (start, end), adapter in zip(pairwise(offsets), adapters, strict=True):
        if adapter < 0:
            assert torch.equal(actual[start:end], tensors[1][start:end])


def check_independence(backend: str, dtype: torch.dtype, inputs: int, outputs: int, rank: int) -> None:
    """The bits of a segment alone, and beside others: before and behind them, of other sizes and contents, and NaN."""
    x, base, lora_a, lora_b, _ = draw((40,), inputs, outputs, rank, dtype)
    for size in (1, 2, 33, 40):
        own = (x[:size], base[:size])
        alone = segmented_lora(*own, lora_a, lora_b, [0, size], [1], SCALE, backend=backend)
        for before, behind, others in (
            (0, 1, (1, 1, 1)),
            (1, 0, (0, 2, 2)),
            (3, 70, (-1, 0, -1)),
            (33, 5, (1, 0, 2)),
            (64, 0, (2, -1, 0)),
        ):
            poison = torch.full((behind, inputs), torch.nan, dtype=dtype)
            batch = torch.cat((torch.randn(before, inputs).to(dtype), own[0], poison))
            gave = torch.cat((torch.randn(before, outputs).to(dtype), own[1], torch.randn(behind, outputs).to(dtype)))
            offsets = [0, before, before, before + size, len(batch)]
            adapters = (*others[:2], 1, others[2])
            result = segmented_lora(batch, gave, lora_a, lora_b, offsets, adapters, SCALE, backend=backend)
            assert torch.equal(result[before : before + size], alone)
        # neither the adapter's place in the stack nor the others' number matters
        adapter = (lora_a[1:2].clone(), lora_b[1:2].clone())
        single = segmented_lora(*own, *adapter, [0, size], [0], SCALE[1:2], backend=backend)
        assert torch.equal(single, alone)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_matches_the_reference(case: tuple, backend: str, dtype: torch.dtype) -> None:
    sizes, adapters, *shape = case
    *tensors, offsets = draw(sizes, *shape, dtype)
    check(backend, tensors, offsets, adapters)


def test_is_what_the_merged_weights_give() -> None:
    x, _, lora_a, lora_b, offsets = draw((5, 4), 12, 9, 3, torch.float64)
    layer = torch.nn.Linear(12, 9, dtype=torch.float64).requires_grad_(False)
    result = segmented_lora(x, layer(x), lora_a, lora_b, offsets, [2, 0], SCALE)
    for adapter, rows in ((2, slice(0, 5)), (0, slice(5, 9))):
        merged = layer.weight + SCALE[adapter] * lora_b[adapter] @ lora_a[adapter]
        torch.testing.assert_close(result[rows], torch.nn.functional.linear(x[rows], merged, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [64, 129])  # rows of 129 begin anywhere in a cache line
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("rslora", [False, True])
def test_has_the_bits_of_peft(rslora: bool, tokens: int, inputs: int, dtype: torch.dtype) -> None:
    peft = pytest.importorskip("peft")
    names, sizes, outputs, rank = ["a", "b", "c"], (2, 1, 5), 70, 7
    layer = torch.nn.Linear(inputs, outputs, dtype=dtype)
    config = peft.LoraConfig(r=rank, lora_alpha=24, lora_dropout=0.1, use_rslora=rslora, init_lora_weights=False)
    lora = peft.tuners.lora.Linear(layer, names[0], config, r=rank, lora_alpha=24)
    for name in names[1:]:
        lora.update_layer(name, rank, lora_alpha=24, config=config)
    lora.eval().to(dtype)
    batch = torch.randn(sum(sizes), tokens, inputs, dtype=dtype)  # [B, T, in], as a model has it
    rows = batch.flatten(0, 1)
    offsets = [0, *accumulate(tokens * size for size in sizes)]
    with torch.no_grad():
        served = [part.clone() for part in batch.split(sizes)]
        expected = []
        for name, part in zip(names, served, strict=True):
            lora.set_adapter(name)
            expected.append(lora(part).flatten(0, 1))
        result = segmented_lora(
            rows,
            torch.cat([layer(part).flatten(0, 1) for part in served]),
            torch.stack([lora.lora_A[name].weight for name in names]),
            torch.stack([lora.lora_B[name].weight for name in names]),
            offsets,
            [0, 1, 2],
            [lora.scaling[name] for name in names],
        )
    for (start, end), part in zip(pairwise(offsets), expected, strict=True):
        assert torch.equal(result[start:end], part)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(129, 130, 7), (33, 17, 8), (64, 64, 16)])
@pytest.mark.parametrize("count", [1, 2])
def test_a_segment_depends_on_itself_only(count: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    with threads(count):
        check_independence("cpu", dtype, *shape)


def test_rows_without_an_adapter_keep_their_bits() -> None:
    x, base, lora_a, lora_b, offsets = draw((2, 2), 3, 2, 1)
    base[:2] = torch.tensor([[-0.0, torch.nan], [torch.inf, 0.0]])
    result = segmented_lora(x, base, lora_a, lora_b, offsets, [-1, 0], SCALE)
    assert torch.equal(result[:2].view(torch.int32), base[:2].view(torch.int32))
    assert result.data_ptr() != base.data_ptr()


def check_empty(backend: str) -> None:
    x, base, lora_a, lora_b, _ = draw((0,), 4, 5, 2)
    for sizes in ((), (0,), (0, 0)):
        result = segmented_lora(x, base, lora_a, lora_b, [0, *sizes], [0] * len(sizes), SCALE, backend=backend)
        assert result.shape == (0, 5)
    x, base, lora_a, lora_b, offsets = draw((3,), 4, 5, 2, adapters=0)
    assert torch.equal(segmented_lora(x, base, lora_a, lora_b, offsets, [-1], [], backend=backend), base)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty(backend: str) -> None:
    check_empty(backend)


def strided() -> tuple[list[Tensor], list[int]]:
    *tensors, offsets = draw((4, 9), 34, 20, 3)
    x, base, lora_a, lora_b = (tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in tensors)
    return [x[:, ::2], base, lora_a[..., ::2], lora_b], offsets


def test_strides() -> None:
    tensors, offsets = strided()
    check("cpu", tensors, offsets, [1, 0])


def test_inputs_stay_as_they_are() -> None:
    *tensors, offsets = draw((4, 9), 34, 20, 3)
    before = [tensor.clone() for tensor in tensors]
    segmented_lora(*tensors, offsets, [1, -1], SCALE)
    for tensor, copy in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)


def test_the_reference_is_differentiable() -> None:
    *tensors, offsets = draw((3, 0, 2, 1), 4, 5, 2, torch.float64)
    tensors = [tensor.requires_grad_() for tensor in tensors]
    adapters = [2, 0, -1, 0]
    assert torch.autograd.gradcheck(
        lambda *t: segmented_lora(*t, offsets, adapters, SCALE, backend="reference"), tensors
    )


@pytest.mark.parametrize("wanted", range(4))
def test_a_wanted_gradient_is_refused(wanted: int) -> None:
    *tensors, offsets = draw((3,), 4, 5, 2)
    tensors[wanted].requires_grad_()
    with pytest.raises(RuntimeError, match=r"backend 'cpu' of segmented_lora has no gradient.*backend='reference'"):
        segmented_lora(*tensors, offsets, [0], SCALE)
    with torch.no_grad():
        assert not segmented_lora(*tensors, offsets, [0], SCALE).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    *tensors, offsets = draw((3, 0, 2), 4, 5, 2, dtype)
    torch.library.opcheck(torch.ops.pymape.segmented_lora, (*tensors, offsets, (1, 0, -1), SCALE, "cpu"))


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(segmented_lora, fullgraph=True, backend="aot_eager")
    for sizes, adapters, scale in (
        ((3, 2), (1, 0), SCALE),
        ((4, 7), (1, 2), SCALE),
        ((5, 1), (-1, 2), (1.0, 2.0, 0.5)),
    ):
        *tensors, offsets = draw(sizes, 4, 5, 2)
        expected = segmented_lora(*tensors, offsets, adapters, scale)
        assert torch.equal(compiled(*tensors, offsets, adapters, scale), expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x must have shape \(N, in\), got \(2, 3, 4\)"),
        ({"base": torch.zeros(3, 4)}, r"base must have shape \(2, out\), got \(3, 4\)"),
        ({"lora_a": torch.zeros(2, 1, 4)}, r"lora_a must have shape \(K, r, 3\), got \(2, 1, 4\)"),
        ({"lora_b": torch.zeros(2, 4, 2)}, r"lora_b must have shape \(2, 4, 1\), got \(2, 4, 2\)"),
        ({"x": torch.zeros(2, 3).int()}, "x must be fp64, fp32, bf16 or fp16, got torch.int32"),
        ({"base": torch.zeros(2, 4).half()}, "base must have the dtype of x torch.float32, got torch.float16"),
        ({"lora_a": torch.zeros(2, 1, 3, device="meta")}, "lora_a must be on the device of x cpu, got meta"),
        ({"offsets": [0, 2]}, "offsets must hold 3 numbers, one more than adapters, got 2"),
        ({"offsets": [0, 1, 3]}, r"offsets must rise from 0 to the 2 rows of x, got \[0, 1, 3\]"),
        ({"offsets": [1, 1, 2]}, r"offsets must rise from 0 to the 2 rows of x, got \[1, 1, 2\]"),
        ({"offsets": [0, 3, 2]}, r"offsets must rise from 0 to the 2 rows of x, got \[0, 3, 2\]"),
        ({"adapters": [0, 2]}, "adapters must be between -1 and 1, got 2"),
        ({"adapters": [-2, 0]}, "adapters must be between -1 and 1, got -2"),
        ({"scale": [1.0]}, "scale must hold 2 numbers, one for every adapter, got 1"),
        ({"scale": [1.0, float("nan")]}, "scale must be finite, got nan"),
        ({"backend": "cuda"}, "backend of segmented_lora must be one of auto, cpu, triton, reference, got 'cuda'"),
    ],
)
def test_bad_input(changed: dict, message: str) -> None:
    tensors = {
        "x": torch.zeros(2, 3),
        "base": torch.zeros(2, 4),
        "lora_a": torch.zeros(2, 1, 3),
        "lora_b": torch.zeros(2, 4, 1),
    }
    good = tensors | {"offsets": [0, 1, 2], "adapters": [0, 1], "scale": [1.0, 2.0]}
    with pytest.raises(ValueError, match=message):
        segmented_lora(**(good | changed))


class TestTriton:
    @interpreted
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("case", CASES)
    def test_matches_the_reference(self, case: tuple, dtype: torch.dtype) -> None:
        sizes, adapters, *shape = case
        *tensors, offsets = draw(sizes, *shape, dtype)
        check("triton", tensors, offsets, adapters)

    @interpreted
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_a_segment_depends_on_itself_only(self, dtype: torch.dtype) -> None:
        check_independence("triton", dtype, 70, 150, 5)

    @interpreted
    def test_programs_that_share_rows_or_take_many_columns(self) -> None:
        from pymape.kernels import segmented_lora as kernels

        *tensors, offsets = draw((17, 2), 10, 300, 4)
        results = []
        with pytest.MonkeyPatch.context() as patch:
            for wanted in (264, 12, 1):  # a share of one, of several and of all blocks of columns
                patch.setattr(kernels, "_WANTED_BLOCKS", wanted)
                check("triton", tensors, offsets, [1, 0])
                results.append(segmented_lora(*tensors, offsets, [1, 0], SCALE, backend="triton"))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])

    @interpreted
    def test_strides_and_empty(self) -> None:
        tensors, offsets = strided()
        check("triton", tensors, offsets, [1, 0])
        check_empty("triton")

    @interpreted
    def test_opcheck(self) -> None:
        *tensors, offsets = draw((3, 0, 2), 4, 5, 2)
        torch.use_deterministic_algorithms(False)  # opcheck compares two runs, NaN and all
        torch.library.opcheck(torch.ops.pymape.segmented_lora, (*tensors, offsets, (1, 0, -1), SCALE, "triton"))

    @interpreted
    def test_what_it_cannot_take_is_refused_by_name(self) -> None:
        for dtype, rank in ((torch.float64, 2), (torch.float32, 129)):
            *tensors, offsets = draw((3,), 4, 5, rank, dtype)
            with pytest.raises(RuntimeError, match=f"cannot run: .* ranks up to 128, got {dtype} and rank {rank}"):
                segmented_lora(*tensors, offsets, [0], SCALE, backend="triton")

    @requires_triton
    @pytest.mark.parametrize("rank", [16, 64, 128])
    @pytest.mark.parametrize("sm", [80, 90])
    @pytest.mark.parametrize("dtype", FLOATS[1:])
    def test_compiled_kernel_spills_nothing(self, dtype: torch.dtype, sm: int, rank: int) -> None:
        with compiled_launches(sm) as kernels:
            lora(dtype, rank)
        assert [kernel.stack for kernel in kernels] == [0]
        assert kernels[0].shared <= LARGEST_SHARED[sm]
