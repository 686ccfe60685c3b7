"""Running a model over records to look at it: batches, eval mode, and the logits that a task's labels are about."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pymape.batching import RecordBatches
from pymape.losses import IGNORED_LABEL, base_model, token_labels

__all__ = ["eval_mode", "model_batches", "most_tokens", "on_device", "questions", "task_logits"]

# What families call their tables of learned positions.
_POSITIONS = ("position_embeddings", "positions_embed", "wpe", "embed_positions")
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


def most_tokens(model: nn.Module) -> int | None:
    """Tokens of the longest text that a model's learned positions hold; None where it has none, as with rotary ones."""
    found = []
    for table in _learned_positions(model):
        unused = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from behind it
        found.append(table.num_embeddings - unused - int(getattr(table, "offset", 0)))
    return min(found, default=None)


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch, where the model is; texts padded on the left get their positions, where these count."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    mask = inputs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and (mask[:, 0] == 0).any() and _counts_positions(model):
        inputs.setdefault("position_ids", (mask.long().cumsum(1) - 1).clamp(min=0))
    return inputs


def _counts_positions(model: nn.Module) -> bool:
    """Whether a model has learned positions that it counts from the first token on, padding or not."""
    learned = _learned_positions(model)
    skips_padding = any(table.padding_idx is not None for table in learned)  # as RoBERTa does
    accepted = inspect.signature(base_model(model).forward).parameters
    return bool(learned) and not skips_padding and "position_ids" in accepted


def _learned_positions(model: nn.Module) -> list[nn.Embedding]:
    """A model's tables of learned positions."""
    named = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    return [module for name, module in named if name in _POSITIONS and isinstance(module, nn.Embedding)]


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
