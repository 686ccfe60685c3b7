"""Checking a ledger without training: everything that is wrong, by name."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from pymape.s3t.ledger.finish import LedgerFinish
from pymape.s3t.ledger.folder import LOCK, STAGES, TEMPORARY
from pymape.s3t.ledger.requests import STATES, is_receipt, names_digest
from pymape.s3t.ledger.stages import DAMAGED, StageRow, deepest
from pymape.s3t.stages import row_digest, unpack_stage
from pymape.storage.files import written_elsewhere

__all__ = ["LedgerVerify"]

FOREIGN = (AttributeError, IndexError, KeyError, TypeError)  # what a changed value of another type leads to
_PAGE = 1000  # records read at a time, so that a writer is not kept waiting
_SETTLE_SECONDS = 1.0  # what lies around for longer is not just being written


class LedgerVerify(LedgerFinish):
    """The part of `Ledger` that looks for what is wrong with it."""

    def verify(self, receipts: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Check everything that can be checked without training: database, audit log, records, requests, stages, files.

        Another process may write meanwhile: what it ends between two looks is no problem.

        Args:
            receipts: that were kept elsewhere, to be compared with the ledger's own.

        Returns:
            {"ok": bool, "problems": [sentences that name what is wrong], "checked": {what: how many}, "unfinished":
            [sentences that name what `finish` has still to do, which is no problem]}.

        Raises:
            ValueError: something that is no receipt.
        """
        for receipt in receipts:
            if not is_receipt(receipt):
                raise ValueError(f"receipts must be what delete gave, got {str(receipt)[:80]!r}")
        checks: dict[str, Callable[[], tuple[int, list[str]]]] = {
            "database_pages": self._check_database,
            "audit_rows": self._check_audit,
            "records": self._check_records,
            "requests": self._check_requests,
            "stages": self._check_stages,
            "files": self._check_files,
        }
        if receipts:
            checks["receipts"] = lambda: self._check_receipts(receipts)
        problems: list[str] = []
        checked = {}
        for name, check in checks.items():
            try:
                checked[name], found = check()
            except (ValueError, OSError) as error:
                found = [str(error)]
            except FOREIGN as error:
                found = [f"the {name.replace('_', ' ')} cannot be checked, a value is none of a ledger's: {error}"]
            problems += found
        problems = list(dict.fromkeys(problems))
        unfinished: list[str] = []
        try:
            unfinished = self._left_undone()
        except (ValueError, OSError, *FOREIGN) as error:  # of a damaged database, which is among the problems as a rule
            problems = problems or [f"what is left to finish cannot be read: {error}"]
        return {"ok": not problems, "problems": problems, "checked": checked, "unfinished": unfinished}

    def _left_undone(self) -> list[str]:
        with self.snapshot():
            found = [f"request {receipt['request']!r} is {receipt['state']}" for receipt in self.unfinished()]
            damaged = self._stage_rows(DAMAGED)
        found += [f"stage {row.key.name} was damaged, and is not erased" for row in damaged]
        found += self.missing_exports()
        if self._being_written():
            found += [f"file {str(self.folder / name)!r} is being written" for name in self._orphans()]
        return found

    def _check_database(self) -> tuple[int, list[str]]:
        db = self._db
        lines = [line for (line,) in db.rows("PRAGMA integrity_check(10)") if line != "ok"]
        lines += [f"row {row} of {table} refers to nothing" for table, row, *_ in db.rows("PRAGMA foreign_key_check")]
        return db.value("PRAGMA page_count"), [f"database {str(db.path)!r} is damaged: {line}" for line in lines]

    def _check_audit(self) -> tuple[int, list[str]]:
        return self._db.value("SELECT count(*) FROM audit"), self._audit.check_chain()

    def _check_records(self) -> tuple[int, list[str]]:
        """Live records hold what was added, erased ones nothing."""
        count, last, problems = 0, 0, []
        while rows := self._db.rows(
            "SELECT record, r.name, digest, content, subject, q.request, q.erased FROM records r "
            "LEFT JOIN contents USING (record) LEFT JOIN tombstones USING (record) "
            "LEFT JOIN requests q USING (request) WHERE record > ? ORDER BY record LIMIT ?",
            (last, _PAGE),
        ):
            for _, name, digest, content, subject, request, erased in rows:
                if content is None or (request is None and row_digest(content) != digest.hex()):
                    problems.append(f"record {name.hex()} has another content than the one that was added")
                elif erased and (any(content) or any(digest)):
                    problems.append(f"record {name.hex()} is erased, and its content is there")
                elif erased and subject and any(subject):
                    problems.append(f"record {name.hex()} is erased, and its subject is there")
            count, last = count + len(rows), rows[-1][0]
        return count, problems

    def _check_requests(self) -> tuple[int, list[str]]:
        """Requests are what the audit log says, with the same records, in the same state."""
        problems = []
        with self.snapshot():
            logged: dict[str, dict[str, Any]] = {}
            reached: dict[str, set[str]] = {}
            for entry in self.audit_log():
                detail = json.loads(entry.detail)
                if entry.event == "records deleted":
                    logged[detail.get("request")] = detail
                elif entry.event.startswith("requests "):
                    for name in detail.get("requests", []):
                        reached.setdefault(name, set()).add(entry.event.removeprefix("requests "))
            stored = {name: rest for name, *rest in self._db.rows(
                "SELECT name, request, receipt, switched, erased, verified FROM requests"
            )}  # fmt: skip
            tombstones: dict[int, list[str]] = {}
            for request, name in self._db.rows("SELECT request, name FROM tombstones JOIN records USING (record)"):
                tombstones.setdefault(request, []).append(name.hex())
        for name in logged.keys() - stored.keys():
            problems.append(f"request {name!r} is in the audit log, and nowhere else")
        for name, (request, receipt, *times) in stored.items():
            detail = logged.get(name, {})
            states = {state for state, at in zip(("switched", "erased", "verified"), times) if at}
            if detail.get("receipt") != hashlib.sha256(receipt.encode()).hexdigest():
                problems.append(f"request {name!r} has another receipt than the audit log says")
            if detail.get("names") != names_digest(tombstones.get(request, [])):
                problems.append(f"request {name!r} has other records than the audit log says")
            if states != reached.get(name, set()):
                problems.append(f"request {name!r} is in another state than the audit log says")
        return len(stored), problems

    def _check_receipts(self, receipts: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
        """Receipts from elsewhere agree with the ledger, which nobody has set back to an older state then."""
        with self.snapshot():
            own = {receipt["request"]: receipt for receipt in self.requests()}
        found = (_contradiction(receipt, own.get(receipt["request"])) for receipt in receipts)
        return len(receipts), [problem for problem in found if problem]

    def _check_stages(self) -> tuple[int, list[str]]:
        """Every live stage has an intact file, made from live records, and a live parent; the deepest is served.

        Of erased stages the ledger does not say what they were made from.
        """
        self._forget_digests()  # what is compared is what the database holds now
        problems, rows = [], self.stages()
        logged = self._log_of_stages()
        for row in rows:
            problem = None
            if row.state == "trained":
                try:
                    content, provenance = self.read_stage(row), self.provenance(row)
                    unpack_stage(content, row.sha256, provenance, name=f"stage {row.key.name}")
                    difference = self._difference(row, provenance)
                    problem = (
                        difference and f"stage {row.key.name} was not made from what the ledger holds, got {difference}"
                    )
                except (ValueError, OSError) as error:
                    problem = str(error)
            problem = problem or _logged_problem(row, *logged)
            chain = self.chain(row.key)
            if not chain:
                problem = f"stage {row.key.name} must have live parents, got none"
            if problem and self._state(row) == row.state:  # no request has ended it meanwhile
                problems.append(problem)
        for row in self._stage_rows("s.state = 'erased' AND f.provenance != zeroblob(length(f.provenance))"):
            problems.append(f"stage {row.key.name} is erased, and what it was made from is there")
        with self.snapshot():
            waiting = self._db.value("SELECT count(*) FROM requests WHERE switched IS NULL")
            for shard, chain in enumerate(self.serving()):
                best = deepest(self.sequences[shard], self._trained(shard))[1]
                if len(chain) != best and not waiting:
                    problems.append(f"shard {shard} must serve depth {best}, got {len(chain)}")
        return len(rows), problems

    def _log_of_stages(self) -> tuple[dict[str, str], set[str]]:
        """sha256 of every stage that landed, and names of those that ended, as the audit log and its receipts say.

        Stages and files could be changed together, so that they agree with each other.
        """
        landed: dict[str, str] = {}
        ended: set[str] = set()
        vouched: set[str] = set()
        with self.snapshot():
            for entry in self.audit_log():
                detail = json.loads(entry.detail)
                if entry.event == "stage landed":
                    landed[detail.get("stage")] = detail.get("sha256")
                elif entry.event == "repair planned":
                    ended.update(detail.get("damaged", []), detail.get("ended", []))
                elif entry.event == "records deleted":
                    vouched.add(detail.get("receipt"))
            receipts = [receipt for (receipt,) in self._db.rows("SELECT receipt FROM requests")]
        for receipt in receipts:
            if hashlib.sha256(receipt.encode()).hexdigest() in vouched:
                for shard in json.loads(receipt)["shards"]:
                    ended.update(shard["stages"], shard["cancelled"])
        return landed, ended

    def _check_files(self) -> tuple[int, list[str]]:
        """No file is left over, no stage of a met request has one, and no erased record has cached states."""
        erased = [
            name.hex()
            for (name,) in self._db.rows(
                "SELECT r.name FROM records r JOIN tombstones USING (record) JOIN requests USING (request) "
                "WHERE erased NOTNULL"
            )
        ]
        found, cached = self._orphans(), self._cached(erased)
        if found or cached:
            time.sleep(_SETTLE_SECONDS)
            found = [name for name in self._orphans() if name in found]
            cached = self._cached(cached)
            if self._being_written():
                found = []
        count = sum(row.state == "trained" for row in self.stages())
        problems = [f"file {str(self.folder / name)!r} belongs to nothing" for name in found]
        problems += [f"file {name!r} of a revoked export is there again: finish erases it" for name in self._returned()]
        return count, problems + [f"record {name} is erased, and its states are cached" for name in cached]

    def _being_written(self) -> bool:
        """Whether another process may be writing files of stages."""
        return not self._db.write and written_elsewhere(self.folder / LOCK)

    def _orphans(self) -> list[str]:
        """Files that nothing refers to, relative to the folder."""
        with self._db.lock:
            landing = ", ".join(map(str, self._landing)) or "NULL"
            rows = self._stage_rows(f"s.state IN ('trained', 'tombstoned') OR s.stage IN ({landing})")
            kept = {self.path(row.key).name for row in rows}
            stages = {entry.name for entry in (self.folder / STAGES).iterdir() if entry.is_file()}
        found = sorted(f"{STAGES}/{name}" for name in stages - kept)
        return found + sorted(entry.name for entry in self.folder.iterdir() if TEMPORARY.fullmatch(entry.name))


def _contradiction(receipt: Mapping[str, Any], own: Mapping[str, Any] | None) -> str | None:
    """How the ledger contradicts a receipt; what happened to a request after the receipt was given does not."""
    name = f"request {receipt['request']!r}"
    why = "the folder is an older copy put back or another system's, or the receipt was changed"
    if own is None:
        return f"{name} has a receipt, and the ledger does not know it: {why}"
    for state in STATES:
        if receipt.get(state) and receipt[state] != own.get(state):
            return f"{name} was {state} at {receipt[state]} by its receipt, the ledger has {own.get(state)}: {why}"
    for field in own.keys() - {*STATES, "state", "revoked"}:
        if receipt.get(field) != own[field]:
            return f"{name} has another {field} in its receipt than in the ledger: {why}"
    return None


def _logged_problem(row: StageRow, landed: Mapping[str, str], ended: Container[str]) -> str | None:
    """How a live stage differs from what the audit log says."""
    if row.key.name in ended:
        return f"stage {row.key.name} is live, and the audit log says that it has ended"
    if row.state == "trained" and landed.get(row.key.name) != row.sha256:
        return f"stage {row.key.name} is not the one that landed, as the audit log says"
    return None
