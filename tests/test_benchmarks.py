"""The benchmark harness and the GPU run: what is timed and written, which parts run, and how a run goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are run from the repository, never installed

from benchmarks import compile_report, gpu  # noqa: E402
from benchmarks.harness import Case, Report, limits, markdown, measure, plot  # noqa: E402


@pytest.fixture
def report(tmp_path: Path) -> dict:
    cases = [Case("2x3", "pymape", 0.001, 0.0009, 0.0012, {"GB/s": 12.5}), Case("2x3", "eager", 0.002, 0.0019, 0.0021)]
    Report("module_scores", "cpu", ["a note"], cases).write(tmp_path / "module_scores.json")
    return json.loads((tmp_path / "module_scores.json").read_text())


def test_contenders_alternate_and_every_round_is_timed() -> None:
    calls: list[str] = []
    times = measure({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, seconds=0, least=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert "".join(calls) == "aabb" + "aabb" * 3  # two calls to warm up; a short one is timed after one of its own


def test_a_written_report_reads_back_as_a_table(report: dict) -> None:
    lines = markdown(report).splitlines()
    assert lines[0] == "## module_scores on cpu"
    assert "| shape | provider | median ms | p20 | p80 | GB/s |" in lines
    assert "| 2x3 | pymape | 1.000 | 0.900 | 1.200 | 12.5 |" in lines
    assert "| 2x3 | eager | 2.000 | 1.900 | 2.100 |  |" in lines
    assert lines[-1] == "- a note"


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
    assert "-DCMAKE_CUDA_ARCHITECTURES=90" in parts["build"].environment["CMAKE_ARGS"]
    for part in parts.values():
        for word in part.command:
            if word.endswith(".py"):
                assert (ROOT / word).exists(), word
    for name in gpu.BENCHMARKS:
        assert (ROOT / "benchmarks" / f"bench_{name}.py").exists()
        assert str(tmp_path / f"{name}.json") in parts[f"bench_{name}"].command


def test_a_part_runs_until_it_has_passed_and_never_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    counter, wanted = tmp_path / "counter", tmp_path / "wanted"
    code = f"import os, sys; open({str(counter)!r}, 'a').write('x'); sys.exit(not os.path.exists({str(wanted)!r}))"
    part = gpu.Part("part", (sys.executable, "-c", code))
    assert not gpu.run(part, tmp_path / "done")
    wanted.touch()
    assert gpu.run(part, tmp_path / "done")
    assert gpu.run(part, tmp_path / "done")
    assert counter.read_text() == "xx"
    output = capfd.readouterr().out
    assert "part: failed with status 1" in output
    assert "part: passed before, skipped" in output


def test_a_part_that_hangs_is_stopped_and_has_not_passed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    part = gpu.Part("slow", (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"))
    assert not gpu.run(part, tmp_path, limit=2)
    assert not (tmp_path / "slow.done.json").exists()
    assert "slow: stopped after 2 s" in capfd.readouterr().out


def test_a_tool_that_is_not_installed_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert gpu.run(gpu.Part("check", ("no-such-tool",), needs="no-such-tool"), tmp_path)
    assert "check: skipped, no-such-tool is not installed" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())  # it runs once the tool is there


def test_the_digest_follows_the_sources_only(tmp_path: Path) -> None:
    for name in ("CMakeLists.txt", "setup.py", "csrc/a.cu", "pymape/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = gpu.source_digest(tmp_path)
    (tmp_path / "pymape" / "_C.so").write_text("built")
    assert gpu.source_digest(tmp_path) == before
    (tmp_path / "csrc" / "a.cu").write_text("other")
    assert gpu.source_digest(tmp_path) != before


def test_results_are_gathered_under_the_name_of_the_gpu(report: dict, tmp_path: Path) -> None:
    assert gpu.gather(tmp_path / "empty", "NVIDIA H100 80GB HBM3", tmp_path / "results") is None
    path = gpu.gather(tmp_path, "NVIDIA H100 80GB HBM3", tmp_path / "results")
    assert path == tmp_path / "results" / "nvidia-h100-80gb-hbm3.json"
    assert json.loads(path.read_text()) == [report]
    assert "| 2x3 | pymape | 1.000 |" in path.with_suffix(".md").read_text()


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
    ],
)
def test_resident_blocks_by_hand(needs: dict[str, int], blocks: int) -> None:
    assert compile_report.resident_blocks({"sm": 80, **needs}) == blocks
