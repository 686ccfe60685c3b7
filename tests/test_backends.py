"""The rule that chooses a backend, for machines other than this one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pymape import backends
from pymape.backends import resolve_backend

ALL = ("cpu", "cuda", "triton", "reference")
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


def test_other_devices_take_the_reference() -> None:
    assert resolve_backend("op", "auto", torch.device("cpu"), supported=ALL) == "cpu"
    assert resolve_backend("op", "auto", torch.device("meta"), supported=ALL) == "reference"
    with pytest.raises(ValueError, match="backend of op must be one of auto, cpu"):
        resolve_backend("op", "tpu", torch.device("cpu"), supported=ALL)
