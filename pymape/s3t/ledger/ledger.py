"""The ledger of an S3T system: the one writer of its records, stages and requests."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pymape.s3t import faults
from pymape.s3t.erasure import erase_files, try_each
from pymape.s3t.ledger.audit import AuditLog, first_entry
from pymape.s3t.ledger.database import Database, create_database, now
from pymape.s3t.ledger.folder import ANCHOR, DATABASE, KEY, LOCK, STAGES, check_free, write_key
from pymape.s3t.ledger.stages import StageRow
from pymape.s3t.ledger.verify import LedgerVerify
from pymape.storage.files import FileLock, atomic_write

__all__ = ["Ledger"]


class Ledger(LedgerVerify):
    """Records, stages, requests and audit log of a system, in a folder that survives crashes.

    One process writes at a time; its threads may share the ledger. Whatever kills it, the folder holds the state before
    a change or after it, and what a request left to do is done when the ledger is opened for writing next. A read-only
    ledger changes nothing (SQLite keeps an index of its log beside it), also while another process writes.

    The folder holds `ledger.sqlite`, the secret `key`, `lock`, `audit.head` (the anchor of the audit log), `stages/`
    and, if training uses one, the prefix cache `cache/`.

    Args:
        folder: the system's folder; `Ledger.create` makes one.
        mode: "write" takes the lock, removes what a crash left and finishes all requests; "read" looks only.
        accept_lost_anchor: make the anchor of the audit log anew if its file is missing, which the log then notes.
            Without it, nothing tells whether the newest rows were removed.

    Raises:
        ValueError: no ledger there, another process writing it, a damaged or older database, a missing key.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        mode: Literal["write", "read"] = "write",
        *,
        accept_lost_anchor: bool = False,
    ) -> None:
        self.folder = Path(folder).absolute()
        self._lock: FileLock | None = None
        if mode == "write":
            if not (self.folder / DATABASE).is_file():
                raise ValueError(f"ledger must be a folder with a {DATABASE}, got {str(folder)!r} without")
            self._lock = FileLock(self.folder / LOCK, "ledger")
        try:
            self._open(write=mode == "write", accept_lost_anchor=accept_lost_anchor)
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
        check_free(target)
        lock = FileLock(target / LOCK, "ledger")
        try:
            check_free(target)  # now that nobody else can be making it
            key = secrets.token_bytes(32) if key is None else key
            write_key(target / KEY, key)
            faults.checkpoint("create: key written")
            (target / STAGES).mkdir(exist_ok=True)
            entry = first_entry(key, target / ANCHOR, "created", shards=len(orders), base=base)
            faults.checkpoint("create: anchor written")
            values = {"settings": json.dumps(dict(settings)), "base": base, "created": now()}
            with atomic_write(target / DATABASE) as path:
                create_database(path, orders, values, (entry.seq, entry.time, entry.event, entry.detail, entry.mac))
            faults.checkpoint("create: database written")
        finally:
            lock.release()
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
            self._lock.release()
            self._lock = None

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
        with self._finishing, contextlib.suppress(OSError, ValueError):  # `finish` says what, and tries again
            self._erase([])
        self.move_anchor()
        return planned

    def _open(self, *, write: bool, accept_lost_anchor: bool) -> None:
        self._db = Database(self.folder / DATABASE, write=write)
        values = dict(self._db.rows("SELECT name, value FROM system"))
        self.settings: dict[str, Any] = json.loads(values["settings"])
        self.base = values["base"]
        self._homes = json.loads(values.get("homes", "[]"))
        self.sequences = [[] for _ in range(self._db.value("SELECT count(*) FROM shards"))]
        for shard, slices in self._db.rows("SELECT shard, slices FROM sequences ORDER BY shard, number"):
            self.sequences[shard].append(tuple(map(int, slices.split("."))))
        try:
            self.key = (self.folder / KEY).read_bytes()
        except OSError as error:
            raise ValueError(
                f"ledger must have a readable key, got {str(self.folder / KEY)!r}: {error.strerror}"
            ) from error
        if len(self.key) != 32:
            raise ValueError(f"ledger must have a key of 32 bytes, got {len(self.key)} in {str(self.folder / KEY)!r}")
        self._audit = AuditLog(self._db, self.key, self.folder / ANCHOR)
        self._start_records()
        self._start_stages()
        self._start_finish()
        if write:
            problems = self._audit.check_key()
            if not problems and accept_lost_anchor and not (self.folder / ANCHOR).exists():
                with self._change("accept anchor"):
                    self._audit.append("lost anchor accepted")
            problems = problems or self._audit.check_head()
            if problems:
                raise ValueError(f"ledger must be the latest one of its folder, got {problems[0]}")
            self._note_home()
            self._recover()

    def _note_home(self) -> None:
        """Note where the folder is, so that exports beside it are found when it has moved."""
        here = os.path.realpath(self.folder)
        if here not in self._homes:
            self._homes.append(here)
            with contextlib.suppress(OSError), self._db.transaction("home"):  # a full disk is no reason not to open
                self._db.run("INSERT OR REPLACE INTO system VALUES ('homes', ?)", (json.dumps(self._homes),))

    def _recover(self) -> None:
        """Remove what a crash left and finish all requests. What is wrong then is for `finish` and `verify` to say.

        Workers of a process that was killed end themselves in a moment; until then they may cache what is erased here.
        """
        self._cache.wait_until_unused()
        (self.folder / STAGES).mkdir(exist_ok=True)
        try_each(erase_files, [self.folder / name for name in self._orphans()])
        if self.deleted:
            names = self._db.rows("SELECT name FROM records JOIN tombstones USING (record)")
            try_each(self._erase_cached, [name.hex() for (name,) in names])
        self._sweep_exports()
        self._finish()

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
