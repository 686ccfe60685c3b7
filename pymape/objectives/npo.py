"""Negative preference optimization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("npo", retain="optional", retain_term=True, reference=["nll"])
def npo(step: Step) -> Tensor:
    """Negative preference optimization: ascent that levels off once a record is unlikely enough.

    loss = -(2 / beta) mean_n log sigmoid(beta (NLL_n - NLL_ref,n)) + alpha retain term

    with NLL_n summed over record n's labelled tokens (its cross-entropy for classifiers) and NLL_ref,n the original
    model's, computed once. Its gradient at the start equals that of `ga` on the summed NLL.

    Source: Zhang et al. 2024 (arXiv 2404.05868).
    """
    forget = step.forget
    margin = forget.nll_ratio()  # [B]
    return (-2 / step.beta) * forget.mean(F.logsigmoid(step.beta * margin)) + step.retain_loss()
