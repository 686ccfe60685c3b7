"""The one way a benchmark is timed, printed and written: rounds that alternate the contenders, medians, JSON."""

from __future__ import annotations

import functools
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pymape
from benchmarks.timing import measure, measure_on_device
from pymape.backends import resolve_backend
from pymape.storage.files import atomic_write

__all__ = [
    "Case",
    "Report",
    "add_rates",
    "alternate",
    "compare",
    "compiled",
    "doubled",
    "finished",
    "is_timed",
    "limits",
    "machine",
    "markdown",
    "other_backends",
    "peak_memory",
    "plot",
    "step",
]


@dataclass
class Case:
    """One line of a benchmark: measured, or with the reason why there is nothing to measure."""

    shape: str
    provider: str
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    figures: dict[str, float] = field(default_factory=dict)  # e.g. {"GB/s": 21.3, "x pymape": 2.1}
    reason: str = ""
    clock: str = "wall"  # of the times: "device" for a GPU's own


@dataclass
class Report:
    """All lines of one benchmark, with what is needed to read them later.

    Args:
        name, device: what is measured and where.
        notes: what a reader must know.
        cases: the lines so far.
        finished: whether these are all that there will be.
        path: file that is written whenever lines are added, so that a benchmark that is cut off leaves what it has.
    """

    name: str
    device: str
    notes: list[str] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    finished: bool = True
    path: Path | None = None

    def add(self, cases: Sequence[Case]) -> None:
        self.cases += cases
        if self.path is not None:
            self.write(self.path)

    def show(self) -> None:
        threads, version = torch.get_num_threads(), torch.__version__
        print(f"\n{self.name} on {self.device}: {_processor()}, {threads} threads, torch {version}")
        table = _table([asdict(case) for case in self.cases])
        widths = [max(map(len, column)) for column in zip(*table)]
        for row in table:
            cells = [
                cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            ]
            print("  ".join(cells))
        for note in self.notes:
            print(f"  {note}")

    def write(self, path: str | Path) -> None:
        with atomic_write(path) as temporary:
            found = {name: value for name, value in asdict(self).items() if name != "path"}
            temporary.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")


def _table(cases: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    figures = list(dict.fromkeys(name for case in cases for name in case["figures"]))
    reasons = ["not measured"] if any(case.get("reason") for case in cases) else []
    median = "device ms" if any(case.get("clock") == "device" for case in cases) else "median ms"
    columns = {median: "median_s", "p20": "p20_s", "p80": "p80_s"} if reasons or is_timed(cases) else {}
    rows = [["shape", "provider", *columns, *figures, *reasons]]
    for case in cases:
        times = ["" if case[name] is None else f"{1e3 * case[name]:.3f}" for name in columns.values()]
        values = [f"{case['figures'][name]:.3g}" if name in case["figures"] else "" for name in figures]
        rows.append([case["shape"], case["provider"], *times, *values, *(case.get("reason", "") for _ in reasons)])
    return rows


def is_timed(cases: Sequence[Mapping[str, Any]]) -> bool:
    """Whether any of the cases has a time; what only counts has none."""
    return any(case["median_s"] is not None for case in cases)


def markdown(report: Mapping[str, Any]) -> str:
    """Return a written report as a Markdown section with a table.

    Args:
        report: what `Report.write` wrote, read back.
    """
    where = report["machine"]
    header, *rows = _table(report["cases"])
    lines = [f"## {report['name']} on {report['device']}", ""]
    if not finished(report):
        lines += ["Not finished: the benchmark was cut off, and more was to be measured.", ""]
    lines += [f"{where['gpu'] or where['processor']}, torch {where['torch']}, commit {where['commit']}.", ""]
    lines += [f"| {' | '.join(row)} |" for row in (header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in report["notes"])]).rstrip() + "\n"


def finished(report: Mapping[str, Any]) -> bool:
    """Whether a written report has all its lines; those written before this was kept have."""
    return bool(report.get("finished", True))


def plot(report: Mapping[str, Any], path: str | Path) -> None:
    """Draw a written report: every time over that of its shape's first provider, with bars from p20 to p80.

    Args:
        report: what `Report.write` wrote, read back.
        path: file to write; its suffix names the format. An SVG is the same for the same report.
    """
    import matplotlib
    from matplotlib.figure import Figure

    measured = [case for case in report["cases"] if case["median_s"] is not None]
    shapes = list(dict.fromkeys(case["shape"] for case in measured))
    firsts = {shape: next(case for case in measured if case["shape"] == shape) for shape in shapes}
    providers = list(dict.fromkeys(case["provider"] for case in measured))
    with matplotlib.rc_context({"svg.hashsalt": report["name"], "font.size": 8}):
        figure = Figure(figsize=(9, 1.2 + 0.28 * len(shapes)), layout="constrained")
        axes = figure.subplots()
        for number, provider in enumerate(providers):
            cases = [case for case in measured if case["provider"] == provider]
            base = np.array([firsts[case["shape"]]["median_s"] for case in cases])
            low, middle, high = (np.array([c[n] for c in cases]) / base for n in ("p20_s", "median_s", "p80_s"))
            rows = [shapes.index(case["shape"]) for case in cases]
            bars = np.maximum(0, [middle - low, high - middle])
            style = {"fmt": "osD^v<>PX*"[number % 10], "color": f"C{number % 10}", "markersize": 4.5}
            axes.errorbar(middle, rows, xerr=bars, label=provider, linewidth=1, zorder=3, **style)
        times = [1e3 * firsts[shape]["median_s"] for shape in shapes]
        labels = [f"{shape}  ({x:{',.0f' if x >= 100 else '.3g'}} ms)" for shape, x in zip(shapes, times, strict=True)]
        axes.set_yticks(range(len(shapes)), labels)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:.0e}"[0] in "25" else "")
        axes.axvline(1, color="0.5", linewidth=0.8)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_xlabel(f"time / time of {firsts[shapes[0]]['provider']} (median; 20th to 80th percentile)")
        axes.set_title(f"{report['name']} on {report['machine']['gpu'] or report['machine']['processor']}")
        figure.legend(loc="outside lower center", ncols=3)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def machine() -> dict[str, Any]:
    """Return what a reader needs to judge the times: processor, threads, versions, commit."""
    commit = ""
    if shutil.which("git"):
        command = ["git", "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
        commit = found.stdout.strip()
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pymape": pymape.__version__,
        "commit": commit,
        # Where the output goes is of no use to a reader.
        "command": re.sub(r" --(json|plot)[ =]\S+", "", " ".join(sys.orig_argv[1:])),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def alternate(
    shape: str, contenders: Mapping[str, Callable[[], Any]], *, on_device: bool = False, **options: Any
) -> list[Case]:
    """Measure the contenders and return a `Case` for each.

    Args:
        shape, contenders: of `measure`.
        on_device: the times are those of the GPU's own clock, with "wall ms" beside them, the median from outside, and
            "% queued" where less than all was queued before the GPU began.
        options: of `measure` or `measure_on_device`.
    """
    if not on_device:
        return [Case(shape, name, *_spread(times)) for name, times in measure(contenders, **options).items()]
    cases = []
    for name, times in measure_on_device(contenders, **options).items():
        figures = {"wall ms": 1e3 * _spread(times.wall)[0]}
        if times.gapless < 1:
            figures["% queued"] = 100 * times.gapless
        cases.append(Case(shape, name, *_spread(times.device), figures, clock="device"))
    return cases


def _spread(times: np.ndarray) -> list[float]:
    return [float(np.percentile(times, q)) for q in (50, 20, 80)]


def compare(
    shape: str,
    providers: Mapping[str, Callable[[], Any]],
    *,
    exact: Callable[[], Any] | None = None,
    tolerance: float,
    unchecked: Mapping[str, Callable[[], Any]] | None = None,
    apart: Collection[str] = (),
    least_apart: int = 5,
    **options: Any,
) -> list[Case]:
    """Check what every provider computes, then measure those that are right, all in alternation.

    Calls whose results lie on a GPU are timed by its own clock, all others from outside.

    Args:
        shape: what the cases are of.
        providers: name -> call that returns a tensor, or tensors; the first is pymape's.
        exact: what they must agree with; default the first provider, which must then be checked elsewhere.
        tolerance: largest error allowed, as a share of the largest magnitude of each tensor.
        unchecked: further calls, which compute something else by their nature: a copy, a part of the work.
        apart: names of those that are measured after the others and alone: so slow that in between they would change
            the state in which a GPU does the rest.
        least_apart: their least number of rounds.
        options: of `measure`, or of `measure_on_device`.

    Returns:
        A case for each, in order. One that cannot run has the reason in place of times; measured ones have "x pymape",
        their time over the first one's, and on a GPU "peak MiB".

    Raises:
        RuntimeError: pymape's own result is wrong. That of another provider is a reason not to measure it.
    """
    first, calls = next(iter(providers)), {**providers, **(unchecked or {})}
    expected = _tensors((exact or providers[first])())
    reasons: dict[str, str] = {}
    for name, call in calls.items():
        try:
            result = call()
        except Exception as problem:  # whatever another library may raise
            if name == first:
                raise
            reasons[name] = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
            continue
        error = _largest_error(_tensors(result), expected) if name in providers else 0.0
        if not error <= tolerance:
            reasons[name] = f"differs by {error:.2g} of the largest value, more than {tolerance:g}"
            if name == first:
                raise RuntimeError(f"{first} at {shape} {reasons[name]}")
    right = [name for name in calls if name not in reasons]
    on_device = _on_gpu(expected)
    together = {name: calls[name] for name in right if name not in apart}
    measured = alternate(shape, together, on_device=on_device, **options)
    for name in (name for name in right if name in apart):
        alone = options | {"least": least_apart}
        measured += alternate(shape, {name: calls[name]}, on_device=on_device, **alone)
    for case in measured:
        case.figures["x pymape"] = case.median_s / measured[0].median_s
        if torch.cuda.is_available():
            case.figures["peak MiB"] = peak_memory(calls[case.provider])
    found = {case.provider: case for case in measured}
    return [found.get(name) or Case(shape, name, reason=reasons[name]) for name in calls]


def other_backends(op: str, supported: tuple[str, ...], device: str) -> tuple[str, ...]:
    """The GPU backends of an operator which `auto` does not choose there; on a CPU none.

    Against its own choice `auto` could only lose, by noise.

    Args:
        op: the operator's name.
        supported: its backends, in the order in which `auto` tries them.
        device: "cpu" or "cuda".
    """
    if device == "cpu":
        return ()
    own = resolve_backend(op, "auto", torch.device(device), supported=supported)
    return tuple(backend for backend in supported if backend in ("triton", "cuda") and backend != own)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under torch.compile, for static shapes.

    It forgets all that was compiled before: after eight shapes, torch would run the function uncompiled.
    """
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def step(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return the function's output and, by a backward pass, the gradients of its inputs.

    Args:
        function: takes the inputs.
        inputs: all of which require a gradient.
        grad: the gradient of the output.
    """
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad)


def doubled(inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return copies in fp64 that require a gradient."""
    return tuple(x.detach().double().requires_grad_() for x in inputs)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def _on_gpu(tensors: Sequence[torch.Tensor]) -> bool:
    return all(tensor.is_cuda for tensor in tensors)


def _largest_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest deviation in any tensor, each as a share of its largest magnitude."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        raise ValueError(f"shapes are {[tuple(x.shape) for x in found]}, not {[tuple(x.shape) for x in expected]}")
    return max(
        float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
        for one, other in ((x.double(), y.double()) for x, y in zip(found, expected))
    )


def add_rates(cases: Sequence[Case], device: str, dtype: torch.dtype, *, moved: int = 0, operations: int = 0) -> None:
    """Give the measured cases their rates, and these as a share of what the device does at best in the same run.

    Args:
        cases: of one shape.
        device, dtype: what the limits are to be of.
        moved: bytes that must be read and written; 0 for none that matter.
        operations: additions and multiplications; 0 for none that matter.
    """
    for case in (case for case in cases if case.median_s is not None):
        for unit, limit, amount in (("GB/s", "% of copy", moved / 1e9), ("TFLOP/s", "% of GEMM", operations / 1e12)):
            if amount:
                case.figures[unit] = amount / case.median_s
                case.figures[limit] = 100 * case.figures[unit] / limits(device, dtype)[unit]


@functools.cache
def limits(device: str, dtype: torch.dtype) -> dict[str, float]:
    """Measure, once a run, what the device can do at best.

    Returns:
        "GB/s": 1e9 bytes a second, read and written, of a copy far larger than the caches; "TFLOP/s": 1e12 operations a
        second of a large square product.
    """
    on_gpu = torch.device(device).type == "cuda"
    source = torch.ones((1 << 30 if on_gpu else 1 << 27) // dtype.itemsize, dtype=dtype, device=device)
    target, side = torch.empty_like(source), 8192 if on_gpu else 1024
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: left @ right}
    copy, product = alternate("limits", calls, on_device=on_gpu, seconds=0.5)
    moved = 2 * source.numel() * source.element_size()
    return {"GB/s": moved / copy.median_s / 1e9, "TFLOP/s": 2 * side**3 / product.median_s / 1e12}


def peak_memory(call: Callable[[], Any]) -> float:
    """Return the MiB of device memory that a call on the GPU takes at its peak, beyond what was held before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
