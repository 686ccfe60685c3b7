"""SISA on the base, the adapters and the training options of S3T: what S3T is compared with."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from pymape.model_layout import find_layers
from pymape.s3t.adapters import layers_per_slice
from pymape.s3t.config import S3TConfig
from pymape.s3t.frozen_base import base_hash, load_base
from pymape.s3t.stages import StageKey, unpack_stage
from pymape.s3t.training import Rows, StageJob, train_stage

__all__ = ["SisaShard", "one_group", "split_rows", "train_plain", "train_sisa"]


@dataclass(frozen=True)
class SisaShard:
    """A shard of SISA: one order of its slices, and the checkpoint after each of them.

    A deletion loses the checkpoints from the record's slice on. A shard that lost a record of its first slice is dead.

    Args:
        slices: names of each slice's records.
        checkpoints: as many files; each is trained on the records of its own slice and of all before it.

    Source: Bourtoule et al. 2021, Machine Unlearning, section IV. Their code identifies a checkpoint by the records of
    whole slices of floor(n / L) records, so that one which has seen a deleted record of the remainder stays in use.
    """

    slices: tuple[tuple[str, ...], ...]
    checkpoints: tuple[bytes, ...]

    def depth(self, deleted: Collection[str]) -> int:
        """Number of checkpoints that have seen none of these records; 0 is a dead shard.

        Raises:
            ValueError: a record that is not in this shard.
        """
        slice_of = {name: part for part, names in enumerate(self.slices) for name in names}
        for name in deleted:
            if name not in slice_of:
                raise ValueError(f"deleted must name records of the shard, got {name!r}")
        return min((slice_of[name] for name in deleted), default=len(self.slices))

    def serve(self, deleted: Collection[str]) -> dict[str, Tensor] | None:
        """Tensors of the last checkpoint that has seen none of these records, or None from a dead shard.

        They are a stage of a system with the options `one_group`, which `Ensemble` serves.

        Raises:
            ValueError: a record that is not in this shard.
        """
        depth = self.depth(deleted)
        return unpack_stage(self.checkpoints[depth - 1])[0] if depth else None

    @property
    def size(self) -> int:
        """Bytes of all checkpoints."""
        return sum(map(len, self.checkpoints))


def one_group(config: S3TConfig) -> S3TConfig:
    """The options under which one stage trains, at once, all g L layers that S3T trains slice by slice."""
    layers = len(find_layers(load_base(config.model, config.labels)))
    size = config.slices * layers_per_slice(config, layers)
    return dataclasses.replace(config, slices=1, sequences=1, method="cyclic", prior=None, layers_per_slice=size)


def split_rows(rows: Rows, slices: int, seed: int) -> list[Rows]:
    """Deal records out at random to slices whose sizes differ by one at most.

    Raises:
        ValueError: fewer records than slices.
    """
    if not 1 <= slices <= len(rows):
        raise ValueError(f"slices must lie in [1, {len(rows)}], the number of records, got {slices}")
    order = random.Random(seed).sample(rows, len(rows))
    return [tuple(order[part::slices]) for part in range(slices)]


def train_plain(config: S3TConfig, rows: Rows, *, shard: int = 0, cache: str | None = None) -> bytes:
    """Train ordinary LoRA, in all g L layers at once, and the task head.

    Args:
        config: of the S3T system that it is compared with.
        rows: (record name, encoded record) of the records.
        shard: that they belong to; the seed depends on it.
        cache: folder of a `PrefixCache`, or None.

    Returns:
        A stage's file, of a system with the options `one_group`.

    Raises:
        ValueError: as `train_stage`.
    """
    return train_sisa(config, [rows], shard=shard, cache=cache).checkpoints[0]


def train_sisa(config: S3TConfig, slices: Sequence[Rows], *, shard: int = 0, cache: str | None = None) -> SisaShard:
    """Train a shard of SISA: every checkpoint goes on from the one before, with a fresh optimizer and `config.stage`.

    Args:
        config: of the S3T system that it is compared with; how many slices that has only tells which layers to train.
        slices: of SISA, as `split_rows` gives them: (record name, encoded record) of each record.
        shard: which one; the seeds depend on it.
        cache: folder of a `PrefixCache`, or None.

    Raises:
        ValueError: as `train_stage`.
    """
    options, base = one_group(config), base_hash(config.model, config.labels)
    checkpoints: list[bytes] = []
    for number in range(len(slices)):
        key = StageKey(shard, (number,))
        rows = tuple(row for part in slices[: number + 1] for row in part)
        before = checkpoints[-1] if checkpoints else None
        checkpoints.append(train_stage(StageJob.of(options, key, base, [rows], cache=cache, begin=before)))
    return SisaShard(tuple(tuple(name for name, _ in part) for part in slices), tuple(checkpoints))
