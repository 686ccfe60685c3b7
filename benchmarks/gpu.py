"""Everything a GPU machine has to show, part by part: `python -m benchmarks.gpu [PART ...]`, or `make gpu`.

Each part takes minutes, needs no network and leaves `build/gpu/GPU/SOURCES/PART.json`, where SOURCES is a digest of the
package's code and of the part's own scripts: a part that passed for the same sources on the same GPU is skipped, so
that a run that was cut off goes on, and a change to one benchmark leaves the others' results alone. At the end what the
benchmarks have measured, up to where one was cut off, is gathered in `benchmarks/results/GPU.json` and `GPU.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import targets
from benchmarks.harness import markdown, plot
from benchmarks.shapes import DECODERS, ENCODERS
from pymape.storage.files import atomic_write

__all__ = ["BENCHMARKS", "Part", "archive", "gather", "main", "parts", "run", "run_all", "source_digest"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIMIT = 480  # seconds a part may take
# Part -> arguments of `python -m benchmarks`. What compiles much is divided, so that each part stays within the limit.
BENCHMARKS = {
    "tiles": ("tiles",),
    "module_scores": ("module_scores",),
    "attention_short": ("masked_attention", "--parts", "long", "--tokens", "512", "1024"),
    "attention_long": ("masked_attention", "--parts", "long", "--tokens", "2048", "8192"),
    "attention_encoders": ("masked_attention", "--parts", "gates", "layers", "--layers", *ENCODERS),
    "attention_decoders": ("masked_attention", "--parts", "layers", "--layers", *DECODERS),
    "attention_closed": ("masked_attention", "--parts", "closed"),
    "ffn_block": ("masked_ffn", "--parts", "block"),
    "greedy_swap": ("greedy_swap",),
    "importance": ("importance",),
    "partial_llama": ("partial", "--models", "llama"),
    "ffn_activation": ("masked_ffn", "--parts", "activation"),
    "selected_weight_grad": ("selected_weight_grad",),
    "segmented_lora": ("segmented_lora",),
    "search": ("search",),
    "s3t_ensemble": ("s3t_ensemble",),
    "partial_bert": ("partial", "--models", "bert"),
}
# In the mangled name of a CUDA kernel, by its namespace, and in the name of a Triton kernel.
OWN_KERNELS = "pymape|_masked_attention_|_masked_ffn_|_masked_activation_|_segmented_lora_|_selected_weight_grad_"
# Seconds that a part may well take, most of them to compile; those that are not listed take less than two minutes.
_EXPECTED = {"build": 240, "operators": 240, "tiles": 240, "models": 180} | dict.fromkeys(
    (name for name in BENCHMARKS if name.startswith(("attention_", "partial_"))), 240
)
_MEASURING = ("benchmarks/harness.py", "benchmarks/timing.py", "benchmarks/shapes.py")
_OPERATORS = "benchmarks/gpu_operators.py"
_MODEL_TESTS = ("tests/test_instrumented_models.py", "tests/test_importance.py", "tests/test_fused.py")


@dataclass(frozen=True)
class Part:
    """One command of the run, with the folder for what it leaves.

    `needs` names a program or a package without which it is skipped, and says so. `again`: it runs even if it passed
    before, because it takes seconds then, and the folder may have been brought from elsewhere.
    """

    name: str
    command: Sequence[str]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None
    again: bool = False


def parts(arch: str, place: Path) -> list[Part]:
    """Return all parts in order: first what must work, then what the targets need, as a run may be cut off.

    Args:
        arch: CUDA architecture to build for, such as `"90"`.
        place: holds the folders of all parts.
    """
    python, pytest = sys.executable, (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q")
    # Most of the time goes into compiling Triton kernels, one after the other in each process.
    workers = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    search = {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT}", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    build = {"CMAKE_ARGS": f"-DPYMAPE_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES={arch}"}
    # The tiles come first, because what they show may change the kernels that all others measure.
    aimed_at = {"tiles"} | {name for target in targets.TARGETS for name in target.parts}
    return [
        Part("build", (python, "setup.py", "build_ext", "--inplace"), place / source_digest(), build, again=True),
        Part("operators", (*pytest, *workers, _OPERATORS), _checks(place), search),
        *(_benchmark(name, place) for name in BENCHMARKS if name in aimed_at),
        _sanitizer("memcheck", (*pytest, _OPERATORS, "-k", "tiny"), place, search),
        Part("models", (*pytest, *workers, *_MODEL_TESTS, "-k", "gpu"), place / source_digest("tests"), search),
        Part("s3t", (*pytest, "tests/test_s3t_gpu.py"), place / source_digest("tests"), search, needs="peft"),
        *(_benchmark(name, place) for name in BENCHMARKS if name not in aimed_at),
        _sanitizer("racecheck", (*pytest, _OPERATORS, "-k", "tiny"), place, search),
    ]


def _checks(place: Path) -> Path:
    return place / source_digest(_OPERATORS, "tests/conftest.py")


def _sanitizer(tool: str, command: Sequence[str], place: Path, environment: Mapping[str, str]) -> Part:
    # Calls of the CUDA interface that fail harmlessly are torch's and its libraries' affair, as are their kernels.
    sanitizer = (
        *("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "application-only"),
        *("--report-api-errors", "no", "--kernel-name", f"regex={OWN_KERNELS}"),
    )
    # The caching allocator would hide an access past the end of a tensor inside its own larger block.
    environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Part(tool, (*sanitizer, *command), _checks(place), environment, needs="compute-sanitizer")


def _benchmark(name: str, place: Path) -> Part:
    op, *options = BENCHMARKS[name]
    folder = place / source_digest(*_MEASURING, f"benchmarks/bench_{op}.py")
    command = (sys.executable, "-m", "benchmarks", op, *options, "--device", "cuda")
    needs = "peft" if op == "s3t_ensemble" else None
    return Part(name, (*command, "--json", str(folder / f"{name}.json")), folder, needs=needs)


def source_digest(*scripts: str, root: Path = ROOT) -> str:
    """Return a digest of the package's sources and of further files, or all in further folders; it needs no git."""
    digest = hashlib.sha256()
    files = {root / "CMakeLists.txt", root / "setup.py"}
    for name in ("csrc", "kernels", "pymape", *scripts):
        found = [root / name] if (root / name).is_file() else (root / name).rglob("*")
        files |= {path for path in found if path.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}}
    for path in sorted(files):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _record(part: Part) -> Path:
    """The file that tells that a part has passed."""
    return part.folder / f"{part.name}.done.json"


def run(part: Part, limit: float = LIMIT) -> bool:
    """Run a part unless it passed before; return whether it passed or was skipped for want of a program.

    Args:
        part: what to run, in the repository's root; its folder gets `PART.done.json` and the output, `PART.log`.
        limit: seconds after which the part is stopped and counts as failed.
    """
    folder, record = part.folder, _record(part)
    if record.exists() and not part.again:
        print(f"{part.name}: passed before, skipped", flush=True)
        return True
    if part.needs is not None and not (shutil.which(part.needs) or importlib.util.find_spec(part.needs)):
        print(f"{part.name}: skipped, {part.needs} is not installed", flush=True)
        return True
    folder.mkdir(parents=True, exist_ok=True)
    log, start = folder / f"{part.name}.log", time.monotonic()
    with log.open("w") as output:
        command = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **part.environment},
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that what it has started ends with it
        )
        try:
            status = command.wait(limit)
            outcome = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"stopped after {limit:g} s"
        finally:
            if command.poll() is None:
                os.killpg(command.pid, signal.SIGKILL)
                command.wait()
    seconds = time.monotonic() - start
    print(f"{part.name}: {outcome}, {seconds:.0f} s, {log}", flush=True)
    if outcome != "passed":
        print("\n".join(log.read_text(errors="replace").splitlines()[-20:]), flush=True)
        return False
    with atomic_write(record) as temporary:
        temporary.write_text(json.dumps({"command": list(part.command), "seconds": round(seconds, 1)}, indent=1) + "\n")
    return True


def run_all(chosen: Sequence[Part], end: float = math.inf) -> list[str]:
    """Run parts in order, none beyond `end` on the monotonic clock; return the names of those that did not pass.

    A part that is cut off has to begin anew, so that none but the first starts in less time than it may well take.
    Nothing runs after a build that failed.
    """
    left = [part.name for part in chosen]
    begun = False  # something that takes its time
    for part in chosen:
        seconds = end - time.monotonic()
        short = part.again or _record(part).exists()
        if seconds <= 0:
            print(f"{part.name}: not started, the time is up", flush=True)
            continue
        if begun and not short and seconds < _EXPECTED.get(part.name, 120):
            print(f"{part.name}: not started, {seconds:.0f} s may not be enough", flush=True)
            continue
        begun = begun or not short
        if run(part, min(LIMIT, seconds)):
            left.remove(part.name)
        elif part.name == "build":
            break
    return left


def gather(place: Path, gpu: str, results: Path = RESULTS) -> Path | None:
    """Write what the benchmarks left in `place` to `results/GPU.json` and `GPU.md`; return the former, or None.

    Where matplotlib is installed, each is drawn to `results/GPU/PART.svg` too.
    """
    files = {name: _benchmark(name, place).folder / f"{name}.json" for name in BENCHMARKS}
    reports: dict[str, dict[str, Any]] = {
        name: json.loads(path.read_text()) for name, path in files.items() if path.exists()
    }
    if not reports:
        return None
    path = results / f"{_file_name(gpu)}.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(reports, indent=1) + "\n")
    with atomic_write(path.with_suffix(".md")) as temporary:
        sections = [f"# {gpu}\n", targets.table(reports), *map(markdown, reports.values())]
        temporary.write_text("\n".join(sections))
    if importlib.util.find_spec("matplotlib"):
        for name, report in reports.items():
            plot(report, path.with_suffix("") / f"{name}.svg")
    return path


def archive(folder: Path) -> Path:
    """Pack the parts' records and outputs and the gathered results into `folder/gpu.tar.gz`, and return that."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu.tar.gz"
    with tarfile.open(path, "w:gz") as packed:
        for source in (ROOT / "build" / "gpu", RESULTS):
            if source.exists():
                packed.add(source, source.relative_to(ROOT))
    return path


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    names = [part.name for part in parts("", Path())]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end the run after so long; default: never")
    parser.add_argument("--archive", type=Path, metavar="FOLDER", help="pack all that has been found into FOLDER")
    options = parser.parse_args(arguments)
    chosen, end = options.parts or names, time.monotonic() + options.seconds
    unknown = sorted(set(chosen) - set(names))
    if unknown:
        parser.error(f"PART must be one of {', '.join(names)}, got {', '.join(unknown)}")
    if not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees no CUDA device, so nothing was run", file=sys.stderr)
        return 1
    packages, programs = ("triton", "transformers", "numpy", "pytest", "pybind11"), ("cmake", "ninja")
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    missing += [name for name in programs if shutil.which(name) is None]
    if missing:
        print(f"missing: {', '.join(missing)}", file=sys.stderr)
        return 1
    gpu, arch = torch.cuda.get_device_name(), "{}{}".format(*torch.cuda.get_device_capability())
    place = ROOT / "build" / "gpu" / _file_name(gpu)
    failed = run_all([part for part in parts(arch, place) if part.name in chosen], end)
    path = gather(place, gpu)
    print(f"results: {path}" if path else "no benchmark has run yet")
    if options.archive is not None:
        print(f"archive: {archive(options.archive)}")
    if failed:
        print(f"not passed: {', '.join(failed)}; the same command goes on with these", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
