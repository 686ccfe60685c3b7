"""What an engine is, what all of them share, and the one that needs nothing else."""

from __future__ import annotations

import pickle
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from pymape.s3t.training import StageJob, train_stage

__all__ = [
    "RETRIES",
    "Engine",
    "InlineEngine",
    "Task",
    "Work",
    "WorkerLostError",
    "require_open",
    "require_pending",
    "run",
]

RETRIES = 3  # times that a stage is begun again after its worker died
Work = Callable[[StageJob], bytes]


class WorkerLostError(ChildProcessError):
    """Every worker that was given a stage died."""


class Engine(ABC):
    """Trains stages. A stage is a pure function, so its bits depend neither on the engine nor on the order.

    Every submitted stage is returned by `wait` exactly once, whatever becomes of the workers in between. A `with` block
    closes the engine.

    Attributes:
        workers: stages trained at the same time.
        pending: stages submitted and not yet returned.
        reaches_cache: whether a prefix cache in a folder of this machine is the same folder for all workers.
    """

    reaches_cache: bool = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    @abstractmethod
    def workers(self) -> int: ...

    @property
    @abstractmethod
    def pending(self) -> int: ...

    @abstractmethod
    def submit(self, job: StageJob) -> None:
        """Take a stage; returns at once. It is sent to a worker when one is free."""

    @abstractmethod
    def wait(self) -> tuple[StageJob, bytes | BaseException]:
        """The next finished stage, in no particular order.

        Returns:
            The job as submitted, and the stage file, or what the training raised, or `WorkerLostError` where more than
            `RETRIES` workers in a row died on it. Nothing else is retried: an error would come again.

        Raises:
            RuntimeError: nothing is pending.
        """

    @abstractmethod
    def close(self) -> None:
        """End all workers and drop what is pending."""


class InlineEngine(Engine):
    """Trains one stage after the other in this process, each when it is waited for.

    Args:
        work: what trains a stage.
    """

    workers = 1

    def __init__(self, work: Work = train_stage) -> None:
        self._work = work
        self._queue: deque[StageJob] = deque()

    @property
    def pending(self) -> int:
        return len(self._queue)

    def submit(self, job: StageJob) -> None:
        self._queue.append(job)

    def wait(self) -> tuple[StageJob, bytes | BaseException]:
        require_pending(self)
        job = self._queue.popleft()
        try:
            return job, self._work(job)
        except Exception as error:
            return job, error

    def close(self) -> None:
        self._queue.clear()


@dataclass
class Task:
    """A job on its way, with the number of workers that died on it."""

    job: StageJob
    losses: int = 0

    def lose(self, how: str) -> WorkerLostError | None:
        """Count a dead worker; the error that ends the task if there were too many."""
        self.losses += 1
        if self.losses <= RETRIES:
            return None
        name = self.job.provenance.key.name
        return WorkerLostError(f"stage {name} lost {self.losses} workers, the last one ended {how}")


def run(work: Work, job: StageJob) -> bytes | BaseException:
    """What the work returns, or what it raises, in a form that can be sent to another process."""
    try:
        return work(job)
    except BaseException as error:
        where = "".join(traceback.format_exception(error))
        sent: BaseException = error
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            sent = RuntimeError(f"{type(error).__name__}: {error}")
        sent.add_note(f"In the worker:\n{where}")
        return sent


def require_open(closed: bool) -> None:
    """Refuse a stage for workers that have ended.

    Raises:
        RuntimeError: the engine is closed.
    """
    if closed:
        raise RuntimeError("submit must come before close, got a closed engine")


def require_pending(engine: Engine) -> None:
    """Refuse to wait for nothing.

    Raises:
        RuntimeError: no stage is pending.
    """
    if not engine.pending:
        raise RuntimeError("wait must come after submit, got no pending stage")
