"""RMS norms and gated feed-forward blocks in one operator each, which keeps its inputs alone for the backward pass."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pymape.feed_forward import fuse_ffn, unfuse_ffn
from pymape.layers import is_unhooked
from pymape.model_layout import find_layers, find_prefix

__all__ = ["FusedParts"]

# The families whose RMS norms in transformers are x / sqrt(mean(x^2) + eps) * weight.
_NORMS = (
    *("LlamaRMSNorm", "MistralRMSNorm", "MinistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "Olmo2RMSNorm"),
    *("Olmo3RMSNorm", "GraniteRMSNorm", "SmolLM3RMSNorm", "GlmRMSNorm", "Glm4RMSNorm", "Phi3RMSNorm"),
)
_DEVICES = "_pymape_fused_on"  # the attribute of a norm whose forward is replaced


class FusedParts:
    """The RMS norms and gated feed-forward blocks of a model that can be fused: those of Llama and its relatives.

    A block keeps its two projections, where the original code also keeps act(gate); a norm keeps its input, where the
    original code keeps it in fp32. Outputs differ from the original code's by rounding. What is hooked or replaced runs
    as it is, and so does what lies below `lowest_layer`, which keeps nothing anyway.

    Args:
        model: a supported Hugging Face model whose norms are frozen.
        lowest_layer: the lowest layer in which something trains.
        devices: types of devices on which the fused operators run; on others the original code does.
    """

    def __init__(self, model: nn.Module, lowest_layer: int, devices: tuple[str, ...]) -> None:
        self.model, self.devices = model, devices
        below = {module for part in find_prefix(model, lowest_layer) for module in part.modules()}
        above = [module for module in model.modules() if module not in below and type(module).__name__ in _NORMS]
        self._norms: list[Any] = [norm for norm in above if _is_original(norm) and is_unhooked(norm)]
        layers = find_layers(model)[lowest_layer:]
        self._layers = [layer for layer in layers if layer.gated and _is_original(layer.ffn)]

    def fuse(self) -> None:
        """Replace the forward passes."""
        for norm in self._norms:
            setattr(norm, _DEVICES, self.devices)
            norm.forward = MethodType(_fused_norm, norm)
        fuse_ffn(self._layers, self.devices)

    def restore(self) -> None:
        """Give the model its own forward passes back; those that somebody else has put there stay."""
        unfuse_ffn(self.model)
        for norm in self._norms:
            vars(norm).pop(_DEVICES, None)
            if getattr(vars(norm).get("forward"), "__func__", None) is _fused_norm:
                del norm.forward


def _is_original(module: nn.Module) -> bool:
    """Whether its class is one of transformers' own, whose forward nobody has replaced."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.") and kind.forward.__module__ == kind.__module__


def _fused_norm(module: Any, x: Tensor) -> Tensor:
    """The forward pass of a fused norm."""
    weight, eps = module.weight, module.variance_epsilon
    if x.device.type not in getattr(module, _DEVICES) or x.dtype != weight.dtype or weight.requires_grad:
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
