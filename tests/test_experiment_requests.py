"""Successive requests of an experiment: what each forgets, and that the chain is what its parts give one by one."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from test_evidence import YAML as SMALL
from transformers import ViTForImageClassification

from pymape.cli import main
from pymape.experiments.cells import Cell, cell_file, cells_of
from pymape.experiments.config import (
    ExperimentConfig,
    MethodConfig,
    SettingConfig,
    TaskConfig,
    read_experiment,
)
from pymape.experiments.methods import Measured, choose, unlearn
from pymape.experiments.runner import run_experiment
from pymape.experiments.tasks import Forgetting, forgetting, make_task, train
from pymape.experiments.unit import Unit

REQUESTS = 3
YAML = (
    SMALL.replace("  class: {forget: class, lam: 10}\n", "")
    .replace("share: 0.1", f"share: 0.02, requests: {REQUESTS}")
    .replace("shadows: 2", "shadows: 0")
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, Path]:
    folder = tmp_path_factory.mktemp("requests")
    (folder / "small.yaml").write_text(YAML)
    run_experiment(str(folder / "small.yaml"), output=str(folder / "run"), workers=1)
    return read_experiment(folder / "small.yaml"), folder / "run"


@pytest.fixture(scope="module")
def data(finished: tuple[ExperimentConfig, Path]) -> list[Forgetting]:
    config, _ = finished
    task, setting = make_task(config.task), config.settings["random"]
    return [forgetting(setting, 1, task.split(1), task.classes, number) for number in range(1, REQUESTS + 1)]


def cell_of(finished: tuple[ExperimentConfig, Path], selection: str, value: float) -> Cell:
    config, _ = finished
    cells = cells_of(config, make_task(config.task))
    return next(cell for cell in cells if (cell.selection, cell.value) == (selection, value))


def test_requests_forget_one_after_the_other(finished: tuple[ExperimentConfig, Path], data: list[Forgetting]) -> None:
    config, _ = finished
    task = make_task(config.task)
    train_ids = [record["id"] for record in task.split(1).train]
    gone: list[str] = []
    for number, state in enumerate(data, start=1):
        request = [record["id"] for record in state.request]
        assert len(request) == round(0.02 * len(train_ids))
        assert not set(request) & set(gone)
        gone += request
        assert [record["id"] for record in state.forget] == [name for name in train_ids if name in gone]
        assert [record["id"] for record in state.retain] == [name for name in train_ids if name not in gone]
        assert (f"at each of {number} requests" in state.description) == (number > 1)
    last = forgetting(config.settings["random"], 1, task.split(1), task.classes)
    assert [record["id"] for record in last.forget] == [record["id"] for record in data[-1].forget]
    single = forgetting(SettingConfig("random", share=0.02), 1, task.split(1), task.classes)
    assert single.request == single.forget
    assert [record["id"] for record in single.forget] == [record["id"] for record in data[0].forget]


@pytest.mark.parametrize("selection", ["everything", "learned"])
def test_the_chain_is_its_requests_one_by_one(
    finished: tuple[ExperimentConfig, Path], data: list[Forgetting], selection: str
) -> None:
    """Bit by bit, with masks from importance that is measured anew for every request."""
    config, folder = finished
    task = make_task(config.task)
    unit, cell = Unit(config, task, folder, ("random", 1)), cell_of(finished, selection, 5e-3)
    found = json.loads(cell_file(folder, cell).read_text())
    assert len(found["steps"]) == REQUESTS
    original, _ = unit.reference("original")
    model = copy.deepcopy(original)
    for state, steps in zip(data, found["steps"], strict=True):
        measured = Measured(original, {"forget": state.request, "retain": state.retain}, 1)
        model, _ = unlearn(
            model, choose(config.selections[selection], 1.0, measured), MethodConfig("gd"), 5e-3, forget=state.request,
            retain=state.retain, steps=steps, batch_size=config.batch_size, seed=1,
        )  # fmt: skip
    for again in (unit.unlearned(cell).model, unit.unlearned(cell, found["steps"]).model):
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert found["forget_accuracy"] == unit.result(cell)["forget_accuracy"]
    assert ("mask_cost" in found) == (selection == "learned")


def test_what_is_known_of_records_that_moved_is_what_is_measured() -> None:
    config = TaskConfig("digits", epochs=1, options={"num_hidden_layers": 2, "hidden_size": 32})
    task, setting = make_task(config), SettingConfig("random", share=0.02, requests=2)
    model: ViTForImageClassification = task.start(0)
    states = [forgetting(setting, 0, task.split(0), task.classes, number) for number in (1, 2)]
    train(model, states[0].retain, config, 0)
    sets = [{"forget": state.request, "retain": state.retain} for state in states]
    first = Measured(model, sets[0], 0)
    for name in ("forget", "retain"):
        known, seconds = Measured(model, sets[1], 0, first)(name, None)
        anew, _ = Measured(model, sets[1], 0)(name, None)
        assert seconds == 0.0
        assert known.ids == anew.ids
        torch.testing.assert_close(known.filters, anew.filters)
        torch.testing.assert_close(known.heads, anew.heads)


def test_tables_and_page_say_so(finished: tuple[ExperimentConfig, Path], tmp_path: Path) -> None:
    _, folder = finished
    text = (folder / "tables.md").read_text()
    assert "After several requests: Cannot be judged" in text
    assert "random training records (2%) at each of 3 requests" in text
    assert "| retrained again |" in text
    rows = [json.loads(line) for line in (folder / "evidence.jsonl").read_text().splitlines()]
    assert all(row["differs"] == {} for row in rows)
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    text = page.read_text()
    assert "Dashed: a second retrained model" in text
    assert ">retrained again</text>" in text  # in the legend of the picture
