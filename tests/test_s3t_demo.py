"""The S3T demo in miniature: every file, the same requests for every method, systems that still work afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pymape.cli import main
from pymape.s3t import S3T
from pymape.s3t.config import S3TDemoConfig
from pymape.s3t.demo import digit_parts, run_s3t_demo

SMALL: dict[str, Any] = {"shards": 2, "slices": 2, "budget": 2, "epochs": 1, "base_epochs": 1, "workers": 1}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("demo") / "s3t"
    return output, run_s3t_demo(S3TDemoConfig(output=str(output), **SMALL))


def test_parts_are_disjoint() -> None:
    parts = [{record["id"] for record in part} for part in digit_parts(0)]
    assert [len(part) for part in parts] == [449, 898, 450]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_folder_is_complete(demo: tuple[Path, dict[str, Any]]) -> None:
    output, summary = demo
    assert {path.name for path in output.iterdir()} == {"base", "chain-cover", "cyclic", "report.html", "summary.json"}
    written = json.loads((output / "summary.json").read_text())
    assert written.pop("files") == sorted(path.name for path in output.iterdir())
    assert written == summary
    page = (output / "report.html").read_text()
    for text in ("Deleting digits exactly", "Request by request", "What chain-cover served", "SISA"):
        assert text in page


def test_every_method_is_asked_the_same_until_a_shard_dies(demo: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo
    runs = summary["runs"]
    assert set(runs) == {"chain-cover", "cyclic", "SISA"}
    for name in ("chain-cover", "cyclic"):
        steps = runs[name]["steps"]
        assert [min(step["depths"]) == 0 for step in steps] == [False] * (len(steps) - 1) + [True]
        assert steps[0]["depths"] == [2, 2]
        assert runs[name]["verified"]["replayed"]
    assert runs["SISA"]["bytes"] >= max(runs[name]["bytes"] for name in ("chain-cover", "cyclic"))
    # With two slices both methods choose the same sequences, and the records lie in the same slices.
    assert [step["serving"] for step in runs["cyclic"]["steps"]] == [
        step["serving"] for step in runs["chain-cover"]["steps"]
    ]


def test_the_systems_work_where_they_ended_up(demo: tuple[Path, dict[str, Any]]) -> None:
    output, _ = demo
    with S3T(output / "chain-cover") as system:
        assert system.verify(replay=True)["ok"]


def test_bad_options_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    assert main(["s3t", "demo", "--output", str(output), "--slices", "9", "--base-epochs", "1"]) == 2
    assert "slices must be at most 4, the layers of the model, got 9" in capsys.readouterr().err
    assert not output.exists()
