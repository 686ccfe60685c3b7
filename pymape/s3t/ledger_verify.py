"""Checking a ledger without training: everything that is wrong, by name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pymape.s3t.ledger_requests import STATES, names_digest
from pymape.s3t.ledger_stages import StageRow, deepest
from pymape.s3t.stages import row_digest, unpack_stage

if TYPE_CHECKING:
    from pymape.s3t.ledger import Ledger

__all__ = ["verify"]

_PAGE = 1000  # records read at a time, so that a writer is not kept waiting
_SETTLE_SECONDS = 1.0  # what lies around for longer is not just being written


def verify(ledger: Ledger, receipts: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Check database, audit log, records, requests, stages and files.

    Another process may write meanwhile: what it ends between two looks is no problem.

    Args:
        ledger: open in either mode.
        receipts: that were kept elsewhere, to be compared with the ledger's own.

    Raises:
        ValueError: something that is no receipt.

    Returns:
        {"ok": bool, "problems": [sentences that name what is wrong], "checked": {what: how many}, "unfinished":
        [sentences that name what `Ledger.finish` has still to do, which is no problem]}.
    """
    for receipt in receipts:
        if not isinstance(receipt, Mapping) or not {"request", "audit"} <= receipt.keys():
            raise ValueError(f"receipts must be what delete gave, got {str(receipt)[:80]!r}")
    checks: dict[str, Callable[[Ledger], tuple[int, list[str]]]] = {
        "database_pages": _database,
        "audit_rows": _audit,
        "records": _records,
        "requests": _requests,
        "stages": _stages,
        "files": _files,
    }
    if receipts:
        checks["receipts"] = lambda ledger: _kept(ledger, receipts)
    problems: list[str] = []
    checked = {}
    for name, check in checks.items():
        try:
            checked[name], found = check(ledger)
        except (ValueError, OSError) as error:
            found = [str(error)]
        problems += found
    problems = list(dict.fromkeys(problems))
    unfinished: list[str] = []
    with contextlib.suppress(ValueError, OSError):  # of a damaged database, which is among the problems
        unfinished = _unfinished(ledger)
    return {"ok": not problems, "problems": problems, "checked": checked, "unfinished": unfinished}


def _unfinished(ledger: Ledger) -> list[str]:
    with ledger.snapshot():
        found = [f"request {receipt['request']!r} is {receipt['state']}" for receipt in ledger.unfinished()]
        damaged = ledger._stage_rows("s.state = 'tombstoned' AND s.request IS NULL")
    return found + [f"stage {row.key.name} was damaged, and is not erased" for row in damaged]


def _database(ledger: Ledger) -> tuple[int, list[str]]:
    db = ledger._db
    lines = [line for (line,) in db.rows("PRAGMA integrity_check(10)") if line != "ok"]
    lines += [f"row {row} of {table} refers to nothing" for table, row, *_ in db.rows("PRAGMA foreign_key_check")]
    return db.value("PRAGMA page_count"), [f"database {str(db.path)!r} is damaged: {line}" for line in lines]


def _audit(ledger: Ledger) -> tuple[int, list[str]]:
    return ledger._db.value("SELECT count(*) FROM audit"), ledger._audit.check_chain()


def _records(ledger: Ledger) -> tuple[int, list[str]]:
    """Live records hold what was added, erased ones nothing."""
    count, last, problems = 0, 0, []
    while rows := ledger._db.rows(
        "SELECT record, r.name, digest, content, subject, q.request, q.erased FROM records r "
        "LEFT JOIN contents USING (record) LEFT JOIN tombstones USING (record) LEFT JOIN requests q USING (request) "
        "WHERE record > ? ORDER BY record LIMIT ?",
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


def _requests(ledger: Ledger) -> tuple[int, list[str]]:
    """Requests are what the audit log says, with the same records, in the same state."""
    problems = []
    with ledger.snapshot():
        logged: dict[str, dict[str, Any]] = {}
        reached: dict[str, set[str]] = {}
        for entry in ledger.audit_log():
            detail = json.loads(entry.detail)
            if entry.event == "records deleted":
                logged[detail.get("request")] = detail
            elif entry.event.startswith("requests "):
                for name in detail.get("requests", []):
                    reached.setdefault(name, set()).add(entry.event.removeprefix("requests "))
        stored = {name: rest for name, *rest in ledger._db.rows(
            "SELECT name, request, receipt, switched, erased, verified FROM requests"
        )}  # fmt: skip
        tombstones: dict[int, list[str]] = {}
        for request, name in ledger._db.rows("SELECT request, name FROM tombstones JOIN records USING (record)"):
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


def _kept(ledger: Ledger, receipts: Sequence[Mapping[str, Any]]) -> tuple[int, list[str]]:
    """Receipts from elsewhere agree with the ledger, which nobody has set back to an older state then."""
    with ledger.snapshot():
        own = {receipt["request"]: receipt for receipt in ledger.requests()}
    found = (_contradiction(receipt, own.get(receipt["request"])) for receipt in receipts)
    return len(receipts), [problem for problem in found if problem]


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


def _stages(ledger: Ledger) -> tuple[int, list[str]]:
    """Every live stage has an intact file, made from live records, and a live parent; what is served is the deepest.

    Of erased stages the ledger does not say what they were made from.
    """
    ledger._forget_digests()  # what is compared is what the database holds now
    problems, rows = [], ledger.stages()
    logged = _log_of_stages(ledger)
    for row in rows:
        problem = None
        if row.state == "trained":
            try:
                content, provenance = ledger.read_stage(row), ledger.provenance(row)
                unpack_stage(content, row.sha256, provenance, name=f"stage {row.key.name}")
                difference = ledger._difference(row, provenance)
                problem = (
                    difference and f"stage {row.key.name} was not made from what the ledger holds, got {difference}"
                )
            except (ValueError, OSError) as error:
                problem = str(error)
        problem = problem or _logged_problem(row, *logged)
        chain = ledger.chain(row.key)
        if not chain:
            problem = f"stage {row.key.name} must have live parents, got none"
        if problem and ledger._state(row) == row.state:  # no request has ended it meanwhile
            problems.append(problem)
    for row in ledger._stage_rows("s.state = 'erased' AND f.provenance != zeroblob(length(f.provenance))"):
        problems.append(f"stage {row.key.name} is erased, and what it was made from is there")
    with ledger.snapshot():
        waiting = ledger._db.value("SELECT count(*) FROM requests WHERE switched IS NULL")
        for shard, chain in enumerate(ledger.serving()):
            best = deepest(ledger.sequences[shard], ledger._trained(shard))[1]
            if len(chain) != best and not waiting:
                problems.append(f"shard {shard} must serve depth {best}, got {len(chain)}")
    return len(rows), problems


def _log_of_stages(ledger: Ledger) -> tuple[dict[str, str], set[str]]:
    """sha256 of every stage that landed, and names of those that ended, as the audit log and its receipts say.

    Stages and files could be changed together, so that they agree with each other.
    """
    landed: dict[str, str] = {}
    ended: set[str] = set()
    vouched: set[str] = set()
    with ledger.snapshot():
        for entry in ledger.audit_log():
            detail = json.loads(entry.detail)
            if entry.event == "stage landed":
                landed[detail.get("stage")] = detail.get("sha256")
            elif entry.event == "repair planned":
                ended.update(detail.get("damaged", []), detail.get("ended", []))
            elif entry.event == "records deleted":
                vouched.add(detail.get("receipt"))
        receipts = [receipt for (receipt,) in ledger._db.rows("SELECT receipt FROM requests")]
    for receipt in receipts:
        if hashlib.sha256(receipt.encode()).hexdigest() in vouched:
            for shard in json.loads(receipt)["shards"]:
                ended.update(shard["stages"], shard["cancelled"])
    return landed, ended


def _logged_problem(row: StageRow, landed: Mapping[str, str], ended: Container[str]) -> str | None:
    """How a live stage differs from what the audit log says."""
    if row.key.name in ended:
        return f"stage {row.key.name} is live, and the audit log says that it has ended"
    if row.state == "trained" and landed.get(row.key.name) != row.sha256:
        return f"stage {row.key.name} is not the one that landed, as the audit log says"
    return None


def _files(ledger: Ledger) -> tuple[int, list[str]]:
    """No file is left over, no stage of a met request has one, and no erased record has cached states."""
    erased = [
        name.hex()
        for (name,) in ledger._db.rows(
            "SELECT r.name FROM records r JOIN tombstones USING (record) JOIN requests USING (request) "
            "WHERE erased NOTNULL"
        )
    ]
    found, cached = ledger._orphans(), ledger._cached(erased)
    if found or cached:
        time.sleep(_SETTLE_SECONDS)
        found = [name for name in ledger._orphans() if name in found]
        cached = ledger._cached(cached)
    count = sum(row.state == "trained" for row in ledger.stages())
    problems = [f"file {str(ledger.folder / name)!r} belongs to nothing" for name in found]
    return count, problems + [f"record {name} is erased, and its states are cached" for name in cached]
