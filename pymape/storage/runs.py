"""The folder and the record that every run of the command leaves: complete, or not there at all."""

from __future__ import annotations

import glob
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pymape.storage.files import atomic_write, sync_tree, umask
from pymape.version import __version__

__all__ = [
    "IMPORTANCE",
    "MASKS",
    "MODEL",
    "SUMMARY",
    "environment",
    "quiet_transformers",
    "run_folder",
    "write_summary",
]

# What a run leaves in its folder.
SUMMARY, MODEL, MASKS, IMPORTANCE = "summary.json", "model", "masks.safetensors", "importance.safetensors"
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "numpy", "scikit-learn")


@contextmanager
def run_folder(output: str | os.PathLike[str], kind: str, inputs: Iterable[str | None] = ()) -> Iterator[Path]:
    """Yield a temporary folder that becomes `output` when the block ends without an error.

    It is created before any work, in the nearest folder above `output` that exists, so that a place that cannot be
    written is found out at once. After an error it is removed, and what was at `output` stays as it was. An earlier
    run is deleted once the new one has reached the disk; one that a kill left beside `output` is put back first.

    Args:
        output: the run's folder; absent, empty, or an earlier run's folder of the same kind (both recognised by its
            summary.json), which is replaced unless something else was put in it.
        kind: of the run, as its summary.json says.
        inputs: files and folders that the run reads, none of which may lie in a folder that is replaced.

    Raises:
        ValueError: `output` cannot be written or replaced, or holds something that is no run of this kind, or an input.
    """
    target = Path(output).resolve()
    if os.path.ismount(target):
        raise ValueError(
            f"output must be a folder that can be replaced, got the mount point {str(output)!r}: name one in it"
        )
    ancestor = next(folder for folder in target.parents if os.path.lexists(folder))
    read = [Path(path).resolve() for path in inputs if path is not None]
    try:
        _put_back(target)
        _check_replaceable(target, kind, read)
        stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=ancestor))
    except OSError as error:
        raise ValueError(f"output must be a writable folder, got {str(output)!r}: {error.strerror}") from error
    try:
        yield stage
        _list_files(stage)
        stage.chmod(0o777 & ~umask())
        try:
            _check_replaceable(target, kind, read)  # again: a run takes long
        except ValueError as error:
            kept = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=ancestor))
            stage.rename(kept)
            raise ValueError(f"{error}: the run is kept in {str(kept)!r}") from error
        _put_in_place(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold back transformers' messages below errors, and its progress bars unless stderr is a terminal."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def write_summary(folder: Path, summary: Mapping[str, Any], name: str = SUMMARY) -> None:
    """Write `summary.json`, or a file of another name; NaN and infinities, which JSON lacks, become null."""
    with atomic_write(folder / name) as path:
        path.write_text(json.dumps(_finite(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def environment() -> dict[str, Any]:
    """What it takes to repeat a run: command line, versions, machine, threads and, in a checkout, the commit."""
    import torch

    versions: dict[str, str | None] = {"python": platform.python_version(), "pymape": __version__}
    versions |= {package: _version(package) for package in _PACKAGES}
    return {
        "command": shlex.join(["pymape", *sys.argv[1:]]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version for name, version in versions.items() if version},
        "commit": _commit(),
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def _check_replaceable(target: Path, kind: str, inputs: Iterable[Path]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ValueError(f"output must be a folder, got the file {str(target)!r}")
    try:
        content = {entry.name for entry in target.iterdir()}
    except OSError as error:
        raise ValueError(f"output must be a writable folder, got {str(target)!r}: {error.strerror}") from error
    if not content:
        return
    summary = _read(target / SUMMARY)
    found = _kind_of(summary)
    if found != kind:
        what = "other files" if found is None else f"a run of another kind, {found}"
        raise ValueError(f"output must be a new or empty folder or an earlier run's, got {str(target)!r} with {what}")
    others = sorted(name for name in content if _run_kind(target / name / SUMMARY) is not None)
    if others:
        raise ValueError(f"output must hold no run but the one to replace, got {str(target / others[0])!r} too")
    own = summary.get("files")  # absent in runs of earlier versions
    added = sorted(name for name in content.difference(own or content) if not name.startswith("."))
    if added:
        raise ValueError(
            f"output must hold only what its run left, got {str(target / added[0])!r} too: move it elsewhere"
        )
    inside = [path for path in inputs if path == target or target in path.parents]
    if inside:
        raise ValueError(f"output must not hold what the run reads, got {str(target)!r} with {str(inside[0])!r}")


def _list_files(stage: Path) -> None:
    """Note in a run's summary what lies beside it, so that what is added later can be told apart."""
    summary = _read(stage / SUMMARY)
    if summary:
        write_summary(stage, {**summary, "files": sorted(path.name for path in stage.iterdir())})


def _run_kind(summary: Path) -> str | None:
    """The kind of the run whose summary lies there; None where none does."""
    return _kind_of(_read(summary))


def _kind_of(summary: Mapping[str, Any]) -> str | None:
    return str(summary.get("kind")) if "pymape" in summary.get("versions", ()) else None


def _read(summary: Path) -> dict[str, Any]:
    """A summary's content; nothing where there is none."""
    try:
        content = json.loads(summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _put_in_place(stage: Path, target: Path) -> None:
    ancestor = stage.parent
    sync_tree(stage)
    target.parent.mkdir(parents=True, exist_ok=True)
    old = None
    try:
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
            target.rename(old / target.name)
        stage.rename(target)
    except BaseException:
        if old is not None:
            _move_back(old, target)
        raise
    for folder in target.parents:  # also those that were just made
        sync_tree(folder, deep=False)
        if folder == ancestor:
            break
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _put_back(target: Path) -> None:
    """Undo what a process did that was killed when it had moved the run at `target` aside to replace it."""
    beside = target.parent.glob(f".{glob.escape(target.name)}.*.old")
    for old in sorted(beside, key=lambda folder: folder.stat().st_mtime_ns, reverse=True):
        if _run_kind(old / target.name / SUMMARY) and not os.path.lexists(target):
            _move_back(old, target)


def _move_back(old: Path, target: Path) -> None:
    if (old / target.name).exists() and not os.path.lexists(target):
        (old / target.name).rename(target)
    with suppress(OSError):  # not empty
        old.rmdir()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package is imported from; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        result = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
