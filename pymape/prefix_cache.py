"""Hidden states of a frozen prefix of a model, computed once: `PrefixCache` keeps them, `FrozenPrefix` uses them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pymape.storage.files import at_work, await_workers, discard, overwrite, sync_tree
from pymape.storage.tensors import tensor_digest

__all__ = ["PrefixCache"]

_SUFFIX = ".safetensors"
_STATES = "states"
_IN_USE = "in-use"
_HEADER = 1024  # at most what a file needs beside the states
_RESCAN_SECONDS = 10.0
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)  # what file systems without hard links say
_NOT_STORED = (errno.ENOENT, errno.ENOSPC, errno.EDQUOT)  # the folder was deleted meanwhile, as it may be; no space


class PrefixCache:
    """Tensors on disk, one file per prefix and record.

    A file holds the sha256 of what it is for and of its content: a damaged or partial one is noticed when it is read,
    removed and counted in `damaged`, and its record computed again. Any file and the whole folder may be deleted at any
    time. Files are not synced to disk, since one that is lost or torn in a crash costs a computation only. Several
    processes may share a folder.

    Args:
        path: folder; made when first needed.
        max_bytes: at most this much is stored (counted before the first write and by this process's own writes;
            recounted at most every ten seconds once full). Records beyond it are computed every time. None: no limit.

    Raises:
        ValueError: a negative limit.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0 or None, got {max_bytes}")
        self.path = Path(path)
        self.max_bytes = max_bytes
        self.hits = self.misses = self.damaged = 0
        self._bytes = 0
        self._counted: float | None = None  # when; without a limit nothing needs to be counted

    def get(self, prefix: str, record: str, inputs: str) -> Tensor | None:
        """Return what was put under the same three keys, or None.

        Args:
            prefix: digest of the function, of its weights above all.
            record: the record's id.
            inputs: digest of the record's inputs.

        Returns:
            A CPU tensor.
        """
        path = self._file(prefix, record)
        try:
            found = _read(path, prefix, record)
        except FileNotFoundError:
            self.misses += 1
            return None
        if found is None:
            self.damaged += 1
            self._remove(path)
        if found is None or found[0] != inputs:
            self.misses += 1
            return None
        self.hits += 1
        return found[2]

    def put(self, prefix: str, record: str, inputs: str, states: Tensor) -> bool:
        """Store a tensor in the place of what the record had under this prefix; False where a limit forbids it.

        Raises:
            OSError: the folder cannot be written, for another reason than a full disk or quota. Nothing is left behind.
        """
        states = states.detach().cpu().contiguous()
        path = self._file(prefix, record)
        if not self._fits(states.nbytes + _HEADER):
            return False
        checksum = _checksum(prefix, record, inputs, states)
        content = save({_STATES: states}, {"inputs": inputs, "checksum": checksum})

        def stored() -> bool:
            with contextlib.suppress(FileNotFoundError):
                found = _read(path, prefix, record)
                return found is not None and found[1] == checksum
            return False

        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if stored():
                return True
            # The name begins as the record's file does, so that `erase` finds what a killed process leaves behind.
            handle, temporary = tempfile.mkstemp(prefix=path.stem + ".", suffix=".tmp", dir=path.parent)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            while True:
                try:
                    _rename(temporary, path)
                    break
                except FileExistsError:
                    if stored():  # somebody else was first
                        discard(temporary)
                        return True
                    self._remove(path)  # not only replaced: its blocks would keep what it holds
        except BaseException as error:
            if temporary is not None:
                discard(temporary)
            if isinstance(error, OSError) and error.errno in _NOT_STORED:
                return False
            raise
        self._bytes += len(content)
        return True

    def in_use(self) -> AbstractContextManager[None]:
        """A block in which records are computed and put; `wait_until_unused` waits for it, in any process."""
        return at_work(self.path / _IN_USE)

    def wait_until_unused(self) -> None:
        """Wait until nobody is in a block of `in_use`.

        Raises:
            ValueError: somebody is still there after ten seconds.
        """
        await_workers(self.path / _IN_USE)

    def erase(self, records: Iterable[str]) -> int:
        """Remove all that is stored of some records, under every prefix: overwrite the files with zeros, then delete.

        Returns:
            The number of files removed.
        """
        names = {_name(record) for record in records}
        erased = 0
        for folder in self._folders():
            found = [entry.path for entry in _entries(folder) if entry.name.partition(".")[0] in names]
            for path in found:
                erased += self._remove(path)
            if found:
                with contextlib.suppress(FileNotFoundError):
                    sync_tree(folder, deep=False)
        return erased

    def holding(self, records: Iterable[str]) -> list[str]:
        """Those of some records of which anything is stored, under any prefix."""
        stored = {entry.name.partition(".")[0] for folder in self._folders() for entry in _entries(folder)}
        return [record for record in records if _name(record) in stored]

    def clear(self) -> None:
        """Remove everything that is stored."""
        for folder in self._folders():
            for entry in _entries(folder):
                self._remove(entry.path)
            with contextlib.suppress(OSError):  # somebody else has put something there meanwhile
                folder.rmdir()
        self._count()

    def __len__(self) -> int:
        """Number of stored tensors, counted on disk."""
        return sum(entry.name.endswith(_SUFFIX) for folder in self._folders() for entry in _entries(folder))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        self._count()
        return self._bytes

    def _file(self, prefix: str, record: str) -> Path:
        return self.path / prefix[:32] / (_name(record) + _SUFFIX)

    def _folders(self) -> list[Path]:
        return [Path(entry.path) for entry in _entries(self.path) if entry.is_dir()]

    def _count(self) -> None:
        self._bytes, self._counted = 0, time.monotonic()
        for folder in self._folders():
            for entry in _entries(folder):
                with contextlib.suppress(FileNotFoundError):
                    self._bytes += entry.stat().st_size

    def _fits(self, size: int) -> bool:
        if self.max_bytes is None:
            return True
        full = self._bytes + size > self.max_bytes
        if self._counted is None or (full and time.monotonic() - self._counted >= _RESCAN_SECONDS):
            self._count()
        return self._bytes + size <= self.max_bytes

    def _remove(self, path: str | Path) -> bool:
        """Overwrite and delete a file; False if it is gone already."""
        try:
            size = overwrite(path)
            os.unlink(path)
        except FileNotFoundError:
            return False
        self._bytes -= size
        return True


def _read(path: Path, prefix: str, record: str) -> tuple[str, str, Tensor] | None:
    """Inputs, checksum and states in a file; None where it is damaged or another's.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # A copy, then checked: the file may be erased at any time, and its tensor lies in it.
            stored, states = file.metadata() or {}, file.get_tensor(_STATES).clone()
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError):
        return None
    # A header that was hit may name another record's inputs: the checksum is over the right ones.
    inputs = stored.get("inputs", "")
    checksum = _checksum(prefix, record, inputs, states)
    return (inputs, checksum, states) if stored.get("checksum") == checksum else None


def _rename(temporary: str, path: Path) -> None:
    """Give a file its name.

    Raises:
        FileExistsError: another one has it.
    """
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def _name(record: str) -> str:
    """File stem of a record: ids may hold anything, and need not be readable by who lists the folder."""
    return hashlib.sha256(record.encode()).hexdigest()[:32]


def _checksum(prefix: str, record: str, inputs: str, states: Tensor) -> str:
    hasher = hashlib.sha256(f"{prefix}\0{record}\0{inputs}\0".encode())
    tensor_digest(hasher, _STATES, states)
    return hasher.hexdigest()


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder; nothing where it is gone, as it may be at any time."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
