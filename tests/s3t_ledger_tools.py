"""Ledgers with made-up records and stages: the ledger does not train."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pymape.s3t.ledger import Ledger, RecordRow, StageRow
from pymape.s3t.partition import record_name, subject_name
from pymape.s3t.stages import Provenance, StageKey, pack_stage

BASE = "ba5e" * 16
CYCLIC = [(0, 1, 2, 3), (3, 0, 1, 2), (2, 3, 0, 1), (1, 2, 3, 0)]


def make_ledger(
    folder: Path, *, shards: int = 2, sequences: Sequence[Sequence[int]] = CYCLIC, records: int = 40, **settings: Any
) -> Ledger:
    """A ledger with records "r0", "r1", ..., dealt out to the slices by threes, and all stages planned.

    Three records have a subject: r0 to r2 are about "s0", and so on.
    """
    ledger = Ledger.create(folder, settings, BASE, [sequences] * shards)
    ledger.add_records(make_rows(ledger, records))
    ledger.plan()
    return ledger


def make_rows(ledger: Ledger, records: int) -> Iterator[RecordRow]:
    for number in range(records):
        subject = f"s{number // 3}"
        shard, part = divmod(number // 3 % (len(ledger.sequences) * ledger.slices), ledger.slices)
        content = make_content(number)
        yield RecordRow.of(name_of(ledger, number), subject_name(ledger.key, subject), shard, part, content)


def make_content(number: int) -> bytes:
    """A record's content, with no run of 16 bytes in common with another's; its length is from 32 to 8000 bytes."""
    blocks = (1, 4, 20, 250)[number % 4]
    return b"".join(hashlib.sha256(f"content {number} {block}".encode()).digest() for block in range(blocks))


def name_of(ledger: Ledger, number: int) -> str:
    return record_name(ledger.key, f"r{number}")


def names_in(ledger: Ledger, shard: int, part: int) -> list[str]:
    """Names of the live records of a slice."""
    return [name for name, _ in ledger.records(shard, [part])]


def make_stage(ledger: Ledger, row: StageRow) -> bytes:
    """A file as training makes it, with tensors that depend on its provenance alone."""
    with ledger.snapshot():
        chain = ledger.chain(row.key)
        provenance = Provenance(
            key=row.key,
            base=ledger.base,
            config="c0f1" * 16,
            seed=0,
            parent=chain[-2].sha256 if len(chain) > 1 else None,
            records={part: ledger.slice_digest(row.key.shard, part) for part in row.key.prefix},
        )
    seed = int.from_bytes(hashlib.sha256(provenance.to_json().encode()).digest()[:7])
    values = torch.randn(64, generator=torch.Generator().manual_seed(seed))
    return pack_stage({"lora": values}, provenance)


def land_all(ledger: Ledger) -> int:
    """Train and land all stages that can be; how many."""
    landed = 0
    while rows := ledger.runnable():
        for row in rows:
            landed += ledger.land(row.key, make_stage(ledger, row))
    return landed


def trained_ledger(folder: Path, **options: Any) -> Ledger:
    ledger = make_ledger(folder, **options)
    land_all(ledger)
    return ledger


def record_export(ledger: Ledger, folder: Path, files: Mapping[str, str], stages: Iterable[StageKey]) -> None:
    """Note an export that is there, or is not: path inside the folder -> sha256."""
    with ledger.placing(folder, [{"file": name, "sha256": digest} for name, digest in files.items()], stages):
        pass


def keys(chain: Sequence[StageRow]) -> list[StageKey]:
    return [row.key for row in chain]


def content_of(ledger: Ledger) -> list[str]:
    """Everything in the database, and the names and sizes of the stage files."""
    files = sorted((path.name, path.stat().st_size) for path in (ledger.folder / "stages").iterdir())
    with ledger.snapshot():
        return [*ledger._db._connection.iterdump(), str(files)]


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; closes no database, so the ledger must be closed in this process."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
