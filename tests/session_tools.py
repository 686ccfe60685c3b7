"""A tiny model, records and options for sessions."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import torch
from model_zoo import tiny_model

from pymape.config import DataConfig, MaskConfig, UnlearnConfig
from pymape.masks import ModuleMasks
from pymape.model_layout import layout

WORDS = [f"w{number}" for number in range(40)]
REQUESTS = {"first": ["r1", "r5", "r9"], "second": ["r2", "r6"], "third": ["r0", "r23"]}


def write_files(folder: Path, family: str = "bert", records: int = 24) -> None:
    """Write `model`, `train.csv` and `test.csv`."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tiny_model(family, max_position_embeddings=128).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "model"
    )
    draw = random.Random(0)
    for name, count in (("train", records), ("test", 10)):
        rows = [(f"r{row}", " ".join(draw.choices(WORDS, k=draw.randint(3, 8))), row % 3) for row in range(count)]
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("id", "text", "label"), *rows])


def upper_masks() -> ModuleMasks:
    """Some modules of the model's upper layer."""
    shape = layout(tiny_model("bert", max_position_embeddings=128))
    heads, filters = (torch.zeros(shape.layers, width, dtype=torch.bool) for width in (shape.heads, shape.filters))
    heads[1, ::2] = filters[1, ::3] = True
    return ModuleMasks(heads, filters, shape)


def options(files: Path, **changes: Any) -> UnlearnConfig:
    """Options of a request that takes a fraction of a second."""
    defaults: dict[str, Any] = {
        "model": str(files / "model"),
        "data": DataConfig(str(files / "train.csv"), importance_samples=12),
        "masks": MaskConfig(budget=0.5),
        "lr": 1e-2,
        "batch_size": 8,
    }
    return UnlearnConfig(**(defaults | changes))
