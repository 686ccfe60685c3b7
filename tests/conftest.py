"""What the tests share: poisoned memory, the error bound against an fp64 reference, and the operator checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

# The models are tiny and the tests run in as many processes as there are cores: more threads would only wait.
torch.set_num_threads(1)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run a block with this many threads inside operators."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that an element a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch then fills uninitialised memory
    yield
    torch.use_deterministic_algorithms(before)


def assert_as_good_as_torch(
    actual: Tensor, reference: Callable[..., Tensor], *inputs: Tensor, slack: float = 2.0
) -> None:
    """Check that `actual` is within twice torch's own error of the fp64 reference, plus a rounding floor.

    Args:
        actual: what the kernel returned.
        reference: the operator's plain torch reference; called on the inputs as they are and on their fp64 copies.
        inputs: the operator's tensors.
        slack: how many times torch's own largest error is allowed.
    """
    exact = reference(*(x.double() if x.is_floating_point() else x for x in inputs))
    torchs_own = reference(*inputs)
    assert actual.shape == exact.shape
    assert torch.isfinite(actual).all()
    if actual.numel() == 0:
        return
    floor = 4 * torch.finfo(actual.dtype).eps * exact.abs().max().clamp_min(1e-30)
    allowed = slack * (torchs_own.double() - exact).abs().max() + floor
    assert (actual.double() - exact).abs().max() <= allowed
