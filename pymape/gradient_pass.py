"""The pass that gives importance its gradients: batch by batch, the next one queued before the last has arrived."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pymape.data.positions import with_positions
from pymape.data.records import sample_of
from pymape.forward import LABELS
from pymape.losses import base_model, check_labels, per_sample_loss
from pymape.model_layout import ModelLayout

__all__ = ["BatchScores", "GradientPass", "one_behind"]

_FP16_LOSS_SCALE = 4096.0  # a power of two: exact, and keeps gradients of 1e-8 above fp16's smallest number
_T = TypeVar("_T")


@dataclass(frozen=True)
class BatchScores:
    """Gradients of a batch of records on their way to the CPU."""

    ids: list[str]
    heads: Tensor  # [B, L, H]
    filters: Tensor  # [B, L, F]
    finite: Tensor  # [3, B] bool: losses, heads, filters
    event: torch.cuda.Event | None  # recorded behind the copy to the CPU; None on a CPU

    def wait(self) -> tuple[Tensor, Tensor]:
        """Wait for the copy, but not for what was queued after it, and return heads and filters.

        Raises:
            ValueError: a loss or a gradient is NaN or infinite.
        """
        if self.event is not None:
            self.event.synchronize()
        if not self.finite.all():
            bad = [name for name, good in zip(self.ids, self.finite.all(0).tolist(), strict=True) if not good]
            what = "gradients" if self.finite[0].all() else "loss"
            raise ValueError(f"{what} must be finite, got NaN or infinite values for ids {sample_of(bad)}")
        return self.heads, self.filters


def one_behind(items: Iterator[_T]) -> Iterator[_T]:
    """Give each item once the next one is there: a GPU works on that one while the CPU takes care of this one."""
    for last in items:
        for item in items:
            yield last
            last = item
        yield last


class GradientPass:
    """One forward and backward of a batch, from the losses down to the gates and no further.

    On a GPU a call queues the work and waits for nothing: what it copies lies in pinned memory on the CPU's side.

    Args:
        model: instrumented, in eval mode, its weights frozen.
        shape: the model's layout.
        loss: (model outputs, batch) -> [B] losses, in place of `per_sample_loss`.
        autocast: run the model in this dtype.
        stored: dtype of the scores.
    """

    def __init__(
        self,
        model: nn.Module,
        shape: ModelLayout,
        loss: Callable[[Any, Mapping[str, Tensor]], Tensor] | None,
        autocast: torch.dtype | None,
        stored: torch.dtype,
    ) -> None:
        self.model, self.shape, self.loss, self.autocast, self.stored = model, shape, loss, autocast, stored
        parameter = next(model.parameters())
        self.device = parameter.device
        # Gates in fp32 keep the sums over tokens in fp32 when the model is in half precision.
        self.dtype = torch.promote_types(parameter.dtype, torch.float32)
        half = torch.float16 in (parameter.dtype, autocast)
        self.loss_scale = _FP16_LOSS_SCALE if half else 1.0
        accepted = inspect.signature(base_model(model).forward).parameters
        self.accepted = set(accepted).difference(LABELS)
        self.options = {"use_cache": False} if "use_cache" in accepted else {}
        self.gates: list[list[Tensor]] = []

    def __call__(self, batch: Mapping[str, Any], ids: list[str]) -> BatchScores:
        if self.loss is None:
            check_labels(self.model, batch, ids)
        batch = with_positions(self.model, batch)
        inputs = {name: self._placed(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
        known = {name: value for name, value in inputs.items() if name in self.accepted}
        heads, filters = self._gates(len(ids))
        precision: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            precision = torch.autocast(self.device.type, self.autocast)
        with precision:
            outputs = self.model(**known, **self.options)
        losses = self._losses(outputs, inputs, ids)
        found = torch.autograd.grad(losses.sum() * self.loss_scale, heads + filters)
        scores = torch.stack(found[: len(heads)], 1), torch.stack(found[len(heads) :], 1)
        finite = torch.stack([losses.detach().isfinite(), *(score.isfinite().flatten(1).all(1) for score in scores)])
        if self.loss_scale != 1.0:
            scores = scores[0] / self.loss_scale, scores[1] / self.loss_scale
        by_head, by_filter, finite = (
            # On a GPU the copies are queued into pinned memory, and are there when the event has come.
            x.to("cpu", non_blocking=self.device.type == "cuda")
            for x in (scores[0].to(self.stored), scores[1].to(self.stored), finite)
        )
        event = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
        return BatchScores(ids, by_head, by_filter, finite, event)

    def _placed(self, value: Tensor) -> Tensor:
        if self.device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()  # from elsewhere the copy would wait for all that is queued
        return value.to(self.device, non_blocking=True)

    def _gates(self, batch: int) -> list[list[Tensor]]:
        """Leaves of ones per layer, [B, H] and [B, F], put into the model anew only when the batch size changes."""
        from pymape.modules import set_gates

        if not self.gates or len(self.gates[0][0]) != batch:
            self.gates = [
                [
                    torch.ones(batch, width, dtype=self.dtype, device=self.device, requires_grad=True)
                    for _ in range(layers)
                ]
                for layers, width in ((self.shape.layers, self.shape.heads), (self.shape.layers, self.shape.filters))
            ]
            set_gates(self.model, *self.gates)
        return self.gates

    def _losses(self, outputs: Any, inputs: Mapping[str, Tensor], ids: list[str]) -> Tensor:
        if self.loss is None:
            return per_sample_loss(self.model, inputs, outputs)
        losses = self.loss(outputs, inputs)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (len(ids),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss must return one loss per sample, shape ({len(ids)},), got {got}")
        if not losses.requires_grad:
            raise ValueError("loss must depend on the model's outputs, got losses without a gradient")
        return losses
