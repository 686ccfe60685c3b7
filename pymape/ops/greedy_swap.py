"""greedy_swap: exchange of selected and unselected modules within every layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pymape.backends import native, resolve_backend
from pymape.ops.common import check_device, check_float

__all__ = ["GreedySwapResult", "greedy_swap", "greedy_swap_reference"]

_SUPPORTED = ("cpu", "cuda", "reference")
_MODES = ("swap", "rearrange")
_TOLERANCE = 1e-12  # of the objective's diagonal terms over all modules: a smaller gain is lost in rounding


class GreedySwapResult(NamedTuple):
    """Masks after the exchange and what it brought, layer by layer."""

    mask: Tensor  # [L, M] bool
    objective_before: Tensor  # [L] float64
    objective_after: Tensor  # [L] float64
    swaps: Tensor  # [L] int64


def greedy_swap(
    forget: Tensor,
    retain: Tensor | None,
    mask: Tensor,
    *,
    lam: float = 1.0,
    linear: Tensor | None = None,
    max_swaps: int = 400,
    mode: str = "swap",
    backend: str = "auto",
) -> GreedySwapResult:
    """Improve the selected modules of every layer by exchanging a selected for an unselected one, step by step.

    With G_f, G_r the gradients of a layer, Q = G_f^T G_f / N_f - lam G_r^T G_r / N_r and S the selected modules,

        J(S) = 1/2 sum_{i, j in S} Q_ij - sum_{i in S} linear_i.

    `mode="swap"`: with c = Q 1_S - linear, every step takes the pair (i not in S, j in S) of largest gain
    Q_ii / 2 + c_i + Q_jj / 2 - c_j - Q_ij, the lowest i and then the lowest j among equals, until no gain exceeds
    1e-12 sum_i (sum_n forget_ni^2 / N_f + lam sum_n retain_ni^2 / N_r + |linear_i|). J never decreases.

    `mode="rearrange"`: the one-pass procedure of Kwon et al. over `forget` alone. Every selected module, in order of
    rising gradient norm, joins the unselected ones, and the one whose removal leaves the smallest norm of their summed
    gradients (the lowest index among equals) becomes selected. J is reported but does not steer.

    Args:
        forget: gradients of the forget samples' losses with respect to the gates, [N_f, L, M]; fp64, fp32, bf16 or
            fp16, any strides.
        retain: the same of the retain samples, [N_r, L, M], or None for Q = G_f^T G_f / N_f.
        mask: [L, M] bool, True = selected. Their number in a layer does not change.
        lam: weight of the retain samples, >= 0.
        linear: first-order term, [L, M] floating point, or None for zero.
        max_swaps: most exchanges in one layer, >= 0; `mode="rearrange"` takes one step per selected module instead.
        mode: `swap` or `rearrange`.
        backend: `auto`, `cpu`, `cuda` or `reference`.

    Returns:
        The new mask [L, M], J before and after [L] in fp64, and the number of exchanges [L] in int64. Layers run in
        parallel; sums are fp64, so that integer-valued gradients give the same mask in every backend.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a value is out of its range or not finite.

    Source: greedy search of MAPE-Unlearn (arXiv 2508.17233); rearrangement of Kwon et al. 2022 (arXiv 2204.09656).
    """
    _check(forget, retain, mask, lam, linear, max_swaps, mode)
    chosen = resolve_backend("greedy_swap", backend, mask.device, supported=_SUPPORTED)
    if chosen == "reference":
        return greedy_swap_reference(forget, retain, mask, lam=lam, linear=linear, max_swaps=max_swaps, mode=mode)
    return GreedySwapResult(*torch.ops.pymape.greedy_swap(forget, retain, mask, linear, lam, max_swaps, mode, chosen))


def _check(
    forget: Tensor, retain: Tensor | None, mask: Tensor, lam: float, linear: Tensor | None, max_swaps: int, mode: str
) -> None:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    if not (math.isfinite(lam) and lam >= 0):
        raise ValueError(f"lam must be finite and at least 0, got {lam}")
    if max_swaps < 0:
        raise ValueError(f"max_swaps must be at least 0, got {max_swaps}")
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor of shape (L, M), got {mask.dtype} of shape {tuple(mask.shape)}")
    layers, modules = mask.shape
    for name, gradients in (("forget", forget), ("retain", retain)):
        if gradients is None:
            continue
        if gradients.dim() != 3 or gradients.shape[0] == 0 or gradients.shape[1:] != mask.shape:
            raise ValueError(f"{name} must have shape (N >= 1, {layers}, {modules}), got {tuple(gradients.shape)}")
    if linear is not None and linear.shape != mask.shape:
        raise ValueError(f"linear must have shape ({layers}, {modules}), got {tuple(linear.shape)}")
    for name, values in (("forget", forget), ("retain", retain), ("linear", linear)):
        if values is None:
            continue
        check_float(name, values)
        check_device(name, values, "mask", mask)
        # One reduction instead of a mask as large as the values: a NaN or an infinity survives every sum.
        if not math.isfinite(values.sum(dtype=torch.float64).item()):
            raise ValueError(f"{name} must be finite, got {_first_not_finite(values)}")


def _first_not_finite(values: Tensor) -> str:
    places = (~values.isfinite()).nonzero()
    if not len(places):
        return "a sum beyond the range of fp64"
    place = tuple(places[0].tolist())
    return f"{values[place].item()} at {place}"


def greedy_swap_reference(
    forget: Tensor,
    retain: Tensor | None,
    mask: Tensor,
    *,
    lam: float = 1.0,
    linear: Tensor | None = None,
    max_swaps: int = 400,
    mode: str = "swap",
) -> GreedySwapResult:
    """Plain torch specification of `greedy_swap`: every step looks at all pairs, in fp64."""
    forget_samples, retain_samples = forget.shape[0], 1 if retain is None else retain.shape[0]
    # Everything is kept N_f N_r times too large, which keeps sums over integers exact and so ties are ties everywhere.
    scale = float(forget_samples * retain_samples)
    layers = mask.shape[0]
    result = GreedySwapResult(
        mask.clone(),
        torch.zeros(layers, dtype=torch.float64, device=mask.device),
        torch.zeros(layers, dtype=torch.float64, device=mask.device),
        torch.zeros(layers, dtype=torch.int64, device=mask.device),
    )
    for layer in range(layers):
        gradients = forget[:, layer].double()  # [N_f, M]
        quadratic = gradients.T @ gradients * retain_samples  # [M, M]
        size = quadratic.diagonal().clone()
        if retain is not None:
            other = retain[:, layer].double()  # [N_r, M]
            penalty = other.T @ other * (lam * forget_samples)
            quadratic, size = quadratic - penalty, size + penalty.diagonal()
        offset = torch.zeros_like(size) if linear is None else linear[layer].double() * scale
        selected = result.mask[layer]  # a view: the exchanges below write into the result
        result.objective_before[layer] = _objective(quadratic, offset, selected) / scale
        if mode == "rearrange":
            result.swaps[layer] = _rearrange(gradients.T.contiguous(), selected)
        else:
            result.swaps[layer] = _swap(quadratic, offset, selected, size, max_swaps)
        result.objective_after[layer] = _objective(quadratic, offset, selected) / scale
    return result


def _objective(quadratic: Tensor, offset: Tensor, selected: Tensor) -> Tensor:
    return quadratic[selected][:, selected].sum() / 2 - offset[selected].sum()


def _swap(quadratic: Tensor, offset: Tensor, selected: Tensor, size: Tensor, max_swaps: int) -> int:
    half = quadratic.diagonal() / 2
    threshold = _TOLERANCE * (size.sum() + offset.abs().sum())
    for swap in range(max_swaps):
        inside, outside = selected.nonzero().squeeze(1), (~selected).nonzero().squeeze(1)
        if not len(inside) or not len(outside):
            return swap
        coupling = quadratic[:, inside].sum(dim=1) - offset
        enters, leaves = (half + coupling)[outside], (half - coupling)[inside]
        gain = enters[:, None] + leaves[None, :] - quadratic[outside][:, inside]
        best = gain.max()
        if best <= threshold:
            return swap
        row, column = (gain == best).nonzero()[0].tolist()  # row-major: the lowest i, then the lowest j
        selected[outside[row]] = True
        selected[inside[column]] = False
    return max_swaps


def _rearrange(gradients: Tensor, selected: Tensor) -> int:
    exchanged = 0
    kept = selected.nonzero().squeeze(1)
    norms = gradients.square().sum(dim=1)  # [M]
    for enters in kept[norms[kept].sort(stable=True).indices].tolist():
        selected[enters] = False
        pruned = (~selected).nonzero().squeeze(1)
        vectors = gradients[pruned]  # [|pruned|, N_f]
        remaining = (vectors.sum(dim=0) - vectors).square().sum(dim=1)
        leaves = int(pruned[(remaining == remaining.min()).nonzero()[0, 0]])
        selected[leaves] = True
        exchanged += leaves != enters
    return exchanged


torch.library.define(
    "pymape::greedy_swap",
    "(Tensor forget, Tensor? retain, Tensor mask, Tensor? linear, float lam, int max_swaps, str mode, str backend)"
    " -> (Tensor mask, Tensor before, Tensor after, Tensor swaps)",
)


@torch.library.impl("pymape::greedy_swap", "CompositeExplicitAutograd")
def _forward(
    forget: Tensor,
    retain: Tensor | None,
    mask: Tensor,
    linear: Tensor | None,
    lam: float,
    max_swaps: int,
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forget, retain = forget.detach(), None if retain is None else retain.detach()
    linear = None if linear is None else linear.detach().to(torch.float64).contiguous()
    result = mask.clone(memory_format=torch.contiguous_format)
    before, after = (mask.new_empty(mask.shape[0], dtype=torch.float64) for _ in range(2))
    swaps = mask.new_empty(mask.shape[0], dtype=torch.int64)
    outputs = (result, before, after, swaps)
    if backend == "cpu":
        native().greedy_swap(forget, retain, linear, lam, max_swaps, mode, *outputs, torch.get_num_threads())
        return outputs
    counts = forget.shape[0], 0 if retain is None else retain.shape[0]
    wide = forget.dtype == torch.float64 or (retain is not None and retain.dtype == torch.float64)
    padding = -sum(counts) % (2 if wide else 4)  # every row begins at a multiple of 16 bytes
    rows = mask.new_zeros((*mask.shape, sum(counts) + padding), dtype=torch.float64 if wide else torch.float32)
    rows[..., : counts[0]] = forget.movedim(0, -1)
    if retain is not None:
        rows[..., counts[0] : sum(counts)] = retain.movedim(0, -1)
    workspace = rows.new_empty((rows.shape[0], native().greedy_swap_workspace(*rows.shape[1:])), dtype=torch.float64)
    stream = torch.cuda.current_stream(rows.device).cuda_stream
    native().greedy_swap_cuda(rows, *counts, linear, lam, max_swaps, mode, *outputs, workspace, stream)
    return outputs


@torch.library.register_fake("pymape::greedy_swap")
def _fake(
    forget: Tensor,
    retain: Tensor | None,
    mask: Tensor,
    linear: Tensor | None,
    lam: float,
    max_swaps: int,
    mode: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    before, after = (mask.new_empty(mask.shape[0], dtype=torch.float64) for _ in range(2))
    swaps = mask.new_empty(mask.shape[0], dtype=torch.int64)
    return mask.new_empty(mask.shape, dtype=torch.bool), before, after, swaps
