"""Runs an experiment cell by cell: what is done is kept under the hash of all it depends on, and never done again."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from pymape import __version__
from pymape.experiments.config import ExperimentConfig, find_experiment, read_experiment
from pymape.experiments.methods import Chosen, Measured, check_methods, choose, unlearn
from pymape.experiments.tables import RESULTS, read_cells, summarise_cells, write_markdown
from pymape.experiments.tasks import Forgetting, Task, forgetting, make_task, train
from pymape.files import atomic_write
from pymape.metrics import predict, summarise
from pymape.metrics.costs import measure_cost
from pymape.runs import SUMMARY, environment, quiet_transformers, write_summary

__all__ = ["Cell", "cells_of", "run_experiment"]

# Raised by hand whenever a change of the code changes what a cell contains.
_CODE = 1
_CELLS, _MODELS = "cells", "models"
_REFERENCES = ("original", "retrained")
# Errors of a method at a value of its grid, which then cannot be chosen; any other ends the run.
_RESULTS_TOO = ("must stay finite", "must select at least one")
_POLL = 0.5  # seconds between two looks at how far the workers are


@dataclass(frozen=True)
class Cell:
    """One model of the grid; `original` and `retrained` are cells without a selection and a value.

    Args:
        setting, seed, objective, selection, parameter, value: its place in the grid.
        key: hash of all that its result depends on.
    """

    setting: str
    seed: int
    objective: str
    selection: str
    parameter: str
    value: float | None
    key: str

    @property
    def place(self) -> dict[str, Any]:
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "key"}


def run_experiment(
    name: str, *, output: str | None = None, seeds: list[int] | None = None, workers: int = 1,
    data: str | None = None, model: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run what is missing of an experiment, print its tables and write them.

    The folder gets one file a cell while the experiment runs and, when it has ended, `results.jsonl` (a line a cell),
    `tables.md` and `summary.json`. An interrupted experiment goes on where it was; a changed one keeps the cells that
    the change leaves alone.

    Args:
        name: a YAML file, or the name of one in `experiments/`.
        output: folder to write; default `runs/NAME`.
        seeds: in place of the file's.
        workers: processes; each uses one thread.
        data: in place of the file's task.data.
        model: in place of the file's task.model.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: an option out of range, or an output folder that holds something else.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    path = find_experiment(name)
    config = read_experiment(path)
    config = dataclasses.replace(
        config,
        seeds=config.seeds if seeds is None else seeds,
        task=dataclasses.replace(config.task, data=data or config.task.data, model=model or config.task.model),
    )
    check_methods(config)
    folder = _folder(output or f"runs/{path.stem}")
    started, load = time.perf_counter(), os.getloadavg()
    with quiet_transformers():
        task = make_task(config.task)
        cells = cells_of(config, task)
        missing = _missing(folder, cells)
        _run(config, folder, cells, min(workers, max(1, len(_units(missing)))))
    summary: dict[str, Any] = {
        **environment(),
        "kind": "experiment",
        "name": path.stem,
        "config": dataclasses.asdict(config),
        "fingerprint": task.fingerprint,
        "cells": len(cells),
        "computed": len(missing),
        "workers": workers,
        "seconds": time.perf_counter() - started,
        "load_average": {"start": load, "end": os.getloadavg()},
        "processors": os.cpu_count(),
    }
    _write_results(folder, cells)
    found = summarise_cells(read_cells(folder / RESULTS), config.baselines)
    write_markdown(folder / "tables.md", summary, found)
    write_summary(folder, summary)
    print((folder / "tables.md").read_text(encoding="utf-8"))
    print(f"Wrote {RESULTS}, tables.md and {SUMMARY} to {folder} in {summary['seconds']:.0f} s.")
    return summary


def cells_of(config: ExperimentConfig, task: Task) -> list[Cell]:
    """All cells of the grid, those of one setting and seed together, the reference models first."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "scikit-learn")}
    training = {name: value for name, value in vars(config.task).items() if name not in ("data", "model")}
    common = {"code": _CODE, "pymape": __version__, **versions, "data": task.fingerprint, "task": training}
    cells = []
    for setting_name, setting in config.settings.items():
        judged = {"forget": setting.forget, "share": setting.share if setting.forget == "random" else None}
        for seed in config.seeds:
            place = {**common, "setting": judged, "seed": seed}
            cells += [
                Cell(setting_name, seed, name, "", "", None, _hash({**place, "objective": name}))
                for name in _REFERENCES
            ]
            for method in config.all_methods:
                for name in method.selections:
                    selection = config.selections[name].identity(setting.lam)
                    how = {"steps": config.steps, "batch_size": config.batch_size, "options": method.options}
                    made = {**place, **how, "objective": method.objective, "selection": selection}
                    cells += [
                        Cell(setting_name, seed, method.objective, name, method.parameter, value, key)
                        for value in method.values
                        for key in (_hash({**made, method.parameter: value}),)
                    ]
    return cells


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, got the file {output!r}")
    if folder.exists() and any(folder.iterdir()) and not (folder / _CELLS).is_dir():
        raise ValueError(f"output must be a new or empty folder or an earlier experiment's, got {output!r}")
    (folder / _CELLS).mkdir(parents=True, exist_ok=True)
    return folder


def _cell_file(folder: Path, key: str) -> Path:
    return folder / _CELLS / f"{key}.jsonl"


def _missing(folder: Path, cells: list[Cell]) -> list[Cell]:
    return [cell for cell in cells if not _cell_file(folder, cell.key).exists()]


def _units(cells: list[Cell]) -> list[tuple[str, int]]:
    """Pairs of setting and seed: the cells of one share their models and importance."""
    return list(dict.fromkeys((cell.setting, cell.seed) for cell in cells))


def _write_results(folder: Path, cells: list[Cell]) -> None:
    with atomic_write(folder / RESULTS) as temporary, temporary.open("w", encoding="utf-8") as file:
        for cell in cells:
            found = json.loads(_cell_file(folder, cell.key).read_text(encoding="utf-8"))
            file.write(json.dumps({**cell.place, **found}) + "\n")


def _run(config: ExperimentConfig, folder: Path, cells: list[Cell], workers: int) -> None:
    units = _units(_missing(folder, cells))
    with tqdm(total=len(cells), desc="cells", unit="cell", disable=None) as bar:

        def look() -> None:
            bar.update(len(cells) - len(_missing(folder, cells)) - bar.n)

        look()
        if workers == 1:
            _work(config, folder, iter(units), look)
        else:
            _run_workers(config, folder, units, workers, look)


def _run_workers(config: ExperimentConfig, folder: Path, units: list[tuple[str, int]], workers: int, look: Any) -> None:
    """Let processes take the units one by one; the files of the cells tell how far they are."""
    context = multiprocessing.get_context("spawn")
    queue, failures = context.Queue(), context.SimpleQueue()
    for unit in [*units, *[None] * workers]:
        queue.put(unit)
    processes = [
        context.Process(target=_worker, args=(config, folder, queue, failures), daemon=True) for _ in range(workers)
    ]
    try:
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(_POLL)
            look()
            if not failures.empty():
                raise ValueError(failures.get())
            broken = [process.exitcode for process in processes if process.exitcode]
            if broken:
                raise ValueError(f"workers must end by themselves, got exit code {broken[0]}")
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()


def _worker(config: ExperimentConfig, folder: Path, queue: Any, failures: Any) -> None:
    try:
        with quiet_transformers():
            _work(config, folder, iter(queue.get, None), lambda: None)
    except Exception as error:
        failures.put(f"a worker must succeed, got {type(error).__name__}: {error}")


def _work(config: ExperimentConfig, folder: Path, units: Iterator[tuple[str, int]], look: Any) -> None:
    """Run the missing cells of some units, on one thread: the models are too small to gain from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        task = make_task(config.task)
        cells = cells_of(config, task)
        for setting, seed in units:
            unit = _Unit(config, task, folder, [cell for cell in cells if (cell.setting, cell.seed) == (setting, seed)])
            for cell in unit.cells:
                path = _cell_file(folder, cell.key)
                if not path.exists():
                    with atomic_write(path) as temporary:
                        temporary.write_text(json.dumps(unit.result(cell)) + "\n", encoding="utf-8")
                    look()
    finally:
        torch.set_num_threads(threads)


class _Unit:
    """The cells of one setting and seed, and what they share."""

    def __init__(self, config: ExperimentConfig, task: Task, folder: Path, cells: list[Cell]) -> None:
        self.config, self.task, self.folder, self.cells = config, task, folder, cells
        self.seed, self.setting = cells[0].seed, config.settings[cells[0].setting]
        self._split = task.split(self.seed)
        self.data: Forgetting = forgetting(self.setting, self.seed, self._split, task.classes)
        self._methods = {(m.objective, name): m for m in config.all_methods for name in m.selections}
        self._chosen: dict[str, Chosen] = {}

    def result(self, cell: Cell) -> dict[str, Any]:
        """What the file of a cell holds."""
        if cell.objective in _REFERENCES:
            model, seconds = self._reference(cell.objective)
            facts = {"forgotten": self.data.description} | {
                f"{name}_records": len(records) for name, records in self.data.sets.items()
            }
            return self._figures(model) | {"seconds": seconds} | facts
        try:
            return self._unlearned(cell)
        except ValueError as error:
            if not any(reason in str(error) for reason in _RESULTS_TOO):
                raise
            return {"failed": str(error)}

    @cached_property
    def _original(self) -> PreTrainedModel:
        return self._reference("original")[0]

    @cached_property
    def _before(self) -> dict[str, float]:
        return self._figures(self._original)

    @cached_property
    def _measured(self) -> Measured:
        return Measured(self._original, {"forget": self.data.forget, "retain": self.data.retain}, self.seed)

    def _reference(self, name: str) -> tuple[PreTrainedModel, float]:
        """The original or the retrained model, kept on disk: other settings of a seed have the same original."""
        records = self._split.train if name == "original" else self.data.retain
        content = {"code": _CODE, "data": self.task.fingerprint, "seed": self.seed, "torch": torch.__version__}
        training = {key: value for key, value in vars(self.config.task).items() if key not in ("data", "model")}
        key = _hash({**content, "task": training, "ids": [record["id"] for record in records]})
        path = self.folder / _MODELS / f"{key}.safetensors"
        model = self.task.start(self.seed)
        if path.exists():
            with safe_open(path, framework="pt") as file:
                model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
                return model.eval(), float(file.metadata()["seconds"])
        seconds = train(model, records, self.config.task, self.seed)
        with atomic_write(path) as temporary:
            save_file(model.state_dict(), temporary, {"seconds": repr(seconds)})
        return model, seconds

    def _unlearned(self, cell: Cell) -> dict[str, Any]:
        method, name = self._methods[cell.objective, cell.selection], cell.selection
        if name not in self._chosen:
            self._chosen[name] = choose(self.config.selections[name], self.setting.lam, self._measured)
        chosen, model = self._chosen[name], copy.deepcopy(self._original)
        assert cell.value is not None
        with measure_cost() as cost:
            model, facts = unlearn(
                model, chosen, method, cell.value, forget=self.data.forget, retain=self.data.retain,
                steps=self.config.steps, batch_size=self.config.batch_size, seed=self.seed,
            )  # fmt: skip
        figures = self._figures(model)
        found = {**figures, "selection_score": self._selection(figures), **facts, **cost.figures()}
        found["choose_seconds"] = chosen.seconds
        if chosen.masks is not None:
            found["mask_cost"] = chosen.masks.cost()
            for kept in ("objective_before", "objective_after", "swaps"):
                if kept in chosen.masks.provenance:
                    found[kept] = chosen.masks.provenance[kept]
        return found

    def _figures(self, model: PreTrainedModel) -> dict[str, float]:
        found = {name: predict(model, records, batch_size=256) for name, records in self.data.sets.items()}
        figures = summarise(found["forget"], found["retain"], found["test"], seed=self.seed)
        figures |= {f"{name}_accuracy": predictions.accuracy for name, predictions in found.items()}
        return figures | {f"{name}_loss": predictions.loss.mean().item() for name, predictions in found.items()}

    def _selection(self, figures: Mapping[str, float]) -> float:
        """What the choice of the tuned parameter minimises; neither test records nor the retrained model have a part.

        |A_forget - target| + |A_retain - A_retain(original)| + |A_val - A_val(original)|, accuracies in percent, with
        target 0 for a class and the original's validation accuracy for random records.
        """
        before = self._before
        target = 0.0 if self.setting.forget == "class" else before["validation_accuracy"]
        kept = sum(abs(figures[f"{name}_accuracy"] - before[f"{name}_accuracy"]) for name in ("retain", "validation"))
        return abs(figures["forget_accuracy"] - target) + kept
