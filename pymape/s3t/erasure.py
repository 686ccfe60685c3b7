"""Removing files so that their content is gone, not only their names."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pymape.s3t import faults
from pymape.storage.files import overwrite, sync_tree
from pymape.storage.store import file_hash

__all__ = ["INDEX", "erase_files", "erase_folder", "is_another_export", "revoke_export", "try_each"]

INDEX = "ensemble.json"  # of an export; its "export" is a number that no other one has

Item = TypeVar("Item", bound=Hashable)


def erase_files(paths: Iterable[Path]) -> int:
    """Overwrite files with zeros, wait for the disk, and delete them.

    Where a file system writes in place on a magnetic disk, nothing is left. A copy-on-write file system (Btrfs, ZFS, a
    snapshot) and flash storage write the zeros elsewhere and may keep the old blocks for a while: there the promise is
    that nobody reads the content through the file system again, and only an encrypted disk promises more.

    Args:
        paths: of the files; those that do not exist are left out.

    Returns:
        Bytes overwritten.

    Raises:
        OSError: a file cannot be overwritten or deleted. Those before it are gone; calling again does the rest.
    """
    erased, folders = 0, set()
    for path in paths:
        folders.add(path.parent)  # also of a file that is gone: an interrupted attempt may not have reached the disk
        try:
            size = overwrite(path)
            faults.checkpoint("erase: overwritten")
            path.unlink()
            faults.checkpoint("erase: deleted")
        except FileNotFoundError:
            continue
        erased += size
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            sync_tree(folder, deep=False)
    faults.checkpoint("erase: folders synced")
    return erased


def try_each(step: Callable[[Sequence[Item]], object], items: Sequence[Item]) -> dict[Item, OSError]:
    """Do a step for all items together, and after an error for each alone, so that one holds up no other.

    Args:
        step: what can be repeated.
        items: what it is given.

    Returns:
        The items that it fails for, with the errors.
    """
    failed: dict[Item, OSError] = {}
    try:
        step(items)
    except OSError:
        for item in items:
            try:
                step([item])
            except OSError as error:
                failed[item] = error
    return failed


def erase_folder(folder: Path) -> None:
    """Overwrite all files in a folder and delete it; nothing happens where there is none.

    Raises:
        OSError: as `erase_files`, or the folder cannot be removed.
    """
    erase_files(path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder)


def is_another_export(folder: Path, files: Mapping[str, str]) -> bool:
    """Whether a folder holds another export than the one of these files: its index says so, where there is one.

    An index that somebody has edited says still which export it is of.

    Args:
        folder: where the export belongs.
        files: as `revoke_export`.
    """
    sha256, _, export = files.get(INDEX, "").partition(" ")
    try:
        if not sha256 or file_hash(folder / INDEX) == sha256:
            return False
        index = json.loads((folder / INDEX).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(index, dict) and (not export or index.get("export") != export)


def revoke_export(folder: Path, files: Mapping[str, str], names: Iterable[str] | None = None) -> dict[str, Any]:
    """Erase the files of an export that are still what was written, unless another export lies in its place.

    Args:
        folder: the export.
        files: path inside the folder -> sha256 of the file; after that of the index, and a space, what it names as its
            "export".
        names: of the files to erase; default: all.

    Returns:
        {"path", "erased": files erased, "changed": files with another content, left alone, "missing": files that are
        not there (or were erased before a crash or an error)}.

    Raises:
        OSError: naming a file that cannot be erased; all others are. Calling again continues.
    """
    outcome: dict[str, Any] = {"path": str(folder), "erased": [], "changed": [], "missing": []}
    names = sorted(files if names is None else names)
    if is_another_export(folder, files):
        return outcome | {"missing": names}
    failure: OSError | None = None
    for name in names:
        path = folder / name
        # A file that a crash left half overwritten has another sha256, so it is known by a name of its own.
        ours = path.with_name(f".{path.name}.revoked")
        try:
            if not ours.exists():
                if file_hash(path) != files[name].partition(" ")[0]:
                    outcome["changed"].append(name)
                    continue
                path.rename(ours)
                sync_tree(path.parent, deep=False)  # the name must be on the disk before the content goes
            erase_files([ours])
            outcome["erased"].append(name)
        except (FileNotFoundError, NotADirectoryError):
            outcome["missing"].append(name)
        except IsADirectoryError:
            outcome["changed"].append(name)
        except OSError as error:
            failure = failure or OSError(error.errno, error.strerror or str(error), str(path))
    inside = sorted({parent for name in files for parent in Path(name).parents}, key=lambda part: -len(part.parts))
    for part in inside:  # folders that held nothing else; "." comes last
        with contextlib.suppress(OSError):
            (folder / part).rmdir()
    if failure is not None:
        raise failure
    faults.checkpoint("export: revoked")
    return outcome
