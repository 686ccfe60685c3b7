"""The ledger's SQLite database: tables, durable transactions, and errors that name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pymape.s3t import faults
from pymape.storage.files import overwrite

__all__ = ["Database", "create_database", "now"]

APPLICATION, FORMAT = 0x5333544C, 1  # "S3TL"

# What a row knows about a record lies in `records`, `contents` and `files`. Rows of these tables are appended and never
# deleted: SQLite moves rows when it deletes others, and secure_delete does not clear every place that a row has moved
# from. To erase, zeros of the same length are written over the columns, which SQLite does in place. The name stays: it
# is the tombstone. No index holds anything but names and places.
_SCHEMA = """
CREATE TABLE system (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE sequences (
    shard INTEGER, number INTEGER, slices TEXT NOT NULL, PRIMARY KEY (shard, number)
) WITHOUT ROWID;
CREATE TABLE shards (
    shard INTEGER PRIMARY KEY, generation INTEGER NOT NULL DEFAULT 0,
    sequence INTEGER NOT NULL DEFAULT 0, depth INTEGER NOT NULL DEFAULT 0  -- what is served
);
CREATE TABLE records (
    record INTEGER PRIMARY KEY, name BLOB NOT NULL UNIQUE, shard INTEGER NOT NULL, slice INTEGER NOT NULL,
    size INTEGER NOT NULL, subject BLOB, digest BLOB NOT NULL
);
CREATE INDEX records_of_slice ON records (shard, slice);
CREATE TABLE contents (record INTEGER PRIMARY KEY REFERENCES records, content BLOB NOT NULL);
CREATE TABLE requests (
    request INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, receipt TEXT NOT NULL, audit INTEGER NOT NULL,
    received TEXT NOT NULL, switched TEXT, erased TEXT, verified TEXT
);
CREATE INDEX outstanding ON requests (request) WHERE verified IS NULL;
CREATE TABLE tombstones (record INTEGER PRIMARY KEY REFERENCES records, request INTEGER NOT NULL REFERENCES requests);
CREATE INDEX tombstones_of_request ON tombstones (request);
CREATE TABLE stages (
    stage INTEGER PRIMARY KEY, shard INTEGER NOT NULL, prefix TEXT NOT NULL, generation INTEGER NOT NULL,
    parent INTEGER REFERENCES stages, state TEXT NOT NULL,
    request INTEGER REFERENCES requests,  -- that tombstoned it
    UNIQUE (shard, prefix, generation)
);
CREATE UNIQUE INDEX live_stages ON stages (shard, prefix) WHERE state IN ('planned', 'trained');
CREATE INDEX stages_in_state ON stages (state);
CREATE INDEX stages_of_request ON stages (request) WHERE request NOTNULL;
CREATE TABLE files (
    file INTEGER PRIMARY KEY, stage INTEGER NOT NULL UNIQUE REFERENCES stages, sha256 BLOB NOT NULL,
    size INTEGER NOT NULL, provenance BLOB NOT NULL
);
CREATE TABLE exports (
    export INTEGER PRIMARY KEY, path TEXT NOT NULL, created TEXT NOT NULL, files TEXT NOT NULL,
    request INTEGER REFERENCES requests,  -- that revoked it
    outcome TEXT
);
CREATE TABLE export_stages (
    stage INTEGER REFERENCES stages, export INTEGER REFERENCES exports, PRIMARY KEY (stage, export)
) WITHOUT ROWID;
CREATE TABLE audit (
    seq INTEGER PRIMARY KEY, time TEXT NOT NULL, event TEXT NOT NULL, detail TEXT NOT NULL, mac BLOB NOT NULL
);
"""
_VARIABLES = 500  # at most in one statement; older versions of SQLite allow 999
_BUSY_SECONDS = 10.0
_HEADER, _FRAME = 32, 24  # bytes at the beginning of SQLite's log, and before every page in it


class Database:
    """One connection that the threads of a process share.

    Args:
        path: of a database that `create_database` made.
        write: False opens it read-only.

    Raises:
        ValueError: naming the file: it is missing, damaged, or none of a ledger.
    """

    def __init__(self, path: Path, *, write: bool) -> None:
        self.path, self.write = path, write
        self._checked = False  # that it is a ledger's
        self.lock = threading.RLock()
        if not path.is_file():
            raise ValueError(f"ledger must be a folder with a {path.name}, got {str(path.parent)!r} without")
        # SQLite makes files beside the database even to read it, unless it is told that nobody writes.
        self._frozen = not write and not _log(path).exists() and not os.access(path.parent, os.W_OK)
        self._place = self._present_place()
        with self._translated():
            uri = f"{path.absolute().as_uri()}?mode={'rw' if write else 'ro'}{'&immutable=1' if self._frozen else ''}"
            self._connection = sqlite3.connect(
                uri, uri=True, timeout=1.0, isolation_level=None, check_same_thread=False
            )
        try:
            with self._translated():
                if write:
                    _configure(self._connection)
                found = (self.value("PRAGMA application_id"), self.value("PRAGMA user_version"))
                if found[0] != APPLICATION or not self.rows("SELECT name FROM sqlite_master"):
                    raise ValueError(f"ledger must be an intact database, got {str(path)!r}, which is no ledger's")
                if path.stat().st_size % self.value("PRAGMA page_size"):  # SQLite would take a part of a page for one
                    raise ValueError(f"ledger must be an intact database, got {str(path)!r}, which ends within a page")
                if found[1] != FORMAT:
                    raise ValueError(f"ledger must have format {FORMAT}, got {found[1]} in {str(path)!r}")
            self._checked = True
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the connection. Its end deletes the log where nobody else reads, so that it is overwritten before."""
        with self.lock:
            if self._checked and self.write:
                with contextlib.suppress(ValueError, OSError, sqlite3.Error):  # such as a reader, or a full disk
                    self._erase_log()
            self._connection.close()

    def replaced(self) -> bool:
        """Whether another file lies in the place of this one by now, or none, as after a restored backup."""
        return self._present_place() != self._place

    def require_in_place(self) -> None:
        """Refuse to go on beside a file that has taken the place of this one.

        Raises:
            ValueError: it was replaced.
        """
        if self.replaced():
            raise ValueError(f"ledger must stay where it was opened, got {str(self.path)!r}, which was replaced")

    def rows(self, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """All rows of a query: no cursor stays open, since an open one would hold the write-ahead log."""
        with self.lock, self._translated():
            found = self._connection.execute(statement, parameters).fetchall()
        if self._frozen and self.replaced():
            raise ValueError(f"ledger must not change while it is read without write access, got {str(self.path)!r}")
        return found

    def value(self, statement: str, parameters: Sequence[Any] = ()) -> Any:
        """The first column of the first row; None where there is none."""
        rows = self.rows(statement, parameters)
        return rows[0][0] if rows else None

    def rows_in(self, statement: str, values: Sequence[Any]) -> Iterator[Any]:
        """Rows of a query with one `IN ({})`, whatever the number of values."""
        for start in range(0, len(values), _VARIABLES):
            part = values[start : start + _VARIABLES]
            yield from self.rows(statement.format(", ".join("?" * len(part))), part)

    def run(self, statement: str, parameters: Sequence[Any] = ()) -> int:
        """Run a changing statement inside a transaction; the number of rows it changed."""
        return self._connection.execute(statement, parameters).rowcount

    def insert(self, statement: str, parameters: Sequence[Any] = ()) -> int:
        """Insert a row inside a transaction; its row id."""
        row = self._connection.execute(statement, parameters).lastrowid
        assert row is not None
        return row

    def run_all(self, statement: str, rows: Iterable[Sequence[Any]]) -> int:
        """Run a changing statement once a row inside a transaction; the number of rows it changed."""
        return self._connection.executemany(statement, rows).rowcount

    @contextmanager
    def transaction(self, name: str) -> Iterator[None]:
        """Make the block's changes durable when it ends, all of them; none after an error.

        Args:
            name: of the step, for `faults.checkpoint`.
        """
        if not self.write:
            raise ValueError(f"ledger must be open for writing, got {str(self.path)!r} open read-only")
        self.require_in_place()
        with self.lock, self._translated():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                faults.checkpoint(f"{name}: commit")
                self._connection.execute("COMMIT")
            finally:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
            faults.checkpoint(f"{name}: committed")

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """Let nothing change, as the block sees it."""
        with self.lock, self._translated():
            if self.write or self._connection.in_transaction:  # nobody else writes
                yield
                return
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("COMMIT")

    def erase_log(self) -> None:
        """Move everything from the write-ahead log into the database, overwrite the log and cut it off.

        Its frames are old pages, with rows as they were before. SQLite only cuts it off, so that they stay in the
        blocks of the disk.

        Raises:
            ValueError: another process has been reading for more than ten seconds.
            OSError: the log cannot be overwritten.
        """
        deadline = time.monotonic() + _BUSY_SECONDS
        while not self._erase_log():
            if time.monotonic() > deadline:
                raise ValueError(
                    f"ledger must be free of long reads to be erased, got {str(self.path)!r} read by another process"
                )
            time.sleep(0.02)

    def _erase_log(self) -> bool:
        """The same at once; whether nobody's reading was in the way."""
        log = _log(self.path)
        with self.lock:
            faults.checkpoint("log: erasure")
            if self.replaced() or not log.exists() or not log.stat().st_size:
                return True
            if self.rows("PRAGMA wal_checkpoint(RESTART)")[0][0]:
                return False
            # The next commit, of a page without rows, starts the log again from its beginning. What lies behind it is
            # no part of the log then, whatever happens: SQLite tells frames of an earlier round by their salt.
            self.rows(f"PRAGMA user_version = {FORMAT}")
            frames = self.rows("PRAGMA wal_checkpoint(PASSIVE)")[0][1]
            if frames > 1:
                return False
            faults.checkpoint("log: started again")
            overwrite(log, start=_HEADER + frames * (_FRAME + self.value("PRAGMA page_size")))
            faults.checkpoint("log: overwritten")
            busy = self.rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]
            faults.checkpoint("log: cut off")
            return not busy

    def _present_place(self) -> tuple[int, ...] | None:
        """Which file lies at the path; where it was opened as one that nobody writes, with what tells a change."""
        try:
            found = self.path.stat()
        except OSError:
            return None
        place = (found.st_dev, found.st_ino)
        return (*place, found.st_mtime_ns, found.st_size, _log(self.path).exists()) if self._frozen else place

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _sentence(error, str(self.path)) from error


def create_database(
    path: Path, shards: Sequence[Sequence[Sequence[int]]], values: dict[str, str], audit: Sequence[Any]
) -> None:
    """Write a ledger without records into a file.

    Args:
        path: an empty file.
        shards: the sequences of every shard.
        values: rows of the table `system`.
        audit: the first row of the audit log.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            _configure(connection)
            connection.executescript(f"BEGIN; {_SCHEMA}")
            connection.execute(f"PRAGMA application_id = {APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            connection.executemany("INSERT INTO system VALUES (?, ?)", values.items())
            connection.executemany("INSERT INTO shards (shard) VALUES (?)", [(shard,) for shard in range(len(shards))])
            connection.executemany(
                "INSERT INTO sequences VALUES (?, ?, ?)",
                [
                    (shard, number, ".".join(map(str, sequence)))
                    for shard, sequences in enumerate(shards)
                    for number, sequence in enumerate(sequences)
                ],
            )
            connection.execute("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", audit)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise _sentence(error, str(path)) from error


def _log(path: Path) -> Path:
    """SQLite's write-ahead log of a database."""
    return path.with_name(f"{path.name}-wal")


def now() -> str:
    """The time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _disk_is_full(path: str) -> bool:
    with contextlib.suppress(OSError):
        return os.statvfs(os.path.dirname(path)).f_bavail == 0
    return False


def _configure(connection: sqlite3.Connection) -> None:
    # Temporary tables on disk would be copies that nobody erases.
    for setting in ("synchronous = FULL", "secure_delete = ON", "foreign_keys = ON", "temp_store = MEMORY"):
        connection.execute(f"PRAGMA {setting}").fetchall()


def _sentence(error: sqlite3.Error, path: str) -> Exception:
    """What went wrong, in one sentence that names the file; the error itself where it is a mistake of ours."""
    if isinstance(error, sqlite3.ProgrammingError) and "closed" in str(error):
        return ValueError(f"ledger must be open, got {path!r}, which is closed")
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _disk_is_full(path)):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
    if code == sqlite3.SQLITE_IOERR:
        return OSError(errno.EIO, f"ledger must be readable and writable: {error} ({error.sqlite_errorname})", path)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return ValueError(f"ledger must be an intact database, got {path!r}: {error}")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return ValueError(f"ledger must be used by nobody else to be written, got {path!r}: {error}")
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return ValueError(f"ledger must be in a folder with read and write access, got {path!r}: {error}")
    return error
