"""Gradient difference."""

from __future__ import annotations

from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("gd", retain="required", retain_term=True)
def gd(step: Step) -> Tensor:
    """Gradient difference: ascent on the forget set, descent on the retain set.

    loss = - NLL_f + alpha retain term,  NLL_r unless KL is chosen

    Source: Liu et al. 2022 (arXiv 2203.12817); as in TOFU (arXiv 2401.06121).
    """
    return -step.forget.loss() + step.retain_loss()
