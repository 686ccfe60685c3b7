"""Matching the losses on records that were never seen."""

from __future__ import annotations

import torch
from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step

__all__ = ["match", "matched_losses"]


@objective("match", retain="optional", retain_term=True, reference=["unseen"])
def match(step: Step) -> Tensor:
    """Give the forget records the losses of unseen ones: ascent that ends where a retrained model would be.

    loss = (1 / T) sum_n T_n |l_n - t_n| + alpha retain term,  l_n = NLL_n / T_n,  T = sum_n T_n

    with T_n the labelled tokens of record n (1 for classifiers) and t_n its place among the losses of unseen records,
    see `matched_losses`. Until a record has reached t_n its gradient is that of `gd`, from there on it is held.

    Source: this project. Ascent that stops at a level is flooding (Ishida et al. 2020, arXiv 2002.08709) the other way.
    """
    forget = step.forget
    return (
        (forget.losses() - forget.required_targets()).abs() * forget.counts
    ).sum() / forget.tokens + step.retain_loss()


def matched_losses(own: Tensor, unseen: Tensor) -> Tensor:
    """The loss that each forget record is to have, so that together they have the losses of unseen records.

    A model that was never trained on the forget records would have about the losses on them that it has on others. The
    record with the largest loss of all forget records takes the largest loss of unseen records, and so on by rank:
    t_n = Q((r_n + 1/2) / N), Q the quantile function of `unseen`, r_n the rank of record n in `own`. Of all ways to
    give the forget records the distribution of `unseen` this one moves their losses least.

    Args:
        own: [N] losses of the forget records under the original model.
        unseen: [M] losses of records that it has never seen, M >= 1.

    Returns:
        [N] losses, fp64.
    """
    ranks = own.double().argsort(stable=True).argsort()
    return torch.quantile(unseen.double(), (ranks.double() + 0.5) / len(own))
