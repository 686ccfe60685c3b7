"""What a ledger's folder holds, and how it is begun."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pymape.storage.files import sync_tree

__all__ = ["ANCHOR", "CACHE", "DATABASE", "KEY", "LOCK", "STAGES", "TEMPORARY", "check_free", "write_key"]

DATABASE, KEY, LOCK, ANCHOR = "ledger.sqlite", "key", "lock", "audit.head"
STAGES, CACHE = "stages", "cache"
# Files that a crash leaves while one of these is written.
TEMPORARY = re.compile(rf"\.({re.escape(DATABASE)}|{re.escape(ANCHOR)}|{KEY})\..*")


def check_free(folder: Path) -> None:
    """Make the folder, and refuse one that holds more than an interrupted creation."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir() if not TEMPORARY.fullmatch(entry.name)}
        names |= {f"{STAGES}/{entry.name}" for entry in (folder / STAGES).iterdir()} if STAGES in names else set()
    except OSError as error:
        raise ValueError(f"ledger must be a writable folder, got {str(folder)!r}: {error.strerror}") from error
    foreign = sorted(names - {KEY, LOCK, ANCHOR, STAGES})
    if foreign:
        raise ValueError(f"ledger must be made in a new or empty folder, got {str(folder)!r} with {foreign[0]!r}")


def write_key(path: Path, key: bytes) -> None:
    """Write the key so that nobody else can read it at any moment."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, key)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_tree(path.parent, deep=False)
