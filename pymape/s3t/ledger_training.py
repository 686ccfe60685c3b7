"""Training the stages of a ledger: jobs made of what it holds, given to an engine, and landed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from tqdm import tqdm

from pymape.s3t.config import EngineName, S3TConfig
from pymape.s3t.engines import Engine, make_engine
from pymape.s3t.frozen_base import load_base
from pymape.s3t.ledger import Ledger, StageRow
from pymape.s3t.ledger.folder import CACHE
from pymape.s3t.stages import StageKey, unpack_stage
from pymape.s3t.training import StageJob, config_digest, stage_seed, train_stage

__all__ = ["other_options", "replay_stage", "stage_job", "train_planned"]


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
