"""Simple negative preference optimization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("simnpo", retain="optional", retain_term=True)
def simnpo(step: Step, *, delta: float = 0.0) -> Tensor:
    """Negative preference optimization by the likelihood per token, which needs no original model.

    loss = -(2 / beta) mean_n log sigmoid(beta (NLL_n / T_n - delta)) + alpha retain term

    with NLL_n / T_n the mean over record n's T_n labelled tokens (its cross-entropy for classifiers, T_n = 1). A record
    counts as forgotten once that mean is well above delta, in nats per token; the paper's margin gamma is beta delta.

    Source: Fan et al. 2024 (arXiv 2410.07163).
    """
    forget = step.forget
    margin = forget.nll() / forget.counts - delta  # [B]
    return (-2 / step.beta) * forget.mean(F.logsigmoid(step.beta * margin)) + step.retain_loss()
