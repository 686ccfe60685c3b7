"""What accepted requests ask of a ledger still: switch, erase, verify, each state durable before the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pymape.s3t.erasure import erase_files, try_each
from pymape.s3t.ledger.database import now
from pymape.s3t.ledger.requests import LedgerRequests
from pymape.s3t.ledger.stages import DAMAGED, StageRow

__all__ = ["LedgerFinish"]


class LedgerFinish(LedgerRequests):
    """The part of `Ledger` that takes requests to their end."""

    def _start_finish(self) -> None:
        self._finishing = threading.Lock()

    def finish(self, *, check: bool = True) -> dict[str | None, Exception]:
        """Take every accepted request to "verified", each state durable before the next.

        Switched: every affected shard serves its deepest live chain. Erased: the files of tombstoned stages, the cached
        states and contents of the records and the revoked exports are overwritten and deleted, in the database too.
        Verified: what the affected shards still hold was made from the records that are left. All requests go together.
        Other threads may use the ledger meanwhile; requests that they make then are left to the next call.

        Args:
            check: raise the first problem. False returns all of them.

        Returns:
            What keeps each request from its end, by name; under None what keeps a damaged stage from being erased.

        Raises:
            ValueError: naming a stage that was not made from what is left, or another process has been reading the
                database all the time.
            OSError: a file cannot be erased. Only the request that it belongs to waits. Calling again continues.
        """
        problems = self._finish()
        if check:
            for problem in problems.values():
                raise problem
        rows = self._db.rows_in("SELECT request, name FROM requests WHERE request IN ({})", [*problems])
        names = {None: None, **dict(rows)}
        return {names[request]: problem for request, problem in problems.items()}

    def _finish(self) -> dict[int | None, Exception]:
        """Do what is left to do; what keeps each request from its end, and under None what `repair` has ended."""
        with self._finishing:
            self._db.require_in_place()  # files are erased by their paths
            last = self._db.value("SELECT max(request) FROM requests") or 0
            problems: dict[int | None, Exception] = {}
            steps: Sequence[tuple[str, Callable[[Sequence[int]], Mapping[Any, Exception]]]] = (
                ("switched IS NULL", self._switch),
                ("switched NOTNULL AND erased IS NULL", self._erase),
                ("erased NOTNULL", self._verify_requests),
            )
            for condition, step in steps:
                requests = self._waiting(condition, last)
                try:
                    problems |= step(requests)
                except (OSError, ValueError) as error:  # of a commit, such as a full disk: nothing of it has happened
                    owners: list[int | None] = [*requests] if requests else [None]
                    problems |= dict.fromkeys(owners, error)
            self._revoke_late()
            self.move_anchor()
            return problems

    def _waiting(self, condition: str, last: int) -> list[int]:
        rows = self._db.rows(
            f"SELECT request FROM requests WHERE verified IS NULL AND {condition} AND request <= ?", (last,)
        )
        return sorted(request for (request,) in rows)

    def _switch(self, requests: Sequence[int]) -> dict[int, Exception]:
        if requests:
            with self._db.transaction("switch"):
                depths = self._serve_deepest(self._shards_of(requests))
                self._advance(requests, "switched", depths=depths)
        return {}

    def _erase(self, requests: Sequence[int]) -> dict[int | None, Exception]:
        """Erase what requests have ended, and damaged stages; the first error of each request, which is tried again.

        Under None is an error of the damaged stages.
        """
        places = list(
            self._db.rows_in(
                "SELECT record, name, request FROM records JOIN tombstones USING (record) WHERE request IN ({})",
                requests,
            )
        )
        stages: dict[StageRow, int | None] = dict.fromkeys(self._stage_rows(DAMAGED))
        # Those that an interrupted attempt has erased already are looked for again: it may not have reached the disk.
        stages |= self._stages_of(requests, "tombstoned", "erased")
        if not requests and not stages:
            return {}
        self._await_landings()
        by_path = {self.path(row.key): request for row, request in stages.items()}
        by_name = {name.hex(): request for _, name, request in places}
        left = try_each(erase_files, [*by_path])
        failed: dict[int | None, Exception] = {}
        for owner, error in [
            *((by_path[path], error) for path, error in left.items()),
            *((by_name[name], error) for name, error in try_each(self._erase_cached, [*by_name]).items()),
            *self._revoke(requests).items(),
        ]:
            failed.setdefault(owner, error)
        records = [(record,) for record, *_ in places]
        gone = {row: request for row, request in stages.items() if self.path(row.key) not in left}
        ended = [(row.stage,) for row in gone]
        repaired = [row.key.name for row, request in gone.items() if request is None]
        with self._db.transaction("erase"):
            for statement, rows in (
                ("UPDATE contents SET content = zeroblob(length(content)) WHERE record = ?", records),
                ("UPDATE records SET digest = zeroblob(32) WHERE record = ?", records),
                ("UPDATE records SET subject = zeroblob(32) WHERE record = ? AND subject NOTNULL", records),
                ("UPDATE files SET provenance = zeroblob(length(provenance)) WHERE stage = ?", ended),
                ("UPDATE stages SET state = 'erased' WHERE stage = ?", ended),
            ):
                self._db.run_all(statement, rows)
            if repaired:  # the others are in the rows of their requests
                self._audit.append("stages erased", stages=repaired)
        try:
            self._db.erase_log()
        except ValueError as error:  # the log holds pages of all of them
            waiting: Sequence[int | None] = requests or [None]
            for owner in waiting:
                failed.setdefault(owner, error)
            return failed
        done = {request for request in requests if request not in failed}
        if done:
            with self._db.transaction("erased"):
                self._advance(
                    sorted(done),
                    "erased",
                    records=sum(request in done for *_, request in places),
                    stages=sum(request in done for request in stages.values()),
                    exports=self._outcomes(sorted(done)),
                )
        return failed

    def _await_landings(self) -> None:
        """Wait until no file of a stage that has ended is being written, nor an export that holds one."""

        def written() -> bool:
            landing = self._db.rows_in("SELECT state FROM stages WHERE stage IN ({})", list(self._landing))
            exports = self._db.rows_in("SELECT request FROM exports WHERE export IN ({})", list(self._exporting))
            return all(state in ("planned", "trained") for (state,) in landing) and all(by is None for (by,) in exports)

        with self._landed:
            self._landed.wait_for(written)

    def _verify_requests(self, requests: Sequence[int]) -> dict[int, Exception]:
        """Verify requests; the first problem of each that stays erased."""
        if not requests:
            return {}
        late = self._cached_again(requests)
        with self._db.transaction("verify"):
            found = [
                (request, problem)
                for shard in self._shards_of(requests)
                for problem in self._provenance_problems(shard)[:1]
                for request in self._requests_of(shard)
            ]
            found += self._traces(requests) + late
            problems: dict[int, Exception] = {request: ValueError(problem) for request, problem in reversed(found)}
            done = [request for request in requests if request not in problems]
            if done:
                self._advance(done, "verified")
        return {request: problems[request] for request in requests if request in problems}

    def _traces(self, requests: Sequence[int]) -> list[tuple[int, str]]:
        """What is left of the records of erased requests, each with its request."""
        found = []
        for row, request in self._stages_of(requests, "tombstoned", "erased").items():
            if row.state != "erased" or self.path(row.key).exists():
                problem = f"stage {row.key.name} must be erased, got one that is {row.state} or has a file"
                found.append((request, problem))
        for request, stage in self._db.rows_in(
            "SELECT request, stage FROM stages JOIN files USING (stage) "
            "WHERE provenance != zeroblob(length(provenance)) AND request IN ({})",
            requests,
        ):
            [row] = self._stage_rows("s.stage = ?", (stage,))
            found.append((request, f"stage {row.key.name} must be erased, got one with a provenance"))
        for request, name in self._db.rows_in(
            "SELECT request, name FROM tombstones JOIN records USING (record) JOIN contents USING (record) "
            "WHERE request IN ({}) AND (content != zeroblob(length(content)) OR digest != zeroblob(32) "
            "OR subject != zeroblob(32))",
            requests,
        ):
            found.append((request, f"record {name.hex()} must be erased, got one with a content or a subject"))
        return found

    def _cached_again(self, requests: Sequence[int]) -> list[tuple[int, str]]:
        """Records that are cached even after what a worker has cached late was erased, each with its request."""
        by = {
            name.hex(): request
            for request, name in self._db.rows_in(
                "SELECT request, name FROM tombstones JOIN records USING (record) WHERE request IN ({})", requests
            )
        }
        late = self._cached([*by])
        try_each(self._erase_cached, late)
        return [(by[name], f"record {name} must be erased, got one with cached states") for name in self._cached(late)]

    def _advance(self, requests: Sequence[int], state: str, **detail: Any) -> None:
        """Note a state of requests inside a transaction."""
        time = now()
        self._db.run_all(
            f"UPDATE requests SET {state} = ? WHERE request = ?", [(time, request) for request in requests]
        )
        names = [name for (name,) in self._db.rows_in("SELECT name FROM requests WHERE request IN ({})", requests)]
        self._audit.append(f"requests {state}", requests=names, **detail)

    def _shards_of(self, requests: Sequence[int]) -> list[int]:
        rows = self._db.rows_in(
            "SELECT DISTINCT shard FROM tombstones JOIN records USING (record) WHERE request IN ({})", requests
        )
        return sorted({shard for (shard,) in rows})

    def _requests_of(self, shard: int) -> list[int]:
        """Requests, not verified yet, that have deleted records of a shard."""
        rows = self._db.rows(
            "SELECT DISTINCT request FROM requests JOIN tombstones USING (request) JOIN records USING (record) "
            "WHERE verified IS NULL AND shard = ?",
            (shard,),
        )
        return [request for (request,) in rows]
