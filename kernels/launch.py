"""What the launchers share: the device that a kernel runs on, and what it can do."""

import contextlib

import torch
import triton
from torch import Tensor

__all__ = ["capability", "device_of"]


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of a tensor the current one, to which Triton launches; the interpreter takes CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def capability(x: Tensor) -> int:
    """Return the compute capability of the current device, such as 90; 0 in the interpreter."""
    return 0 if x.device.type == "cpu" else triton.runtime.driver.active.get_current_target().arch
