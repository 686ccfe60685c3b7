"""The audit log, and damage of every kind: noticed and named."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from s3t_ledger_tools import make_content, make_rows, make_stage, name_of, names_in, trained_ledger

from pymape.prefix_cache import PrefixCache
from pymape.s3t.ledger import Ledger, StageRow
from pymape.s3t.ledger.audit import AuditLog, first_entry
from pymape.s3t.ledger.database import Database, create_database
from pymape.s3t.partition import subject_name
from pymape.s3t.stages import Provenance, StageKey, pack_stage, row_digest, unpack_stage

KEY = bytes(range(32))


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger with two verified requests, closed."""
    folder = tmp_path_factory.mktemp("s3t") / "system"
    with trained_ledger(folder) as ledger:
        ledger.tombstone([("first", names_in(ledger, 0, 1)[:2])])
        ledger.finish()
        ledger.tombstone([("second", names_in(ledger, 1, 3)[:1])])
        ledger.finish()
        assert ledger.verify()["ok"]
    return folder


@pytest.fixture
def folder(system: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(system, tmp_path / "system"))


@pytest.fixture
def log(tmp_path: Path) -> Any:
    """An audit log of five rows."""
    path, anchor = tmp_path / "log.sqlite", tmp_path / "anchor"
    path.touch()
    entry = first_entry(KEY, anchor, "created", number=0)
    create_database(path, [[(0,)]], {}, (entry.seq, entry.time, entry.event, entry.detail, entry.mac))
    database = Database(path, write=True)
    made = AuditLog(database, KEY, anchor)
    for number in range(1, 5):
        with database.transaction("test"):
            made.append("event", number=number)
    made.anchor()
    yield made
    database.close()


def edit(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in statements:
        connection.execute(statement)
    connection.close()


def problems(folder: Path) -> list[str]:
    ledger = Ledger(folder, "read")
    try:
        report = ledger.verify()
    finally:
        ledger.close()
    assert report["ok"] == (not report["problems"])
    found: list[str] = report["problems"]
    return found


# The chain


def test_an_untouched_chain(log: AuditLog) -> None:
    assert [(entry.seq, json.loads(entry.detail)) for entry in log.entries()] == [
        (n + 1, {"number": n}) for n in range(5)
    ]
    assert log.check_chain() == log.check_head() == []
    head = log.head()
    assert head is not None
    assert head.follows(KEY, log.entries()[-2].mac)
    assert not head.follows(bytes(32), log.entries()[-2].mac)


SWAP = (
    "UPDATE audit SET seq = 99 WHERE seq = 2",
    "UPDATE audit SET seq = 2 WHERE seq = 3",
    "UPDATE audit SET seq = 3 WHERE seq = 99",
)


@pytest.mark.parametrize(
    "statements, found",
    [
        (["UPDATE audit SET detail = '{\"number\":7}' WHERE seq = 3"], ["audit log row 3 is not what was written"]),
        (["UPDATE audit SET event = 'other' WHERE seq = 1"], ["audit log row 1 is not what was written"]),
        (["UPDATE audit SET time = '2020-01-01' WHERE seq = 4"], ["audit log row 4 is not what was written"]),
        (["UPDATE audit SET mac = 'text' WHERE seq = 2"], ["audit log row 2 is", "audit log row 3 is"]),
        (["DELETE FROM audit WHERE seq = 3"], ["audit log row 3 is missing"]),
        (["DELETE FROM audit WHERE seq IN (2, 3)"], ["audit log rows 2 to 3 are missing"]),
        (["DELETE FROM audit WHERE seq = 1"], ["audit log row 1 is missing"]),
        (["DELETE FROM audit WHERE seq > 3"], ["audit log ends at row 3, its anchor at row 5"]),
        (["DELETE FROM audit"], ["audit log ends at row 0, its anchor at row 5"]),
        (SWAP, ["audit log row 2 is not what", "audit log row 3 is not what", "audit log row 4 is not what"]),
        (["DELETE FROM audit WHERE seq = 3", "UPDATE audit SET seq = seq - 1 WHERE seq > 3"], [
            "audit log row 3 is not", "audit log row 4 is not", "audit log ends at row 4, its anchor at row 5",
        ]),
        (["INSERT INTO audit VALUES (6, '', 'forged', '{}', zeroblob(32))"], ["audit log row 6 is not what"]),
    ],
)  # fmt: skip
def test_tampering_is_named(log: AuditLog, statements: list[str], found: list[str]) -> None:
    for statement in statements:
        log._db._connection.execute(statement)
    actual = log.check_chain()
    assert len(actual) == len(found), actual
    assert all(line.startswith(start) for line, start in zip(actual, found))


def test_what_the_anchor_alone_shows(log: AuditLog, tmp_path: Path) -> None:
    anchor = tmp_path / "anchor"
    content = anchor.read_text()
    for text in ("", "{}", '{"seq": 5, "mac": "xy"}', '{"seq": null, "mac": ""}', "[]"):
        anchor.write_text(text)
        [problem] = log.check_head()
        assert problem.startswith(f"anchor '{anchor}' is missing or damaged")
    anchor.unlink()
    assert "is missing or damaged" in log.check_chain()[0]
    anchor.write_text(content)
    assert log.check_chain() == []
    # One that lags is as good as new: a crash between commit and anchor leaves it so.
    with log._db.transaction("test"):
        log.append("event", number=5)
    assert log.check_chain() == []
    # The log's end was replaced by another that its owner could have written.
    log._db._connection.execute("DELETE FROM audit WHERE seq >= 5")
    with log._db.transaction("test"):
        log.append("another event")
    assert log.check_chain() == [f"audit log row 5 is not the one that the anchor '{anchor}' names"]


def test_a_change_that_fails_leaves_no_row(log: AuditLog) -> None:
    def fail() -> None:
        with log._db.transaction("test"):
            log.append("event")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert len(log.entries()) == 5


def test_the_log_holds_no_names_of_records(system: Path) -> None:
    ledger = Ledger(system, "read")
    text = " ".join(entry.detail for entry in ledger.audit_log())
    assert "first" in text
    assert not any(name_of(ledger, number) in text for number in range(40))
    ledger.close()


# Damage


def test_nothing_wrong(folder: Path) -> None:
    assert problems(folder) == []


def damage_stage(change: Callable[[Path, Path], Any]) -> Callable[[Path], list[str]]:
    def damage(folder: Path) -> list[str]:
        one, other = (folder / "stages" / f"shard00-{prefix}-g0.safetensors" for prefix in ("3.0", "2.3"))
        changed = change(one, other)
        return [f"stage {path.stem} must have an intact file '{path}'" for path in changed or [one]]

    return damage


def flip(path: Path, other: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def swap(path: Path, other: Path) -> list[Path]:
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return [other, path]


def tamper(statement: str, *found: str) -> Callable[[Path], list[str]]:
    def damage(folder: Path) -> list[str]:
        edit(folder / "ledger.sqlite", statement)
        return [*found]

    return damage


def tamper_record(folder: Path) -> list[str]:
    ledger = Ledger(folder, "read")
    row = ledger.locate([name_of(ledger, 12)])[name_of(ledger, 12)]
    ledger.close()
    edit(folder / "ledger.sqlite", f"UPDATE contents SET content = x'00' WHERE record = {row.record}")
    return [f"record {row.name} has another content than the one that was added"]


def restore_record(folder: Path) -> list[str]:
    """Put back what was erased."""
    ledger = Ledger(folder, "read")
    name = name_of(ledger, 3)
    row = ledger.locate([name])[name]
    ledger.close()
    connection = sqlite3.connect(folder / "ledger.sqlite", isolation_level=None)
    connection.execute("UPDATE contents SET content = ? WHERE record = ?", (make_content(3), row.record))
    connection.close()
    return [f"record {name} is erased, and its content is there"]


def restore_subject(folder: Path) -> list[str]:
    with Ledger(folder) as ledger:
        name = name_of(ledger, 3)
        subject = bytes.fromhex(subject_name(ledger.key, "s1"))
        ledger._db._connection.execute("UPDATE records SET subject = ? WHERE name = ?", (subject, bytes.fromhex(name)))
    return [f"record {name} is erased, and its subject is there"]


def restore_states(folder: Path) -> list[str]:
    with Ledger(folder) as ledger:
        name = name_of(ledger, 3)
        for put in (name, name_of(ledger, 0)):
            PrefixCache(folder / "cache").put("prefix", put, "inputs", torch.zeros(2))
    return [f"record {name} is erased, and its states are cached"]


def leave_file(folder: Path) -> list[str]:
    path = folder / "stages" / "shard00-1-g0.safetensors"  # a stage that was erased
    path.write_bytes(b"weights")
    return [f"file '{path}' belongs to nothing"]


def forge_stage(folder: Path) -> list[str]:
    """Other weights of the same provenance, with a database that agrees."""
    with Ledger(folder) as ledger:
        row = next(row for row in ledger.stages(0) if row.key.prefix == (3, 0))
        replace_stage(ledger, row, ledger.provenance(row))
    return [f"stage {row.key.name} is not the one that landed"]


def revive_stage(folder: Path) -> list[str]:
    """A stage that a request has ended, with weights and a provenance that fit the records that are left."""
    with Ledger(folder) as ledger:
        [row] = ledger._stage_rows("s.shard = 0 AND s.prefix = '1'")
        ledger._db._connection.execute("UPDATE stages SET state = 'trained' WHERE stage = ?", (row.stage,))
        replace_stage(ledger, row, unpack_stage(make_stage(ledger, row))[1])
    return [f"stage {row.key.name} is live, and the audit log says that it has ended"]


def revive_repaired_stage(folder: Path) -> list[str]:
    """A stage that was whole when `repair` ended it together with its damaged parent."""
    with Ledger(folder) as ledger:
        ledger.path(StageKey(0, (2, 3))).write_bytes(b"")
        ledger.repair()
        ledger._db._connection.execute("UPDATE stages SET state = 'cancelled' WHERE state = 'planned'")
        for prefix in ("2.3", "2.3.0"):
            [row] = ledger._stage_rows("s.shard = 0 AND s.prefix = ? AND s.generation = 0", (prefix,))
            ledger._db._connection.execute("UPDATE stages SET state = 'trained' WHERE stage = ?", (row.stage,))
            replace_stage(ledger, row, unpack_stage(make_stage(ledger, row))[1])
    return [f"stage {row.key.name} is live, and the audit log says that it has ended"]


def replace_stage(ledger: Ledger, row: StageRow, provenance: Provenance) -> None:
    content = pack_stage({"lora": torch.ones(64)}, provenance)
    ledger.path(row.key).write_bytes(content)
    ledger._db._connection.execute(
        "UPDATE files SET sha256 = ?, size = ?, provenance = ? WHERE stage = ?",
        (bytes.fromhex(row_digest(content)), len(content), provenance.to_json().encode(), row.stage),
    )


DAMAGES: dict[str, Callable[[Path], list[str]]] = {
    "bit flip": damage_stage(flip),
    "truncation": damage_stage(lambda path, other: path.write_bytes(path.read_bytes()[:-1]) and None),
    "deletion": damage_stage(lambda path, other: path.unlink()),
    "swap": damage_stage(swap),
    "record": tamper_record,
    "erased record": restore_record,
    "erased subject": restore_subject,
    "erased states": restore_states,
    "erased provenance": tamper(
        "UPDATE files SET provenance = '{}' WHERE stage = (SELECT stage FROM stages WHERE prefix = '1' AND shard = 0)",
        "stage shard00-1-g0 is erased, and what it was made from is there",
    ),
    "file": leave_file,
    "forged stage": forge_stage,
    "revived stage": revive_stage,
    "revived repaired stage": revive_repaired_stage,
    "audit": tamper("UPDATE audit SET detail = '{}' WHERE seq = 2", "audit log row 2 is not what was written"),
    "receipt": tamper(
        "UPDATE requests SET receipt = replace(receipt, '\"records\": 2', '\"records\": 1') WHERE name = 'first'",
        "request 'first' has another receipt than the audit log says",
    ),
    "request": tamper("DELETE FROM requests WHERE name = 'second'", "request 'second' is in the audit log"),
    "state": tamper(
        "UPDATE requests SET verified = NULL WHERE name = 'second'",
        "request 'second' is in another state than the audit log says",
    ),
    "tombstone": tamper(
        "DELETE FROM tombstones WHERE record = (SELECT min(record) FROM tombstones)",
        "request 'first' has other records than the audit log says",
    ),
    "stage": tamper(
        "UPDATE stages SET state = 'trained' WHERE prefix = '1' AND shard = 0", "stage shard00-1-g0 must have an intact"
    ),
    "serving": tamper("UPDATE shards SET depth = 1 WHERE shard = 1", "shard 1 must serve depth 3, got 1"),
    "orphan": tamper(
        "UPDATE stages SET state = 'cancelled' WHERE prefix = '3' AND shard = 0", "stage shard00-3.0-g0 must have live"
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named(folder: Path, damage: Callable[[Path], list[str]]) -> None:
    expected = damage(folder)
    found = problems(folder)
    for start in expected:
        assert any(line.startswith(start) for line in found), found


def test_a_damaged_stage_is_not_read(folder: Path) -> None:
    path = folder / "stages" / "shard00-3.0-g0.safetensors"
    flip(path, path)
    with Ledger(folder) as ledger:
        row = next(row for row in ledger.stages() if row.key.name == path.stem)
        with pytest.raises(ValueError, match=r"stage shard00-3\.0-g0 must have an intact file .*: got one with sha256"):
            ledger.read_stage(row)
        path.unlink()
        with pytest.raises(ValueError, match=r"stage shard00-3\.0-g0 must have an intact file .*: No such file"):
            ledger.read_stage(row)


def test_a_damaged_record_is_not_trained_on(folder: Path) -> None:
    [problem] = tamper_record(folder)
    with Ledger(folder) as ledger:
        with pytest.raises(ValueError, match=problem.split(" has ")[0] + " must have the content that was added"):
            ledger.records(1, [0])
        assert ledger.records(0, [0])


def test_a_stage_that_was_not_made_from_what_is_left_stops_verification(folder: Path) -> None:
    """As if a deletion had spared a stage that it should have ended."""
    with Ledger(folder) as ledger:
        ledger.tombstone([("third", names_in(ledger, 0, 3)[:1])])
    edit(
        folder / "ledger.sqlite", "UPDATE stages SET state = 'trained', request = NULL WHERE prefix = '3' AND shard = 0"
    )
    with Ledger(folder) as ledger:  # opening does what it can
        assert ledger.receipt("third")["state"] == "erased"
        with pytest.raises(ValueError, match=r"stage shard00-3-g0 must be made from .*, got other records of slice 3"):
            ledger.finish()
        assert any("other records of slice 3" in problem for problem in ledger.verify()["problems"])
        assert ledger.repair() > 0  # which takes it out of service
        ledger.finish()
        assert ledger.receipt("third")["state"] == "verified"


@pytest.mark.parametrize("mode", ["write", "read"])
@pytest.mark.parametrize("size", [0, 50, 4096, -4096, -1])
def test_a_truncated_database_is_named(folder: Path, mode: Any, size: int) -> None:
    path = folder / "ledger.sqlite"
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(ValueError, match=f"ledger must be an intact database, got '{path}'"):
        Ledger(folder, mode)
    path.write_bytes(content)
    assert problems(folder) == []


def test_damaged_pages_are_named(folder: Path) -> None:
    path = folder / "ledger.sqlite"
    content = bytearray(path.read_bytes())
    for page in range(12 * 4096, len(content), 4096):
        content[page : page + 100] = b"\xff" * 100
    path.write_bytes(content)
    try:
        found = problems(folder)
    except ValueError as error:
        found = [str(error)]
    assert any(f"'{path}'" in line and ("damaged" in line or "intact" in line) for line in found)


def test_an_older_database_is_named(folder: Path) -> None:
    path = folder / "ledger.sqlite"
    old = path.read_bytes()
    with Ledger(folder) as ledger:
        ledger.tombstone([("third", names_in(ledger, 0, 3)[:1])])
        ledger.finish()
    path.write_bytes(old)
    with pytest.raises(
        ValueError, match=r"ledger must be the latest one of its folder, got audit log ends at row \d+, its"
    ):
        Ledger(folder)
    assert any(f"'{path}' is an older one put back" in problem for problem in problems(folder))
    assert any("shard00-3-g0" in problem for problem in problems(folder))  # its file is gone, for that matter


def test_another_key_or_none(folder: Path) -> None:
    key = (folder / "key").read_bytes()
    (folder / "key").write_bytes(bytes(32))
    assert any("audit log row 1 is not what was written" in problem for problem in problems(folder))
    (folder / "key").unlink()
    with pytest.raises(ValueError, match=r"ledger must have a readable key, got .*key': No such file"):
        Ledger(folder)
    (folder / "key").write_bytes(key)
    assert problems(folder) == []


def test_other_databases_are_refused(folder: Path) -> None:
    path = folder / "ledger.sqlite"
    path.write_bytes(b"no database at all, and long enough to look like a file with something in it" * 100)
    with pytest.raises(ValueError, match=f"ledger must be an intact database, got '{path}': file is not a database"):
        Ledger(folder)
    path.unlink()
    edit(path, "CREATE TABLE something (x)")
    with pytest.raises(ValueError, match=r"ledger must be an intact database, got .*, which is no ledger's"):
        Ledger(folder, "read")


def test_a_newer_format_is_refused(folder: Path) -> None:
    edit(folder / "ledger.sqlite", "PRAGMA user_version = 2")
    with pytest.raises(ValueError, match="ledger must have format 1, got 2 in"):
        Ledger(folder)


def test_records_that_changed_since_ingest(folder: Path) -> None:
    tamper_record(folder)
    with Ledger(folder) as ledger:
        live = [row for row in make_rows(ledger, 40) if ledger.locate([row.name])[row.name].request is None]
        assert ledger.add_records(live) == (0, 37)  # by digest: what is stored is for `verify` to check


# Receipts that were kept elsewhere


def test_an_older_copy_of_the_whole_folder_is_told_by_a_receipt(folder: Path, tmp_path: Path) -> None:
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    with Ledger(folder, "write") as ledger:
        ledger.tombstone([("third", names_in(ledger, 0, 2)[:1])])
        tombstoned = ledger.receipt("third")
        ledger.finish()
        kept = ledger.requests()
        assert ledger.verify([*kept, tombstoned])["problems"] == []  # a receipt may be older than its request's state
        assert ledger.verify(kept)["checked"]["receipts"] == 3
    assert problems(older) == []
    with Ledger(older, "write") as ledger:
        why = "the folder is an older copy put back or another system's, or the receipt was changed"
        unknown = f"request 'third' has a receipt, and the ledger does not know it: {why}"
        assert ledger.verify(kept)["problems"] == [unknown]
        assert ledger.verify(kept[:2])["ok"]
        ledger.tombstone([("third", names_in(ledger, 1, 0)[:1])])  # somebody hides it by another one of that name
        ledger.finish()
        assert ledger.verify(kept[:2])["ok"]
        (problem,) = ledger.verify(kept)["problems"]
        assert problem.startswith("request 'third' ")
        assert problem.endswith(why)


def test_a_request_is_not_less_than_its_receipt_says(folder: Path, tmp_path: Path) -> None:
    with Ledger(folder, "write") as ledger:
        ledger.tombstone([("third", names_in(ledger, 0, 2)[:1])])
    older = Path(shutil.copytree(folder, tmp_path / "older"))
    with Ledger(folder, "write") as ledger:
        ledger.finish()
        receipt = ledger.receipt("third")
    ledger = Ledger(older, "read")
    (problem,) = ledger.verify([receipt])["problems"]
    ledger.close()
    assert problem.startswith(
        f"request 'third' was switched at {receipt['switched']} by its receipt, the ledger has None"
    )


@pytest.mark.parametrize("field", ["records", "received", "shards", "audit"])
def test_a_receipt_that_was_changed(folder: Path, field: str) -> None:
    ledger = Ledger(folder, "read")
    receipt = ledger.receipt("second") | {field: "other"}
    found = ledger.verify([receipt])["problems"]
    ledger.close()
    (problem,) = found
    wrong = "was received at other by its receipt" if field == "received" else f"has another {field} in its receipt"
    assert problem.startswith(f"request 'second' {wrong}")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE files SET provenance = 'text' WHERE stage = 1",
        "UPDATE files SET sha256 = 'text' WHERE stage = 1",
        "UPDATE records SET digest = 'text' WHERE record = 1",
        "UPDATE records SET name = 'text' WHERE record = 1",
        "UPDATE contents SET content = 'text' WHERE record = 1",
        "UPDATE audit SET detail = '[]' WHERE event = 'records deleted'",
        "UPDATE stages SET prefix = 'text' WHERE stage = 1",
    ],
)
def test_values_of_another_type_are_named(folder: Path, statement: str) -> None:
    edit(folder / "ledger.sqlite", statement)
    assert problems(folder)


def test_a_receipt_names_one_request(folder: Path) -> None:
    with Ledger(folder, "read") as ledger, pytest.raises(ValueError, match="receipts must be what delete gave"):
        ledger.verify([{"request": ["first"], "audit": 1}])
