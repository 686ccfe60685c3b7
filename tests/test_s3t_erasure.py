"""Erasure: nothing of a deleted record is left in any file."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from s3t_ledger_tools import (
    all_bytes,
    land_all,
    make_content,
    make_ledger,
    make_rows,
    make_stage,
    name_of,
    names_in,
    record_export,
    trained_ledger,
)

from pymape.prefix_cache import PrefixCache
from pymape.s3t import faults
from pymape.s3t.erasure import erase_files, revoke_export
from pymape.s3t.ledger import Ledger
from pymape.s3t.partition import subject_name
from pymape.s3t.stages import StageKey, row_digest, unpack_stage
from pymape.storage.store import file_hash

# Files


def test_a_file_is_overwritten_on_disk_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []
    real_sync, real_unlink = os.fsync, Path.unlink
    sizes = [0, 1, 5000, (1 << 20) + 1]
    paths = [tmp_path / str(size) for size in sizes]
    for path, size in zip(paths, sizes):
        path.write_bytes(b"x" * size)
        os.link(path, path.with_suffix(".link"))  # shows what is left in the file's own blocks

    def fsync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        assert path.read_bytes() == bytes(int(path.name))
        assert events[-1] == path.stat().st_ino
        events.append(path)
        real_unlink(path)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "unlink", unlink)
    assert erase_files([*paths, tmp_path / "missing"]) == sum(sizes)
    assert [event for event in events if isinstance(event, Path)] == paths
    assert events[-1] == tmp_path.stat().st_ino
    for path, size in zip(paths, sizes):
        assert not path.exists()
        assert path.with_suffix(".link").read_bytes() == bytes(size)


def make_export(folder: Path) -> dict[str, str]:
    (folder / "shard-00").mkdir(parents=True)
    files = {
        "base_model.json": b"{}",
        "shard-00/adapter_model.safetensors": b"weights",
        "shard-00/adapter_config.json": b"[]",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return {name: file_hash(folder / name) for name in files}


def test_an_export_is_revoked(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    files = make_export(folder)
    outcome = revoke_export(folder, files)
    assert outcome == {"path": str(folder), "erased": sorted(files), "changed": [], "missing": []}
    assert not folder.exists()
    assert revoke_export(folder, files)["missing"] == sorted(files)


def test_what_is_no_longer_the_export_stays(tmp_path: Path) -> None:
    folder = tmp_path / "export"
    files = make_export(folder)
    (folder / "shard-00/adapter_config.json").write_text("changed")
    (folder / "base_model.json").unlink()
    (folder / "notes.txt").write_text("mine")
    outcome = revoke_export(folder, files)
    assert outcome["erased"] == ["shard-00/adapter_model.safetensors"]
    assert outcome["changed"] == ["shard-00/adapter_config.json"]
    assert outcome["missing"] == ["base_model.json"]
    assert sorted(path.name for path in folder.rglob("*")) == ["adapter_config.json", "notes.txt", "shard-00"]


def test_a_revocation_that_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is half overwritten no longer has its sha256, and is erased nevertheless."""
    folder = tmp_path / "export"
    files = make_export(folder)

    def stop(name: str) -> None:
        if name == "erase: overwritten":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(faults, "checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            revoke_export(folder, files)
    assert len([*folder.rglob("*.revoked")]) == 1
    outcome = revoke_export(folder, files)
    assert outcome["erased"] == sorted(files)
    assert not folder.exists()


def test_after_a_file_that_cannot_be_erased_the_others_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "export"
    files = make_export(folder)

    def refuse(paths: list[Path]) -> int:
        if paths[0].name == ".base_model.json.revoked":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return erase_files(paths)

    with monkeypatch.context() as patch:
        patch.setattr("pymape.s3t.erasure.erase_files", refuse)
        with pytest.raises(OSError, match=rf"Read-only file system: '{folder}/base_model\.json'"):
            revoke_export(folder, files)
    assert [path.name for path in folder.rglob("*")] == [".base_model.json.revoked"]
    assert revoke_export(folder, files)["erased"] == ["base_model.json"]
    assert not folder.exists()


def test_a_file_of_an_export_is_renamed_on_disk_before_it_is_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, events = make_export(tmp_path / "export"), []
    monkeypatch.setattr("pymape.s3t.erasure.sync_tree", lambda folder, deep: events.append(folder.name))
    monkeypatch.setattr("pymape.s3t.erasure.erase_files", lambda paths: events.append("erase"))
    revoke_export(tmp_path / "export", files)
    assert events == ["export", "erase", *["shard-00", "erase"] * 2]


# Exports of a ledger


def export(ledger: Ledger, folder: Path, shard: int) -> dict[str, str]:
    files = make_export(folder)
    stages = [row.key for row in ledger.serving()[shard]]
    record_export(ledger, folder, files, stages)
    return files


def test_a_deletion_revokes_the_exports_of_its_stages(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system") as ledger:
        one, other, third = tmp_path / "one", tmp_path / "other", tmp_path / "third"
        files = export(ledger, one, 0)
        export(ledger, other, 1)
        export(ledger, third, 0)
        names = names_in(ledger, 0, 0)
        assert ledger.plan_deletion(names[:1])["exports"] == [str(one), str(third)]
        (third / "base_model.json").write_text("changed")
        receipts = ledger.tombstone([("first", names[:1]), ("second", names[1:2])])
        assert [receipt["exports"] for receipt in receipts] == [[str(one), str(third)], []]
        assert one.exists()
        ledger.finish()
        assert not one.exists()
        assert other.exists()
        revoked = ledger.receipt("first")["revoked"]
        assert [outcome["path"] for outcome in revoked] == [str(one), str(third)]
        assert [outcome["changed"] for outcome in revoked] == [[], ["base_model.json"]]
        assert ledger.receipt("second")["revoked"] == []
        assert any('"erased":' in entry.detail and str(one) in entry.detail for entry in ledger.audit_log())
        assert [(entry["path"], entry["request"]) for entry in ledger.exports()] == [
            (str(one), "first"), (str(other), None), (str(third), "first"),
        ]  # fmt: skip
        # A later deletion finds nothing to revoke any more, and a new export in the same place is another one.
        assert ledger.plan_deletion(names[2:3])["exports"] == []
        assert export(ledger, one, 0) == files
        ledger.tombstone([("third", names_in(ledger, 0, ledger.serving()[0][0].key.prefix[0])[:1])])
        ledger.finish()
        assert not one.exists()
        assert ledger.verify()["problems"] == []


def test_an_export_of_an_ended_stage_is_refused(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system") as ledger:
        stages = [row.key for row in ledger.serving()[0]]
        ledger.tombstone([("first", names_in(ledger, 0, 3)[:1])])
        with pytest.raises(ValueError, match=r"stages of an export must be live, got shard00-0\.1\.2\.3-g0"):
            record_export(ledger, tmp_path / "export", {}, stages)
        assert ledger.exports() == []
        record_export(ledger, tmp_path / "export", {}, stages[:-1])


def test_a_second_export_replaces_the_first(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system") as ledger:
        for shard in (0, 1):
            record_export(ledger, tmp_path / "export", {}, [row.key for row in ledger.serving()[shard]])
        assert len(ledger.exports()) == 1
        assert ledger.plan_deletion(names_in(ledger, 0, 0)[:1])["exports"] == []


# Traces


def test_nothing_of_a_deleted_record_is_left(tmp_path: Path) -> None:
    """Look for every trace in every byte of the folder, before and after."""
    folder = tmp_path / "system"
    with make_ledger(folder, records=200) as ledger:
        cache = PrefixCache(folder / "cache")
        states = {}
        for number in range(200):
            states[number] = torch.randn(2, 8, generator=torch.Generator().manual_seed(number))
            for prefix in ("one level", "another level"):
                cache.put(prefix, name_of(ledger, number), "inputs", states[number])
        land_all(ledger)
        name, key = name_of(ledger, 7), ledger.key  # r6 to r8 are one person's, in slice 2 of shard 0
        digest = row_digest(make_content(7))
        part = ledger.slice_digest(0, 2)
        ended = [row for row in ledger.stages(0) if 2 in row.key.prefix]
        weights = {row.key.name: unpack_stage(ledger.read_stage(row))[0]["lora"].numpy().tobytes() for row in ended}
        kept = ledger.stages(1)[0]
        kept_weights = unpack_stage(ledger.read_stage(kept))[0]["lora"].numpy().tobytes()
    traces = {
        "content": make_content(6),
        "a long content's beginning": make_content(7)[:32],
        "a long content's end": make_content(7)[-32:],
        "digest": bytes.fromhex(digest),
        "digest in text": digest.encode(),
        "subject": bytes.fromhex(subject_name(key, "s2")),
        "subject in text": subject_name(key, "s2").encode(),
        "cached states": states[7].numpy().tobytes(),
        "slice": part.encode(),
        **weights,
    }
    ids = {"plain id": b'"r7"', "id in text": b"\0r7\0", "plain subject": b'"s2"'}
    assert len(weights) == 10
    before = all_bytes(folder)

    def found(files: dict[str, bytes], wanted: dict[str, bytes]) -> set[str]:
        return {trace for trace, data in wanted.items() if any(data in content for content in files.values())}

    there = found(before, traces)
    assert there == traces.keys() - {"digest in text", "subject in text"}
    assert not found(before, ids)
    assert found(before, {"name": bytes.fromhex(name)})

    with Ledger(folder) as ledger:
        ledger.tombstone([("all of a person", [name_of(ledger, number) for number in (6, 7, 8)])])
        stages = {path.name: path.read_bytes() for path in (folder / "stages").iterdir()}
        assert found(stages, weights) == weights.keys()
        ledger.finish()
        live = in_another_process(folder)  # the database and its log, while they are in use
        assert not found(live, traces | ids)
        assert len(cache) == 2 * 197
        ledger.repair()
        land_all(ledger)
    after = all_bytes(folder)
    assert not found(after, traces | ids)
    others = {"content": make_content(9), "states": states[9].numpy().tobytes(), "weights": kept_weights}
    assert found(after, others) == others.keys()
    assert found(after, {"name": bytes.fromhex(name)})  # the tombstone
    assert [path for path in after if bytes.fromhex(name) in after[path]] == ["ledger.sqlite"]


def test_a_refused_ingest_leaves_nothing_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_ledger(tmp_path / "system", records=3) as ledger:
        ledger._db.rows("PRAGMA cache_size = 1")  # as many records as need more than the cache has

        def rows(ledger: Ledger) -> Any:
            yield from make_rows(ledger, 1500)
            raise ValueError("records must be good")

        log, content = ledger.folder / "ledger.sqlite-wal", make_content(503)
        seen: list[bool] = []

        def fail() -> None:
            seen.append(content[:32] in log.read_bytes())
            raise ValueError("ledger must be free of long reads to be erased")

        with monkeypatch.context() as patch:
            patch.setattr(ledger._db, "erase_log", fail)
            with pytest.raises(ValueError, match="records must be good"):
                ledger.add_records(rows(ledger))
        assert seen == [True]
        with pytest.raises(ValueError, match="records must be good"):
            ledger.add_records(rows(ledger))
        assert content[:32] not in log.read_bytes()
        assert sum(map(sum, ledger.counts())) == 3
        assert ledger.verify()["problems"] == []


def test_the_log_is_overwritten_before_it_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of that has reached the disk when the power fails, the ledger is the same."""
    system = tmp_path / "system"
    images: list[dict[str, bytes]] = []  # what lies in the folder, by turns before and after it is overwritten

    def look(name: str) -> None:
        if name in ("log: started again", "log: overwritten"):
            images.append(apart(system))

    with make_ledger(system) as ledger:
        erased = [name_of(ledger, number) for number in (6, 7, 8)]
        land_all(ledger)
        ledger.tombstone([("first", erased)])
        monkeypatch.setattr(faults, "checkpoint", look)
        ledger.finish()
        assert len(images) == 2  # and as many when the ledger is closed
    assert len(images) == 4
    monkeypatch.undo()
    for image in images[1::2]:
        log = image["ledger.sqlite-wal"]
        assert 0 < len(log.rstrip(b"\0")) <= 32 + 24 + 4096 < len(log)  # what is left is a page without rows
    draw = random.Random(0)
    for number, image in enumerate(images):
        log = image["ledger.sqlite-wal"]
        sectors = [log[start : start + 512] for start in range(0, len(log), 512)]
        some = [bytes(len(one)) if place > 8 and draw.random() < 0.5 else one for place, one in enumerate(sectors)]
        for kind, content in {"as it is": log, "half overwritten": b"".join(some)}.items():
            copy = tmp_path / f"{number} {kind}"
            shutil.copytree(system, copy)
            for name, file in (image | {"ledger.sqlite-wal": content}).items():
                (copy / name).write_bytes(file)
            with Ledger(copy) as ledger:
                assert ledger.receipt("first")["state"] == "verified"
                assert sum(map(sum, ledger.counts())) == 37
                assert ledger.verify()["problems"] == []


def test_a_log_that_somebody_reads_is_left_when_the_ledger_is_closed(tmp_path: Path) -> None:
    with make_ledger(tmp_path) as ledger:
        reader = sqlite3.connect(f"{(tmp_path / 'ledger.sqlite').as_uri()}?mode=ro", uri=True, isolation_level=None)
        reader.execute("BEGIN")
        assert reader.execute("SELECT count(*) FROM requests").fetchone() == (0,)
        ledger.tombstone([("first", [name_of(ledger, 0)])])
    assert (tmp_path / "ledger.sqlite-wal").stat().st_size > 0
    assert reader.execute("SELECT count(*) FROM requests").fetchone() == (0,)
    reader.close()
    with Ledger(tmp_path) as ledger:
        assert ledger.receipt("first")["state"] == "verified"
        assert ledger.verify()["problems"] == []


def apart(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name, without SQLite's index of its log, read as `in_another_process` does."""
    names = [path.name for path in folder.iterdir() if path.is_file() and not path.name.endswith("-shm")]
    return {name: in_another_process(folder, name)["all"] for name in names}


def in_another_process(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Every file of a folder. Not read by this process: SQLite's locks would be lost when it closes the files."""
    code = f"""
import sys
from pathlib import Path
for path in sorted(Path({str(folder)!r}).rglob({pattern!r})):
    if path.is_file():
        sys.stdout.buffer.write(path.read_bytes())
"""
    return {"all": subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout}


def words_in(content: bytes, words: set[bytes]) -> set[bytes]:
    """Those of some 8-byte words that are anywhere in a content."""
    wanted, found = np.frombuffer(b"".join(words), "<u8"), set()
    for offset in range(8):
        there = np.frombuffer(content, "<u8", (len(content) - offset) // 8, offset)
        found |= {word.tobytes() for word in there[np.isin(there, wanted)]}
    return found


def test_erased_rows_leave_no_copies_in_the_database(tmp_path: Path) -> None:
    """SQLite moves rows around; many deletions in many batches would show a copy that it leaves behind."""
    count, draw = 2000, random.Random(0)
    with make_ledger(tmp_path, records=count) as ledger:
        order = draw.sample(range(count), 1700)
        for start in range(0, len(order), 200):
            requests = [(f"{number}", [name_of(ledger, number)]) for number in order[start : start + 200]]
            ledger.tombstone(requests)
            ledger.finish()
        subjects = {subject_name(ledger.key, f"s{number // 3}") for number in order}
        subjects -= {subject_name(ledger.key, f"s{number // 3}") for number in set(range(count)) - set(order)}
    content = all_bytes(tmp_path)["ledger.sqlite"]

    def traces(number: int) -> set[bytes]:
        data = make_content(number)
        return {data[:8], data[-8:], bytes.fromhex(row_digest(data))[:8]}

    left = set(range(count)) - set(order)
    kept = set.union(*map(traces, left))
    assert words_in(content, kept) == kept
    assert subjects
    assert not words_in(content, set.union(*map(traces, order)) | {bytes.fromhex(subject)[:8] for subject in subjects})


@pytest.mark.parametrize(
    ("leave", "erase", "trace"),
    [
        (
            "UPDATE records SET subject = x'01' WHERE record = 1",
            "UPDATE records SET subject = zeroblob(32) WHERE record = 1",
            "record [0-9a-f]{64} must be erased, got one with a content or a subject",
        ),
        (
            "UPDATE files SET provenance = 'x' WHERE stage = (SELECT min(stage) FROM stages WHERE request = 1)",
            "UPDATE files SET provenance = zeroblob(1) WHERE provenance = 'x'",
            "stage shard00-0-g0 must be erased, got one with a provenance",
        ),
    ],
)
def test_a_request_is_not_verified_while_a_trace_is_left(
    tmp_path: Path, leave: str, erase: str, trace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trained_ledger(tmp_path) as ledger:
        connection = ledger._db._connection
        ledger.tombstone([(str(shard), names_in(ledger, shard, 0)[:1]) for shard in (0, 1)])
        with monkeypatch.context() as patch:
            patch.setattr(faults, "checkpoint", lambda name: name == "erased: committed" and connection.execute(leave))
            with pytest.raises(ValueError, match=trace):
                ledger.finish()
        assert [receipt["state"] for receipt in ledger.requests()] == ["erased", "verified"]
        connection.execute(erase)
        ledger.finish()
        assert ledger.receipt("0")["state"] == "verified"


def test_a_request_is_not_verified_while_its_states_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trained_ledger(tmp_path) as ledger:
        name, cache = names_in(ledger, 0, 0)[0], PrefixCache(tmp_path / "cache")
        ledger.tombstone([("first", [name])])
        cache.put("prefix", name, "inputs", torch.zeros(2))
        with monkeypatch.context() as patch:
            patch.setattr(PrefixCache, "erase", lambda self, names: 0)
            with pytest.raises(ValueError, match=f"record {name} must be erased, got one with cached states"):
                ledger.finish()
        assert ledger.receipt("first")["state"] == "erased"
        ledger.finish()
        assert ledger.receipt("first")["state"] == "verified"
        assert len(cache) == 0


def test_states_that_are_cached_right_after_erasure_are_erased_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trained_ledger(tmp_path) as ledger:
        name, cache = names_in(ledger, 0, 0)[0], PrefixCache(tmp_path / "cache")

        def put(checkpoint: str) -> None:
            if checkpoint == "erased: committed":
                cache.put("prefix", name, "inputs", torch.zeros(2))

        monkeypatch.setattr(faults, "checkpoint", put)
        ledger.tombstone([("first", [name])])
        ledger.finish()
        assert ledger.receipt("first")["state"] == "verified"
        assert len(cache) == 0


def test_states_that_a_late_worker_caches_are_erased(tmp_path: Path) -> None:
    with make_ledger(tmp_path) as ledger:
        row = ledger.chain(StageKey(0, (0,)))[-1]
        content = make_stage(ledger, row)
        name, other = names_in(ledger, 0, 0)[:2]
        ledger.tombstone([("meanwhile", [name])])
        ledger.finish()
        cache = PrefixCache(tmp_path / "cache")
        for record in (name, other):
            cache.put("prefix", record, "inputs", torch.zeros(2))
        assert not ledger.land(row.key, content)  # the worker is done now
        assert cache.get("prefix", name, "inputs") is None
        assert cache.get("prefix", other, "inputs") is not None
        cache.put("prefix", name, "inputs", torch.zeros(2))
    Ledger(tmp_path).close()  # a worker that died never lands; the next start cleans up
    assert len(cache) == 1
