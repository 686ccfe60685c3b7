"""Running a model over records to look at it: batches, eval mode, and the logits that a task's labels are about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pymape.batching import RecordBatches
from pymape.losses import IGNORED_LABEL, token_labels
from pymape.positions import with_positions

__all__ = ["eval_mode", "model_batches", "on_device", "questions", "task_logits"]

# Inputs that are answers, which the model is not to see.
_ANSWERS = ("labels", "start_positions", "end_positions")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode; afterwards every module has its own training flag back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def model_batches(
    model: nn.Module, data: Any, batch_size: int, collate_fn: Callable[[list[Any]], Any] | None
) -> RecordBatches:
    """Batches of records of similar length, padded with the model's own padding token."""
    pad = getattr(model.config, "pad_token_id", None)
    pad_token_id = 0 if pad is None else pad
    return RecordBatches(data, batch_size=batch_size, collate_fn=collate_fn, pad_token_id=pad_token_id)


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch, where the model is; texts padded on the left get their positions, where these count."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in with_positions(model, batch).items() if isinstance(value, Tensor)}


def questions(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs without the answers, so that the model computes no loss of its own."""
    return {name: value for name, value in inputs.items() if name not in _ANSWERS}


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
    if task == "question answering":
        labels = torch.stack([inputs[name].view(-1) for name in _ANSWERS[1:]], 1)  # [B, 2]
        logits = torch.stack([outputs.start_logits, outputs.end_logits], 1).double()  # [B, 2, T]
        own = inputs.get("attention_mask", torch.ones_like(logits[:, 0])) != 0  # [B, T]
        inside = (labels >= 0) & (labels < own.shape[1])
        if not (inside & own.gather(1, labels.clamp(0, own.shape[1] - 1))).all():
            raise ValueError(f"answers must start and end at a record's own tokens, got positions {labels.tolist()}")
        logits = logits.masked_fill(~own[:, None], -torch.inf)
        return logits.flatten(0, 1), labels.flatten(), [2] * len(labels)
    logits = outputs.logits
    if task == "classification":
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
