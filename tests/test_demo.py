"""The demo in miniature: every file and figure, one choice for both sides, the same result twice."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTForImageClassification

from pymape.cli import main
from pymape.commands.demo import run_demo
from pymape.config import DemoConfig
from pymape.masks import ModuleMasks
from pymape.metrics import METRICS, mean_gap

SMALL = {"train_epochs": 2, "steps": 2, "lrs": [1e-3, 5e-3], "objectives": ["gd"], "seeds": 2}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    return output, run_demo(DemoConfig(output=str(output), **SMALL))


def test_folder_is_complete(demo: tuple[Path, dict[str, Any]]) -> None:
    output, summary = demo
    masks = {f"masks-{setting}-seed{seed}.safetensors" for setting in ("class", "random") for seed in (0, 1)}
    assert {path.name for path in output.iterdir()} == {"summary.json", "report.html", "model", *masks}
    assert {path.name for path in output.parent.iterdir()} == {"demo"}
    written = json.loads((output / "summary.json").read_text())
    assert written.pop("files") == sorted(path.name for path in output.iterdir())
    assert written == summary
    model = ViTForImageClassification.from_pretrained(output / "model")
    found = ModuleMasks.load(output / "masks-class-seed0.safetensors", model)
    assert 0 < found.cost() <= summary["config"]["budget"]
    page = (output / "report.html").read_text()
    for text in ("Forgetting a whole class", "Forgetting random images", "remaining classes", "learned masks"):
        assert text in page


def test_summary_says_how_it_was_made(demo: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo
    assert summary["config"]["lrs"] == SMALL["lrs"]
    assert {"pymape", "torch", "transformers", "python"} <= summary["versions"].keys()
    assert summary["command"].startswith("pymape")
    for run in summary["runs"]:
        assert {"objective", "lam", "objective_before", "objective_after", "cost", "seconds"} <= run["masks"].keys()


def test_both_sides_get_one_grid_and_one_rule(demo: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo
    for run in summary["runs"]:
        sides = [(method["objective"], method["masked"]) for method in run["methods"]]
        assert sides == [("gd", False), ("gd", True)]
        for method in run["methods"]:
            assert [row["lr"] for row in method["grid"]] == SMALL["lrs"]
            best = min(method["grid"], key=lambda row: row["selection"])
            assert {name: method[name] for name in best} == best


def test_gaps_and_spreads_follow_from_the_runs(demo: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo
    for run in summary["runs"]:
        assert run["retrained"]["gap"] == 0
        for method in run["methods"]:
            assert method["gap"] == mean_gap(method, run["retrained"], METRICS)
    row = next(row for row in summary["paired"] if (row["setting"], row["objective"]) == ("class", "gd"))
    gaps = [
        {method["masked"]: method["gap"] for method in run["methods"] if method["objective"] == "gd"}
        for run in summary["runs"]
        if run["setting"] == "class"
    ]
    differences = [pair[True] - pair[False] for pair in gaps]
    assert row["difference"]["values"] == differences
    assert row["difference"]["mean"] == pytest.approx(statistics.fmean(differences))
    assert row["difference"]["std"] == pytest.approx(statistics.stdev(differences))
    assert row["wins"] == sum(difference < 0 for difference in differences)


def test_a_class_is_judged_on_the_remaining_ones(demo: tuple[Path, dict[str, Any]]) -> None:
    _, summary = demo
    runs = {(run["setting"], run["seed"]): run for run in summary["runs"]}
    assert runs["class", 1]["forgotten"].endswith("of class 1")
    assert runs["class", 0]["records"]["test"] < runs["random", 0]["records"]["test"] == 432
    assert runs["random", 0]["records"]["forget"] == round(0.1 * 1078)
    for run in summary["runs"]:
        assert run["records"]["forget"] + run["records"]["retain"] == 1078
    # The retrained model has never seen the class.
    assert runs["class", 0]["retrained"]["UA"] == 100


def test_same_seed_gives_the_same_figures(demo: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    _, summary = demo
    options = {**SMALL, "seeds": 1, "first_seed": 1, "settings": ["class"]}
    again = run_demo(DemoConfig(output=str(tmp_path / "demo"), **options))
    first = next(run for run in summary["runs"] if (run["setting"], run["seed"]) == ("class", 1))
    names = ("UA", "RA", "TA", "MIA", "gap", "lr")
    expected = [{name: row[name] for name in names} for row in first["methods"] if row["objective"] == "gd"]
    assert [{name: row[name] for name in names} for row in again["runs"][0]["methods"]] == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "0"], "budget must be in (0, 1], got 0.0"),
        (["--budget", "1.01"], "budget must be in (0, 1], got 1.01"),
        (["--forget_share", "1"], "forget_share must be in (0, 1), got 1.0"),
        (["--forget_class", "10"], "forget_class must be in [0, 10), got 10"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--lrs", "[]"], "lrs must be positive learning rates, got []"),
        (["--lrs", "[0]"], "lrs must be positive learning rates, got [0.0]"),
        (["--objectives", "[ga,ga]"], "objectives must be at least one, each once"),
        (["--class_lam", "-1"], "class_lam must be finite and not negative, got -1.0"),
    ],
)
def test_bad_options_are_refused_before_any_work(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pymape.commands.demo.make_task", lambda config: pytest.fail("work was begun"))
    assert main(["demo", "--output", str(tmp_path / "demo"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
