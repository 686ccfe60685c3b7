"""The command line: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from model_zoo import tiny_model

import pymape
from pymape.cli import main
from pymape.config import DemoConfig, UnlearnConfig
from pymape.masks import ModuleMasks
from pymape.model_layout import layout
from pymape.storage.runs import run_folder

REQUIRED = ["--model", "m", "--data.path", "d.csv", "--data.forget", "f.txt"]


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> list:
    """Configurations that the commands were started with, instead of the work."""
    from types import ModuleType

    configs: list = []
    for name, function in (("demo", "run_demo"), ("unlearn", "run_unlearn")):
        module = ModuleType(f"pymape.commands.{name}")
        setattr(module, function, configs.append)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return configs


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"pymape {pymape.__version__}\n"


@pytest.mark.parametrize("command", ["demo", "unlearn"])
def test_help_names_every_option_with_its_meaning(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    config = DemoConfig if command == "demo" else UnlearnConfig
    for field in fields(config):
        assert f"--{field.name}" in text
    assert "share of the heads' and filters' parameters" in text


def test_help_loads_no_transformers() -> None:
    code = (
        "import sys\n"
        "from pymape.cli import main\n"
        "try:\n"
        "    main(['unlearn', '--help'])\n"
        "except SystemExit:\n"
        "    pass\n"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'sklearn', 'matplotlib', 'triton')))\n"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_every_option_is_a_flag_and_flags_override_the_file(received: list, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: m\nlr: 1e-3\nepochs: 2\ndata: {path: d.csv, forget: f.txt}\nmasks: {budget: 0.2}\n")
    assert main(["unlearn", str(path), "--lr", "1e-5", "--masks.lam", "3"]) == 0
    assert main(["unlearn", "--config", str(path)]) == 0
    first, second = received
    assert (first.lr, first.epochs, first.masks.budget, first.masks.lam) == (1e-5, 2, 0.2, 3)
    assert (second.lr, second.masks.lam) == (1e-3, UnlearnConfig("m", first.data).masks.lam)
    assert first.data.path == "d.csv"
    assert isinstance(first, UnlearnConfig)


def test_flags_alone_are_enough(received: list) -> None:
    assert main(["unlearn", *REQUIRED, "--objective", "npo"]) == 0
    assert main(["demo", "--seeds", "3", "--lrs", "[1e-3,0.1]", "--settings", "[random]"]) == 0
    assert received[0].objective == "npo"
    assert received[1] == DemoConfig(seeds=3, lrs=[1e-3, 0.1], settings=["random"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--settings", "class"], DemoConfig(settings=["class"])),
        (["--objectives=gd,npo", "--lrs", "1e-3,2e-3"], DemoConfig(objectives=["gd", "npo"], lrs=[1e-3, 2e-3])),
        (["--lrs=0.1", "--seeds", "2"], DemoConfig(lrs=[0.1], seeds=2)),
    ],
)
def test_lists_need_no_brackets(received: list, words: list[str], expected: DemoConfig) -> None:
    assert main(["demo", *words]) == 0
    assert received == [expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "subcommand"),
        (["masks"], "subcommand"),
        (["unlearn"], "required: model, data.path"),
        (["unlearn", *REQUIRED, "--lr", "fast"], "--lr"),
        (["unlearn", *REQUIRED, "--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["unlearn", *REQUIRED, "--objective", "xx"], "--objective"),
        (["unlearn", "nowhere.yaml"], "nowhere.yaml"),
        (["demo", "--seeds", "one"], "--seeds"),
        (["demo", "--settings", "nothing"], "--settings"),
        (["masks", "show"], "required: file"),
        (["s3t", "delete", "f"], "required: request_id"),
        (["masks", "show", "."], "masks must be a file, got the folder '.'"),
    ],
)
def test_bad_command_lines_end_with_one_line_and_code_2(
    arguments: list[str], message: str, received: list, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pymape: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
    assert not received


def test_no_command_at_all_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "{demo,unlearn,evaluate,masks,session, ...}" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["unlearn", "s3t init system"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: m\nsliices: 2\n", "sliices"),
        (b"model: m\nlora: {rank: 2}\n", "rank"),
        (b"", "--config must be a YAML file with lines `option: value`, got '{path}'"),
        (b"id,text\n1,somebody's words\n", "--config must be a YAML file with lines `option: value`, got '{path}'"),
        (b"model: \xe9\n", "--config must be a text file of options, got '{path}': "),
    ],
)
def test_files_that_hold_no_options(
    command: str, content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    assert main([*command.split(), f"--config={path}"]) == 2
    error = capsys.readouterr().err
    assert message.format(path=path) in error
    assert "somebody" not in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a must be b,\n  got c"), 2, "pymape: error: a must be b, got c\n"),
        (PermissionError(13, "Permission denied", "/x/y"), 2, "pymape: error: /x/y: Permission denied\n"),
        (ImportError("no matplotlib"), 2, "pymape: error: no matplotlib\n"),
        (KeyboardInterrupt(), 130, "pymape: interrupted\n"),
    ],
)
def test_errors_of_the_work_are_one_line(
    error: BaseException, code: int, line: str, received: list, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(config: DemoConfig) -> None:
        raise error

    monkeypatch.setattr(sys.modules["pymape.commands.demo"], "run_demo", fail)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == line


def test_a_terminated_command_cleans_up(
    received: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def work(config: DemoConfig) -> None:
        with run_folder(config.output, "demo") as folder:
            (folder / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys.modules["pymape.commands.demo"], "run_demo", work)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 130
    assert capsys.readouterr().err == "pymape: interrupted\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_masks_show_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    masks = ModuleMasks.random(layout(tiny_model("bert")), 0.5)
    masks.save(tmp_path / "masks.safetensors")
    picture = tmp_path / "masks.svg"
    assert main(["masks", "show", str(tmp_path / "masks.safetensors"), "--plot", str(picture)]) == 0
    assert masks.summary() in capsys.readouterr().out
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("content", [None, b"", b"not masks at all", "cut"])
def test_masks_show_refuses_what_is_no_mask_file(
    content: bytes | str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "masks.safetensors"
    if content == "cut":
        ModuleMasks.random(layout(tiny_model("bert")), 0.5).save(path)
        content = path.read_bytes()[:-3]
    if isinstance(content, bytes):
        path.write_bytes(content)
    assert main(["masks", "show", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("pymape: error: ")
    assert str(path) in captured.err
    assert captured.err.count("\n") == 1
