"""Stages on a Ray cluster of two nodes, one of which is killed."""

from __future__ import annotations

import functools
import glob
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_s3t_engine import PREFIXES, SECONDS, echo, end_as_told, eventually, job, noted, results, train_all

from pymape.s3t.engines import InlineEngine, WorkerLostError, make_engine
from pymape.s3t.training import StageJob, train_stage

# Before Ray is imported, which reads it once; without it, Ray leaves a token in the home folder.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": os.urandom(32).hex(), "RAY_USAGE_STATS_ENABLED": "0"}
ray: Any = pytest.importorskip("ray", reason="needs Ray: pip install ray")

MARKER = b"an item of somebody's record; "
STORE = 80 * 2**20  # bytes of shared memory a node


def hang_on(node: str, folder: Path, job: StageJob) -> bytes:
    """Hang if this is a certain node; elsewhere train the stage, once that node hangs."""
    if ray.get_runtime_context().get_node_id() == node:
        (folder / "hangs").touch()
        time.sleep(SECONDS)
    eventually((folder / "hangs").exists)
    return train_stage(job)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes with a CPU each, on this machine."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp()  # sockets forbid the long paths of tmp_path
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
        options = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=options)
        try:
            cluster.victim = cluster.add_node(num_cpus=1, object_store_memory=STORE)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def in_shared_memory(content: bytes) -> bool:
    """Whether an object store of this machine holds some bytes, in use or not."""
    for descriptor in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            if "plasma" in os.readlink(descriptor) and content in Path(descriptor).read_bytes():
                return True
        except OSError:
            continue
    return False


def test_killed_node_loses_nothing(cluster: Any, tmp_path: Path) -> None:
    from pymape.s3t.engines.ray import RayEngine

    def kill() -> None:
        eventually((tmp_path / "hangs").exists)
        cluster.remove_node(cluster.victim, allow_graceful=False)

    killer = threading.Thread(target=kill)
    work = functools.partial(hang_on, cluster.victim.node_id, tmp_path)
    with RayEngine(address=cluster.address, work=work) as engine:
        assert engine.workers == 2
        assert not engine.reaches_cache
        killer.start()
        found = train_all(engine, tmp_path / "base", PREFIXES[::-1])
        killer.join()
        eventually(lambda: engine.workers == 1)
    with InlineEngine() as engine:
        assert found == train_all(engine, tmp_path / "base")


def test_ray_keeps_nothing_readable(cluster: Any) -> None:
    from pymape.s3t.engines.ray import RayEngine

    def used() -> float:
        name = "object_store_memory"
        return ray.cluster_resources()[name] - ray.available_resources()[name]

    content = MARKER * 10_000  # large enough for shared memory
    with RayEngine(address=cluster.address, work=echo) as engine:
        engine.submit(job(0, content=content))
        assert engine.wait()[1] == bytes([0]) + content
        eventually(lambda: used() == 0)
        assert not in_shared_memory(MARKER)
        reference = ray.put(MARKER[::-1] * 10_000)
        assert in_shared_memory(MARKER[::-1])
        del reference


def test_errors_and_lost_workers(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pymape.s3t.engines.ray import RayEngine

    monkeypatch.setattr("pymape.s3t.engines.base.RETRIES", 0)
    with RayEngine(1, cluster.address, work=end_as_told) as engine:
        for shard, how in enumerate([b"value error", b"exit", b""]):
            engine.submit(job(shard, tmp_path, how))
        found = dict(results(engine))
    assert type(found[0]) is ValueError
    assert str(found[0]) == "lr must be positive, got -1"
    assert isinstance(found[1], WorkerLostError)
    assert job(1).provenance.key.name in str(found[1])
    assert found[2] == bytes([2])
    assert [len(noted(tmp_path, shard)) for shard in range(3)] == [1, 1, 1]


def test_connections(cluster: Any) -> None:
    from pymape.s3t.engines.ray import RayEngine

    ray.init(cluster.address, log_to_driver=False)
    with RayEngine(work=echo, shared_cache=True) as engine:
        assert engine.reaches_cache
        with pytest.raises(ValueError, match="address and temp_dir must be None where Ray is connected already"):
            make_engine("ray", address=cluster.address)
        large = job(0)
        large.config.stage.threads = 3
        with pytest.raises(ValueError, match=r"stage.threads must be at most 1, the CPUs of the largest node, got 3"):
            engine.submit(large)
        on_gpu = job(0)
        on_gpu.config.stage.device = "cuda"
        with pytest.raises(ValueError, match=r"stage\.device must be 'cpu' on a cluster without a GPU, got 'cuda'"):
            engine.submit(on_gpu)
        engine.submit(job(0))
    assert ray.is_initialized()  # it was before
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(job(1))
    ray.shutdown()
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        RayEngine(0, cluster.address)
    with pytest.raises(ConnectionError, match="address must be that of a Ray cluster, got 'localhost:1'"):
        RayEngine(address="localhost:1")


def test_missing_ray_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pymape.s3t.engines.ray", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="pip install ray"):
        make_engine("ray")
