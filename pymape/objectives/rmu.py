"""Representation misdirection for unlearning."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("rmu", retain="required", reference=["activations"], positive=["norm"], not_negative=["layer", "seed"])
def rmu(step: Step, *, layer: int, norm: float = 6.5, seed: int = 0) -> Tensor:
    """Push the forget set's activations at one layer towards a fixed random direction, and hold the retain set's.

    loss = mean (h_f - c u)^2 + alpha mean (h_r - h_ref)^2

    with h [T, D] the output of `layer` (0 is the first; the last layer's as the model reports it, behind a final norm
    in some families), u a direction drawn uniformly from the unit sphere, and h_ref the original model's activations.
    Means are over dimensions and a record's own tokens, padding apart, then over records.

    Args:
        step: the records of one micro-batch.
        layer: where; only trained parameters at this layer and below take part.
        norm: c, length of the vector the forget activations are pushed to; several times their own length is usual.
        seed: of the direction.

    Source: Li et al. 2024 (WMDP, arXiv 2403.03218), whose direction has positive entries only.
    """
    retain = step.required_retain()
    if retain.reference_activations is None:
        raise ValueError("reference_activations must be known for rmu, got None")
    forgotten, kept = step.forget.activations(layer), retain.activations(layer)  # [B, T, D]
    if torch.is_grad_enabled() and not forgotten.requires_grad:
        raise ValueError(f"masks must select a module at or below layer {layer} for rmu, got none there")
    direction = np.random.default_rng(seed).standard_normal(forgotten.shape[-1])
    target = torch.from_numpy(norm * direction / np.linalg.norm(direction)).to(forgotten)
    change = kept - retain.reference_activations.to(kept)
    return step.forget.mean_square(forgotten - target) + step.alpha * retain.mean_square(change)
