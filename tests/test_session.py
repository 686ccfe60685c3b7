"""Successive requests: what they keep, what they refuse, and what a crash leaves."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from session_tools import REQUESTS, options, upper_masks, write_files
from transformers import AutoModelForSequenceClassification

from pymape.cli import main
from pymape.commands import steps
from pymape.config import DataConfig, MaskConfig
from pymape.importance import Importance
from pymape.masks import ModuleMasks
from pymape.prefix_cache import PrefixCache
from pymape.session import UnlearnSession, weights_hash
from pymape.session import request as session_request
from pymape.storage.store import FolderStore

PHASES = {"load", "evaluate", "importance", "search", "unlearn", "save"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, records and two sessions: `new` without requests, `done` with all of them."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    UnlearnSession.create(folder / "new", options(folder)).close()
    shutil.copytree(folder / "new", folder / "done")
    with UnlearnSession(folder / "done") as session:
        for request, ids in REQUESTS.items():
            session.request(request, ids)
    return folder


@pytest.fixture
def new(files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(files / "new", tmp_path / "session"))


@pytest.fixture
def done(files: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(files / "done", tmp_path / "session"))


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refuses(folder: Path, message: str, *arguments: Any) -> None:
    """A request is refused in one line and changes nothing."""
    before = snapshot(folder)
    with UnlearnSession(folder) as session, pytest.raises(ValueError, match=message) as caught:
        session.request(*arguments)
    assert "\n" not in str(caught.value)
    assert snapshot(folder) == before


def test_a_request_continues_from_the_last_weights(files: Path) -> None:
    session = UnlearnSession(files / "done", read_only=True)
    receipts = session.receipts
    assert [receipt["request"] for receipt in receipts] == list(REQUESTS)
    assert receipts[0]["previous_weights_sha256"] == weights_hash(files / "model")
    for one, two in pairwise(receipts):
        assert two["previous_weights_sha256"] == one["weights_sha256"] != two["weights_sha256"]
    assert weights_hash(session.model_folder) == receipts[-1]["weights_sha256"]
    assert [receipt["records"] for receipt in receipts] == [
        {"forget": 3, "retain": 21},
        {"forget": 2, "retain": 19},
        {"forget": 2, "retain": 17},
    ]
    for receipt in receipts:
        assert receipt["metrics"]["after"] != receipt["metrics"]["before"]
        assert {"torch", "pymape"} <= receipt["versions"].keys()
        assert receipt["seconds"].keys() == receipt["cpu_seconds"].keys() == PHASES
        assert receipt["seconds"]["unlearn"] > 0
        assert receipt["cpu_seconds"]["unlearn"] > 0
        assert receipt["stopped"] is None
        assert receipt["config"]["lr"] == 1e-2
    AutoModelForSequenceClassification.from_pretrained(session.model_folder)


def test_superseded_weights_and_forgotten_rows_are_gone(files: Path) -> None:
    folder = files / "done"
    assert [path.parent.parent.name for path in folder.rglob("model.safetensors")] == ["step-0003"]
    assert [path.parent.name for path in folder.rglob("importance.safetensors")] == ["step-0003"]
    assert len([*folder.rglob("masks.safetensors")]) == 3
    left = set(Importance.load(folder / "step-0003" / "importance.safetensors").ids)
    assert left
    assert left.isdisjoint({name for ids in REQUESTS.values() for name in ids})


def test_only_the_modules_in_the_masks_change(new: Path, files: Path) -> None:
    with UnlearnSession(new) as session:
        session.request("first", REQUESTS["first"])
        masks = ModuleMasks.load(new / "step-0001" / "masks.safetensors")
        before, after = (load_file(place / "model.safetensors") for place in (files / "model", session.model_folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    for layer in range(2):
        name = f"bert.encoder.layer.{layer}.intermediate.dense.weight"
        rows = (before[name] != after[name]).any(1)
        assert not (rows & ~masks.filters[layer]).any()
    assert not [name for name in changed if "embeddings" in name or "classifier" in name]


def test_retain_importance_is_computed_once_and_forgotten_records_are_never_retained(
    new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[list[str]] = []
    trained: list[dict[str, list[str]]] = []

    def importance(model: Any, records: Any, **settings: Any) -> Importance:
        measured.append([record["id"] for record in records])
        return real_importance(model, records, **settings)

    def unlearn(config: Any, model: Any, data: Any, *others: Any) -> None:
        trained.append({side: [record["id"] for record in rows] for side, rows in data.sets.items()})
        real_unlearn(config, model, data, *others)

    real_importance, real_unlearn = steps.importance, session_request.unlearn
    monkeypatch.setattr(steps, "importance", importance)
    monkeypatch.setattr(session_request, "unlearn", unlearn)
    with UnlearnSession(new) as session:
        for request, ids in REQUESTS.items():
            session.request(request, ids)
    forgotten: set[str] = set()
    for (request, ids), sets in zip(REQUESTS.items(), trained, strict=True):
        forgotten |= set(ids)
        assert sets["forget"] == ids, request
        assert set(sets["retain"]) == {f"r{row}" for row in range(24)} - forgotten
    # Beside the forget sets: the sample, and what it has lost since.
    samples = [ids for ids in measured if ids not in REQUESTS.values()]
    assert len(measured) - len(samples) == len(REQUESTS)
    assert len(samples[0]) == 12
    sample = [name for ids in samples for name in ids]
    assert len(set(sample)) == len(sample) == 12 + len(forgotten & set(sample))
    kept = Importance.load(new / "step-0003" / "importance.safetensors").ids
    assert sorted(kept) == sorted(set(sample) - forgotten)


def test_a_request_with_few_records_to_retain_does_not_cap_the_next_ones(
    new: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def search(*, retain: Importance, **settings: Any) -> Any:
        sizes.append(len(retain.ids))
        return real_search(retain=retain, **settings)

    real_search = steps.search
    monkeypatch.setattr(steps, "search", search)
    (tmp_path / "few.txt").write_text("r20\nr21\nr22\n")
    with UnlearnSession(new) as session:
        data = dataclasses.replace(session.config.data, retain=str(tmp_path / "few.txt"))
        session.request("few", ["r1"], dataclasses.replace(session.config, data=data))
        session.request("all", ["r2"])
        less = dataclasses.replace(session.config.data, importance_samples=5)
        session.request("less", ["r3"], dataclasses.replace(session.config, data=less))
    assert sizes == [3, 12, 5]


def test_a_session_without_masks_keeps_the_importance_it_has(done: Path) -> None:
    before = Importance.load(done / "step-0003" / "importance.safetensors").ids
    with UnlearnSession(done) as session:
        config = dataclasses.replace(session.config, masks=MaskConfig(objective="everything"))
        assert session.request("all", [before[0]], config)["masks"] is None
    assert Importance.load(done / "step-0004" / "importance.safetensors").ids == before[1:]


def test_a_request_erases_its_records_from_the_prefix_cache_and_tells_why_it_ended(
    new: Path, files: Path, tmp_path: Path
) -> None:
    masks, cache = tmp_path / "masks.safetensors", PrefixCache(tmp_path / "cache")
    upper_masks().save(masks)
    config = options(
        files, masks=MaskConfig(file=str(masks)), prefix_cache=str(cache.path), epochs=10.0,
        stop_when_forgotten=True,
        data=DataConfig(str(files / "train.csv"), unseen=str(files / "test.csv"), importance_samples=12),
    )  # fmt: skip
    with UnlearnSession(new) as session:
        receipts = [session.request(request, ids, config) for request, ids in REQUESTS.items()]
    assert "reached the loss on unseen data" in receipts[0]["stopped"]
    kept = {f"r{row}" for row in range(24)} - {name for ids in REQUESTS.values() for name in ids}
    assert cache.erase(name for ids in REQUESTS.values() for name in ids) == 0
    assert cache.erase(kept) == len(kept)


def test_a_list_of_records_to_retain_loses_what_is_forgotten(new: Path, tmp_path: Path) -> None:
    (tmp_path / "retain.txt").write_text("\n".join(f"r{row}" for row in range(12)))
    with UnlearnSession(new) as session:
        data = dataclasses.replace(session.config.data, retain=str(tmp_path / "retain.txt"))
        config = dataclasses.replace(session.config, data=data)
        assert session.request("one", ["r1", "r20"], config)["records"] == {"forget": 2, "retain": 11}
        assert session.request("two", ["r2"], config)["records"] == {"forget": 1, "retain": 10}


def test_a_finished_request_returns_its_receipt(done: Path) -> None:
    before = snapshot(done)
    with UnlearnSession(done) as session:
        receipts = session.receipts
        for number, (request, ids) in enumerate(REQUESTS.items()):
            assert session.request(request, ids[::-1]) == receipts[number]
        assert session.forgotten_by("r6") == "second"
        assert session.forgotten_by("r3") is None
    assert snapshot(done) == before


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("request_id must be new for other records, got 'first', a finished request", ("first", ["r1", "r5"])),
        ("forget must name records not forgotten yet, got 'r6', forgotten by 'second'", ("next", ["r3", "r6"])),
        ("forget must name ids of the data, got 'nobody' not among 17 records", ("next", ["r3", "nobody"])),
        ("forget must not repeat an id, got 'r3' more than once", ("next", ["r3", "r3"])),
        ("forget must name at least one record, got an empty forget set", ("next", [])),
        ("request_id must be a printable, non-empty string, got ''", ("", ["r3"])),
        ("request_id must be a printable, non-empty string, got 'a.nb'", ("a\nb", ["r3"])),
        ("retain must keep at least one record", ("next", [f"r{row}" for row in (3, 4, 7, 8, *range(10, 23))])),
    ],
)
def test_bad_requests_change_nothing(done: Path, message: str, arguments: tuple[str, list[str]]) -> None:
    refuses(done, message, *arguments)


@pytest.mark.parametrize(
    "message, changes",
    [
        ("must stay finite, got", {"lr": 1e30, "epochs": 3}),
        ("model must be the session's", {"model": "elsewhere"}),
        ("compare_retrain must", {"compare_retrain": True, "train_first": True}),
        ("lr must be positive and finite, got -1", {"lr": -1.0}),
    ],
)
def test_failing_requests_change_nothing(new: Path, files: Path, message: str, changes: dict[str, Any]) -> None:
    refuses(new, message, "first", REQUESTS["first"], options(files, **changes))


def test_a_request_may_bring_alternative_answers_but_no_other_columns(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "train.csv", tmp_path / "train.csv")
    rewrite(
        tmp_path / "train.csv",
        lambda rows: [[*rows[0], "other", "more"], *([*row, (int(row[2]) + 1) % 3, "0"] for row in rows[1:])],
    )
    data = DataConfig(str(tmp_path / "train.csv"), importance_samples=12)
    other = dataclasses.replace(data, alternative_column="other")
    free, fixed = tmp_path / "free", tmp_path / "fixed"
    UnlearnSession.create(free, options(files, data=data)).close()
    with UnlearnSession(free) as session:
        assert session.request("one", ["r1"], options(files, data=other, objective="dpo"))["number"] == 1
        assert session.request("two", ["r2"], options(files, data=data))["number"] == 2
    for name, column in {"text_column": "label", "text_pair_column": "text", "label_column": "other"}.items():
        config = options(files, data=dataclasses.replace(data, **{name: column}))
        refuses(free, f"data.{name} must be the session's, .*, got '{column}'", "three", ["r3"], config)
    UnlearnSession.create(fixed, options(files, data=other)).close()
    for own in (data, dataclasses.replace(data, alternative_column="more")):
        config = options(files, data=own)
        refuses(fixed, "data.alternative_column must be the session's, 'other', got", "one", ["r1"], config)


def rewrite(path: Path, change: Any) -> None:
    with path.open(newline="") as stream:
        rows = [*csv.reader(stream)]
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(change(rows))


def test_only_forgotten_records_may_leave_the_data_file(done: Path, files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "train.csv", tmp_path / "train.csv")
    config = options(files, data=DataConfig(str(tmp_path / "train.csv"), importance_samples=12))
    gone = {name for ids in REQUESTS.values() for name in ids}
    rewrite(tmp_path / "train.csv", lambda rows: [row for row in rows if row[0] not in gone])
    refuses(done, "forget must name records not forgotten yet, got 'r6'", "next", ["r6"], config)
    kept = (tmp_path / "train.csv").read_text()
    for message, change in (
        ("got 'r3', which is new", lambda rows: [row if row[0] != "r3" else [*row[:2], "2"] for row in rows]),
        ("got 'x', which is new or changed", lambda rows: [*rows, ["x", "w1", "1"]]),
        ("must hold every record not forgotten yet, got 1 too few", lambda rows: rows[:-1]),
    ):
        rewrite(tmp_path / "train.csv", change)
        refuses(done, f"data.path .*{message}", "next", ["r4"], config)
        (tmp_path / "train.csv").write_text(kept)
    with UnlearnSession(done) as session:
        assert session.request("next", ["r4"], config)["records"] == {"forget": 1, "retain": 16}


@pytest.mark.parametrize("form", ["keyed", "plain"])
def test_receipts_name_records_by_key_or_plainly(new: Path, files: Path, form: str) -> None:
    with UnlearnSession(new) as session:
        receipt = session.request("one", ["r11", "r13"], options(files, receipt_ids=form))
        names = receipt["ids"]["forgotten"]
    text = "".join(str((new / "step-0001" / name).read_bytes()) for name in ("receipt.json", "masks.safetensors"))
    hashed = hashlib.sha256(json.dumps(["r11", "r13"]).encode()).hexdigest()
    assert receipt["ids"]["form"] == form
    assert (names == ["r11", "r13"]) == (hashed in text) == ('"r11"' in text) == (form == "plain")
    assert len(set(names)) == 2
    assert (new / "step-0000" / "key").stat().st_mode & 0o077 == 0
    assert "r11" not in (new / "state.json").read_text()


def test_one_writer_at_a_time(new: Path, files: Path) -> None:
    with UnlearnSession(new):
        with pytest.raises(ValueError, match=r"session must have one writer at a time, got .*elsewhere"):
            UnlearnSession(new)
        reader = UnlearnSession(new, read_only=True)
        assert reader.receipts == []
        with pytest.raises(ValueError, match="session must be open for writing"):
            reader.request("first", ["r1"])
    with UnlearnSession(new) as writer:
        writer.request("first", REQUESTS["first"])
    reader.verify()  # a writer has replaced what it was opened with
    assert len(reader.receipts) == 1
    writer = UnlearnSession(new)
    threading.Timer(0.2, writer.close).start()
    UnlearnSession(new).close()  # a writer that is just ending is waited for
    before = snapshot(new)
    with pytest.raises(ValueError, match=r"session must be a new or empty folder, got .* with 'state.json'"):
        UnlearnSession.create(new, options(files))
    assert snapshot(new) == before


@pytest.mark.parametrize(
    "name",
    [
        "state.json",
        "step-0000/key",
        "step-0001/receipt.json",
        "step-0002/masks.safetensors",
        "step-0003/model/model.safetensors",
        "step-0003/importance.safetensors",
    ],
)
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_damage_is_found_and_named(done: Path, files: Path, name: str, damage: str) -> None:
    path = done / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink() if damage == "missing" else path.write_bytes(content if damage == "flip" else content[:-9])
    before = snapshot(done)
    with pytest.raises(ValueError, match=f"session must be .*{re.escape(name)}") as caught:
        UnlearnSession(done)
    if (name, damage) == ("state.json", "missing"):
        with pytest.raises(ValueError, match="session must be a new or empty folder"):
            UnlearnSession.create(done, options(files))
    assert "\n" not in str(caught.value)
    assert snapshot(done) == before
    if damage != "missing":
        path.write_bytes(bytes(content))  # the lock is free again: only the damage is in the way
        with pytest.raises(ValueError, match="intact"):
            UnlearnSession(done)


def test_leftovers_are_rolled_back_and_other_files_are_not_touched(done: Path) -> None:
    before = snapshot(done)
    for name in (".stage/model/half", "step-0004/receipt.json", "step-0002/model/weights", ".state.json.x.json"):
        (done / name).parent.mkdir(parents=True, exist_ok=True)
        (done / name).write_text("half")
    (done / "notes.txt").write_text("mine")
    UnlearnSession(done, read_only=True).verify()
    assert (done / ".stage").exists()
    UnlearnSession(done).close()
    assert snapshot(done) == {**before, "notes.txt": hashlib.sha256(b"mine").hexdigest()}
    assert not (done / "step-0004").exists()


def test_a_session_is_made_in_a_folder_of_its_own(files: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"session must be a new or empty folder, got .* with 'notes.txt'"):
        UnlearnSession.create(tmp_path, options(files))
    with pytest.raises(ValueError, match=r"session must be a folder with a state\.json"):
        UnlearnSession(tmp_path / "none")
    wrong = DataConfig(str(files / "train.csv"), text_column="x")
    with pytest.raises(ValueError, match=r"data\.text_column must be one of"):
        UnlearnSession.create(tmp_path / "new", options(files, data=wrong))
    assert {path.name for path in (tmp_path / "new").iterdir()} <= {".lock"}
    config = options(files, train_first=True)
    with UnlearnSession.create(tmp_path / "new", config) as session:
        assert weights_hash(session.model_folder) != weights_hash(files / "model")
        assert session.config == config


def test_a_single_text_is_no_list_of_ids(new: Path) -> None:
    before = snapshot(new)
    with UnlearnSession(new) as session, pytest.raises(ValueError, match="forget must be a list, got the single str"):
        session.request("one", "r1")  # type: ignore[arg-type]
    assert snapshot(new) == before


def test_the_hash_of_weights_does_not_depend_on_how_they_are_stored(files: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(files / "model")
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    assert weights_hash(tmp_path / "shards") == weights_hash(files / "model")
    with torch.no_grad():
        model.classifier.bias[0] += 1e-3
    model.save_pretrained(tmp_path / "changed")
    assert weights_hash(tmp_path / "changed") != weights_hash(files / "model")


def test_every_file_is_on_disk_before_the_state_names_it(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    committed: list[dict[str, str]] = []
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def replace(path: Path, target: Path) -> Path:
        if target.name == "state.json":
            files = json.loads(path.read_text())["files"]
            assert path.stat().st_ino in synced
            new_files = {name for name in files if name not in store.files}
            folders = {"step-0001", "step-0001/model", "."}
            assert {(new / name).stat().st_ino for name in new_files | folders} <= synced
            assert len(new_files) > 5
            committed.append(files)
        return real_replace(path, target)

    store = FolderStore(new, "session", "read")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    with UnlearnSession(new) as session:
        session.request("first", REQUESTS["first"])
    assert len(committed) == 1


def test_the_command(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("r1\nr5\nr9\n")
    (tmp_path / "b.txt").write_text("r2\nr6\n")
    folder = str(tmp_path / "session")
    request = ["unlearn", "--session", folder, "--request-id"]
    first = ["--model", str(files / "model"), "--data.path", str(files / "train.csv"), "--data.importance_samples=12"]
    first += ["--masks.budget=0.5", "--lr=0.01", "--batch_size=8"]
    assert main([*request, "first", "--forget-ids", str(tmp_path / "a.txt"), *first]) == 0
    # Options are the session's now; the equals sign and an override work too.
    assert main([*request, "second", f"--forget-ids={tmp_path / 'b.txt'}", "--epochs", "2"]) == 0
    receipts = UnlearnSession(folder, read_only=True).receipts
    expected = UnlearnSession(files / "done", read_only=True).receipts
    assert receipts[0]["weights_sha256"] == expected[0]["weights_sha256"]
    assert receipts[1]["records"] == expected[1]["records"]
    assert [receipt["config"]["epochs"] for receipt in receipts] == [1.0, 2.0]
    capsys.readouterr()

    before = snapshot(tmp_path / "session")
    assert main([*request, "second", "--forget-ids", str(tmp_path / "b.txt")]) == 0
    assert main(["session", "show", folder]) == 0
    shown = capsys.readouterr().out
    assert shown.count("second") == 2
    assert receipts[1]["weights_sha256"][:12] in shown
    for words, message in (
        ([*request, "second", "--forget-ids", str(tmp_path / "a.txt")], "request_id must be new for other records"),
        ([*request, "third", "--forget-ids", str(tmp_path / "b.txt")], "got 'r2', forgotten by 'second'"),
        ([*request, "third"], "session, request_id and data.forget must come together, got no data.forget"),
        (["session", "show", str(tmp_path)], "session must be a folder with a state.json"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    assert snapshot(tmp_path / "session") == before
    # What cannot be printed has happened all the same.
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    other = str(tmp_path / "other")
    assert (
        main(
            [
                "unlearn",
                "--session",
                other,
                "--request-id",
                "l\u00f6schen",
                "--forget-ids",
                str(tmp_path / "a.txt"),
                *first,
            ]
        )
        == 2
    )
    assert len(UnlearnSession(other, read_only=True).receipts) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*request, "third", "--forget-ids", str(tmp_path / "b.txt")]) == 2
    assert "the command must be run by one process, got WORLD_SIZE 2" in capsys.readouterr().err


def test_a_first_request_that_is_refused_leaves_no_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise its options, the mistake among them, would be those of the session."""
    write_files(tmp_path)
    (tmp_path / "ids.txt").write_text("r1\n")
    (tmp_path / "unknown.txt").write_text("r77\n")
    folder = tmp_path / "session"
    right = {"--model": tmp_path / "model", "--data.path": tmp_path / "train.csv", "--forget-ids": tmp_path / "ids.txt"}

    def meet(**options: Any) -> int:
        words = {**right, **{f"--{name.replace('__', '.')}": value for name, value in options.items()}}
        request = ["unlearn", "--session", folder, "--request-id", "first", "--masks.budget", 0.5]
        return main([*map(str, request), *(str(word) for option in words.items() for word in option)])

    for changes, message in (
        ({"objective": "dpo"}, "data.alternative_column must have an answer for every forgotten record"),
        ({"data__forget": tmp_path / "unknown.txt"}, "'r77' not among 24 records"),
        ({"data__test": tmp_path / "none.csv"}, "data.test must be an existing file"),
    ):
        assert meet(**changes) == 2
        assert message in capsys.readouterr().err
        assert not folder.exists()
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    assert meet(objective="dpo") == 2
    assert "data.alternative_column must have an answer" in capsys.readouterr().err
    assert not list((tmp_path / "elsewhere").iterdir())
    folder.unlink()
    kept = {"objective": "dpo", "train_first": "true", "train.epochs": 1}
    assert meet(**kept) == 2
    assert f"session '{folder}' keeps the model trained first" in capsys.readouterr().err
    assert folder.exists()
    assert meet(objective="gd") == 0
