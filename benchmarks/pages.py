"""Write `docs/benchmarks.md` with its figures, and `docs/results/gpu.md`: `python -m benchmarks.pages`."""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import instructions, targets
from benchmarks.harness import is_timed, markdown, plot
from pymape.storage.files import atomic_write

__all__ = ["cpu_page", "gpu_page", "main"]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# In the order of the page; what has no result file is left out.
OPERATORS = (
    "module_scores",
    "masked_attention",
    "masked_ffn",
    "greedy_swap",
    "selected_weight_grad",
    "segmented_lora",
    "simulate_deletions",
    "threads",
    "tiles",
)
END_TO_END = ("importance", "search", "partial", "partial_peak", "s3t_ensemble", "s3t_training", "s3t_deletion")

_CPU = """
# Benchmarks

<!-- written by `python -m benchmarks.pages` from benchmarks/results; edit benchmarks/pages.py instead -->

How fast pymape is on a CPU, against the usual ways to do the same with PyTorch. All figures are generated from the JSON
files in `benchmarks/results`, which name the processor, the versions, the commit and the command.

| command | what it does |
| --- | --- |
| `python -m benchmarks OP` | measures one operator or task, such as `module_scores`; `--help` lists the names, \
`--json FILE` says where the result goes, `--plot FILE.svg` (or `.png`) draws it |
| `make bench` | measures all of them and writes this page |
| `python -m benchmarks.instructions` | counts instructions with valgrind, which no other program disturbs |
| `python -m benchmarks.compile_report` | compiles the GPU kernels, without a GPU: \
[results/compile.md](results/compile.md) |
| `make gpu` | on a machine with an NVIDIA GPU: checks and measures everything, [results/gpu.md](results/gpu.md) |
| `python -m benchmarks.pages` | writes this page anew from the JSON files |

## How to read it

- Every provider's result is checked before it is timed, most against fp64. One that cannot run here, or is wrong, is
  listed with the reason.
- Providers take turns, call by call, so that whatever else the machine does hits all alike; the table has the median
  and the 20th and 80th percentile. The C library keeps what is freed: no provider pays for pages from the system.
- `x pymape`: time over that of pymape's own choice of backend, the first row; above 1, pymape is faster.
- `speed-up`: time of the plain way over the time of this row; above 1, this row is faster.
- `% of copy`, `% of GEMM`: the rate as a share of what torch's `copy_` of data larger than the caches and a large
  product reach in the same run. Above 100, the data were in a cache.
- Shapes are those of one layer of BERT-base, RoBERTa-large, ViT-B/16, GPT-2 and Llama-3-8B, with batches that two cores
  work through in a fraction of a second; torch.compile runs for BERT-base only, because it compiles for ten seconds a
  shape.
""".strip()

_GPU = """
# GPU kernels: targets

<!-- written by `python -m benchmarks.pages`; edit benchmarks/pages.py or benchmarks/targets.py instead -->

On a machine with an NVIDIA GPU, `make gpu` builds the core for that GPU, runs the checks and the benchmarks, and writes
`benchmarks/results/GPU.json` and `GPU.md`, which begins with this table filled in. `make gpu PARTS="build operators"`
runs some parts; parts that passed for the same sources are skipped, so that the same command goes on after a break, and
results are written after every comparison. `python -m benchmarks.gpu --seconds 540 --archive FOLDER` ends after so
long, and packs what it has found into FOLDER. The run needs
torch, triton, transformers, numpy, pytest, pybind11, cmake and ninja, and no network. Then
`python -m benchmarks.pages --gpu benchmarks/results/GPU.json` puts the figures below.

What can be checked without a GPU is: the Triton kernels run in Triton's interpreter, the CUDA kernels in an emulator
(`tests/cuda_emulator`), both against fp64 references; and all of them are compiled for sm_80 and sm_90
([compile.md](compile.md)).

Times of single operators are the GPU's own: events around the call, with the caches flushed before and the work queued
while the GPU waits, so that neither Python nor the launches are in them. The column is called `device ms`; `wall ms`
beside it is the time from outside, from the call until the GPU is done, with the caches as the call before left them.
`% queued` stands where a call waits for the GPU itself, so that some of the host's time is in `device ms`. Whole passes
and steps (importance, search, partial, greedy swaps, the S3T ensemble) are timed from outside.

## Targets

All ratios are to be taken in one run on an H100 or H200; of several shapes, the worst counts.
""".strip()


_OPEN = """
## What the first run has to decide

- `masked_attention`: `auto` takes Triton at every length. `pymape, cuda` is the kernel that torch chooses (on an H100
  cuDNN's, as a rule) with the fused gate, so that at 8192 tokens the target against cuDNN allows what the target
  against the best composition forbids. If the rows `step, ...` show `pymape, cuda` ahead from some length on, `auto` is
  to take it from there, unless a closed head can be skipped.
- `masked_ffn`: `auto` takes Triton's own product at every width. The rows `block step, ...` of `pymape, cuda`, cuBLAS
  with a fused activation, tell at which widths that is right.
- `greedy_swap`: one block works on a layer; whether that is enough for its target.
- The partial step: counted on tensors without data ([partial_peak](../benchmarks.md#partial_peak-on-cpu)), its peak
  with 22 layers is {kept:.3f} x that of masked gradients with activations kept, so that what the allocator adds decides
  about the target, and {anew:.2f} x with activations computed anew. Without the fused norms and feed-forward blocks,
  which a GPU runs by default, the first would be {unfused:.2f} x; against masked gradients with the same fused parts it
  is {fused:.2f} x, so that half of the gain is theirs. Of the products' operations {work:.2f} x are left:
  whatever is gained in time beyond {bound:.2f} x has to come from those fused parts, and from gradients and optimizer
  state that are neither written nor read. The rows `partial, original code` and `masked gradients, fused` tell what
  these give.
""".strip()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", type=Path, help="a GPU.json of `make gpu`; default: nothing has been measured")
    gpu = parser.parse_args(arguments).gpu
    pages = {"benchmarks.md": cpu_page(RESULTS), "results/gpu.md": gpu_page(json.loads(gpu.read_text()) if gpu else {})}
    for path, page in pages.items():
        with atomic_write(ROOT / "docs" / path) as temporary:
            temporary.write_text(page)
    for name, report in _reports(RESULTS).items():
        if is_timed(report["cases"]):
            plot(report, ROOT / "docs" / _figure(name))
    return 0


def cpu_page(results: Path) -> str:
    """Return the page on the CPU results found in a folder."""
    reports = _reports(results)
    sections = [_CPU, "", _summary(list(reports.values()))]
    for title, names in (("## Operators", OPERATORS), ("## End to end", END_TO_END)):
        sections += [title, "", *(_section(reports[name]) for name in names if name in reports)]
        counts = results / "instructions.json"
        if names is OPERATORS and counts.exists():
            sections.append("#" + instructions.markdown(json.loads(counts.read_text())))
    return "\n".join(sections)


def _reports(results: Path) -> dict[str, dict[str, Any]]:
    """The CPU results found in a folder, in the order of the page."""
    return {
        name: json.loads(path.read_text())
        for name in (*OPERATORS, *END_TO_END)
        if (path := results / f"{name}-cpu.json").exists()
    }


def _figure(name: str) -> str:
    return f"figures/bench_{name}.svg"


def _summary(reports: Sequence[Mapping[str, Any]]) -> str:
    """How the contenders compare, over all shapes of a benchmark."""
    lines = [
        "## In short",
        "",
        "Over all shapes of a benchmark: how many times as long as pymape a provider takes (`x pymape`), or how many "
        "times as fast as the plain way a row is (`speed-up`). Above 1, pymape is faster. What does only a part of the "
        "work, such as a copy or a frozen layer alone, shows how far away the limit is.",
        "",
        "| benchmark | row | figure | shapes | least | median | most |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for report in reports:
        found: dict[tuple[str, str], list[float]] = {}
        for case in report["cases"]:
            for figure in ("x pymape", "speed-up"):
                if figure in case["figures"] and not (figure == "x pymape" and case["provider"] == "pymape"):
                    found.setdefault((case["provider"], figure), []).append(case["figures"][figure])
        for (provider, figure), values in found.items():
            spread = " | ".join(f"{value:.2f}" for value in (min(values), statistics.median(values), max(values)))
            lines.append(f"| {report['name']} | {provider} | {figure} | {len(values)} | {spread} |")
    return "\n".join(lines) + "\n"


def _section(report: Mapping[str, Any]) -> str:
    where, threads = report["machine"], report["machine"]["threads"]
    source = (ROOT / "benchmarks" / f"bench_{report['name']}.py").read_text()
    about = (ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0]
    title, table = markdown(report).split("\n\n", 1)
    command = f"`python {where['command']}`, {threads} thread{'s' * (threads > 1)}."
    picture = f"![times]({_figure(report['name'])})\n\n" if is_timed(report["cases"]) else ""
    return f"#{title}\n\n{about}\n\n{command}\n\n{picture}{table}"


def gpu_page(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the page on the GPU targets, from the reports of the parts of `make gpu`; none: nothing was measured."""
    where = "None has been measured, and the GPU checks have not been run."
    if reports:
        machines = [report["machine"] for report in reports.values()]
        gpus, torches, commits = (", ".join(dict.fromkeys(m[n] for m in machines)) for n in ("gpu", "torch", "commit"))
        where = f"Measured on {gpus}, torch {torches}, commit {commits}."
    counted = json.loads((RESULTS / "partial_peak-cpu.json").read_text())["cases"]
    kept, anew = (case["figures"] for case in counted if case["provider"] == "partial")
    unfused = next(case["figures"] for case in counted if case["provider"] == "partial, original code")
    still_open = _OPEN.format(
        kept=kept["x peak"],
        anew=anew["x peak"],
        unfused=unfused["x peak"],
        fused=kept["x fused peak"],
        work=kept["x TFLOP"],
        bound=1 / kept["x TFLOP"],
    )
    return f"{_GPU}\n{where}\n\n{targets.table(reports)}\n{still_open}\n"


if __name__ == "__main__":
    sys.exit(main())
