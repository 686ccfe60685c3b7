"""The requests of a ledger, accepted durably and at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from pymape.s3t.ledger.database import now
from pymape.s3t.ledger.exports import LedgerExports
from pymape.s3t.ledger.records import FoundRecord
from pymape.s3t.ledger.stages import DAMAGED, StageRow, deepest

__all__ = ["STATES", "LedgerRequests", "check_request", "is_receipt", "names_digest"]

FORMAT = "pymape.deletion.1"
_KNOWN = "request_id must be new for other records, got {!r}, which is known"
STATES = ("received", "switched", "erased", "verified")  # columns with the times; "received" is the state "tombstoned"


class LedgerRequests(LedgerExports):
    """The part of `Ledger` that holds requests."""

    def plan_deletion(self, names: Sequence[str]) -> dict[str, Any]:
        """What `tombstone` would do, without doing it.

        Args:
            names: of the records.

        Returns:
            A receipt's "records", "shards", "stages", "cancelled", "bytes" and "exports".

        Raises:
            ValueError: as `tombstone`.
        """
        with self._db.snapshot():
            return self._impact([self._checked(names)])[0][0]

    def tombstone(
        self, requests: Sequence[tuple[str, Sequence[str]]], asked: Mapping[str, str] | None = None
    ) -> list[dict[str, Any]]:
        """Accept requests to delete records: when this returns they are durable, whatever happens next.

        From here on no stage that was trained on the records is served, read or built upon. All requests of a call are
        accepted in one commit, or none.

        Args:
            requests: (name of the request, names of the records).
            asked: name of a new request -> digest of what it was asked for in other words, for `names_asked`.

        Returns:
            A receipt for each: "request", "received" (ISO time), "records" (how many), "shards" (for each affected one
            its generation, depth before and after, names of the stages tombstoned and cancelled), "stages" and
            "cancelled" (how many), "bytes" to erase (stage files and record contents), "exports" (paths) to revoke,
            "state", and "audit" (number and MAC of the row in the audit log); "asked" where one was given. A request
            that is known with the same records gives the stored receipt.

        Raises:
            ValueError: a record that is unknown, repeated or deleted already, or a known request with other records.
            OSError: the disk is full. Nothing has changed then, as after a ValueError.
        """
        new: list[tuple[str, list[FoundRecord]]] = []
        with self._db.lock:
            known = self._known_requests(requests)
            for request, names in requests:
                if request not in known:
                    new.append((request, self._checked(names)))
            _check_apart(new)
            if new:
                with self._db.transaction("tombstone"):  # and no anchor: the answer waits for one commit, no more
                    self._commit_tombstones(new, asked or {})
        return [self.receipt(request) for request, _ in requests]

    def receipt(self, request: str) -> dict[str, Any]:
        """The receipt of a request, in its present state.

        Raises:
            ValueError: no such request.
        """
        found = self._receipts("WHERE q.name = ?", (request,))
        if not found:
            raise ValueError(f"request_id must be that of a request, got {request!r}, which is unknown")
        return found[0]

    def names_asked(self, request: str, asked: str) -> list[str]:
        """Names of the records of a known request that was asked for the same; none where no request says so.

        Args:
            request: its name.
            asked: as it was given to `tombstone`.

        Raises:
            ValueError: it was asked for something else.
        """
        for row, receipt in self._db.rows("SELECT request, receipt FROM requests WHERE name = ?", (request,)):
            before = json.loads(receipt).get("asked")
            if before is not None and before != asked:
                raise ValueError(_KNOWN.format(request))
            return [] if before is None else self._names_of(row)
        return []

    def requests(self) -> list[dict[str, Any]]:
        """Receipts of all requests, in the order in which they were received."""
        return self._receipts()

    def unfinished(self) -> list[dict[str, Any]]:
        """Receipts of the requests that are not verified."""
        return self._receipts("WHERE q.verified IS NULL")

    def deletion_rate(self) -> float | None:
        """Records deleted a day, from the first request to the last; None before there are two moments."""
        first, last = self._db.rows("SELECT min(received), max(received) FROM requests")[0]
        if first == last:
            return None
        later = self._db.value(
            "SELECT count(*) FROM tombstones JOIN requests USING (request) WHERE received > ?", (first,)
        )
        return 86400 * later / (datetime.fromisoformat(last) - datetime.fromisoformat(first)).total_seconds()

    def _checked(self, names: Sequence[str]) -> list[FoundRecord]:
        if not names:
            raise ValueError("ids must name at least one record, got none")
        return self.require_live(names)

    def _known_requests(self, requests: Sequence[tuple[str, Sequence[str]]]) -> set[str]:
        """Requests that were accepted before, for the same records."""
        ids = [request for request, _ in requests]
        for request in ids:
            check_request(request)
        if len(set(ids)) < len(ids):
            raise ValueError(f"request_id must differ between requests, got {len(ids)} with repetitions")
        known = {
            name: row for name, row in self._db.rows_in("SELECT name, request FROM requests WHERE name IN ({})", ids)
        }
        for request, names in requests:
            if request in known and names_digest(names) != names_digest(self._names_of(known[request])):
                raise ValueError(_KNOWN.format(request))
        return set(known)

    def _names_of(self, request: int) -> list[str]:
        rows = self._db.rows("SELECT name FROM records JOIN tombstones USING (record) WHERE request = ?", (request,))
        return [name.hex() for (name,) in rows]

    def _impact(self, requests: Sequence[list[FoundRecord]]) -> list[tuple[dict[str, Any], list[StageRow], list[int]]]:
        """What requests do, one after the other: figures of the receipt, stages that end, exports that are revoked.

        Damaged stages that `repair` has ended before are the request's too, which waits until their files are erased.
        """
        left: dict[int, list[StageRow]] = {}
        generations: dict[int, int] = {}
        exports: dict[int, tuple[str, set[tuple[int, int]]]] = {}  # path and the (shard, slice) that it was trained on
        for export, path, shard, prefix in self._db.rows(  # not only of live stages: `repair` ends stages too
            "SELECT export, path, shard, prefix FROM export_stages JOIN exports e USING (export) "
            "JOIN stages USING (stage) WHERE e.request IS NULL ORDER BY export"
        ):
            exports.setdefault(export, (path, set()))[1].update((shard, int(part)) for part in prefix.split("."))
        impacts = []
        for records in requests:
            ended: list[StageRow] = []
            shards = []
            for shard in sorted({record.shard for record in records}):
                if shard not in left:
                    left[shard] = self.stages(shard) + self._stage_rows(f"{DAMAGED} AND s.shard = ?", [shard])
                    generations[shard] = self.generation(shard)
                slices = {record.slice for record in records if record.shard == shard}
                before = self._depth(shard, left[shard])
                hit = [row for row in left[shard] if not slices.isdisjoint(row.key.prefix)]
                left[shard] = [row for row in left[shard] if slices.isdisjoint(row.key.prefix)]
                ended += hit
                shards.append(
                    {
                        "shard": shard,
                        "generation": generations[shard],
                        "depth_before": before,
                        "depth_after": self._depth(shard, left[shard]) if hit else before,
                        "stages": [row.key.name for row in hit if row.state == "trained"],
                        "cancelled": [row.key.name for row in hit if row.state == "planned"],
                    }
                )
            places = {(record.shard, record.slice) for record in records}
            ours = {export: path for export, (path, parts) in exports.items() if not places.isdisjoint(parts)}
            for export in ours:
                del exports[export]
            figures = {
                "records": len(records),
                "shards": shards,
                "stages": sum(row.state == "trained" for row in ended),
                "cancelled": sum(row.state == "planned" for row in ended),
                "bytes": sum(row.size for row in ended) + sum(record.size for record in records),
                "exports": list(ours.values()),
            }
            impacts.append((figures, ended, list(ours)))
        return impacts

    def _depth(self, shard: int, stages: Iterable[StageRow]) -> int:
        trained = {row.key.prefix for row in stages if row.state == "trained"}
        return deepest(self.sequences[shard], trained)[1]

    def _commit_tombstones(self, requests: Sequence[tuple[str, list[FoundRecord]]], asked: Mapping[str, str]) -> None:
        received = now()
        impacts = self._impact([records for _, records in requests])
        for (request, records), (figures, ended, exports) in zip(requests, impacts, strict=True):
            words = {"asked": asked[request]} if request in asked else {}
            receipt = json.dumps({"format": FORMAT, "request": request, "received": received, **words, **figures})
            entry = self._audit.append(
                "records deleted",
                request=request,
                records=len(records),
                names=names_digest(record.name for record in records),
                stages=figures["stages"],
                receipt=hashlib.sha256(receipt.encode()).hexdigest(),
            )
            row = self._db.insert(
                "INSERT INTO requests (name, receipt, audit, received) VALUES (?, ?, ?, ?)",
                (request, receipt, entry.seq, received),
            )
            self._db.run_all("INSERT INTO tombstones VALUES (?, ?)", [(record.record, row) for record in records])
            for record in records:
                self._digests.pop((record.shard, record.slice), None)
            self._db.run_all(
                "UPDATE stages SET state = ?, request = ? WHERE stage = ?",
                [("cancelled" if stage.state == "planned" else "tombstoned", row, stage.stage) for stage in ended],
            )
            self._db.run_all("UPDATE exports SET request = ? WHERE export = ?", [(row, export) for export in exports])

    def _receipts(self, where: str = "", values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        outcomes: dict[int, list[Any]] = {}
        for request, outcome in self._db.rows(
            "SELECT request, outcome FROM exports WHERE outcome NOTNULL ORDER BY export"
        ):
            outcomes.setdefault(request, []).append(json.loads(outcome))
        found = []
        for row, text, seq, mac, *times in self._db.rows(
            f"SELECT q.request, q.receipt, a.seq, a.mac, {', '.join(f'q.{state}' for state in STATES)} "
            f"FROM requests q LEFT JOIN audit a ON a.seq = q.audit {where} ORDER BY q.request",
            values,
        ):
            receipt: dict[str, Any] = json.loads(text)
            reached = {state: time for state, time in zip(STATES, times) if time is not None}
            state = [*reached][-1]
            receipt |= {**reached, "state": "tombstoned" if state == "received" else state}
            receipt |= {"revoked": outcomes.get(row, []), "audit": {"seq": seq, "mac": mac and mac.hex()}}
            found.append(receipt)
        return found


def check_request(request: str) -> None:
    """Refuse a name that no request may have.

    Raises:
        ValueError: it is no text, empty or not printable.
    """
    if not isinstance(request, str) or not request or not request.isprintable():
        raise ValueError(f"request_id must be a printable, non-empty string, got {request!r}")


def is_receipt(value: Any) -> bool:
    """Whether a value has the form of a receipt."""
    return isinstance(value, Mapping) and isinstance(value.get("request"), str) and "audit" in value


def names_digest(names: Iterable[str]) -> str:
    """sha256 over the names of records, whatever their order."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def _check_apart(requests: Sequence[tuple[str, list[FoundRecord]]]) -> None:
    """Refuse requests of one call that share a record."""
    by: dict[str, str] = {}
    for request, records in requests:
        for record in records:
            if record.name in by:
                raise ValueError(
                    f"ids must not be in two requests, got {record.name!r} in {by[record.name]!r} and {request!r}"
                )
            by[record.name] = request
