"""The records of a ledger: added once, read by slice, found by name."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from pymape.s3t.ledger.audit import AuditEntry, AuditLog
from pymape.s3t.ledger.database import Database
from pymape.s3t.stages import row_digest, slice_digest

__all__ = ["FoundRecord", "LedgerRecords", "RecordRow"]

_CHUNK = 1000
_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RecordRow:
    """A record as the ledger takes it.

    Args:
        name: keyed hash of its id (`partition.record_name`).
        subject: keyed hash of the id of whom it is about (`partition.subject_name`), or None.
        shard: where it belongs.
        slice: of that shard.
        digest: `stages.row_digest` of the content.
        content: the encoded record, without its id.
        label: what the caller calls it in errors, and nowhere else; default: the name.
    """

    name: str
    subject: str | None
    shard: int
    slice: int
    digest: str
    content: bytes
    label: str | None = None

    @classmethod
    def of(
        cls, name: str, subject: str | None, shard: int, slice: int, content: bytes, label: str | None = None
    ) -> RecordRow:
        """The row of a record, with the digest of its content."""
        return cls(name, subject, shard, slice, row_digest(content), content, label)

    @property
    def shown(self) -> str:
        """The record in errors."""
        return self.name if self.label is None else self.label


@dataclass(frozen=True)
class FoundRecord:
    """Where a record is.

    Args:
        record: its row.
        name: keyed hash of its id.
        shard: where it belongs.
        slice: of that shard.
        size: bytes of its content.
        request: name of the request that deleted it; None where it is live.
    """

    record: int
    name: str
    shard: int
    slice: int
    size: int
    request: str | None


class LedgerRecords:
    """The part of `Ledger` that holds records, and what every part needs."""

    _db: Database
    _audit: AuditLog
    sequences: list[list[tuple[int, ...]]]

    def _start_records(self) -> None:
        self._digests: dict[tuple[int, int], str] = {}  # of slices
        self._digests_version = 0

    def snapshot(self) -> AbstractContextManager[None]:
        """A block in which what is read fits together: no request is accepted meanwhile."""
        return self._db.snapshot()

    def replaced(self) -> bool:
        """Whether another ledger lies in the folder by now than the one that was opened, or none."""
        return self._db.replaced()

    def audit_log(self) -> list[AuditEntry]:
        """All rows of the audit log."""
        return self._audit.entries()

    def version(self) -> int:
        """Another number whenever somebody else has committed a change, in this process or another."""
        return int(self._db.value("PRAGMA data_version"))

    @property
    def slices(self) -> int:
        """Number of slices of a shard."""
        return len(self.sequences[0][0])

    @property
    def deleted(self) -> int:
        """Number of records that requests have deleted."""
        return int(self._db.value("SELECT count(*) FROM tombstones"))

    def add_records(self, rows: Iterable[RecordRow]) -> tuple[int, int]:
        """Add records, all or none.

        Args:
            rows: the records. Their order within a slice is the order of training.

        Returns:
            Number of records added, and of those that were there already, with the same content.

        Raises:
            ValueError: a record repeated, deleted, known with another content, place or subject, out of range, or new
                although a stage has been trained.
        """
        added = there = 0
        seen: set[str] = set()
        source = iter(rows)
        with self._refused_leaves_no_log(), self._change("ingest"):
            closed = bool(self._db.value("SELECT count(*) FROM files"))
            while chunk := list(islice(source, _CHUNK)):
                known = self._known(chunk)
                new = []
                for row in chunk:
                    self._check_row(row)
                    if row.name in seen:
                        raise ValueError(f"records must not repeat a name, got {row.shown!r} twice")
                    seen.add(row.name)
                    if row.name in known:
                        _check_same(row, *known[row.name])
                        there += 1
                        continue
                    if closed:
                        raise ValueError(f"records must be added before a stage is trained, got {row.shown!r} after")
                    new.append(row)
                self._insert(new)
                added += len(new)
            if added:
                self._audit.append("records added", records=added)
                self._forget_digests()
        if added:
            with contextlib.suppress(ValueError):  # a log as large as the data is slow, but no reason to fail
                self._db.erase_log()
        return added, there

    def counts(self) -> list[list[int]]:
        """Number of live records of every slice of every shard."""
        counts = [[0] * self.slices for _ in self.sequences]
        for shard, part, count in self._db.rows(
            f"SELECT shard, slice, count(*) FROM records r WHERE {_LIVE} GROUP BY shard, slice"
        ):
            counts[shard][part] = count
        return counts

    def records(self, shard: int, slices: Sequence[int]) -> list[tuple[str, bytes]]:
        """Names and contents of live records.

        Args:
            shard: number of the shard.
            slices: of that shard.

        Returns:
            (name, content), slice by slice in the given order, in the order of ingest within each.

        Raises:
            ValueError: naming a record whose content is not what was added.
        """
        found = []
        with self._db.snapshot():
            for part in slices:
                for name, digest, content in self._db.rows(
                    "SELECT name, digest, content FROM records r JOIN contents USING (record) "
                    f"WHERE shard = ? AND slice = ? AND {_LIVE} ORDER BY record",
                    (shard, part),
                ):
                    if row_digest(content) != digest.hex():
                        raise ValueError(f"record {name.hex()} must have the content that was added, got another one")
                    found.append((name.hex(), content))
        return found

    def slice_digest(self, shard: int, part: int) -> str:
        """sha256 over the names and digests of a slice's live records (`stages.slice_digest`)."""
        with self._db.lock:
            version = 0 if self._db.write else self.version()
            if version != self._digests_version:
                self._digests.clear()
                self._digests_version = version
            digest = self._digests.get((shard, part))
            if digest is None:
                rows = self._db.rows(
                    f"SELECT name, digest FROM records r WHERE shard = ? AND slice = ? AND {_LIVE}", (shard, part)
                )
                digest = slice_digest((name.hex(), content.hex()) for name, content in rows)
                self._digests[shard, part] = digest
            return digest

    def names_of_subject(self, subject: str) -> list[str]:
        """Names of the live records of one person, in the order of ingest.

        Reads all rows: an index of subjects would keep copies of what has to be erased.

        Args:
            subject: keyed hash of the person's id.
        """
        rows = self._db.rows(f"SELECT name FROM records r WHERE subject = ? AND {_LIVE}", (_bytes(subject, "subject"),))
        return [name.hex() for (name,) in rows]

    def locate(self, names: Sequence[str]) -> dict[str, FoundRecord]:
        """Find records by name; unknown names are left out."""
        rows = self._db.rows_in(
            "SELECT r.record, r.name, r.shard, r.slice, r.size, q.name FROM records r "
            "LEFT JOIN tombstones t ON t.record = r.record LEFT JOIN requests q ON q.request = t.request "
            "WHERE r.name IN ({})",
            [_bytes(name, "names") for name in names],
        )
        found = (FoundRecord(record, name.hex(), *place) for record, name, *place in rows)
        return {record.name: record for record in found}

    def require_live(
        self, names: Sequence[str], labels: Sequence[str] | None = None, request: str | None = None
    ) -> list[FoundRecord]:
        """Find records that can be deleted.

        Args:
            names: keyed hashes of their ids.
            labels: what the caller calls them in errors; default: the names.
            request: records that this request has deleted will do too.

        Returns:
            The records, in order.

        Raises:
            ValueError: naming the first that is unknown, repeated or deleted.
        """
        labels = names if labels is None else labels
        found, seen = self.locate(names), set()
        for name, label in zip(names, labels, strict=True):
            if name not in found:
                raise ValueError(f"ids must be those of records in the ledger, got {label!r}, which is unknown")
            if name in seen:
                raise ValueError(f"ids must not repeat a record, got {label!r} twice")
            seen.add(name)
            by = found[name].request
            if by is not None and by != request:
                raise ValueError(f"ids must be those of records not deleted yet, got {label!r}, deleted by {by!r}")
        return [found[name] for name in names]

    @contextmanager
    def _refused_leaves_no_log(self) -> Iterator[None]:
        """A block after whose error the log holds nothing of what was rolled back."""
        try:
            yield
        except BaseException:
            if self._db.write:
                with contextlib.suppress(ValueError, OSError):  # closing the ledger tries again
                    self._db.erase_log()
            raise

    def _forget_digests(self) -> None:
        with self._db.lock:
            self._digests.clear()

    @contextmanager
    def _change(self, name: str) -> Iterator[None]:
        """A transaction, after which the audit log's anchor is brought up to it."""
        with self._db.lock:
            with self._db.transaction(name):
                yield
            self.move_anchor()

    def move_anchor(self) -> None:
        """Bring the anchor of the audit log up to its last row, if it can be written.

        What was committed stays: an error here would deny it. The anchor may lag; the next change moves it.
        """
        with self._db.lock, contextlib.suppress(OSError):
            self._audit.anchor()

    def _known(self, chunk: Sequence[RecordRow]) -> dict[str, tuple[Any, ...]]:
        rows = self._db.rows_in(
            "SELECT r.name, r.digest, r.shard, r.slice, r.subject, q.name FROM records r "
            "LEFT JOIN tombstones t ON t.record = r.record LEFT JOIN requests q ON q.request = t.request "
            "WHERE r.name IN ({})",
            [_bytes(row.name, "record name") for row in chunk],
        )
        return {name.hex(): tuple(rest) for name, *rest in rows}

    def _check_row(self, row: RecordRow) -> None:
        if not (0 <= row.shard < len(self.sequences) and 0 <= row.slice < self.slices):
            raise ValueError(
                f"records must lie in {len(self.sequences)} shards of {self.slices} slices, "
                f"got slice {row.slice} of shard {row.shard}"
            )
        if row_digest(row.content) != row.digest:
            raise ValueError(f"digest of record {row.name} must be the sha256 of its content, got {row.digest!r}")

    def _insert(self, rows: Sequence[RecordRow]) -> None:
        first = (self._db.value("SELECT max(record) FROM records") or 0) + 1
        self._db.run_all(
            "INSERT INTO records (record, name, shard, slice, size, subject, digest) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    record,
                    bytes.fromhex(row.name),
                    row.shard,
                    row.slice,
                    len(row.content),
                    None if row.subject is None else _bytes(row.subject, "subject"),
                    bytes.fromhex(row.digest),
                )
                for record, row in enumerate(rows, start=first)
            ],
        )
        self._db.run_all(
            "INSERT INTO contents VALUES (?, ?)",
            [(record, row.content) for record, row in enumerate(rows, start=first)],
        )


_LIVE = "NOT EXISTS (SELECT 1 FROM tombstones t WHERE t.record = r.record)"


def _check_same(
    row: RecordRow, digest: bytes, shard: int, part: int, subject: bytes | None, request: str | None
) -> None:
    if request is not None:
        raise ValueError(f"records must not have been deleted, got {row.shown!r}, deleted by {request!r}")
    same = (bytes.fromhex(row.digest), row.shard, row.slice, row.subject and bytes.fromhex(row.subject))
    if same != (digest, shard, part, subject):
        raise ValueError(f"records must be what they were when they were added, got {row.shown!r}, which has changed")


def _bytes(name: str, argument: str) -> bytes:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{argument} must be 64 hexadecimal digits, got {name!r}")
    return bytes.fromhex(name)
