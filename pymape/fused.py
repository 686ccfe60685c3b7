"""Element-wise parts of frozen layers in one operator each, which keeps its inputs alone for the backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pymape.feed_forward import fuse_ffn, unfuse_ffn
from pymape.layers import is_unhooked

__all__ = ["FusedParts"]

# Classes of RMS norms that multiply by their weight in the dtype of their input, and call their epsilon the same.
_RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


class FusedParts:
    """Fused RMS norms and gated feed-forward blocks, in a model that has such parts.

    A block keeps its two projections, where the original code also keeps act(gate); a norm keeps its input, where the
    original code keeps it in fp32. Outputs differ from the original code's by rounding. What is hooked or replaced
    already is left as it is.

    Args:
        model: a supported Hugging Face model whose norms are frozen.
        devices: types of devices on which the fused operators run; on others the original code does.
    """

    def __init__(self, model: nn.Module, devices: tuple[str, ...] = ("cuda",)) -> None:
        self.model = model
        self._norms = [norm for norm in model.modules() if type(norm).__name__ in _RMS_NORMS and is_unhooked(norm)]
        for norm in self._norms:
            norm.forward = MethodType(_FusedNorm(devices), norm)
        fuse_ffn(model, devices)

    def restore(self) -> None:
        """Give the model its own forward passes back."""
        unfuse_ffn(self.model)
        for norm in self._norms:
            vars(norm).pop("forward", None)
        self._norms = []


@dataclass(frozen=True)
class _FusedNorm:
    """The forward pass of a norm: x / sqrt(mean(x^2) + eps) * weight."""

    devices: tuple[str, ...]

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        weight, eps = module.weight, module.variance_epsilon
        if x.device.type not in self.devices or x.dtype != weight.dtype:
            return type(module).forward(module, x)
        return F.rms_norm(x, weight.shape, weight, eps) if x.is_cuda else _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """What `F.rms_norm` is on a GPU only: one node, which keeps its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return weight * _normalized(x, eps)[0].to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        normalized, scale = _normalized(x, ctx.eps)
        inner = (grad * weight).to(normalized.dtype)
        projection = (inner * normalized).mean(-1, keepdim=True)
        return (scale * (inner - normalized * projection)).to(x.dtype), None, None


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalized input and the factor that it was multiplied by, in fp32 (fp64 for fp64)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return x * scale, scale
