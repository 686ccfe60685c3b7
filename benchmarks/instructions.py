"""Instructions that the CPU kernels execute, counted by callgrind: `python -m benchmarks.instructions`.

Times differ from machine to machine and run to run; this count does not. Each kernel runs on one thread in a process
of its own, once and twice: the difference is one call. Valgrind knows no AVX-512, so it is the AVX2 version that is
counted. The result is `benchmarks/results/instructions.json`.
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
from pymape.files import atomic_write

__all__ = ["count", "main", "markdown"]

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
# As in CMakeLists.txt.
_FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "instructions.json")
    path = parser.parse_args(arguments).json
    missing = [program for program in ("valgrind", "g++") if shutil.which(program) is None]
    if missing:
        print(f"missing programs: {', '.join(missing)}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "instructions"
        sources = [source for source in (ROOT / "csrc").glob("*.cpp") if source.name != "bindings.cpp"]
        command = ["g++", *_FLAGS, f"-I{ROOT / 'csrc'}", ROOT / "benchmarks" / "instructions.cpp", *sources]
        subprocess.run([*map(str, command), "-o", str(program)], check=True)
        counts = [count(program, kernel, dtype) for kernel in KERNELS for dtype in DTYPES]
    report = {"machine": machine(), "counts": counts}
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
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
