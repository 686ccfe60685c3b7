"""Files that one process writes, whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pymape.storage.files import FileLock, at_work, atomic_write, await_workers, overwrite, written_elsewhere

HOLDER = """
import sys, time
from pathlib import Path
from pymape.storage.files import FileLock
lock = FileLock(Path(sys.argv[1]), "store")
print("held", flush=True)
time.sleep(60)
"""


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"

    def write(text: str, error: Exception | None = None) -> None:
        with atomic_write(target) as temporary:
            temporary.write_text(text)
            if error is not None:
                raise error

    with pytest.raises(RuntimeError, match="interrupted"):
        write("first", RuntimeError("interrupted"))
    assert not list(target.parent.iterdir())
    write("first")
    with pytest.raises(RuntimeError, match="interrupted"):
        write("second", RuntimeError("interrupted"))
    assert target.read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("fails", ["block", "rename"])
def test_what_was_begun_is_overwritten_when_writing_fails(tmp_path: Path, fails: str) -> None:
    target, link = tmp_path / "file", tmp_path / "link"
    if fails == "rename":
        target.mkdir()

    def write() -> None:
        with atomic_write(target) as temporary:
            temporary.write_bytes(b"weights")
            link.hardlink_to(temporary)
            if fails == "block":
                raise RuntimeError("interrupted")

    with pytest.raises((RuntimeError, IsADirectoryError)):
        write()
    assert link.read_bytes() == bytes(7)
    assert {path.name for path in tmp_path.iterdir()} == {"link", *(["file"] if fails == "rename" else [])}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) + 3])
def test_nothing_of_an_overwritten_file_is_left(tmp_path: Path, size: int) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"\xff" * size)
    link.hardlink_to(path)  # sees the content in place, as who kept the file open does
    assert overwrite(path) == size
    assert link.read_bytes() == bytes(size)


def test_a_file_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        overwrite(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    message = f"store must have one writer at a time, got '{tmp_path}', which is open for writing elsewhere"
    before = len(os.listdir("/proc/self/fd"))
    held = FileLock(path, "store")
    with pytest.raises(ValueError) as error:
        FileLock(path, "store")
    assert str(error.value) == message
    held.release()
    FileLock(path, "store").release()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_holder_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    held = FileLock(tmp_path / "lock", "store")
    started = time.monotonic()
    threading.Timer(0.2, held.release).start()
    FileLock(tmp_path / "lock", "store").release()
    assert time.monotonic() - started >= 0.2


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="store must have one writer at a time"):
            FileLock(path, "store")
        holder.send_signal(signal.SIGKILL)
    FileLock(path, "store").release()


def test_a_forked_child_does_not_keep_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = FileLock(path, "store")
    child = os.fork()
    if child == 0:
        held.release()  # of a child that closes what it has inherited: the lock is not its own
        time.sleep(60)
        os._exit(0)
    try:
        with pytest.raises(ValueError, match="store must have one writer at a time"):
            FileLock(path, "store")
        held.release()
        held.release()
        FileLock(path, "store").release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_whether_somebody_else_writes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not written_elsewhere(path)
    held = FileLock(path, "store")
    assert written_elsewhere(path)
    held.release()
    assert not written_elsewhere(path)


def test_workers_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "at-work"
    await_workers(path)  # nobody has ever worked here
    with at_work(path), at_work(path):
        monkeypatch.setattr("pymape.storage.files._WORK_SECONDS", 0.1)
        with pytest.raises(ValueError, match="workers of a process that was killed must have ended, got one"):
            await_workers(path)
    await_workers(path)
