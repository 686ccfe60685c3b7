"""greedy_swap: both modes against exhaustive references, its ties and limits, its registration, and its bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
from conftest import FLOATS, threads
from cuda_tools import compile_cu, requires_nvcc
from torch import Tensor

from pymape.ops import GreedySwapResult, greedy_swap, greedy_swap_reference

MODES = ("swap", "rearrange")


def integers(*shape: int, bound: int = 3) -> Tensor:
    return torch.randint(-bound, bound + 1, shape).float()


def selection(layers: int, modules: int, share: float = 0.3) -> Tensor:
    return torch.rand(layers, modules) < share


def assert_same(actual: GreedySwapResult, expected: GreedySwapResult) -> None:
    for name in GreedySwapResult._fields:
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def objective(forget: Tensor, retain: Tensor, mask: Tensor, lam: float, linear: Tensor) -> Tensor:
    """J by its definition, with Q written out."""
    quadratic = torch.einsum("nli,nlj->lij", forget, forget) / len(forget)
    quadratic = quadratic - lam * torch.einsum("nli,nlj->lij", retain, retain) / len(retain)
    chosen = mask.double()
    return torch.einsum("li,lij,lj->l", chosen, quadratic, chosen) / 2 - (linear * chosen).sum(dim=1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("modules", [1, 2, 63, 129])
@pytest.mark.parametrize(("forget_samples", "retain_samples"), [(1, 0), (1, 1), (16, 17), (63, 0), (33, 64)])
@pytest.mark.parametrize("first_order", [False, True])
def test_integers_give_the_exhaustive_result(
    modules: int, forget_samples: int, retain_samples: int, first_order: bool, mode: str
) -> None:
    forget = integers(forget_samples, 3, modules)
    retain = integers(retain_samples, 3, modules) if retain_samples else None
    linear = integers(3, modules) if first_order else None
    mask = selection(3, modules)
    options = {"lam": 0.5, "linear": linear, "mode": mode}
    actual = greedy_swap(forget, retain, mask, backend="cpu", **options)
    assert_same(actual, greedy_swap_reference(forget, retain, mask, **options))
    assert torch.equal(actual.mask.sum(dim=1), mask.sum(dim=1))


@pytest.mark.parametrize("mode", MODES)
def test_many_small_instances_full_of_ties(mode: str) -> None:
    for _ in range(60):
        forget_samples, retain_samples, modules = (int(torch.randint(1, high, ())) for high in (5, 5, 13))
        forget, retain = integers(forget_samples, 2, modules, bound=1), integers(retain_samples, 2, modules, bound=1)
        mask = selection(2, modules, share=0.5)
        assert_same(
            greedy_swap(forget, retain, mask, mode=mode), greedy_swap_reference(forget, retain, mask, mode=mode)
        )


def test_an_example_by_hand() -> None:
    # Q = G^T G with G = (3, 1, 2): from {1}, J = 1/2; entering 0 gives 9/2, entering 2 gives 2.
    forget = torch.tensor([[[3.0, 1.0, 2.0]]])
    result = greedy_swap(forget, None, torch.tensor([[False, True, False]]))
    assert result.mask.tolist() == [[True, False, False]]
    assert (result.objective_before.item(), result.objective_after.item(), result.swaps.item()) == (0.5, 4.5, 1)
    # The first-order term makes module 0 cost 9: J is -9/2 there and 2 at module 2.
    linear = torch.tensor([[9.0, 0.0, 0.0]])
    assert greedy_swap(forget, None, torch.tensor([[False, True, False]]), linear=linear).mask.tolist() == [
        [False, False, True]
    ]
    # Rearranged: 3 joins {1, -4}; without 1 their sum is -1, the smallest, so 1 is kept in its place.
    rearranged = greedy_swap(
        torch.tensor([[[1.0, -4.0, 3.0]]]), None, torch.tensor([[False, False, True]]), mode="rearrange"
    )
    assert rearranged.mask.tolist() == [[True, False, False]]
    assert rearranged.swaps.item() == 1


def test_ties_take_the_lowest_module_that_enters_and_then_the_lowest_that_leaves() -> None:
    forget = torch.tensor([[[2.0, 1.0, 1.0, 2.0]]])
    linear = torch.tensor([[2.0, 0.5, 0.5, 2.0]])  # cancels the diagonal: only the couplings differ
    mask = torch.tensor([[False, True, True, False]])
    assert greedy_swap(forget, None, mask, linear=linear, max_swaps=1).mask.tolist() == [[True, False, True, False]]
    # Four equal modules: the one that would come back is not the lowest, so the lowest takes its place.
    equal = greedy_swap(torch.ones(1, 1, 4), None, torch.tensor([[False, False, False, True]]), mode="rearrange")
    assert equal.mask.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fill", [False, True])
def test_nothing_to_exchange(fill: bool, mode: str) -> None:
    mask = torch.full((2, 65), fill)
    result = greedy_swap(integers(7, 2, 65), integers(5, 2, 65), mask, mode=mode)
    assert torch.equal(result.mask, mask)
    assert result.swaps.tolist() == [0, 0]
    assert torch.equal(result.objective_before, result.objective_after)


@pytest.mark.parametrize("mode", MODES)
def test_zero_gradients_change_nothing_in_j(mode: str) -> None:
    mask = selection(2, 63)
    zeros = torch.zeros(5, 2, 63)
    result = greedy_swap(zeros, zeros, mask, mode=mode)
    assert_same(result, greedy_swap_reference(zeros, zeros, mask, mode=mode))
    assert result.objective_after.tolist() == [0, 0]
    if mode == "swap":
        assert result.swaps.tolist() == [0, 0]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_layers_or_no_modules(shape: tuple[int, int]) -> None:
    result = greedy_swap(torch.zeros(3, *shape), None, torch.zeros(shape, dtype=torch.bool))
    assert result.mask.shape == shape
    assert result.swaps.tolist() == [0] * shape[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes(dtype: torch.dtype, mode: str) -> None:
    forget, retain = integers(2, 17, 2, 63).to(dtype)
    mask = selection(2, 63)
    assert_same(greedy_swap(forget, retain, mask, mode=mode), greedy_swap_reference(forget, retain, mask, mode=mode))


def test_fp64_gradients_are_not_rounded() -> None:
    tiny = 2.0**-30  # lost beside 1 in fp32
    forget = torch.tensor([[[1.0, 1.0 + tiny]]], dtype=torch.float64)
    mask = torch.tensor([[True, False]])
    assert greedy_swap(forget, None, mask).mask.tolist() == [[False, True]]
    assert greedy_swap(forget.float(), None, mask).mask.tolist() == [[True, False]]
    assert greedy_swap(torch.ones(1, 1, 2), forget, mask, lam=2).swaps.item() == 0


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1:])
def test_strides(order: tuple[int, ...]) -> None:
    inverse = [order.index(i) for i in range(3)]
    forget, retain = integers(9, 2, 33), integers(6, 2, 33)
    strided_forget = forget.permute(order).contiguous().permute(inverse)
    strided_retain = torch.stack([retain, retain.neg()], dim=-1)[..., 0]
    mask = torch.stack([selection(33, 2), selection(33, 2)])[0].T
    assert not strided_forget.is_contiguous()
    assert_same(greedy_swap(strided_forget, strided_retain, mask), greedy_swap_reference(forget, retain, mask))


def test_max_swaps_and_an_objective_that_never_decreases() -> None:
    forget, retain, linear = torch.randn(31, 2, 129), torch.randn(17, 2, 129), torch.randn(2, 129).double()
    mask = selection(2, 129, share=0.1)
    last = greedy_swap(forget, retain, mask, linear=linear)
    assert (last.swaps > 5).all()
    previous = last.objective_before
    for swaps in range(int(last.swaps.max()) + 1):
        result = greedy_swap(forget, retain, mask, linear=linear, max_swaps=swaps)
        assert torch.equal(result.swaps, last.swaps.clamp_max(swaps))
        grew = result.objective_after - previous
        assert torch.where(last.swaps >= max(swaps, 1), grew > 0 if swaps else grew == 0, grew == 0).all()
        previous = result.objective_after
    assert torch.equal(previous, last.objective_after)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_real_gradients(scale: float) -> None:
    sizes = torch.randn(2, 129).exp()
    shared = torch.randn(2, 4, 129)
    forget, retain = ((torch.randn(n, 2, 1, 4) @ shared).squeeze(2) + torch.randn(n, 2, 129) for n in (40, 65))
    forget, retain = forget * sizes * scale, retain * sizes * scale
    linear = torch.randn(2, 129).double() * scale**2
    mask = selection(2, 129, share=0.1)
    for mode in MODES:
        options = {"lam": 0.7, "linear": linear, "mode": mode}
        actual = greedy_swap(forget, retain, mask, **options)
        expected = greedy_swap_reference(forget, retain, mask, **options)
        assert torch.equal(actual.mask, expected.mask)
        assert torch.equal(actual.swaps, expected.swaps)
        for value, chosen in ((actual.objective_before, mask), (actual.objective_after, actual.mask)):
            written_out = objective(forget.double(), retain.double(), chosen, 0.7, linear)
            torch.testing.assert_close(value, written_out, rtol=1e-9, atol=1e-12 * scale**2)


def test_no_single_exchange_improves_the_result() -> None:
    forget, retain = torch.randn(8, 1, 14).double(), torch.randn(9, 1, 14).double()
    zero = torch.zeros(1, 14).double()
    result = greedy_swap(forget, retain, torch.arange(14)[None] < 5)
    for i, j in itertools.product((~result.mask[0]).nonzero().flatten(), result.mask[0].nonzero().flatten()):
        neighbour = result.mask.clone()
        neighbour[0, i], neighbour[0, j] = True, False
        assert objective(forget, retain, neighbour, 1.0, zero).item() <= result.objective_after.item() + 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_does_not_depend_on_the_number_of_threads(mode: str) -> None:
    forget, retain = torch.randn(33, 5, 129), torch.randn(17, 5, 129)
    mask = selection(5, 129)
    with threads(3):
        three = greedy_swap(forget, retain, mask, mode=mode)
    assert_same(greedy_swap(forget, retain, mask, mode=mode), three)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool) -> None:
    retain, linear = (torch.randn(3, 2, 9), torch.randn(2, 9)) if full else (None, None)
    arguments = (torch.randn(4, 2, 9), retain, selection(2, 9), linear, 1.0, 10, "swap", "cpu")
    torch.library.opcheck(torch.ops.pymape.greedy_swap, arguments)


@requires_nvcc
@pytest.mark.parametrize("arch", [80, 90])
def test_cuda_kernels_compile_without_spills(arch: int) -> None:
    kernels = compile_cu("csrc/greedy_swap.cu", arch)
    assert len(kernels) == 4
    for usage in kernels.values():
        assert usage["registers"] <= 128
        assert usage["stack"] == usage["spill_stores"] == usage["spill_loads"] == 0


G, MASK = torch.zeros(3, 2, 5), torch.zeros(2, 5, dtype=torch.bool)
NAN = G.index_fill(2, torch.tensor([4]), torch.nan)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((G[0], None, MASK), {}, r"forget must have shape \(N >= 1, 2, 5\), got \(2, 5\)"),
        ((G[:0], None, MASK), {}, r"forget must have shape \(N >= 1, 2, 5\), got \(0, 2, 5\)"),
        ((G, G[:, :1], MASK), {}, r"retain must have shape \(N >= 1, 2, 5\), got \(3, 1, 5\)"),
        ((G, None, MASK[0]), {}, r"mask must be a bool tensor of shape \(L, M\), got torch.bool of shape \(5,\)"),
        (
            (G, None, MASK.float()),
            {},
            r"mask must be a bool tensor of shape \(L, M\), got torch.float32 of shape \(2, 5\)",
        ),
        ((G.int(), None, MASK), {}, "forget must be fp64, fp32, bf16 or fp16, got torch.int32"),
        ((G, None, MASK), {"linear": G[0, 0]}, r"linear must have shape \(2, 5\), got \(5,\)"),
        ((NAN, None, MASK), {}, r"forget must be finite, got nan at \(0, 0, 4\)"),
        ((G, NAN, MASK), {}, r"retain must be finite, got nan at \(0, 0, 4\)"),
        ((G, None, MASK), {"linear": NAN[0].neg() / 0}, r"linear must be finite, got nan at \(0, 0\)"),
        ((G, None, MASK), {"lam": -1.0}, "lam must be finite and at least 0, got -1.0"),
        ((G, None, MASK), {"lam": float("nan")}, "lam must be finite and at least 0, got nan"),
        ((G, None, MASK), {"max_swaps": -1}, "max_swaps must be at least 0, got -1"),
        ((G, None, MASK), {"mode": "swop"}, "mode must be one of swap, rearrange, got 'swop'"),
    ],
)
def test_bad_input(arguments: tuple[Tensor, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        greedy_swap(*arguments, **options)


def test_infinity_is_found() -> None:
    infinite = torch.zeros(3, 2, 5)
    infinite[1, 0, 2], infinite[2, 1, 3] = torch.inf, -torch.inf
    with pytest.raises(ValueError, match=r"forget must be finite, got inf at \(1, 0, 2\)"):
        greedy_swap(infinite, None, MASK)
