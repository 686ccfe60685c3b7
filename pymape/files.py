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

__all__ = ["atomic_write", "discard", "overwrite", "sync_tree", "take_lock", "umask"]

# A child that a killed writer had just forked, to run git for instance, holds the lock until it executes its program.
_PATIENCE = 1.0  # seconds
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


def take_lock(path: Path, kind: str) -> int:
    """Become the one writer of a file's folder, until the lock is closed or the process ends.

    Args:
        path: of the file to lock, made when absent; its folder is there.
        kind: what the folder is, for the message.

    Returns:
        The file descriptor that holds the lock, for `os.close`.

    Raises:
        ValueError: the folder has another writer, in this process or elsewhere, who is not just ending.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return descriptor
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{kind} must have one writer at a time, got {str(path.parent)!r}, which is open for writing "
                        "elsewhere"
                    ) from error
            time.sleep(0.01)
    except BaseException:
        os.close(descriptor)
        raise


def umask() -> int:
    """Return the process's file mode creation mask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
