"""What a system lies on changes under it: folders put back, lost files, unmounted and full disks, other writers."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from s3t_ledger_tools import land_all, make_ledger, make_stage, name_of, names_in, record_export, trained_ledger
from s3t_tools import make_records, options, write_base

from pymape.prefix_cache import PrefixCache
from pymape.s3t import S3T, erasure, faults
from pymape.s3t.ledger import Ledger, RecordRow
from pymape.s3t.ledger.folder import CACHE
from pymape.s3t.served import ServedStages
from pymape.s3t.stages import row_digest

CONTENT = b"weights of every stage"
AT_WORK_ELSEWHERE = """
import sys
from pymape.prefix_cache import PrefixCache
with PrefixCache(sys.argv[1]).in_use():
    print("at work", flush=True)
    sys.stdin.read()
"""


def put_back(folder: Path) -> None:
    """Replace a folder by its copy, as a restored backup or a moved disk does."""
    copy = shutil.copytree(folder, folder.with_name("copy"))
    shutil.rmtree(folder)
    copy.rename(folder)


def test_an_ensemble_follows_a_folder_that_was_put_back(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        names = [names_in(ledger, 0, part)[0] for part in range(4)]
    source = ServedStages(tmp_path / "system")
    before = source.read().stages
    put_back(tmp_path / "system")
    source.changed()
    assert source.read().stages == before
    put_back(tmp_path / "system")
    with Ledger(tmp_path / "system") as ledger:
        ledger.tombstone([("all", names)])
        ledger.finish()
    assert source.changed()
    with pytest.raises(ValueError, match="no shard can be served: every shard is dead"):
        source.read()
    shutil.rmtree(tmp_path / "system")
    with pytest.raises(ValueError, match=r"ledger must be a folder with a ledger\.sqlite"):
        source.changed()


def test_a_deletion_is_not_acknowledged_in_a_folder_that_is_gone(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        names = names_in(ledger, 0, 0)
        put_back(tmp_path / "system")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"ledger must stay where it was opened, got .*, which was replaced"):
                ledger.tombstone([("one", names[:1])])
    with Ledger(tmp_path / "system") as ledger:
        assert ledger.requests() == []
        ledger.tombstone([("one", names[:1])])
        ledger.finish()
        assert ledger.verify()["problems"] == []


@pytest.mark.parametrize(("size", "message"), [(0, "a key of 32 bytes, got 0"), (32, "did not write row 1")])
def test_another_key_is_noticed_before_anything_is_named_by_it(tmp_path: Path, size: int, message: str) -> None:
    with trained_ledger(tmp_path / "system", shards=1):
        pass
    key = tmp_path / "system" / "key"
    own = key.read_bytes()
    key.write_bytes(secrets.token_bytes(size))
    with pytest.raises(ValueError, match=message):
        Ledger(tmp_path / "system")
    key.write_bytes(own)
    Ledger(tmp_path / "system").close()


def test_a_lost_anchor_is_accepted_on_demand_only_and_noted(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        names = names_in(ledger, 0, 0)
    anchor = tmp_path / "system" / "audit.head"
    kept = anchor.read_text()
    anchor.unlink()
    with pytest.raises(ValueError, match="missing or damaged"):
        Ledger(tmp_path / "system")
    with Ledger(tmp_path / "system", accept_lost_anchor=True) as ledger:
        assert ledger.audit_log()[-1].event == "lost anchor accepted"
        ledger.tombstone([("one", names)])
        ledger.finish()
        assert ledger.verify()["problems"] == []
    last = json.loads(anchor.read_text())["seq"]
    anchor.write_text(json.dumps({"seq": last + 1, "mac": json.loads(kept)["mac"]}))
    with pytest.raises(ValueError, match="audit log ends at row"):  # what is there must be right all the same
        Ledger(tmp_path / "system", accept_lost_anchor=True)


def test_a_new_writer_waits_for_workers_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trained_ledger(tmp_path / "system", shards=1):
        pass
    cache = tmp_path / "system" / CACHE
    command = [sys.executable, "-c", AT_WORK_ELSEWHERE, str(cache)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as orphan:
        assert orphan.stdout is not None
        assert orphan.stdout.readline() == "at work\n"
        with monkeypatch.context() as patch:
            patch.setattr("pymape.storage.files._WORK_SECONDS", 0.1)
            with pytest.raises(ValueError, match="workers of a process that was killed must have ended"):
                Ledger(tmp_path / "system")
        Ledger(tmp_path / "system", "read").close()
        orphan.kill()
    with Ledger(tmp_path / "system"), PrefixCache(cache).in_use():  # its own workers may work
        pass


def test_an_export_whose_disk_was_not_there_is_erased_when_it_is(tmp_path: Path) -> None:
    disk, away = tmp_path / "disk", tmp_path / "away"
    (disk / "export").mkdir(parents=True)
    names = ("adapter", "changed")
    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        for name in names:
            (disk / "export" / name).write_bytes(CONTENT)
        stages = [row.key for row in ledger.serving()[0]]
        record_export(ledger, disk / "export", dict.fromkeys(names, row_digest(CONTENT)), stages)
        disk.rename(away)
        ledger.tombstone([("one", names_in(ledger, 0, 0)[:1])])
        ledger.finish()
        assert ledger.receipt("one")["state"] == "verified"
        assert ledger.exports()[0]["outcome"]["missing"] == list(names)
        assert ledger.verify()["problems"] == []
        away.rename(disk)
        (disk / "export" / "changed").write_bytes(b"by somebody")
        assert len(ledger.verify()["problems"]) == 2
        ledger.finish()
        outcome = ledger.exports()[0]["outcome"]
        assert (outcome["erased"], outcome["changed"], outcome["missing"]) == (["adapter"], ["changed"], [])
        assert not (disk / "export" / "adapter").exists()
        assert ledger.audit_log()[-1].event == "export erased late"
        assert ledger.verify()["problems"] == []


@pytest.mark.parametrize("asked", ["before", "meanwhile", "never"])
def test_an_interrupted_export_whose_disk_was_not_there_is_erased_when_it_is(tmp_path: Path, asked: str) -> None:
    disk, away, partial = tmp_path / "disk", tmp_path / "away", tmp_path / "disk" / ".export.x.partial"
    disk.mkdir()
    with trained_ledger(tmp_path / "system") as ledger:
        names = names_in(ledger, 0, 0)[:1]
    code = f"""
import os
from pathlib import Path
from pymape.s3t.ledger import Ledger
ledger, partial = Ledger({str(tmp_path / "system")!r}), Path({str(partial)!r})
with ledger.exporting(partial, [row.key for row in ledger.serving()[0]]):
    partial.mkdir()
    (partial / "adapter").write_bytes({CONTENT!r})
    if {asked == "before"}:
        ledger.tombstone([("one", {names!r})])
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    os.link(partial / "adapter", tmp_path / "link")
    disk.rename(away)
    for _ in range(2):
        with Ledger(tmp_path / "system") as ledger:
            assert ledger.verify()["problems"] == []
    with Ledger(tmp_path / "system") as ledger:
        if asked == "meanwhile":
            ledger.tombstone([("one", names)])
            ledger.finish()
        requests = [receipt["state"] for receipt in ledger.requests()]
        assert requests == ["verified"] * (asked != "never")
        assert [entry["outcome"]["missing"] for entry in ledger.exports()] == [["."]] * len(requests)
        away.rename(disk)
        assert len(ledger.verify()["problems"]) == len(requests)
        ledger.finish()
        if asked != "never":
            assert [entry["outcome"]["erased"] for entry in ledger.exports()] == [["."]]
    with Ledger(tmp_path / "system") as ledger:
        assert ledger.verify()["problems"] == []
    assert not partial.exists()
    assert not any((tmp_path / "link").read_bytes())


def test_a_later_export_in_the_place_of_a_revoked_one_is_left_alone(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system", shards=2) as ledger:
        for shard in (0, 1):
            stages = [row.key for row in ledger.serving()[shard]]
            if shard:
                (tmp_path / "export").mkdir()
                (tmp_path / "export" / "adapter").write_bytes(CONTENT)
            record_export(ledger, tmp_path / "export", {"adapter": row_digest(CONTENT)}, stages)
            if not shard:
                ledger.tombstone([("one", names_in(ledger, 0, 0)[:1])])
                ledger.finish()
        ledger.finish()
        assert ledger.verify()["problems"] == []
        assert (tmp_path / "export" / "adapter").read_bytes() == CONTENT


@pytest.mark.parametrize("step", ["switch", "erase", "erased", "verify"])
def test_a_request_waits_for_a_disk_that_is_full_at_any_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(name: str) -> None:
        if name == f"{step}: commit":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        ledger.tombstone([("one", names_in(ledger, 0, 0)[:1])])
        with monkeypatch.context() as patch:
            patch.setattr(faults, "checkpoint", fail)
            found = ledger.finish(check=False)
            assert [*found] == ["one"]
            assert isinstance(found["one"], OSError)
            ledger.close()
            Ledger(tmp_path / "system").close()  # opening does what it can
        with Ledger(tmp_path / "system") as again:
            assert again.receipt("one")["state"] == "verified"
            assert again.verify()["problems"] == []


@pytest.mark.parametrize("provenance", [b"\0", b"{", b"\xff\xff", b"[]"])
def test_a_damaged_provenance_is_named_and_can_be_repaired(tmp_path: Path, provenance: bytes) -> None:
    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        row = ledger.serving()[0][0]
        with ledger._db.transaction("damage"):
            ledger._db.run("UPDATE files SET provenance = ? WHERE stage = ?", (provenance, row.stage))
        other = next(part for part in range(4) if part not in row.key.prefix)
        ledger.tombstone([("one", names_in(ledger, 0, other)[:1])])
        with pytest.raises(ValueError, match=f"stage {row.key.name} must have a provenance in the ledger"):
            ledger.finish()
        assert any(row.key.name in problem for problem in ledger.verify()["problems"])
    with Ledger(tmp_path / "system") as ledger:
        ledger.repair()
        land_all(ledger)
        ledger.finish()
        assert ledger.receipt("one")["state"] == "verified"
        assert ledger.verify()["problems"] == []


def test_a_file_that_another_process_is_writing_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymape.s3t.ledger.verify._SETTLE_SECONDS", 0.0)
    with make_ledger(tmp_path / "system", shards=1) as ledger:
        row = ledger.runnable()[0]
        reports: list[dict[str, Any]] = []
        monkeypatch.setattr(
            faults,
            "checkpoint",
            lambda name: name == "land: file written" and reports.append(Ledger(ledger.folder, "read").verify()),
        )
        ledger.land(row.key, make_stage(ledger, row))
        monkeypatch.undo()
    assert reports[0]["problems"] == []
    assert reports[0]["unfinished"] == [f"file '{ledger.folder}/stages/{row.key.name}.safetensors' is being written"]
    left = ledger.folder / "stages" / "shard00-9-g0.safetensors"
    left.write_bytes(b"")
    monkeypatch.setattr("pymape.s3t.ledger.verify._SETTLE_SECONDS", 0.0)
    assert Ledger(ledger.folder, "read").verify()["problems"] == [f"file '{left}' belongs to nothing"]


def test_a_folder_without_write_access_can_be_read_while_nobody_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only disk. Root may write whatever a folder's mode says, so `os.access` is told what to say."""
    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        names = names_in(ledger, 0, ledger.serving()[0][-1].key.prefix[-1])
    before = sorted(path.name for path in (tmp_path / "system").iterdir())
    with monkeypatch.context() as patch:
        patch.setattr("pymape.s3t.ledger.database.os.access", lambda path, mode: False)
        source = ServedStages(tmp_path / "system")
        served = source.read().stages
        assert served
        assert Ledger(tmp_path / "system", "read").verify()["problems"] == []
        assert sorted(path.name for path in (tmp_path / "system").iterdir()) == before
    reader = source._ledger
    with Ledger(tmp_path / "system") as ledger:
        ledger.tombstone([("one", names)])
        assert reader.replaced()
        with pytest.raises(ValueError, match="ledger must not change while it is read without write access"):
            reader.counts()
        assert source.changed()
        assert source.read().stages == served[:-1]


def test_an_accepted_request_is_missed_in_a_copy_without_the_log(tmp_path: Path) -> None:
    """`finish=False` moves the anchor once the request is accepted: SQLite's log cannot be lost quietly then."""
    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        ledger.tombstone([("one", names_in(ledger, 0, 0)[:1])])
        ledger.move_anchor()
        copied = shutil.copytree(ledger.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*-wal", "*-shm"))
    with pytest.raises(ValueError, match=r"audit log ends at row .*, its anchor at row"):
        Ledger(copied)


def test_a_finished_export_is_not_taken_for_an_interrupted_one(tmp_path: Path) -> None:
    partial = tmp_path / "exports" / ".export.x.partial"
    partial.mkdir(parents=True)
    with trained_ledger(tmp_path / "system") as ledger:
        names = names_in(ledger, 0, 0)[:1]
    code = f"""
import os
from pathlib import Path
from pymape.s3t.ledger import Ledger
ledger, partial = Ledger({str(tmp_path / "system")!r}), Path({str(partial)!r})
with ledger.exporting(partial, [row.key for row in ledger.serving()[0]]):
    partial.rename(partial.with_name("export"))
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    with Ledger(tmp_path / "system") as ledger:
        ledger.tombstone([("one", names)])
        ledger.finish()
        assert ledger.exports() == []


def test_a_stage_that_lands_while_records_come_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_ledger(tmp_path / "system", shards=1) as ledger:
        row = ledger.runnable()[0]
        content, part = make_stage(ledger, row), row.key.prefix[0]

        def ingest(point: str) -> None:
            if point == "land: file written":
                ledger.add_records([RecordRow.of(name_of(ledger, 99), None, 0, part, b"late")])

        monkeypatch.setattr(faults, "checkpoint", ingest)
        with pytest.raises(ValueError, match=f"got other records of slice {part}"):
            ledger.land(row.key, content)
        monkeypatch.undo()
        assert not ledger.path(row.key).exists()
        assert ledger.land(row.key, make_stage(ledger, row))
        assert ledger.verify()["problems"] == []


def test_a_reader_reads_a_slice_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trained_ledger(tmp_path / "system", shards=1) as ledger, Ledger(tmp_path / "system", "read") as reader:
        before, read = reader.slice_digest(0, 1), []
        rows = reader._db.rows

        def noted(query: str, *values: Any) -> list[Any]:
            read.extend([query] if query.startswith("SELECT name, digest") else [])
            return rows(query, *values)

        monkeypatch.setattr(reader._db, "rows", noted)
        assert reader.slice_digest(0, 1) == before
        assert read == []
        ledger.tombstone([("one", names_in(ledger, 0, 1)[:1])])
        assert reader.slice_digest(0, 1) == ledger.slice_digest(0, 1) != before
        assert len(read) == 1


def test_the_folder_of_an_erased_file_reaches_the_disk_after_another_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.write_bytes(CONTENT)
    synced: list[Path] = []

    def overwrite(path: Path) -> int:
        if path == other:
            raise PermissionError(errno.EPERM, "not now", str(path))
        return real(path)

    real = erasure.overwrite
    monkeypatch.setattr(erasure, "overwrite", overwrite)
    monkeypatch.setattr(erasure, "sync_tree", lambda folder, deep: synced.append(folder))
    assert set(erasure.try_each(erasure.erase_files, [one, other])) == {other}
    assert not one.exists()
    assert synced == [tmp_path]


def test_a_base_beside_a_system_is_found_through_a_link(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "data").mkdir()
    base = write_base(tmp_path / "data" / "base")
    S3T.create(tmp_path / "data" / "system", options(base)).close()
    (tmp_path / "link").symlink_to(tmp_path / "data" / "system")
    with S3T(tmp_path / "link", read_only=True) as system:
        assert system.config.model == base


def test_what_is_not_trained_yet_is_not_called_dead(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with S3T.create(tmp_path / "system", options(write_base(tmp_path / "base"), shards=1)) as system:
        system.ingest(make_records("bert", 40))
        system.delete(["r1"], "one")
        with pytest.raises(ValueError, match="nothing is trained yet"):
            system.ensemble()
