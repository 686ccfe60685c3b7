"""What every GPU kernel takes of a multiprocessor, from compiling alone: `python -m benchmarks.compile_report`.

It needs no GPU. nvcc compiles the CUDA sources; Triton's kernels are compiled by their own launchers, called with
tensors of no memory, so that tiles and specialisations are those of a real launch. It writes `compile.json` and
`compile.md` in `docs/results`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pymape.storage.files import atomic_write

__all__ = ["main", "markdown", "resident_blocks"]

ROOT = Path(__file__).resolve().parent.parent
SHARED = {80: 164 * 1024, 90: 228 * 1024}  # bytes of shared memory of a multiprocessor, by compute capability
_REGISTERS, _WARPS, _BLOCKS = 65536, 64, 32  # of a multiprocessor, at both
_RESERVED = 1024  # bytes of shared memory that the driver takes for itself in every block
_NOTES = """
A row gives the largest need of a kernel's variants (in JSON, each has its own) at sm_80 / sm_90: registers and bytes of
stack of a thread, where spilled registers lie; KiB of shared memory of a block; and the fewest blocks that fit on a
multiprocessor at a time. At most 255 registers and 163 / 227 KiB can be had. `greedy_swap` also asks for 8 (M + 2 N)
bytes of shared memory when it is launched, where that fits, for M filters and N samples; it runs one block a layer, so
that one on a multiprocessor is all it needs. Of the tensor cores' instructions, sm_90 reaches its
full rate with `wgmma` only.
""".strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_report", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "results", help="of compile.json and compile.md")
    folder = parser.parse_args(arguments).folder
    sys.path.insert(0, str(ROOT / "tests"))
    kernels = [kernel for sm in SHARED for compiler in (_cuda, _triton) for kernel in compiler(sm)]
    for kernel in kernels:
        kernel["blocks"] = resident_blocks(kernel)
    report = {"command": "python -m benchmarks.compile_report", **_versions(), "kernels": kernels}
    for suffix, text in (("json", json.dumps(report, indent=1) + "\n"), ("md", markdown(report))):
        with atomic_write(folder / f"compile.{suffix}") as temporary:
            temporary.write_text(text)
    return 0


def resident_blocks(kernel: Mapping[str, Any]) -> int:
    """Return how many blocks of a kernel one multiprocessor holds at a time.

    Args:
        kernel: its `sm`, `registers` of a thread, `threads` of a block and bytes of `shared` memory of a block.

    Source: the occupancy calculation of NVIDIA's CUDA C++ Programming Guide; warps get registers by 256.
    """
    warps = kernel["threads"] // 32
    registers_of_warp = -(-kernel["registers"] * 32 // 256) * 256
    by_shared = SHARED[kernel["sm"]] // (kernel["shared"] + _RESERVED)
    return min(_BLOCKS, _WARPS // warps, _REGISTERS // registers_of_warp // warps, by_shared)


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a page: which kernels spill, and a table with a row for every kernel and tile."""
    kernels = report["kernels"]
    spilled = [kernel for kernel in kernels if kernel["stack"]]
    lines = [
        "# What the GPU kernels need",
        "",
        f"From compiling alone: `{report['command']}`, with nvcc {report['nvcc']} and Triton {report['triton']}. It "
        "shows what spills and what fits on a multiprocessor; how fast a kernel is, only a GPU can show "
        "([gpu.md](gpu.md)).",
        "",
        f"{len(kernels)} kernels, {len(spilled)} of them with a stack{':' if spilled else '.'}",
        "",
        *(f"- `{k['kernel']}` {k['tile']}, {k['variant']}, sm_{k['sm']}: {k['stack']} bytes" for k in spilled),
        *([""] if spilled else []),
        _NOTES,
        "",
        "| kernel | tile | variants | threads | registers | stack | shared KiB | blocks | tensor cores |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    source = None
    for (own, name, tile, _), variants in _rows(kernels).items():
        if own != source:
            lines.append(f"| **`{own}`** | | | | | | | | |")
            source = own
        by_sm = [[kernel for kernel in variants if kernel["sm"] == sm] for sm in SHARED]
        cells = [f"`{name}`", tile, str(max(map(len, by_sm))), str(variants[0]["threads"])]
        for need, most, scale in (("registers", max, 1), ("stack", max, 1), ("shared", max, 1024), ("blocks", min, 1)):
            values = [f"{most(kernel[need] for kernel in some) / scale:.3g}" if some else "-" for some in by_sm]
            cells.append(" / ".join(values))
        cores = [", ".join(sorted({kernel["tensor_cores"] for kernel in some} - {""})) or "-" for some in by_sm]
        cells.append(" / ".join(cores) if set(cores) != {"-"} else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(kernels: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    rows: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for kernel in sorted(kernels, key=lambda kernel: kernel["source"]):
        key = kernel["source"], kernel["kernel"], kernel["tile"], kernel["threads"]
        rows.setdefault(key, []).append(kernel)
    return rows


def _cuda(sm: int) -> Iterator[dict[str, Any]]:
    from cuda_tools import compile_cu

    for source in sorted((ROOT / "csrc").glob("*.cu")):
        path, block = source.relative_to(ROOT).as_posix(), re.search(r"kThreads = (\d+);", source.read_text())
        for mangled, needs in compile_cu(path, sm).items():
            name, variant = _demangled(mangled)
            needed = {key: needs[key] for key in ("registers", "stack", "shared")}
            launch = {"tile": "", "variant": variant, "sm": sm, "threads": int(block[1]) if block else 1024}
            yield {"source": path, "kernel": name, **launch, **needed, "tensor_cores": ""}


def _demangled(mangled: str) -> tuple[str, str]:
    """The kernel's name and its template arguments."""
    text = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout
    found = re.search(r"(\w+_kernel)<(.*?)>\(", text.replace("(anonymous namespace)::", "").replace("pymape::", ""))
    return (found[1], found[2]) if found else (mangled, "")


def _triton(sm: int) -> Iterator[dict[str, Any]]:
    from triton_launches import DTYPES, OPERATORS
    from triton_tools import compiled_launches

    for op, launches in OPERATORS.items():
        seen = set()
        for name, dtype in DTYPES.items():
            for label, call in launches(dtype):
                with compiled_launches(sm) as compiled:
                    call()
                for kernel in compiled:
                    tile = {key[6:]: size for key, size in kernel.options.items() if key.startswith("BLOCK_")}
                    row = {
                        "source": f"kernels/{op}.py",
                        "kernel": kernel.name.strip("_"),
                        "tile": ", ".join(f"{key} {size}" for key, size in tile.items()),
                        "variant": f"{name}, {label}",
                        "sm": sm,
                        "threads": kernel.threads,
                        "registers": kernel.registers,
                        "stack": kernel.stack,
                        "shared": kernel.shared,
                        "tensor_cores": kernel.tensor_cores,
                    }
                    if kernel.binary not in seen:  # what a launch has in common with an earlier one is listed once
                        seen.add(kernel.binary)
                        yield row


def _versions() -> dict[str, str]:
    import triton

    nvcc = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    release = re.search(r"V([\d.]+)", nvcc)
    return {"nvcc": release.group(1) if release else "unknown", "triton": triton.__version__}


if __name__ == "__main__":
    sys.exit(main())
