"""Instructions of the CPU kernels, counted by callgrind, and their vector widths: `python -m benchmarks.instructions`.

Times differ from machine to machine and run to run; this count does not. Each kernel runs on one thread in a process
of its own, once and twice: the difference is one call. Valgrind does not execute AVX-512, so the AVX2 version is
counted. The disassembly shows whether both versions of a function use the registers that they are for. The result is
`benchmarks/results/instructions.json`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine
from pymape.storage.files import atomic_write

__all__ = ["count", "main", "markdown", "vector_registers"]

ROOT = Path(__file__).resolve().parent.parent
KERNELS = (
    "module_scores",
    "gate_heads",
    "gate_heads_backward",
    "masked_activation gelu",
    "masked_activation_backward gelu",
    "masked_activation silu, gated",
    "masked_activation_backward silu, gated",
    "greedy_swap",
)
DTYPES = ("float32", "bfloat16", "float16")
_FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "instructions.json")
    path = parser.parse_args(arguments).json
    missing = [program for program in ("valgrind", "g++", "objdump") if shutil.which(program) is None]
    if missing:
        print(f"missing programs: {', '.join(missing)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "instructions"
        sources = [source for source in (ROOT / "csrc").glob("*.cpp") if source.name != "bindings.cpp"]
        command = ["g++", *_FLAGS, f"-I{ROOT / 'csrc'}", ROOT / "benchmarks" / "instructions.cpp", *sources]
        subprocess.run([*map(str, command), "-o", str(program)], check=True)
        command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", str(program)]
        versions = vector_registers(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        counts = [count(program, kernel, dtype) for kernel in KERNELS for dtype in DTYPES]
    report = {"machine": machine(), "counts": counts, "versions": versions}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    print(markdown(report))
    return 0


def count(program: Path, kernel: str, dtype: str) -> dict[str, Any]:
    """Return the instructions of one call and of one element of it."""
    collected, elements = [], 0
    valgrind = ("valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null")
    for calls in (1, 2):
        command = [*valgrind, str(program), kernel, dtype, str(calls)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found = re.search(r"Collected : (\d+)", result.stderr)
        if found is None:
            raise RuntimeError(f"callgrind must report what it collected, got {result.stderr[-200:]!r}")
        collected.append(int(found[1]))
        elements = int(result.stdout)
    instructions = collected[1] - collected[0]
    return {"kernel": kernel, "dtype": dtype, "instructions": instructions, "per element": instructions / elements}


def vector_registers(disassembly: str) -> list[dict[str, Any]]:
    """Count, for every multiversioned function, the instructions on 256-bit and on 512-bit registers.

    Args:
        disassembly: of `objdump --disassemble --demangle`.

    Returns:
        For each function "AVX2", the instructions of that version on 256-bit registers, and "AVX-512", those of the
        other on 512-bit registers.

    Raises:
        ValueError: a version is missing, or does not use its registers.
    """
    names = {"arch_x86_64_v3": "%ymm", "arch_x86_64_v4": "%zmm"}
    found: dict[str, dict[str, int]] = {}
    for block in disassembly.split("\n\n"):
        block = block.replace("(anonymous namespace)::", "")
        title = re.match(r"[0-9a-f]+ <(?:\w+::)*(\w+)\((.*)\) \[clone \.(\w+)\]>:", block)
        if title is None or title[3] not in names:
            continue
        types = dict.fromkeys(re.findall(r"double|float|BFloat16|Half", title[2]))
        function = f"{title[1]}, {' and '.join(types)}"
        found.setdefault(function, {})[title[3]] = sum(names[title[3]] in line for line in block.splitlines())
    for function, versions in found.items():
        if versions.keys() != names.keys() or 0 in versions.values():
            raise ValueError(f"{function} must have AVX2 and AVX-512 versions that use their registers, got {versions}")
    return [
        {"function": function, "AVX2": versions["arch_x86_64_v3"], "AVX-512": versions["arch_x86_64_v4"]}
        for function, versions in sorted(found.items())
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """Return the counts as a section with a table, a row for every kernel."""
    where, counts = report["machine"], {(row["kernel"], row["dtype"]): row for row in report["counts"]}
    lines = [
        "## Instructions of the CPU kernels",
        "",
        "Instructions for every element, counted by callgrind in the AVX2 version on one thread: 4 x 128 tokens, 3,072 "
        "filters or 12 heads of 64. Of `greedy_swap`: for every gradient (64 + 64 samples, 3,072 filters) and each of "
        f"100 swaps, with loading and the objective. Commit {where['commit']}, `python {where['command']}`.",
        "",
        f"| kernel | {' | '.join(DTYPES)} |",
        f"| --- | {' | '.join('---:' for _ in DTYPES)} |",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in report["counts"]):
        cells = [f"{counts[kernel, dtype]['per element']:.2f}" for dtype in DTYPES]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    lines += [
        "",
        "Instructions in the code of each function that work on the registers which a version is for: 256 bits wide in "
        "the AVX2 version, 512 in the AVX-512 version.",
        "",
        "| function and types | AVX2 | AVX-512 |",
        "| --- | ---: | ---: |",
        *(f"| {row['function']} | {row['AVX2']} | {row['AVX-512']} |" for row in report["versions"]),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
