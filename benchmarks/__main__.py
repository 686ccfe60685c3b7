"""Run one benchmark or all: `python -m benchmarks module_scores --json FILE`."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import benchmarks
from benchmarks.harness import Report, plot
from benchmarks.timing import keep_freed_memory


def main() -> None:
    modules = (module.name for module in pkgutil.iter_modules(benchmarks.__path__))
    names = sorted(name.removeprefix("bench_") for name in modules if name.startswith("bench_"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Microbenchmarks of pymape.")
    parser.add_argument("op", choices=[*names, "all"])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--json",
        type=Path,
        help="result file, written after every comparison (default benchmarks/results/OP-DEVICE.json, at the end only)",
    )
    parser.add_argument("--plot", type=Path, help="also draw the times; .png or .svg (not with `all`)")
    arguments, rest = parser.parse_known_args()
    chosen = names if arguments.op == "all" else [arguments.op]
    if arguments.op == "all" and (arguments.json is not None or arguments.plot is not None):
        parser.error("--json and --plot name the file of one benchmark, got all")
    keep_freed_memory()
    operators = {name: importlib.import_module(f"benchmarks.bench_{name}") for name in chosen}
    options, unknown = read_options(operators, arguments.device, rest)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for name, benchmark in operators.items():
        only = getattr(benchmark, "DEVICE", arguments.device)
        if arguments.device != only:
            if arguments.op != "all":
                parser.error(f"--device must be {only} for {name}, got {arguments.device}")
            print(f"\n{name}: skipped, it is for {only} only")
            continue
        report = Report(name, arguments.device, finished=False, path=arguments.json)
        benchmark.run(report, options[name])
        report.finished = True
        report.show()
        path = arguments.json or Path(__file__).parent / "results" / f"{name}-{arguments.device}.json"
        report.write(path)
        if arguments.plot is not None:
            plot(json.loads(path.read_text()), arguments.plot)


def read_options(
    operators: Mapping[str, ModuleType], device: str, arguments: Sequence[str]
) -> tuple[dict[str, argparse.Namespace], list[str]]:
    """Return the options of every benchmark, each of which takes those that it has, and what none of them takes."""
    options, left = {}, []
    for name, benchmark in operators.items():
        parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}")
        if hasattr(benchmark, "add_options"):
            benchmark.add_options(parser, device)
        options[name], rest = parser.parse_known_args(arguments)
        left.append(rest)
    return options, [argument for argument in arguments if all(argument in rest for rest in left)]


if __name__ == "__main__":
    main()
