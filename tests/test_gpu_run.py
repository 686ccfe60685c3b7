"""The GPU run: which parts run and in which order, how a run goes on, and what its targets read."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are run from the repository, never installed

from benchmarks import gpu, targets  # noqa: E402
from benchmarks.__main__ import read_options  # noqa: E402
from benchmarks.harness import Case, Report  # noqa: E402


def test_every_part_gives_options_that_its_benchmark_has() -> None:
    for op, *arguments in gpu.BENCHMARKS.values():
        if op != "s3t_ensemble":  # imports peft
            _, unknown = read_options({op: importlib.import_module(f"benchmarks.bench_{op}")}, "cuda", arguments)
            assert not unknown


def test_torchs_own_attention_is_allowed_other_sums() -> None:
    from benchmarks.gpu_operators import cases

    slacks = {(case.name.split()[1], backend): case.slack(backend) for case in cases() for backend in case.backends}
    assert {name: slack for name, slack in slacks.items() if slack != 2.0} == {("attention", "cuda"): 4.0}


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
    assert names[:3] == ["build", "operators", "tiles"]
    assert set(names[3 : 3 + len(needed)]) == needed
    assert names[3 + len(needed)] == "memcheck"
    assert names[-1] == "racecheck"
    others = {"build", "operators", "memcheck", "models", "s3t", "racecheck"}
    assert sorted(names) == sorted({*gpu.BENCHMARKS, *others})


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
            assert options["--kernel-name"] == f"regex={gpu.OWN_KERNELS}"
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
    assert {part.name for part in gpu.parts("90", tmp_path) if part.needs == "peft"} == {"s3t", "s3t_ensemble"}
    for part in (part for part in gpu.parts("90", tmp_path) if part.needs != "peft"):
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
    now, limits = 1000.0, []
    assert gpu.run_all([gpu.Part(name, (), tmp_path) for name in ("search", "tiles", "ffn_block")], 1530) == ["tiles"]
    assert "tiles: not started, 230 s may not be enough" in capfd.readouterr().out
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
        assert parts[name].folder == tmp_path / gpu.source_digest(*gpu._MEASURING, f"benchmarks/bench_{op}.py")
    assert parts["tiles"].folder != parts["search"].folder


def test_results_are_gathered_under_the_name_of_the_gpu(tmp_path: Path) -> None:
    assert gpu.gather(tmp_path / "empty", "NVIDIA H100 80GB HBM3", tmp_path / "results") is None
    folder = next(part.folder for part in gpu.parts("90", tmp_path) if part.name == "module_scores")
    folder.mkdir()
    found = Report("module_scores", "cuda", cases=[Case("2x3", "pymape", 0.001, 0.0009, 0.0012)])
    found.write(folder / "module_scores.json")
    report = json.loads((folder / "module_scores.json").read_text())
    path = gpu.gather(tmp_path, "NVIDIA H100 80GB HBM3", tmp_path / "results")
    assert path == tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text()) == {"module_scores": report}
    page = path.with_suffix(".md").read_text()
    assert "| 2x3 | pymape | 1.000 |" in page
    assert page.count("not yet measured") == len(targets.TARGETS) - 3  # those of module_scores have no such shape
    assert page.count("not measured: no such case ran") == 3


def test_what_was_found_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "build" / "gpu").mkdir(parents=True)
    (tmp_path / "build" / "gpu" / "a.log").write_text("found")
    with tarfile.open(gpu.archive(tmp_path / "out")) as packed:
        assert packed.extractfile("build/gpu/a.log").read() == b"found"


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
