"""Testing Triton kernels without a GPU: run a test in Triton's interpreter, compile launches for a GPU architecture."""

import functools
import importlib
import multiprocessing
import operator
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

try:
    import triton
except ImportError:
    triton = None

# Bytes of shared memory that a block may ask for; sm_86 and sm_89, which have less than sm_80, use its tiles.
LARGEST_SHARED = {80: 99 * 1024, 90: 227 * 1024}

requires_triton = pytest.mark.skipif(triton is None, reason="triton is not installed")


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Decorate a test so that its body runs in a process that has TRITON_INTERPRET=1.

    Triton reads the variable when a kernel is decorated, so a process either compiles kernels or interprets them. One
    worker process serves the whole run; parameters (not fixtures) travel to it by pickle, failures travel back. There,
    the seed is 0 and uninitialised memory is NaN.
    """

    @requires_triton
    @functools.wraps(test)
    def in_worker(*args: Any, **kwargs: Any) -> None:
        _worker().submit(_call, test.__module__, test.__qualname__, args, kwargs).result()

    in_worker.body = test  # type: ignore[attr-defined]
    return in_worker


class Compiled(NamedTuple):
    """A kernel as it would have been launched, and what its binary needs."""

    name: str
    options: dict[str, Any]  # the keyword arguments of the launch: tile, warps, stages, flags
    binary: str  # a digest: launches that need the same binary have the same
    threads: int  # of a block
    registers: int  # of a thread
    stack: int  # bytes of a thread; spilled registers lie there
    shared: int  # bytes of a block
    tensor_cores: str  # "wgmma" (whole warp groups, sm_90 only), "mma" or ""


@contextmanager
def compiled_launches(sm: int) -> Iterator[list[Compiled]]:
    """Compile, for compute capability `sm` (80, 90), what the block launches, and run nothing.

    A launcher called with tensors on the `meta` device gives the tiles and specialisations of a real launch: meta
    tensors count as aligned to 16 bytes, as what torch allocates is. No GPU is needed.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("compiled_launches needs a process without TRITON_INTERPRET")
    launches: list[Compiled] = []
    run, active = JITFunction.run, driver._active

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        usage = _resource_usage(compiled.asm["cubin"])
        threads, stack = 32 * compiled.metadata.num_warps, usage["STACK"] + usage["LOCAL"]
        needs = (threads, usage["REG"], stack, compiled.metadata.shared)
        cores = next((name for name in ("wgmma", "mma") if f"{name}." in compiled.asm["ptx"]), "")
        launches.append(Compiled(kernel.fn.__name__, options, compiled.hash, *needs, cores))

    # Kernels are kept by device: each capability is a device of its own here, and none is device 0.
    absent = SimpleNamespace(
        get_current_device=lambda: sm,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", sm, 32),
    )
    JITFunction.run = compile_only
    driver.set_active(absent)
    try:
        yield launches
    finally:
        JITFunction.run, driver._active = run, active


def _resource_usage(cubin: bytes) -> dict[str, int]:
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


@functools.cache
def _worker() -> ProcessPoolExecutor:
    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        executor.submit(os.getpid).result()  # the process starts now and inherits the environment
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return executor


def _call(module: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills every `torch.empty`
    operator.attrgetter(name)(importlib.import_module(module)).body(*args, **kwargs)
