"""Testing Triton kernels without a GPU: run a test in Triton's interpreter, compile a kernel for a GPU architecture."""

import functools
import importlib
import multiprocessing
import operator
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

try:
    import triton
except ImportError:
    triton = None

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


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    sm: int,
    num_warps: int = 4,
    num_stages: int = 3,
) -> dict[str, int]:
    """Compile a `triton.jit` kernel for compute capability `sm` (80, 90) and read what the binary needs.

    Args:
        kernel: the kernel, undecorated by autotuners and heuristics.
        signature: type of every run-time argument, such as `"*fp16"`, `"*i1"`, `"i32"`, `"fp32"`; pointers and, when
            written `"i32:16"`, integers are taken to be divisible by 16, as in a launch with aligned tensors.
        constexprs: value of every `tl.constexpr` argument.

    Returns:
        `REG`, `STACK` and `LOCAL` of `cuobjdump`, registers and bytes a thread (spills show in the latter two), and
        `SHARED`, the bytes of shared memory that a launch asks for.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError("compile_kernel needs a process without TRITON_INTERPRET")
    arguments = {name: str(signature[name]) if name in signature else "constexpr" for name in kernel.arg_names}
    missing = set(kernel.arg_names) - set(signature) - set(constexprs)
    if missing:
        raise ValueError(f"signature and constexprs must cover every argument, missing {sorted(missing)}")
    aligned = [name.startswith("*") or name.endswith(":16") for name in arguments.values()]
    attrs = {(i,): [["tt.divisibility", 16]] for i, is_aligned in enumerate(aligned) if is_aligned}
    source = ASTSource(
        fn=kernel,
        signature={name: kind.removesuffix(":16") for name, kind in arguments.items()},
        constexprs=dict(constexprs),
        attrs=attrs,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", sm, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    return _resource_usage(compiled.asm["cubin"]) | {"SHARED": compiled.metadata.shared}


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
