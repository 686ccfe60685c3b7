"""The relearning attack: how fast a model that has forgotten learns it all again from a few of the records."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pymape.errors import check_ranges
from pymape.forward import eval_mode, on_device, unlabelled
from pymape.losses import per_sample_loss
from pymape.metrics.forward import model_batches
from pymape.metrics.scores import record_scores

__all__ = ["RelearningCurve", "relearning_attack"]


@dataclass(frozen=True)
class RelearningCurve:
    """What a fine-tuned copy knew of the whole forget set.

    Attributes:
        steps: optimizer steps taken, from 0 (the model itself).
        accuracy: accuracy on the forget set after each, in percent (for language models of next tokens).
        loss: mean loss per record after each, in nats.
        records: number of records that were fine-tuned on.
        target: accuracy from which on the forget set counts as relearned, in percent.
    """

    steps: list[int]
    accuracy: list[float]
    loss: list[float]
    records: int
    target: float

    @property
    def steps_to_relearn(self) -> int | None:
        """First step at which the target is reached; None if it never was."""
        return next((step for step, value in zip(self.steps, self.accuracy, strict=True) if value >= self.target), None)


def relearning_attack(
    model: nn.Module,
    forget: Any,
    *,
    original_accuracy: float,
    share: float = 0.1,
    tolerance: float = 5.0,
    lr: float = 5e-5,
    steps: int = 50,
    every: int = 1,
    batch_size: int = 8,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    seed: int = 0,
) -> RelearningCurve:
    """Fine-tune a copy of the model on some of the forget set, and watch the whole of it come back.

    All parameters are trained with AdamW at a constant learning rate, without dropout, and at least in fp32: half
    precision would lose small steps, and the model would look as if it had forgotten well. The seed alone decides
    which records are drawn, without replacement, and in which order they come; every pass has a new order.

    Args:
        model: Hugging Face model with a task head; it is not changed.
        forget: map-style data set of the forget set.
        original_accuracy: accuracy of the model before unlearning on the forget set, in percent.
        share: share of the forget set to fine-tune on, in (0, 1]; at least one record.
        tolerance: percentage points below the original accuracy that count as relearned.
        lr: learning rate.
        steps: optimizer steps.
        every: steps between two measurements; the last step is measured too.
        batch_size: records per step, at most those drawn.
        collate_fn: list of records without `id` -> dict of tensors; default pads on the right.
        seed: of the draw and the order.

    Returns:
        The curve. The attack goes on after the target is reached.

    Raises:
        ValueError: an option out of range, or an empty forget set.
    """
    ranges = {
        "share": (share, 0 < share <= 1, "in (0, 1]"),
        "lr": (lr, lr > 0, "positive"),
        "steps": (steps, steps >= 1, "at least 1"),
        "every": (every, every >= 1, "at least 1"),
        "batch_size": (batch_size, batch_size >= 1, "at least 1"),
        "forget": (len(forget), len(forget) >= 1, "at least one record"),
    }
    check_ranges(ranges)
    with torch.inference_mode(False):
        precision = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        student = copy.deepcopy(model).to(precision).requires_grad_(True)
        optimizer = torch.optim.AdamW(student.parameters(), lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(forget), generator=generator)[: max(1, round(share * len(forget)))]
    batches: list[list[int]] = []
    taken, accuracy, loss = [], [], []

    def measure(step: int) -> None:
        scores = record_scores(student, forget, collate_fn=collate_fn, progress=False)
        taken.append(step)
        accuracy.append(scores.predictions().accuracy)
        loss.append(scores.loss.mean().item())

    measure(0)
    with torch.inference_mode(False), torch.enable_grad(), eval_mode(student):
        for step in range(1, steps + 1):
            if not batches:
                order = drawn[torch.randperm(len(drawn), generator=generator)]
                batches = [rows.tolist() for rows in order.split(batch_size)]
            records = [forget[row] for row in batches.pop(0)]
            _, _, batch = next(iter(model_batches(student, records, len(records), collate_fn)))
            inputs = on_device(student, batch)
            optimizer.zero_grad()
            per_sample_loss(student, inputs, student(**unlabelled(inputs))).mean().backward()
            optimizer.step()
            if step % every == 0 or step == steps:
                measure(step)
    return RelearningCurve(taken, accuracy, loss, len(drawn), original_accuracy - tolerance)
