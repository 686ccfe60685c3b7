"""Engines: every stage comes back once, whatever happens to the workers, and none of these is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from s3t_tools import make_job, make_records, options, parts, write_base

from pymape.s3t.config import S3TConfig
from pymape.s3t.engines import Engine, InlineEngine, LocalEngine, WorkerLostError, make_engine
from pymape.s3t.engines.base import RETRIES
from pymape.s3t.stages import Provenance, StageKey
from pymape.s3t.training import StageJob

SECONDS = 120.0
# Stages of a shard whose sequences share beginnings.
PREFIXES = [(0,), (0, 1), (0, 1, 2), (0, 2), (3,), (3, 2)]


def job(shard: int, folder: Path | str = "", content: bytes = b"") -> StageJob:
    """A job for the functions below: they keep notes in a folder."""
    provenance = Provenance(StageKey(shard, (0,)), base="", config="", seed=0, parent=None, records={0: ""})
    rows = (("folder", str(folder).encode()), ("content", content))
    return StageJob(S3TConfig("none"), provenance, parents=(), rows=(rows,))


def folder_of(job: StageJob) -> Path:
    return Path(job.rows[0][0][1].decode())


def content_of(job: StageJob) -> bytes:
    return job.rows[0][1][1]


def echo(job: StageJob) -> bytes:
    """The job's number and content."""
    return bytes([job.provenance.key.shard]) + content_of(job)


def note(job: StageJob) -> int:
    """Note that a process works on a job; the number of times that one has so far."""
    path = folder_of(job) / job.provenance.key.name
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return len(path.read_text().split())


def noted(folder: Path, shard: int) -> list[int]:
    """Processes that have worked on a job."""
    path = folder / job(shard).provenance.key.name
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def hang_at_first(job: StageJob) -> bytes:
    """Hang where the content says so, unless a process did before, or wait until job 0 has begun."""
    if note(job) == 1 and content_of(job) == b"hang":
        time.sleep(SECONDS)
    if content_of(job) == b"wait":
        eventually(lambda: noted(folder_of(job), 0))
    return echo(job)


def end_as_told(job: StageJob) -> bytes:
    """End in the way that the content names."""
    note(job)
    how = content_of(job)
    if how == b"kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == b"exit":
        os._exit(7)
    if how == b"value error":
        raise ValueError("lr must be positive, got -1")
    if how == b"unusual error":
        raise UnusualError("lr", -1)
    return echo(job)


class UnusualError(Exception):
    """Cannot be unpickled: it is not made of its `args`."""

    def __init__(self, argument: str, value: int) -> None:
        super().__init__(f"{argument} is {value}")


class Content(bytes):
    """Notes when it is sent to another process."""

    sent: list[Content]

    def __reduce__(self) -> tuple[type[bytes], tuple[bytes]]:
        self.sent.append(self)
        return bytes, (bytes(self),)


def eventually(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        # A process that nobody has waited for yet is as good as gone.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def results(engine: Engine) -> Iterator[tuple[int, bytes | BaseException]]:
    while engine.pending:
        done, result = engine.wait()
        yield done.provenance.key.shard, result


def train_all(
    engine: Engine, folder: Path, prefixes: Sequence[tuple[int, ...]] = PREFIXES, cache: Path | None = None
) -> dict[tuple[int, ...], bytes]:
    """Train real stages, each as soon as its parent is there, and otherwise in the order given."""
    config = options(write_base(folder))
    slices, files, submitted = parts(make_records()), {}, set()
    while len(files) < len(prefixes):
        for prefix in prefixes:
            parents = [files[prefix[:depth]] for depth in range(1, len(prefix)) if prefix[:depth] in files]
            if prefix not in submitted and len(parents) == len(prefix) - 1:
                submitted.add(prefix)
                engine.submit(make_job(config, StageKey(0, prefix), slices, parents, cache=cache))
        done, result = engine.wait()
        assert isinstance(result, bytes), result
        files[done.provenance.key.prefix] = result
    assert engine.pending == 0
    return files


@pytest.mark.parametrize("engine", [InlineEngine(echo), LocalEngine(2, echo)], ids=["inline", "local"])
def test_every_stage_comes_back_once(engine: Engine) -> None:
    large = os.urandom(5_000_000)  # more than a pipe holds, in both directions
    jobs = [job(shard, content=large) for shard in range(5)]
    with engine:
        for one in jobs:
            engine.submit(one)
        assert engine.pending == 5
        found = [engine.wait() for _ in jobs]
        assert engine.pending == 0
        with pytest.raises(RuntimeError, match="wait must come after submit"):
            engine.wait()
    assert {id(one) for one, _ in found} == {id(one) for one in jobs}
    assert all(result == bytes([one.provenance.key.shard]) + large for one, result in found)


def test_stages_have_the_same_bits_wherever_and_in_whatever_order_they_are_trained(tmp_path: Path) -> None:
    with InlineEngine() as engine:
        expected = train_all(engine, tmp_path / "base")
    assert len(set(expected.values())) == len(PREFIXES)
    with LocalEngine(2) as engine:
        found = train_all(engine, tmp_path / "base", PREFIXES[::-1], tmp_path / "cache")
    assert found == expected


def test_jobs_are_sent_only_to_free_workers() -> None:
    Content.sent = []
    with LocalEngine(1, echo) as engine:
        for shard in range(6):
            engine.submit(job(shard, content=Content(b"rows")))
        engine.wait()
        assert len(Content.sent) <= 2
        assert len(list(results(engine))) == 5
    assert len(Content.sent) == 6


def test_stage_of_a_killed_worker_is_trained_again_and_lands_once(tmp_path: Path) -> None:
    def kill() -> None:
        eventually(lambda: noted(tmp_path, 1))
        os.kill(noted(tmp_path, 1)[0], signal.SIGKILL)

    with LocalEngine(2, hang_at_first) as engine:
        for shard in range(4):
            engine.submit(job(shard, tmp_path, b"hang" if shard == 1 else b""))
        killer = threading.Thread(target=kill)
        killer.start()
        found = sorted(results(engine))
        killer.join()
        numbers = [worker.number for worker in engine._started]
        assert len(set(numbers)) == len(numbers)
        assert set(numbers) <= {0, 1}
    assert found == [(shard, bytes([shard]) + (b"hang" if shard == 1 else b"")) for shard in range(4)]
    assert [len(noted(tmp_path, shard)) for shard in range(4)] == [1, 2, 1, 1]


def test_a_stage_that_kills_its_workers_is_given_up_and_named(tmp_path: Path) -> None:
    with LocalEngine(1, end_as_told) as engine:
        engine.submit(job(3, tmp_path, b"kill"))
        engine.submit(job(4, tmp_path))
        found = dict(results(engine))
    assert found[4] == bytes([4])
    assert isinstance(found[3], WorkerLostError)
    name = job(3).provenance.key.name
    assert str(found[3]) == f"stage {name} lost {RETRIES + 1} workers, the last one ended by SIGKILL"
    assert len(noted(tmp_path, 3)) == len(set(noted(tmp_path, 3))) == RETRIES + 1
    assert len(noted(tmp_path, 4)) == 1


def test_exit_code_of_a_lost_worker_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymape.s3t.engines.base.RETRIES", 0)
    with LocalEngine(1, end_as_told) as engine:
        engine.submit(job(0, tmp_path, b"exit"))
        assert str(engine.wait()[1]).endswith("lost 1 workers, the last one ended with exit code 7")


def test_errors_of_the_training_are_returned_and_not_retried(tmp_path: Path) -> None:
    with LocalEngine(1, end_as_told) as engine:
        engine.submit(job(0, tmp_path, b"value error"))
        engine.submit(job(1, tmp_path, b"unusual error"))
        engine.submit(job(2, tmp_path))
        found = dict(results(engine))
    assert type(found[0]) is ValueError
    assert str(found[0]) == "lr must be positive, got -1"
    assert any("end_as_told" in text for text in found[0].__notes__)  # the traceback in the worker
    assert type(found[1]) is RuntimeError
    assert str(found[1]) == "UnusualError: lr is -1"
    assert found[2] == bytes([2])
    assert [len(noted(tmp_path, shard)) for shard in range(3)] == [1, 1, 1]
    assert len({noted(tmp_path, shard)[0] for shard in range(3)}) == 1  # the worker survives

    inline = InlineEngine(end_as_told)
    inline.submit(job(5, tmp_path, b"value error"))
    assert type(inline.wait()[1]) is ValueError


def test_close_ends_busy_and_idle_workers(tmp_path: Path) -> None:
    engine = LocalEngine(2, hang_at_first)
    engine.submit(job(0, tmp_path, b"hang"))
    engine.submit(job(1, tmp_path, b"wait"))
    assert engine.wait()[0].provenance.key.shard == 1
    workers = noted(tmp_path, 0) + noted(tmp_path, 1)
    assert all(map(alive, workers))
    engine.close()
    assert not any(map(alive, workers))
    assert engine.pending == 0
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(job(2, tmp_path))


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_no_worker_outlives_its_owner(tmp_path: Path, how: str) -> None:
    # A script as users write them: nothing guards its lines against being run again in a worker.
    script = tmp_path / "script.py"
    script.write_text(
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs the tests may ignore it
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_s3t_engine import LocalEngine, hang_at_first, job\n"
        "with LocalEngine(1, hang_at_first) as engine:\n"
        f"    engine.submit(job(0, {str(tmp_path)!r}, b'hang'))\n"
        "    engine.wait()\n"
    )
    owner = subprocess.Popen([sys.executable, script], start_new_session=True, stderr=subprocess.PIPE, text=True)
    eventually(lambda: noted(tmp_path, 0))
    (worker,) = noted(tmp_path, 0)
    assert alive(worker)
    if how == "killed":
        owner.kill()
    else:
        os.killpg(owner.pid, signal.SIGINT)  # as a terminal does
    _, errors = owner.communicate(timeout=SECONDS)
    eventually(lambda: not alive(worker))
    if how == "interrupted":
        assert errors.count("Traceback") == 1  # the worker says nothing
        assert errors.rstrip().endswith("KeyboardInterrupt")


def test_engines_by_name() -> None:
    assert isinstance(make_engine("inline"), InlineEngine)
    with make_engine("local", workers=3) as engine:
        assert isinstance(engine, LocalEngine)
        assert engine.workers == 3
        assert engine.reaches_cache
    with pytest.raises(ValueError, match="engine must be 'local', 'inline' or 'ray', got 'slurm'"):
        make_engine("slurm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        make_engine("local", workers=0)
    with pytest.raises(ValueError, match="workers must be at least 1, got -1"):
        LocalEngine(-1)
    with pytest.raises(ValueError, match="address must be given with the engine 'ray' only"):
        make_engine("local", address="head:6379")


def visible_gpus(job: StageJob) -> bytes:
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").encode()


@pytest.mark.parametrize(("visible", "expected"), [(None, {"0", "1"}), ("5,GPU-7", {"5", "GPU-7"})])
def test_every_worker_has_one_of_several_gpus(
    visible: str | None, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with make_engine("local", device="cuda") as engine:
        assert engine.workers == 2
        for shard in range(2):
            engine.submit(job(shard))
        assert {worker.number for worker in engine._started} == {0, 1}  # type: ignore[attr-defined]
    with LocalEngine(3, visible_gpus) as engine:
        for shard in range(3):
            engine.submit(job(shard))
        found = [engine.wait()[1] for _ in range(3)]
    assert {result.decode() for result in found if isinstance(result, bytes)} == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with make_engine("local", device="cuda") as engine:
        assert engine.workers == 1  # which says that there is no GPU
