"""The benchmark harness and the GPU run: what is timed and written, which parts run, and how a run goes on."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are run from the repository, never installed

from benchmarks import compile_report, gpu, harness, instructions, pages, targets, timing  # noqa: E402
from benchmarks.__main__ import main as run_benchmark  # noqa: E402
from benchmarks.__main__ import read_options  # noqa: E402
from benchmarks.harness import (  # noqa: E402
    Case,
    Report,
    add_rates,
    compare,
    compiled,
    limits,
    machine,
    markdown,
    other_backends,
    plot,
)
from benchmarks.timing import DeviceTimer, OnDevice, measure, measure_on_device  # noqa: E402


@pytest.fixture
def report(tmp_path: Path) -> dict:
    cases = [
        Case("2x3", "pymape", 0.001, 0.0009, 0.0012, {"GB/s": 12.5, "x pymape": 1.0}),
        Case("2x3", "eager", 0.002, 0.0019, 0.0021, {"x pymape": 2.0}),
    ]
    Report("module_scores", "cpu", ["a note"], cases).write(tmp_path / "module_scores.json")
    return json.loads((tmp_path / "module_scores.json").read_text())


def test_contenders_alternate_and_every_round_is_timed() -> None:
    calls: list[str] = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert "".join(calls) == "aabb" + "aabb" * 3  # two calls to warm up; a short one is timed after one of its own


def test_every_contender_has_its_own_number_of_rounds_spread_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def lasting(name: str, seconds: float) -> Callable[[], float]:
        return lambda: calls.append(name) or seconds

    monkeypatch.setattr(timing, "_once", lambda call: call())
    times = measure({"slow": lasting("s", 1.0), "fast": lasting("f", 0.1)}, seconds=2, least=5)
    assert {name: len(values) for name, values in times.items()} == {"slow": 5, "fast": 20}
    assert re.findall("f+", "".join(calls)[4:]) == ["fff", "ffff", "ffff", "ffff", "ffff", "f"]


class FakeCuda:
    """A host and a GPU with a queue: what `DeviceTimer` needs of `torch.cuda`, in seconds of two simulated clocks."""

    def __init__(self) -> None:
        self.host = self.device = 0.0  # the host's time, and when the GPU will have done all that is queued
        self.flushed = 0

    def launch(self, host: float, device: float) -> None:
        """The host takes so long to queue what takes the GPU so long."""
        self.host += host
        self.device = max(self.device, self.host) + device

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def flush(self) -> None:
        self.flushed += 1
        self.launch(1e-5, 1e-4)

    def _sleep(self, cycles: int) -> None:
        self.launch(1e-5, cycles / timing._CYCLES)

    def Event(self, enable_timing: bool) -> FakeEvent:
        assert enable_timing
        return FakeEvent(self)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def record(self) -> None:
        self.cuda.launch(0, 0)
        self.passed = self.cuda.device

    def query(self) -> bool:
        return self.cuda.host >= self.passed

    def synchronize(self) -> None:
        self.cuda.host = max(self.cuda.host, self.passed)

    def elapsed_time(self, later: FakeEvent) -> float:
        return 1e3 * (later.passed - self.passed)


@pytest.mark.parametrize("host", [1e-5, 2e-4, 5e-3])
def test_the_time_on_a_device_does_not_hold_that_of_the_host(host: float) -> None:
    cuda = FakeCuda()
    timer = DeviceTimer(lambda: [cuda.launch(host, 5e-5) for _ in range(3)], cuda=cuda, flush=cuda.flush)
    assert timer() == pytest.approx(1.5e-4)  # of which the host needs up to a hundred times as much to queue it
    assert timer() == pytest.approx(1.5e-4)
    assert timer.gapless == timer.rounds == 2
    assert cuda.flushed >= 2


def test_a_call_that_waits_for_the_device_is_told_apart() -> None:
    cuda = FakeCuda()

    def call() -> None:
        cuda.launch(1e-4, 5e-5)
        cuda.synchronize()
        cuda.launch(1e-4, 5e-5)

    timer = DeviceTimer(call, cuda=cuda, flush=cuda.flush)
    assert timer() == pytest.approx(2.1e-4)  # the GPU works for 1e-4 of it
    start = cuda.host
    assert timer() == pytest.approx(2.1e-4)
    assert cuda.host - start < 1e-3  # not after a wait that is of no use
    assert (timer.gapless, timer.rounds) == (0, 2)


def test_times_on_a_device_come_with_those_from_outside() -> None:
    cuda = FakeCuda()
    calls = {"short": lambda: cuda.launch(1e-5, 1e-5), "waits": lambda: (cuda.launch(0, 1e-5), cuda.synchronize())}
    timer = functools.partial(DeviceTimer, cuda=cuda, flush=cuda.flush)
    found = measure_on_device(calls, seconds=0, timer=timer)
    assert {name: len(times.device) for name, times in found.items()} == {"short": 50, "waits": 50}
    assert found["short"].device == pytest.approx(1e-5)
    assert [times.gapless for times in found.values()] == [1, 0]
    assert all(len(times.wall) >= 5 and (times.wall > 0).all() for times in found.values())


def test_what_lies_on_a_gpu_is_timed_by_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    device, wall = np.array([0.001, 0.001, 0.002]), np.array([0.004, 0.005, 0.006])

    def on_device(contenders: Mapping[str, object], **_: object) -> dict[str, OnDevice]:
        return {name: OnDevice(n * device, wall, 1 / n) for n, name in enumerate(contenders, 1)}

    calls = {"pymape": lambda: torch.ones(2), "eager": lambda: torch.ones(2)}
    monkeypatch.setattr(harness, "measure_on_device", on_device)
    assert all(case.clock == "wall" for case in compare("2", calls, tolerance=0, seconds=0))
    monkeypatch.setattr(harness, "_on_gpu", lambda tensors: True)
    first, second = compare("2", calls, tolerance=0)
    assert (first.clock, first.median_s, second.median_s) == ("device", 0.001, 0.002)
    assert (first.figures["wall ms"], second.figures["x pymape"], second.figures["% queued"]) == (5, 2, 50)
    assert "% queued" not in first.figures
    where = {"gpu": "a GPU", "processor": "cpu", "torch": "2", "commit": "c"}
    lines = markdown({**asdict(Report("op", "cuda", cases=[first, second])), "machine": where}).splitlines()
    assert "| shape | provider | device ms | p20 | p80 | wall ms | x pymape | % queued |" in lines
    assert "| 2 | pymape | 1.000 | 1.000 | 1.600 | 5 | 1 |  |" in lines


def test_a_written_report_reads_back_as_a_table(report: dict) -> None:
    lines = markdown(report).splitlines()
    assert lines[0] == "## module_scores on cpu"
    assert "| shape | provider | median ms | p20 | p80 | GB/s | x pymape |" in lines
    assert "| 2x3 | pymape | 1.000 | 0.900 | 1.200 | 12.5 | 1 |" in lines
    assert "| 2x3 | eager | 2.000 | 1.900 | 2.100 |  | 2 |" in lines
    assert lines[-1] == "- a note"


def test_a_benchmark_that_is_cut_off_leaves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_off(report: Report, options: argparse.Namespace) -> None:
        report.add([Case("2x3", "pymape", 0.001, 0.001, 0.001)])
        raise RuntimeError("pymape is wrong at 4x5")

    path = tmp_path / "found.json"
    monkeypatch.setattr("benchmarks.bench_module_scores.run", cut_off)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "module_scores", "--json", str(path)])
    with pytest.raises(RuntimeError, match="wrong at 4x5"):
        run_benchmark()
    found = json.loads(path.read_text())
    assert [case["shape"] for case in found["cases"]] == ["2x3"]
    assert "path" not in found
    assert "Not finished: the benchmark was cut off, and more was to be measured." in markdown(found)
    monkeypatch.setattr("benchmarks.bench_module_scores.run", lambda report, options: report.add([]))
    run_benchmark()
    assert "Not finished" not in markdown(json.loads(path.read_text()))


def test_results_of_the_time_before_the_mark_are_whole(report: dict) -> None:
    del report["finished"]
    assert "Not finished" not in markdown(report)


def test_the_command_in_a_report_does_not_name_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["python", "-m", "benchmarks", "op", "--json", "a/b.json", "--layers", "2", "--plot=c.svg"]
    monkeypatch.setattr(sys, "orig_argv", words)
    assert machine()["command"] == "-m benchmarks op --layers 2"


def test_a_provider_that_cannot_run_or_is_wrong_is_listed_with_the_reason() -> None:
    def fails() -> torch.Tensor:
        raise NotImplementedError("not on this device\nand more")

    good, expected = torch.tensor([1.0, -2.0]), torch.tensor([1.0, -2.02])
    providers = {"pymape": lambda: good, "same": lambda: (good,), "wrong": lambda: good * 1.5, "fails": fails}
    part = {"a part of it": lambda: good[:1]}
    cases = compare("2", providers, exact=lambda: expected, tolerance=0.02, unchecked=part, seconds=0, least=3)
    assert [case.provider for case in cases] == [*providers, *part]
    assert [case.reason for case in cases] == [
        "",
        "",
        "differs by 0.49 of the largest value, more than 0.02",
        "NotImplementedError: not on this device",
        "",
    ]
    assert cases[0].figures["x pymape"] == 1
    assert cases[1].figures["x pymape"] == cases[1].median_s / cases[0].median_s
    assert cases[2].median_s is cases[3].median_s is None
    assert cases[4].figures["x pymape"] == cases[4].median_s / cases[0].median_s
    report = Report("op", "cpu", cases=cases)
    report.show()
    lines = markdown({**asdict(report), "machine": {"gpu": None, "processor": "cpu", "torch": "2", "commit": "c"}})
    assert "| 2 | fails |  |  |  |  | NotImplementedError: not on this device |" in lines


def test_what_is_slow_is_measured_after_the_others() -> None:
    calls: list[str] = []

    def call(name: str) -> Callable[[], torch.Tensor]:
        return lambda: (calls.append(name), torch.ones(1))[1]

    providers = {name: call(name) for name in "abc"}
    cases = compare("1", providers, tolerance=0, apart=("b",), seconds=0, least=3)
    assert [case.provider for case in cases] == ["a", "b", "c"]
    measured = "".join(calls)[len("a" + "abc") :]  # after the expected result and the checks
    assert "b" not in measured[: measured.rindex("c")]
    assert measured.count("b") == measured.count("c")
    assert cases[1].figures["x pymape"] == cases[1].median_s / cases[0].median_s


def test_auto_is_not_held_against_its_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.bench_masked_attention import _providers

    monkeypatch.setattr("pymape.backends._has_triton", lambda: True)
    assert other_backends("masked_ffn", "cuda") == ("cuda",)
    names = [name for name, _ in islice(_providers(False, 5, "cuda", everything=False), 3)]
    assert names == ["pymape", "pymape, cuda", "SDPA flash, gate"]
    monkeypatch.setattr("pymape.backends._has_triton", lambda: False)
    monkeypatch.setattr("pymape.backends._why_not", lambda backend, device: None)
    assert other_backends("masked_ffn", "cuda") == ("triton",)
    assert other_backends("masked_ffn", "cpu") == ()


def test_a_wrong_result_of_pymape_stops_the_benchmark() -> None:
    with pytest.raises(RuntimeError, match=r"pymape at 2 differs by 1 of the largest value, more than 0.01"):
        compare("2", {"pymape": lambda: torch.ones(2)}, exact=lambda: 0.5 * torch.ones(2), tolerance=0.01)
    with pytest.raises(RuntimeError, match="differs by nan"):
        compare("2", {"pymape": lambda: torch.full((2,), torch.nan)}, exact=lambda: torch.ones(2), tolerance=0.01)


def test_what_is_compiled_stays_compiled_for_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if torch.compiler.is_compiling() else x

    assert all(bool(compiled(function)(torch.zeros(size)).all()) for size in range(2, 12))


def test_a_benchmark_for_another_device_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks", "threads", "--device", "cuda"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "--device must be cpu for threads, got cuda" in result.stderr


def test_a_misspelt_option_is_refused_and_of_all_what_no_benchmark_takes() -> None:
    for op, arguments, unknown in (
        ("threads", ["--treads", "1"], "--treads 1"),
        ("module_scores", ["--layers", "2"], "--layers 2"),
        ("all", ["--samples", "2", "--treads"], "--treads"),
    ):
        command = [sys.executable, "-m", "benchmarks", op, *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 2
        assert result.stderr.endswith(f"error: unrecognized arguments: {unknown}\n")


def test_every_part_gives_options_that_its_benchmark_has() -> None:
    for op, *arguments in gpu.BENCHMARKS.values():
        if op != "s3t_ensemble":  # imports peft
            _, unknown = read_options({op: importlib.import_module(f"benchmarks.bench_{op}")}, "cuda", arguments)
            assert not unknown


def test_importance_is_checked_against_the_reference_on_a_cpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_importance

    def wrong(*_: object, backend: str = "auto", **__: object) -> tuple[torch.Tensor, ...]:
        return (torch.ones(2) if backend == "reference" else torch.zeros(2),) * 2

    monkeypatch.setattr(bench_importance, "_scores", wrong)
    monkeypatch.setattr(bench_importance, "bert_base", lambda layers: torch.nn.Identity())
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        bench_importance.run(Report("importance", "cpu"), argparse.Namespace(layers=1, rounds=1, records=1, data=None))


def test_the_case_with_a_target_is_the_first_of_greedy_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_greedy_swap

    asked: list[tuple[str, int]] = []
    case = Case("2", "pymape", 1, 1, 1)
    monkeypatch.setattr(bench_greedy_swap, "swaps", lambda **sizes: asked.append(("swaps", sizes["modules"])) or case)
    for name in ("rearrangement", "against_a_loop"):
        monkeypatch.setattr(bench_greedy_swap, name, lambda name=name, **_: asked.append((name, 0)) or [case])
    bench_greedy_swap.run(Report("greedy_swap", "cuda"), argparse.Namespace())
    assert asked[0] == ("swaps", 14336)
    assert len(asked) == 5


def test_the_rearrangement_is_checked_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_greedy_swap

    almost_equal = 2**16 + torch.randn(16, 1, 40)
    monkeypatch.setattr(bench_greedy_swap, "gradients", lambda *_, **__: almost_equal)
    mask = bench_greedy_swap.largest(almost_equal.square().sum(dim=0))
    in_single, in_double = (
        bench_greedy_swap.published_rearrangement(x, mask) for x in (almost_equal, almost_equal.double())
    )
    assert not torch.equal(in_single, in_double)
    monkeypatch.setattr(
        bench_greedy_swap, "alternate", lambda *_, **__: [Case("2", "", 1, 1, 1), Case("2", "", 2, 2, 2)]
    )
    ours, _ = bench_greedy_swap.rearrangement(layers=1, modules=40, samples=16, device="cpu")
    assert ours.figures["speed-up"] == 2


def test_torchs_own_attention_is_allowed_other_sums() -> None:
    from benchmarks.gpu_operators import cases

    slacks = {(case.name.split()[1], backend): case.slack(backend) for case in cases() for backend in case.backends}
    assert {name: slack for name, slack in slacks.items() if slack != 2.0} == {("attention", "cuda"): 4.0}


def test_memory_is_measured_with_activations_kept_and_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from benchmarks import bench_partial

    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=1, vocab_size=1000
    )
    monkeypatch.setattr(
        bench_partial, "make_model", lambda *_: transformers.BertForSequenceClassification(config).train()
    )
    monkeypatch.setitem(bench_partial.TOKENS, "cpu", 4)
    seen: list[tuple[str, bool]] = []
    for name in ("dense_step", "partial_step"):
        make_step = getattr(bench_partial, name)

        def recorded(model: Any, batch: Any, name: str = name, make_step: Any = make_step) -> Any:
            seen.append((name, any(getattr(part, "gradient_checkpointing", False) for part in model.modules())))
            return make_step(model, batch)

        monkeypatch.setattr(bench_partial, name, recorded)
    kinds = ("masked gradients", "partial", "masked gradients, checkpointed", "partial, checkpointed")
    found = [bench_partial.measure_memory("bert", kind, 1, "cpu") for kind in kinds]
    warm_up = ("dense_step", False)
    assert seen == [
        *(warm_up, ("dense_step", False), warm_up, ("partial_step", False)),
        *(warm_up, ("dense_step", True), warm_up, ("partial_step", True)),
    ]
    assert [values["state"] for values in found[:2]] == [values["state"] for values in found[2:]]
    cases = bench_partial._memory_cases("bert", {"dense": {**found[0], "peak": 4e6}, "ours": {**found[1], "peak": 1e6}})
    assert [case.figures.get("x peak") for case in cases] == [None, 0.25]
    assert cases[0].figures["peak MB"] == 4


def test_rates_are_shares_of_the_measured_limits() -> None:
    case, absent = Case("2", "pymape", 0.5, 0.5, 0.5), Case("2", "other", reason="not installed")
    add_rates([case, absent], "cpu", torch.float32, moved=2_000_000_000, operations=3_000_000_000_000)
    most = limits("cpu", torch.float32)
    assert case.figures["GB/s"] == 4
    assert case.figures["TFLOP/s"] == 6
    assert case.figures["% of copy"] == pytest.approx(400 / most["GB/s"])
    assert case.figures["% of GEMM"] == pytest.approx(600 / most["TFLOP/s"])
    assert absent.figures == {}


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plots(report: dict, tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    plot(report, tmp_path / f"times{suffix}")
    assert (tmp_path / f"times{suffix}").read_bytes().startswith(start)


def test_limits_are_measured_once() -> None:
    measured = limits("cpu", torch.float32)
    assert measured.keys() == {"GB/s", "TFLOP/s"}
    assert all(value > 0 for value in measured.values())
    assert limits("cpu", torch.float32) is measured


def test_every_part_names_files_that_exist(tmp_path: Path) -> None:
    parts = {part.name: part for part in gpu.parts("90", tmp_path)}
    assert next(iter(parts)) == "build"
    assert [name for name, part in parts.items() if part.again] == ["build"]
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in parts["build"].environment["CMAKE_ARGS"]
    for part in parts.values():
        for word in part.command:
            if word.endswith(".py"):
                assert (ROOT / word).exists(), word
    for name, (op, *_) in gpu.BENCHMARKS.items():
        assert (ROOT / "benchmarks" / f"bench_{op}.py").exists()
        assert str(parts[name].folder / f"{name}.json") in parts[name].command
    assert {part for target in targets.TARGETS for part in target.parts} <= set(gpu.BENCHMARKS)


def test_what_the_targets_need_comes_first(tmp_path: Path) -> None:
    names = [part.name for part in gpu.parts("90", tmp_path)]
    needed = {part for target in targets.TARGETS for part in target.parts}
    assert names[:2] == ["build", "operators"]
    assert set(names[2 : 2 + len(needed)]) == needed
    assert names[2 + len(needed)] == "memcheck"
    assert names[-1] == "racecheck"
    assert len(names) == len(set(names)) == len(gpu.BENCHMARKS) + 5


def test_the_sanitizers_look_at_all_kernels_of_this_project_alone(tmp_path: Path) -> None:
    triton = [
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())
    ]
    cuda = [
        name
        for path in (ROOT / "csrc").glob("*.cu")
        for name in re.findall(r"^namespace (\w+) \{", path.read_text(), re.M)
    ]
    assert len(triton) == 9
    assert set(cuda) == {"pymape"}  # every kernel lies in it
    own = re.compile(gpu.OWN_KERNELS)
    assert all(own.search(name) for name in (*triton, "_ZN6pymape47_GLOBAL__N__1_14forward_kernelE"))
    assert not own.search("_ZN2at6native29vectorized_elementwise_kernelILi4E")
    for part in gpu.parts("90", tmp_path):
        if part.needs == "compute-sanitizer":
            options = dict(pairwise(part.command))
            assert options["--kernel-regex"] == f"kns={gpu.OWN_KERNELS}"
            assert options["--report-api-errors"] == "no"
            assert options["--target-processes"] == "application-only"
            assert options["--tool"] == part.name


@pytest.mark.parametrize("installed", [True, False])
def test_what_compiles_much_is_divided_among_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 16)
    divided = {part.name for part in gpu.parts("90", tmp_path) if ("-n", "8") in pairwise(part.command)}
    assert divided == ({"operators", "models"} if installed else set())


def test_the_parts_need_no_package_beyond_the_stated_ones(tmp_path: Path) -> None:
    modules = {f"benchmarks.bench_{op}" for op, *_ in gpu.BENCHMARKS.values()} - {"benchmarks.bench_s3t_ensemble"}
    for part in gpu.parts("90", tmp_path):
        modules |= {Path(word).stem for word in part.command if word.endswith(".py") and word != "setup.py"}
    code = f"""
import importlib, sys
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT / "tests")!r}, {str(ROOT)!r}]
for name in ("accelerate", "datasets", "jsonargparse", "matplotlib", "pandas", "peft", "ray", "scipy", "sklearn"):
    sys.modules[name] = None  # importing it fails
for name in {sorted(modules)}:
    importlib.import_module(name)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_part_runs_until_it_has_passed_and_never_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    counter, wanted = tmp_path / "counter", tmp_path / "wanted"
    code = f"import os, sys; open({str(counter)!r}, 'a').write('x'); sys.exit(not os.path.exists({str(wanted)!r}))"
    part = gpu.Part("part", (sys.executable, "-c", code), tmp_path / "done")
    assert not gpu.run(part)
    wanted.touch()
    assert gpu.run(part)
    assert gpu.run(part)
    assert counter.read_text() == "xx"
    assert gpu.run(dataclasses.replace(part, again=True))
    assert counter.read_text() == "xxx"
    output = capfd.readouterr().out
    assert "part: failed with status 1" in output
    assert "part: passed before, skipped" in output


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sleep = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    part = gpu.Part("slow", (sys.executable, "-c", code), tmp_path)
    assert not gpu.run(part, limit=5)
    assert not (tmp_path / "slow.done.json").exists()
    assert "slow: stopped after 5 s" in capfd.readouterr().out
    started = (tmp_path / "pid").read_text()
    deadline = time.monotonic() + 30  # a killed process may take a moment to go, and what is left of it is a zombie
    while _runs(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(started)


def _runs(process: str) -> bool:
    try:
        return Path("/proc", process, "stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_tool_that_is_not_installed_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(gpu.Part("check", ("no-such-tool",), tmp_path, needs="no-such-tool"))
    assert "check: skipped, no-such-tool is not installed" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())  # it runs once the tool is there


def test_no_part_starts_when_the_time_is_up_and_none_runs_beyond_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now, limits = 1000.0, []

    def run(part: gpu.Part, limit: float) -> bool:
        nonlocal now
        limits.append(limit)
        now += 300
        return part.name != "b"

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now)
    chosen = [gpu.Part(name, (), tmp_path) for name in "abc"]
    assert gpu.run_all(chosen, 1540) == ["b", "c"]
    assert limits == [480, 240]  # the most that a part may take, and what is left of the time
    assert "c: not started, the time is up" in capfd.readouterr().out
    assert gpu.run_all([gpu.Part("build", (), tmp_path), *chosen]) == ["b"]
    monkeypatch.setattr(gpu, "run", lambda part, limit: False)
    assert gpu.run_all([gpu.Part("build", (), tmp_path), *chosen[:1]]) == ["build", "a"]


def test_the_digest_follows_the_sources_only(tmp_path: Path) -> None:
    for name in ("CMakeLists.txt", "setup.py", "csrc/a.cu", "pymape/a.py", "benchmarks/one.py", "benchmarks/two.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    def digests() -> list[str]:
        scripts = ((), ("benchmarks/one.py",), ("benchmarks/two.py",), ("benchmarks",))
        return [gpu.source_digest(*names, root=tmp_path) for names in scripts]

    before = digests()
    assert len(set(before)) == 4
    (tmp_path / "pymape" / "_C.so").write_text("built")
    assert digests() == before
    (tmp_path / "benchmarks" / "one.py").write_text("other")
    assert [new == old for new, old in zip(digests(), before, strict=True)] == [True, False, True, False]
    before = digests()
    (tmp_path / "csrc" / "a.cu").write_text("other")
    assert not set(digests()) & set(before)


def test_every_benchmark_has_the_digest_of_its_own_script(tmp_path: Path) -> None:
    parts = {part.name: part for part in gpu.parts("90", tmp_path)}
    for name, (op, *_) in gpu.BENCHMARKS.items():
        assert parts[name].folder == tmp_path / gpu.source_digest(f"benchmarks/bench_{op}.py")
    assert parts["tiles"].folder != parts["search"].folder


def test_results_are_gathered_under_the_name_of_the_gpu(report: dict, tmp_path: Path) -> None:
    assert gpu.gather(tmp_path / "empty", "NVIDIA H100 80GB HBM3", tmp_path / "results") is None
    folder = next(part.folder for part in gpu.parts("90", tmp_path) if part.name == "module_scores")
    folder.mkdir()
    (folder / "module_scores.json").write_text(json.dumps(report))
    path = gpu.gather(tmp_path, "NVIDIA H100 80GB HBM3", tmp_path / "results")
    assert path == tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text()) == {"module_scores": report}
    page = path.with_suffix(".md").read_text()
    assert "| 2x3 | pymape | 1.000 |" in page
    assert page.count("not yet measured") == len(targets.TARGETS) - 3  # those of module_scores have no such shape
    assert page.count("not measured: no such case ran") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so_and_runs_nothing() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "build"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("no GPU: ")


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["build", "everything"])
    assert "PART must be one of build, operators, " in capsys.readouterr().err


def test_the_compile_report_reads_back_as_its_page() -> None:
    folder = ROOT / "docs" / "results"
    found = json.loads((folder / "compile.json").read_text())
    assert compile_report.markdown(found) == (folder / "compile.md").read_text()
    assert all(kernel["blocks"] == compile_report.resident_blocks(kernel) >= 1 for kernel in found["kernels"])


@pytest.mark.parametrize(
    ("needs", "blocks"),
    [
        ({"registers": 32, "threads": 256, "shared": 0}, 8),  # 64 warps
        ({"registers": 128, "threads": 256, "shared": 0}, 2),  # 8 x 4096 registers
        ({"registers": 129, "threads": 256, "shared": 0}, 1),  # rounded up to 136
        ({"registers": 16, "threads": 32, "shared": 0}, 32),
        ({"registers": 32, "threads": 128, "shared": 40 * 1024}, 4),  # 41 of 164 KiB
        ({"registers": 32, "threads": 128, "shared": 40 * 1024, "sm": 90}, 5),  # 41 of 228 KiB
    ],
)
def test_resident_blocks_by_hand(needs: dict[str, int], blocks: int) -> None:
    assert compile_report.resident_blocks({"sm": 80, **needs}) == blocks


def test_the_worst_figure_of_a_target_counts() -> None:
    copy, *_ = targets.TARGETS
    assert copy.measured({}) == "not yet measured"

    def report(**shares: float | None) -> dict:
        cases = [
            Case(f"{layer.replace('_', '-')} filters 2x3", "pymape", 1, 1, 1, {} if x is None else {"% of copy": x})
            for layer, x in shares.items()
        ]
        return {"module_scores": asdict(Report("module_scores", "cuda", cases=cases))}

    assert copy.measured(report(RoBERTa_large=91.0, Llama_3_8B=88.5)) == "88.5, reached"
    assert copy.measured(report(RoBERTa_large=91.0, Llama_3_8B=80.0)) == "80, **missed**"
    part = "91, reached in 1 of 2 cases, the others did not run"
    assert copy.measured(report(RoBERTa_large=91.0)) == part
    assert copy.measured(report(RoBERTa_large=91.0, Llama_3_8B=None)) == part
    assert copy.measured(report()) == "not measured: no such case ran"
    cut_off = report(RoBERTa_large=91.0)
    cut_off["module_scores"]["finished"] = False
    assert copy.measured(cut_off) == f"{part}; cut off, the rest is not yet measured"
    cut_off["module_scores"]["cases"] = []
    assert copy.measured(cut_off) == "not yet measured"
    seconds = next(target for target in targets.TARGETS if target.operator == "`greedy_swap`")
    case = asdict(Case("swap 32x14336, 256 + 256 samples", "pymape", 0.75, 0.7, 0.8))
    assert seconds.measured({"greedy_swap": {"cases": [case]}}) == "0.75, **missed**"


def test_a_target_takes_the_shape_that_it_names_and_no_longer_one() -> None:
    faster, smaller, smallest = (target for target in targets.TARGETS if target.parts == ("partial_llama",))
    cases = [
        Case("llama 22 layers", "partial", 1, 1, 1, {"speed-up": 1.6}),
        Case("llama 22 layers, memory", "partial", 1, 1, 1, {"x peak": 0.65}),
        Case("llama 22 layers, memory, checkpointed", "partial", 1, 1, 1, {"x peak": 0.45}),
    ]
    reports = {"partial_llama": asdict(Report("partial", "cuda", cases=cases))}
    assert faster.measured(reports) == "1.6, reached"
    assert smaller.measured(reports) == "0.65, **missed**"
    assert smallest.measured(reports) == "0.45, reached"


def test_the_compile_table_shows_the_largest_need_of_the_variants() -> None:
    kernel = {"source": "a.cu", "kernel": "k", "tile": "M 64", "variant": "bf16", "sm": 90, "threads": 128}
    kernel |= {"registers": 40, "stack": 8, "shared": 1024, "tensor_cores": "wgmma", "blocks": 4}
    others = [
        {**kernel, "registers": 96, "stack": 0, "blocks": 2},
        {**kernel, "sm": 80, "stack": 0, "tensor_cores": "mma"},
    ]
    page = compile_report.markdown({"command": "c", "nvcc": "13", "triton": "3", "kernels": [kernel, *others]})
    assert "3 kernels, 1 of them with a stack:\n\n- `k` M 64, bf16, sm_90: 8 bytes\n" in page
    assert page.endswith(
        "| **`a.cu`** | | | | | | | | |\n| `k` | M 64 | 2 | 128 | 40 / 96 | 0 / 8 | 1 / 1 | 4 / 2 | mma / wgmma |\n"
    )


def test_the_page_of_the_targets_is_generated() -> None:
    page = (ROOT / "docs" / "results" / "gpu.md").read_text()
    if "None has been measured" in page:
        assert page == pages.gpu_page({})
    assert page.count("| `make gpu PARTS=") == len(targets.TARGETS)


def test_the_page_of_cpu_results_is_generated() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    assert page == pages.cpu_page(pages.RESULTS)
    figures = re.findall(r"!\[times\]\((.+)\)", page)
    assert len(figures) == page.count("\n### ") - page.count("### Instructions")
    assert all((ROOT / "docs" / figure).is_file() for figure in figures)


def test_the_page_of_cpu_results_has_a_section_for_every_file(report: dict, tmp_path: Path) -> None:
    report["machine"]["command"] = "-m benchmarks module_scores"
    (tmp_path / "module_scores-cpu.json").write_text(json.dumps(report))
    counts = [
        {"kernel": "gate", "dtype": dtype, "instructions": 1, "per element": share}
        for dtype, share in zip(instructions.DTYPES, (0.5, 1.25, 3), strict=True)
    ]
    versions = [{"function": "gate, float", "AVX2": 3, "AVX-512": 4}]
    found = {"machine": report["machine"], "counts": counts, "versions": versions}
    (tmp_path / "instructions.json").write_text(json.dumps(found))
    page = pages.cpu_page(tmp_path)
    about = "module_scores against eager torch and torch.compile, and against the rate at which torch copies memory."
    assert f"### module_scores on cpu\n\n{about}\n\n`python -m benchmarks module_scores`, " in page
    assert "| module_scores | eager | x pymape | 1 | 2.00 | 2.00 | 2.00 |" in page
    assert "| 2x3 | pymape | 1.000 |" in page
    assert "### Instructions of the CPU kernels" in page
    assert "| gate | 0.50 | 1.25 | 3.00 |" in page
    assert "| gate, float | 3 | 4 |" in page
    assert "masked_ffn on cpu" not in page
    known = {*pages.OPERATORS, *pages.END_TO_END}
    assert {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")} == known


def test_both_versions_of_a_function_must_use_their_registers() -> None:
    title = "<ns::(anonymous namespace)::gate(ns::Block<float const>, long) [clone .arch_x86_64_v{}]>:\n"
    narrow = f"0 {title.format(3)} 0: vmulps %ymm0,%ymm1,%ymm1\n 1: ret\n\n"
    wide = f"9 {title.format(4)} 9: vmulps %{{}}0,%{{}}1,%{{}}1\n\n"
    good = narrow + wide.format("zmm", "zmm", "zmm") + "20 <other()>:\n 20: ret\n"
    assert instructions.vector_registers(good) == [{"function": "gate, float", "AVX2": 1, "AVX-512": 1}]
    for bad in (narrow, narrow + wide.format("ymm", "ymm", "ymm")):
        with pytest.raises(ValueError, match="gate, float must have AVX2 and AVX-512 versions"):
            instructions.vector_registers(bad)
