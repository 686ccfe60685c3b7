"""Gradient ascent."""

from __future__ import annotations

from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("ga")
def ga(step: Step) -> Tensor:
    """Gradient ascent on the forget set.

    loss = - NLL_f,  NLL the mean per labelled token (per record for classifiers)

    Source: Thudi et al. 2022 (arXiv 2109.13398); Jang et al. 2023 (arXiv 2210.01504).
    """
    return -step.forget.loss()
