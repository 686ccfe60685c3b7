"""Training one stage: a pure function of the base, the parent stages, the records, the options and the seed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymape.forward import unlabelled
from pymape.losses import check_labels, per_sample_loss
from pymape.prefix_cache import PrefixCache
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import S3TConfig, StageConfig
from pymape.s3t.frozen_base import load_base
from pymape.s3t.rows import stack_rows
from pymape.s3t.stages import Provenance, StageKey, decode_row, pack_stage, row_digest, slice_digest, unpack_stage
from pymape.s3t.states import StageStates, full_batch

__all__ = ["StageJob", "config_digest", "environment", "stage_seed", "train_stage"]

# One stage at a time in a process: threads, random numbers and the loaded base are the process's.
_LOCK = threading.Lock()
_loaded: tuple[str, SlicedAdapters] | None = None  # and which base it is, with which adapters


Rows = tuple[tuple[str, bytes], ...]


@dataclass(frozen=True)
class StageJob:
    """Everything that it takes to train a stage, to be sent to another process.

    Args:
        config: of the system.
        provenance: what the stage is to be made from, without the environment.
        parents: files of the stages before it in the chain, root first.
        rows: (record name, encoded record) of every record of each slice of the prefix, slices in the prefix's order
            and records in the order in which they were ingested.
        cache: folder of a `PrefixCache`, or None. It changes the time, not the bits.
        begin: for SISA: file of a stage of the same depth whose values training starts from, instead of fresh ones. The
            provenance names it as the parent. No stage of an S3T system has one.
    """

    config: S3TConfig
    provenance: Provenance
    parents: tuple[bytes, ...]
    rows: tuple[Rows, ...]
    cache: str | None = None
    begin: bytes | None = None

    @classmethod
    def of(
        cls,
        config: S3TConfig,
        key: StageKey,
        base: str,
        rows: Sequence[Rows],
        parents: Sequence[bytes] = (),
        cache: str | None = None,
        begin: bytes | None = None,
    ) -> StageJob:
        """The job of a stage, with the provenance that follows from all else.

        Args:
            config: of the system.
            key: which stage.
            base: `pymape.s3t.frozen_base.base_hash` of the frozen base.
            rows: of every slice of its prefix, in the prefix's order.
            parents: files of the stages before it in the chain, root first.
            cache: folder of a `PrefixCache`, or None.
            begin: for SISA: file of the stage that training starts from.

        Raises:
            ValueError: fewer slices than the prefix has.
        """
        before = [begin, *parents][-1]
        provenance = Provenance(
            key=key,
            base=base,
            config=config_digest(config),
            seed=stage_seed(config.seed, key),
            parent=None if before is None else hashlib.sha256(before).hexdigest(),
            records={part: _rows_digest(own) for part, own in zip(key.prefix, rows)},
        )
        return cls(config, provenance, tuple(parents), tuple(rows), cache, begin)


def stage_seed(master: int, key: StageKey) -> int:
    """Seed of a stage, 63 bits; it depends on nothing but these two."""
    text = json.dumps([master, key.generation, key.shard, key.prefix])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def config_digest(config: S3TConfig) -> str:
    """sha256 over the options that a stage's bits depend on, beside the base and the seed."""
    stage = dataclasses.asdict(config.stage)
    if stage["device"] == "cpu":
        del stage["device"]  # systems made before there was a choice have the same digest
    content = {
        "slices": config.slices,
        "layers_per_slice": config.layers_per_slice,
        "labels": config.labels,
        "lora": dataclasses.asdict(config.lora),
        "stage": stage,
    }
    # 16 and 16.0 are one option.
    text = json.dumps(json.loads(json.dumps(content), parse_int=float), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def train_stage(job: StageJob, *, progress: Callable[[int, int], None] | None = None) -> bytes:
    """Train a stage: the LoRA group of its depth and the task head, on all records of its slices.

    Its bits depend on the job and the machine alone: not on what else the process has done, on where files lie, nor on
    the prefix cache. The seed draws the adapters' beginning, the order of the records in each epoch, and dropout. Every
    batch has one shape; rows that fill the last batch of an epoch repeat some of its records and do not count. The loss
    is the mean of the records' own (`per_sample_loss`); gradients of all that the stage trains are clipped together;
    everything but the new group's dropout is in eval mode. No data is held out, and nothing is chosen.

    Args:
        job: the stage.
        progress: called with (steps done, steps in all) after each step.

    Returns:
        The stage's file (`pack_stage`), with the environment filled in.

    Raises:
        ValueError: rows, parents, options or base that are not those of the provenance, a record that the model cannot
            be trained on, a loss that is no longer finite, something frozen that changed, or no GPU where one is
            asked for.
        RuntimeError: on a GPU, an operation that has no deterministic algorithm.

    Source: S3T (arXiv 2406.16257), section 3.2 and algorithm 1.
    """
    global _loaded
    key, stage = job.provenance.key, job.config.stage
    with _LOCK, _surroundings(stage), _announced(job.cache):
        parents = _checked_parents(job)
        adapters = _adapters(job)
        loaded, _loaded = _loaded, None  # if anything fails from here on, the next stage loads the base anew
        adapters.load(parents)
        tensors = _train(adapters, job, progress)
        adapters.freeze()
        if adapters.base_hash() != job.provenance.base:
            raise ValueError(f"base must stay frozen, got one that changed while stage {key.name} was trained")
        _loaded = loaded
        return pack_stage(tensors, dataclasses.replace(job.provenance, environment=environment(stage.device)))


def _announced(cache: str | None) -> AbstractContextManager[None]:
    """Let a new writer of the system know that this process may be writing states of records into the cache."""
    return contextlib.nullcontext() if cache is None else PrefixCache(cache).in_use()


def environment(device: str) -> dict[str, str]:
    """What the bits of a computation on a device depend on beside its inputs."""
    libraries = {}
    if device == "cuda":
        libraries = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        device = torch.cuda.get_device_name()
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "threads": str(torch.get_num_threads()),
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": device,
        **libraries,
    }


def _train(adapters: SlicedAdapters, job: StageJob, progress: Callable[[int, int], None] | None) -> dict[str, Tensor]:
    stage, key = job.config.stage, job.provenance.key
    generator = torch.Generator().manual_seed(job.provenance.seed)
    trained = adapters.grow(generator)
    if job.begin is not None:
        begin, _ = unpack_stage(job.begin, name=f"beginning of stage {key.name}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(begin[name])
    frozen = adapters.frozen_hash(key.depth)
    torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # dropout draws from the global generator

    names = [name for rows in job.rows for name, _ in rows]
    data = stack_rows(adapters.base, [decode_row(row) for rows in job.rows for _, row in rows], stage.max_length)
    check_labels(adapters.base, data, names)
    data = {name: value.to(stage.device) for name, value in data.items()}
    forward = _forward(adapters, job.cache, names, data, stage)
    optimizer = torch.optim.AdamW(trained.values(), lr=stage.lr, weight_decay=stage.weight_decay, fused=True)
    batches = -(-len(names) // stage.batch_size)
    steps = stage.epochs * batches
    for step in range(steps):
        if step % batches == 0:
            order = torch.randperm(len(names), generator=generator)
        start = step % batches * stage.batch_size
        counting = order[start : start + stage.batch_size]
        rows = full_batch(counting, stage.batch_size)
        losses = per_sample_loss(adapters.base, {name: value[rows] for name, value in data.items()}, forward(rows))
        loss = losses[: len(counting)].mean()
        if not torch.isfinite(loss):
            raise ValueError(
                f"loss of stage {key.name} must be finite, got {loss.item()} at step {step + 1} of {steps}: "
                "a lower stage.lr may help"
            )
        optimizer.param_groups[0]["lr"] = stage.lr * _rate(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), stage.max_grad_norm, foreach=False)
        optimizer.step()
        if progress is not None:
            progress(step + 1, steps)
    tensors = adapters.stage_tensors(key.depth)
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise ValueError(f"weights of stage {key.name} must be finite, got others: a lower stage.lr may help")
    if adapters.frozen_hash(key.depth) != frozen:
        raise ValueError(f"earlier stages must stay frozen, got some that changed while stage {key.name} was trained")
    return tensors


def _forward(
    adapters: SlicedAdapters, cache: str | None, names: Sequence[str], data: dict[str, Tensor], stage: StageConfig
) -> Callable[[Tensor], Any]:
    """What computes the model's outputs for some records, [B] rows."""
    inputs: dict[str, Any] = unlabelled(data)
    options = {"use_cache": False} if "use_cache" in signature(adapters.base.forward).parameters else {}
    if cache is None or adapters.first_layer(adapters.depth) == 0:
        return lambda rows: adapters.base(**{name: value[rows] for name, value in inputs.items()}, **options)
    shapes = {name: [stage.batch_size, *value.shape[1:]] for name, value in data.items()}
    facts = json.dumps([environment(stage.device), shapes])
    return StageStates(adapters, cache, names, inputs | options, stage.batch_size, facts).run


def _rate(step: int, steps: int) -> float:
    """Factor of the learning rate: up over the first tenth of the steps, then down to zero."""
    rise = steps / 10
    return min(1.0, (step + 1) / rise, (steps - step) / (steps - rise))


def _checked_parents(job: StageJob) -> list[dict[str, Tensor]]:
    """The parents' tensors, once the job is known to be what its provenance says."""
    expected, key = job.provenance, job.provenance.key
    if config_digest(job.config) != expected.config:
        raise ValueError(f"config of stage {key.name} must be its provenance's, got other options")
    if stage_seed(job.config.seed, key) != expected.seed:
        raise ValueError(f"seed of stage {key.name} must be {stage_seed(job.config.seed, key)}, got {expected.seed}")
    if (len(job.rows), len(job.parents)) != (key.depth, key.depth - 1):
        raise ValueError(
            f"stage {key.name} must come with {key.depth} slices and {key.depth - 1} parents, "
            f"got {len(job.rows)} and {len(job.parents)}"
        )
    names = [name for rows in job.rows for name, _ in rows]
    if not names or len(set(names)) != len(names):
        raise ValueError(
            f"rows of stage {key.name} must hold at least one record and each once, "
            f"got {len(names)} of {len(set(names))} records"
        )
    for part, rows in zip(key.prefix, job.rows, strict=True):
        if _rows_digest(rows) != expected.records[part]:
            raise ValueError(f"rows of slice {part} of stage {key.name} must be those of its provenance, got others")
    chain, before = [], None if job.begin is None else hashlib.sha256(job.begin).hexdigest()
    for depth, content in enumerate(job.parents, start=1):
        name = f"parent {depth} of stage {key.name}"
        tensors, found = unpack_stage(content, name=name)
        parent = dataclasses.replace(
            expected,
            key=StageKey(key.shard, key.prefix[:depth], found.key.generation),
            seed=stage_seed(job.config.seed, found.key),
            parent=before,
            records={part: expected.records[part] for part in key.prefix[:depth]},
        )
        wrong = parent.difference(found)
        if wrong is not None:
            raise ValueError(f"{name} must have the {wrong} {getattr(parent, wrong)}, got {getattr(found, wrong)}")
        chain.append(tensors)
        before = hashlib.sha256(content).hexdigest()
    if before != expected.parent:
        raise ValueError(f"parent of stage {key.name} must be the file {expected.parent}, got {before}")
    return chain


def _rows_digest(rows: Rows) -> str:
    """`slice_digest` of encoded records."""
    return slice_digest((name, row_digest(row)) for name, row in rows)


def _adapters(job: StageJob) -> SlicedAdapters:
    """The base with its adapters; the last one is kept, since a stage may take less time than loading it."""
    global _loaded
    config, expected = job.config, job.provenance.base
    lora = dataclasses.asdict(config.lora)
    which = json.dumps([expected, config.labels, config.slices, config.layers_per_slice, lora, config.stage.device])
    if _loaded is None or _loaded[0] != which:
        _loaded = None  # before the next one needs the memory
        adapters = SlicedAdapters(load_base(config.model, config.labels, expected), config).to(config.stage.device)
        _loaded = which, adapters
    return _loaded[1]  # if it has changed since it was loaded, the check after training finds out


@contextlib.contextmanager
def _surroundings(stage: StageConfig) -> Iterator[None]:
    """Everything of the process that bits depend on, set, and put back afterwards."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.get_default_dtype()
    try:
        torch.set_num_threads(stage.threads)
        torch.set_float32_matmul_precision("highest")
        torch.set_default_dtype(torch.float32)
        with contextlib.ExitStack() as stack:
            gpus = [stack.enter_context(_deterministic_gpu())] if stage.device == "cuda" else []
            modes = torch.inference_mode(False), torch.enable_grad(), torch.autocast(stage.device, enabled=False)
            for mode in (*modes, torch.random.fork_rng(devices=gpus)):
                stack.enter_context(mode)
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))  # not always: it costs time in every operation
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.set_default_dtype(before[2])


@contextlib.contextmanager
def _deterministic_gpu() -> Iterator[int]:
    """The number of the present GPU, on which every operation gives the same bits again, or is refused."""
    if not torch.cuda.is_available():
        raise ValueError("stage.device must be 'cpu' on a machine without a GPU, got 'cuda'")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts; torch refuses products without
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield torch.cuda.current_device()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _processor() -> str:
    """The processor's name; which kernels a library picks may depend on it."""
    information = Path("/proc/cpuinfo")
    for line in information.read_text().splitlines() if information.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
