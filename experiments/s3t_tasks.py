"""The shards of records that experiments with S3T run on, each with the frozen base model that it is trained on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from pymape.data.digits import CLASSES, digit_records, load_digits
from pymape.s3t.demo import pretrain

__all__ = ["Data", "digits", "sst2"]

Record = dict[str, Any]

_LAYERS, _BASE_EPOCHS = 8, 40


@dataclass(frozen=True)
class Data:
    """What one seed trains and judges with.

    Args:
        model: folder of the frozen base, which gets a new task head.
        labels: number of classes.
        shard: the records that S3T, SISA and plain training learn from, each with an id.
        validation: records that settings are chosen on.
        test: records that models are judged on.
    """

    model: str
    labels: int
    shard: list[Record]
    validation: list[Record]
    test: list[Record]


def digits(seed: int, work: Path) -> Data:
    """scikit-learn's digits: 18 % of the images for the base, 42 % for the shard, 16 % validation, 24 % test.

    Args:
        seed: of the split and of the base, a small ViT whose head is thrown away.
        work: folder that the base is kept in.
    """
    from sklearn.model_selection import train_test_split

    images, labels = load_digits()

    def split(rows: Sequence[int], share: float) -> list[list[int]]:
        return train_test_split(rows, test_size=share, random_state=seed, stratify=labels[list(rows)].numpy())

    train, rest = split(range(len(labels)), 0.4)
    validation, test = split(rest, 0.6)
    shard, public = split(train, 0.3)
    folder = work / f"digits-base-{seed}"
    if not folder.exists():
        base = pretrain(digit_records(images, labels, public), seed, _BASE_EPOCHS, num_hidden_layers=_LAYERS)
        base.vit.save_pretrained(folder)
    parts = (digit_records(images, labels, rows) for rows in (shard, validation, test))
    return Data(str(folder), CLASSES, *parts)


def sst2(model: str, train: str, validation: str, test: str, *, records: int, judged: int) -> Callable[[int], Data]:
    """Sentences and whether they praise.

    Args:
        model: folder of a pretrained encoder and its tokenizer.
        train: file of lines of text TAB label, without a header; each seed draws its shard from it.
        validation: the same.
        test: the same.
        records: size of a shard.
        judged: validate and test on the first so many records of each file.

    Returns:
        seed -> its data.
    """
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)

    def read(path: str) -> list[Record]:
        lines = [line.rsplit("\t", 1) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        tokens = tokenizer([text for text, _ in lines], truncation=True)["input_ids"]
        return [
            {"id": f"line-{number}", "input_ids": ids, "labels": int(label)}
            for number, (ids, (_, label)) in enumerate(zip(tokens, lines, strict=True), start=1)
        ]

    source, chosen, others = read(train), read(validation)[:judged], read(test)[:judged]
    return lambda seed: Data(model, 2, random.Random(seed).sample(source, records), chosen, others)
