"""The shards of records that experiments with S3T run on, each with the frozen base model that it is trained on."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, ViTConfig, ViTForImageClassification

__all__ = ["Data", "digits", "sst2"]

Record = dict[str, Any]

_CLASSES = 10
_VIT: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": _CLASSES,
}
_BASE_EPOCHS, _BASE_BATCH, _BASE_LR = 40, 32, 1e-3


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
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()
    images = torch.tensor(source.images / 8 - 1, dtype=torch.float32)[:, None]  # [N, 1, 8, 8] in [-1, 1]

    def split(rows: Any, share: float) -> list[list[int]]:
        return train_test_split(rows, test_size=share, random_state=seed, stratify=source.target[rows])

    train, rest = split(list(range(len(images))), 0.4)
    validation, test = split(rest, 0.6)
    shard, public = split(train, 0.3)
    folder = work / f"digits-base-{seed}"
    if not folder.exists():
        _pretrain(images[public], torch.tensor(source.target[public]), seed, folder)

    def records(rows: list[int]) -> list[Record]:
        return [
            {"id": f"digit-{row:04}", "pixel_values": images[row], "labels": int(source.target[row])} for row in rows
        ]

    return Data(str(folder), _CLASSES, records(shard), records(validation), records(test))


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


def _pretrain(images: torch.Tensor, labels: torch.Tensor, seed: int, folder: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTForImageClassification(ViTConfig(**_VIT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=_BASE_LR)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(_BASE_EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(_BASE_BATCH):
            optimizer.zero_grad()
            model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
    model.vit.save_pretrained(folder)
