"""Compiling a CUDA source without a GPU and reading what its kernels need."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

requires_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def compile_cu(path: str, arch: int) -> dict[str, dict[str, int]]:
    """Compile `path` (relative to the repository) for compute capability `arch` (80, 90).

    Returns:
        For every kernel, by mangled name: `registers`; `stack`, `spill_stores`, `spill_loads` and static `shared`
        memory in bytes.
    """
    command = ["nvcc", "-c", ROOT / path, "-o", "/dev/null", "-std=c++20", "-O3", "-DPYMAPE_CUDA"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas", "-v"]
    log = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stderr
    usage = {}
    for block in log.split("Compiling entry function '")[1:]:
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        registers = re.search(r"Used (\d+) registers", block).group(1)
        shared = re.search(r"(\d+) bytes smem", block)
        usage[block.split("'", 1)[0]] = {
            "registers": int(registers),
            "stack": int(stack),
            "spill_stores": int(stores),
            "spill_loads": int(loads),
            "shared": int(shared.group(1)) if shared else 0,
        }
    return usage
