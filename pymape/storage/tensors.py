"""What a tensor is hashed by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["tensor_bytes", "tensor_digest"]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in their order, wherever it is and however it lies there."""
    array: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def tensor_digest(hasher: Any, name: str, tensor: Tensor) -> None:
    """Feed a tensor to a hashlib object: name, dtype, shape, bytes."""
    hasher.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
    hasher.update(tensor_bytes(tensor))
