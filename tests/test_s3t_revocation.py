"""Exports of a ledger are revoked whatever happens: errors, damage, links, crashes and requests while they are made."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from s3t_ledger_tools import land_all, names_in, record_export, trained_ledger

from pymape.s3t.erasure import erase_files
from pymape.s3t.ledger import Ledger
from pymape.s3t.stages import row_digest

CONTENT = b"weights of every stage"


def write_export(ledger: Ledger, folder: Path, shard: int = 0) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter").write_bytes(CONTENT)
    stages = [row.key for row in ledger.serving()[shard]]
    record_export(ledger, folder, {"adapter": row_digest(CONTENT)}, stages)


def write_indexed(ledger: Ledger, folder: Path, export: str) -> dict[str, bytes]:
    """An export with an index, whose other files are those of every other one."""
    contents = {"ensemble.json": json.dumps({"export": export}).encode(), "README.md": b"lines", "adapter": CONTENT}
    files = [{"file": name, "sha256": row_digest(content)} for name, content in contents.items()]
    files[0]["export"] = export
    folder.mkdir(parents=True)
    with ledger.placing(folder, files, [row.key for row in ledger.serving()[0]]):
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    return contents


def test_an_export_of_another_system_in_the_same_place_is_left_whole(tmp_path: Path) -> None:
    folder, away = tmp_path / "export", tmp_path / "away"
    with trained_ledger(tmp_path / "one", shards=1) as one, trained_ledger(tmp_path / "other", shards=1) as other:
        write_indexed(one, folder, "1")
        folder.rename(away)
        contents = write_indexed(other, folder, "2")
        one.tombstone([("first", names_in(one, 0, 0)[:1])])
        for _ in range(2):  # also where it is looked for again
            one.finish()
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == contents
            assert one.exports()[0]["outcome"]["missing"] == sorted(contents)
            assert one.verify()["problems"] == []
        shutil.rmtree(folder)
        away.rename(folder)
        assert len(one.verify()["problems"]) == len(contents)
        one.finish()
        assert not folder.exists()
        assert one.verify()["problems"] == []


@pytest.mark.parametrize("index", [json.dumps({"export": "1", "base": "moved"}).encode(), b"{", None])
def test_an_export_is_known_without_the_index_that_was_written(tmp_path: Path, index: bytes | None) -> None:
    folder = tmp_path / "export"
    with trained_ledger(tmp_path / "system", shards=1) as ledger:
        write_indexed(ledger, folder, "1")
        (folder / "ensemble.json").unlink()
        if index is not None:
            (folder / "ensemble.json").write_bytes(index)
        ledger.tombstone([("first", names_in(ledger, 0, 0)[:1])])
        ledger.finish()
        outcome = ledger.exports()[0]["outcome"]
        assert outcome["erased"] == ["README.md", "adapter"]
        assert outcome["missing" if index is None else "changed"] == ["ensemble.json"]


def test_an_export_of_before_they_had_names_is_told_by_its_index(tmp_path: Path) -> None:
    contents = {"ensemble.json": b'{"shards": []}', "adapter": CONTENT}
    with trained_ledger(tmp_path / "system") as ledger:
        for shard in (0, 1):
            stages = [row.key for row in ledger.serving()[shard]]
            digests = {name: row_digest(content) for name, content in contents.items()}
            record_export(ledger, tmp_path / f"export{shard}", digests, stages)
            (tmp_path / f"export{shard}").mkdir()
            for name, content in contents.items():
                (tmp_path / f"export{shard}" / name).write_bytes(content)
        (tmp_path / "export1" / "ensemble.json").write_bytes(b'{"shards": [1]}')
        ledger.tombstone([("first", [names_in(ledger, shard, 0)[0] for shard in (0, 1)])])
        ledger.finish()
        assert [entry["outcome"]["erased"] for entry in ledger.exports()] == [["adapter", "ensemble.json"], []]
        assert len(list((tmp_path / "export1").iterdir())) == 2


@pytest.mark.parametrize("old", [False, True])
def test_an_export_beside_a_system_is_found_where_both_were_moved(tmp_path: Path, old: bool) -> None:
    project, moved = tmp_path / "project", tmp_path / "elsewhere" / "moved"
    with trained_ledger(project / "system") as ledger:
        for shard, place in enumerate((project, tmp_path)):
            write_export(ledger, place / "exports" / "adapters", shard)
        if old:  # a ledger of before it noted where it is
            with ledger._db.transaction("old"):
                ledger._db.run("DELETE FROM system WHERE name = 'homes'")
    Ledger(project / "system").close()
    moved.parent.mkdir()
    project.rename(moved)
    with Ledger(moved / "system") as ledger:
        assert ledger.verify()["unfinished"] == []
        ledger.tombstone([("first", [names_in(ledger, shard, 0)[0] for shard in (0, 1)])])
        ledger.finish()
        assert [outcome["erased"] for outcome in ledger.receipt("first")["revoked"]] == [["adapter"]] * 2
        assert not (moved / "exports" / "adapters").exists()
        assert not (tmp_path / "exports" / "adapters").exists()


def test_an_export_stays_known_where_the_system_alone_is_moved(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "project" / "system") as ledger:
        write_export(ledger, tmp_path / "project" / "adapters")
    (tmp_path / "new").mkdir()
    (tmp_path / "project" / "system").rename(tmp_path / "new" / "system")
    with Ledger(tmp_path / "new" / "system") as ledger:
        ledger.tombstone([("first", names_in(ledger, 0, 0)[:1])])
        ledger.finish()
        assert not (tmp_path / "project" / "adapters").exists()


def test_live_exports_that_are_not_there_are_named(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system") as ledger:
        write_export(ledger, tmp_path / "export")
        assert ledger.verify()["unfinished"] == []
        (tmp_path / "export").rename(tmp_path / "away")
        found = ledger.verify()
        assert (found["ok"], found["unfinished"]) == (True, [f"export '{tmp_path}/export' is not there to be revoked"])
        ledger.tombstone([("other", names_in(ledger, 1, 0)[:1])])
        assert ledger.missing_exports() == found["unfinished"]


def test_an_export_that_cannot_be_erased_holds_up_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"

    def refuse(paths: list[Path]) -> int:
        if one in paths[0].parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return erase_files(paths)

    with trained_ledger(tmp_path / "system") as ledger:
        write_export(ledger, one, 0)
        write_export(ledger, other, 1)
        ledger.tombstone([(str(shard), names_in(ledger, shard, 0)[:1]) for shard in (0, 1)])
        with monkeypatch.context() as patch:
            patch.setattr("pymape.s3t.erasure.erase_files", refuse)
            for _ in range(2):
                with pytest.raises(OSError, match=f"Read-only file system: '{one}/adapter'"):
                    ledger.finish()
                assert [receipt["state"] for receipt in ledger.requests()] == ["switched", "verified"]
            assert not other.exists()
            assert ledger.verify()["problems"] == []
            ledger.close()
            ledger = Ledger(tmp_path / "system")  # opening does what it can
            assert ledger.exports()[0]["outcome"] is None
        ledger.finish()
        assert ledger.receipt("0")["state"] == "verified"
        assert ledger.exports()[0]["outcome"]["erased"] == ["adapter"]
        assert not one.exists()
        assert ledger.verify()["problems"] == []
        ledger.close()


def test_an_export_of_stages_that_were_replaced_is_revoked(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system") as ledger:
        write_export(ledger, tmp_path / "export")
        ledger.path(ledger.serving()[0][0].key).unlink()
        ledger.repair()
        land_all(ledger)
        names = names_in(ledger, 0, 2)[:1]
        assert ledger.plan_deletion(names)["exports"] == [str(tmp_path / "export")]
        ledger.tombstone([("first", names)])
        ledger.finish()
        assert not (tmp_path / "export").exists()


def test_an_export_is_found_without_the_link_that_led_to_it(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with trained_ledger(tmp_path / "system") as ledger:
        write_export(ledger, tmp_path / "link" / "export")
        (tmp_path / "link").unlink()
        ledger.tombstone([("first", names_in(ledger, 0, 0)[:1])])
        ledger.finish()
        assert list((tmp_path / "disk").iterdir()) == []


@pytest.mark.parametrize("request_too", [False, True])
def test_an_export_that_a_crash_interrupts_is_erased_at_the_next_opening(tmp_path: Path, request_too: bool) -> None:
    partial = tmp_path / ".export.x.partial"
    with trained_ledger(tmp_path / "system") as ledger:
        names = names_in(ledger, 0, 0)[:1]
    code = f"""
import os
from pathlib import Path
from pymape.s3t.ledger import Ledger
ledger, partial = Ledger({str(tmp_path / "system")!r}), Path({str(partial)!r})
with ledger.exporting(partial, [row.key for row in ledger.serving()[0]]):
    (partial / "shard-00").mkdir(parents=True)
    (partial / "shard-00" / "adapter").write_bytes({CONTENT!r})
    if {request_too}:
        ledger.tombstone([("first", {names!r})])
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    os.link(partial / "shard-00" / "adapter", tmp_path / "link")
    with Ledger(tmp_path / "system") as ledger:
        assert not partial.exists()
        assert not any((tmp_path / "link").read_bytes())
        assert [entry["path"] for entry in ledger.exports()] == [str(partial)] * request_too
        assert [receipt["state"] for receipt in ledger.requests()] == ["verified"] * request_too
        assert ledger.verify()["problems"] == []


def test_a_request_waits_for_an_export_that_is_being_written(tmp_path: Path) -> None:
    partial, states = tmp_path / ".export.x.partial", []
    partial.mkdir()
    with trained_ledger(tmp_path / "system") as ledger:
        stages = [row.key for row in ledger.serving()[0]]
        with ledger.exporting(partial, stages):
            ledger.tombstone([("first", names_in(ledger, 0, 0)[:1]), ("second", names_in(ledger, 1, 0)[:1])])
            finisher = threading.Thread(target=ledger.finish)
            finisher.start()
            finisher.join(0.3)
            states += [receipt["state"] for receipt in ledger.requests()]
            with pytest.raises(ValueError, match="stages of an export must be live, got shard00-0-g0"):
                record_export(ledger, tmp_path / "export", {}, stages)
            partial.rmdir()
        finisher.join()
        assert states == ["switched", "switched"]
        assert [receipt["state"] for receipt in ledger.requests()] == ["verified", "verified"]
        with (
            pytest.raises(ValueError, match="stages of an export must be live, got shard00-0-g0"),
            ledger.exporting(partial, stages),
        ):
            pass


def test_an_export_without_a_request_holds_up_nothing(tmp_path: Path) -> None:
    partial: Any = tmp_path / ".export.x.partial"
    with trained_ledger(tmp_path / "system") as ledger:
        with ledger.exporting(partial, [row.key for row in ledger.serving()[0]]):
            ledger.tombstone([("first", names_in(ledger, 1, 0)[:1])])
            ledger.finish()
            assert ledger.receipt("first")["state"] == "verified"
        assert ledger._db.value("SELECT count(*) FROM exports") == 0


def test_an_export_that_was_revoked_before_it_was_there_is_noticed(tmp_path: Path) -> None:
    with trained_ledger(tmp_path / "system") as ledger:
        one, other = ([row.key for row in chain] for chain in ledger.serving())

        def delete() -> None:
            ledger.tombstone([("first", names_in(ledger, 0, 0)[:1])])
            record_export(ledger, tmp_path / "export", {}, other)

        with (
            pytest.raises(ValueError, match="stages of an export must be live, got some that request 'first' has"),
            ledger.placing(tmp_path / "export", [], one),
        ):
            delete()


@pytest.mark.parametrize("request_too", [False, True])
def test_an_export_that_fails_leaves_the_one_that_is_there_to_be_revoked(tmp_path: Path, request_too: bool) -> None:
    folder = tmp_path / "export"
    with trained_ledger(tmp_path / "system") as ledger:
        write_export(ledger, folder)
        stages, names = [row.key for row in ledger.serving()[0]], names_in(ledger, 0, 3)[:1]

        def fail() -> None:
            if request_too:
                ledger.tombstone([("first", names)])
            raise ValueError("folder must be new")

        with (
            pytest.raises(ValueError, match="folder must be new"),
            ledger.placing(folder, [{"file": "adapter", "sha256": row_digest(b"other weights")}], stages),
        ):
            fail()
        if not request_too:
            ledger.tombstone([("first", names)])
        assert ledger.receipt("first")["exports"] == [str(folder)] * (1 + request_too)
        ledger.finish()
        assert not folder.exists()
        assert [outcome["erased"] for outcome in ledger.receipt("first")["revoked"]] == [["adapter"], []][
            : 1 + request_too
        ]
        assert ledger.receipt("first")["state"] == "verified"


def test_of_two_exports_into_one_folder_the_one_that_is_there_is_known(tmp_path: Path) -> None:
    """The one that began first is the later one to move; the other one is revoked and makes room in between."""
    folder = tmp_path / "export"
    with trained_ledger(tmp_path / "system") as ledger:
        stages = [row.key for row in ledger.serving()[0]]
        with ledger.placing(folder, [{"file": "adapter", "sha256": row_digest(CONTENT)}], stages):
            write_export(ledger, folder, 1)
            ledger.tombstone([("first", names_in(ledger, 1, 0)[:1])])
            ledger.finish()
            folder.mkdir()
            (folder / "adapter").write_bytes(CONTENT)
        ledger.tombstone([("second", names_in(ledger, 0, 0)[:1])])
        ledger.finish()
        assert not folder.exists()
