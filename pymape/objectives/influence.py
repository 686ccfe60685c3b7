"""Influence unlearning."""

from __future__ import annotations

import torch
from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import OneShot


@objective("influence", retain="required", one_shot=True)
def influence(step: OneShot) -> list[Tensor]:
    """One Newton step that takes the forget records' influence back, with a diagonal Fisher as curvature.

    theta <- theta + (F_r + gamma I)^-1 (1 / N_r) sum_{n in forget} g_n,   F_r = diag (1 / N_r) sum_{n in retain} g_n^2

    with g_n the gradient of record n's own loss at the trained parameters; sums in fp64.

    Source: Koh and Liang 2017 (arXiv 1703.04730); Izzo et al. 2021 (arXiv 2002.10077); as in SalUn's IU baseline.
    """
    if step.gamma <= 0:
        raise ValueError(f"gamma must be > 0, got {step.gamma}")
    fisher = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in step.parameters]
    direction = [torch.zeros_like(total) for total in fisher]
    for gradients in step.retain_gradients:
        for total, gradient in zip(fisher, gradients, strict=True):
            total += gradient.double().square_()
    for gradients in step.forget_gradients:
        for total, gradient in zip(direction, gradients, strict=True):
            total += gradient
    # (F_r + gamma)^-1 (1 / N_r) sum g = sum g / (sum g_r^2 + N_r gamma): one division, no intermediate means.
    damping = step.retain_size * step.gamma
    return [total / (curvature + damping) for total, curvature in zip(direction, fisher, strict=True)]
