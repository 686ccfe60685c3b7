"""module_scores: per-sample inner products of module outputs and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from pymape.backends import native, resolve_backend
from pymape.ops.common import check_alike, check_float

__all__ = ["module_scores", "module_scores_reference"]

_SUPPORTED = ("cpu", "cuda", "reference")


def module_scores(output: Tensor, grad: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the gradient of every sample's loss with respect to its module gates at one.

    scores[b, m] = sum over t, d of output[b, t, m, d] * grad[b, t, m, d]

    Args:
        output: module outputs, [B, T, M, D] (heads: D is the head size) or [B, T, M] (filters); fp64, fp32, bf16 or
            fp16, any strides. It is read once, without a copy, when a token's modules lie in memory as rows of D.
        grad: gradient of the summed losses with respect to `output`, same shape and dtype.
        backend: `auto`, `cpu`, `cuda` or `reference`.

    Returns:
        [B, M] in fp32 (fp64 for fp64 inputs); sums accumulate in that dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not match.

    Source: first-order mask gradients of MAPE-Unlearn (arXiv 2508.17233) and of Kwon et al. 2022 (arXiv 2204.09656).
    """
    if output.dim() not in (3, 4):
        raise ValueError(f"output must have shape (B, T, M) or (B, T, M, D), got {tuple(output.shape)}")
    if grad.shape != output.shape:
        raise ValueError(f"grad must have the shape of output {tuple(output.shape)}, got {tuple(grad.shape)}")
    check_float("output", output)
    check_alike("grad", grad, "output", output)
    chosen = resolve_backend("module_scores", backend, output.device, supported=_SUPPORTED)
    if chosen == "reference":
        return module_scores_reference(output, grad)
    if output.dim() == 3:
        output, grad = output.unsqueeze(-1), grad.unsqueeze(-1)
    return torch.ops.pymape.module_scores(output, grad, chosen)


def module_scores_reference(output: Tensor, grad: Tensor) -> Tensor:
    """Plain torch specification of `module_scores`."""
    accumulator = torch.promote_types(output.dtype, torch.float32)
    product = output.to(accumulator) * grad.to(accumulator)
    return product.sum(dim=1) if output.dim() == 3 else product.sum(dim=(1, 3))


def _rows(x: Tensor) -> Tensor:
    """Copy only what the kernels cannot read in place: a last dimension that is not contiguous."""
    width = x.shape[3]
    readable = x.stride(3) == 1 if width > 1 else x.stride(2) == 1
    return x if readable else x.contiguous()


torch.library.define("pymape::module_scores", "(Tensor output, Tensor grad, str backend) -> Tensor")


@torch.library.impl("pymape::module_scores", "CompositeExplicitAutograd")
def _forward(output: Tensor, grad: Tensor, backend: str) -> Tensor:
    output, grad = _rows(output.detach()), _rows(grad.detach())
    batch, tokens, modules, width = output.shape
    accumulator = torch.promote_types(output.dtype, torch.float32)
    scores = output.new_empty((batch, modules), dtype=accumulator)
    if backend == "cpu":
        native().module_scores(output, grad, scores, torch.get_num_threads())
    else:
        lanes = modules * width
        workspace = output.new_empty((batch, _splits(batch, tokens, lanes), lanes), dtype=accumulator)
        stream = torch.cuda.current_stream(output.device).cuda_stream
        native().module_scores_cuda(output, grad, scores, workspace, stream)
    return scores


def _splits(batch: int, tokens: int, lanes: int) -> int:
    """Divide the tokens so that about 8k warps of 32 four-lane threads are in flight, at least 32 tokens each."""
    wanted = (8192 * 128) // max(1, batch * lanes)
    return max(1, min(wanted, tokens // 32, 64))


@torch.library.register_fake("pymape::module_scores")
def _fake(output: Tensor, grad: Tensor, backend: str) -> Tensor:
    accumulator = torch.promote_types(output.dtype, torch.float32)
    return output.new_empty((output.shape[0], output.shape[2]), dtype=accumulator)


def _setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _backward(ctx, d_scores: Tensor):
    output, grad = ctx.saved_tensors
    weight = d_scores[:, None, :, None]
    d_output = (weight * grad).to(output.dtype) if ctx.needs_input_grad[0] else None
    d_grad = (weight * output).to(grad.dtype) if ctx.needs_input_grad[1] else None
    return d_output, d_grad, None


torch.library.register_autograd("pymape::module_scores", _backward, setup_context=_setup)
