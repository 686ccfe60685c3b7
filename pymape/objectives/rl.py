"""Random labels."""

from __future__ import annotations

from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step


@objective("rl", retain="optional", retain_term=True)
def rl(step: Step) -> Tensor:
    """Random labelling: learn a wrong label for every forget record.

    loss = NLL_f(y~) + alpha retain term,  y~ uniform over the labels other than y, drawn once per record (per labelled
    token for language models)

    Source: Golatkar et al. 2020 (arXiv 1911.04933); with the retain term as in SalUn (arXiv 2310.12508).
    """
    return step.forget.with_random_labels().loss() + step.retain_loss()
