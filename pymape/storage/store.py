"""A folder that changes in whole steps: whatever kills the process, it holds the state before a step or after it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pymape.storage.files import FileLock, atomic_write, sync_tree

__all__ = ["FIRST", "STATE", "FolderStore", "Step", "file_hash"]

STATE, FIRST = "state.json", "step-0000"
_LOCK, _STAGE = ".lock", ".stage"
_OURS = re.compile(rf"\.stage|step-\d{{4,}}|\.{re.escape(STATE)}\..*")


@dataclass
class Step:
    """A step in the making.

    Args:
        folder: where to write its files; it becomes `name` inside the store.
        name: the folder's final name.
        content: the JSON-able content of the store after the step.
        dropped: files of the store, relative to it, that the step makes superfluous.
    """

    folder: Path
    name: str
    content: dict[str, Any]
    dropped: set[str] = field(default_factory=set)


class FolderStore:
    """Files and a JSON content in a folder, changed in whole steps by one process at a time.

    A step's files are written to `.stage`, made durable and renamed to `step-NNNN`; nothing refers to them yet. Then
    `state.json`, which holds the content and the sha256 of every file that belongs to the store, is replaced by one
    rename: the commit point. Everything that it does not name is left over from an interrupted step, or superfluous
    since the last one, and is removed, at once or when the store is opened next.

    Args:
        folder: the store's folder.
        kind: what it is a store of; a store of another kind is refused.
        mode: "write" takes the lock, checks every file and rolls an interrupted step back; "read" does none of that;
            "create" makes a store, empty until its first step is committed.

    Raises:
        ValueError: no such store, one that another process writes, one that is damaged (naming the file), or, in mode
            "create", a folder with something else in it.
    """

    def __init__(
        self, folder: str | os.PathLike[str], kind: str, mode: Literal["read", "write", "create"] = "write"
    ) -> None:
        self.folder, self.kind = Path(folder).absolute(), kind
        self.content: dict[str, Any] = {}
        self.files: dict[str, str] = {}
        self._lock: FileLock | None = None
        if mode == "create":
            self._check_free()
        elif not (self.folder / STATE).is_file():
            raise ValueError(f"{kind} must be a folder with a {STATE}, got {str(folder)!r} without")
        if mode == "read":
            self._read()
            return
        self._lock = FileLock(self.folder / _LOCK, kind)
        try:
            if mode == "write":
                self._read()
                self.verify()
            else:
                self._check_free()  # now that nobody else can be making it
            self._sweep()
        except BaseException:
            self.close()
            raise

    def path(self, name: str) -> Path:
        """Where a file or folder of the store is."""
        return self.folder / name

    def read(self, name: str) -> bytes:
        """Content of one file, checked against its sha256.

        Raises:
            ValueError: the file is missing or changed.
        """
        self.verify([name])
        return self.path(name).read_bytes()

    def verify(self, names: list[str] | None = None) -> None:
        """Check files (default: all) against their sha256, once more where a writer has replaced the state meanwhile.

        Raises:
            ValueError: naming the first file that is missing or changed.
        """
        checked = dict(self.files)
        try:
            self._verify(list(checked) if names is None else names)
        except ValueError:
            if self._lock is None:
                self._read()
            if self.files == checked or not self.files.keys() >= set(names or ()):
                raise
            self.verify(names)

    def _verify(self, names: list[str]) -> None:
        for name in names:
            try:
                found = file_hash(self.path(name))
            except OSError as error:
                raise ValueError(
                    f"{self.kind} must be intact, got {str(self.path(name))!r}: {error.strerror}"
                ) from error
            if found != self.files[name]:
                raise ValueError(
                    f"{self.kind} must be intact, got {str(self.path(name))!r} with sha256 {found[:12]} "
                    f"instead of {self.files[name][:12]}"
                )

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Prepare a step in the block and commit it at its end; after an error nothing has changed.

        Args:
            name: "step-" and at least four digits, not used before; "step-0000" comes first.
        """
        if self._lock is None:
            raise ValueError(f"{self.kind} must be open for writing, got one that is closed or read-only")
        stage = self.folder / _STAGE
        stage.mkdir()
        try:
            change = Step(stage, name, dict(self.content))
            yield change
            self._commit(change)
        finally:
            # After an error the file alone tells whether the state was replaced.
            if (self.folder / STATE).exists():
                self._read()
            self._sweep()

    def close(self) -> None:
        """Let other processes write."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _commit(self, change: Step) -> None:
        kept = {name: digest for name, digest in self.files.items() if name not in change.dropped}
        new = {
            f"{change.name}/{path.relative_to(change.folder).as_posix()}": file_hash(path)
            for path in sorted(change.folder.rglob("*"))
            if path.is_file()
        }
        sync_tree(change.folder)
        change.folder.rename(self.folder / change.name)
        sync_tree(self.folder, deep=False)
        body = {"kind": self.kind, "content": change.content, "files": kept | new}
        with atomic_write(self.folder / STATE) as path:
            path.write_text(json.dumps({"sha256": _checksum(body), **body}, indent=1) + "\n", encoding="utf-8")

    def _read(self) -> None:
        path = self.folder / STATE
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            checksum = state.pop("sha256")
            intact = checksum == _checksum(state)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{self.kind} must be intact, got an unreadable {str(path)!r}: {error}") from error
        if not intact:
            raise ValueError(f"{self.kind} must be intact, got {str(path)!r}, which does not match its own sha256")
        if state["kind"] != self.kind:
            raise ValueError(f"{self.kind} must be the kind of store in {str(self.folder)!r}, got {state['kind']!r}")
        self.content, self.files = state["content"], state["files"]

    def _sweep(self) -> None:
        """Remove what the state does not name, among the names that a store uses."""
        for entry in sorted(self.folder.iterdir()):
            if not _OURS.fullmatch(entry.name):
                continue
            inside = [*entry.rglob("*")] if entry.is_dir() else []
            for path in [*reversed(sorted(inside)), entry]:  # what is in a folder comes before the folder
                if path.is_dir() and not path.is_symlink():
                    if not any(path.iterdir()):
                        path.rmdir()
                elif path.relative_to(self.folder).as_posix() not in self.files:
                    path.unlink()

    def _check_free(self) -> None:
        """Make the folder, and refuse one that holds more than an interrupted first step."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in self.folder.iterdir()} - {_LOCK}
        except OSError as error:
            raise ValueError(
                f"{self.kind} must be a writable folder, got {str(self.folder)!r}: {error.strerror}"
            ) from error
        foreign = [name for name in sorted(names) if not _OURS.fullmatch(name) or name > FIRST]
        if foreign:
            raise ValueError(f"{self.kind} must be a new or empty folder, got {str(self.folder)!r} with {foreign[0]!r}")


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
