"""Fine-tuning on the retain set towards sparse weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("l1_sparse", forget=False, retain="required", not_negative=["weight"])
def l1_sparse(step: Step, *, weight: float = 5e-4) -> Tensor:
    """Fine-tuning on the retain set with an L1 penalty on what is trained.

    loss = NLL_r + weight sum |theta|

    Source: Jia et al. 2023 (arXiv 2304.04934), equation 6 with a constant weight.
    """
    retain = step.required_retain()
    trained = [parameter for parameter in retain.model.parameters() if parameter.requires_grad]
    return retain.loss() + weight * torch.stack([parameter.abs().sum() for parameter in trained]).sum()
