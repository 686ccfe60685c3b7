"""Checks that operators share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_alike", "check_device", "check_float", "no_fp64"]

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_float(name: str, tensor: Tensor) -> None:
    """Refuse a tensor of another kind than the operators' floats."""
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"{name} must be fp64, fp32, bf16 or fp16, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Refuse a tensor that is elsewhere than the operator's first."""
    if tensor.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name} {first.device}, got {tensor.device}")


def check_alike(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Refuse a tensor of another dtype or device than the operator's first."""
    if tensor.dtype != first.dtype:
        raise ValueError(f"{name} must have the dtype of {first_name} {first.dtype}, got {tensor.dtype}")
    check_device(name, tensor, first_name, first)


def no_fp64(tensor: Tensor) -> str | None:
    """Why a Triton kernel, which has no fp64, cannot take a tensor, or None."""
    return f"it takes fp32, bf16 and fp16, got {tensor.dtype}" if tensor.dtype == torch.float64 else None
