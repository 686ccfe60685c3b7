"""What is measured of the chosen models once the grid is done: attacks, distances, relearning, answers to questions."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from pymape.experiments.cells import REFERENCES, Cell, digest, read_rows
from pymape.experiments.config import EvidenceConfig
from pymape.experiments.methods import pass_size
from pymape.experiments.summaries import choose_cells
from pymape.experiments.unit import Unit
from pymape.losses import LANGUAGE_MODEL, task_of
from pymape.metrics import (
    METRICS,
    AnswerScores,
    RecordScores,
    RelearningCurve,
    model_distance,
    record_scores,
    relearning_attack,
    score_answers,
    score_metrics,
    tofu_metrics,
)
from pymape.metrics.costs import added_memory
from pymape.storage.runs import MASKS

__all__ = ["SETS", "Evidence", "Subject", "subjects"]

SETS = ("forget", "retain", "test")
_FOLDER = "evidence"
# Raised by hand whenever a change of the code changes what a file of evidence contains.
_CODE = 1
# Figures that the grid has too. Other processors round otherwise, which a count of records does not show at once.
_COMMON = (*METRICS, "forget_loss", "retain_loss", "test_loss")
_SAME = 1e-6


@dataclass(frozen=True)
class Subject:
    """A model to look at.

    Args:
        cell: its cell, chosen of its grid, or that of a reference model.
        row: the cell's result.
        path: the file that the evidence is kept in.
    """

    cell: Cell
    row: Mapping[str, Any]
    path: Path

    @property
    def folder(self) -> Path:
        """Where the scores and masks lie."""
        return self.path.with_suffix("")


def subjects(folder: Path, cells: Sequence[Cell], options: EvidenceConfig) -> list[Subject]:
    """The models that are looked at, when all cells have been computed: one of each grid, and the reference models."""
    rows = [{**row, "cell": cell} for cell, row in zip(cells, read_rows(folder, cells), strict=True)]
    asked = {name: value for name, value in dataclasses.asdict(options).items() if name != "selections"}
    found = []
    for row in choose_cells(rows):
        cell = row.pop("cell")
        wanted = options.selections is None or cell.selection in options.selections or not cell.selection
        if wanted and "failed" not in row:
            key = digest({"code": _CODE, "cell": cell.key, "options": asked})
            found.append(Subject(cell, row, folder / _FOLDER / f"{key}.json"))
    return found


@dataclass(frozen=True)
class _Seen:
    """What was seen of one model: its scores by set, its answers by question set, and how it relearned."""

    model: nn.Module
    scores: Mapping[str, RecordScores]
    answers: Mapping[str, AnswerScores]
    curve: RelearningCurve | None


class Evidence:
    """Looks at the models of one setting and seed.

    Args:
        unit: the setting and seed.
        options: what is measured.
    """

    def __init__(self, unit: Unit, options: EvidenceConfig) -> None:
        self.unit, self.options = unit, options

    def of(self, subject: Subject) -> dict[str, Any]:
        """Measure a model and write its scores of every record, and its masks, those of the last request.

        Returns:
            "metrics": figures by name, with the memory that unlearning added; "relearning": the curve; "differs": what
            the figures of a model that was made again have more than its cell's, empty where it is the same; "seconds".
        """
        started = time.perf_counter()
        cell, masks, memory = subject.cell, None, {}
        if cell.objective == "retrained":
            seen = self._retrained
        elif cell.objective in REFERENCES:
            seen = self._look(self.unit.reference(cell.objective)[0])
        else:
            masks, added = self.unit.chosen(cell)[-1].masks, added_memory()
            unlearned = self.unit.unlearned(cell, subject.row.get("steps"))
            seen, memory = self._look(unlearned.model), added(unlearned.cost)
        self._save(subject, seen)
        if masks is not None:
            masks.save(subject.folder / MASKS)
        metrics = self._metrics(seen) | memory
        return {
            "metrics": metrics,
            "relearning": None if seen.curve is None else dataclasses.asdict(seen.curve),
            "differs": {
                name: metrics[name] - subject.row[name]
                for name in _COMMON
                if not math.isclose(metrics[name], subject.row[name], rel_tol=_SAME, abs_tol=_SAME)
            },
            "seconds": time.perf_counter() - started,
        }

    @cached_property
    def _retrained(self) -> _Seen:
        return self._look(self.unit.reference("retrained")[0])

    @cached_property
    def _original_accuracy(self) -> float:
        """Of the forget set, which relearning is to reach again."""
        return self._score(self.unit.reference("original")[0], "forget").predictions().accuracy

    @cached_property
    def _shadows(self) -> list[dict[str, RecordScores]]:
        models = (self.unit.shadow(number) for number in range(1, self.options.shadows + 1))
        return [{name: self._score(model, name) for name in ("forget", "test")} for model in models]

    @cached_property
    def _questions(self) -> Mapping[str, Any]:
        asked = self.unit.task.questions
        return {} if asked is None else asked(self.unit.data)

    def _look(self, model: nn.Module) -> _Seen:
        options = self.options
        scores = {name: self._score(model, name) for name in SETS}
        answers = {
            name: score_answers(model, self.unit.task.tokenizer, asked, max_new_tokens=options.max_new_tokens)
            for name, asked in self._questions.items()
        }
        curve = None
        if options.relearn_steps:
            curve = relearning_attack(
                model, self.unit.data.forget, original_accuracy=self._original_accuracy, lr=options.relearn_lr,
                steps=options.relearn_steps, every=options.relearn_every, seed=self.unit.seed,
            )  # fmt: skip
        return _Seen(model, scores, answers, curve)

    def _score(self, model: nn.Module, part: str) -> RecordScores:
        tokenizer, decode = self.unit.task.tokenizer, None
        if task_of(model) == LANGUAGE_MODEL and tokenizer is not None:
            decode = partial(tokenizer.decode, skip_special_tokens=True)
        records = self.unit.data.sets[part]
        return record_scores(
            model, records, batch_size=pass_size(model, records), decode=decode, progress=False,
            gradients=self.options.gradients and part != "retain",
        )  # fmt: skip

    def _metrics(self, seen: _Seen) -> dict[str, float]:
        gold = self._retrained
        end_token = None if self.unit.task.tokenizer is None else self.unit.task.tokenizer.eos_token_id
        metrics = score_metrics(
            seen.scores,
            retrained=gold.scores,
            reference=gold.scores,  # it has seen neither the forget nor the test set
            shadows=self._shadows,
            end_token=end_token,
            seed=self.unit.seed,
        )
        forget = self.unit.data.forget
        metrics |= model_distance(seen.model, gold.model, forget, batch_size=pass_size(seen.model, forget)).figures()
        if seen.answers:
            metrics |= tofu_metrics(seen.answers, retrained=gold.answers.get("forget"), end_token=end_token)
        if seen.curve is not None and gold.curve is not None:
            steps = seen.curve.steps_to_relearn
            metrics["relearning_steps"] = math.inf if steps is None else steps
            metrics["relearning_distance"] = _apart(seen.curve, gold.curve)
        return metrics

    def _save(self, subject: Subject, seen: _Seen) -> None:
        for name, scores in seen.scores.items():
            scores.save(subject.folder / f"{name}.safetensors")
        for name, answers in seen.answers.items():
            answers.save(subject.folder / f"questions-{name}")


def _apart(curve: RelearningCurve, other: RelearningCurve) -> float:
    """Mean distance of two curves of accuracy, in percentage points."""
    return sum(abs(a - b) for a, b in zip(curve.accuracy, other.accuracy, strict=True)) / len(curve.accuracy)
