"""Stopping before too much is forgotten."""

from __future__ import annotations

import logging
import math
from numbers import Real
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pymape.data.records import is_map_style, plain
from pymape.trainer.pairing import check_set

__all__ = ["StopWhenForgotten"]

_logger = logging.getLogger(__name__)


class StopWhenForgotten(TrainerCallback):
    """Stop an `UnlearnTrainer` once the forget loss has reached that on unseen data, or a number.

    stop at the first checked step where  NLL_f >= target,  NLL the mean per labelled token (per record for classifiers)

    A model that was never trained on the forget records would have about the loss on them that it has on unseen records
    of the same kind; going on from there over-unlearns, which a membership attack sees as well as the opposite. The
    unseen loss is that of the model of the same step. Each check logs `forget_loss` and `target_loss`; why the run
    ended is in `reason`, and in `trainer.state.log_history` as `stop_reason`.

    Args:
        target: map-style data set of records (dicts) that the model has never seen, at least one; or a loss in nats, a
            finite number (of numpy or torch too).
        every: optimizer steps between two checks; the last one is after the last step.

    Raises:
        ValueError: a target that is no data set of records and no finite number, `every` below 1, or another trainer.
    """

    def __init__(self, target: Any, *, every: int = 10) -> None:
        target = plain(target)
        self._unseen = not isinstance(target, Real)
        if not (is_map_style(target) if self._unseen else math.isfinite(target)):
            raise ValueError(f"target must be a map-style data set or a finite number, got {target!r}")
        if self._unseen:
            check_set("target", target)
        if every < 1:
            raise ValueError(f"every must be >= 1, got {every}")
        self.target = target
        self.every = every
        self.reason: str | None = None
        self.trainer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that there is a forget set to look at."""
        self.reason = None
        if self.trainer is None:
            raise ValueError("StopWhenForgotten must be in the callbacks that an UnlearnTrainer is made with, got none")
        if self.trainer.objective.one_shot:
            raise ValueError(f"objective must take steps for StopWhenForgotten, got {self.trainer.objective.name!r}")
        if self.trainer.forget_dataset is None:
            raise ValueError("forget_dataset must be given for StopWhenForgotten, got None")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Compare the losses at every `every`-th step, and after the last."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        loss = self.trainer.mean_loss(self.trainer.forget_dataset)
        target = self.trainer.mean_loss(self.target) if self._unseen else float(self.target)
        self.trainer.log({"forget_loss": loss, "target_loss": target})
        if loss >= target:
            what = "the loss on unseen data" if self._unseen else "the target"
            self.reason = f"forget loss {loss:.4g} reached {what}, {target:.4g}, at step {state.global_step}"
            entry: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch, "stop_reason": self.reason}
            state.log_history.append(entry)
            _logger.info(self.reason)
            control.should_training_stop = True
