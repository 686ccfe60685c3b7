"""S3T systems from ingest to repair: what is served after deletions, what is left on disk, bad input, other engines."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny_batch
from s3t_tools import make_records, options, same_tensors, write_base

from pymape.prefix_cache import PrefixCache
from pymape.s3t import S3T, LoraConfig, S3TConfig, StageConfig
from pymape.s3t.engines import InlineEngine
from pymape.s3t.ledger import Ledger
from pymape.s3t.ledger_training import stage_job
from pymape.s3t.partition import place, record_name
from pymape.s3t.stages import unpack_stage
from pymape.s3t.tables import Columns, read_records
from pymape.s3t.training import train_stage

FAMILIES = ("bert", "vit", "llama")
RECORDS = 40


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: write_base(folder / family, family) for family in FAMILIES}


def make_system(folder: Path, model: str, family: str = "bert", **changes: Any) -> S3T:
    key = bytes(32)  # a key drawn at random leaves a slice empty now and then
    system = S3T.create(folder, options(model, **({"shards": 1} | changes)), key=key)
    system.ingest(make_records(family, RECORDS))
    return system


def slices_of(system: S3T) -> dict[str, tuple[int, int]]:
    """Where every record is."""
    names = [f"r{row}" for row in range(RECORDS)]
    return {name: place(system._ledger.key, name, system.config.shards, system.config.slices) for name in names}


def one_of(system: S3T, part: int, shard: int = 0) -> str:
    return next(name for name, where in slices_of(system).items() if where == (shard, part))


def served(system: S3T, shard: int = 0) -> tuple[int, ...]:
    return tuple(system.status()["shards"][shard]["serving"])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_served_is_what_training_on_the_surviving_slices_gives(
    tmp_path: Path, bases: dict[str, str], family: str
) -> None:
    """Slices lose a record one by one; a second system, which never had these records, holds the same bits."""
    with make_system(tmp_path / "a", bases[family], family) as system:
        system.train(engine="inline")
        key, records = system._ledger.key, make_records(family, RECORDS)
        for step, part in enumerate((2, 0, 3)):
            gone = one_of(system, part)
            system.delete([gone], f"request-{step}")
            order = served(system)
            assert set(order) == {0, 1, 2, 3} - set((2, 0, 3)[: step + 1])  # chain-cover loses nothing that can survive
            chain = system.chains()[0]

            with S3T.create(tmp_path / f"b{step}", system.config, key=key) as clean:
                where = slices_of(system)
                clean.ingest([record for record in records if where[record["id"]][1] in order])
                clean._ledger.plan()
                for depth in range(1, len(order) + 1):
                    row = next(row for row in clean._ledger.stages(0) if row.key.prefix == order[:depth])
                    job = stage_job(clean._ledger, clean.config, row)
                    assert job is not None
                    content = train_stage(job)
                    clean._ledger.land(row.key, content)
                    assert same_tensors(unpack_stage(content)[0], chain[depth - 1])


def test_every_surviving_set_is_served_whole(tmp_path: Path, bases: dict[str, str]) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        system.train(engine="inline")
        orders = [tuple(order) for order in system.status()["sequences"]]
        for size in range(1, 5):
            for kept in itertools.combinations(range(4), size):
                assert any(set(order[:size]) == set(kept) for order in orders)


@pytest.mark.parametrize("cache", [False, True])
def test_the_cache_changes_no_bit(tmp_path: Path, bases: dict[str, str], cache: bool) -> None:
    with make_system(tmp_path / "a", bases["bert"]) as system:
        key = (tmp_path / "a" / "key").read_bytes()
        system.train(engine="inline", cache=False)
        expected = system.chains()[0]
    with S3T.create(tmp_path / "b", system.config, key=key) as other:
        other.ingest(make_records("bert", RECORDS))
        other.train(engine="local" if cache else "inline", workers=2, cache=cache)
        found = other.chains()[0]
        assert (len(list((tmp_path / "b" / "cache").rglob("*.safetensors"))) > 0) == cache
    assert all(same_tensors(one, two) for one, two in zip(expected, found, strict=True))


def test_repair_restores_depth_without_the_record(tmp_path: Path, bases: dict[str, str]) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        system.train(engine="inline")
        gone = one_of(system, served(system)[0])
        system.delete([gone], "first")
        assert len(served(system)) == 3
        assert system.repair(engine="inline")["trained"] > 0
        assert len(served(system)) == 4
        assert system.status()["shards"][0]["generation"] == 1
        report = system.verify(replay=True)
        assert report["ok"], report["problems"]
        assert report["checked"]["replayed"] is not None
        with pytest.raises(ValueError, match=f"got '{gone}', deleted by 'first'"):
            system.ingest([record for record in make_records("bert", RECORDS) if record["id"] == gone])


def test_stages_of_other_options_than_the_system_s_are_found(tmp_path: Path, bases: dict[str, str]) -> None:
    """Somebody changes the seed in the database: every stage says that it was trained with another."""
    with make_system(tmp_path / "system", bases["bert"]) as system:
        system.train(engine="inline")
        assert system.verify()["ok"]
        trained = system.status()["stages"]["trained"]
        settings = system._ledger.settings | {"seed": 1}
        with system._ledger._db.transaction("test"):
            system._ledger._db.run("UPDATE system SET value = ? WHERE name = 'settings'", (json.dumps(settings),))
    report = S3T(tmp_path / "system", read_only=True).verify()
    assert not report["ok"]
    assert len(report["problems"]) == trained
    assert report["problems"][0].endswith(" was trained with another seed than the system's")


def test_a_request_during_training_discards_what_was_trained_on_its_records(
    tmp_path: Path, bases: dict[str, str]
) -> None:
    """Deletions arrive, in another thread, while a stage that knows the record is being trained."""
    with make_system(tmp_path / "system", bases["bert"]) as system:
        gone = one_of(system, 1)
        asked = []

        def work(job: Any) -> bytes:
            content = train_stage(job)
            if not asked and 1 in job.provenance.key.prefix and len(job.provenance.key.prefix) == 2:
                asked.append(job.provenance.key.prefix)
                thread = threading.Thread(target=lambda: system.delete([gone], "meanwhile"))
                thread.start()
                thread.join()
            return content

        done = system.train(engine=InlineEngine(work))
        assert asked
        assert done["discarded"] == 1
        assert 1 not in served(system)
        report = system.verify()
        assert report["ok"], report["problems"]


def test_subjects_are_deleted_together_and_share_a_slice(tmp_path: Path, bases: dict[str, str]) -> None:
    records = [record | {"subject": f"person-{row % 20}"} for row, record in enumerate(make_records("bert", RECORDS))]
    with S3T.create(tmp_path / "system", options(bases["bert"], shards=2, slices=2)) as system:
        system.ingest(records)
        assert system.plan(["r5"], subjects=["person-5", "person-3"])["records"] == 4
        receipt = system.delete(subjects=["person-3"], request_id="person")
        assert receipt["records"] == 2
        assert len(receipt["shards"]) == 1
        assert system.delete(subjects=["person-3"], request_id="person") == receipt
        with pytest.raises(ValueError, match="subjects must have records, got 'person-3' with none"):
            system.delete(subjects=["person-3"], request_id="again")
        for subjects in (["nobody"], ["person-3", "nobody"], ["person-4"]):
            with pytest.raises(ValueError, match="must be new for other records, got 'person', which is known"):
                system.delete(subjects=subjects, request_id="person")
        assert system.delete(["r3", "r23"], "person") == receipt  # the same records
        system.delete(["r12"], "by id")
        for subjects in (["nobody"], ["person-3"]):
            with pytest.raises(ValueError, match=f"subjects must have records, got '{subjects[0]}' with none"):
                system.delete(subjects=subjects, request_id="by id")
        with pytest.raises(ValueError, match="must be new for other records, got 'by id', which is known"):
            system.delete(["r12"], "by id", subjects=["person-12"])
        system.delete(subjects=["person-15"], request_id="later", finish=False)
        assert system.delete(subjects=["person-15", "person-15"], request_id="later")["state"] == "verified"
        assert system.verify()["problems"] == []
        both = system.delete(["r6"], "both", subjects=["person-7"])
        assert both["records"] == 3
        assert system.delete(["r6"], "both", subjects=["person-7"]) == both
        for ids, subjects in ((["r8"], ["person-7"]), (["r6"], ["person-9"])):
            with pytest.raises(ValueError, match="must be new for other records, got 'both', which is known"):
                system.delete(ids, "both", subjects=subjects)


def test_subjects_may_be_numbers_and_missing(tmp_path: Path, bases: dict[str, str]) -> None:
    missing = (None, "", " ", float("nan"))
    subjects = [0, "0", *missing, 1.5, 0]
    records = [
        {**record, "subject": subject}
        for record, subject in zip(make_records("bert", len(subjects)), subjects, strict=True)
    ]
    with S3T.create(tmp_path / "system", options(bases["bert"])) as system:
        system.ingest(records)
        assert system.plan(subjects=["0"])["records"] == system.plan(subjects=[0])["records"] == 3
        assert len(system.plan(subjects=["0"])["shards"]) == 1
        assert system.plan(subjects=["1.5"])["records"] == 1
        for nobody in ("nan", "None", ""):
            with pytest.raises(ValueError, match="subjects must have records"):
                system.plan(subjects=[nobody])


ACUTE, APART = "Jos\u00e9", "Jose\u0301"  # one name in Unicode's two normal forms


def test_an_id_or_a_subject_is_one_however_it_is_written(tmp_path: Path, bases: dict[str, str]) -> None:
    subjects = [ACUTE, APART, 1, 1.0, torch.tensor(1), "1"]
    records = [{**record, "subject": who} for record, who in zip(make_records("bert", 6), subjects, strict=True)]
    numbers = [
        {**record, "id": number} for record, number in zip(make_records("bert", 3), (7.0, APART, 8), strict=True)
    ]
    with S3T.create(tmp_path / "system", options(bases["bert"])) as system:
        system.ingest(records)
        assert system.ingest(numbers)["added"] == 3
        again = [
            {**record, "id": number} for record, number in zip(numbers, ("7", ACUTE, torch.tensor(8)), strict=True)
        ]
        assert system.ingest(again) == {"added": 0, "already_there": 3}
        with pytest.raises(ValueError, match="must not repeat an id, got '7' again in record 2"):
            system.ingest([numbers[0], {**numbers[1], "id": "7"}])
        for bad, message in (
            ([records[0], {**records[1], "id": "n1\nn2"}], r"id of record 2 must hold no control .*, got 'n1\\nn2'"),
            ([{**records[0], "subject": "a\ud800"}], r"subject of record 1 must hold no control .*, got 'a\\ud800'"),
        ):
            with pytest.raises(ValueError, match=message):
                system.ingest(bad)
        for call in (lambda: system.plan(["a\ud800"]), lambda: system.plan(subjects=["a\u2028b"])):
            with pytest.raises(ValueError, match=r"(ids|subjects) must hold no control character"):
                call()
        assert system.status()["shards"][0]["records"] + system.status()["shards"][1]["records"] == 9
        assert system.delete(subjects=[APART], request_id="name")["records"] == 2
        assert system.delete([ACUTE, 7], subjects=[1.0], request_id="numbers")["records"] == 6
    with S3T(tmp_path / "system") as system:  # what was decided when it was made
        with pytest.raises(ValueError, match=f"'{ACUTE}', deleted by 'numbers'"):
            system.plan([APART])
        assert system.plan([8.0])["records"] == 1


def test_a_system_of_before_ids_had_a_normal_form_finds_what_it_stored(tmp_path: Path, bases: dict[str, str]) -> None:
    subjects = [ACUTE, APART, 1, 1.0]
    records = [{**record, "subject": who} for record, who in zip(make_records("bert", 4), subjects, strict=True)]
    more = [{**record, "id": who} for record, who in zip(make_records("bert", 3), (APART, 7.0, "n1\nn2"), strict=True)]
    S3T.create(tmp_path / "system", options(bases["bert"])).close()
    with Ledger(tmp_path / "system") as ledger:
        settings = {name: value for name, value in ledger.settings.items() if name != "ids"}
        with ledger._db.transaction("test"):
            ledger._db.run("UPDATE system SET value = ? WHERE name = 'settings'", (json.dumps(settings),))
    with S3T(tmp_path / "system") as system:
        assert system.ingest(records + more) == {"added": 7, "already_there": 0}
        assert system.ingest(records + more) == {"added": 0, "already_there": 7}
        keyed = [record_name(system._ledger.key, text) for text in ("r0", APART, "7.0", "n1\nn2")]
        assert len(system._ledger.locate(keyed)) == 4
        assert system.plan([APART, 7.0, "n1\nn2"])["records"] == 3
        with pytest.raises(ValueError, match="'7', which is unknown"):
            system.plan([7])
        assert system.plan(subjects=[1])["records"] == system.plan(subjects=["1.0"])["records"] == 1
        for name in (ACUTE, APART):  # a person's records go together, however they are spelled
            assert system.plan(subjects=[name])["records"] == 2


@pytest.mark.parametrize("change", [{"merging": "ties"}, {"lora": None}])
def test_a_system_with_options_of_another_version_is_refused_and_let_go(
    tmp_path: Path, bases: dict[str, str], change: dict[str, Any]
) -> None:
    S3T.create(tmp_path / "system", options(bases["bert"])).close()
    with Ledger(tmp_path / "system") as ledger, ledger._db.transaction("test"):
        settings = json.dumps(ledger.settings | change)
        ledger._db.run("UPDATE system SET value = ? WHERE name = 'settings'", (settings,))
    with pytest.raises(ValueError, match="folder must hold a system with the options that this pymape knows"):
        S3T(tmp_path / "system")
    Ledger(tmp_path / "system").close()  # which another writer would keep from opening


def test_numbers_of_a_table_are_ids_as_numbers_are(tmp_path: Path) -> None:
    vit = write_base(tmp_path / "base", "vit")
    table = [
        {"id": float(row), "person": who, "pixel_values": record["pixel_values"], "label": record["labels"]}
        for row, (record, who) in enumerate(zip(make_records("vit", 3), (1.0, None, 1), strict=True))
    ]
    (tmp_path / "data.json").write_text(json.dumps(table))
    with S3T.create(tmp_path / "system", options(vit)) as system:
        columns = Columns(id="id", subject="person")
        assert system.ingest(read_records(tmp_path / "data.json", system.config, columns))["added"] == 3
        assert system.plan(["1"], subjects=["1"])["records"] == 3


def test_requests_are_idempotent_and_batches_are_whole(tmp_path: Path, bases: dict[str, str]) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        first = system.delete(["r1", "r2"], "one")
        assert first["state"] == "verified"
        assert system.delete(["r2", "r1"], "one") == first
        before = system.status()
        with pytest.raises(ValueError, match="'r1', deleted by 'one'"):
            system.delete_batch({"two": ["r5"], "three": ["r1"]})
        with pytest.raises(ValueError, match="'nobody', which is unknown"):
            system.delete(["nobody"], "four")
        with pytest.raises(ValueError, match="'r7' twice"):
            system.delete(["r7", " r7"], "five")
        with pytest.raises(ValueError, match="one"):
            system.delete(["r9"], "one")
        with pytest.raises(ValueError, match="ids must name at least one record, got none"):
            system.delete([], "six")
        assert system.status() == before
        receipts = system.delete_batch({"two": ["r5"], "three": ["r6", "r7"]})
        assert [receipt["records"] for receipt in receipts] == [1, 2]
        assert system.receipt("three") == receipts[1]


def test_what_is_asked_for_is_named_as_it_was_given(tmp_path: Path, bases: dict[str, str]) -> None:
    with S3T.create(tmp_path / "system", options(bases["bert"])) as system:
        system.ingest([{**record, "subject": record["id"] + "-person"} for record in make_records("bert", 12)])
        with pytest.raises(ValueError, match="ids must not be in two requests, got ' r5' in 'two' and 'three'"):
            system.delete_batch({"two": ["r5"], "three": ["r6", " r5"]})
        for call in (system.delete, lambda ids, name: system.delete_batch({name: ids})):
            with pytest.raises(ValueError, match="request_id must be a printable, non-empty string, got ''"):
                call(["nobody"], "")
        assert system.status()["requests"] == {}
        people = ("r1-person", "r2-person")
        assert system.plan(iter(["r3"]), subjects=iter(people))["records"] == 3
        assert system.delete(iter(["r3"]), "one", subjects=iter(people))["records"] == 3
        assert system.delete(["r3"], "one", subjects=people)["records"] == 3
        assert [receipt["records"] for receipt in system.delete_batch({"two": iter(["r5", "r6"])})] == [2]


def test_a_single_id_is_no_list_of_characters(tmp_path: Path, bases: dict[str, str]) -> None:
    with S3T.create(tmp_path / "system", options(bases["bert"])) as system:
        system.ingest([{**record, "id": number} for number, record in enumerate(make_records("bert", 8))])
        calls = {
            "ids must be a list, got the single str '17'": lambda: system.delete("17", "one"),
            "ids must be a list, got the single bytes b'17'": lambda: system.plan(b"17"),
            "ids must be a list, got the single str '3'": lambda: system.delete_batch({"one": "3"}),
            "subjects must be a list, got the single str '42'": lambda: system.delete(request_id="one", subjects="42"),
        }
        for message, call in calls.items():
            with pytest.raises(ValueError, match=message):
                call()
        assert system.status()["requests"] == {}


def test_plan_changes_nothing_and_tells_what_delete_does(tmp_path: Path, bases: dict[str, str]) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        system.train(engine="inline")
        before = system.status()
        planned = system.plan(["r3"])
        assert system.status() == before
        receipt = system.delete(["r3"], "one")
        for name in ("records", "shards", "stages", "bytes"):
            assert planned[name] == receipt[name]


def test_a_reader_looks_on_while_a_writer_is_there(tmp_path: Path, bases: dict[str, str]) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        with pytest.raises(ValueError, match="one writer at a time"):
            S3T(tmp_path / "system")
        reader = S3T(tmp_path / "system", read_only=True)
        system.train(engine="inline")
        assert reader.status() == system.status()
        assert reader.evaluate(make_records("bert", 9, seed=1))["live_shards"] == [0]
        with pytest.raises(ValueError, match="records must be added before a stage is trained, got 'late' after"):
            system.ingest([{**make_records("bert", 1, seed=1)[0], "id": "late"}])


def test_evaluation_and_death(tmp_path: Path, bases: dict[str, str]) -> None:
    test = make_records("bert", 12, seed=1)
    with make_system(tmp_path / "system", bases["bert"], shards=2) as system:
        for look in (lambda: system.evaluate(test), lambda: system.export(tmp_path / "export")):
            with pytest.raises(ValueError, match="no shard can be served: nothing is trained yet"):
                look()
        system.train(engine="inline")
        scores = system.evaluate(test)
        assert scores["live_shards"] == [0, 1]
        about = [{**record, "subject": row} for row, record in enumerate(test)]
        assert system.evaluate(about) == scores
        assert 0 <= scores["accuracy"] <= 100
        for number, part in enumerate(range(4)):
            system.delete([one_of(system, part, shard=1)], f"request-{number}")
        assert system.evaluate(test)["live_shards"] == [0]
        forecast = system.forecast(rate=2.0)
        assert forecast
        system.delete([name for name, (shard, _) in slices_of(system).items() if shard == 0], "a shard")
        with pytest.raises(ValueError, match="no shard can be served: every shard is dead"):
            system.evaluate(test)
        left = system._ledger.locate([record_name(system._ledger.key, name) for name in slices_of(system)]).values()
        live = {record.name for record in left if record.request is None}
        system.delete([n for n in slices_of(system) if record_name(system._ledger.key, n) in live], "the rest")
        for use, message in ((lambda: system.evaluate(test), "served"), (system.repair, "repaired")):
            with pytest.raises(ValueError, match=f"be {message}: every record is deleted"):
                use()


def test_an_ensemble_never_answers_with_a_tombstoned_stage(tmp_path: Path, bases: dict[str, str]) -> None:
    """Whoever deletes, and whether the request is finished or only accepted; a fresh ensemble tells what is right."""
    inputs = tiny_batch("bert", batch=3, length=8, labels=False)
    with make_system(tmp_path / "system", bases["bert"], slices=2) as system:
        system.train(engine="inline")
        reader = S3T(tmp_path / "system", read_only=True)
        ensembles = [system.ensemble(), reader.ensemble("size"), copy.deepcopy(system.ensemble())]
        before = [ensemble(**inputs).logits for ensemble in ensembles]
        stage = ensembles[0]._shared.parts[0]
        assert ensembles[0](**inputs) is not None
        assert ensembles[0]._shared.parts[0] is stage  # read once

        system.delete([one_of(system, served(system)[-1])], "accepted", finish=False)
        after = [ensemble(**inputs).logits for ensemble in ensembles]
        system.finish()
        for ensemble, first, second in zip(ensembles, before, after, strict=True):
            expected = system.ensemble()(**inputs).logits
            assert torch.equal(ensemble(**inputs).logits, expected)
            assert not torch.equal(first, expected)
            assert not torch.equal(first, second)
        held = [weakref.ref(part) for ensemble in ensembles for part in ensemble._shared.parts]
    command = "import sys; from pymape.s3t import S3T; S3T(sys.argv[1]).delete([sys.argv[2]], 'last')"
    last = one_of(system, served(reader)[0])
    subprocess.run([sys.executable, "-c", command, str(tmp_path / "system"), last], check=True)
    for ensemble in ensembles:  # also those of a system that is closed
        for _ in range(2):
            with pytest.raises(ValueError, match="no shard can be served: every shard is dead"):
                ensemble(**inputs)
        assert ensemble.shards == ()
    gc.collect()
    assert held
    assert all(part() is None for part in held)
    with S3T(tmp_path / "system") as system:
        system.repair(engine="inline")
        expected = system.ensemble()(**inputs).logits
        assert all(torch.equal(ensemble(**inputs).logits, expected) for ensemble in ensembles)


def test_an_ensemble_with_a_damaged_stage_serves_nothing_until_it_is_whole(
    tmp_path: Path, bases: dict[str, str]
) -> None:
    inputs = tiny_batch("bert", batch=3, length=8, labels=False)
    with make_system(tmp_path / "system", bases["bert"]) as system:
        system.train(engine="inline")
        ensemble = system.ensemble()
        system.delete([one_of(system, served(system)[-1])], "one")
        path = system._ledger.path(system._ledger.serving()[0][0].key)
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        for _ in range(2):
            with pytest.raises(ValueError, match="must have an intact file"):
                ensemble(**inputs)
        path.write_bytes(content)
        assert torch.equal(ensemble(**inputs).logits, system.ensemble()(**inputs).logits)


def test_export_is_revoked_by_a_deletion(tmp_path: Path, bases: dict[str, str]) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        system.train(engine="inline")
        files = system.export(tmp_path / "adapters")
        assert files
        assert all((tmp_path / "adapters" / file["file"]).is_file() for file in files)
        by_size = system.export(tmp_path / "by size", combination="size")
        weights = [
            shard["weight"] for shard in json.loads((tmp_path / "by size" / "ensemble.json").read_text())["shards"]
        ]
        records = [sum(counts) for counts in system._ledger.counts()]
        assert weights == pytest.approx([count / sum(records) for count in records])
        system.delete(["r3"], "one")
        assert by_size
        assert not list((tmp_path / "adapters").rglob("*.safetensors"))


def test_an_export_while_another_thread_trains_is_of_one_moment(
    tmp_path: Path, bases: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        real, asked = Ledger.serving, []

        def serving(ledger: Ledger) -> Any:
            found = real(ledger)
            if not asked:
                asked.append(found)
                system.train(engine="inline")
            return found

        system._ledger.plan()
        [row] = [row for row in system._ledger.runnable() if row.key.prefix == system._ledger.sequences[0][0][:1]]
        job = stage_job(system._ledger, system.config, row)
        assert job is not None
        system._ledger.land(row.key, train_stage(job))
        monkeypatch.setattr(Ledger, "serving", serving)
        system.export(tmp_path / "adapters")
        index = json.loads((tmp_path / "adapters" / "ensemble.json").read_text())
        assert index["shards"][0]["depth"] == system._ledger._db.value("SELECT count(*) FROM export_stages") == 1
        assert len(served(system)) == 4


@pytest.mark.parametrize("error", [ValueError("out of memory"), KeyboardInterrupt()])
def test_what_a_failed_stage_has_cached_of_deleted_records_is_erased(
    tmp_path: Path, bases: dict[str, str], error: BaseException
) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        cache = PrefixCache(tmp_path / "system" / "cache")

        def work(job: Any) -> bytes:
            gone = one_of(system, job.provenance.key.prefix[0])
            system.delete([gone], "meanwhile")
            for name in (gone, one_of(system, job.provenance.key.prefix[0]) + "other"):
                cache.put("prefix", record_name(system._ledger.key, name), "inputs", torch.zeros(2))
            raise error

        with pytest.raises(type(error)):
            system.train(engine=InlineEngine(work))
        assert len(cache) == 1


def test_what_an_engine_that_stays_open_goes_on_to_cache_is_erased(tmp_path: Path, bases: dict[str, str]) -> None:
    with make_system(tmp_path / "system", bases["bert"]) as system:
        cache, jobs = PrefixCache(tmp_path / "system" / "cache"), []

        def work(job: Any) -> bytes:
            jobs.append(job)
            if len(jobs) == 2:  # one whose worker was busy when the landing of the first failed
                gone = one_of(system, job.provenance.key.prefix[0])
                system.delete([gone], "meanwhile")
                cache.put("prefix", record_name(system._ledger.key, gone), "inputs", torch.zeros(2))
            return b"no stage"

        engine = InlineEngine(work)
        engine.workers = 2
        with pytest.raises(ValueError, match="must be a safetensors file"):
            system.train(engine=engine)
        assert engine.pending == 0
        assert len(jobs) == 2
        assert len(cache) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 0}, "shards must be at least 1, got 0"),
        ({"slices": 9}, "slices must be at most 4, the layers of the model, got 9"),
        ({"slices": 30}, "slices must be at most 4, the layers of the model, got 30"),
        ({"labels": 0}, "labels must be at least 1, got 0"),
        ({"lora": LoraConfig(alpha=0.0)}, "lora.alpha must be positive and finite, got 0.0"),
        ({"lora": LoraConfig(alpha=float("nan"))}, "lora.alpha must be positive and finite, got nan"),
        ({"stage": StageConfig(weight_decay=-1.0)}, "stage.weight_decay must be at least 0 and finite, got -1.0"),
        ({"stage": StageConfig(weight_decay=float("nan"))}, "stage.weight_decay must be .* got nan"),
        (
            {"stage": StageConfig(max_grad_norm=0.0)},
            r"stage.max_grad_norm must be positive \(inf: no clipping\), got 0.0",
        ),
        ({"stage": StageConfig(max_grad_norm=-1.0)}, "stage.max_grad_norm must be positive .* got -1.0"),
        ({"stage": StageConfig(max_grad_norm=float("nan"))}, "stage.max_grad_norm must be positive .* got nan"),
        ({"slices": 4, "layers_per_slice": 2}, "layers_per_slice must lie in"),
        ({"slices": 2, "sequences": 3, "method": "cyclic"}, "sequences must be 1 to 2! = 2, got 3"),
        ({"slices": 1, "sequences": 3}, "sequences must be 1 to 1! = 1, got 3"),
        ({"sequences": 0}, "sequences must be 1 to 4! = 24, got 0"),
        ({"prior": [0.5, 0.5]}, "prior"),
        ({"method": "best"}, "best"),
        ({"stage": StageConfig(batch_size=1)}, "stage.batch_size must be at least 2, got 1"),
        ({"stage": StageConfig(lr=float("inf"))}, "stage.lr must be positive and finite, got inf"),
        ({"lora": LoraConfig(dropout=1.0)}, r"lora.dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(tmp_path: Path, bases: dict[str, str], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S3T.create(tmp_path / "system", options(bases["bert"], **changes))
    assert not (tmp_path / "system").exists() or not any((tmp_path / "system").iterdir())


def test_bad_records(tmp_path: Path, bases: dict[str, str]) -> None:
    with S3T.create(tmp_path / "system", options(bases["bert"])) as system:
        good = make_records("bert", 3)
        for bad, message in (
            ([*good, {**good[0], "id": ""}], "got none in record 4"),
            ([{**good[0], "id": None}], "got none in record 1"),
            ([*good, good[1]], "got 'r1' again in record 4"),
            ([{**good[0], "labels": 7}], r"labels must be in \[0, 3\), got 7 for id 'r0'"),
        ):
            with pytest.raises(ValueError, match=message):
                system.ingest(bad)
        assert system.ingest(good) == {"added": 3, "already_there": 0}
        assert system.ingest(good) == {"added": 0, "already_there": 3}
        with pytest.raises(ValueError, match="got 'r0', which has changed"):
            system.ingest([{**good[0], "labels": (good[0]["labels"] + 1) % 3}])
        with pytest.raises(ValueError, match="records must fill every slice"):
            system.train(engine="inline")


def test_a_changed_base_is_refused(tmp_path: Path, bases: dict[str, str]) -> None:
    base = write_base(tmp_path / "base", "bert")
    with make_system(tmp_path / "system", base) as system:
        system.train(engine="inline")
        write_base(tmp_path / "base", "bert", seed=1)
        for use in (system.ensemble, lambda: system.export(tmp_path / "adapters"), system.repair):
            with pytest.raises(ValueError, match="model must be the base"):
                use()
        assert not (tmp_path / "adapters").exists()


def test_global_state_is_left_alone(tmp_path: Path, bases: dict[str, str]) -> None:
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    with make_system(tmp_path / "system", bases["bert"]) as system:
        system.train(engine="inline")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_the_options_are_kept(tmp_path: Path, bases: dict[str, str]) -> None:
    config = options(bases["bert"], shards=3, method="cyclic", sequences=2)
    S3T.create(tmp_path / "system", config).close()
    kept = S3T(tmp_path / "system", read_only=True).config
    assert isinstance(kept, S3TConfig)
    assert kept.stage == config.stage
    assert kept.lora == config.lora
    assert (kept.shards, kept.method, kept.sequences) == (3, "cyclic", 2)


def test_a_base_beside_the_system_moves_with_it(tmp_path: Path) -> None:
    base = write_base(tmp_path / "here" / "base", "bert")
    make_system(tmp_path / "here" / "system", base).close()
    (tmp_path / "here").rename(tmp_path / "there")
    with S3T(tmp_path / "there" / "system") as system:
        assert system.config.model == str(tmp_path / "there" / "base")
        assert system.train(engine="inline")["trained"] > 0
