"""The data and the models that experiments run on."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    ViTConfig,
)

from pymape.batching import PaddingCollator, bare_record
from pymape.digits import load_digits, small_vit
from pymape.experiments.config import SettingConfig, TaskConfig
from pymape.metrics import QuestionSet

__all__ = ["Forgetting", "Split", "Task", "forgetting", "make_task", "train"]

Record = dict[str, Any]

_VALIDATION = 0.2  # of the training records, where the test records are given apart


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
        tokenizer: of texts; None for images.
        questions: what is forgotten -> questions about it and about the rest, in TOFU's form, by the names of
            `tofu_metrics`; None where there are none.
    """

    classes: int
    fingerprint: str
    split: Callable[[int], Split]
    start: Callable[[int], PreTrainedModel]
    tokenizer: Any = None
    questions: Callable[[Forgetting], dict[str, QuestionSet]] | None = None


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


def make_task(config: TaskConfig) -> Task:
    """The task that a configuration names.

    Raises:
        ValueError: data that is missing, or options that the task does not have.
    """
    maker, needed = {
        "digits": (_digits, ()),
        "arrays": (_arrays, ("data",)),
        "folder": (_folder, ("data",)),
        "table": (_table, ("data", "model")),
    }[config.name]
    given = {name: getattr(config, name) for name in needed}
    for name, value in given.items():
        if value is None or not Path(value).exists():
            raise ValueError(f"task.{name} must be an existing path for task {config.name!r}, got {value!r}")
    try:
        return maker(**given, **config.options)  # type: ignore[operator]
    except TypeError as error:
        raise ValueError(f"task.options must fit task {config.name!r}: {error}") from error


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


def train(model: PreTrainedModel, records: list[Record], config: TaskConfig, seed: int) -> float:
    """Train in place on one thread of control, in the order of the seed; returns the seconds that it took.

    AdamW with a one-cycle learning rate.
    """
    started = time.perf_counter()
    collate = PaddingCollator(getattr(model.config, "pad_token_id", None) or 0)
    rows = [bare_record(record) for record in records]
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        model.train()
        for _ in range(config.epochs):
            for chosen in torch.randperm(len(rows), generator=order).split(config.batch_size):
                optimizer.zero_grad()
                model(**collate([rows[row] for row in chosen.tolist()])).loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()
    return time.perf_counter() - started


def _digits(**options: Any) -> Task:
    """scikit-learn's digits: 60 % training, 16 % validation, 24 % test."""
    images, labels = load_digits()
    return _image_task(images, labels, None, None, **options)


def _arrays(data: str, **options: Any) -> Task:
    """Images in an npz file: uint8 [N, H, W, C] `train_x` and `test_x`, integer [N] `train_y` and `test_y`."""
    with np.load(data, allow_pickle=False) as arrays:
        parts = {name: arrays[name] for name in ("train_x", "train_y", "test_x", "test_y")}
    images = [_scaled(parts[name]) for name in ("train_x", "test_x")]
    labels = [torch.tensor(parts[name], dtype=torch.long) for name in ("train_y", "test_y")]
    return _image_task(images[0], labels[0], images[1], labels[1], **options)


def _folder(data: str, size: int = 32, **options: Any) -> Task:
    """One folder of images a class, scaled to `size` x `size`: 60 % training, 16 % validation, 24 % test."""
    from PIL import Image

    names = sorted(path.name for path in Path(data).iterdir() if path.is_dir())
    if len(names) < 2:
        raise ValueError(f"task.data must hold a folder of images for each of at least two classes, got {names}")
    pixels, labels = [], []
    for label, name in enumerate(names):
        for path in sorted(path for path in (Path(data) / name).iterdir() if path.is_file()):
            with Image.open(path) as image:
                pixels.append(np.asarray(image.convert("RGB").resize((size, size))))
            labels.append(label)
    return _image_task(_scaled(np.stack(pixels)), torch.tensor(labels), None, None, **options)


def _scaled(pixels: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] -> fp32 [N, C, H, W] in [-1, 1]."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _image_task(
    images: Tensor, labels: Tensor, test_images: Tensor | None, test_labels: Tensor | None, **model: Any
) -> Task:
    """A small ViT from scratch on images; without test images they are split off anew for each seed.

    Args:
        images: [N, C, H, H] fp32.
        labels: [N] in [0, classes).
        test_images: the same for the test.
        test_labels: theirs.
        model: options of `small_vit`.
    """
    from sklearn.model_selection import train_test_split

    classes = int(labels.max()) + 1
    shape = {"image_size": images.shape[-1], "num_channels": images.shape[1], "num_labels": classes}
    unknown = sorted(set(model) - set(ViTConfig().to_dict()))
    if unknown:
        raise ValueError(f"task.options must be arguments of ViTConfig, got {', '.join(unknown)}")

    def records(kind: str, rows: Sequence[int], source: Tensor, targets: Tensor) -> list[Record]:
        return [{"id": f"{kind}-{row:05}", "pixel_values": source[row], "labels": targets[row]} for row in rows]

    def split(seed: int) -> Split:
        def divide(rows: Sequence[int], share: float) -> tuple[list[int], list[int]]:
            return train_test_split(rows, test_size=share, random_state=seed, stratify=labels[list(rows)].numpy())

        everything = range(len(labels))
        if test_images is not None and test_labels is not None:
            kept, validation = divide(everything, _VALIDATION)
            test = records("test", range(len(test_labels)), test_images, test_labels)
        else:
            kept, rest = divide(everything, 0.4)
            validation, last = divide(rest, 0.6)
            test = records("image", last, images, labels)
        return Split(records("image", kept, images, labels), records("image", validation, images, labels), test)

    def start(seed: int) -> PreTrainedModel:
        return small_vit(seed, **{**shape, **model})

    tensors = [tensor for tensor in (images, labels, test_images, test_labels) if tensor is not None]
    return Task(classes, _digest(*(tensor.numpy().tobytes() for tensor in tensors)), split, start)


def _table(
    data: str,
    model: str,
    train: str = "train.tsv",
    test: str = "dev.tsv",
    text: str | int = "text",
    pair: str | int | None = None,
    label: str | int = "label",
    header: bool = True,
    max_length: int = 64,
    records: int | None = None,
) -> Task:
    """Texts, or pairs of texts, with a label, and a pretrained encoder that gets a new task head.

    Args:
        data: folder of the files.
        model: folder of the encoder and its tokenizer.
        train: csv or tsv file (gzipped with .gz); a fifth of it, drawn by the seed, is for validation.
        test: the same for the test.
        text: name of the column, or its number where there is no header.
        pair: column of the second text.
        label: column of the label; names are numbered in alphabetical order.
        header: whether the first line names the columns.
        max_length: tokens to cut texts to.
        records: draw so many of the training file, by the seed, before anything else; None takes all.
    """
    from sklearn.model_selection import train_test_split

    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tables = [_read(Path(data) / name, header) for name in (train, test)]
    columns = [name for name in (text, pair, label) if name is not None]
    for name, table in zip((train, test), tables, strict=True):
        missing = [column for column in columns if column not in table.columns]
        if missing:
            raise ValueError(f"{name} must have the columns {columns}, got none named {missing[0]!r}")
    names = sorted(set(tables[0][label]))
    places = {name: place for place, name in enumerate(names)}

    def read(kind: str, table: Any) -> list[Record]:
        unknown = sorted(set(table[label]) - set(names))
        if unknown:
            raise ValueError(f"{kind} labels must be among {names}, got {unknown[0]!r}")
        second = None if pair is None else list(table[pair])
        encoded = tokenizer(list(table[text]), second, truncation=True, max_length=max_length)
        return [
            {"id": f"{kind}-{row:06}", **{key: encoded[key][row] for key in encoded}, "labels": places[name]}
            for row, name in enumerate(table[label])
        ]

    source, judged = read("train", tables[0]), read("test", tables[1])
    targets = [record["labels"] for record in source]

    def split(seed: int) -> Split:
        rows = list(range(len(source)))
        if records is not None and records < len(rows):
            rows, _ = train_test_split(rows, train_size=records, random_state=seed, stratify=targets)
        kept, validation = train_test_split(
            rows, test_size=_VALIDATION, random_state=seed, stratify=[targets[row] for row in rows]
        )
        return Split([source[row] for row in kept], [source[row] for row in validation], judged)

    def start(seed: int) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForSequenceClassification.from_pretrained(
                model, local_files_only=True, num_labels=len(names)
            )

    files = [Path(data) / train, Path(data) / test, *sorted(path for path in Path(model).iterdir() if path.is_file())]
    return Task(len(names), _digest(*(path.read_bytes() for path in files)), split, start)


def _read(path: Path, header: bool) -> Any:
    import csv

    import pandas as pd

    if not path.is_file():
        raise ValueError(f"task.data must hold the file {path.name}, got none in {str(path.parent)!r}")
    tabs = ".tsv" in path.suffixes
    # In tab-separated files quotation marks are part of the text.
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    return pd.read_csv(
        path, sep="\t" if tabs else ",", header=0 if header else None, quoting=quoting, dtype=str, keep_default_na=False
    )


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
