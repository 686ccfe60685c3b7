"""The folder of a ledger: who may use it, what is durable when, and what happens on a full disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from s3t_ledger_tools import (
    BASE,
    CYCLIC,
    content_of,
    land_all,
    make_content,
    make_ledger,
    make_stage,
    name_of,
    names_in,
    record_export,
    trained_ledger,
)

import pymape.storage.files
from pymape.prefix_cache import PrefixCache
from pymape.s3t import faults
from pymape.s3t.ledger import Ledger, RecordRow
from pymape.s3t.ledger import stages as ledger_stages
from pymape.s3t.stages import Provenance, StageKey


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    """2 shards of 4 slices with 5 records each, all stages trained."""
    with trained_ledger(tmp_path / "system") as made:
        yield made


def test_a_ledger_is_found_again(tmp_path: Path) -> None:
    with make_ledger(tmp_path, model="m", nested={"a": [1]}) as ledger:
        key, counts = ledger.key, ledger.counts()
        assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir()} == {"ledger.sqlite", "key", "lock", "audit.head", "stages"}
    with Ledger(tmp_path) as again:
        assert (again.key, again.counts(), again.base) == (key, counts, BASE)
        assert again.settings == {"model": "m", "nested": {"a": [1]}}
        assert again.sequences == [CYCLIC, CYCLIC]
    with pytest.raises(ValueError, match=r"ledger must be open, got .*ledger\.sqlite.*, which is closed"):
        again.counts()


def test_commits_wait_for_the_disk_and_clear_what_they_free(ledger: Ledger) -> None:
    settings = {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "foreign_keys": 1, "temp_store": 2}
    assert {name: ledger._db.value(f"PRAGMA {name}") for name in settings} == settings


def test_one_process_writes(tmp_path: Path) -> None:
    with make_ledger(tmp_path):
        with pytest.raises(ValueError, match="ledger must have one writer at a time"):
            Ledger(tmp_path)
        code = f"from pymape.s3t.ledger import Ledger; Ledger({str(tmp_path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"ledger must have one writer at a time, got '{tmp_path}'" in other.stderr
    Ledger(tmp_path).close()


def test_reading_changes_nothing_while_another_process_writes(ledger: Ledger) -> None:
    def files() -> dict[str, bytes]:
        names = ("key", "lock", "audit.head")
        return {name: (ledger.folder / name).read_bytes() for name in names} | {
            "content": repr(content_of(ledger)).encode()
        }

    ledger.tombstone([("first", names_in(ledger, 0, 1)[:1])])
    before = files()
    code = f"""
from pymape.s3t.ledger import Ledger
ledger = Ledger({str(ledger.folder)!r}, "read")
assert ledger.receipt("first")["state"] == "tombstoned"
assert [len(chain) for chain in ledger.serving()] == [1, 4]
assert ledger.verify()["problems"] == []
assert len(ledger.records(1, [0])) == 6
for change in (ledger.plan, ledger.repair, lambda: ledger.tombstone([("second", [ledger.records(1, [0])[0][0]])])):
    try:
        change()
    except ValueError as error:
        assert "must be open for writing" in str(error), error
    else:
        raise SystemExit("changed")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert files() == before
    ledger.finish()
    assert ledger.verify()["problems"] == []


def test_a_reader_that_never_ends_stops_erasure_with_a_clear_message(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pymape.s3t.ledger.database._BUSY_SECONDS", 0.1)
    reader = sqlite3.connect(f"file:{ledger.folder / 'ledger.sqlite'}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM audit").fetchall()
    ledger.tombstone([("first", names_in(ledger, 0, 1)[:1])])
    with pytest.raises(ValueError, match=r"ledger must be free of long reads to be erased, got .*ledger\.sqlite"):
        ledger.finish()
    assert ledger.receipt("first")["state"] == "switched"
    ledger.close()
    ledger = Ledger(ledger.folder)  # which may be needed to tombstone the next request
    reader.close()
    ledger.finish()
    assert ledger.receipt("first")["state"] == "verified"
    ledger.close()


def test_folders_that_hold_no_ledger_are_refused(tmp_path: Path) -> None:
    for mode in ("write", "read"):
        with pytest.raises(ValueError, match=r"ledger must be a folder with a ledger\.sqlite, got .* without"):
            Ledger(tmp_path, mode)  # type: ignore[arg-type]
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"made in a new or empty folder, got .* with 'mine\.txt'"):
        Ledger.create(tmp_path, {}, BASE, [CYCLIC])
    for sequences, message in (
        ([], "at least one order for every shard"),
        ([CYCLIC, []], "at least one order for every shard"),
        ([[(0, 1), (0, 2)]], r"orders of the slices 0 to 1, got \(0, 2\) in shard 0"),
        ([[(0, 1)], [(0, 1, 2)]], r"orders of the slices 0 to 1, got \(0, 1, 2\) in shard 1"),
        ([[()]], "orders of the slices"),
    ):
        with pytest.raises(ValueError, match=message):
            Ledger.create(tmp_path / "new", {}, BASE, sequences)
    assert not (tmp_path / "new").exists()
    make_ledger(tmp_path / "used").close()
    with pytest.raises(ValueError, match=r"made in a new or empty folder, got .* with 'ledger\.sqlite'"):
        Ledger.create(tmp_path / "used", {}, BASE, [CYCLIC])


def test_sequences_may_differ_between_shards(tmp_path: Path) -> None:
    with Ledger.create(tmp_path, {}, BASE, [[(0, 1), (1, 0)], [(1, 0)]]) as ledger:
        ledger.add_records(
            RecordRow.of(name_of(ledger, number), None, *divmod(number % 4, 2), make_content(number))
            for number in range(8)
        )
        assert ledger.plan() == 6
        assert land_all(ledger) == 6
        assert ledger.verify()["problems"] == []


def test_a_stage_is_durable_before_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_ledger(tmp_path) as ledger:
        row = ledger.runnable()[0]
        synced: set[int] = set()
        real = os.fsync

        def fsync(descriptor: int) -> None:
            synced.add(os.fstat(descriptor).st_ino)
            real(descriptor)

        def look(name: str) -> None:
            if name == "land: commit":
                assert {ledger.path(row.key).stat().st_ino, (tmp_path / "stages").stat().st_ino} <= synced
                looked.append(name)

        looked: list[str] = []
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(faults, "checkpoint", look)
        assert ledger.land(row.key, make_stage(ledger, row))
        assert looked


# Files that cannot be read


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.EACCES])
def test_a_stage_that_cannot_be_read_now_is_not_damaged(
    ledger: Ledger, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, real, before = ledger.stages(0)[3], Path.read_bytes, content_of(ledger)

    def fail(path: Path) -> bytes:
        if path == ledger.path(row.key):
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(OSError, match=row.key.name):
            ledger.repair()
        assert [problem for problem in ledger.verify()["problems"] if row.key.name in problem]
    assert content_of(ledger) == before
    assert ledger.repair() == 0
    ledger.path(row.key).unlink()
    assert ledger.repair() > 0


# Files that cannot be erased


def refuse(patch: pytest.MonkeyPatch, place: str, *paths: Path) -> None:
    """Some files can be read, and not written, as those of another user or immutable ones."""
    real = pymape.storage.files.overwrite

    def overwrite(path: str | os.PathLike[str]) -> int:
        if Path(path) in paths:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return real(path)

    patch.setattr(f"{place}.overwrite", overwrite)


@pytest.mark.parametrize("place", ["pymape.s3t.erasure", "pymape.prefix_cache"])
def test_a_file_that_cannot_be_erased_holds_up_its_request_alone(
    ledger: Ledger, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (names_in(ledger, shard, part)[0] for shard, part in ((0, 1), (1, 2), (1, 3)))
    cache = PrefixCache(ledger.folder / "cache")
    for name in (first, second):
        cache.put("prefix", name, "inputs", torch.zeros(2))
    ended = [ledger.path(row.key) for row in ledger.stages(0) if 1 in row.key.prefix]
    kept = ended[0] if place == "pymape.s3t.erasure" else cache._file("prefix", first)
    ledger.tombstone([("first", [first]), ("second", [second])])
    with monkeypatch.context() as patch:
        refuse(patch, place, kept)
        with pytest.raises(PermissionError, match=kept.name):
            ledger.finish()
        assert [receipt["state"] for receipt in ledger.requests()] == ["switched", "verified"]
        left = [path for path in (*ended, *cache.path.rglob("*.safetensors")) if path.exists()]
        assert left == [kept]
        entry = next(entry for entry in ledger.audit_log() if entry.event == "requests erased")
        assert json.loads(entry.detail) == {"exports": [], "records": 1, "requests": ["second"], "stages": 10}
        ledger.close()
        with Ledger(ledger.folder) as again:  # whose opening does what it can
            again.tombstone([("third", [third])])
            with pytest.raises(PermissionError, match=kept.name):
                again.finish()
            assert [receipt["state"] for receipt in again.requests()] == ["switched", "verified", "verified"]
            assert again.verify()["problems"] == []
    with Ledger(ledger.folder) as again:
        assert not kept.exists()
        assert {receipt["state"] for receipt in again.requests()} == {"verified"}
        assert again.stage_counts().keys() == {"trained", "erased"}
        assert again.verify()["problems"] == []


def test_what_a_crash_left_and_cannot_be_erased_is_named(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    left = ledger.folder / "stages" / "shard00-1-g1.safetensors"
    left.write_bytes(b"weights")
    ledger.close()
    refuse(monkeypatch, "pymape.s3t.erasure", left)
    with Ledger(ledger.folder) as again:
        assert again.verify()["problems"] == [f"file '{left}' belongs to nothing"]


def test_a_damaged_stage_that_cannot_be_erased_is_replaced(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ledger.path(StageKey(1, (3, 0)))
    path.write_bytes(path.read_bytes()[:-1])
    with monkeypatch.context() as patch:
        refuse(patch, "pymape.s3t.erasure", path)
        assert ledger.repair() == 3
        assert land_all(ledger) == 3
        with pytest.raises(PermissionError, match=path.name):
            ledger.finish()
    ledger.finish()
    assert not path.exists()
    assert ledger.verify()["problems"] == []


def test_a_request_waits_for_a_damaged_stage_that_was_trained_on_its_record(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {row.key.prefix: row for row in ledger.stages(0)}
    held, free = (ledger.path(rows[prefix].key) for prefix in ((0,), (3,)))
    for path in (held, free):
        path.write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        refuse(patch, "pymape.s3t.erasure", held)
        ledger.repair()
        assert not free.exists()
        names, other = names_in(ledger, 0, 0)[:1], names_in(ledger, 1, 0)[:1]
        planned = ledger.plan_deletion(names)
        ledger.tombstone([("first", names), ("other", other)])
        assert set(ledger.finish(check=False)) == {"first"}
        receipt = ledger.receipt("first")
        assert (receipt["state"], ledger.receipt("other")["state"]) == ("switched", "verified")
        assert planned.items() <= receipt.items()
        assert receipt["stages"] == sum(len(shard["stages"]) for shard in receipt["shards"])
        assert rows[0,].key.name not in receipt["shards"][0]["stages"]  # it was ended before
        assert receipt["bytes"] >= rows[0,].size
        assert ledger.verify()["unfinished"] == ["request 'first' is switched"]
    assert ledger.finish() == {}
    assert not held.exists()
    assert ledger.receipt("first")["state"] == "verified"
    ledger.tombstone([("second", names_in(ledger, 0, 3)[:1])])  # of a stage that repair has ended and erased
    ledger.finish()
    assert ledger.receipt("second")["state"] == "verified"
    assert ledger.verify()["problems"] == []


# A full disk


def full_files(ledger: Ledger, patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No file can be written beside the database."""

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr("pymape.storage.files.os.fsync", fail)
    return patch.undo


def full_database(ledger: Ledger, patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The database cannot grow."""
    connection = ledger._db._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    return lambda: connection.execute("PRAGMA max_page_count = 1000000") and None


def small_files(ledger: Ledger, patch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No file can be longer than the log is now, so that its next frame fails."""
    limit = (ledger.folder / "ledger.sqlite-wal").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fill", [full_database, small_files])
def test_a_request_on_a_full_disk_changes_nothing(
    tmp_path: Path, fill: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with trained_ledger(tmp_path, records=2000) as ledger:
        names = [name_of(ledger, number) for number in range(1500)]
        before, counts = content_of(ledger), ledger.counts()
        empty = fill(ledger, monkeypatch)
        try:
            with pytest.raises(OSError, match=r"ledger\.sqlite") as error:
                ledger.tombstone([("first", names)])
        finally:
            empty()
        assert error.value.errno in (errno.ENOSPC, errno.EIO)
        assert "\n" not in str(error.value)
        assert content_of(ledger) == before
        assert ledger.counts() == counts
        assert ledger.tombstone([("first", names)])[0]["records"] == 1500
        ledger.finish()
        assert ledger.verify()["problems"] == []


@pytest.mark.parametrize("fill", [full_database, full_files, small_files])
def test_a_stage_on_a_full_disk_stays_planned(
    tmp_path: Path, fill: Callable[..., Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_ledger(tmp_path) as ledger:
        ledger._db.erase_log()
        connection = ledger._db._connection
        row = ledger.runnable()[0]
        content = make_stage(ledger, row)
        if fill is not full_files:  # so that the row needs a new page
            monkeypatch.setattr(Provenance, "to_json", lambda self, real=Provenance.to_json: real(self) + " " * 20000)
        if fill is small_files:
            connection.execute("UPDATE system SET value = value || ' '")  # makes a log longer than the stage's file
            assert (tmp_path / "ledger.sqlite-wal").stat().st_size > len(content)
        before = content_of(ledger)
        empty = fill(ledger, monkeypatch)
        try:
            with pytest.raises(
                OSError,
                match=r"(No space|ledger must be readable and writable).*/(ledger\.sqlite|shard00-0-g0\.safetensors)'$",
            ):
                ledger.land(row.key, content)
        finally:
            empty()
        assert content_of(ledger) == before
        assert ledger.land(row.key, content)
        assert land_all(ledger) == 31


def test_finishing_on_a_full_disk_continues_later(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.tombstone([("first", names_in(ledger, 0, 1)[:1])])
    with monkeypatch.context() as patch:
        real = ledger_stages.erase_files

        def fail(paths: Any) -> int:
            real([*paths][:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("pymape.s3t.ledger.finish.erase_files", fail)
        with pytest.raises(OSError, match="No space left"):
            ledger.finish()
    assert ledger.receipt("first")["state"] == "switched"
    ledger.finish()
    assert ledger.receipt("first")["state"] == "verified"
    assert ledger.verify()["problems"] == []


def test_creation_on_a_full_disk_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        full_files(None, patch)  # type: ignore[arg-type]
        with pytest.raises(OSError, match="No space left"):
            Ledger.create(tmp_path, {}, BASE, [CYCLIC])
    Ledger.create(tmp_path, {}, BASE, [CYCLIC]).close()


def test_the_anchor_may_lag_behind_the_log(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (ledger.folder / "audit.head").read_bytes()
    with monkeypatch.context() as patch:
        full_files(ledger, patch)
        record_export(ledger, Path("somewhere"), {}, [])
    assert len(ledger.exports()) == 1
    assert (ledger.folder / "audit.head").read_bytes() == before
    assert ledger.verify()["problems"] == []
    ledger.tombstone([("first", names_in(ledger, 0, 1)[:1])])
    assert (ledger.folder / "audit.head").read_bytes() == before  # an answer does not wait for it
    ledger.finish()
    assert (ledger.folder / "audit.head").read_bytes() != before
