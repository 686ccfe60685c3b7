"""Experiments: the demo's figures, every method, resuming, and the tables' arithmetic against values by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from pymape.cli import main
from pymape.commands.demo import run_demo
from pymape.config import DemoConfig
from pymape.experiments import cells, methods, tasks, unit
from pymape.experiments.config import (
    ExperimentConfig,
    MethodConfig,
    SelectionConfig,
    TaskConfig,
    find_experiment,
    read_experiment,
)
from pymape.experiments.kinds import KINDS
from pymape.experiments.methods import Chosen, Measured, choose, unlearn
from pymape.experiments.runner import run_experiment
from pymape.experiments.summaries import bootstrap_interval, pool, read_cells, student_interval, summarise_cells
from pymape.experiments.tasks import forgetting, make_task, train
from pymape.metrics import METRICS
from pymape.model_layout import find_layers

YAML = """
title: Small digits
task: {name: digits, epochs: 2}
settings:
  class: {forget: class, lam: 10}
  random: {forget: random, share: 0.1, lam: 1}
seeds: [1]
objectives: [gd]
selections:
  everything: {}
  learned: {kind: modules, budget: 0.3}
lrs: [1.0e-3, 5.0e-3]
steps: 2
evidence: null
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """File, folder and summary of a small experiment."""
    folder = tmp_path_factory.mktemp("experiment")
    file = folder / "small.yaml"
    file.write_text(YAML)
    return file, folder / "run", run_experiment(str(file), output=str(folder / "run"), workers=1)


def test_figures_are_the_demos(finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, folder, _ = finished
    options: dict[str, Any] = {"train_epochs": 2, "steps": 2, "lrs": [1e-3, 5e-3], "objectives": ["gd"]}
    demo = run_demo(DemoConfig(output=str(tmp_path / "demo"), seeds=1, first_seed=1, **options))
    found = summarise_cells(read_cells(folder / "results.jsonl"), ["everything"])
    by_place = {(row["setting"], row["objective"], row["selection"]): row for row in found["chosen"]}
    for run in demo["runs"]:
        for method in run["methods"]:
            row = by_place[run["setting"], "gd", "learned" if method["masked"] else "everything"]
            assert row["value"] == method["lr"]
            assert {name: row[name] for name in (*METRICS, "gap")} == {name: method[name] for name in (*METRICS, "gap")}
        assert by_place[run["setting"], "retrained", ""]["gap"] == 0
        assert by_place[run["setting"], "retrained again", ""]["gap"] > 0


def test_what_is_done_is_not_done_again(
    finished: tuple[Path, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder, first = finished
    lines = (folder / "results.jsonl").read_text()
    assert (first["cells"], first["computed"]) == (14, 14)
    last = json.loads(lines.splitlines()[-1])
    lost = next(
        path
        for path in (folder / "cells").iterdir()
        if f'"selection_score": {last["selection_score"]!r}' in path.read_text()
    )
    lost.unlink()
    monkeypatch.setattr(unit, "train", lambda *_: pytest.fail("the models are on disk"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    again = run_experiment(str(file), output=str(folder))
    assert (again["computed"], again["workers"]) == (1, 2)
    costs = {"seconds", "wall_seconds", "cpu_seconds", "peak_cpu_mib", "choose_seconds"}

    def figures(text: str) -> list[dict[str, Any]]:
        return [{k: v for k, v in json.loads(line).items() if k not in costs} for line in text.splitlines()]

    assert figures((folder / "results.jsonl").read_text()) == figures(lines)


def test_a_change_recomputes_only_what_depends_on_it(finished: tuple[Path, Path, dict[str, Any]]) -> None:
    file, folder, _ = finished
    config = read_experiment(file)
    task = make_task(config.task)
    before = {cell.key for cell in cells.cells_of(config, task)}
    assert before == {path.stem for path in (folder / "cells").iterdir()}
    config.settings["class"].lam = 3.0
    new = [cell for cell in cells.cells_of(config, task) if cell.key not in before]
    assert [(cell.setting, cell.selection) for cell in new] == [("class", "learned")] * 2
    config.steps = 3
    new = [cell for cell in cells.cells_of(config, task) if cell.key not in before]
    assert {cell.objective for cell in new} == {"gd"}
    assert len(new) == 8


def test_a_tuned_option_that_is_called_as_a_part_of_the_key_is(tmp_path: Path) -> None:
    """SSD tunes its `selection` factor, which is not the selection of what it may change."""
    file = tmp_path / "small.yaml"
    file.write_text(YAML)
    config = read_experiment(file)
    values = [1.0, 2.0][: len(config.lrs)]
    config.methods = [MethodConfig("ssd", ["everything", "learned"], parameter="selection", values=values)]
    found = [cell for cell in cells.cells_of(config, make_task(config.task)) if cell.objective == "ssd"]
    assert len({cell.key for cell in found}) == len(found) > len(values) * len(config.settings)


def test_a_method_may_be_for_some_settings_alone(tmp_path: Path) -> None:
    """What matches unseen records is for settings that have some of what is forgotten."""
    file = tmp_path / "small.yaml"
    file.write_text(YAML.replace("lrs:", "methods: [{objective: match, settings: [random]}]\nlrs:"))
    config = read_experiment(file)
    methods.check_methods(config)
    made = cells.cells_of(config, make_task(config.task))
    assert {(cell.objective, cell.setting) for cell in made if cell.value} == {
        ("gd", "class"), ("gd", "random"), ("match", "random"),
    }  # fmt: skip
    assert [method.objective for method in config.narrowed(["class"]).all_methods] == ["gd"]
    assert config.narrowed(["class", "random"]) == config
    config.methods[0].settings = ["class"]
    with pytest.raises(ValueError, match=r"unseen records of what is forgotten for setting 'class', .* got 'match'"):
        methods.check_methods(config)


def test_matching_unseen_records_changes_the_model(trained: dict[str, Any]) -> None:
    model, data = copy.deepcopy(trained["model"]), trained["data"]
    before = model.state_dict()["classifier.weight"].clone()
    sets = {"forget": data.forget, "retain": data.retain, "unseen": data.validation}
    unlearn(model, Chosen(), MethodConfig("match"), 1e-3, **sets, steps=3, batch_size=8, seed=0)
    assert not torch.equal(model.state_dict()["classifier.weight"], before)


def test_cells_keep_their_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that changes throws away what was computed: only `CODE`, raised by hand, may do that to all cells."""
    file = tmp_path / "small.yaml"
    file.write_text(YAML)
    config = read_experiment(file)
    task = dataclasses.replace(make_task(config.task), fingerprint="fingerprint")
    monkeypatch.setattr(cells.importlib.metadata, "version", lambda _: "0")
    monkeypatch.setattr(cells, "__version__", "0")
    keys = {
        (cell.setting, cell.objective, cell.selection, cell.value): cell.key for cell in cells.cells_of(config, task)
    }
    assert keys["class", "original", "", None] == "3cd0c8fd1a8df92753e7f8624fb63138"
    assert keys["class", "gd", "learned", 1e-3] == "78b9881fcd4b6f11ad345888a00f5e22"
    assert keys["random", "gd", "everything", 5e-3] == "51cdbd7c0fed66e612a587d23932016f"


def test_page_and_tables_show_the_result(finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, folder, _ = finished
    page = tmp_path / "page.html"
    assert main(["report", str(folder), "--output", str(page)]) == 0
    text = page.read_text()
    assert "http://www.w3.org" in text  # the pictures are there
    for shown in ("Small digits", "Forgetting, class", "Mean gap, selection", "training records of class 1", "torch"):
        assert shown in text
    found = summarise_cells(read_cells(folder / "results.jsonl"), ["everything"])
    gap = next(row for row in found["table"] if row["selection"] == "learned")["gap"]["mean"]
    assert f"<td class=n>{gap:.1f}</td>" in text
    assert f"| {gap:.1f} |" in (folder / "tables.md").read_text()


def test_a_value_that_ends_in_nothing_is_a_result(finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, folder, _ = finished
    shutil.copytree(folder / "models", tmp_path / "run" / "models")
    (tmp_path / "run" / "cells").mkdir()
    file = tmp_path / "far.yaml"
    file.write_text(YAML.replace("5.0e-3", "1.0e+30"))
    run_experiment(str(file), output=str(tmp_path / "run"), workers=1)
    far = [row for row in read_cells(tmp_path / "run" / "results.jsonl") if row["value"] == 1e30]
    assert far
    assert all("finite" in row["failed"] for row in far)


def test_workers_find_the_same_as_one_process(finished: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    _, folder, _ = finished
    file = tmp_path / "two.yaml"
    file.write_text(YAML.replace("5.0e-3", "2.0e-3").replace("objectives: [gd]", "objectives: [ga]"))
    summary = run_experiment(str(file), output=str(tmp_path / "run"), workers=2)
    assert (summary["computed"], summary["workers"]) == (14, 2)
    same = {row["setting"]: row for row in read_cells(folder / "results.jsonl") if row["objective"] == "retrained"}
    for row in read_cells(tmp_path / "run" / "results.jsonl"):
        if row["objective"] == "retrained":
            assert all(row[name] == same[row["setting"]][name] for name in METRICS)


def test_a_failing_worker_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(YAML + "methods: [{objective: rmu, options: {layer: 99}}]\n")
    with pytest.raises(ValueError, match="a worker must succeed, got ValueError: layer"):
        run_experiment(str(file), output=str(tmp_path / "run"), workers=2)


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    config = TaskConfig("digits", epochs=2)
    task = make_task(config)
    split = task.split(0)
    experiment = read_text(YAML)
    model = task.start(0)
    train(model, split.train, config, 0)
    return {"model": model, "data": forgetting(experiment.settings["class"], 0, split, task.classes)}


def read_text(text: str) -> ExperimentConfig:
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "experiment.yaml"
        file.write_text(text)
        return read_experiment(file)


SELECTIONS = [
    SelectionConfig("everything"),
    SelectionConfig("modules", "random", 0.1),
    SelectionConfig("modules", "difference", 0.1, samples=20),
    SelectionConfig("last_layers", layers=1),
    SelectionConfig("saliency", budget=0.25),
    SelectionConfig("lora", rank=2),
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda selection: f"{selection.kind}-{selection.objective}")
def test_only_what_is_selected_changes(selection: SelectionConfig, trained: dict[str, Any]) -> None:
    model, data = copy.deepcopy(trained["model"]), trained["data"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    chosen = choose(selection, 1.0, Measured(model, {"forget": data.forget, "retain": data.retain}, 0))
    changed_model, facts = unlearn(
        model, chosen, MethodConfig("gd"), 1e-3, forget=data.forget, retain=data.retain, steps=3, batch_size=8, seed=0
    )
    after = changed_model.state_dict()
    assert after.keys() == before.keys()
    assert all(parameter.requires_grad for parameter in changed_model.parameters())
    changed = sum(int((after[name] != before[name]).sum()) for name in before) / sum(v.numel() for v in before.values())
    if selection.kind == "lora":
        # Rank 2 in every linear layer of the body, and nothing else.
        touched = {name for name in before if not torch.equal(after[name], before[name])}
        assert touched
        assert all(before[name].ndim == 2 and name.startswith("vit.") for name in touched)
        for name in touched:
            assert torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-3) <= 2
        return
    assert 0.5 * facts["trained"] < changed <= facts["trained"]
    if selection.kind == "saliency":
        assert facts["trained"] == pytest.approx(0.25, abs=1e-5)
    if selection.kind == "last_layers":
        body = last_layer(changed_model)
        touched = {name for name in before if not torch.equal(after[name], before[name])}
        assert touched <= body


def last_layer(model: torch.nn.Module) -> set[str]:
    """Names of the parameters of the last layer."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(getattr(module, name))]
        for module, name, _, _ in (
            *find_layers(model)[-1].head_slices(torch.arange(4)),
            *find_layers(model)[-1].filter_slices(torch.arange(256)),
        )
    }


def test_saliency_takes_the_largest_gradients(trained: dict[str, Any]) -> None:
    model, data = trained["model"], trained["data"]
    measured = Measured(model, {"forget": data.forget, "retain": data.retain}, 0)
    chosen = choose(SelectionConfig("saliency", budget=0.1), 1.0, measured)
    images = torch.stack([record["pixel_values"] for record in data.forget])
    labels = torch.stack([record["labels"] for record in data.forget])
    loss = model(pixel_values=images, labels=labels).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert chosen.entries is not None
    kept = torch.cat([g.abs()[keep] for g, keep in zip(gradients, chosen.entries, strict=True)])
    left = torch.cat([g.abs()[~keep] for g, keep in zip(gradients, chosen.entries, strict=True)])
    assert kept.min() >= left.max() * (1 - 1e-3)
    assert len(kept) == round(0.1 * (len(kept) + len(left)))


def test_l1_pulls_weights_to_zero(trained: dict[str, Any]) -> None:
    data = trained["data"]
    norms = []
    for weight in (0.0, 1.0):
        method = MethodConfig("l1_sparse", options={"weight": weight})
        model, _ = unlearn(
            copy.deepcopy(trained["model"]), Chosen(), method, 1e-3,
            forget=data.forget, retain=data.retain, steps=5, batch_size=8, seed=0,
        )  # fmt: skip
        norms.append(sum(parameter.detach().abs().sum().item() for parameter in model.parameters()))
    assert norms[1] < 0.99 * norms[0]


def cell(setting: str, seed: int, objective: str, selection: str, ua: float, **rest: Any) -> dict[str, Any]:
    figures = {"UA": ua, "RA": 100.0, "TA": 100.0, "MIA": 0.0, "seconds": 1.0, "trained": 1.0, "peak_cpu_mib": 1.0}
    place = {"setting": setting, "seed": seed, "objective": objective, "selection": selection, "parameter": "lr"}
    return {**place, "value": 1.0, **figures, **rest}


def test_choice_gap_and_differences_by_hand() -> None:
    cells = []
    for seed, gaps in ((0, (4.0, 1.0)), (1, (2.0, 3.0)), (2, (5.0, 5.0))):
        cells.append(cell("s", seed, "retrained", "", 50.0))
        for name, gap in zip(("everything", "learned"), gaps, strict=True):
            # The closest to retraining of all is not chosen: the rule does not see it.
            cells.append(cell("s", seed, "ga", name, 50.0, value=0.1, selection_score=2.0))
            cells.append(cell("s", seed, "ga", name, 50.0 + 4 * gap, value=0.2, selection_score=1.0))
            cells.append(cell("s", seed, "ga", name, 0.0, value=0.3, failed="loss must stay finite"))
    found = summarise_cells(cells, ["everything"])
    assert [row["gap"] for row in found["chosen"] if row["selection"] == "learned"] == [1.0, 3.0, 5.0]
    (row,) = found["gap"]["paired"]
    assert row["difference"]["values"] == [-3.0, 1.0, 0.0]
    assert (row["won"], row["tied"], row["lost"]) == (1, 1, 1)
    assert len(found["failed"]) == 6
    (pooled,) = found["gap"]["pooled"]
    assert pooled["mean"] == pytest.approx(-2 / 3)
    assert [(pair["seed"], pair["difference"]) for pair in pooled["losses"]] == [(1, 1.0)]
    assert pooled["interval"] == (-3.0, 1.0)


def test_pairs_that_share_models_count_once() -> None:
    pairs = [
        {"setting": "s", "seed": seed, "objective": objective, "selection": "a", "against": "b", "own": 0.0,
         "other": 0.0, "difference": value, "models": seed}
        for seed, value in enumerate([-1.0, 1.0, -1.0, 1.0])
        for objective in ("ga", "gd", "npo", "kl")
    ]  # fmt: skip
    (row,) = pool(pairs)
    assert row["models"] == 4
    means = [-1.0, 1.0, -1.0, 1.0]
    assert row["model_interval"] == student_interval(means)
    half = 3.182446 * math.sqrt(4 / 3) / 2  # quantile of 3 degrees of freedom x deviation / root of the number
    assert row["model_interval"] == pytest.approx((-half, half))
    low, high = row["interval"]
    assert high - low < half


def test_little_is_known_of_few_models() -> None:
    assert student_interval([1.0]) == (-math.inf, math.inf)
    low, high = student_interval([-2.0, -1.0, -0.3])
    assert low < -2.0
    assert high > 0
    assert bootstrap_interval([-2.0, -1.0, -0.3])[1] == -0.3


def test_interval_against_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).tolist()
    low, high = bootstrap_interval(values)
    half = 1.96 * torch.tensor(values).std().item() / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seeds: [1]", "seeds: []"), "seeds must be at least one"),
        (("steps: 2", "steps: 0"), "steps must be at least 1, got 0"),
        (("budget: 0.3", "budget: 1.5"), "selections.learned.budget must be in"),
        (("objectives: [gd]", "objectives: []"), "objectives or methods must name at least one"),
        (("objectives: [gd]", "methods: [{objective: ga, values: [1]}]"), "values of 'ga' must be as many as lrs, 2"),
        (("objectives: [gd]", "methods: [{objective: ga, selections: [x]}]"), "methods must use selections among"),
        (("objectives: [gd]", "objectives: [gd]\nmethods: [{objective: gd}]"), "gd on everything twice"),
        (
            ("objectives: [gd]", "methods: [{objective: ssd, parameter: selection}]"),
            "values of selection must be given",
        ),
        (
            ("objectives: [gd]", "methods: [{objective: gd, settings: [x]}]"),
            "methods must use settings among class, ran",
        ),
        (("title: Small digits", "baselines: [x]"), "baselines must be among everything, learned, got 'x'"),
        (("steps: 2", "stepz: 2"), "stepz"),
        (("share: 0.1", "share: 0.1, requests: 10"), "settings.random.requests must be at least 1, of shares below 1"),
        (("lam: 10", "lam: 10, requests: 2"), "settings.class.requests must be 1 where no random records"),
        (
            ("budget: 0.3}", "samples: 9}\nsteps: 1\nsettings: {s: {requests: 2}}"),
            "selections.learned.samples must be all where there are several requests, got 9",
        ),
    ],
)
def test_bad_files_are_refused(change: tuple[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        read_text(YAML.replace(*change))


def test_bad_calls_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    file = tmp_path / "small.yaml"
    file.write_text(YAML)
    one_shot = tmp_path / "one_shot.yaml"
    one_shot.write_text(
        YAML.replace("learned: {kind: modules, budget: 0.3}", "learned: {kind: lora}").replace("[gd]", "[influence]")
    )
    for words, message in (
        (["experiment", "run", "nothing"], "experiment must be a YAML file or one of"),
        (["experiment", "run", str(file), "--output", str(tmp_path / "other")], "output must be a new or empty folder"),
        (["experiment", "run", str(file), "--workers", "0"], "workers must be at least 1, got 0"),
        (["experiment", "run", str(file), "--settings", "other"], "settings must be among class, random, got 'other'"),
        (["experiment", "run", str(one_shot)], "'influence' must be given everything or heads and filters"),
        (
            ["report", str(tmp_path / "other"), "--output", str(tmp_path)],
            "output must be a file to write, got the folder",
        ),
        (["report", str(tmp_path / "other")], "runs must be folders of finished experiments"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["file"]


def test_files_that_come_with_the_project_are_valid() -> None:
    folder = find_experiment("digits").parent
    names = [path.stem for path in folder.glob("*.yaml") if "\nsettings:" in path.read_text()]
    assert "digits" in names
    for name in names:
        config = read_experiment(find_experiment(name))
        methods.check_methods(config)
        assert len(config.seeds) >= 3


def test_every_kind_of_task_can_be_named_and_made() -> None:
    assert set(KINDS) == set(get_args(get_type_hints(TaskConfig)["name"])) == set(tasks.MAKERS)
