"""The main job on real data that every installation has: unlearn scikit-learn's digits and compare with retraining.

Protocol, per seed and setting (one whole class, or a random tenth of the training records):

1. 1797 images of 8 x 8 pixels are split into 60 % training, 16 % validation and 24 % test records.
2. A small ViT is trained on all training records (the original) and, from the same initial weights with the same seed,
   on those that are not forgotten (the retrained model, which only the last step sees).
3. Masks are learned from the importance of the forget set and of the retain set.
4. Each objective unlearns with the masks and without (all parameters), at every learning rate of one common grid. For
   both the learning rate is chosen by one rule, which never sees the retrained model or the test records:

       minimise |A_forget - target| + |A_retain - A_retain(original)| + |A_val - A_val(original)|

   with accuracies A in percent on the training records of each set and on the validation records; the target is 0 for a
   class and the original's validation accuracy for random records. The first of equals wins.
5. UA, RA, TA and MIA of each are held against the retrained model's: the mean gap.

In the class setting validation and test records are those of the remaining classes, for every model alike.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pymape.commands.demo_page import Evidence, summary_text, write_page
from pymape.commands.demo_results import aggregate, paired_differences
from pymape.config import DemoConfig
from pymape.data.digits import CLASSES
from pymape.errors import check_ranges
from pymape.experiments.config import MethodConfig, SelectionConfig, SettingConfig, TaskConfig
from pymape.experiments.methods import Chosen, Measured, choose, unlearn
from pymape.experiments.tasks import (
    Forgetting,
    Split,
    Task,
    forgetting,
    make_task,
    selection_score,
    train,
    without_class,
)
from pymape.metrics import Predictions, mean_gap, predict, summarise
from pymape.storage.runs import MODEL, environment, quiet_transformers, run_folder, write_summary

__all__ = ["run_demo"]


@dataclass(frozen=True)
class _Verdict:
    """Predictions of one model on the four sets of a task."""

    predictions: dict[str, Predictions]
    seed: int

    @property
    def accuracies(self) -> dict[str, float]:
        return {name: predictions.accuracy for name, predictions in self.predictions.items()}

    @cached_property
    def metrics(self) -> dict[str, float]:
        sets = self.predictions
        return summarise(sets["forget"], sets["retain"], sets["test"], seed=self.seed)


@dataclass(frozen=True)
class _Candidate:
    """A model unlearned at one learning rate; `selection` is what the choice among them minimises."""

    model: PreTrainedModel
    lr: float
    verdict: _Verdict
    selection: float
    seconds: float


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo, print its table and write its folder.

    Args:
        config: the demo's options.

    Returns:
        What `summary.json` holds.

    Raises:
        ValueError: an option out of range, or an output folder that cannot be written.
    """
    _check(config)
    started = time.perf_counter()
    with run_folder(config.output, "demo") as folder, quiet_transformers(), _one_thread():
        runs: list[dict[str, Any]] = []
        evidence: list[Evidence] = []
        models = 1 + len(config.settings) * (1 + 2 * len(config.objectives) * len(config.lrs))
        with tqdm(total=config.seeds * models, desc="demo", unit="model", disable=None) as bar:
            training = TaskConfig("digits", epochs=config.train_epochs)
            task = make_task(training)
            for seed in range(config.first_seed, config.first_seed + config.seeds):
                for run, shown in _run_seed(config, task, training, seed, folder, bar):
                    runs.append(run)
                    evidence.append(shown)
        summary = {
            **environment(),
            "kind": "demo",
            "config": dataclasses.asdict(config),
            "seconds": time.perf_counter() - started,
            "table": aggregate(runs),
            "paired": paired_differences(runs),
            "runs": runs,
        }
        write_page(folder / "report.html", summary, evidence[: len(config.settings)])
        write_summary(folder, summary)
    print(summary_text(summary))
    return summary


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run on one thread.

    The model is too small to gain from more, and on a busy machine threads that wait for each other made the demo a
    hundred times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run_seed(
    config: DemoConfig, task: Task, training: TaskConfig, seed: int, folder: Path, bar: tqdm
) -> Iterator[tuple[dict[str, Any], Evidence]]:
    split = task.split(seed)
    original = task.start(seed)
    original_seconds = train(original, split.train, training, seed)
    bar.update()
    for setting in config.settings:
        data, lam = _forgetting(config, setting, seed, split)
        retrained = task.start(seed)
        retrain_seconds = train(retrained, data.retain, training, seed)
        bar.update()
        before, gold = _judge(original, data, seed), _judge(retrained, data, seed)
        measured = Measured(original, {"forget": data.forget, "retain": data.retain}, seed)
        learned = choose(SelectionConfig("modules", budget=config.budget), lam, measured)
        assert learned.masks is not None
        mask_file = f"masks-{setting}-seed{seed}.safetensors"
        learned.masks.save(folder / mask_file)

        rows, winners = [], {}
        for objective in config.objectives:
            for chosen in (Chosen(), learned):
                grid = []
                for lr in config.lrs:
                    grid.append(_candidate(config, data, seed, original, before, objective, chosen, lr))
                    bar.update()
                best = min(grid, key=lambda candidate: candidate.selection)
                rows.append(_method_row(objective, chosen is learned, best, grid, gold))
                if chosen is learned:
                    winners[objective] = best
        shown = "gd" if "gd" in winners else config.objectives[0]
        if seed == config.first_seed and setting == config.settings[0]:
            winners[shown].model.save_pretrained(folder / MODEL)
        run = {
            "setting": setting,
            "seed": seed,
            "forgotten": data.description,
            "records": {name: len(records) for name, records in data.sets.items()},
            "original": _row(before, gold) | {"seconds": original_seconds},
            "retrained": _row(gold, gold) | {"seconds": retrain_seconds},
            "masks": {
                "file": mask_file, "cost": learned.masks.cost(), "seconds": learned.seconds, **learned.masks.provenance
            },
            "methods": rows,
        }  # fmt: skip
        predictions = {"original": before, "unlearned": winners[shown].verdict, "retrained": gold}
        models = {name: verdict.predictions for name, verdict in predictions.items()}
        yield run, Evidence(run, shown, learned.masks, models)


def _forgetting(config: DemoConfig, setting: str, seed: int, split: Split) -> tuple[Forgetting, float]:
    """What a setting forgets, and the weight of the retain set where masks are learned for it."""
    if setting == "random":
        return forgetting(SettingConfig("random", config.forget_share), seed, split, CLASSES), config.random_lam
    digit = seed % CLASSES if config.forget_class is None else config.forget_class
    return without_class(digit, split), config.class_lam


def _judge(model: PreTrainedModel, data: Forgetting, seed: int) -> _Verdict:
    return _Verdict({name: predict(model, records, batch_size=256) for name, records in data.sets.items()}, seed)


def _candidate(
    config: DemoConfig, data: Forgetting, seed: int, original: PreTrainedModel, before: _Verdict, objective: str,
    chosen: Chosen, lr: float,
) -> _Candidate:  # fmt: skip
    model, facts = unlearn(
        copy.deepcopy(original), chosen, MethodConfig(objective), lr, forget=data.forget, retain=data.retain,
        steps=config.steps, batch_size=config.batch_size, seed=seed,
    )  # fmt: skip
    verdict = _judge(model, data, seed)
    return _Candidate(
        model, lr, verdict, selection_score(data, before.accuracies, verdict.accuracies), facts["seconds"]
    )


def _row(verdict: _Verdict, gold: _Verdict) -> dict[str, float]:
    metrics = verdict.metrics
    return metrics | {"gap": mean_gap(metrics, gold.metrics)}


def _method_row(
    objective: str, masked: bool, best: _Candidate, grid: list[_Candidate], gold: _Verdict
) -> dict[str, Any]:
    tried = [
        _row(candidate.verdict, gold)
        | {"lr": candidate.lr, "selection": candidate.selection, "seconds": candidate.seconds}
        for candidate in grid
    ]
    return {"objective": objective, "masked": masked, **tried[grid.index(best)], "grid": tried}


def _check(config: DemoConfig) -> None:
    ranges = {
        "budget": (0 < config.budget <= 1, "in (0, 1]"),
        "forget_share": (0 < config.forget_share < 1, "in (0, 1)"),
        "forget_class": (config.forget_class is None or 0 <= config.forget_class < CLASSES, f"in [0, {CLASSES})"),
        "class_lam": (0 <= config.class_lam < math.inf, "finite and not negative"),
        "random_lam": (0 <= config.random_lam < math.inf, "finite and not negative"),
        "seeds": (config.seeds >= 1, "at least 1"),
        "steps": (config.steps >= 1, "at least 1"),
        "train_epochs": (config.train_epochs >= 1, "at least 1"),
        "batch_size": (config.batch_size >= 1, "at least 1"),
        "lrs": (bool(config.lrs) and all(0 < lr < math.inf for lr in config.lrs), "positive learning rates"),
        "settings": (len(set(config.settings)) == len(config.settings) > 0, "at least one, each once"),
        "objectives": (len(set(config.objectives)) == len(config.objectives) > 0, "at least one, each once"),
    }
    check_ranges({name: (getattr(config, name), *range_) for name, range_ in ranges.items()})
