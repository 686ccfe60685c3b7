"""The cells of an experiment's grid: their places, their keys and the files that hold what they came to."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymape.experiments.config import ExperimentConfig
from pymape.experiments.tasks import Task
from pymape.version import __version__

__all__ = ["CELLS", "CODE", "REFERENCES", "Cell", "Place", "cell_file", "cells_of", "digest", "read_rows", "training"]

# Raised by hand whenever a change of the code changes what a cell contains.
CODE = 2
CELLS = "cells"
# "retrained again": from other initial weights and in another order, so that its gap is what chance alone makes.
REFERENCES = ("original", "retrained", "retrained again")

Place = tuple[str, int]  # setting and seed: its cells share their data and models


@dataclass(frozen=True)
class Cell:
    """One model of the grid; those of `REFERENCES` are cells without a selection and a value.

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


def cells_of(config: ExperimentConfig, task: Task) -> list[Cell]:
    """All cells of the grid, those of one setting and seed together, the reference models first."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "scikit-learn")}
    common = {"code": CODE, "pymape": __version__, **versions, "data": task.fingerprint, "task": training(config)}
    cells = []
    for setting_name, setting in config.settings.items():
        for seed in config.seeds:
            place = {**common, "setting": setting.identity(), "seed": seed}
            cells += [
                Cell(setting_name, seed, name, "", "", None, digest({**place, "objective": name}))
                for name in REFERENCES
            ]
            for method in config.all_methods:
                for name in method.selections if setting_name in method.settings else ():
                    selection = config.selections[name].identity(setting.lam)
                    how = {"steps": config.steps, "batch_size": config.batch_size, "options": method.options}
                    how |= {} if config.every is None else {"every": config.every}
                    made = {**place, **how, "objective": method.objective, "selection": selection}
                    cells += [
                        Cell(setting_name, seed, method.objective, name, method.parameter, value, key)
                        for value in method.values
                        for key in (digest(made | _tuned(method.parameter, value, made)),)
                    ]
    return cells


def _tuned(parameter: str, value: float, made: Collection[str]) -> dict[str, Any]:
    """The tuned value as a part of a cell's key, where a part of that name is not another's place."""
    return {"tuned": {parameter: value}} if parameter in made else {parameter: value}


def training(config: ExperimentConfig) -> dict[str, Any]:
    """All of the task's options that decide what the original and the retrained model become."""
    always = ("name", "options", "epochs", "lr", "batch_size", "weight_decay")
    return {name: getattr(config.task, name) for name in always} | _given(config.task, apart={*always, "data", "model"})


def digest(content: Mapping[str, Any]) -> str:
    """Hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def cell_file(folder: Path, cell: Cell) -> Path:
    """Where the result of a cell is kept."""
    return folder / CELLS / f"{cell.key}.jsonl"


def read_rows(folder: Path, cells: Collection[Cell]) -> list[dict[str, Any]]:
    """Place and result of cells that have been computed."""
    return [{**cell.place, **json.loads(cell_file(folder, cell).read_text(encoding="utf-8"))} for cell in cells]


def _given(options: Any, apart: Collection[str]) -> dict[str, Any]:
    """The options that differ from their defaults, so that one which is added later leaves older keys as they are."""
    found = {}
    for field in dataclasses.fields(options):
        if field.name not in apart:
            factory, value = field.default_factory, getattr(options, field.name)
            if value != (field.default if factory is dataclasses.MISSING else factory()):
                found[field.name] = value
    return found
