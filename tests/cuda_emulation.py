"""The CUDA kernels compiled for the CPU with `cuda_emulator/`, and the operators made to run on them."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import importlib.util
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
_OPERATORS = ("greedy_swap", "masked_activation", "masked_attention", "module_scores")

requires_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@functools.cache
def emulated_core() -> ModuleType:
    """The native core with its CUDA kernels for the emulator; compiled once for the same sources."""
    sources = sorted((ROOT / "csrc").iterdir()) + sorted((ROOT / "tests" / "cuda_emulator").iterdir())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    library = ROOT / "build" / "cuda_emulator" / digest / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    library.parent.mkdir(parents=True, exist_ok=True)
    with open(library.parent / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that need it, one compiles
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                _compile(Path(folder) / library.name)
                (Path(folder) / library.name).replace(library)
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(library: Path) -> None:
    sources = [str(path) for path in (ROOT / "csrc").glob("*.cpp")]
    for path in (ROOT / "csrc").glob("*.cu"):
        translated = library.parent / f"{path.stem}_cuda.cpp"
        translated.write_text(_translated(path.read_text()))
        sources.append(str(translated))
    # An access that is not aligned to its 16 bytes stops the process, as it would on a GPU.
    checks = ("-fsanitize=alignment", "-fno-sanitize-recover=alignment")
    folders = (ROOT / "tests" / "cuda_emulator", ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fopenmp", "-DPYMAPE_CUDA", *checks, *sources]
    command += [f"-I{folder}" for folder in folders] + ["-o", str(library)]
    subprocess.run(command, check=True)


def _translated(source: str) -> str:
    """Turn what only a CUDA compiler understands into C++: launches, and shared memory that is sized at launch."""
    source = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];",
        r"\1* \2 = reinterpret_cast<\1*>(emulator::machine.dynamic_shared.data());",
        source,
    )
    launch = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>\((.*?)\);", re.DOTALL)
    return launch.sub(r"emulator::launch(\2, [&] { \1(\3); });", source)


class _OnDevice:
    """A CPU tensor that says it is on a GPU; the core reads attributes only."""

    is_cpu, is_cuda, device = False, True, SimpleNamespace(index=0)

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype, self.stride, self.data_ptr = tensor.shape, tensor.dtype, tensor.stride, tensor.data_ptr


class _Core:
    """The emulated core, whose CUDA functions take CPU tensors."""

    has_cuda = True

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(emulated_core(), name)
        if not name.endswith("_cuda"):
            return function
        return lambda *arguments: function(*(_OnDevice(x) if isinstance(x, Tensor) else x for x in arguments))


@pytest.fixture
def emulated_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `backend="cuda"` run the CUDA kernels in the emulator, on CPU tensors."""
    for op in _OPERATORS:
        monkeypatch.setattr(importlib.import_module(f"pymape.ops.{op}"), "native", _Core)
    monkeypatch.setattr("pymape.backends._why_not", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))
