"""Direct preference optimization."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("dpo", retain="optional", retain_term=True, reference=["nll"], alternative=True)
def dpo(step: Step) -> Tensor:
    """Direct preference optimization: prefer the given alternative answer to the one to be forgotten.

    loss = -(2 / beta) mean_n log sigmoid(beta ((NLL_n - NLL_ref,n) - (NLL_n(y') - NLL_ref,n(y')))) + alpha retain term

    with NLL_n(y') that of record n's alternative answer, all summed over labelled tokens (cross-entropies of the label
    and the alternative label for classifiers), and NLL_ref the original model's. Scaled as `npo`, which is the same
    without the alternative: the gradient at the start is that of NLL_n(y') - NLL_n.

    Source: Rafailov et al. 2023 (arXiv 2305.18290); for unlearning as in Zhang et al. 2024 (arXiv 2404.05868).
    """
    forget = step.forget
    margin = forget.nll_ratio() - forget.required_alternative("dpo").nll_ratio()  # [B]
    return (-2 / step.beta) * forget.mean(F.logsigmoid(step.beta * margin)) + step.retain_loss()
