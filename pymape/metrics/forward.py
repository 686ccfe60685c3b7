"""Running a model over records to look at it: their batches, and the logits that a task's labels are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pymape.data.batching import RecordBatches
from pymape.forward import input_fields, padding_token
from pymape.losses import CLASSIFICATION, IGNORED_LABEL, QUESTION_ANSWERING, token_labels

__all__ = ["model_batches", "task_logits"]


def model_batches(
    model: nn.Module, data: Any, batch_size: int, collate_fn: Callable[[list[Any]], Any] | None
) -> RecordBatches:
    """Batches of records of similar length, padded with the model's own padding token."""
    pad, fields = padding_token(model), input_fields(model)
    return RecordBatches(data, batch_size=batch_size, collate_fn=collate_fn, pad_token_id=pad, fields=fields)


def task_logits(task: str, inputs: Mapping[str, Tensor], outputs: Any) -> tuple[Tensor, Tensor, list[int]]:
    """Logits and labels of a batch's terms, record by record.

    Args:
        task: as `losses.task_of` names it.
        inputs: the batch, on the device of the outputs.
        outputs: what the model returned for it.

    Returns:
        [n, V] logits, fp64 for a classifier's classes; [n] labels; the number of terms of each record.

    Raises:
        ValueError: labels that are not classes, or an answer beyond a record's own tokens.
    """
    if task == QUESTION_ANSWERING:
        labels = torch.stack([inputs[name].view(-1) for name in ("start_positions", "end_positions")], 1)  # [B, 2]
        logits = torch.stack([outputs.start_logits, outputs.end_logits], 1).double()  # [B, 2, T]
        own = inputs.get("attention_mask", torch.ones_like(logits[:, 0])) != 0  # [B, T]
        inside = (labels >= 0) & (labels < own.shape[1])
        if not (inside & own.gather(1, labels.clamp(0, own.shape[1] - 1))).all():
            raise ValueError(f"answers must start and end at a record's own tokens, got positions {labels.tolist()}")
        logits = logits.masked_fill(~own[:, None], -torch.inf)
        return logits.flatten(0, 1), labels.flatten(), [2] * len(labels)
    logits = outputs.logits
    if task == CLASSIFICATION:
        labels = inputs["labels"]
        if labels.is_floating_point() or labels.numel() != len(logits) or logits.shape[-1] < 2:
            raise ValueError(
                f"labels must be one class a record, got {labels.dtype} of shape {tuple(labels.shape)} "
                f"for {logits.shape[-1]} outputs"
            )
        return logits.double(), labels.view(-1), [1] * len(labels)
    labels = token_labels(task, inputs)
    labelled = labels != IGNORED_LABEL
    return logits[labelled], labels[labelled], labelled.sum(1).tolist()
