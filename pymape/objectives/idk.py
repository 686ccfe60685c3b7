"""Alternative answers."""

from __future__ import annotations

from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("idk", retain="optional", retain_term=True, alternative=True)
def idk(step: Step) -> Tensor:
    """Fine-tuning on the given alternative answers, for instance "I don't know".

    loss = NLL_f(y') + alpha retain term,  y' the alternative answers (alternative labels for classifiers)

    Source: the "I don't know" tuning of TOFU (arXiv 2401.06121) and of Zhang et al. 2024 (arXiv 2404.05868).
    """
    return step.forget.required_alternative("idk").loss() + step.retain_loss()
