"""The data and the models that experiments run on, a module for each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pymape.experiments.config import TaskConfig
from pymape.experiments.tasks.base import JUDGED, Forgetting, Split, Task, forgetting, selection_score, without_class
from pymape.experiments.tasks.images import make_arrays, make_digits, make_folder
from pymape.experiments.tasks.questions import make_questions
from pymape.experiments.tasks.table import make_table
from pymape.experiments.tasks.tofu import make_tofu
from pymape.experiments.tasks.training import train

__all__ = [
    "JUDGED",
    "MAKERS",
    "Forgetting",
    "Split",
    "Task",
    "forgetting",
    "make_task",
    "selection_score",
    "train",
    "without_class",
]

# What makes each kind of task, and what it must be given of the configuration.
MAKERS: dict[str, tuple[Callable[..., Task], tuple[str, ...]]] = {
    "digits": (make_digits, ()),
    "arrays": (make_arrays, ("data",)),
    "folder": (make_folder, ("data",)),
    "table": (make_table, ("data", "model")),
    "questions": (make_questions, ("data", "model")),
    "tofu": (make_tofu, ("data",)),
}


def make_task(config: TaskConfig) -> Task:
    """The task that a configuration names; its models start on the GPU where there is one.

    Raises:
        ValueError: data that is missing, or options that the task does not have.
    """
    maker, needed = MAKERS[config.name]
    given = {name: getattr(config, name) for name in needed}
    for name, value in given.items():
        if value is None or not Path(value).exists():
            raise ValueError(f"task.{name} must be an existing path for task {config.name!r}, got {value!r}")
    try:
        task = maker(**given, **config.options)
    except TypeError as error:
        raise ValueError(f"task.options must fit task {config.name!r}: {error}") from error

    def start(seed: int) -> PreTrainedModel:
        model: Any = task.start(seed)
        return model.to("cuda" if torch.cuda.is_available() else "cpu")

    return dataclasses.replace(task, start=start)
