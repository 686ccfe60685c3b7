"""What a task is, what it forgets, and the records that models are judged on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from pymape.experiments.config import SettingConfig

__all__ = ["VALIDATION", "Forgetting", "Record", "Split", "Task", "digest", "forgetting"]

Record = dict[str, Any]

VALIDATION = 0.2  # of the training records, where the test records are given apart


@dataclass(frozen=True)
class Split:
    """The records of one seed; all have an id and labels."""

    train: list[Record]
    validation: list[Record]
    test: list[Record]


@dataclass(frozen=True)
class Task:
    """Data and model of an experiment.

    Args:
        classes: number of classes.
        fingerprint: digest of the data, and of the pretrained model where there is one.
        split: seed -> its records.
        start: seed -> a model with that seed's initial weights.
    """

    classes: int
    fingerprint: str
    split: Callable[[int], Split]
    start: Callable[[int], PreTrainedModel]


@dataclass(frozen=True)
class Forgetting:
    """What one setting of one seed forgets, and what every model is judged on.

    Where a class is forgotten, validation and test records are those of the remaining classes.
    """

    description: str
    forget: list[Record]
    retain: list[Record]
    validation: list[Record]
    test: list[Record]

    @property
    def sets(self) -> dict[str, list[Record]]:
        return {"forget": self.forget, "retain": self.retain, "validation": self.validation, "test": self.test}


def forgetting(setting: SettingConfig, seed: int, split: Split, classes: int) -> Forgetting:
    """Divide a seed's records: a whole class (the seed modulo the number of classes), or a random share."""
    if setting.forget == "random":
        generator = torch.Generator().manual_seed(seed)
        count = max(1, round(setting.share * len(split.train)))
        chosen = set(torch.randperm(len(split.train), generator=generator)[:count].tolist())
        forget = [record for row, record in enumerate(split.train) if row in chosen]
        retain = [record for row, record in enumerate(split.train) if row not in chosen]
        text = f"{count} random training records ({setting.share:.0%})"
        return Forgetting(text, forget, retain, split.validation, split.test)
    label = seed % classes
    forget = [record for record in split.train if int(record["labels"]) == label]
    if not forget:
        raise ValueError(f"training records must hold class {label}, got none of it")
    parts = [
        [record for record in records if int(record["labels"]) != label]
        for records in (split.train, split.validation, split.test)
    ]
    return Forgetting(f"all {len(forget)} training records of class {label}", forget, *parts)


def digest(*parts: bytes) -> str:
    """One sha256 of several contents, in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()
