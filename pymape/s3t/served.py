"""What the ledger in a folder serves, read as tensors, and whether that has changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pymape.s3t.ledger import Ledger
from pymape.s3t.stages import StageKey, unpack_stage

__all__ = ["Served", "ServedStages", "read_served", "require_served"]


class Served(NamedTuple):
    """What a ledger serves at one moment.

    Args:
        stages: all that are served.
        chains: live shard -> tensors of its stages, root first.
        sizes: live shard -> number of records that they were trained on.
    """

    stages: list[StageKey]
    chains: dict[int, list[dict[str, Tensor]]]
    sizes: dict[int, int]


def read_served(ledger: Ledger) -> Served:
    """Read what is served; other threads may train and delete meanwhile.

    Raises:
        ValueError: a stage that is damaged or was tombstoned meanwhile.
        OSError: one that cannot be read now.
    """
    with ledger.snapshot():
        serving = ledger.serving()
        sizes = ledger.served_records(serving)
    chains = {
        shard: [unpack_stage(ledger.read_stage(row), row.sha256, name=row.key.name)[0] for row in chain]
        for shard, chain in enumerate(serving)
        if chain
    }
    return Served([row.key for chain in serving for row in chain], chains, sizes)


class ServedStages:
    """What the system in a folder serves, whoever changes it.

    Whether it may have changed costs microseconds: SQLite counts the commits of other connections. This one is of its
    own, so that a commit of the same process is another's too, and it outlives the system that it was opened beside.

    Args:
        folder: of the system.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ledgers: dict[int, Ledger] = {}  # of each process: a connection to SQLite must not pass a fork
        self._seen: tuple[int, int] | None = None
        self._stages: list[StageKey] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return ServedStages, (self._folder,)  # a copy of an ensemble reads for itself

    def changed(self) -> bool:
        """Whether other stages are served than those that were read last."""
        now = self._now()
        if now == self._seen:
            return False
        with self._ledger.snapshot():
            stages = [row.key for chain in self._ledger.serving() for row in chain]
        if stages != self._stages:
            return True
        self._seen = now
        return False

    def read(self) -> Served:
        """Read what is served, of at least one shard.

        Raises:
            ValueError: as `require_served`, but for a stage that was tombstoned meanwhile.
            OSError: a stage that cannot be read now.
        """
        while True:
            self._stages, now = None, self._now()
            try:
                served = require_served(self._ledger)
            except ValueError:
                if self._now() == now:
                    raise
                continue  # a request has ended the stage meanwhile
            self._seen, self._stages = now, served.stages
            return served

    @property
    def _ledger(self) -> Ledger:
        process = os.getpid()
        ledger = self._ledgers.get(process)
        if ledger is not None and ledger.replaced():
            self._seen = None
            self._ledgers.pop(process).close()
            ledger = None
        if ledger is None:
            ledger = self._ledgers[process] = Ledger(self._folder, "read")
        return ledger

    def _now(self) -> tuple[int, int]:
        return os.getpid(), self._ledger.version()


def require_served(ledger: Ledger) -> Served:
    """What is served, of at least one shard.

    Raises:
        ValueError: as `read_served`, or nothing is served.
    """
    served = read_served(ledger)
    if not served.chains:
        if ledger.deleted and not any(map(any, ledger.counts())):
            missing = "every record is deleted"
        elif not (untrained := ledger.untrained()):
            missing = "every shard is dead: repair the system first"
        elif len(untrained) < len(ledger.sequences):
            missing = "every shard is dead or not trained yet: train the system first"
        else:
            missing = "nothing is trained yet: train the system first"
        raise ValueError(f"no shard can be served: {missing}")
    return served
