"""What a stage is called, what it was made from, and the file that holds it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pymape.data.records import bare_record

__all__ = [
    "Provenance",
    "StageKey",
    "decode_row",
    "encode_row",
    "pack_stage",
    "row_digest",
    "slice_digest",
    "unpack_stage",
]

FORMAT = "pymape.stage.1"
_METADATA = "pymape"  # one entry: safetensors writes several in no fixed order
_NAME = re.compile(r"shard(\d{2,})-(\d+(?:\.\d+)*)-g(\d+)")


@dataclass(frozen=True, order=True)
class StageKey:
    """Which stage of a system.

    Args:
        shard: of the data.
        prefix: the slices that it is trained on, in the order in which its chain took them up; never empty.
        generation: 0, or how often the shard had been repaired when the stage was planned.
    """

    shard: int
    prefix: tuple[int, ...]
    generation: int = 0

    def __post_init__(self) -> None:
        if not self.prefix or len(set(self.prefix)) != len(self.prefix):
            raise ValueError(f"prefix must hold one or more different slices, got {self.prefix}")

    @property
    def depth(self) -> int:
        """Number of stages in the chain that ends here."""
        return len(self.prefix)

    @property
    def name(self) -> str:
        """Name for people and the stem of the file."""
        return f"shard{self.shard:02d}-{'.'.join(map(str, self.prefix))}-g{self.generation}"

    @classmethod
    def parse(cls, name: str) -> StageKey:
        """Read a name back.

        Raises:
            ValueError: it names no stage.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"name must be a stage's, for instance 'shard02-3.0.1-g0', got {name!r}")
        shard, prefix, generation = found.groups()
        return cls(int(shard), tuple(map(int, prefix.split("."))), int(generation))


@dataclass(frozen=True)
class Provenance:
    """What a stage was made from. Two stages of one provenance, made in one environment, hold the same bits.

    But for the order of the records in a slice: it is that of ingest, which the ledger keeps and a provenance does not.

    Args:
        key: which stage.
        base: `pymape.s3t.frozen_base.base_hash` of the frozen base.
        config: `pymape.s3t.training.config_digest` of the options.
        seed: of everything random.
        parent: sha256 of the file of the stage before it in the chain; None for a root.
        records: slice -> `slice_digest` of its records, for every slice of the prefix.
        environment: versions, threads and processor of the training; empty in what a stage is expected to be.
    """

    key: StageKey
    base: str
    config: str
    seed: int
    parent: str | None
    records: dict[int, str]
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.records) != set(self.key.prefix):
            raise ValueError(f"records must cover the slices {sorted(self.key.prefix)}, got {sorted(self.records)}")

    def to_json(self) -> str:
        """One line, the same for equal provenances."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """Read `to_json` back.

        Raises:
            ValueError: it is no provenance.
        """
        try:
            content = json.loads(text)
            key = content.pop("key")
            content["key"] = StageKey(key["shard"], tuple(key["prefix"]), key["generation"])
            content["records"] = {int(part): digest for part, digest in content["records"].items()}
            return cls(**content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"provenance must be one that this version wrote, got {error}") from error

    def difference(self, other: Provenance) -> str | None:
        """Name of the first field in which another provenance differs; the environment counts where both have one."""
        for name in ("key", "base", "config", "seed", "parent", "records"):
            if getattr(self, name) != getattr(other, name):
                return name
        both = self.environment and other.environment
        return "environment" if both and self.environment != other.environment else None


def row_digest(content: bytes) -> str:
    """sha256 of an encoded record."""
    return hashlib.sha256(content).hexdigest()


def slice_digest(rows: Iterable[tuple[str, str]]) -> str:
    """sha256 over the records of a slice, whatever their order.

    Args:
        rows: (record name, `row_digest`) of every record.
    """
    hasher = hashlib.sha256()
    for name, digest in sorted(rows):
        hasher.update(f"{name} {digest}\n".encode())
    return hasher.hexdigest()


def pack_stage(tensors: Mapping[str, Tensor], provenance: Provenance) -> bytes:
    """A stage's file: safetensors with the provenance as metadata. The same input gives the same bytes."""
    metadata = json.dumps({"format": FORMAT, "provenance": json.loads(provenance.to_json())}, sort_keys=True)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(plain, {_METADATA: metadata})


def unpack_stage(
    content: bytes, sha256: str | None = None, provenance: Provenance | None = None, name: str = "stage"
) -> tuple[dict[str, Tensor], Provenance]:
    """Read a stage's file.

    Args:
        content: the file's bytes.
        sha256: what they must hash to.
        provenance: what it must have been made from; an empty environment fits every one.
        name: for the messages.

    Returns:
        Its tensors and its provenance.

    Raises:
        ValueError: naming the stage and what does not fit.
    """
    actual = hashlib.sha256(content).hexdigest()
    if sha256 is not None and actual != sha256:
        raise ValueError(f"{name} must have sha256 {sha256[:12]}, got a damaged or replaced file with {actual[:12]}")
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        stored = json.loads(json.loads(content[8 : 8 + size]).get("__metadata__", {}).get(_METADATA, "{}"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{name} must be a safetensors file, got a damaged one: {error}") from error
    if stored.get("format") != FORMAT:
        raise ValueError(f"{name} must have format {FORMAT!r}, got {stored.get('format')!r}")
    try:
        found = Provenance.from_json(json.dumps(stored["provenance"]))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{name} must hold its provenance, got a damaged one: {error}") from error
    if provenance is not None:
        field_name = provenance.difference(found)
        if field_name is not None:
            expected, got = getattr(provenance, field_name), getattr(found, field_name)
            raise ValueError(f"{name} must have been made from {field_name} {expected}, got {got}")
    return tensors, found


def encode_row(record: Mapping[str, Any]) -> bytes:
    """A record as training needs it, as safetensors: its numbers, without its id. Equal records give equal bytes.

    Args:
        record: field -> number, list of numbers, array or tensor. Texts are left out, `label` and `label_ids` become
            `labels`; integers are stored as int64, other numbers as fp32, tensors of half precision as they are.

    Raises:
        ValueError: no number in it, or a list that is no array.
    """
    tensors = {}
    for name, value in bare_record(record).items():
        tensor = _tensor(name, value)
        if tensor is not None:
            tensors["labels" if name in ("label", "label_ids") else name] = tensor
    if not tensors:
        raise ValueError(f"record must hold numbers to train on, got the fields {sorted(record)}")
    return save(tensors)


def decode_row(content: bytes) -> dict[str, Tensor]:
    """Read `encode_row` back; fields in the order of their names.

    Raises:
        ValueError: damaged bytes.
    """
    try:
        return dict(sorted(load(content).items()))
    except SafetensorError as error:
        raise ValueError(f"row must be an encoded record, got damaged bytes: {error}") from error


def _tensor(name: str, value: Any) -> Tensor | None:
    """A field's numbers; None where it holds something else."""
    if not isinstance(value, Tensor):
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must be a number or an array, got a list of uneven length") from error
        if array.dtype.kind not in "biuf":
            return None
        value = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    if value.is_floating_point():
        value = value.float() if value.dtype == torch.float64 else value
    else:
        value = value.to(torch.int64)
    return value.detach().cpu().contiguous()
