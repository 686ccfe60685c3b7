"""Evaluates a model while it unlearns, and puts it back to its best state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pymape.partial import PartialParameters

__all__ = ["KeepBest"]


class KeepBest(TrainerCallback):
    """Judge the model of a run every few steps and in the end, and keep what was trained when it was judged best.

    Transformers' `load_best_model_at_end` writes the whole model to disk at every look; this holds what is trained in
    memory.

    Args:
        partial: what is trained, of the model that is judged.
        judge: of a model: the lower, the better; the first of equals is kept.
        every: optimizer steps between two looks.

    Attributes:
        steps: that the kept model has taken; 0 before the first look.
        seconds: wall time, since this object was made, that these took, without that of looking.
        cpu_seconds: processor time of the same.
    """

    def __init__(self, partial: PartialParameters, judge: Callable[[Any], float], every: int) -> None:
        self.partial, self.judge, self.every = partial, judge, every
        self.steps, self.seconds, self.cpu_seconds = 0, 0.0, 0.0
        self._best = math.inf
        self._kept: dict[str, Tensor] = {}
        self._started = _clocks()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look at every `every`-th step and at the last one."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        before = _clocks()
        found = self.judge(self.partial.model)
        if found < self._best:
            self._best, self.steps = found, state.global_step
            self.seconds, self.cpu_seconds = (now - start for now, start in zip(before, self._started, strict=True))
            self._kept = {name: value.clone() for name, value in self.partial.state_dict().items()}
        after = _clocks()
        self._started = tuple(
            start + end - begin for start, end, begin in zip(self._started, after, before, strict=True)
        )

    def restore(self) -> None:
        """Give the model what was kept."""
        self.partial.load_state_dict(self._kept)


def _clocks() -> tuple[float, ...]:
    return time.perf_counter(), time.process_time()
