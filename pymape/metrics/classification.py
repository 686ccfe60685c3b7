"""Predictions of a classifier or a causal language model, reduced to one accuracy, confidence and loss a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymape.data.batching import PaddingCollator, collated
from pymape.forward import eval_mode, on_device, padding_token, unlabelled
from pymape.losses import CLASSIFICATION, IGNORED_LABEL, LANGUAGE_MODEL, check_labels, task_of, token_labels

__all__ = [
    "Predictions",
    "accuracy",
    "confidences",
    "entropies",
    "modified_entropies",
    "predict",
    "scaled_confidences",
]


@dataclass(frozen=True)
class Predictions:
    """What a model says about N records.

    Attributes:
        correct: [N] in [0, 1]: 1 where the class is right; for language models the share of right next tokens.
        confidence: [N] in [0, 1]: probability of the true class; for language models its geometric mean over tokens.
        loss: [N] cross-entropy, in nats (mean over the record's own tokens).
    """

    correct: Tensor
    confidence: Tensor
    loss: Tensor

    def __len__(self) -> int:
        return self.correct.shape[0]

    def select(self, keep: Tensor) -> Predictions:
        """The records chosen by a boolean [N] or index tensor."""
        return Predictions(self.correct[keep], self.confidence[keep], self.loss[keep])

    @property
    def accuracy(self) -> float:
        """Mean of `correct`, in percent."""
        if not len(self):
            raise ValueError("predictions must hold at least one record, got none")
        return 100 * self.correct.double().mean().item()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of records whose largest logit is at the label, in percent.

    Args:
        logits: [N, C].
        labels: [N] in [0, C).

    Returns:
        A value in [0, 100].

    Raises:
        ValueError: shapes do not fit, or N is 0.
    """
    _check(logits, labels)
    return 100 * (logits.argmax(-1) == labels).double().mean().item()


def confidences(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax probability of the true class.

    Args:
        logits: [N, C].
        labels: [N] in [0, C).

    Returns:
        [N] fp64 in [0, 1].
    """
    _check(logits, labels)
    return logits.double().softmax(-1).gather(-1, labels[:, None]).squeeze(-1)


def entropies(logits: Tensor) -> Tensor:
    """Entropy of the softmax, -sum_c p_c log p_c, in nats.

    Args:
        logits: [N, C].

    Returns:
        [N] fp64.
    """
    log_p = logits.double().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def modified_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Entropy that knows the label, -(1 - p_y) log p_y - sum_{c != y} p_c log(1 - p_c), in nats.

    Unlike the entropy it is 0 only for a certain right answer, and infinite for a certain wrong one.

    Args:
        logits: [N, C].
        labels: [N] in [0, C).

    Returns:
        [N] fp64.

    Source:
        Song and Mittal 2021, arXiv 2003.10595, equation 8.
    """
    _check(logits, labels)
    log_p = logits.double().log_softmax(-1)
    log_rest = _log_of_rest(log_p)
    true = torch.zeros_like(log_p, dtype=torch.bool).scatter_(-1, labels[:, None], True)
    terms = torch.where(true, log_rest.exp() * log_p, log_p.exp() * log_rest)
    return -terms.sum(-1)


def scaled_confidences(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit-scaled probability of the true class, log(p_y / (1 - p_y)); about normal over models for one record.

    Args:
        logits: [N, C].
        labels: [N] in [0, C).

    Returns:
        [N] fp64.

    Source:
        Carlini et al. 2022, "Membership Inference Attacks From First Principles", arXiv 2112.03570.
    """
    _check(logits, labels)
    log_p = logits.double().log_softmax(-1)
    return (log_p - _log_of_rest(log_p)).gather(-1, labels[:, None]).squeeze(-1)


@torch.no_grad()
def predict(
    model: nn.Module,
    data: Sequence[dict[str, Any]],
    *,
    batch_size: int = 128,
    collate_fn: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
) -> Predictions:
    """Run a model over a data set in eval mode, without gradients; its training flags are put back.

    Args:
        model: Hugging Face classifier (logits [B, C], labels [B]) or causal LM (logits [B, T, V], labels [B, T],
            -100 and padding by the `attention_mask` [B, T] ignored).
        data: map-style data set of dicts with "labels"; a key "id" is not handed to the model.
        batch_size: records per forward pass.
        collate_fn: makes one batch of a list of records; default: pad on the right and stack.

    Returns:
        Predictions in the order of `data`, on the CPU.

    Raises:
        ValueError: empty data, a model for another task, labels that are missing or out of range, or logits and labels
            that are of neither task.
    """
    if not len(data):
        raise ValueError("data must hold at least one record, got none")
    collate = collate_fn or PaddingCollator(padding_token(model))
    task, parts = _task_of(model), []
    with eval_mode(model):
        for start in range(0, len(data), batch_size):
            rows = [data[row] for row in range(start, min(start + batch_size, len(data)))]
            batch = collated(collate, rows)
            if batch.get("labels") is None:
                raise ValueError(f"data must have labels, got {sorted(batch)}")
            if task is not None:
                check_labels(model, batch, [str(row.get("id", start + place)) for place, row in enumerate(rows)])
            inputs = on_device(model, batch)
            parts.append(_reduce(model, task, model(**unlabelled(inputs)).logits, inputs))
    return Predictions(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def _task_of(model: nn.Module) -> str | None:
    """The task of a Hugging Face model; None for any other, which counts as a classifier if its logits are such."""
    try:
        task = task_of(model)
    except ValueError:
        return None
    if task not in (CLASSIFICATION, LANGUAGE_MODEL):
        raise ValueError(f"model must be a classifier or a causal language model, got one for {task}")
    return task


def _reduce(
    model: nn.Module, task: str | None, logits: Tensor, inputs: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    labels = inputs["labels"]
    if logits.ndim == 2 and labels.ndim == 1 and not labels.is_floating_point():
        _check(logits, labels)
        loss = nn.functional.cross_entropy(logits.double(), labels, reduction="none")  # [B]
        return (logits.argmax(-1) == labels).double(), (-loss).exp(), loss
    if task == LANGUAGE_MODEL and logits.ndim == 3 and labels.shape == logits.shape[:2]:
        # Position t predicts token t + 1.
        logits, labels = logits[:, :-1], token_labels(LANGUAGE_MODEL, inputs)[:, :-1]
        own = labels != IGNORED_LABEL  # [B, T - 1]
        count = own.sum(-1).clamp(min=1)
        loss = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), labels, ignore_index=IGNORED_LABEL, reduction="none"
        ).double()
        right = (logits.argmax(-1) == labels) & own
        mean_loss = loss.sum(-1) / count
        return right.sum(-1).double() / count, (-mean_loss).exp(), mean_loss
    raise ValueError(
        "logits and labels must be a classifier's, [B, C] and [B] classes, or a causal language model's, [B, T, V] and "
        f"[B, T], got {tuple(logits.shape)} and {labels.dtype} {tuple(labels.shape)} of {type(model).__name__}"
    )


def _log_of_rest(log_p: Tensor) -> Tensor:
    """[N, C] log(1 - p_c), of the likeliest class summed over the others, so that p_c near 1 keeps its digits."""
    top = log_p.argmax(-1, keepdim=True)
    rest_of_top = log_p.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.log(-torch.expm1(log_p)).scatter(-1, top, rest_of_top)


def _check(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits and labels must have shapes [N, C] and [N], got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if not labels.numel():
        raise ValueError("labels must hold at least one record, got none")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be in [0, {logits.shape[1]}), got {labels.min().item()} to {labels.max().item()}"
        )
