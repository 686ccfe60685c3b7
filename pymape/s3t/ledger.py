"""The ledger of an S3T system: the one writer of its records, stages and requests."""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from pymape.files import atomic_write, sync_tree, take_lock
from pymape.s3t import faults
from pymape.s3t.audit import AuditEntry, AuditLog, first_entry
from pymape.s3t.database import Database, create_database, now
from pymape.s3t.erasure import erase_files, try_each
from pymape.s3t.ledger_records import FoundRecord, RecordRow
from pymape.s3t.ledger_requests import LedgerRequests
from pymape.s3t.ledger_stages import STAGES, StageRow

__all__ = ["FoundRecord", "Ledger", "RecordRow", "StageRow"]

_DATABASE, _KEY, _LOCK, _ANCHOR = "ledger.sqlite", "key", "lock", "audit.head"
# Files that a crash leaves while one of these is written.
_TEMPORARY = re.compile(rf"\.({re.escape(_DATABASE)}|{re.escape(_ANCHOR)}|{_KEY})\..*")


class Ledger(LedgerRequests):
    """Records, stages, requests and audit log of a system, in a folder that survives crashes.

    One process writes at a time; its threads may share the ledger. Whatever kills it, the folder holds the state before
    a change or after it, and what a request left to do is done when the ledger is opened for writing next. A read-only
    ledger changes nothing (SQLite keeps an index of its log beside it), also while another process writes.

    The folder holds `ledger.sqlite`, the secret `key`, `lock`, `audit.head` (the anchor of the audit log), `stages/`
    and, if training uses one, the prefix cache `cache/`.

    Args:
        folder: the system's folder; `Ledger.create` makes one.
        mode: "write" takes the lock, removes what a crash left and finishes all requests; "read" looks only.

    Raises:
        ValueError: no ledger there, another process writing it, a damaged or older database, a missing key.
    """

    def __init__(self, folder: str | os.PathLike[str], mode: Literal["write", "read"] = "write") -> None:
        self.folder = Path(folder).absolute()
        self._lock: int | None = None
        if mode == "write":
            if not (self.folder / _DATABASE).is_file():
                raise ValueError(f"ledger must be a folder with a {_DATABASE}, got {str(folder)!r} without")
            self._lock = take_lock(self.folder / _LOCK, "ledger")
        try:
            self._open(write=mode == "write")
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        settings: Mapping[str, Any],
        base: str,
        sequences: Sequence[Sequence[Sequence[int]]],
        key: bytes | None = None,
    ) -> Ledger:
        """Make a ledger.

        Args:
            folder: a new or empty folder, or what an interrupted creation left.
            settings: JSON-able options of the system, which the ledger only keeps.
            base: hash of the base model.
            sequences: for every shard its orders of all slices.
            key: 32 secret bytes; default: drawn at random. Give some only to repeat a run.

        Returns:
            The ledger, open for writing.

        Raises:
            ValueError: a folder in use, or sequences that are not orders of the same slices.
        """
        orders = [[tuple(sequence) for sequence in shard] for shard in sequences]
        _check_sequences(orders)
        if key is not None and len(key) != 32:
            raise ValueError(f"key must be 32 bytes, got {len(key)}")
        target = Path(folder).absolute()
        _check_free(target)
        lock = take_lock(target / _LOCK, "ledger")
        try:
            _check_free(target)  # now that nobody else can be making it
            key = secrets.token_bytes(32) if key is None else key
            _write_key(target / _KEY, key)
            faults.checkpoint("create: key written")
            (target / STAGES).mkdir(exist_ok=True)
            entry = first_entry(key, target / _ANCHOR, "created", shards=len(orders), base=base)
            faults.checkpoint("create: anchor written")
            values = {"settings": json.dumps(dict(settings)), "base": base, "created": now()}
            with atomic_write(target / _DATABASE) as path:
                create_database(path, orders, values, (entry.seq, entry.time, entry.event, entry.detail, entry.mac))
            faults.checkpoint("create: database written")
        finally:
            os.close(lock)
        return cls(target)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write."""
        if hasattr(self, "_db"):
            self._db.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def snapshot(self) -> AbstractContextManager[None]:
        """A block in which what is read fits together: no request is accepted meanwhile."""
        return self._db.snapshot()

    def finish(self, *, check: bool = True) -> dict[str | None, Exception]:
        """Take every accepted request to "verified", each state durable before the next.

        Switched: every affected shard serves its deepest live chain. Erased: the files of tombstoned stages, the cached
        states and contents of the records and the revoked exports are overwritten and deleted, in the database too.
        Verified: what the affected shards still hold was made from the records that are left. All requests go together.
        Other threads may use the ledger meanwhile; requests that they make then are left to the next call.

        Args:
            check: raise the first problem. False returns all of them.

        Returns:
            What keeps each request from its end, by name; under None what keeps a damaged stage from being erased.

        Raises:
            ValueError: naming a stage that was not made from what is left, or another process has been reading the
                database all the time.
            OSError: a file cannot be erased. Only the request that it belongs to waits. Calling again continues.
        """
        problems = self._finish()
        if check:
            for problem in problems.values():
                raise problem
        rows = self._db.rows_in("SELECT request, name FROM requests WHERE request IN ({})", [*problems])
        names = {None: None, **dict(rows)}
        return {names[request]: problem for request, problem in problems.items()}

    def repair(self) -> int:
        """Plan what deletions have ended anew, on the records that are left, as the next generation of each shard.

        A stage needs a record to be trained on, so a sequence that begins with a slice that has lost all its records is
        left out. Later in a sequence an empty slice adds a stage that is trained on the records before it. Trained
        stages that are damaged or were made from something else are replaced too, with all that build on them.

        Returns:
            Number of stages planned.

        Raises:
            OSError: a stage file cannot be read now. Nothing has changed: it need not be damaged.
        """
        damaged = self._damaged()
        with self._change("repair"):
            damaged = [row for row in damaged if self._state(row) == "trained"]  # no request has ended it meanwhile
            ended = self._end_stages(damaged)
            live = {(row.key.shard, row.key.prefix): row.stage for row in self.stages()}
            wanted = [place for place in self._plannable() if place not in live]
            shards = sorted({shard for shard, _ in wanted})
            self._db.run_all(
                "UPDATE shards SET generation = generation + 1 WHERE shard = ?", [(shard,) for shard in shards]
            )
            planned = self._plan(wanted, live)
            if planned or damaged:
                names, others = (sorted(row.key.name for row in rows) for rows in (damaged, ended))
                self._audit.append("repair planned", shards=shards, stages=planned, damaged=names, ended=others)
        with self._finishing:
            self._erase([])  # `finish` says what cannot be erased, and tries again
            self._move_anchor()
        return planned

    def verify(self) -> dict[str, Any]:
        """Check everything that can be checked without training.

        Returns:
            {"ok": bool, "problems": [sentences that name what is wrong], "checked": {what: how many}, "unfinished":
            [sentences that name what `finish` has still to do, which is no problem]}.
        """
        from pymape.s3t.ledger_verify import verify

        return verify(self)

    def audit_log(self) -> list[AuditEntry]:
        """All rows of the audit log."""
        return self._audit.entries()

    def _open(self, *, write: bool) -> None:
        self._db = Database(self.folder / _DATABASE, write=write)
        values = dict(self._db.rows("SELECT name, value FROM system"))
        self.settings: dict[str, Any] = json.loads(values["settings"])
        self.base = values["base"]
        self.sequences = [[] for _ in range(self._db.value("SELECT count(*) FROM shards"))]
        for shard, slices in self._db.rows("SELECT shard, slices FROM sequences ORDER BY shard, number"):
            self.sequences[shard].append(tuple(map(int, slices.split("."))))
        try:
            self.key = (self.folder / _KEY).read_bytes()
        except OSError as error:
            raise ValueError(
                f"ledger must have a readable key, got {str(self.folder / _KEY)!r}: {error.strerror}"
            ) from error
        self._audit = AuditLog(self._db, self.key, self.folder / _ANCHOR)
        self._finishing = threading.Lock()
        self._start_records()
        self._start_stages()
        if write:
            problems = self._audit.check_head()
            if problems:
                raise ValueError(f"ledger must be the latest one of its folder, got {problems[0]}")
            self._recover()

    def _recover(self) -> None:
        """Remove what a crash left and finish all requests. What is wrong then is for `finish` and `verify` to say."""
        (self.folder / STAGES).mkdir(exist_ok=True)
        try_each(erase_files, [self.folder / name for name in self._orphans()])
        if self.deleted:
            names = self._db.rows("SELECT name FROM records JOIN tombstones USING (record)")
            try_each(self._erase_cached, [name.hex() for (name,) in names])
        self._sweep_exports()
        self._finish()

    def _orphans(self) -> list[str]:
        """Files that nothing refers to, relative to the folder."""
        with self._db.lock:
            landing = ", ".join(map(str, self._landing)) or "NULL"
            rows = self._stage_rows(f"s.state IN ('trained', 'tombstoned') OR s.stage IN ({landing})")
            kept = {self.path(row.key).name for row in rows}
            stages = {entry.name for entry in (self.folder / STAGES).iterdir() if entry.is_file()}
        found = sorted(f"{STAGES}/{name}" for name in stages - kept)
        return found + sorted(entry.name for entry in self.folder.iterdir() if _TEMPORARY.fullmatch(entry.name))

    def _damaged(self) -> list[StageRow]:
        """Trained stages that cannot be served."""
        found = []
        for row in self.stages():
            if row.state == "trained":
                try:
                    self.read_stage(row)
                    wrong = self._difference(row, self.provenance(row)) is not None
                except ValueError:
                    wrong = True
                found += [row] if wrong else []
        return found

    def _end_stages(self, damaged: Sequence[StageRow]) -> list[StageRow]:
        """Take damaged stages and all that build on them out of service, inside a transaction; which these are."""
        found: list[StageRow] = []
        for shard in sorted({row.key.shard for row in damaged}):
            prefixes = [row.key.prefix for row in damaged if row.key.shard == shard]
            ended = [row for row in self.stages(shard) if any(row.key.prefix[: len(p)] == p for p in prefixes)]
            self._db.run_all(
                "UPDATE stages SET state = ? WHERE stage = ?",
                [("tombstoned" if row.state == "trained" else "cancelled", row.stage) for row in ended],
            )
            self._serve_deepest([shard])
            found += ended
        return found

    def _finish(self) -> dict[int | None, Exception]:
        """Do what is left to do; what keeps each request from its end, and under None what `repair` has ended."""
        with self._finishing:
            last = self._db.value("SELECT max(request) FROM requests") or 0
            self._switch(self._waiting("switched IS NULL", last))
            problems = self._erase(self._waiting("switched NOTNULL AND erased IS NULL", last))
            for request, problem in self._verify_requests(self._waiting("erased NOTNULL", last)).items():
                problems[request] = problem
            self._move_anchor()
            return problems

    def _waiting(self, condition: str, last: int) -> list[int]:
        rows = self._db.rows(
            f"SELECT request FROM requests WHERE verified IS NULL AND {condition} AND request <= ?", (last,)
        )
        return sorted(request for (request,) in rows)

    def _switch(self, requests: Sequence[int]) -> None:
        if requests:
            with self._db.transaction("switch"):
                depths = self._serve_deepest(self._shards_of(requests))
                self._advance(requests, "switched", depths=depths)

    def _erase(self, requests: Sequence[int]) -> dict[int | None, Exception]:
        """Erase what requests have ended, and damaged stages; the first error of each request, which is tried again.

        Under None is an error of the damaged stages.
        """
        places = list(
            self._db.rows_in(
                "SELECT record, name, request FROM records JOIN tombstones USING (record) WHERE request IN ({})",
                requests,
            )
        )
        stages: dict[StageRow, int | None] = dict.fromkeys(
            self._stage_rows("s.state = 'tombstoned' AND s.request IS NULL")
        )
        # Those that an interrupted attempt has erased already are looked for again: it may not have reached the disk.
        stages |= self._stages_of(requests, "tombstoned", "erased")
        if not requests and not stages:
            return {}
        self._await_landings()
        by_path = {self.path(row.key): request for row, request in stages.items()}
        by_name = {name.hex(): request for _, name, request in places}
        left = try_each(erase_files, [*by_path])
        failed: dict[int | None, Exception] = {}
        for owner, error in [
            *((by_path[path], error) for path, error in left.items()),
            *((by_name[name], error) for name, error in try_each(self._erase_cached, [*by_name]).items()),
            *self._revoke(requests).items(),
        ]:
            failed.setdefault(owner, error)
        records = [(record,) for record, *_ in places]
        gone = {row: request for row, request in stages.items() if self.path(row.key) not in left}
        ended = [(row.stage,) for row in gone]
        repaired = [row.key.name for row, request in gone.items() if request is None]
        with self._db.transaction("erase"):
            for statement, rows in (
                ("UPDATE contents SET content = zeroblob(length(content)) WHERE record = ?", records),
                ("UPDATE records SET digest = zeroblob(32) WHERE record = ?", records),
                ("UPDATE records SET subject = zeroblob(32) WHERE record = ? AND subject NOTNULL", records),
                ("UPDATE files SET provenance = zeroblob(length(provenance)) WHERE stage = ?", ended),
                ("UPDATE stages SET state = 'erased' WHERE stage = ?", ended),
            ):
                self._db.run_all(statement, rows)
            if repaired:  # the others are in the rows of their requests
                self._audit.append("stages erased", stages=repaired)
        try:
            self._db.truncate_log()
        except ValueError as error:  # the log holds pages of all of them
            waiting: Sequence[int | None] = requests or [None]
            for owner in waiting:
                failed.setdefault(owner, error)
            return failed
        done = {request for request in requests if request not in failed}
        if done:
            with self._db.transaction("erased"):
                self._advance(
                    sorted(done),
                    "erased",
                    records=sum(request in done for *_, request in places),
                    stages=sum(request in done for request in stages.values()),
                    exports=self._outcomes(sorted(done)),
                )
        return failed

    def _await_landings(self) -> None:
        """Wait until no file of a stage that has ended is being written, nor an export that holds one."""

        def written() -> bool:
            landing = self._db.rows_in("SELECT state FROM stages WHERE stage IN ({})", list(self._landing))
            exports = self._db.rows_in("SELECT request FROM exports WHERE export IN ({})", list(self._exporting))
            return all(state in ("planned", "trained") for (state,) in landing) and all(by is None for (by,) in exports)

        with self._landed:
            self._landed.wait_for(written)

    def _verify_requests(self, requests: Sequence[int]) -> dict[int, Exception]:
        """Verify requests; the first problem of each that stays erased."""
        if not requests:
            return {}
        late = self._cached_again(requests)
        with self._db.transaction("verify"):
            found = [
                (request, problem)
                for shard in self._shards_of(requests)
                for problem in self._provenance_problems(shard)[:1]
                for request in self._requests_of(shard)
            ]
            found += self._traces(requests) + late
            problems: dict[int, Exception] = {request: ValueError(problem) for request, problem in reversed(found)}
            done = [request for request in requests if request not in problems]
            if done:
                self._advance(done, "verified")
        return {request: problems[request] for request in requests if request in problems}

    def _advance(self, requests: Sequence[int], state: str, **detail: Any) -> None:
        """Note a state of requests inside a transaction."""
        time = now()
        self._db.run_all(
            f"UPDATE requests SET {state} = ? WHERE request = ?", [(time, request) for request in requests]
        )
        names = [name for (name,) in self._db.rows_in("SELECT name FROM requests WHERE request IN ({})", requests)]
        self._audit.append(f"requests {state}", requests=names, **detail)

    def _shards_of(self, requests: Sequence[int]) -> list[int]:
        rows = self._db.rows_in(
            "SELECT DISTINCT shard FROM tombstones JOIN records USING (record) WHERE request IN ({})", requests
        )
        return sorted({shard for (shard,) in rows})

    def _requests_of(self, shard: int) -> list[int]:
        """Requests, not verified yet, that have deleted records of a shard."""
        rows = self._db.rows(
            "SELECT DISTINCT request FROM requests JOIN tombstones USING (request) JOIN records USING (record) "
            "WHERE verified IS NULL AND shard = ?",
            (shard,),
        )
        return [request for (request,) in rows]


def _check_sequences(orders: Sequence[Sequence[tuple[int, ...]]]) -> None:
    if not orders or not all(orders):
        raise ValueError(f"sequences must hold at least one order for every shard, got {orders}")
    slices = len(orders[0][0])
    for shard, sequences in enumerate(orders):
        for sequence in sequences:
            if not slices or sorted(sequence) != list(range(slices)):
                raise ValueError(
                    f"sequences must be orders of the slices 0 to {slices - 1}, got {sequence} in shard {shard}"
                )


def _check_free(folder: Path) -> None:
    """Make the folder, and refuse one that holds more than an interrupted creation."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir() if not _TEMPORARY.fullmatch(entry.name)}
        names |= {f"{STAGES}/{entry.name}" for entry in (folder / STAGES).iterdir()} if STAGES in names else set()
    except OSError as error:
        raise ValueError(f"ledger must be a writable folder, got {str(folder)!r}: {error.strerror}") from error
    foreign = sorted(names - {_KEY, _LOCK, _ANCHOR, STAGES})
    if foreign:
        raise ValueError(f"ledger must be made in a new or empty folder, got {str(folder)!r} with {foreign[0]!r}")


def _write_key(path: Path, key: bytes) -> None:
    """Write the key so that nobody else can read it at any moment."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, key)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_tree(path.parent, deep=False)
