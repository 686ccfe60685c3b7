"""What a task is, what it forgets, and the records that models are judged on."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from pymape.data.positions import most_tokens
from pymape.experiments.config import SettingConfig
from pymape.metrics import QuestionSet

__all__ = [
    "JUDGED",
    "VALIDATION",
    "Forgetting",
    "Record",
    "Split",
    "Task",
    "check_max_length",
    "digest",
    "forgetting",
    "read_bytes",
    "selection_score",
    "without_class",
]

Record = dict[str, Any]

JUDGED = ("forget", "retain", "validation")  # sets that the choice of what is tuned looks at
VALIDATION = 0.2  # of the training records, where the test records are given apart
_NAMED = 4  # groups that a description names


@dataclass(frozen=True)
class Split:
    """The records of one seed; all have an id and labels.

    Args:
        train: what the original model is trained on, in the order of the data.
        validation: never trained on; methods are chosen by it.
        test: never trained on; methods are judged by it.
        groups: record id -> group of every training record, where records come in groups.
    """

    train: list[Record]
    validation: list[Record]
    test: list[Record]
    groups: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Forgetting:
    """What one setting of one seed forgets, and what every model is judged on.

    Where a class is forgotten, validation and test records are those of the remaining classes.

    Args:
        description: of what is forgotten.
        forget: all that has been asked to be forgotten.
        retain: the other training records.
        validation, test: see `Split`.
        request: what the last request asks to forget: all of `forget` where there is one.
        of_class: a whole class is forgotten, so that nothing like it is left to know.
    """

    description: str
    forget: list[Record]
    retain: list[Record]
    validation: list[Record]
    test: list[Record]
    request: list[Record]
    of_class: bool = False

    @property
    def sets(self) -> dict[str, list[Record]]:
        return {"forget": self.forget, "retain": self.retain, "validation": self.validation, "test": self.test}


@dataclass(frozen=True)
class Task:
    """Data and model of an experiment.

    Args:
        classes: number of classes; 0 where records have none.
        fingerprint: digest of the data, and of the pretrained model where there is one.
        split: seed -> its records.
        start: seed -> a model with that seed's initial weights.
        tokenizer: of a language model.
        questions: what is forgotten -> sets of questions on "forget" and "retain", as far as there are any, for TOFU's
            figures of a language model.
        facts: what is to be told about the data, by name.
    """

    classes: int
    fingerprint: str
    split: Callable[[int], Split]
    start: Callable[[int], PreTrainedModel]
    tokenizer: Any = None
    questions: Callable[[Forgetting], dict[str, QuestionSet]] | None = None
    facts: Mapping[str, int] = field(default_factory=dict)


def forgetting(
    setting: SettingConfig, seed: int, split: Split, classes: int, requests: int | None = None
) -> Forgetting:
    """Divide a seed's records: a whole class (the seed modulo the number of classes), a random share, or whole groups.

    Args:
        setting: what is forgotten.
        seed: the seed.
        split: its records.
        classes: number of classes.
        requests: how many have been made, at least 1; None for all of the setting's.

    Raises:
        ValueError: nothing would be forgotten or nothing kept, or records without groups.
    """
    if setting.forget == "class":
        return without_class(seed % classes, split)
    if setting.forget == "groups":
        if split.groups is None:
            raise ValueError("records must come in groups where groups are forgotten, got none")
        of = [split.groups[record["id"]] for record in split.train]
        names = list(dict.fromkeys(of))
        groups = _chosen_groups(setting, seed, names)
        chosen = last = {row for row, group in enumerate(of) if group in groups}
        shown = ", ".join(groups[:_NAMED]) + (", ..." if len(groups) > _NAMED else "")
        text = f"all {len(chosen)} training records of {len(groups)} of {len(names)} groups ({shown})"
    else:
        generator = torch.Generator().manual_seed(seed)
        count, requests = max(1, round(setting.share * len(split.train))), requests or setting.requests
        if not count * requests < len(split.train):
            raise ValueError(
                f"share must leave at least one of the {len(split.train)} training records to keep, "
                f"got {setting.share} at each of {requests} requests"
            )
        drawn = torch.randperm(len(split.train), generator=generator)[: count * requests].tolist()
        chosen, last = set(drawn), set(drawn[-count:])
        text = f"{count} random training records ({setting.share:.0%})"
        text = f"{text} at each of {requests} requests" if requests > 1 else text
    forget, request = ([record for row, record in enumerate(split.train) if row in rows] for rows in (chosen, last))
    retain = [record for row, record in enumerate(split.train) if row not in chosen]
    return Forgetting(text, forget, retain, split.validation, split.test, request)


def without_class(label: int, split: Split) -> Forgetting:
    """Divide a seed's records: one class, and all others.

    Raises:
        ValueError: no training record is of that class.
    """
    forget = [record for record in split.train if int(record["labels"]) == label]
    if not forget:
        raise ValueError(f"training records must hold class {label}, got none of it")
    retain, validation, test = (
        [record for record in records if int(record["labels"]) != label]
        for records in (split.train, split.validation, split.test)
    )
    text = f"all {len(forget)} training records of class {label}"
    return Forgetting(text, forget, retain, validation, test, forget, of_class=True)


def selection_score(data: Forgetting, before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """What the choice of what is tuned minimises; neither test records nor the retrained model have a part in it.

    |A_forget - target| + |A_retain - A_retain(original)| + |A_val - A_val(original)|, with target 0 for a class and the
    original's validation accuracy for all else: what was never trained on is known as well as validation records are.

    Args:
        data: what is forgotten.
        before: accuracies of the original model by set, in percent.
        after: those of the unlearned model.
    """
    target = 0.0 if data.of_class else before["validation"]
    return abs(after["forget"] - target) + sum(abs(after[name] - before[name]) for name in ("retain", "validation"))


def check_max_length(kind: Any, folder: str, max_length: int) -> None:
    """Refuse texts longer than a model's learned positions hold; no weights are read.

    Args:
        kind: transformers' Auto class of the model.
        folder: of the model.
        max_length: tokens to cut texts to.
    """
    with torch.device("meta"):
        most = most_tokens(kind.from_config(AutoConfig.from_pretrained(folder, local_files_only=True)))
    if most is not None and max_length > most:
        raise ValueError(f"max_length must be at most {most} for this model, got {max_length}")


def digest(*parts: bytes) -> str:
    """One sha256 of several contents, in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()


def read_bytes(path: Path) -> bytes:
    """Content of a file, unpacked if its name ends in .gz.

    Raises:
        ValueError: there is no such file, or it is no gzip file.
    """
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise ValueError(f"task.data must be readable, got {str(path)!r}: {error}") from error


def _chosen_groups(setting: SettingConfig, seed: int, names: list[str]) -> list[str]:
    """The groups to forget, in the order of the data."""
    if not setting.groups < len(names):
        raise ValueError(f"groups must leave at least one of the {len(names)} to keep, got {setting.groups}")
    if setting.which == "last":
        return names[-setting.groups :]
    generator = torch.Generator().manual_seed(seed)
    return [names[place] for place in torch.randperm(len(names), generator=generator)[: setting.groups].sort().values]
