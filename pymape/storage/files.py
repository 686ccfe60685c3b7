"""Writing files so that a crash leaves the old content or the new; one writer at a time; erasing what a file holds."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

__all__ = [
    "FileLock",
    "at_work",
    "atomic_write",
    "await_workers",
    "discard",
    "overwrite",
    "sync_tree",
    "umask",
    "written_elsewhere",
]

# A child that a killed writer had just forked, to run git for instance, holds the lock until it executes its program.
_PATIENCE = 1.0  # seconds
_WORK_SECONDS = 10.0
_ZEROS = bytes(1 << 20)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends without an error, fsync it and rename it into place.

    Args:
        path: the file to write; its folder is created when absent.

    Raises:
        OSError: the folder or the file cannot be written. Nothing is left behind then, nor after an error in the block:
            what was begun is overwritten with zeros before it is deleted.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        temporary.chmod(0o666 & ~umask())
        temporary.replace(target)
        _sync(target.parent)
    finally:
        discard(temporary)


def discard(path: str | os.PathLike[str]) -> None:
    """Delete a file that was begun, if it is there, overwritten where that is possible.

    Raises:
        OSError: it cannot be deleted.
    """
    with contextlib.suppress(OSError):  # a full file system may refuse even that
        overwrite(path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def overwrite(path: str | os.PathLike[str], start: int = 0) -> int:
    """Put zeros in the place of a file's content and wait until they have reached the disk.

    Args:
        path: of the file.
        start: bytes at its beginning that stay.

    Returns:
        Number of bytes overwritten.

    Raises:
        OSError: there is no such file, or it cannot be written.
    """
    with open(path, "r+b") as file:
        size = max(os.fstat(file.fileno()).st_size - start, 0)
        file.seek(start)
        for done in range(0, size, len(_ZEROS)):
            file.write(_ZEROS[: size - done])
        file.flush()
        os.fsync(file.fileno())
    return size


def sync_tree(folder: Path, deep: bool = True) -> None:
    """Wait until a folder's entries, and with `deep` everything below it, have reached the disk."""
    if deep:
        for path in folder.rglob("*"):
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileLock:
    """The right to be the one writer of a folder, from here to `release` or the end of the process.

    A process that is forked from this one does not keep it: its copy of the lock is nothing.

    Args:
        path: of the file to lock, made when absent; its folder is there.
        kind: what the folder is, for the message.

    Raises:
        ValueError: the folder has another writer, in this process or elsewhere, who is not just ending.
    """

    def __init__(self, path: Path, kind: str) -> None:
        problem = (
            f"{kind} must have one writer at a time, got {str(path.parent)!r}, which is open for writing elsewhere"
        )
        self._descriptor: int | None = _locked(path, fcntl.LOCK_EX, problem, _PATIENCE)
        _HELD.add(self)

    def release(self) -> None:
        """Let others write; nothing happens where that has been done."""
        _HELD.discard(self)
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # a child that was just forked may have the file open still
            self._forget()

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_HELD: WeakSet[FileLock] = WeakSet()


def _forget_locks() -> None:
    for lock in list(_HELD):
        lock._forget()
    _HELD.clear()


os.register_at_fork(after_in_child=_forget_locks)


@contextmanager
def at_work(path: Path) -> Iterator[None]:
    """A block for which `await_workers` waits, in this process or another.

    Args:
        path: of a file for nothing else, made when absent, with its folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _locked(path, fcntl.LOCK_SH, f"workers must come after {str(path)!r} is free", _WORK_SECONDS)
    try:
        yield
    finally:
        os.close(descriptor)


def await_workers(path: Path) -> None:
    """Wait until nobody is in `at_work` of a file.

    Raises:
        ValueError: somebody is still there after ten seconds.
    """
    if path.exists():
        problem = f"workers of a process that was killed must have ended, got one that still uses {str(path.parent)!r}"
        os.close(_locked(path, fcntl.LOCK_EX, problem, _WORK_SECONDS))


def written_elsewhere(path: Path) -> bool:
    """Whether somebody else has the `FileLock` of a file."""
    try:
        os.close(_locked(path, fcntl.LOCK_SH, "", 0.0, os.O_RDONLY))
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return False


def _locked(path: Path, kind: int, problem: str, patience: float, flags: int = os.O_RDWR | os.O_CREAT) -> int:
    """A descriptor that holds a lock of the file."""
    descriptor = os.open(path, flags, 0o666)
    deadline = time.monotonic() + patience
    try:
        while True:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise ValueError(problem) from error
            time.sleep(0.01)
    except BaseException:
        os.close(descriptor)
        raise


def umask() -> int:
    """Return the process's file mode creation mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
