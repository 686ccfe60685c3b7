"""The stages of a ledger: planned along the sequences, landed when trained, served while nothing in them is deleted."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pymape.prefix_cache import PrefixCache
from pymape.s3t import faults
from pymape.s3t.erasure import erase_files
from pymape.s3t.ledger.folder import CACHE, STAGES
from pymape.s3t.ledger.records import LedgerRecords
from pymape.s3t.stages import Provenance, StageKey, row_digest, unpack_stage
from pymape.storage.files import atomic_write

__all__ = ["DAMAGED", "LedgerStages", "StageRow", "deepest"]

SUFFIX = ".safetensors"
_COLUMNS = (
    "SELECT s.stage, s.shard, s.prefix, s.generation, s.state, s.parent, f.sha256, f.size "
    "FROM stages s LEFT JOIN files f ON f.stage = s.stage "
)
_LIVE = "s.state IN ('planned', 'trained')"
DAMAGED = "s.state = 'tombstoned' AND s.request IS NULL"  # that `repair` has ended, and whose files are there still
_KEY = "s.shard = ? AND s.prefix = ? AND s.generation = ?"


@dataclass(frozen=True)
class StageRow:
    """A stage in the ledger.

    Args:
        stage: its row.
        key: which stage.
        state: "planned", "trained", "cancelled" (deleted from before it was trained), "tombstoned" (its file is to be
            erased) or "erased". The first two are live; there is one live stage of a prefix, and its parent is live.
        parent: row of the stage before it in the chain; None for a root.
        sha256: of its file, once there is one.
        size: bytes of the file.
    """

    stage: int
    key: StageKey
    state: str
    parent: int | None
    sha256: str | None
    size: int


class LedgerStages(LedgerRecords):
    """The part of `Ledger` that holds stages."""

    folder: Path
    base: str

    def _start_stages(self) -> None:
        self._landing: set[int] = set()  # stages whose files are being written
        self._exporting: set[int] = set()  # exports that are being written
        self._placing: set[int] = set()  # exports that are being moved to where they belong
        self._landed = threading.Condition(self._db.lock)  # notified when one of either is done
        self._cache = PrefixCache(self.folder / CACHE)

    def plan(self) -> int:
        """Plan the stages of all sequences that were never planned; a common prefix is one stage.

        Returns:
            Number of stages planned.
        """
        with self._change("plan"):
            known = {(shard, _prefix(prefix)) for shard, prefix in self._db.rows("SELECT shard, prefix FROM stages")}
            planned = self._plan([place for place in self._plannable() if place not in known], {})
            if planned:
                self._audit.append("stages planned", stages=planned)
        return planned

    def stages(self, shard: int | None = None) -> list[StageRow]:
        """All live stages, or those of a shard, parents first."""
        where, values = ("", []) if shard is None else ("AND s.shard = ?", [shard])
        return self._stage_rows(f"{_LIVE} {where}", values)

    def stage_counts(self) -> dict[str, int]:
        """Number of stages in every state that occurs."""
        return dict(self._db.rows("SELECT state, count(*) FROM stages GROUP BY state ORDER BY min(stage)"))

    def untrained(self) -> list[int]:
        """Shards with stages that are planned, and those of which none was ever planned."""
        planned = "SELECT 1 FROM stages s WHERE s.shard = h.shard"
        rows = self._db.rows(
            f"SELECT shard FROM shards h WHERE NOT EXISTS ({planned}) OR EXISTS ({planned} AND s.state = 'planned')"
        )
        return sorted(shard for (shard,) in rows)

    def switched_off(self) -> int:
        """Number of stages that requests have ended and that `repair` would plan anew."""
        live = {(row.key.shard, row.key.prefix) for row in self.stages()}
        known = {(shard, _prefix(prefix)) for shard, prefix in self._db.rows("SELECT shard, prefix FROM stages")}
        return sum(place in known and place not in live for place in self._plannable())

    def generation(self, shard: int) -> int:
        """How often a shard has been repaired."""
        return int(self._db.value("SELECT generation FROM shards WHERE shard = ?", (shard,)))

    def runnable(self) -> list[StageRow]:
        """Planned stages whose parent is trained."""
        return self._stage_rows(
            "s.state = 'planned' AND (s.parent IS NULL OR EXISTS "
            "(SELECT 1 FROM stages p WHERE p.stage = s.parent AND p.state = 'trained'))"
        )

    def chain(self, key: StageKey) -> list[StageRow]:
        """A stage and those before it, root first; empty where one of them is not live any more."""
        with self._db.snapshot():
            rows: list[StageRow] = []
            where: str
            values: Sequence[object]
            where, values = _KEY, _columns(key)
            while found := self._stage_rows(f"{_LIVE} AND {where}", values):
                rows.insert(0, found[0])
                where, values = "s.stage = ?", (found[0].parent,)
            return rows if rows and rows[0].parent is None else []

    def path(self, key: StageKey) -> Path:
        """Where the file of a stage is."""
        return self.folder / STAGES / (key.name + SUFFIX)

    def provenance(self, row: StageRow) -> Provenance:
        """What a live stage was made from.

        Raises:
            ValueError: naming the stage: the ledger does not say.
        """
        content = self._db.value("SELECT provenance FROM files WHERE stage = ?", (row.stage,))
        try:
            return Provenance.from_json(bytes(content or b"").decode())
        except (TypeError, ValueError) as error:
            raise ValueError(f"stage {row.key.name} must have a provenance in the ledger: {error}") from error

    def read_stage(self, row: StageRow) -> bytes:
        """The file of a trained stage.

        Raises:
            ValueError: naming the file: it is missing or not what landed, or a request has tombstoned the stage.
            OSError: it cannot be read now, which says nothing about what it holds.
        """
        path = self.path(row.key)
        content, failure = b"", None
        try:
            content = path.read_bytes()
            reason = f"got one with sha256 {row_digest(content)[:12]}, not {str(row.sha256)[:12]}"
        except FileNotFoundError as error:
            reason = f"{error.strerror}"
        except OSError as error:
            failure = error
        # After the reading: a file that was overwritten meanwhile belongs to a stage that was tombstoned before.
        state = self._state(row)
        if state != "trained":
            raise ValueError(f"stage {row.key.name} must be trained and live, got one that is {state}")
        if failure is not None:
            raise failure
        if row_digest(content) != row.sha256:
            raise ValueError(f"stage {row.key.name} must have an intact file {str(path)!r}: {reason}")
        return content

    def land(self, key: StageKey, content: bytes) -> bool:
        """Take a trained stage: when this returns its file and its row are durable.

        Args:
            key: which stage.
            content: its file, from `stages.pack_stage`.

        Returns:
            False where the stage is trained already or a request tombstoned it meanwhile: nothing of it is kept then.

        Raises:
            ValueError: the file is damaged or was made from other records, another base or another parent.
            OSError: it cannot be written. The stage is planned still.
        """
        _, provenance = unpack_stage(content, name=f"stage {key.name}")
        with self._db.lock:
            found = self._stage_rows(_KEY, _columns(key))
            if not found:
                raise ValueError(f"stage must be a planned one, got {key.name}")
            row = found[0]
            if row.state != "planned" or row.stage in self._landing:
                self.erase_late(key)
                return False
            self._require_made(row, provenance)
            self._db.require_in_place()
            self._landing.add(row.stage)
        path = self.path(key)
        try:
            try:
                with atomic_write(path) as temporary:
                    temporary.write_bytes(content)
            except OSError as error:  # a full disk has no file name of its own
                raise OSError(error.errno, error.strerror, str(path)) from error
            faults.checkpoint("land: file written")
            with self._change("land"):
                landed = self._commit_landing(row, content, provenance)
            if not landed:
                self.erase_late(key)
            return landed
        finally:
            self._end_landing(row)

    def erase_late(self, key: StageKey) -> None:
        """Remove what a worker has cached of deleted records after they were erased, now that it is done with a stage.

        Raises:
            OSError: a file cannot be erased. The next opening tries again.
        """
        rows = self._db.rows_in(
            f"SELECT name FROM records JOIN tombstones USING (record) WHERE shard = {key.shard} AND slice IN ({{}})",
            key.prefix,
        )
        self._erase_cached([name.hex() for (name,) in rows])

    def serving(self) -> list[list[StageRow]]:
        """The chain that every shard serves, root first; an empty one is a dead shard.

        It is what was switched to last, cut before the first stage that a request has tombstoned since.
        """
        with self._db.snapshot():
            served = self._db.rows("SELECT shard, sequence, depth FROM shards ORDER BY shard")
            trained = {(row.key.shard, row.key.prefix): row for row in self.stages() if row.state == "trained"}
        chains = []
        for shard, number, depth in served:
            sequence = self.sequences[shard][number]
            chain: list[StageRow] = []
            while len(chain) < depth and (shard, sequence[: len(chain) + 1]) in trained:
                chain.append(trained[shard, sequence[: len(chain) + 1]])
            chains.append(chain)
        return chains

    def served_records(self, chains: Sequence[Sequence[StageRow]]) -> dict[int, int]:
        """Number of records that the served stages of each live shard were trained on.

        Args:
            chains: from `serving`, read in the same `snapshot`.
        """
        counts = self.counts()
        return {
            shard: sum(counts[shard][part] for part in chain[-1].key.prefix)
            for shard, chain in enumerate(chains)
            if chain
        }

    def live_prefixes(self) -> list[list[tuple[int, ...]]]:
        """For every shard and sequence the slices of its trained stages, from the first one on."""
        return [
            [sequence[: deepest([sequence], trained)[1]] for sequence in sequences]
            for sequences, trained in zip(self.sequences, map(self._trained, range(len(self.sequences))))
        ]

    def _state(self, row: StageRow) -> str:
        """The state of a stage by now."""
        return str(self._db.value("SELECT state FROM stages WHERE stage = ?", (row.stage,)))

    def _commit_landing(self, row: StageRow, content: bytes, provenance: Provenance) -> bool:
        if not self._db.run("UPDATE stages SET state = 'trained' WHERE stage = ? AND state = 'planned'", (row.stage,)):
            return False
        self._require_made(row, provenance)  # records may have been added since
        digest = row_digest(content)
        self._db.run(
            "INSERT INTO files (stage, sha256, size, provenance) VALUES (?, ?, ?, ?)",
            (row.stage, bytes.fromhex(digest), len(content), provenance.to_json().encode()),
        )
        self._serve_deepest([row.key.shard])
        self._audit.append("stage landed", stage=row.key.name, sha256=digest)
        return True

    def _end_landing(self, row: StageRow) -> None:
        """Leave no file where nothing was committed, whatever the reason."""
        with self._db.lock:
            try:
                path = self.path(row.key)
                if self._state(row) != "trained" and not self._db.replaced() and path.exists():
                    erase_files([path])
            finally:
                self._landing.discard(row.stage)
                self._landed.notify_all()

    def _serve_deepest(self, shards: Iterable[int]) -> dict[int, int]:
        """Switch shards to their deepest chains, inside a transaction; the depths."""
        depths = {}
        for shard in shards:
            number, depths[shard] = deepest(self.sequences[shard], self._trained(shard))
            self._db.run("UPDATE shards SET sequence = ?, depth = ? WHERE shard = ?", (number, depths[shard], shard))
        return depths

    def _trained(self, shard: int) -> set[tuple[int, ...]]:
        """Prefixes of a shard's trained stages."""
        return {row.key.prefix for row in self.stages(shard) if row.state == "trained"}

    def _plannable(self) -> list[tuple[int, tuple[int, ...]]]:
        """(shard, prefix) of every stage that the sequences ask for and that has records, parents first."""
        counts = self.counts()
        places = [
            (shard, sequence[:depth])
            for depth in range(1, self.slices + 1)
            for shard, sequences in enumerate(self.sequences)
            for sequence in sequences
            if counts[shard][sequence[0]]
        ]
        return list(dict.fromkeys(places))

    def _plan(self, places: Sequence[tuple[int, tuple[int, ...]]], live: dict[tuple[int, tuple[int, ...]], int]) -> int:
        """Insert planned stages of the shards' present generations inside a transaction; how many.

        Args:
            places: (shard, prefix), parents first.
            live: (shard, prefix) -> row of the live stages; the new ones are added.
        """
        generations = dict(self._db.rows("SELECT shard, generation FROM shards"))
        for shard, prefix in places:
            live[shard, prefix] = self._db.insert(
                "INSERT INTO stages (shard, prefix, generation, parent, state) VALUES (?, ?, ?, ?, 'planned')",
                (shard, ".".join(map(str, prefix)), generations[shard], live.get((shard, prefix[:-1]))),
            )
        return len(places)

    def _difference(self, row: StageRow, provenance: Provenance) -> str | None:
        """How a provenance differs from what the ledger says that the stage is made from."""
        if provenance.key != row.key:
            return f"the stage {provenance.key.name}"
        if provenance.base != self.base:
            return f"base {provenance.base[:12]} instead of {self.base[:12]}"
        parent = self._db.value("SELECT sha256 FROM files WHERE stage = ?", (row.parent,))
        if row.parent is not None and parent is None:
            return "a parent that is not trained"
        if provenance.parent != (parent and parent.hex()):
            return "another parent"
        for part, digest in provenance.records.items():
            if digest != self.slice_digest(row.key.shard, part):
                return f"other records of slice {part}"
        return None

    def _require_made(self, row: StageRow, provenance: Provenance) -> None:
        problem = self._difference(row, provenance)
        if problem:
            raise ValueError(f"stage {row.key.name} must be made from what the ledger holds, got {problem}")

    def _provenance_problems(self, shard: int) -> list[str]:
        """Trained stages that were not made from what the ledger holds now."""
        found = []
        for row in self.stages(shard):
            if row.state == "trained":
                try:
                    problem = self._difference(row, self.provenance(row))
                except ValueError as error:
                    found.append(str(error))
                    continue
                if problem:
                    found.append(f"stage {row.key.name} must be made from what the ledger holds, got {problem}")
        return found

    def _stage_rows(self, where: str, values: Sequence[object] = ()) -> list[StageRow]:
        return [
            StageRow(
                stage, StageKey(shard, _prefix(prefix), generation), state, parent, sha256 and sha256.hex(), size or 0
            )
            for stage, shard, prefix, generation, state, parent, sha256, size in self._db.rows(
                f"{_COLUMNS} WHERE {where} ORDER BY s.stage", values
            )
        ]

    def _stages_of(self, requests: Sequence[int], *states: str) -> dict[StageRow, int]:
        """The stages in some states that requests have ended, each with its request."""
        found = list(self._db.rows_in("SELECT stage, state, request FROM stages WHERE request IN ({})", requests))
        return {
            row: request
            for stage, state, request in found
            if state in states
            for row in self._stage_rows("s.stage = ?", (stage,))
        }

    def _erase_cached(self, names: Sequence[str]) -> int:
        """Remove the cached states of records; the number of files."""
        if not names or not (self.folder / CACHE).is_dir():
            return 0
        erased = self._cache.erase(names)
        faults.checkpoint("erase: cache cleared")
        return erased

    def _cached(self, names: Sequence[str]) -> list[str]:
        """Those of some records that have cached states."""
        return self._cache.holding(names) if names and (self.folder / CACHE).is_dir() else []


def deepest(sequences: Sequence[tuple[int, ...]], live: set[tuple[int, ...]]) -> tuple[int, int]:
    """The sequence with the longest chain of live prefixes, the first one on ties.

    Returns:
        Its number and the length of the chain.
    """
    best = (0, 0)
    for number, sequence in enumerate(sequences):
        depth = 0
        while depth < len(sequence) and sequence[: depth + 1] in live:
            depth += 1
        if depth > best[1]:
            best = (number, depth)
    return best


def _prefix(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def _columns(key: StageKey) -> tuple[int, str, int]:
    return key.shard, ".".join(map(str, key.prefix)), key.generation
