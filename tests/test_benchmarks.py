"""The benchmark harness, single benchmarks and the pages: what is checked, timed and written."""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are run from the repository, never installed

from benchmarks import compile_report, instructions, pages, targets  # noqa: E402
from benchmarks.__main__ import main as run_benchmark  # noqa: E402
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
from pymape.ops.masked_activation import SUPPORTED  # noqa: E402


@pytest.fixture
def report(tmp_path: Path) -> dict:
    cases = [
        Case("2x3", "pymape", 0.001, 0.0009, 0.0012, {"GB/s": 12.5, "x pymape": 1.0}),
        Case("2x3", "eager", 0.002, 0.0019, 0.0021, {"x pymape": 2.0}),
    ]
    Report("module_scores", "cpu", ["a note"], cases).write(tmp_path / "module_scores.json")
    return json.loads((tmp_path / "module_scores.json").read_text())


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
    cases = compare("1", providers, tolerance=0, apart=("b",), least_apart=2, seconds=0, least=3)
    assert [case.provider for case in cases] == ["a", "b", "c"]
    measured = "".join(calls)[len("a" + "abc") :]  # after the expected result and the checks
    assert "b" not in measured[: measured.rindex("c")]
    assert (measured.count("b"), measured.count("c")) == (6, 8)  # two that warm up, then two for every round
    assert cases[1].figures["x pymape"] == cases[1].median_s / cases[0].median_s


def test_auto_is_not_held_against_its_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.bench_masked_attention import _providers

    def only(*can_run: str) -> None:
        monkeypatch.setattr("pymape.backends._why_not", lambda backend, *_: None if backend in can_run else "no")

    only("triton", "cuda")
    assert other_backends("masked_ffn", SUPPORTED, "cuda") == ("cuda",)
    names = [name for name, _ in islice(_providers(False, 5, "cuda", everything=False), 3)]
    assert names == ["pymape", "pymape, cuda", "SDPA flash, gate"]
    only("cuda")
    assert other_backends("masked_ffn", SUPPORTED, "cuda") == ("triton",)
    assert other_backends("masked_ffn", SUPPORTED, "cpu") == ()


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


@pytest.mark.parametrize(
    ("op", "arguments", "unknown"),
    [
        ("threads", ["--treads", "1"], "--treads 1"),
        ("module_scores", ["--layers", "2"], "--layers 2"),
        ("all", ["--samples", "2", "--treads"], "--treads"),
    ],
)
def test_a_misspelt_option_is_refused_and_of_all_what_no_benchmark_takes(
    op: str,
    arguments: list[str],
    unknown: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", op, *arguments])
    with pytest.raises(SystemExit) as ended:
        run_benchmark()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: unrecognized arguments: {unknown}\n")


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

        def recorded(model: Any, batch: Any, name: str = name, make_step: Any = make_step, **options: Any) -> Any:
            seen.append((name, any(getattr(part, "gradient_checkpointing", False) for part in model.modules())))
            return make_step(model, batch, **options)

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


def test_live_bytes_are_what_storages_hold() -> None:
    from benchmarks.bench_partial_peak import LiveBytes

    given = torch.zeros(1000)
    with LiveBytes([given]) as live:
        assert live.now == 4000
        a = given + 1
        b = a.view(10, 100).t()  # a view holds nothing of its own
        assert live.now == live.peak == 8000
        c = a.double()
        assert live.now == 16000
        del c
        assert (live.now, live.peak) == (8000, 16000)
        del a
        assert live.now == 8000
        del b
        assert live.now == 4000


@pytest.mark.parametrize("checkpointed", [False, True])
def test_steps_without_data_allocate_and_multiply_as_real_ones(
    checkpointed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from benchmarks import bench_partial, bench_partial_peak

    def make_model(name: str, layers: int, *_: Any, **__: Any) -> Any:
        config = transformers.LlamaConfig(
            hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=160, use_cache=False,
            num_hidden_layers=layers, vocab_size=100, attn_implementation="sdpa",
        )  # fmt: skip
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()

    monkeypatch.setattr(bench_partial_peak, "make_model", make_model)
    for name, size in (("TOKENS", 32), ("VOCABULARY", 100)):
        monkeypatch.setitem(getattr(bench_partial, name), "cuda", size)
    suffix = bench_partial.CHECKPOINTED if checkpointed else ""
    counted = bench_partial_peak.count(3, suffix)
    _, fused_dense, original, ours = (case.figures for case in counted)
    assert 0 < ours["x peak"] < ours["x fused peak"] < 1
    assert ours["x peak"] < original["x peak"] < 1
    assert 0 < ours["x TFLOP"] == original["x TFLOP"] < fused_dense["x TFLOP"] <= 1
    for case, make_step in zip(counted, bench_partial_peak.STEPS.values(), strict=True):
        model = make_model("llama", 3)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = bench_partial.make_batch("llama", "cuda", on="cpu")
        del batch["attention_mask"]
        with bench_partial_peak.LiveBytes([*model.parameters(), *model.buffers()]) as live:
            step, _ = make_step(model, batch)
            step()
            between, live.peak = live.now, 0
            step()
        real = {"between GB": between / 1e9, "peak GB": live.peak / 1e9}
        assert {name: case.figures[name] for name in real} == pytest.approx(real, rel=0.02)


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
    untimed = sum(page.count(f"\n### {name}") for name in ("Instructions", "partial_peak"))
    assert len(figures) == page.count("\n### ") - untimed
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
