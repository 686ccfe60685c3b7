"""One setting and seed of an experiment: its records, its models, and what its cells come to."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel

from pymape.errors import NotFinite, NothingSelected
from pymape.experiments.cells import CODE, REFERENCES, Cell, Place, digest, training
from pymape.experiments.config import ExperimentConfig
from pymape.experiments.methods import Chosen, Measured, choose, pass_size, unlearn
from pymape.experiments.tasks import JUDGED, Forgetting, Task, forgetting, selection_score, train
from pymape.metrics import Predictions, record_scores, summarise
from pymape.metrics.costs import Cost, measure_cost
from pymape.storage.files import atomic_write

__all__ = ["Unit", "Unlearned"]

Record = dict[str, Any]

_MODELS = "models"


@dataclass(frozen=True)
class Unlearned:
    """The model of a cell.

    Args:
        model: unlearned, after the last request.
        facts: what `methods.unlearn` says about it, over all requests and with the steps of each.
        cost: of all requests together.
        seen: what looks on the way have seen of this very model: its predictions by set.
    """

    model: PreTrainedModel
    facts: Mapping[str, Any]
    cost: Cost
    seen: Mapping[str, Predictions]


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
        # What is forgotten after every request, and in the end.
        self._requests = [
            forgetting(self.setting, self.seed, self._split, task.classes, number + 1)
            for number in range(self.setting.requests)
        ]
        self.data: Forgetting = self._requests[-1]
        self._before: dict[int, dict[str, float]] = {}  # number of records forgotten -> of the original model
        methods = [method for method in config.all_methods if place[0] in method.settings]
        self._methods = {(method.objective, name): method for method in methods for name in method.selections}
        self._chosen: dict[str, list[Chosen]] = {}

    def result(self, cell: Cell) -> dict[str, Any]:
        """What the file of a cell holds."""
        if cell.objective in REFERENCES:
            model, seconds = self.reference(cell.objective)
            counts = {f"{name}_records": len(records) for name, records in self.data.sets.items()}
            return {**self._figures(model), "seconds": seconds, "forgotten": self.data.description, **counts}
        try:
            chosen = self.chosen(cell)
            unlearned = self.unlearned(cell)
            figures = self._figures(unlearned.model, unlearned.seen)
        except (NotFinite, NothingSelected) as error:  # a result too: this value of the grid cannot be chosen
            return {"failed": str(error)}
        accuracies = {name: figures[f"{name}_accuracy"] for name in JUDGED}
        found = {**figures, "selection_score": self._selection(accuracies, self.data)}
        found |= {**unlearned.cost.figures(), **unlearned.facts}
        found["choose_seconds"] = sum(each.seconds for each in chosen)
        masks = [each.masks for each in chosen if each.masks is not None]
        if masks:
            found["mask_cost"] = statistics.fmean(each.cost() for each in masks)
            for kept in ("objective_before", "objective_after", "swaps"):
                if kept in masks[0].provenance:
                    found[kept] = sum(each.provenance[kept] for each in masks)
        return found

    def reference(self, name: str) -> tuple[PreTrainedModel, float]:
        """A model of `REFERENCES`, and the seconds that its training took."""
        if name == "retrained again":
            return self._retrained(0)
        return self._trained(self._split.train if name == "original" else self.data.retain, self.seed)

    def shadow(self, number: int) -> PreTrainedModel:
        """A model retrained from yet other initial weights and in another order; numbers begin with 1."""
        return self._retrained(number)[0]

    def chosen(self, cell: Cell) -> list[Chosen]:
        """What each request trains of the model of a cell, found once for all cells of its selection.

        Raises:
            ValueError: as `choose` does.
        """
        name = cell.selection
        if name not in self._chosen:
            selection = self.config.selections[name]
            self._chosen[name] = [choose(selection, self.setting.lam, measured) for measured in self._measured]
        return self._chosen[name]

    def unlearned(self, cell: Cell, steps: Sequence[int] | None = None) -> Unlearned:
        """The model of a cell, made anew: the same at every call.

        Args:
            cell: of the grid.
            steps: that its model has taken for each request, where that is known: then it is made without looking at
                others on the way, and at the cost of these steps alone.

        Raises:
            ValueError: as `choose` and `unlearn` do.
        """
        chosen, model, found = self.chosen(cell), copy.deepcopy(self._original), []
        looks: dict[float, dict[str, Predictions]] = {}  # of the last request: score -> of the first model that had it
        assert cell.value is not None
        with measure_cost() as cost:
            for number, data in enumerate(self._requests):
                looks.clear()

                def judge(model: PreTrainedModel, data: Forgetting = data) -> float:
                    predictions = self._judged(model, data)
                    score = self._selection(_accuracies(predictions), data)
                    looks.setdefault(score, predictions)
                    return score

                model, facts = unlearn(
                    model, chosen[number], self._methods[cell.objective, cell.selection], cell.value,
                    forget=data.request, retain=data.retain, unseen=data.validation,
                    steps=steps[number] if steps else self.config.steps, batch_size=self.config.batch_size,
                    seed=self.seed, judge=judge, every=None if steps else self.config.every,
                )  # fmt: skip
                found.append(facts)
        joined: dict[str, Any] = {name: [facts[name] for facts in found] for name in found[0]}
        joined["trained"] = statistics.fmean(joined["trained"])
        joined |= {name: sum(joined[name]) for name in ("seconds", "cpu_seconds") if name in joined}
        # Adapters round otherwise once they are folded in.
        seen = looks[min(looks)] if looks and chosen[-1].rank is None else {}
        return Unlearned(model, joined, cost, seen)

    @cached_property
    def _original(self) -> PreTrainedModel:
        return self.reference("original")[0]

    @cached_property
    def _measured(self) -> list[Measured]:
        found: list[Measured] = []
        for data in self._requests:
            sets = {"forget": data.request, "retain": data.retain}
            found.append(Measured(self._original, sets, self.seed, found[0] if found else None))
        return found

    def _retrained(self, number: int) -> tuple[PreTrainedModel, float]:
        """The retrained model from other initial weights and in another order; each number has its own."""
        # Far from the seeds of experiments, so that none is another seed's retrained model.
        return self._trained(self.data.retain, self.seed + 1_000_000 * (number + 1))

    def _trained(self, records: list[Record], seed: int) -> tuple[PreTrainedModel, float]:
        """A model trained on records, kept on disk: other settings of a seed have the same original."""
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

    def _figures(self, model: PreTrainedModel, seen: Mapping[str, Predictions] | None = None) -> dict[str, float]:
        """What a cell says of a model, some of whose predictions may be known."""
        found = dict(seen or {})
        found |= {name: self._predict(model, self.data.sets[name]) for name in self.data.sets if name not in found}
        figures = summarise(found["forget"], found["retain"], found["test"], seed=self.seed)
        figures |= {f"{name}_accuracy": accuracy for name, accuracy in _accuracies(found).items()}
        return figures | {f"{name}_loss": predictions.loss.mean().item() for name, predictions in found.items()}

    def _predict(self, model: PreTrainedModel, records: list[Record]) -> Predictions:
        return record_scores(model, records, batch_size=pass_size(model, records), progress=False).predictions()

    def _judged(self, model: PreTrainedModel, data: Forgetting) -> dict[str, Predictions]:
        return {name: self._predict(model, data.sets[name]) for name in JUDGED}

    def _selection(self, accuracies: Mapping[str, float], data: Forgetting) -> float:
        asked = len(data.forget)
        if asked not in self._before:
            self._before[asked] = _accuracies(self._judged(self._original, data))
        return selection_score(data, self._before[asked], accuracies)


def _accuracies(predictions: Mapping[str, Predictions]) -> dict[str, float]:
    return {name: found.accuracy for name, found in predictions.items()}
