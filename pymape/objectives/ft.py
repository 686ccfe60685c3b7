"""Fine-tuning on the retain set."""

from __future__ import annotations

from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("ft", forget=False, retain="required")
def ft(step: Step) -> Tensor:
    """Fine-tuning on the retain set alone, trusting that the rest is forgotten on the way.

    loss = NLL_r

    Source: the fine-tuning baseline of Golatkar et al. 2020 (arXiv 1911.04933) and SalUn (arXiv 2310.12508).
    """
    return step.required_retain().loss()
