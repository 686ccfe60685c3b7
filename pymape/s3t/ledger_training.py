"""Training the stages of a ledger: jobs made of what it holds, given to an engine, and landed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor
from tqdm import tqdm

from pymape.s3t.adapters import load_base
from pymape.s3t.config import EngineName, S3TConfig
from pymape.s3t.engines import Engine, make_engine
from pymape.s3t.ledger import Ledger, StageRow
from pymape.s3t.ledger.folder import CACHE
from pymape.s3t.stages import StageKey, unpack_stage
from pymape.s3t.training import StageJob, config_digest, stage_seed, train_stage

__all__ = [
    "Served",
    "ServedStages",
    "other_options",
    "read_served",
    "replay_stage",
    "require_served",
    "stage_job",
    "train_planned",
]


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
        elif ledger.stage_counts().keys() & {"trained", "tombstoned", "erased"}:
            missing = "every shard is dead: repair the system first"
        else:
            missing = "nothing is trained yet: train the system first"
        raise ValueError(f"no shard can be served: {missing}")
    return served


def train_planned(
    ledger: Ledger,
    config: S3TConfig,
    plan: Callable[[], object],
    engine: EngineName | Engine = "local",
    workers: int | None = None,
    address: str | None = None,
    cache: bool = True,
    progress: bool | None = None,
) -> dict[str, int]:
    """Plan stages and train all that are planned.

    Args:
        ledger: open for writing.
        config: of the system.
        plan: `ledger.plan` or `ledger.repair`; called once the base and the engine are there.
        engine: the name of one, which is closed afterwards, or an engine that stays open. After an interruption what
            such an engine has begun is waited for, and dropped.
        workers: as `make_engine`.
        address: as `make_engine`.
        cache: keep hidden states in the ledger's folder, where the engine's workers reach it.
        progress: show a progress bar; default: on a terminal.

    Returns:
        Number of stages "trained", of those "discarded" because a request deleted their records meanwhile, and of those
        that stay "switched_off" by requests.

    Raises:
        ValueError: a base model that has changed, or a stage whose training failed; all that finished has landed.
    """
    load_base(config.model, config.labels, ledger.base)  # what every worker would refuse is refused before they start
    open_jobs: set[StageKey] = set()
    try:
        with _opened(engine, workers, address, config.stage.device) as chosen:
            plan()
            folder = str(ledger.folder / CACHE) if cache and chosen.reaches_cache else None
            done = _train(ledger, config, chosen, folder, open_jobs, progress)
    finally:  # after an interruption; no worker goes on, which could cache what is erased
        for key in open_jobs:
            ledger.erase_late(key)
    return done | {"switched_off": ledger.switched_off()}


def _train(
    ledger: Ledger,
    config: S3TConfig,
    engine: Engine,
    cache: str | None,
    open_jobs: set[StageKey],
    progress: bool | None,
) -> dict[str, int]:
    """Have an engine train what is planned; `open_jobs` names what it is at, or was when it was interrupted."""
    done = {"trained": 0, "discarded": 0}
    failure: BaseException | None = None
    submitted: set[StageKey] = set()
    total = ledger.stage_counts().get("planned", 0)
    with tqdm(total=total, desc="train", unit="stage", disable=None if progress is None else not progress) as bar:
        while True:
            # No job is made before a worker is free: a request may delete its records meanwhile.
            for row in [] if failure else ledger.runnable():
                if engine.pending >= engine.workers:
                    break
                if row.key not in submitted:
                    submitted.add(row.key)
                    job = stage_job(ledger, config, row, cache)
                    if job is not None:
                        open_jobs.add(row.key)
                        engine.submit(job)
            if not engine.pending:
                break
            job, result = engine.wait()
            bar.update()
            if isinstance(result, BaseException):
                failure = failure or result
                ledger.erase_late(job.provenance.key)
            else:
                landed = ledger.land(job.provenance.key, result)
                done["trained" if landed else "discarded"] += 1
            open_jobs.discard(job.provenance.key)
    if failure is not None:
        raise failure
    return done


@contextmanager
def _opened(
    engine: EngineName | Engine, workers: int | None, address: str | None, device: Literal["cpu", "cuda"]
) -> Iterator[Engine]:
    """The engine for a block, after which none of its workers is at work: one made from its name is closed."""
    if isinstance(engine, str):
        with make_engine(engine, workers, address, device) as made:
            yield made
        return
    try:
        yield engine
    finally:
        while engine.pending:
            engine.wait()


def stage_job(ledger: Ledger, config: S3TConfig, row: StageRow, cache: str | None = None) -> StageJob | None:
    """What trains a stage; None where a request has deleted one of its records since it was found.

    Args:
        ledger: that the stage is in.
        config: of the system.
        row: the stage, whose parents are trained.
        cache: folder of a `PrefixCache`, or None.
    """
    with ledger.snapshot():
        chain = ledger.chain(row.key)
        if not chain:
            return None
        rows = [tuple(ledger.records(row.key.shard, [part])) for part in row.key.prefix]
        parents = [ledger.read_stage(parent) for parent in chain[:-1]]
        return StageJob.of(config, row.key, ledger.base, rows, parents, cache)


def other_options(ledger: Ledger, config: S3TConfig) -> list[str]:
    """A sentence for every trained stage whose provenance names other options or another seed than the system's."""
    digest, problems = config_digest(config), []
    with ledger.snapshot():
        for row in ledger.stages():
            if row.state != "trained":
                continue
            try:
                provenance = ledger.provenance(row)
            except ValueError:  # which `Ledger.verify` reports
                continue
            if provenance.config != digest:
                problems.append(f"stage {row.key.name} was trained with other options than the system's")
            if provenance.seed != stage_seed(config.seed, row.key):
                problems.append(f"stage {row.key.name} was trained with another seed than the system's")
    return problems


def replay_stage(ledger: Ledger, config: S3TConfig) -> tuple[str | None, str | None]:
    """Train the last stage of the deepest served chain again and compare bits.

    Returns:
        The stage's name, None where nothing is served; and what is wrong with it, in a sentence, or None.
    """
    chain = max(ledger.serving(), key=len)
    if not chain:
        return None, None
    name, content = chain[-1].key.name, ledger.read_stage(chain[-1])
    job = stage_job(ledger, config, chain[-1])
    if job is None:
        return None, None
    again = train_stage(job)
    before, after = unpack_stage(content)[1].environment, unpack_stage(again)[1].environment
    if before != after:
        other = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
        return name, f"stage {name} cannot be compared: it was trained with another {', '.join(other)}"
    return name, None if again == content else f"stage {name} differs from what its records give when trained again"
