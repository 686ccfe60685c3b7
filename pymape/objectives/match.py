"""Matching the losses on records that were never seen."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pymape.objectives.registry import objective
from pymape.objectives.step import Step

__all__ = ["match", "match_tokens", "matched_losses"]


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


@objective("match_tokens", retain="optional", retain_term=True, reference=["unseen_tokens"])
def match_tokens(step: Step) -> Tensor:
    """Give the tokens of the forget records the losses of unseen records' tokens: `match`, one level below.

    loss = (1 / T) sum_n sum_i |l_ni - t_ni| + alpha retain term,  T = sum_n T_n

    with l_ni the loss of the i-th of the T_n labelled tokens of record n and t_ni its place among the losses of unseen
    records' tokens, see `matched_losses`. For classifiers it is `match`.

    Source: this project.
    """
    forget = step.forget
    return (forget.token_losses() - forget.required_token_targets()).abs().sum() / forget.tokens + step.retain_loss()


def matched_losses(own: Tensor, unseen: Tensor) -> Tensor:
    """The loss that each forget record or token is to have, so that together they have the losses of unseen ones.

    A model that was never trained on the forget records would have about the losses on them that it has on others. The
    largest loss of all in `own` becomes the largest in `unseen`, and so on by rank: t = Q((r + 1/2) / N), Q the
    quantile function of `unseen`, r the rank among the N of `own`. Of all ways to give `own` the distribution of
    `unseen` this one moves the losses least.

    Args:
        own: losses of the forget records, [N], or of their tokens, [records, W], under the original model; NaN where a
            record has fewer than W tokens.
        unseen: the same of records that it has never seen, at least one.

    Returns:
        Losses in the places of `own`, fp64; NaN where it is.
    """
    targets, there = torch.full_like(own, math.nan, dtype=torch.float64), ~own.isnan()
    ranks = own[there].double().argsort(stable=True).argsort().double()
    places = ((ranks + 0.5) / len(ranks)).numpy()
    targets[there] = torch.from_numpy(np.quantile(unseen[~unseen.isnan()].double().numpy(), places))
    return targets
