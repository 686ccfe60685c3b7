"""Stages in worker processes of this machine."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

import torch

from pymape.s3t.engines.base import Engine, Task, Work, require_open, require_pending, run
from pymape.s3t.training import StageJob, train_stage

__all__ = ["LocalEngine", "serve"]

_WATCH_SECONDS = 0.5

# Not multiprocessing.Process, which imports the caller's main module again: a script without `if __name__ ==
# "__main__"` would start over in every worker. Ctrl-C goes to the whole terminal; what becomes of workers is decided by
# the process that owns them.
_WORKER = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from pymape.s3t.engines.local import serve
serve(connection, parent=int(sys.argv[2]))
"""


class LocalEngine(Engine):
    """Worker processes on this machine, each training one stage at a time and keeping the base model loaded.

    A worker that dies is replaced, and its stage trained again. No worker outlives this process, not even one that was
    killed. Of several GPUs each has its own, in turn. Methods are to be called from one thread at a time.

    Args:
        workers: number of processes.
        work: what trains a stage; a function that workers can import.

    Raises:
        ValueError: no workers.

    Example:
        with LocalEngine(workers=2) as engine:
            for job in jobs:
                engine.submit(job)
            while engine.pending:
                job, stage = engine.wait()
    """

    workers = 1

    def __init__(self, workers: int = 1, work: Work = train_stage) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers = workers
        self._work = work
        self._queue: deque[Task] = deque()
        self._started: list[_Worker] = []
        self._closed = False

    @property
    def pending(self) -> int:
        return len(self._queue) + sum(worker.task is not None for worker in self._started)

    def submit(self, job: StageJob) -> None:
        require_open(self._closed)
        self._queue.append(Task(job))
        self._distribute()

    def wait(self) -> tuple[StageJob, bytes | BaseException]:
        require_pending(self)
        while True:
            busy = {worker.connection: worker for worker in self._started if worker.task is not None}
            worker = busy[wait(list(busy))[0]]  # type: ignore[index]
            task = worker.task
            assert task is not None
            try:
                result = worker.receive()
            except (EOFError, OSError):
                self._started.remove(worker)
                result = task.lose(worker.end())
                if result is None:
                    self._queue.appendleft(task)
            self._distribute()
            if result is not None:
                return task.job, result

    def close(self) -> None:
        self._closed = True
        self._queue.clear()
        for worker in self._started:
            worker.kill()
        while self._started:
            self._started.pop().end()

    def _distribute(self) -> None:
        """Give queued tasks to idle workers, starting those that are missing."""
        while self._queue:
            worker = next((worker for worker in self._started if worker.task is None), None)
            if worker is None:
                if len(self._started) == self.workers:
                    return
                taken = {worker.number for worker in self._started}
                worker = _Worker(self._work, min(set(range(self.workers)) - taken))
                self._started.append(worker)
            worker.give(self._queue.popleft())


class _Worker:
    """A process that runs `serve`, and the task that it has."""

    def __init__(self, work: Work, number: int) -> None:
        self.number = number
        self.task: Task | None = None
        self._ready = False
        self.connection, other = Pipe()
        with other:
            command = [sys.executable, "-c", _WORKER, str(other.fileno()), str(os.getpid())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[other.fileno()], env=os.environ | _own_gpu(number)
            )
        self._send(sys.path)
        self._send(work)

    def give(self, task: Task) -> None:
        """Send a task, or keep it until the process has started: nobody should have to wait for that."""
        self.task = task
        if self._ready:
            self._send(task.job)

    def receive(self) -> bytes | BaseException | None:
        """The result of the task; None where the process had only just started.

        Raises:
            EOFError, OSError: the process is dead.
        """
        result = self.connection.recv()
        if self._ready:
            self.task = None
        elif self.task is not None:
            self._ready = True
            self._send(self.task.job)
        return result

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """Make sure that the process is gone; how it ended."""
        self.connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1)  # a pipe closes a little before its process is gone
        self.kill()
        code = self._process.wait()
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def _send(self, value: object) -> None:
        with contextlib.suppress(OSError):  # the process is dead: `receive` finds out
            self.connection.send(value)


def _own_gpu(number: int) -> dict[str, str]:
    """The environment that leaves a worker one of several GPUs."""
    count = torch.cuda.device_count()
    if count < 2:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(place) for place in range(count)]
    return {"CUDA_VISIBLE_DEVICES": names[number % count]}


def serve(connection: Connection, parent: int) -> None:
    """Body of a worker process: receive the work, say so, and turn jobs into results until the other end closes.

    Args:
        connection: to the process that owns the worker.
        parent: its process id. When it is gone the worker exits, also in the middle of a stage.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        work = connection.recv()
        connection.send(None)
        while True:
            connection.send(run(work, connection.recv()))


def _watch(parent: int) -> None:
    """Exit when the parent is gone: then nobody waits for the result."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
