"""The run folder: complete or not there, never over somebody's files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pymape.storage.runs import environment, run_folder, write_summary


def _content(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_folder_appears_when_the_run_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "one"
    with run_folder(target, "demo") as folder:
        write_summary(folder, {"versions": {"pymape": "1"}, "kind": "demo", "value": float("nan")})
        assert not target.exists()
    assert _content(tmp_path) == {"runs"}
    assert _content(target) == {"summary.json"}
    assert json.loads((target / "summary.json").read_text())["value"] is None
    assert target.stat().st_mode & 0o055  # readable as the umask says, not 0700 as temporary folders are


def _broken_run(target: Path) -> None:
    with run_folder(target, "demo") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("half way")


def test_nothing_is_left_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half way"):
        _broken_run(tmp_path / "runs" / "one")
    assert not _content(tmp_path)


def test_an_earlier_run_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with run_folder(target, "demo") as folder:
        write_summary(folder, {"versions": {"pymape": "1"}, "kind": "demo"})
        (folder / "old").write_text("x")
    with pytest.raises(RuntimeError, match="half way"):
        _broken_run(target)
    assert _content(target) == {"summary.json", "old"}
    with run_folder(target, "demo") as folder:
        write_summary(folder, {"versions": {"pymape": "1"}, "kind": "demo"})
    assert _content(target) == {"summary.json"}
    assert _content(tmp_path) == {"run"}


def test_what_somebody_put_into_a_run_is_not_replaced_with_it(tmp_path: Path) -> None:
    target = tmp_path / "run"

    def run() -> None:
        with run_folder(target, "demo") as folder:
            write_summary(folder, {"versions": {"pymape": "1"}, "kind": "demo"})
            (folder / "plot.svg").write_text("x")

    run()
    (target / ".DS_Store").write_text("x")
    run()
    assert _content(target) == {"summary.json", "plot.svg"}
    (target / "notes.txt").write_text("three weeks of work")
    with pytest.raises(ValueError, match=r"only what its run left, got '.*/run/notes\.txt' too: move it elsewhere"):
        run()
    assert (target / "notes.txt").read_text() == "three weeks of work"


@pytest.mark.parametrize("late", ["thesis.tex", "summary.json"])
def test_what_came_to_its_place_during_a_run_stays_and_the_run_too(tmp_path: Path, late: str) -> None:
    target = tmp_path / "run"

    def run() -> None:
        with run_folder(target, "demo") as folder:
            write_summary(folder, {"versions": {"pymape": "1"}, "kind": "demo"})
            target.mkdir()
            (target / late).write_text(json.dumps({"versions": {"pymape": "1"}, "kind": "evaluate"}))

    with pytest.raises(ValueError, match="the run is kept in ") as caught:
        run()
    assert _content(target) == {late}
    kept = Path(str(caught.value).rpartition("kept in ")[2].strip("'"))
    assert kept.parent == tmp_path
    assert _content(kept) == {"summary.json"}
    assert _content(tmp_path) == {"run", kept.name}


def test_a_run_inside_a_run_is_not_replaced_with_it(tmp_path: Path) -> None:
    _run(tmp_path / "run", "first")
    _run(tmp_path / "run" / "evaluation", "second")
    with pytest.raises(ValueError, match=r"output must hold no run but the one to replace, got '.*/evaluation' too"):
        _run(tmp_path / "run", "third")
    assert _content(tmp_path / "run") == {"summary.json", "first", "evaluation"}


def _run(target: Path, name: str) -> None:
    with run_folder(target, "demo") as folder:
        write_summary(folder, {"versions": {"pymape": "1"}, "kind": "demo"})
        (folder / name).write_text("x")


def test_an_earlier_run_is_deleted_when_the_new_one_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "runs" / "one"
    synced: set[int] = set()
    removed: list[Path] = []
    real_sync, real_rename, real_remove = os.fsync, Path.rename, shutil.rmtree

    def fsync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def rename(path: Path, new: Path) -> Path:
        if path.suffix == ".partial":
            assert {found.stat().st_ino for found in (path, *path.rglob("*"))} <= synced
            synced.clear()
        return real_rename(path, new)

    def rmtree(path: Path, **options: bool) -> None:
        if path.suffix == ".old":
            assert target.parent.stat().st_ino in synced
            removed.append(path)
        real_remove(path, **options)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    _run(target, "first")
    assert {tmp_path.stat().st_ino, target.parent.stat().st_ino} <= synced  # the entry of the folder made for it too
    _run(target, "second")
    assert len(removed) == 1
    assert _content(target) == {"summary.json", "second"}


def test_a_run_that_a_kill_left_aside_is_put_back(tmp_path: Path) -> None:
    target = tmp_path / "run[1]"
    for number, name in enumerate(("older", "newer")):
        _run(tmp_path / "made", name)
        aside = tmp_path / f".run[1].{number}.old"
        aside.mkdir()
        (tmp_path / "made").rename(aside / target.name)  # killed before the new run took the place
        os.utime(aside, (number, number))
    with pytest.raises(RuntimeError, match="half way"):
        _broken_run(target)
    assert _content(target) == {"summary.json", "newer"}
    assert _content(tmp_path) == {"run[1]", ".run[1].0.old"}
    _run(target, "last")
    assert _content(target) == {"summary.json", "last"}


def test_an_earlier_run_is_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, real_rename = tmp_path / "run", Path.rename
    _run(target, "first")

    def rename(path: Path, new: Path) -> Path:
        if path.suffix == ".partial":
            raise OSError("no")
        return real_rename(path, new)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no"):
        _run(target, "second")
    assert _content(target) == {"summary.json", "first"}
    assert _content(tmp_path) == {"run"}


@pytest.mark.parametrize("other", ["notes.txt", "summary.json"])
def test_a_folder_of_something_else_is_not_touched(tmp_path: Path, other: str) -> None:
    (tmp_path / other).write_text("[1]")
    with (
        pytest.raises(ValueError, match="output must be a new or empty folder or an earlier run's"),
        run_folder(tmp_path, "demo"),
    ):
        pass
    assert _content(tmp_path) == {other}


@pytest.mark.parametrize(
    ("kind", "read", "message"),
    [
        ("evaluate", None, "a run of another kind, demo"),
        ("demo", "run", "output must not hold what the run reads, got .*/run' with .*/run'"),
        ("demo", "run/model", "output must not hold what the run reads, got .*/run' with .*/run/model'"),
    ],
)
def test_a_run_does_not_replace_one_of_another_kind_nor_what_it_reads(
    tmp_path: Path, kind: str, read: str | None, message: str
) -> None:
    target = tmp_path / "run"
    _run(target, "model")
    inputs = [None if read is None else str(tmp_path / read), str(tmp_path / "elsewhere")]
    with pytest.raises(ValueError, match=message), run_folder(target, kind, inputs):
        pytest.fail("the block must not run")
    assert _content(target) == {"summary.json", "model"}
    with run_folder(target, "demo", [str(tmp_path / "running"), None]):
        pass


def test_a_place_that_cannot_be_written_is_found_out_at_once(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for target in (file, file / "run", Path("/proc/none/run")):
        message = f"^output must be a .*folder, got .*{target.name}"
        with pytest.raises(ValueError, match=message), run_folder(target, "demo"):
            pytest.fail("the block must not run")
    assert _content(tmp_path) == {"file"}
    for mounted in ("/", "/proc"):
        message = f"^output must be a folder that can be replaced, got the mount point '{mounted}'"
        with pytest.raises(ValueError, match=message), run_folder(mounted, "demo"):
            pytest.fail("the block must not run")


def test_environment_says_how_to_repeat_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/pymape", "demo", "--output", "a b"])
    found = environment()
    assert found["command"] == "pymape demo --output 'a b'"
    assert {"python", "torch", "transformers"} <= found["versions"].keys()
    json.dumps(found, allow_nan=False)
