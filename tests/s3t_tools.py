"""Tiny base models on disk, records that fit them, and options and stages of S3T systems on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from model_zoo import VISION, tiny_batch, tiny_model
from torch import Tensor

from pymape.s3t.config import LoraConfig, S3TConfig, StageConfig
from pymape.s3t.frozen_base import base_hash
from pymape.s3t.stages import StageKey, encode_row, unpack_stage
from pymape.s3t.training import StageJob, train_stage

LENGTH = 8  # tokens of a text, padding included
FAMILIES = ("bert", "roberta", "distilbert", "modernbert", "vit", "gpt2", "llama", "phi3")
SEQUENCE = (2, 0, 3, 1)

Slices = list[list[Mapping[str, Any]]]

_DEPTH = {"distilbert": "n_layers", "gpt2": "n_layer"}
_WIDTH = {"distilbert": "hidden_dim", "gpt2": "n_inner"}


def write_base(folder: Path, family: str = "bert", *, layers: int = 4, seed: int = 0, **options: Any) -> str:
    """Write a seeded base model with its task head; return its folder.

    32 filters, so that every token's lie in whole vector registers: of 25, torch computes some by scalar code, which
    ones depends on the row of the batch, and its SiLU then rounds differently.
    """
    shape = {_DEPTH.get(family, "num_hidden_layers"): layers, _WIDTH.get(family, "intermediate_size"): 32}
    tiny_model(family, seed=seed, **(shape | options)).save_pretrained(folder)
    return str(folder)


def make_records(family: str = "bert", count: int = 12, *, seed: int = 0) -> list[dict[str, Any]]:
    """Records "r0", "r1", ... as dicts of lists; texts are 3 to `LENGTH` tokens long."""
    batch = tiny_batch(family, batch=count, seed=seed, length=LENGTH)
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, LENGTH + 1, (count,), generator=draw).tolist()
    rows = []
    for row, length in enumerate(lengths):
        record: dict[str, Any] = {"id": f"r{row}"}
        for name, values in batch.items():
            per_token = family not in VISION and values.dim() == 2
            record[name] = (values[row, :length] if per_token else values[row]).tolist()
        rows.append(record)
    return rows


def options(model: str, **changes: Any) -> S3TConfig:
    """Options of a system whose stages take a fraction of a second."""
    settings: dict[str, Any] = {
        "shards": 2,
        "slices": 4,
        "lora": LoraConfig(r=2, alpha=4.0),
        "stage": StageConfig(epochs=2, lr=1e-2, batch_size=4, max_length=LENGTH),
    }
    return S3TConfig(model, **(settings | changes))


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two dicts of tensors are equal bit by bit."""

    def content(tensor: Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
        return tensor.dtype, tensor.shape, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return one.keys() == other.keys() and all(content(value) == content(other[name]) for name, value in one.items())


def parts(records: Sequence[Mapping[str, Any]], slices: int = 4) -> list[list[Mapping[str, Any]]]:
    """Records dealt out to slices in turn."""
    return [list(records[part::slices]) for part in range(slices)]


def setting(folder: Path, family: str = "bert", **changes: Any) -> tuple[S3TConfig, Slices]:
    """Options and slices of 5, 5, 4 and 4 records: none fills its batches of 4, or all alike."""
    return options(write_base(folder / "base", family), **changes), parts(make_records(family, 18))


def tensors_of(files: Sequence[bytes]) -> list[dict[str, Tensor]]:
    return [unpack_stage(file)[0] for file in files]


def make_job(
    config: S3TConfig,
    key: StageKey,
    slices: Sequence[Sequence[Mapping[str, Any]]],
    parents: Sequence[bytes] = (),
    *,
    base: str | None = None,
    cache: Path | None = None,
) -> StageJob:
    """A job for a stage on the slices' records, whose ids serve as their names."""
    rows = [tuple((str(record["id"]), encode_row(record)) for record in slices[part]) for part in key.prefix]
    base = base or base_hash(config.model, config.labels)
    return StageJob.of(config, key, base, rows, parents, None if cache is None else str(cache))


def train_chain(
    config: S3TConfig,
    sequence: Sequence[int],
    slices: Sequence[Sequence[Mapping[str, Any]]],
    *,
    shard: int = 0,
    generation: int = 0,
    cache: Path | None = None,
    parents: Sequence[bytes] = (),
) -> list[bytes]:
    """Files of all stages of a sequence, root first, as they follow upon `parents`."""
    base, files = base_hash(config.model, config.labels), list(parents)
    for depth in range(len(files) + 1, len(sequence) + 1):
        key = StageKey(shard, tuple(sequence[:depth]), generation)
        files.append(train_stage(make_job(config, key, slices, files, base=base, cache=cache)))
    return files
