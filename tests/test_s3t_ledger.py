"""The ledger: records, stages, requests, and what it does when it is used wrongly or the disk is full."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from s3t_ledger_tools import (
    BASE,
    content_of,
    keys,
    land_all,
    make_content,
    make_ledger,
    make_rows,
    make_stage,
    name_of,
    names_in,
    trained_ledger,
)

from pymape.s3t import faults
from pymape.s3t.ledger import Ledger, RecordRow
from pymape.s3t.partition import record_name, subject_name
from pymape.s3t.stages import Provenance, StageKey, pack_stage, row_digest, slice_digest, unpack_stage


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    """2 shards of 4 slices with 5 records each, all stages trained."""
    with trained_ledger(tmp_path / "system") as made:
        yield made


# Records


def test_records_are_read_by_slice_in_the_order_of_ingest(tmp_path: Path) -> None:
    with make_ledger(tmp_path, records=40) as ledger:
        assert ledger.counts() == [[6, 6, 6, 6], [6, 4, 3, 3]]
        # Slices 2 and 1 of shard 0 hold r6 to r8 and r3 to r5, and after a round over all 8 slices the next ones.
        expected = [6, 7, 8, 30, 31, 32, 3, 4, 5, 27, 28, 29]
        found = ledger.records(0, [2, 1])
        assert found == [(name_of(ledger, number), make_content(number)) for number in expected]
        digests = [(name, row_digest(content)) for name, content in found[:6]]
        assert ledger.slice_digest(0, 2) == slice_digest(digests)
        assert ledger.records(0, []) == []


def test_the_same_records_may_be_added_again(tmp_path: Path) -> None:
    with make_ledger(tmp_path, records=10) as ledger:
        assert ledger.add_records(make_rows(ledger, 12)) == (2, 10)
        land_all(ledger)
        assert ledger.add_records(make_rows(ledger, 12)) == (0, 12)


def bad_rows(ledger: Ledger) -> dict[str, list[RecordRow]]:
    good = [*make_rows(ledger, 50)]
    first, last = good[0], good[-1]
    replace = dataclasses.replace
    return {
        "which has changed": [*good[1:], RecordRow.of(first.name, first.subject, first.shard, first.slice, b"other")],
        "got .* which has changed": [replace(first, slice=first.slice + 1)],
        "which has changed$": [replace(first, subject=None)],
        "must not repeat a name": [*good[40:], last],
        "must lie in 2 shards of 4 slices, got slice 4": [*good, replace(last, slice=4)],
        "must lie in 2 shards of 4 slices, got slice 0 of shard -1": [*good, replace(last, shard=-1, slice=0)],
        "must be the sha256 of its content": [*good, replace(last, content=b"other")],
        "must be 64 hexadecimal digits, got 'r1'": [*good[40:], replace(last, name="r1")],
        "subject must be 64 hexadecimal digits": [replace(last, subject="A" * 64)],
    }


def test_bad_records_add_nothing(tmp_path: Path) -> None:
    with make_ledger(tmp_path, records=40) as ledger:
        before = content_of(ledger)
        for message, rows in bad_rows(ledger).items():
            with pytest.raises(ValueError, match=message):
                ledger.add_records(rows)
        assert content_of(ledger) == before


def test_records_are_refused_once_a_stage_is_trained_or_when_they_were_deleted(ledger: Ledger) -> None:
    before = content_of(ledger)
    with pytest.raises(ValueError, match="must be added before a stage is trained"):
        ledger.add_records(make_rows(ledger, 41))
    assert content_of(ledger) == before
    ledger.tombstone([("first", [name_of(ledger, 3)])])
    for finish in (lambda: None, ledger.finish):
        finish()
        with pytest.raises(ValueError, match=r"must not have been deleted, got .* deleted by 'first'"):
            ledger.add_records(make_rows(ledger, 40))


def test_the_records_of_one_person(ledger: Ledger) -> None:
    subject = subject_name(ledger.key, "s2")
    names = ledger.names_of_subject(subject)
    assert names == [name_of(ledger, number) for number in (6, 7, 8)]
    ledger.tombstone([("one of them", names[1:2])])
    assert ledger.names_of_subject(subject) == [names[0], names[2]]
    ledger.finish()
    assert ledger.names_of_subject(subject) == [names[0], names[2]]
    assert ledger.names_of_subject(subject_name(ledger.key, "nobody")) == []
    with pytest.raises(ValueError, match="subject must be 64 hexadecimal digits, got 's2'"):
        ledger.names_of_subject("s2")


# Stages


def test_sequences_share_the_stages_of_their_common_prefixes(tmp_path: Path) -> None:
    cover = [(0, 1, 2, 3), (1, 2, 3, 0), (2, 0, 3, 1), (3, 0, 1, 2), (1, 3, 0, 2), (2, 3, 0, 1)]
    with make_ledger(tmp_path, sequences=cover) as ledger:
        planned = ledger.stages(1)
        assert len(planned) == 4 * 6 - 2
        assert len({row.key for row in planned}) == len(planned)
        by_row = {row.stage: row for row in planned}
        for row in planned:
            assert row.key.prefix[:-1] == (by_row[row.parent].key.prefix if row.parent else ())
        assert ledger.plan() == 0
        assert {row.key.prefix for row in ledger.runnable()} == {(0,), (1,), (2,), (3,)}
        root = ledger.runnable()[0]
        assert ledger.land(root.key, make_stage(ledger, root))
        assert {row.key.prefix for row in ledger.runnable() if row.key.shard == 0} == {(1,), (2,), (3,), (0, 1)}


def test_landed_stages_are_served_deepest_first(tmp_path: Path) -> None:
    with make_ledger(tmp_path, shards=1) as ledger:
        served = []
        for prefix in [(3,), (0,), (3, 0), (0, 1), (0, 1, 2)]:
            row = ledger.chain(StageKey(0, prefix))[-1]
            content = make_stage(ledger, row)
            assert ledger.land(row.key, content)
            row = ledger.chain(row.key)[-1]
            assert ledger.read_stage(row) == content == ledger.path(row.key).read_bytes()
            assert row.size == len(content)
            assert ledger.provenance(row) == unpack_stage(content)[1]
            served.append([key.prefix for key in keys(ledger.serving()[0])])
        # The first sequence wins ties: (0, 1, 2, 3) stands before (3, 0, 1, 2).
        roots = [[(3,)], [(0,)], [(3,), (3, 0)], [(0,), (0, 1)], [(0,), (0, 1), (0, 1, 2)]]
        assert served == roots
        assert ledger.live_prefixes() == [[(0, 1, 2), (3, 0), (), ()]]


def test_a_stage_lands_once(ledger: Ledger) -> None:
    row = ledger.serving()[0][1]
    content = ledger.read_stage(row)
    before = content_of(ledger)
    assert not ledger.land(row.key, content)
    assert content_of(ledger) == before


def test_only_what_was_made_from_the_ledger_lands(tmp_path: Path) -> None:
    with make_ledger(tmp_path) as ledger:
        root = ledger.chain(StageKey(0, (0,)))[-1]
        child = ledger.chain(StageKey(0, (0, 1)))[-1]
        good = make_stage(ledger, root)
        tensors, provenance = unpack_stage(good)

        def changed(**changes: Any) -> bytes:
            return pack_stage(tensors, dataclasses.replace(provenance, **changes))

        orphan = Provenance(child.key, BASE, "", 0, None, {part: ledger.slice_digest(0, part) for part in (0, 1)})
        before = content_of(ledger)
        for key, content, message in (
            (root.key, good[:-1], "stage shard00-0-g0 must be a safetensors file"),
            (root.key, changed(base="0" * 64), "got base 000000000000"),
            (root.key, changed(parent="0" * 64), "got another parent"),
            (root.key, changed(records={0: "0" * 64}), "got other records of slice 0"),
            (root.key, changed(key=StageKey(1, (0,))), "got the stage shard01-0-g0"),
            (StageKey(0, (0,), 1), good, "stage must be a planned one, got shard00-0-g1"),
            (child.key, pack_stage(tensors, orphan), "got a parent that is not trained"),
        ):
            with pytest.raises(ValueError, match=message):
                ledger.land(key, content)
        assert content_of(ledger) == before
        assert ledger.land(root.key, good)
        with pytest.raises(ValueError, match="got another parent"):
            ledger.land(child.key, pack_stage(tensors, orphan))


def test_a_stage_that_ends_while_it_lands_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_ledger(tmp_path) as ledger:
        row = ledger.chain(StageKey(0, (0,)))[-1]
        content = make_stage(ledger, row)

        def delete(name: str) -> None:
            if name == "land: file written":
                assert ledger.path(row.key).exists()
                assert ledger.verify()["problems"] == []  # the file is nobody's yet, and no leftover either
                ledger.tombstone([("meanwhile", names_in(ledger, 0, 0)[:1])])

        monkeypatch.setattr(faults, "checkpoint", delete)
        assert not ledger.land(row.key, content)
        assert [*(tmp_path / "stages").iterdir()] == []
        assert not ledger.land(row.key, content)
        assert ledger.stage_counts() == {"planned": 22, "cancelled": 10}
        ledger.finish()
        assert ledger.verify()["ok"]


def test_erasure_waits_for_a_file_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_ledger(tmp_path) as ledger:
        row = ledger.chain(StageKey(0, (0,)))[-1]
        content = make_stage(ledger, row)
        written, go_on, erased = threading.Event(), threading.Event(), threading.Event()

        def wait(name: str) -> None:
            if name == "land: file written":
                written.set()
                assert go_on.wait(10)
            if name == "erased: committed":
                assert not ledger.path(row.key).exists()
                erased.set()

        monkeypatch.setattr(faults, "checkpoint", wait)
        landed: list[bool] = []
        lander = threading.Thread(target=lambda: landed.append(ledger.land(row.key, content)))
        lander.start()
        assert written.wait(10)
        # Accepted at once although a landing is under way; erased only after it.
        ledger.tombstone([("meanwhile", names_in(ledger, 0, 0)[:1])])
        finisher = threading.Thread(target=ledger.finish)
        finisher.start()
        assert not erased.wait(0.2)
        go_on.set()
        lander.join(10)
        finisher.join(10)
        assert landed == [False]
        assert erased.is_set()
        assert ledger.receipt("meanwhile")["state"] == "verified"


# Requests


def test_a_request_goes_through_its_states(ledger: Ledger) -> None:
    name = names_in(ledger, 0, 1)[0]
    plan = ledger.plan_deletion([name])
    receipt = ledger.tombstone([("2026-001", [name])])[0]
    assert {field: receipt[field] for field in plan} == plan
    prefixes = ["1", "0.1", "1.2", "3.0.1", "0.1.2", "1.2.3", "0.1.2.3", "3.0.1.2", "2.3.0.1", "1.2.3.0"]
    ended = [f"shard00-{prefix}-g0" for prefix in prefixes]
    [shard] = receipt["shards"]
    assert sorted(shard["stages"]) == sorted(ended)
    assert shard == shard | {"shard": 0, "generation": 0, "depth_before": 4, "depth_after": 3, "cancelled": []}
    assert receipt["records"] == 1
    assert receipt["stages"] == 10
    files = sum(ledger.path(StageKey.parse(stage)).stat().st_size for stage in ended)
    assert receipt["bytes"] == files + len(make_content(3))
    entry = ledger.audit_log()[-1]
    assert receipt["audit"] == {"seq": entry.seq, "mac": entry.mac.hex()}
    assert receipt["state"] == "tombstoned"
    # Out of service already: what was switched to is cut, and no ended stage can be read or built upon.
    assert [row.key.prefix for row in ledger.serving()[0]] == [(0,)]
    assert ledger.chain(StageKey(0, (0, 1, 2, 3))) == []
    assert name not in dict(ledger.records(0, [1]))

    ledger.finish()
    after = ledger.receipt("2026-001")
    assert after == receipt | {state: after[state] for state in ("switched", "erased", "verified")} | {
        "state": "verified"
    }
    assert receipt["received"] <= after["switched"] <= after["erased"] <= after["verified"]
    assert [row.key.prefix for row in ledger.serving()[0]] == [(2,), (2, 3), (2, 3, 0)]
    assert not any(ledger.path(StageKey.parse(stage)).exists() for stage in ended)
    assert ledger.stage_counts() == {"trained": 22, "erased": 10}
    assert ledger.verify()["problems"] == []
    assert ledger.requests() == [after]


def test_a_tombstoned_stage_cannot_be_read(ledger: Ledger) -> None:
    row = ledger.serving()[0][-1]
    ledger.tombstone([("first", names_in(ledger, 0, row.key.prefix[0])[:1])])
    with pytest.raises(ValueError, match=r"stage shard00-0\.1\.2\.3-g0 must be trained and live, got .* tombstoned"):
        ledger.read_stage(row)


def test_the_same_request_gives_the_same_receipt(ledger: Ledger) -> None:
    names = names_in(ledger, 0, 1)[:2]
    receipt = ledger.tombstone([("first", names)])[0]
    assert ledger.tombstone([("first", names[::-1])]) == [receipt]
    other = names_in(ledger, 1, 1)[0]
    assert [r["request"] for r in ledger.tombstone([("second", [other]), ("first", names)])] == ["second", "first"]
    ledger.finish()
    assert ledger.tombstone([("first", names)])[0] == ledger.receipt("first")
    assert ledger.deleted == 3
    with pytest.raises(ValueError, match="request_id must be that of a request, got 'third', which is unknown"):
        ledger.receipt("third")


def test_bad_requests_change_nothing(ledger: Ledger) -> None:
    gone, one, two = name_of(ledger, 0), name_of(ledger, 1), name_of(ledger, 2)
    ledger.tombstone([("first", [gone])])
    ledger.finish()
    before = content_of(ledger)
    unknown = record_name(ledger.key, "none")
    cases: list[tuple[list[tuple[Any, list[str]]], str]] = [
        ([("new", [one, unknown])], f"got '{unknown}', which is unknown"),
        ([("new", [one, one])], f"must not repeat a record, got '{one}' twice"),
        ([("new", [one, gone])], f"not deleted yet, got '{gone}', deleted by 'first'"),
        ([("new", [])], "must name at least one record, got none"),
        ([("new", ["r1"])], "names must be 64 hexadecimal digits, got 'r1'"),
        ([("first", [one])], "request_id must be new for other records, got 'first', which is known"),
        ([("first", [gone, one])], "request_id must be new for other records"),
        ([("new", [one]), ("new", [two])], "request_id must differ between requests"),
        ([("new", [one]), ("other", [two, one])], f"must not be in two requests, got '{one}' in 'new' and 'other'"),
        ([("", [one])], "request_id must be a printable, non-empty string, got ''"),
        ([("a\nb", [one])], "request_id must be a printable"),
        ([(7, [one])], "request_id must be a printable, non-empty string, got 7"),
    ]
    for requests, message in cases:
        with pytest.raises(ValueError, match=message):
            ledger.tombstone([("good", [two]), *requests] if requests[0][0] == "first" else requests)
        assert content_of(ledger) == before
    with pytest.raises(ValueError, match="got 'the id', which is unknown"):
        ledger.require_live([unknown], ["the id"])
    with pytest.raises(ValueError, match="got 'r0', deleted by 'first'"):
        ledger.require_live([gone], ["r0"])
    assert ledger.require_live([gone], ["r0"], request="first")[0].request == "first"


def test_what_is_left_is_what_avoids_the_deleted_slices(tmp_path: Path) -> None:
    """Random requests in random batches, with repairs, against the definition."""
    draw = random.Random(0)
    with trained_ledger(tmp_path, records=120) as ledger:
        touched: list[set[int]] = [set(), set()]
        names = {name_of(ledger, number): number // 3 % 8 for number in range(120)}
        left = sorted(names)
        for step in range(12):
            requests = []
            for number in range(draw.randint(1, 3)):
                chosen = draw.sample(left, draw.randint(1, 2))
                left = [name for name in left if name not in chosen]
                requests.append((f"{step}.{number}", chosen))
            plans = [ledger.plan_deletion(requests[0][1])]
            receipts = ledger.tombstone(requests)
            assert receipts[0]["shards"] == plans[0]["shards"]
            for _, chosen in requests:
                for name in chosen:
                    touched[names[name] // 4].add(names[name] % 4)
            if draw.random() < 0.7:
                ledger.finish()
                for shard, chain in enumerate(ledger.serving()):
                    depths = [
                        next((d for d, part in enumerate(s) if part in touched[shard]), 4)
                        for s in ledger.sequences[shard]
                    ]
                    assert len(chain) == max(depths)
                    best = ledger.sequences[shard][depths.index(max(depths))]
                    assert [key.prefix for key in keys(chain)] == [best[: d + 1] for d in range(max(depths))]
            if draw.random() < 0.3:
                ledger.repair()
                land_all(ledger)
                touched = [set(), set()]
        ledger.finish()
        assert {receipt["state"] for receipt in ledger.requests()} == {"verified"}
        assert ledger.verify()["problems"] == []


def test_the_rate_of_requests(ledger: Ledger) -> None:
    assert ledger.deletion_rate() is None
    ledger.tombstone([("first", [name_of(ledger, 0)]), ("second", [name_of(ledger, 1), name_of(ledger, 2)])])
    assert ledger.deletion_rate() is None
    connection = ledger._db._connection
    connection.execute("UPDATE requests SET received = '2026-01-01T00:00:00.000+00:00' WHERE name = 'first'")
    connection.execute("UPDATE requests SET received = '2026-01-05T00:00:00.000+00:00' WHERE name = 'second'")
    assert ledger.deletion_rate() == pytest.approx(0.5)  # two records after the first request, in four days


# Repair


def test_repair_plans_what_was_lost_on_what_is_left(ledger: Ledger) -> None:
    ledger.tombstone([("first", names_in(ledger, 0, 2)[:1])])
    ledger.finish()
    assert ledger.repair() == 10
    assert ledger.repair() == 0
    assert (ledger.generation(0), ledger.generation(1)) == (1, 0)
    planned = [row for row in ledger.stages() if row.state == "planned"]
    assert {row.key.generation for row in planned} == {1}
    parents = {row.stage: row for row in ledger.stages()}
    kept = next(row for row in planned if row.key.prefix == (0, 1, 2))
    assert parents[kept.parent].key == StageKey(0, (0, 1))
    assert land_all(ledger) == 10
    chain = ledger.serving()[0]
    assert [key.generation for key in keys(chain)] == [0, 0, 1, 1]
    left = slice_digest((name, row_digest(content)) for name, content in ledger.records(0, [2]))
    assert ledger.provenance(chain[-1]).records[2] == left
    assert ledger.verify()["problems"] == []


def test_a_repair_before_a_request_is_finished_serves_nothing_new(ledger: Ledger) -> None:
    ledger.tombstone([("first", names_in(ledger, 0, 1)[:1])])
    ledger.repair()
    assert [row.key for row in ledger.serving()[0]] == [StageKey(0, (0,))]  # (0, 1) is planned again, not trained
    land_all(ledger)
    ledger.finish()
    assert [key.generation for key in keys(ledger.serving()[0])] == [0, 1, 1, 1]
    assert ledger.verify()["problems"] == []


def test_a_slice_without_records_begins_no_sequence(ledger: Ledger) -> None:
    ledger.tombstone([("all of a slice", names_in(ledger, 0, 2))])
    ledger.finish()
    ledger.repair()
    assert land_all(ledger) == 6  # 10 were lost; the 4 of the sequence that begins with slice 2 cannot be trained
    assert ledger.repair() == 0
    assert ledger.generation(0) == 1
    assert ledger.live_prefixes()[0] == [(0, 1, 2, 3), (3, 0, 1, 2), (), (1, 2, 3, 0)]
    assert ledger.verify()["problems"] == []


def test_repair_replaces_damaged_stages(ledger: Ledger) -> None:
    damaged = StageKey(1, (3, 0))
    path = ledger.path(damaged)
    path.write_bytes(path.read_bytes()[:-1])
    assert [problem for problem in ledger.verify()["problems"] if "shard01-3.0-g0" in problem]
    others = [StageKey(1, (3, 0, 1)), StageKey(1, (3, 0, 1, 2))]
    assert all(ledger.path(key).exists() for key in others)
    assert ledger.repair() == 3
    assert not any(ledger.path(key).exists() for key in (damaged, *others))
    repaired, erased = [(entry.event, json.loads(entry.detail)) for entry in ledger.audit_log()][-2:]
    names = [key.name for key in (damaged, *others)]
    assert repaired == ("repair planned", {"shards": [1], "stages": 3, "damaged": names[:1], "ended": names})
    assert erased == ("stages erased", {"stages": names})
    assert json.loads((ledger.folder / "audit.head").read_text())["seq"] == ledger.audit_log()[-1].seq
    assert land_all(ledger) == 3
    assert [len(chain) for chain in ledger.serving()] == [4, 4]
    assert ledger.verify()["problems"] == []


@pytest.mark.parametrize("problem", [OSError(28, "no space left on device"), ValueError("others keep reading")])
def test_a_repair_stays_planned_where_nothing_can_be_erased_now(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    damaged = ledger.path(StageKey(1, (3, 0)))
    damaged.write_bytes(b"")

    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr(ledger._db, "erase_log", fail)
    assert ledger.repair() == 3
    monkeypatch.undo()
    assert ledger.finish(check=False) == {}
    assert land_all(ledger) == 3
    ledger.finish()
    assert ledger.verify()["problems"] == []


# Threads


def test_deletions_are_accepted_while_another_thread_lands_stages(tmp_path: Path) -> None:
    with make_ledger(tmp_path, records=80) as ledger:
        errors: list[BaseException] = []

        def train() -> None:
            try:
                for row in iter(lambda: next(iter(ledger.runnable()), None), None):
                    with ledger.snapshot():
                        if not ledger.chain(row.key):
                            continue
                        content = make_stage(ledger, row)
                    ledger.land(row.key, content)
            except BaseException as error:
                errors.append(error)

        trainer = threading.Thread(target=train)
        trainer.start()
        for number in range(0, 24, 4):
            ledger.tombstone([(str(number), [name_of(ledger, number)])])
            ledger.finish()
        trainer.join()
        assert errors == []
        dead = [{0, 1, 2, 3}, {0, 1, 2}]  # r0 r4 r8 r12 r16 r20: a slice each of shards 0 and 1
        touched = [sorted({n // 3 % 8 % 4 for n in range(0, 24, 4) if n // 3 % 8 // 4 == shard}) for shard in (0, 1)]
        assert all(set(parts) <= dead[shard] for shard, parts in enumerate(touched))
        for shard, sequences in enumerate(ledger.sequences):
            expected = [
                sequence[: next((d for d, part in enumerate(sequence) if part in touched[shard]), 4)]
                for sequence in sequences
            ]
            assert ledger.live_prefixes()[shard] == expected
        assert ledger.verify()["problems"] == []
