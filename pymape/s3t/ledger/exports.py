"""The exports of a ledger: known before they are there, revoked by requests, forgotten where they failed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymape.s3t.erasure import erase_folder, is_another_export, revoke_export
from pymape.s3t.ledger.database import now
from pymape.s3t.ledger.stages import LedgerStages
from pymape.s3t.stages import StageKey

__all__ = ["PARTIAL", "LedgerExports"]

# Revoked, and no later export took the place.
_OVER = "outcome NOTNULL AND NOT EXISTS (SELECT 1 FROM exports l WHERE l.path = e.path AND l.export > e.export)"
PARTIAL = ".partial"  # how the folder of an export is called while it is written
_ALL = "."  # stands for the files of such a folder, whose names are not known


class LedgerExports(LedgerStages):
    """The part of `Ledger` that holds exports."""

    _homes: list[str]  # where the ledger's folder has been

    @contextmanager
    def placing(
        self, folder: str | os.PathLike[str], files: Iterable[Mapping[str, str]], stages: Iterable[StageKey]
    ) -> Iterator[None]:
        """A block that moves an export to where it belongs. It is known from before, so that a deletion revokes it.

        After an error in the block it is forgotten again, otherwise an earlier one in the same place is.

        Args:
            folder: where it belongs.
            files: {"file": path inside the folder, "sha256": of the file} for each, as `export_ensemble` gives them.
            stages: that the files hold.

        Raises:
            ValueError: a request has tombstoned a stage. Raised after the block, it means that the files must be
                removed again.
        """
        path, contents = os.path.realpath(folder), {entry["file"]: _mark(entry) for entry in files}
        keys = list(stages)
        with self._db.lock:
            with self._change("export"):
                export = self._insert_export(path, contents, keys)
                self._audit.append("exported", stages=len(keys), files=len(contents))
            self._placing.add(export)
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError), self._change("forget export"):  # a full disk; it will be missing
                self._drop_export(export)
            raise
        else:
            with self._change("export placed"):
                for (old,) in self._db.rows(
                    "SELECT export FROM exports WHERE path = ? AND export != ? AND request IS NULL", (path, export)
                ):
                    if old not in self._placing:  # else it is about to find the place taken
                        self._forget_export(old)
            by = self._db.value("SELECT name FROM exports JOIN requests USING (request) WHERE export = ?", (export,))
            if by is not None:
                raise ValueError(f"stages of an export must be live, got some that request {by!r} has ended")
        finally:
            self._placing.discard(export)

    @contextmanager
    def exporting(self, folder: str | os.PathLike[str], stages: Iterable[StageKey]) -> Iterator[None]:
        """A block that writes an export in a temporary folder. What a crash leaves of it is erased when it is found.

        A request that ends one of the stages meanwhile is not erased before the block has ended.

        Args:
            folder: named *.partial; the block moves it to where the export belongs, or removes it.
            stages: that the files hold.

        Raises:
            ValueError: a stage that a request has tombstoned.
        """
        path = os.path.realpath(folder)
        with self._db.lock:
            with self._change("begin export"):
                export = self._insert_export(path, None, stages)
            self._exporting.add(export)
        try:
            yield
        finally:
            with self._landed:
                self._exporting.discard(export)
                self._landed.notify_all()
                with contextlib.suppress(OSError):  # a full disk; it will be missing
                    if Path(path).parent.is_dir() and not os.path.lexists(path):  # moved or removed, as it should be
                        with self._change("forget export"):
                            self._drop_export(export)
                    self._sweep_exports()

    def exports(self) -> list[dict[str, Any]]:
        """{"path", "created", "request": that revoked it or None, "outcome": see `erasure.revoke_export`} of each."""
        rows = self._db.rows(
            "SELECT path, created, q.name, outcome FROM exports e LEFT JOIN requests q USING (request) "
            "WHERE files != 'null' ORDER BY export"
        )
        return [
            {"path": path, "created": created, "request": request, "outcome": outcome and json.loads(outcome)}
            for path, created, request, outcome in rows
        ]

    def missing_exports(self) -> list[str]:
        """A sentence for every live export of which no file is there."""
        rows = self._db.rows("SELECT export, path, files FROM exports WHERE request IS NULL AND files NOT IN (?, ?)",
            ("null", "{}"),
        )  # fmt: skip
        return [
            f"export {path!r} is not there to be revoked"
            for export, path, files in rows
            if export not in self._placing and not self._there(path, json.loads(files), json.loads(files))
        ]

    def _places(self, path: str) -> list[Path]:
        """Where an export may be: where it was written, or moved together with the system that it lay beside."""
        here = os.path.realpath(self.folder)
        moved = [
            os.path.normpath(os.path.join(here, os.path.relpath(path, home)))
            for home in self._homes
            if Path(path).is_relative_to(os.path.dirname(home))
        ]
        return [Path(place) for place in dict.fromkeys([path, *moved])]

    def _there(self, path: str, files: Mapping[str, str], names: Iterable[str]) -> list[str]:
        """Those of an export's files that are there, and are not those of another export in its place."""
        places = [place for place in self._places(path) if not is_another_export(place, files)]
        return [str(place / name) for name in names for place in places if (place / name).exists()]

    def _insert_export(self, path: str, files: Mapping[str, str] | None, stages: Iterable[StageKey]) -> int:
        """Note an export inside a transaction; without `files` it is being written, and all in the folder is its."""
        trained = {row.key: row.stage for row in self.stages() if row.state == "trained"}
        keys = list(stages)
        for key in keys:
            if key not in trained:
                raise ValueError(f"stages of an export must be live, got {key.name}")
        export = self._db.insert(
            "INSERT INTO exports (path, created, files) VALUES (?, ?, ?)", (path, now(), json.dumps(files))
        )
        self._db.run_all("INSERT INTO export_stages VALUES (?, ?)", [(trained[key], export) for key in keys])
        return export

    def _drop_export(self, export: int) -> None:
        """Note inside a transaction that there are no files of an export: forget it, or leave its request nothing."""
        if self._db.value("SELECT request FROM exports WHERE export = ?", (export,)) is None:
            self._forget_export(export)
        else:
            self._db.run("UPDATE exports SET files = '{}' WHERE export = ?", (export,))

    def _forget_export(self, export: int) -> None:
        self._db.run("DELETE FROM export_stages WHERE export = ?", (export,))
        self._db.run("DELETE FROM exports WHERE export = ?", (export,))

    def _sweep_exports(self) -> None:
        """Erase and forget what is left of exports that were being written and are not any more."""
        for export, path in self._db.rows("SELECT export, path FROM exports WHERE files = 'null'"):
            if export in self._exporting or not path.endswith(PARTIAL):  # no other folder is all ours
                continue
            places = self._places(path)
            if not any(os.path.lexists(place) or _occupied(place.parent) for place in places):  # its disk may come back
                continue
            try:
                for place in places:
                    erase_folder(place)
            except OSError:  # tried again
                continue
            with self._change("forget export"):
                self._drop_export(export)

    def _revoke(self, requests: Sequence[int]) -> dict[int, OSError]:
        """Erase the exports that requests revoke; the first error of each request, whose export is tried again."""
        failed: dict[int, OSError] = {}
        for export, request, path, files in list(
            self._db.rows_in(
                "SELECT export, request, path, files FROM exports WHERE outcome IS NULL AND request IN ({})", requests
            )
        ):
            contents = json.loads(files)
            if contents is None:
                contents = {_ALL: ""} if path.endswith(PARTIAL) else {}
            try:
                outcome = self._erased(path, contents, contents)
            except OSError as error:
                failed.setdefault(request, error)
                continue
            with self._db.transaction("revoke"):
                self._db.run(
                    "UPDATE exports SET outcome = ?, files = ? WHERE export = ?",
                    (json.dumps(outcome), json.dumps(contents), export),
                )
        return failed

    def _revoke_late(self) -> None:
        """Erase files of revoked exports that were missing when they were to be erased, and are there again.

        They may lie on a disk that was not mounted then. A file that cannot be erased is tried again.
        """
        for export, name, path, files, text in self._db.rows(
            f"SELECT export, q.name, path, files, outcome FROM exports e JOIN requests q USING (request) WHERE {_OVER}"
        ):
            outcome = json.loads(text)
            missing = outcome["missing"]
            with contextlib.suppress(OSError):
                late = self._erased(path, json.loads(files), missing)
                if len(late["missing"]) == len(missing):
                    continue
                outcome |= {"missing": late["missing"]}
                outcome |= {kind: sorted([*outcome[kind], *late[kind]]) for kind in ("erased", "changed")}
                with self._change("revoke late"):
                    self._db.run("UPDATE exports SET outcome = ? WHERE export = ?", (json.dumps(outcome), export))
                    self._audit.append("export erased late", request=name, files=len(late["erased"]))

    def _returned(self) -> list[str]:
        """Files of revoked exports that were missing when they were to be erased, and are there again."""
        rows = self._db.rows(f"SELECT path, files, outcome FROM exports e WHERE {_OVER}")
        return [
            found
            for path, files, outcome in rows
            for found in self._there(path, json.loads(files), json.loads(outcome)["missing"])
        ]

    def _erased(self, path: str, files: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
        """What `revoke_export` tells of all places of an export together.

        Raises:
            OSError: as `revoke_export`, after all have been tried.
        """
        outcomes, failure = [], None
        for place in self._places(path):
            try:
                outcomes.append(_erased(place, files, names))
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        found = {kind: sorted({name for one in outcomes for name in one[kind]}) for kind in ("erased", "changed")}
        missing = sorted({*names}.difference(*found.values()))
        return {"path": path, **found, "missing": missing}

    def _outcomes(self, requests: Sequence[int]) -> list[dict[str, Any]]:
        """What became of the exports that requests revoked."""
        rows = self._db.rows_in("SELECT outcome FROM exports WHERE request IN ({}) ORDER BY export", requests)
        return [json.loads(outcome) for (outcome,) in rows]


def _occupied(folder: Path) -> bool:
    """Whether a folder holds anything: one that is empty may be where a disk is mounted at other times."""
    return folder.is_dir() and any(folder.iterdir())


def _mark(entry: Mapping[str, str]) -> str:
    """What is kept of a file, as `revoke_export` takes it."""
    return " ".join([entry["sha256"], *([entry["export"]] if "export" in entry else [])])


def _erased(folder: Path, files: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """What `revoke_export` tells, also of an export that was being written."""
    if _ALL not in files:
        return revoke_export(folder, files, names)
    there = folder.is_dir()
    erase_folder(folder)
    return {"path": str(folder), "erased": [_ALL] * there, "changed": [], "missing": [_ALL] * (not there)}
