"""`pymape s3t ...`: every command on a tiny text classifier, as text and as JSON, and its exit codes."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from session_tools import write_files

import pymape.storage.files
from pymape.cli import main
from pymape.prefix_cache import PrefixCache
from pymape.s3t import S3T, S3TConfig, StageConfig
from pymape.s3t.engines import LocalEngine
from pymape.s3t.partition import record_name
from pymape.s3t.tables import Columns, read_records
from pymape.s3t.training import StageJob


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, records=40)
    (folder / "ids.txt").write_text("r1\nr2\n")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert main(["s3t", *map(str, words)]) == code
    captured = capsys.readouterr()
    return captured.err if code == 2 else captured.out


def result(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(capsys, *words, "--json"))
    return found


def test_from_init_to_evaluate(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system, adapters = tmp_path / "system", tmp_path / "adapters"
    small = ["--stage.epochs", 1, "--stage.batch-size", 4, "--stage.max-length", 8, "--lora.r", 2]
    text = run(capsys, "init", system, "--model", files / "model", "--shards", 2, "--slices", 2, *small)
    assert "sequences: 01 10" in text
    assert text.count("not trained") == 2
    assert run(capsys, "ingest", system, "--data", files / "train.csv") == "40 records added, 0 already there\n"
    assert result(capsys, "ingest", system, "--data", files / "train.csv") == {"added": 0, "already_there": 40}
    assert run(capsys, "train", system, "--engine", "inline") == "8 stages trained\n"
    status = result(capsys, "status", system)
    assert [shard["depth"] for shard in status["shards"]] == [2, 2]
    assert "verified" not in run(capsys, "status", system)

    planned = result(capsys, "plan", system, "--ids", files / "ids.txt")
    assert planned["records"] == 2
    assert "stages switched off" in run(capsys, "plan", system, "--ids", files / "ids.txt")
    exported = result(capsys, "export", system, "--output", adapters)
    assert (adapters / "ensemble.json").is_file()
    assert len(exported["files"]) >= 5
    assert f"export {adapters}: to be erased\n" in run(capsys, "plan", system, "--ids", files / "ids.txt")

    delete = ("delete", system, "--request-id", "2026-001", "--ids", files / "ids.txt")
    receipt = result(capsys, *delete)
    assert (receipt["state"], receipt["stages"]) == ("verified", planned["stages"])
    assert result(capsys, *delete) == receipt
    assert not list(adapters.rglob("*.safetensors"))
    text = run(capsys, *delete)
    assert "2026-001: verified" in text
    assert f"export {adapters}: {len(exported['files'])} files erased\n" in text

    scores = result(capsys, "evaluate", system, "--data", files / "test.csv")
    assert scores["records"] == 10
    assert scores["live_shards"]
    assert "accuracy" in run(capsys, "evaluate", system, "--data", files / "test.csv", "--combination", "vote")
    assert "next shard dead" in run(capsys, "forecast", system, "--rate", 2)
    assert "rate: -\n" in run(capsys, "forecast", system)
    assert result(capsys, "verify", system, "--replay")["checked"]["replayed"]
    assert result(capsys, "repair", system, "--engine", "inline")["trained"] > 0
    assert [shard["depth"] for shard in result(capsys, "status", system)["shards"]] == [2, 2]
    assert "everything is in order" in run(capsys, "verify", system)


def test_what_deletions_ended_before_it_was_trained_is_left_to_repair(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system, table = tmp_path / "system", tmp_path / "ids.csv"
    table.write_text("person\nr1\nr2\n")
    run(capsys, "init", system, "--model", files / "model", "--shards", 1, "--slices", 2, "--stage.max_length", 8)
    run(capsys, "ingest", system, "--data", files / "train.csv")
    assert "workers must be at least 1" in run(capsys, "train", system, "--workers", 0, code=2)
    assert result(capsys, "status", system)["stages"] == {}  # a refused training plans nothing
    with S3T(system) as opened:
        opened._ledger.plan()  # as an interrupted training does
    ids = ("--ids", table, "--id-column", "person")
    assert result(capsys, "plan", system, *ids)["cancelled"] >= 2
    ended = result(capsys, "delete", system, "--request-id", "early", *ids)["cancelled"]
    words = f"{4 - ended} stages trained; {ended} are switched off: `repair` trains them anew\n"
    assert run(capsys, "train", system, "--engine", "inline") == words
    assert run(capsys, "repair", system, "--engine", "inline") == f"{ended} stages trained\n"
    assert "everything is in order" in run(capsys, "verify", system)


def test_a_receipt_that_cannot_be_kept_is_printed(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system, place = tmp_path / "system", tmp_path / "file" / "receipt.json"
    (tmp_path / "file").touch()
    run(capsys, "init", system, "--model", files / "model", "--shards", 1, "--slices", 2, "--stage.max_length", 8)
    run(capsys, "ingest", system, "--data", files / "train.csv")
    words = ("--request-id", "one", "--ids", files / "ids.txt", "--receipt", place, "--json")
    printed = json.loads(run(capsys, "delete", system, *words, code=1))
    assert printed["state"] == "verified"
    assert "the receipt is not kept in" in printed["problems"][0]


def test_workers_that_die_are_an_error_in_a_line(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = tmp_path / "system"
    run(capsys, "init", system, "--model", files / "model", "--shards", 1, "--slices", 2, "--stage.max_length", 8)
    run(capsys, "ingest", system, "--data", files / "train.csv")
    monkeypatch.setattr("pymape.s3t.engines.LocalEngine", lambda workers: LocalEngine(workers, os._exit))
    monkeypatch.setattr(StageJob, "__reduce__", lambda job: (int, (9,)))  # what the workers are given
    assert "lost 4 workers, the last one ended with exit code 9" in run(capsys, "train", system, "--workers", 1, code=2)


def test_what_is_wrong_is_named(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system = tmp_path / "system"
    run(capsys, "init", system, "--model", files / "model", "--shards", 1, "--slices", 2, "--stage.max_length", 8)
    run(capsys, "ingest", system, "--data", files / "train.csv")
    run(capsys, "train", system, "--engine", "inline")
    damaged = min((system / "stages").iterdir())
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    text = run(capsys, "verify", system, code=1)
    assert damaged.name in text
    assert "not in order" in text
    text = run(capsys, "verify", system, "--replay", code=1)
    assert "no stage can be trained again" in text
    assert "replayed: nothing" in text


def test_a_receipt_is_printed_whatever_holds_up_requests(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    system, real = tmp_path / "system", pymape.storage.files.overwrite
    with S3T.create(system, S3TConfig(str(files / "model"), shards=1, slices=2)) as opened:
        opened.ingest(read_records(files / "train.csv", opened.config, Columns(id="id")))
        kept = opened._ledger.folder / "cache" / ("0" * 32)
        for number in (1, 2, 3):
            (tmp_path / f"{number}.txt").write_text(f"r{number}\n")
            name = record_name(opened._ledger.key, f"r{number}")
            PrefixCache(kept.parent).put("0" * 64, name, "inputs", torch.zeros(2))
            if number == 1:
                [first] = kept.iterdir()

    def overwrite(path: str) -> int:
        if Path(path) == first:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return real(path)

    def delete(number: int) -> tuple[object, ...]:
        return ("delete", system, "--request-id", f"q{number}", "--ids", tmp_path / f"{number}.txt")

    problem = f"request 'q1' is not finished: [Errno 1] Operation not permitted: '{first}'"
    with monkeypatch.context() as patch:
        patch.setattr("pymape.prefix_cache.overwrite", overwrite)
        text = run(capsys, *delete(1), code=1)
        assert text.startswith(f"PROBLEM: {problem}\nrequest q1: switched\n")
        assert run(capsys, *delete(2)).startswith(f"NOT FINISHED: {problem}\nrequest q2: verified\n")
        found = result(capsys, *delete(2))
        assert (found["ok"], found["problems"], found["unfinished"]) == (True, [], [problem])
        assert run(capsys, "finish", system, code=1) == f"PROBLEM: {problem}\nrequests: 1 switched, 1 verified\n"
        with S3T(system) as opened, pytest.warns(UserWarning, match="request 'q1' is not finished: .*not permitted"):
            assert opened.delete(["r3"], "q3")["state"] == "verified"
        with S3T(system) as opened, pytest.raises(PermissionError):
            opened.delete(["r1"], "q1")
    assert run(capsys, "receipt", system, "--request-id", "q1").startswith("request q1: switched\nrecords: 1\n")
    assert "q9" in run(capsys, "receipt", system, "--request-id", "q9", code=2)
    assert run(capsys, "finish", system) == "requests: 3 verified\n"
    assert result(capsys, "receipt", system, "--request-id", "q1")["state"] == "verified"


def test_files_of_an_export_that_are_left_are_named(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system, adapters = tmp_path / "system", tmp_path / "adapters"
    config = S3TConfig(str(files / "model"), shards=1, slices=2, stage=StageConfig(epochs=1, max_length=8))
    with S3T.create(system, config) as opened:
        opened.ingest(read_records(files / "train.csv", opened.config, Columns(id="id")))
        opened.train(engine="inline")
        opened.export(adapters)
    weights = adapters / "shard-00" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b"\n")
    (adapters / "README.md").unlink()
    text = run(capsys, "delete", system, "--request-id", "first", "--ids", files / "ids.txt", code=1)
    left = "shard-00/adapter_model.safetensors"
    problem = f"export '{adapters}' has files that were changed and are left there: {left}"
    line = f"export {adapters}: 2 files erased; changed since and left there: {left}; not there any more: README.md"
    assert text.startswith(f"PROBLEM: {problem}\nrequest first: verified\n")
    assert f"\n{line}\n" in text
    assert line in run(capsys, "receipt", system, "--request-id", "first")
    assert weights.exists()


def test_verify_changes_nothing(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system = tmp_path / "system"
    with S3T.create(system, S3TConfig(str(files / "model"), shards=1, slices=2)) as opened:
        opened.ingest(read_records(files / "train.csv", opened.config, Columns(id="id")))
        opened.delete(["r1"], "first", finish=False)
        text = run(capsys, "verify", system)  # beside a process that writes
        assert "NOT FINISHED: request 'first' is tombstoned\n" in text
        assert text.endswith("everything else is in order\n")
        old = {name: (system / name).read_bytes() for name in ("ledger.sqlite", "ledger.sqlite-wal")}
    left = system / "stages" / "shard00-0-g7.safetensors"
    left.write_bytes(b"weights put back")
    assert f"PROBLEM: file '{left}' belongs to nothing" in run(capsys, "verify", system, code=1)
    assert left.read_bytes() == b"weights put back"
    assert S3T(system, read_only=True).receipt("first")["state"] == "tombstoned"
    S3T(system).close()
    assert "is in order" in run(capsys, "verify", system)
    for name, content in old.items():
        (system / name).write_bytes(content)
    text = run(capsys, "verify", system, code=1)
    assert "is an older one put back" in text
    assert "checked database pages" in text


def test_a_shard_that_is_not_trained_yet_is_not_called_dead(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = tmp_path / "system"
    with S3T.create(system, S3TConfig(str(files / "model"), shards=2, slices=2)) as opened:
        opened.ingest(read_records(files / "train.csv", opened.config, Columns(id="id")))
        ledger = opened._ledger
        ledger.plan()
        with ledger._db.transaction("erased"):  # as after a deletion in both slices
            ledger._db.run("UPDATE stages SET state = 'erased' WHERE shard = 0")
    assert [shard["state"] for shard in result(capsys, "status", system)["shards"]] == ["dead", "not trained"]
    lines = run(capsys, "status", system).splitlines()[-2:]
    assert ["dead" in line for line in lines] == [True, False]
    assert "not trained" in lines[1]
    error = run(capsys, "evaluate", system, "--data", files / "test.csv", code=2)
    assert "train the system first" in error


def test_a_lost_anchor_is_accepted_as_documented(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    system = tmp_path / "system"
    S3T.create(system, S3TConfig(str(files / "model"), shards=1, slices=2)).close()
    (system / "audit.head").unlink()
    assert "missing or damaged" in run(capsys, "finish", system, code=2)
    assert run(capsys, "finish", system, "--accept-lost-anchor") == "requests: none\n"
    assert (system / "audit.head").is_file()


def test_receipts_kept_elsewhere(tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system, kept = tmp_path / "system", tmp_path / "receipts"
    kept.mkdir()
    with S3T.create(system, S3TConfig(str(files / "model"), shards=1, slices=2)) as opened:
        opened.ingest(read_records(files / "train.csv", opened.config, Columns(id="id")))
    older = shutil.copytree(system, tmp_path / "older")
    words = ("--request-id", "first", "--ids", files / "ids.txt", "--receipt", kept / "first.json")
    receipt = run(capsys, "delete", system, *words, "--json")
    assert json.loads((kept / "first.json").read_text()).items() <= json.loads(receipt).items()
    before = (kept / "first.json").read_bytes()
    run(capsys, "delete", system, "--request-id", "second", *words[2:], code=2)
    assert (kept / "first.json").read_bytes() == before  # a refused request leaves what was kept
    for place in (kept, kept / "first.json"):
        assert "receipts: 1\neverything is in order" in run(capsys, "verify", system, "--receipts", place)
        text = run(capsys, "verify", older, "--receipts", place, code=1)
        assert "PROBLEM: request 'first' has a receipt, and the ledger does not know it: the folder is an older" in text
    for content, problem in (("[]", "is none"), ("{", "cannot be read"), ("", "cannot be read")):
        (kept / "notes.json").write_text(content)
        text = run(capsys, "verify", system, "--receipts", kept, code=1)
        assert f"PROBLEM: receipt '{kept / 'notes.json'}' {problem}" in text
        assert "receipts: 1\nnot in order" in text  # the others are compared all the same
    assert "folder of some" in run(capsys, "verify", system, "--receipts", files, code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "nowhere"], "must be a folder with a ledger.sqlite"),
        (["delete", "nowhere"], "request_id"),
        (["init", "SYSTEM", "--model", "nowhere"], "nowhere"),
        (
            ["init", "SYSTEM", "--model", "MODEL", "--slices", "3"],
            "slices must be at most 2, the layers of the model",
        ),
        (["ingest", "nowhere", "--data", "nothing.csv"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, files: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    places = {"SYSTEM": str(tmp_path / "system"), "MODEL": str(files / "model")}
    error = run(capsys, *(places.get(word, word) for word in words), code=2)
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "system" / "ledger.sqlite").exists()


def test_a_new_head_on_a_language_model_takes_labels_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `--labels`, what the base was made for says nothing about the records."""
    write_files(tmp_path, "llama", records=12)
    system = tmp_path / "system"
    small = ("--labels", 3, "--shards", 1, "--slices", 2, "--stage.max-length", 8)
    run(capsys, "init", system, "--model", tmp_path / "model", *small)
    assert result(capsys, "ingest", system, "--data", tmp_path / "train.csv")["added"] == 12
    with S3T(system, read_only=True) as opened:
        records = read_records(tmp_path / "train.csv", opened.config, Columns())
    assert [record["labels"] for record in records] == [row % 3 for row in range(12)]
    (tmp_path / "header.csv").write_text("id,text,label\n")
    error = run(capsys, "evaluate", system, "--data", tmp_path / "header.csv", code=2)
    assert "data must hold at least one record, got none in" in error
    assert "id" not in records[0]
