"""Influence unlearning."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pymape.objectives.one_shot import OneShot, fisher_diagonal
from pymape.objectives.registry import objective


@objective("influence", retain="required", one_shot=True, not_negative=["cg_steps", "cg_tolerance"])
def influence(step: OneShot, *, cg_steps: int = 0, cg_tolerance: float = 1e-6) -> list[Tensor]:
    """One Newton step that takes the forget records' influence back, with the Fisher matrix as curvature.

    theta <- theta + (F_r + gamma I)^-1 b
    b = (1 / N_r) sum_{n in forget} g_n,   F_r = (1 / N_r) sum_{n in retain} g_n g_n^T

    with g_n the gradient of record n's own loss at the trained parameters; sums in fp64. F_r is cut to its diagonal,
    unless `cg_steps` asks for conjugate gradients on the whole of it: each step goes once more through the retain set
    for F_r v = (1 / N_r) sum_n g_n <g_n, v>, and no matrix is formed.

    Args:
        step: the whole sets.
        cg_steps: most steps of conjugate gradients, preconditioned by diag F_r + gamma; 0 takes the diagonal alone.
        cg_tolerance: residual, relative to b, that ends them; what was reached is logged as `cg_residual`.

    Source: Koh and Liang 2017 (arXiv 1703.04730); Izzo et al. 2021 (arXiv 2002.10077); as in SalUn's IU baseline.
    """
    if step.gamma <= 0:
        raise ValueError(f"gamma must be > 0, got {step.gamma}")
    diagonal = [entries + step.gamma for entries in fisher_diagonal(step.retain_gradients)]
    b = [total / len(step.retain_gradients) for total in step.forget_gradients.sum(lambda gradients: gradients)]
    if cg_steps == 0:
        return [entries / scale for entries, scale in zip(b, diagonal, strict=True)]
    return _conjugate_gradients(step, b, diagonal, cg_steps, cg_tolerance)


def _conjugate_gradients(
    step: OneShot, b: list[Tensor], diagonal: list[Tensor], steps: int, tolerance: float
) -> list[Tensor]:
    """Solve (F_r + gamma I) x = b, from x = 0: the first step already finds the best multiple of the diagonal step."""
    x = [torch.zeros_like(entries) for entries in b]
    residual = [entries.clone() for entries in b]
    direction = [entries / scale for entries, scale in zip(b, diagonal, strict=True)]
    product, norm = _dot(residual, direction), _dot(b, b)
    done = 0
    while done < steps and _dot(residual, residual) > tolerance**2 * norm:
        image = _fisher_product(step, direction)
        length = product / _dot(direction, image)
        for solved, left, along, moved in zip(x, residual, direction, image, strict=True):
            solved += length * along
            left -= length * moved
        scaled = [entries / scale for entries, scale in zip(residual, diagonal, strict=True)]
        previous, product = product, _dot(residual, scaled)
        for along, entries in zip(direction, scaled, strict=True):
            along.mul_(product / previous).add_(entries)
        done += 1
    step.metrics["cg_steps"] = done
    step.metrics["cg_residual"] = math.sqrt(_dot(residual, residual) / norm) if norm > 0 else 0.0
    return x


def _fisher_product(step: OneShot, vector: list[Tensor]) -> list[Tensor]:
    """(F_r + gamma I) v."""

    def along(gradients: Sequence[Tensor]) -> list[Tensor]:
        share = _dot(gradients, vector)
        return [gradient.double() * share for gradient in gradients]

    totals, size = step.retain_gradients.sum(along), len(step.retain_gradients)
    return [total / size + step.gamma * entries for total, entries in zip(totals, vector, strict=True)]


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y).sum()) for x, y in zip(one, other, strict=True))
