"""Gradient ascent held back by the original model's predictions."""

from __future__ import annotations

from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("kl", retain="required", reference=["log_probs"])
def kl(step: Step) -> Tensor:
    """Gradient ascent with the retain set's predictions held to the original model's.

    loss = - NLL_f + alpha mean KL(p_ref || p) over the labelled retain tokens (records for classifiers)

    Source: TOFU's KL minimization (arXiv 2401.06121); here without the padding that its public code averages over.
    """
    return -step.forget.loss() + step.alpha * step.required_retain().kl()
