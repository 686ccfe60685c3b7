"""Objectives and their options through the command's configuration."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from session_tools import options, write_files

from pymape.commands.unlearn import run_unlearn
from pymape.config import DataConfig


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def files(request, tmp_path_factory) -> Path:
    """A model, records of which the first twelve have an alternative answer, and the ids to forget."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder, request.param)
    with (folder / "train.csv").open(newline="") as stream:
        names, *rows = csv.reader(stream)
    other = ["w1 w2 w3" if request.param == "gpt2" else str((int(row[2]) + 1) % 3) for row in rows]
    with (folder / "train.csv").open("w", newline="") as stream:
        rows = [
            [*row, answer if place < 12 else ""] for place, (row, answer) in enumerate(zip(rows, other, strict=True))
        ]
        csv.writer(stream).writerows([[*names, "other"], *rows])
    (folder / "forget.txt").write_text("r1\nr5\nr9\n")
    (folder / "unanswered.txt").write_text("r1\nr20\n")
    return folder


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ("dpo", {"retain": "kl"}),
        ("idk", {}),
        ("simnpo", {"objective_options": {"delta": 0.5}}),
        ("rmu", {"objective_options": {"layer": 1, "norm": 3.0}}),
        ("so", {"objective_options": {"loss": "gd", "rho": 0.1}, "retain": "kl"}),
        ("influence", {"objective_options": {"cg_steps": 3}}),
        ("ssd", {"objective_options": {"selection": 1.5}}),
    ],
)
def test_every_new_objective_runs_from_the_configuration(objective, more, files, tmp_path):
    torch.set_num_threads(1)
    data = DataConfig(str(files / "train.csv"), str(files / "forget.txt"), alternative_column="other")
    config = options(files, data=data, output=str(tmp_path / "run"), objective=objective, **more)
    summary = run_unlearn(config)
    assert summary["config"]["objective_options"] == more.get("objective_options", {})
    assert summary["models"]["unlearned"] != summary["models"]["original"]


def test_a_forget_record_without_an_alternative_answer_is_a_one_line_error(files, tmp_path):
    data = DataConfig(str(files / "train.csv"), str(files / "unanswered.txt"), alternative_column="other")
    with pytest.raises(ValueError, match="alternative_column must have an answer for every forgotten record") as caught:
        run_unlearn(options(files, data=data, output=str(tmp_path / "run"), objective="idk"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    data.alternative_column = "nothing"
    with pytest.raises(ValueError, match=r"data.alternative_column"):
        run_unlearn(options(files, data=data, output=str(tmp_path / "run"), objective="idk"))
