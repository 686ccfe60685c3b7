"""What the launchers share: the device that a kernel runs on, and what it can do."""

import contextlib
import functools

import torch
import triton
from torch import Tensor

__all__ = ["capability", "device_of"]


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of a tensor the current one, to which Triton launches; the interpreter takes CPU tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def capability(x: Tensor) -> int:
    """Return the compute capability of a tensor's device, such as 90; 0 in the interpreter."""
    if x.is_cuda:
        return _capability(x.device)
    # A meta tensor is compiled for the current target.
    return 0 if x.device.type == "cpu" else triton.runtime.driver.active.get_current_target().arch


@functools.cache  # asked before every launch
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
