"""One setting and seed of an experiment: its records, its models, and what its cells come to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel

from pymape.experiments.cells import CODE, REFERENCES, Cell, Place, digest, training
from pymape.experiments.config import ExperimentConfig
from pymape.experiments.methods import Chosen, Measured, choose, pass_size, unlearn
from pymape.experiments.tasks import Forgetting, Task, forgetting, train
from pymape.files import atomic_write
from pymape.metrics import Predictions, record_scores, summarise
from pymape.metrics.costs import Cost, measure_cost

__all__ = ["Unit"]

Record = dict[str, Any]

_MODELS = "models"
_JUDGED = ("forget", "retain", "validation")  # sets that the choice of the tuned parameter looks at
# Errors of a method at a value of its grid, which then cannot be chosen; any other ends the run.
_RESULTS_TOO = ("must stay finite", "must select at least one")


class Unit:
    """What the cells of one setting and seed share; models and masks are made when they are first asked for.

    Args:
        config: the experiment.
        task: its data and model.
        folder: the experiment's; original and retrained models are kept there.
        place: the setting and the seed.
    """

    def __init__(self, config: ExperimentConfig, task: Task, folder: Path, place: Place) -> None:
        self.config, self.task, self.folder = config, task, folder
        self.setting, self.seed = config.settings[place[0]], place[1]
        self._split = task.split(self.seed)
        self.data: Forgetting = forgetting(self.setting, self.seed, self._split, task.classes)
        self._methods = {(m.objective, name): m for m in config.all_methods for name in m.selections}
        self._chosen: dict[str, Chosen] = {}

    def result(self, cell: Cell) -> dict[str, Any]:
        """What the file of a cell holds."""
        if cell.objective in REFERENCES:
            model, seconds = self.reference(cell.objective)
            counts = {f"{name}_records": len(records) for name, records in self.data.sets.items()}
            return {**self._figures(model), "seconds": seconds, "forgotten": self.data.description, **counts}
        try:
            chosen = self.chosen(cell)
            model, facts, cost = self.unlearned(cell)
        except ValueError as error:
            if not any(reason in str(error) for reason in _RESULTS_TOO):
                raise
            return {"failed": str(error)}
        figures = self._figures(model)
        found = {**figures, "selection_score": self._selection(figures), **cost.figures(), **facts}
        found["choose_seconds"] = chosen.seconds
        if chosen.masks is not None:
            found["mask_cost"] = chosen.masks.cost()
            for kept in ("objective_before", "objective_after", "swaps"):
                if kept in chosen.masks.provenance:
                    found[kept] = chosen.masks.provenance[kept]
        return found

    def reference(self, name: str) -> tuple[PreTrainedModel, float]:
        """The original or the retrained model, and the seconds that its training took."""
        return self._trained(self._split.train if name == "original" else self.data.retain)

    def shadow(self, number: int) -> PreTrainedModel:
        """A model retrained from other initial weights and in another order; numbers begin with 1."""
        # Far from the seeds of experiments, so that no shadow is another seed's retrained model.
        return self._trained(self.data.retain, self.seed + 1_000_000 * number)[0]

    def chosen(self, cell: Cell) -> Chosen:
        """What is trained of the model of a cell, found once for all cells of its selection.

        Raises:
            ValueError: as `choose` does.
        """
        name = cell.selection
        if name not in self._chosen:
            self._chosen[name] = choose(self.config.selections[name], self.setting.lam, self._measured)
        return self._chosen[name]

    def unlearned(self, cell: Cell, steps: int | None = None) -> tuple[PreTrainedModel, dict[str, float], Cost]:
        """The model of a cell, made anew: the same at every call.

        Args:
            cell: of the grid.
            steps: that its model has taken, where that is known: then it is made without looking at others on the way,
                and at the cost of these steps alone.

        Returns:
            The model, what `unlearn` says about it, and what that cost.

        Raises:
            ValueError: as `choose` and `unlearn` do.
        """
        chosen, model = self.chosen(cell), copy.deepcopy(self._original)
        assert cell.value is not None
        with measure_cost() as cost:
            model, facts = unlearn(
                model, chosen, self._methods[cell.objective, cell.selection], cell.value, forget=self.data.forget,
                retain=self.data.retain, steps=steps or self.config.steps, batch_size=self.config.batch_size,
                seed=self.seed, judge=self._judge, every=None if steps else self.config.every,
            )  # fmt: skip
        return model, facts, cost

    @cached_property
    def _original(self) -> PreTrainedModel:
        return self.reference("original")[0]

    @cached_property
    def _before(self) -> dict[str, float]:
        return self._figures(self._original)

    @cached_property
    def _measured(self) -> Measured:
        return Measured(self._original, {"forget": self.data.forget, "retain": self.data.retain}, self.seed)

    def _trained(self, records: list[Record], start: int | None = None) -> tuple[PreTrainedModel, float]:
        """A model trained on records, kept on disk: other settings of a seed have the same original."""
        seed = self.seed if start is None else start
        content = {"code": CODE, "data": self.task.fingerprint, "seed": seed, "torch": torch.__version__}
        key = digest({**content, "task": training(self.config), "ids": [record["id"] for record in records]})
        path = self.folder / _MODELS / f"{key}.safetensors"
        model = self.task.start(seed)
        if path.exists():
            load_model(model, path)
            with safe_open(path, framework="pt") as file:
                return model.eval(), float(file.metadata()["seconds"])
        seconds = train(model, records, self.config.task, seed)
        with atomic_write(path) as temporary:
            save_model(model, str(temporary), {"seconds": repr(seconds)})
        return model, seconds

    def _figures(self, model: PreTrainedModel) -> dict[str, float]:
        found = {name: self._predict(model, name) for name in self.data.sets}
        figures = summarise(found["forget"], found["retain"], found["test"], seed=self.seed)
        figures |= {f"{name}_accuracy": predictions.accuracy for name, predictions in found.items()}
        return figures | {f"{name}_loss": predictions.loss.mean().item() for name, predictions in found.items()}

    def _predict(self, model: PreTrainedModel, name: str) -> Predictions:
        records = self.data.sets[name]
        return record_scores(model, records, batch_size=pass_size(records), progress=False).predictions()

    def _judge(self, model: PreTrainedModel) -> float:
        return self._selection({f"{name}_accuracy": self._predict(model, name).accuracy for name in _JUDGED})

    def _selection(self, figures: Mapping[str, float]) -> float:
        """What the choice of the tuned parameter minimises; neither test records nor the retrained model have a part.

        |A_forget - target| + |A_retain - A_retain(original)| + |A_val - A_val(original)|, accuracies in percent, with
        target 0 for a class and the original's validation accuracy for all else.
        """
        before = self._before
        target = 0.0 if self.setting.forget == "class" else before["validation_accuracy"]
        kept = sum(abs(figures[f"{name}_accuracy"] - before[f"{name}_accuracy"]) for name in ("retain", "validation"))
        return abs(figures["forget_accuracy"] - target) + kept
