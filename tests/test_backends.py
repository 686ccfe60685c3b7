"""The rule that chooses a backend, for machines other than this one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pymape import backends
from pymape.backends import resolve_backend
from pymape.ops.masked_activation import resolve_ffn_backend

ALL = ("cpu", "triton", "cuda", "reference")
GPU = torch.device("cuda")


def machine(monkeypatch: pytest.MonkeyPatch, *, cuda: bool, triton: bool) -> None:
    monkeypatch.setattr(backends, "native", lambda: SimpleNamespace(has_cuda=cuda))
    monkeypatch.setattr(backends, "_has_triton", lambda: triton)


@pytest.mark.parametrize(
    ("supported", "cuda", "triton", "chosen"),
    [
        (ALL, True, True, "triton"),
        (ALL, True, False, "cuda"),
        (("cpu", "cuda", "reference"), True, True, "cuda"),
        (("cpu", "triton", "reference"), False, True, "triton"),
        (("cpu", "cuda", "triton", "reference"), True, True, "cuda"),
    ],
)
def test_auto_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, supported: tuple[str, ...], cuda: bool, triton: bool, chosen: str
) -> None:
    machine(monkeypatch, cuda=cuda, triton=triton)
    assert resolve_backend("op", "auto", GPU, supported=supported) == chosen


@pytest.mark.parametrize(
    ("supported", "cuda", "why"),
    [
        (("cpu", "cuda", "reference"), False, "this build has no CUDA kernels"),
        (("cpu", "triton", "reference"), True, "triton is not installed"),
    ],
)
def test_what_was_not_built_is_said(
    monkeypatch: pytest.MonkeyPatch, supported: tuple[str, ...], cuda: bool, why: str
) -> None:
    machine(monkeypatch, cuda=cuda, triton=False)
    with pytest.warns(UserWarning, match=f"op runs in plain torch: {why}"):
        assert resolve_backend("op", "auto", GPU, supported=supported) == "reference"
    named = supported[1]
    with pytest.raises(RuntimeError, match=f"backend '{named}' of op cannot run: {why}"):
        resolve_backend("op", named, GPU, supported=supported)


def test_what_torch_computes_needs_no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=False, triton=True)
    for backend in ("auto", "cuda"):
        assert resolve_backend("op", backend, GPU, supported=("cpu", "cuda", "reference"), needs_core=False) == "cuda"


def test_what_triton_cannot_take_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, cuda=True, triton=True)
    assert resolve_backend("op", "auto", GPU, supported=ALL, no_triton="it takes less") == "cuda"
    with pytest.raises(RuntimeError, match="backend 'triton' of op cannot run: it takes less"):
        resolve_backend("op", "triton", GPU, supported=ALL, no_triton="it takes less")
    with pytest.warns(UserWarning, match="op runs in plain torch: it takes less"):
        chosen = resolve_backend("op", "auto", GPU, supported=("cpu", "triton", "reference"), no_triton="it takes less")
    assert chosen == "reference"


def test_compiling_says_nothing_and_breaks_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_why_not", lambda *_: "it cannot")

    def chosen(x: torch.Tensor) -> torch.Tensor:
        backend = resolve_backend("op", "auto", GPU, supported=("cpu", "cuda", "reference"))
        return x + 1 if backend == "reference" else x

    assert torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(())) == 1


def test_fp64_on_a_gpu_without_cuda_kernels_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    wide: Any = SimpleNamespace(device=GPU, dtype=torch.float64)
    machine(monkeypatch, cuda=True, triton=True)
    assert resolve_ffn_backend("op", "auto", wide) == "cuda"
    machine(monkeypatch, cuda=False, triton=True)
    with pytest.warns(UserWarning, match="op runs in plain torch: this build has no CUDA kernels"):
        assert resolve_ffn_backend("op", "auto", wide) == "reference"


def test_other_devices_take_the_reference() -> None:
    assert resolve_backend("op", "auto", torch.device("cpu"), supported=ALL) == "cpu"
    assert resolve_backend("op", "auto", torch.device("meta"), supported=ALL) == "reference"
    with pytest.raises(ValueError, match="backend of op must be one of auto, cpu"):
        resolve_backend("op", "tpu", torch.device("cpu"), supported=ALL)
