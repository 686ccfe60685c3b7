"""Stages on a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import pickle
import secrets
import shutil
import socket
import tempfile
from collections import deque
from typing import Any, Literal

from pymape.s3t.engines.base import Engine, Task, Work, require_open, require_pending, run
from pymape.s3t.training import StageJob, train_stage

try:
    import ray
    from cryptography.hazmat.primitives.ciphers import Cipher
    from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    raise ImportError(f"engine 'ray' needs Ray and cryptography ({error}): pip install ray cryptography") from error

__all__ = ["RayEngine"]

_JOB, _RESULT = b"job", b"result"


class RayEngine(Engine):
    """Trains stages as tasks of a Ray cluster, each on as many CPUs as `config.stage.threads` says, and one GPU if any.

    A stage whose worker or node is lost is trained again elsewhere. What Ray stores in shared memory and, when that is
    full, in files is encrypted with a key that is used once and known only to this process and the worker, so nothing
    readable of a record is left there. docs/s3t_workers.md says what all nodes need to have in common.

    Args:
        workers: stages trained at the same time at most; default: as many as the cluster has CPUs, or GPUs.
        address: of the cluster, for instance "head:6379"; default: the one this process is connected to, or else a Ray
            on this machine, which ends with the engine.
        temp_dir: where a Ray on this machine keeps its sockets and logs, in a folder removed at the end; default: the
            system's. Sockets forbid long paths.
        shared_cache: the system's folder is the same folder on all nodes, so that they may use its prefix cache.
            Otherwise they must not: deletions could not erase what they keep.
        device: that the stages are trained on.
        work: what trains a stage; a function that the nodes can import.

    Raises:
        ValueError: no workers, or an address or folder given when this process is connected already.
        ConnectionError: no cluster there.
    """

    def __init__(
        self,
        workers: int | None = None,
        address: str | None = None,
        *,
        temp_dir: str | None = None,
        shared_cache: bool = False,
        device: Literal["cpu", "cuda"] = "cpu",
        work: Work = train_stage,
    ) -> None:
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.reaches_cache = shared_cache
        self._most, self._work, self._resource = workers, work, "GPU" if device == "cuda" else "CPU"
        self._queue: deque[Task] = deque()
        self._running: dict[Any, tuple[Task, bytes]] = {}
        self._closed = self._connected = False
        self._folder: str | None = None
        if ray.is_initialized():
            if address is not None or temp_dir is not None:
                raise ValueError(
                    f"address and temp_dir must be None where Ray is connected already, got {address!r}, {temp_dir!r}"
                )
            return
        _require_cluster(address)
        options: dict[str, Any] = {"address": address}
        if address is None:
            self._folder = tempfile.mkdtemp(prefix="ray-", dir=temp_dir)
            options = {"address": "local", "include_dashboard": False, "_temp_dir": self._folder}
        self._connected = True
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except BaseException:
            self.close()
            raise

    @property
    def workers(self) -> int:
        return self._most or max(1, int(ray.cluster_resources().get(self._resource, 1)))

    @property
    def pending(self) -> int:
        return len(self._queue) + len(self._running)

    def submit(self, job: StageJob) -> None:
        """Take a stage; returns at once.

        Raises:
            ValueError: no node has as many CPUs as the stage needs threads, or the GPU that it needs.
        """
        require_open(self._closed)
        threads = job.config.stage.threads
        most = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
        if threads > most:
            raise ValueError(f"stage.threads must be at most {most:g}, the CPUs of the largest node, got {threads}")
        if job.config.stage.device == "cuda" and not ray.cluster_resources().get("GPU"):
            raise ValueError("stage.device must be 'cpu' on a cluster without a GPU, got 'cuda'")
        self._queue.append(Task(job))
        self._distribute()

    def wait(self) -> tuple[StageJob, bytes | BaseException]:
        require_pending(self)
        while True:
            self._distribute()
            finished, _ = ray.wait(list(self._running), num_returns=1)
            task, key = self._running.pop(finished[0])
            result: bytes | BaseException | None
            try:
                result = pickle.loads(_encrypt(ray.get(finished[0]), key, _RESULT))
            except RayTaskError as error:  # `run` raises nothing: this node cannot even read the job
                result = error
            except RayError as error:
                result = task.lose(f"with {type(error).__name__}")
                if result is None:
                    self._queue.appendleft(task)
            if result is not None:
                self._distribute()
                return task.job, result

    def close(self) -> None:
        self._queue.clear()
        for reference in self._running:
            with contextlib.suppress(RayError):
                ray.cancel(reference, force=True)
        self._running.clear()
        if self._connected and not self._closed:
            ray.shutdown()
        self._closed = True
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _distribute(self) -> None:
        """Hand over as many tasks as can run: what waits here takes no place in Ray's object store."""
        while self._queue and len(self._running) < self.workers:
            task = self._queue.popleft()
            # Lost workers are counted here: Ray itself would run a stage that takes too much memory again without end,
            # and keep its rows for as long as the result is referred to.
            stage = task.job.config.stage
            gpus = int(stage.device == "cuda")
            remote = ray.remote(num_cpus=stage.threads, num_gpus=gpus, max_retries=0)(_train)
            key = secrets.token_bytes(32)
            job = _encrypt(pickle.dumps(task.job), key, _JOB)
            self._running[remote.remote(self._work, job, key)] = task, key


def _require_cluster(address: str | None) -> None:
    """Refuse an address where nothing listens, for which Ray would wait several minutes."""
    host, _, port = (address or "").rpartition(":")
    if not port.isdigit():  # None, or "auto", which Ray looks up
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"address must be that of a Ray cluster, got {address!r} ({error})") from error


def _train(work: Work, job: bytes, key: bytes) -> bytes:
    """What a Ray worker runs."""
    return _encrypt(pickle.dumps(run(work, pickle.loads(_encrypt(job, key, _JOB)))), key, _RESULT)


def _encrypt(content: bytes, key: bytes, purpose: bytes) -> bytes:
    """Encrypt or decrypt with ChaCha20; a key is used for one message of each purpose."""
    return Cipher(ChaCha20(key, purpose.rjust(16, b"\0")), mode=None).encryptor().update(content)
