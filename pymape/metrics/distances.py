"""How far two models are apart on the same records: in what they predict and in what they hold inside."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymape.forward import eval_mode, on_device, unlabelled
from pymape.losses import check_labels, task_of
from pymape.metrics.forward import model_batches, task_logits
from pymape.metrics.scores import write_rows

__all__ = ["ModelDistance", "linear_cka", "model_distance"]

_FORMAT = "pymape.distances.1"
_ALIKE = torch.finfo(torch.float32).eps  # representations that differ by no more, relative to their size, are equal


@dataclass(frozen=True, eq=False)
class ModelDistance:
    """Distance of a model to another one, usually the retrained, on N records.

    A record's value is the mean over its terms (its class, or its labelled tokens).

    Attributes:
        ids: [N] ids.
        kl: [N] fp64, KL(other || model) of the predictive distributions, in nats.
        js: [N] fp64, Jensen-Shannon divergence, in [0, log 2].
        logit_l2: [N] fp64, Euclidean distance of the logits.
        cosine: [N] fp64, cosine similarity of the last hidden states, averaged over the record's own tokens first; NaN
            where the models differ in width.
        cka: linear centred kernel alignment of the same hidden states over all records, in [0, 1]; NaN where a model
            gives every record the same.
    """

    ids: list[str]
    kl: Tensor
    js: Tensor
    logit_l2: Tensor
    cosine: Tensor
    cka: float

    def figures(self) -> dict[str, float]:
        """Means over the records: "logit_kl", "logit_js", "logit_l2", "hidden_cosine", and "hidden_cka"."""
        names = {"logit_kl": self.kl, "logit_js": self.js, "logit_l2": self.logit_l2, "hidden_cosine": self.cosine}
        return {name: values.mean().item() for name, values in names.items()} | {"hidden_cka": self.cka}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the values of every record as one safetensors file, in one step."""
        columns = {"kl": self.kl, "js": self.js, "logit_l2": self.logit_l2, "cosine": self.cosine}
        write_rows(path, _FORMAT, self.ids, columns, cka=repr(self.cka))


@torch.no_grad()
def model_distance(
    model: nn.Module,
    other: nn.Module,
    data: Any,
    *,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Any] | None = None,
) -> ModelDistance:
    """Run two models over the same records in eval mode and compare them.

    Args:
        model: Hugging Face model with a task head.
        other: one for the same task and with as many classes or tokens.
        data: map-style data set of dicts with the model's inputs and labels.
        batch_size: records per forward pass.
        collate_fn: list of records without `id` -> dict of tensors; default pads on the right.

    Returns:
        Distances on the CPU, in the order of `data`.

    Raises:
        ValueError: empty data, or models that do not predict the same things.
    """
    task = task_of(model)
    if task_of(other) != task:
        raise ValueError(f"other must be a model for {task}, got one for {task_of(other)}")
    batches = model_batches(model, data, batch_size, collate_fn)
    count = len(batches.positions)
    names = [""] * count
    columns = torch.empty(count, 4, dtype=torch.float64)
    hidden: list[list[Tensor]] = [[torch.empty(0)] * count for _ in range(2)]
    with eval_mode(model), eval_mode(other):
        for rows, own_names, batch in batches:
            check_labels(model, batch, own_names)
            (logits, inside, counts), (logits_other, inside_other, _) = (
                _outputs(network, task, batch) for network in (model, other)
            )
            if logits.shape != logits_other.shape:
                raise ValueError(
                    f"other must have {logits.shape[-1]} classes or tokens as model has, got {logits_other.shape[-1]}"
                )
            terms = _distances(logits, logits_other.to(logits.device)).cpu()  # [n, 3]
            means = torch.stack([own.mean(0) for own in terms.split(counts)])
            if inside.shape == inside_other.shape:
                cosine = F.cosine_similarity(inside, inside_other, dim=-1)
            else:
                cosine = inside.new_full((len(rows),), math.nan)
            columns[rows] = torch.cat([means, cosine[:, None]], 1)
            for place, row in enumerate(rows.tolist()):
                hidden[0][row], hidden[1][row] = inside[place], inside_other[place]
                names[row] = own_names[place]
    kl, js, logit_l2, cosines = columns.unbind(1)
    return ModelDistance(names, kl, js, logit_l2, cosines, linear_cka(*map(torch.stack, hidden)))


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment, ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) with centred columns.

    Args:
        one: [N, D] representations of N records.
        other: [N, E] of the same records.

    Returns:
        A value in [0, 1], the same for any rotation and scale of either; NaN where all rows of one are alike.

    Source:
        Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", arXiv 1905.00414.
    """
    if one.ndim != 2 or other.ndim != 2 or len(one) != len(other) or not len(one):
        raise ValueError(f"representations must be [N, D] and [N, E], got {tuple(one.shape)} and {tuple(other.shape)}")
    x, y = (values.double() - values.double().mean(0) for values in (one, other))
    if any(spread.norm() <= _ALIKE * values.double().norm() for spread, values in ((x, one), (y, other))):
        return math.nan
    return min(1.0, ((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())).item())


def _outputs(model: nn.Module, task: str, batch: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Logits of the terms [n, V], hidden states [B, D] on the CPU, and terms of each record."""
    inputs = on_device(model, batch)
    outputs = model(**unlabelled(inputs), output_hidden_states=True)
    logits, _, counts = task_logits(task, inputs, outputs)
    states = outputs.hidden_states[-1].double()  # [B, T, D]
    mask = inputs.get("attention_mask")
    own = torch.ones(states.shape[:2], device=states.device) if mask is None else (mask != 0).to(states.device)
    weights = (own / own.sum(1, keepdim=True))[..., None].double()
    return logits, (states * weights).sum(1).cpu(), counts


def _distances(logits: Tensor, other: Tensor) -> Tensor:
    """[n, 3] KL(other || model), Jensen-Shannon divergence and Euclidean distance of logits [n, V]."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    logits, other = logits.to(dtype), other.to(dtype)
    log_p, log_q = logits.log_softmax(-1), other.log_softmax(-1)
    middle = torch.logaddexp(log_p, log_q) - math.log(2)
    kl = _kl(log_q, log_p)
    js = (_kl(log_p, middle) + _kl(log_q, middle)) / 2
    apart = (logits - other).masked_fill(log_p.isinf() & log_q.isinf(), 0.0)  # impossible to both
    return torch.stack([kl, js, apart.norm(dim=-1)], 1).double()


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; what p rules out adds nothing."""
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0.0)).sum(-1)
