"""The audit log: what happened to a ledger, chained so that a changed, removed or reordered row shows."""

from __future__ import annotations

import hmac
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymape.s3t import faults
from pymape.s3t.ledger.database import Database, now
from pymape.storage.files import atomic_write

__all__ = ["AuditEntry", "AuditLog", "first_entry"]

_START = bytes(32)
_REPORTED = 10  # damaged rows named at most


@dataclass(frozen=True)
class AuditEntry:
    """One row: its number from 1, ISO time, what happened, JSON detail, and the MAC over these and the row before."""

    seq: int
    time: str
    event: str
    detail: str
    mac: bytes

    def follows(self, key: bytes, previous: bytes) -> bool:
        """Whether the row is what was written, right behind the row with the MAC `previous`."""
        if not isinstance(previous, bytes) or not isinstance(self.mac, bytes):
            return False
        return hmac.compare_digest(self.mac, _mac(key, previous, self.seq, self.time, self.event, self.detail))


class AuditLog:
    """Rows chained by HMAC in the database, and the number and MAC of the last one in a small file, the anchor.

    Details hold no ids, only counts, names of stages and requests, and hashes. Whoever has the key can forge the log,
    and whoever puts back a copy of the whole folder, anchor included, is not noticed: receipts, which name a row and
    its MAC, are to be kept elsewhere, for `Ledger.verify` to compare. The anchor is moved after a change, after a
    request when it is finished or put off, so it may lag behind the log; it never leads.

    Args:
        database: of the ledger.
        key: the system's secret key.
        anchor: path of the anchor.
    """

    def __init__(self, database: Database, key: bytes, anchor: Path) -> None:
        self._db, self._key, self._anchor = database, key, anchor
        self._anchored = 0

    def append(self, event: str, **detail: Any) -> AuditEntry:
        """Add a row inside a transaction."""
        last = self.head()
        seq, previous = (last.seq, last.mac) if last else (0, _START)
        entry = _entry(self._key, previous, seq + 1, event, detail)
        self._db.run(
            "INSERT INTO audit VALUES (?, ?, ?, ?, ?)", (entry.seq, entry.time, event, entry.detail, entry.mac)
        )
        return entry

    def head(self) -> AuditEntry | None:
        """The last row."""
        rows = self._db.rows("SELECT * FROM audit ORDER BY seq DESC LIMIT 1")
        return AuditEntry(*rows[0]) if rows else None

    def entries(self, start: int = 1) -> list[AuditEntry]:
        """All rows from a number on."""
        return [AuditEntry(*row) for row in self._db.rows("SELECT * FROM audit WHERE seq >= ? ORDER BY seq", (start,))]

    def anchor(self) -> None:
        """Bring the anchor up to the last row.

        Raises:
            OSError: it cannot be written; the old one stays.
        """
        head = self.head()
        if head is not None and head.seq != self._anchored:
            _write_anchor(self._anchor, head)
            self._anchored = head.seq
            faults.checkpoint("anchor: written")

    def check_key(self) -> list[str]:
        """Compare the log's beginning with the key: what is wrong, in sentences."""
        first = self._db.rows("SELECT * FROM audit WHERE seq = 1")
        if first and AuditEntry(*first[0]).follows(self._key, _START):
            return []
        return ["a key that did not write row 1 of its audit log: it is another system's, or the row was changed"]

    def check_head(self) -> list[str]:
        """Compare the log's end with the anchor: what is wrong, in sentences."""
        try:
            anchor = json.loads(self._anchor.read_text(encoding="utf-8"))
            seq, mac = int(anchor["seq"]), bytes.fromhex(anchor["mac"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"anchor {str(self._anchor)!r} is missing or damaged: {error}"]
        head = self.head()
        last = head.seq if head else 0
        if last < seq:
            return [
                f"audit log ends at row {last}, its anchor at row {seq}: "
                f"{str(self._db.path)!r} is an older one put back, or rows were removed"
            ]
        rows = self.entries(seq)
        if not rows or rows[0].seq != seq or rows[0].mac != mac:
            return [f"audit log row {seq} is not the one that the anchor {str(self._anchor)!r} names"]
        return [
            f"audit log row {row.seq} is not what was written"
            for before, row in itertools.pairwise(rows)
            if row.seq != before.seq + 1 or not row.follows(self._key, before.mac)
        ][:_REPORTED]

    def check_chain(self) -> list[str]:
        """Check every row and the anchor: what is wrong, in sentences."""
        problems, previous, expected = [], _START, 1
        for row in self.entries():
            if row.seq != expected:
                single = row.seq == expected + 1
                missing = f"row {expected} is" if single else f"rows {expected} to {row.seq - 1} are"
                problems.append(f"audit log {missing} missing")
            elif not row.follows(self._key, previous):
                problems.append(f"audit log row {row.seq} is not what was written")
            previous, expected = row.mac, row.seq + 1
        return list(dict.fromkeys([*problems[:_REPORTED], *self.check_head()]))


def first_entry(key: bytes, anchor: Path, event: str, **detail: Any) -> AuditEntry:
    """The first row of a new log, with its anchor written.

    Args:
        key: the system's secret key.
        anchor: path of the anchor.
        event: what happened.
        detail: JSON-able.
    """
    entry = _entry(key, _START, 1, event, detail)
    _write_anchor(anchor, entry)
    return entry


def _entry(key: bytes, previous: bytes, seq: int, event: str, detail: dict[str, Any]) -> AuditEntry:
    text, time = json.dumps(detail, sort_keys=True, separators=(",", ":")), now()
    return AuditEntry(seq, time, event, text, _mac(key, previous, seq, time, event, text))


def _mac(key: bytes, previous: bytes, seq: int, time: str, event: str, detail: str) -> bytes:
    return hmac.digest(key, b"audit\0" + previous + f"{seq}\0{time}\0{event}\0{detail}".encode(), "sha256")


def _write_anchor(path: Path, entry: AuditEntry) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({"seq": entry.seq, "mac": entry.mac.hex()}) + "\n", encoding="utf-8")
