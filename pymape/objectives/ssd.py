"""Selective synaptic dampening."""

from __future__ import annotations

import torch
from torch import Tensor

from pymape.objectives.one_shot import OneShot, fisher_diagonal
from pymape.objectives.registry import objective


@objective("ssd", retain="required", one_shot=True, positive=["selection"], not_negative=["dampening"])
def ssd(step: OneShot, *, selection: float = 10.0, dampening: float = 1.0) -> list[Tensor]:
    """Dampen the parameters that matter much more to the forget set than to all data.

    where I_f > a I_D:  theta <- theta min(1, lambda I_D / I_f),   I = diag (1 / N) sum_n g_n^2

    with g_n the gradient of record n's own loss, I_f over the forget set and I_D over forget and retain set; sums in
    fp64.

    Args:
        step: the whole sets.
        selection: a, > 0; at (N_f + N_r) / N_f and above nothing is chosen, since I_D holds I_f with its share.
        dampening: lambda, >= 0; 0 sets the chosen parameters to zero.

    Source: Foster et al. 2024 (arXiv 2308.07707).
    """
    forget, retain = fisher_diagonal(step.forget_gradients), fisher_diagonal(step.retain_gradients)
    forget_size, retain_size = len(step.forget_gradients), len(step.retain_gradients)
    updates, chosen = [], 0
    for parameter, of_forget, of_retain in zip(step.parameters, forget, retain, strict=True):
        of_all = (of_forget * forget_size + of_retain * retain_size) / (forget_size + retain_size)
        dampened = of_forget > selection * of_all
        chosen += int(dampened.sum())
        scale = (dampening * of_all / of_forget).clamp(max=1)
        value = parameter.detach().double()
        updates.append(torch.where(dampened, value * (scale - 1), 0.0))
    step.metrics["dampened_share"] = chosen / sum(parameter.numel() for parameter in step.parameters)
    return updates
