"""Runs an experiment cell by cell: what is done is kept under the hash of all it depends on, and never done again."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pymape.experiments.cells import CELLS, Cell, Place, cell_file, cells_of, read_rows
from pymape.experiments.config import ExperimentConfig, find_experiment, read_experiment
from pymape.experiments.evidence import Evidence, subjects
from pymape.experiments.methods import check_methods
from pymape.experiments.sections import write_markdown
from pymape.experiments.summaries import EVIDENCE, RESULTS, Outcome, read_cells, summarise_cells
from pymape.experiments.tasks import make_task
from pymape.experiments.unit import Unit
from pymape.experiments.workers import share_out
from pymape.storage.files import atomic_write
from pymape.storage.runs import SUMMARY, environment, quiet_transformers, write_summary

__all__ = ["run_experiment"]


def run_experiment(
    name: str, *, output: str | None = None, seeds: list[int] | None = None, workers: int | None = None,
    settings: list[str] | None = None, data: str | None = None, model: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run what is missing of an experiment, print its tables and write them.

    First the grid: the folder gets one file per cell while the experiment runs, and `results.jsonl` (a line per cell).
    Then the evidence on the chosen models: one file per model in `evidence/`, beside a folder with its scores of every
    record, and `evidence.jsonl` (a line per model). In the end `tables.md` and `summary.json`. An interrupted
    experiment goes on where it was; a changed one keeps the cells that the change leaves alone.

    Args:
        name: a YAML file, or the name of one in `experiments/`.
        output: folder to write; default `runs/NAME`.
        seeds: in place of the file's.
        workers: processes of one thread each, never more than settings x seeds; default: as many as there are CPUs.
        settings: names of those to run; default: all of the file's.
        data: in place of the file's task.data.
        model: in place of the file's task.model.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: an option out of range, or an output folder that holds something else.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    path = find_experiment(name)
    config = read_experiment(path)
    unknown = [name for name in settings or () if name not in config.settings]
    if unknown:
        raise ValueError(f"settings must be among {', '.join(config.settings)}, got {unknown[0]!r}")
    config = dataclasses.replace(
        config.narrowed(settings or list(config.settings)),
        seeds=config.seeds if seeds is None else seeds,
        task=dataclasses.replace(config.task, data=data or config.task.data, model=model or config.task.model),
    )
    check_methods(config)
    folder = _checked_folder(output or f"runs/{path.stem}")
    started, load = time.perf_counter(), os.getloadavg()
    with quiet_transformers():
        task = make_task(config.task)
        cells = cells_of(config, task)
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
        files = [(cell_file(folder, cell), (cell.setting, cell.seed)) for cell in cells]
        computed = _complete(partial(_work_on_cells, config, folder), files, workers, "cells")
        rows = read_rows(folder, cells)
        (folder / SUMMARY).unlink(missing_ok=True)  # an earlier run's, whose figures the next line replaces
        _write_lines(folder / RESULTS, rows)
        seconds = time.perf_counter() - started
        evidence = _evidence(config, folder, cells, workers)
    summary: dict[str, Any] = {
        **environment(),
        "kind": "experiment",
        "name": path.stem,
        "config": dataclasses.asdict(config),
        "fingerprint": task.fingerprint,
        "data": dict(task.facts),
        "cells": len(cells),
        "computed": computed,
        "workers": min(workers, len(config.settings) * len(config.seeds)),
        "seconds": seconds,
        "evidence": evidence,
        "load_average": {"start": load, "end": os.getloadavg()},
        "processors": os.cpu_count(),
    }
    seen = read_cells(folder / EVIDENCE) if evidence else []
    write_markdown(folder / "tables.md", Outcome(summary, summarise_cells(rows, config.baselines, seen)))
    write_summary(folder, summary)
    print((folder / "tables.md").read_text(encoding="utf-8"))
    print(f"Wrote {RESULTS}, tables.md and {SUMMARY} to {folder} in {time.perf_counter() - started:.0f} s.")
    return summary


def _evidence(config: ExperimentConfig, folder: Path, cells: Sequence[Cell], workers: int) -> dict[str, Any] | None:
    """Look at the chosen models and write a line for each; says how many there are, and what the look took."""
    if config.evidence is None:
        (folder / EVIDENCE).unlink(missing_ok=True)
        return None
    started = time.perf_counter()
    found = subjects(folder, cells, config.evidence)
    files = [(subject.path, (subject.cell.setting, subject.cell.seed)) for subject in found]
    computed = _complete(partial(_work_on_evidence, config, folder), files, workers, "evidence")
    places = [{**subject.cell.place, "scores": str(subject.folder.relative_to(folder))} for subject in found]
    seen = [json.loads(subject.path.read_text(encoding="utf-8")) for subject in found]
    _write_lines(folder / EVIDENCE, [{**place, **facts} for place, facts in zip(places, seen, strict=True)])
    return {"models": len(found), "computed": computed, "seconds": time.perf_counter() - started}


def _checked_folder(output: str) -> Path:
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, got the file {output!r}")
    if folder.exists() and any(folder.iterdir()) and not (folder / CELLS).is_dir():
        raise ValueError(f"output must be a new or empty folder or an earlier experiment's, got {output!r}")
    return folder


def _complete(
    work: Callable[[Iterator[Place], Callable[[], None]], None],
    files: Sequence[tuple[Path, Place]],
    workers: int,
    name: str,
) -> int:
    """Have the files made that are missing, setting by setting and seed by seed; returns how many were."""
    missing = [place for path, place in files if not path.exists()]
    places = list(dict.fromkeys(missing))
    with tqdm(total=len(files), desc=name, disable=None) as bar:

        def look() -> None:
            bar.update(sum(path.exists() for path, _ in files) - bar.n)

        look()
        if places:
            share_out(work, places, min(workers, len(places)), look)
        look()
    return len(missing)


def _work_on_cells(config: ExperimentConfig, folder: Path, places: Iterator[Place], look: Callable[[], None]) -> None:
    task = make_task(config.task)
    cells = cells_of(config, task)
    for place in places:
        unit = Unit(config, task, folder, place)
        for cell in cells:
            path = cell_file(folder, cell)
            if (cell.setting, cell.seed) == place and not path.exists():
                result = json.dumps(unit.result(cell)) + "\n"
                with atomic_write(path) as temporary:
                    temporary.write_text(result, encoding="utf-8")
                look()


def _work_on_evidence(
    config: ExperimentConfig, folder: Path, places: Iterator[Place], look: Callable[[], None]
) -> None:
    assert config.evidence is not None
    task = make_task(config.task)
    found = subjects(folder, cells_of(config, task), config.evidence)
    for place in places:
        evidence = Evidence(Unit(config, task, folder, place), config.evidence)
        for subject in found:
            if (subject.cell.setting, subject.cell.seed) == place and not subject.path.exists():
                write_summary(subject.path.parent, evidence.of(subject), subject.path.name)
                look()


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
