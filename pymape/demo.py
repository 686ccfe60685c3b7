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
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from pymape.config import DemoConfig
from pymape.demo_page import Evidence, summary_text, write_page
from pymape.digits import CLASSES, digit_records, load_digits, small_vit
from pymape.importance import importance
from pymape.masks import ModuleMasks
from pymape.metrics import Predictions, mean_gap, predict, summarise
from pymape.results import aggregate, paired_differences
from pymape.runs import environment, quiet_transformers, run_folder, write_summary
from pymape.search import search
from pymape.trainer import UnlearnTrainer

__all__ = ["run_demo"]

_TRAIN_BATCH, _TRAIN_LR, _TRAIN_DECAY = 64, 1e-3, 0.05  # of the original and the retrained model

Record = dict[str, Any]


@dataclass(frozen=True)
class _Task:
    """One setting of one seed: which records are forgotten, and what every model is judged on."""

    setting: str
    seed: int
    lam: float
    forgotten: str
    forget: list[Record]
    retain: list[Record]
    validation: list[Record]
    test: list[Record]

    @property
    def sets(self) -> dict[str, list[Record]]:
        return {"forget": self.forget, "retain": self.retain, "validation": self.validation, "test": self.test}

    def judge(self, model: PreTrainedModel) -> _Verdict:
        return _Verdict(
            {name: predict(model, records, batch_size=256) for name, records in self.sets.items()}, self.seed
        )


@dataclass(frozen=True)
class _Verdict:
    """Predictions of one model on the four sets of a task."""

    predictions: dict[str, Predictions]
    seed: int

    def accuracy(self, name: str) -> float:
        return self.predictions[name].accuracy

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
    with run_folder(config.output) as folder, quiet_transformers(), _one_thread():
        runs: list[dict[str, Any]] = []
        evidence: list[Evidence] = []
        models = 1 + len(config.settings) * (1 + 2 * len(config.objectives) * len(config.lrs))
        with tqdm(total=config.seeds * models, desc="demo", unit="model", disable=None) as bar:
            for seed in range(config.first_seed, config.first_seed + config.seeds):
                for run, shown in _run_seed(config, seed, folder, bar):
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


def _run_seed(config: DemoConfig, seed: int, folder: Path, bar: tqdm) -> Iterator[tuple[dict[str, Any], Evidence]]:
    train, validation, test = _digits(seed)
    original, original_seconds = _train(train, seed, config.train_epochs)
    bar.update()
    for setting in config.settings:
        task = _task(config, setting, seed, train, validation, test)
        retrained, retrain_seconds = _train(task.retain, seed, config.train_epochs)
        bar.update()
        before, gold = task.judge(original), task.judge(retrained)
        masks, mask_seconds = _learn_masks(config, task, original)
        mask_file = f"masks-{setting}-seed{seed}.safetensors"
        masks.save(folder / mask_file)

        rows, winners = [], {}
        for objective in config.objectives:
            for used in (None, masks):
                grid = []
                for lr in config.lrs:
                    grid.append(_unlearn(config, task, original, before, objective, used, lr))
                    bar.update()
                best = min(grid, key=lambda candidate: candidate.selection)
                rows.append(_method_row(objective, used is not None, best, grid, gold))
                if used is not None:
                    winners[objective] = best
        shown = "gd" if "gd" in winners else config.objectives[0]
        if seed == config.first_seed and setting == config.settings[0]:
            winners[shown].model.save_pretrained(folder / "model")
        run = {
            "setting": setting,
            "seed": seed,
            "forgotten": task.forgotten,
            "records": {name: len(records) for name, records in task.sets.items()},
            "original": _row(before, gold) | {"seconds": original_seconds},
            "retrained": _row(gold, gold) | {"seconds": retrain_seconds},
            "masks": {"file": mask_file, "cost": masks.cost(), "seconds": mask_seconds, **masks.provenance},
            "methods": rows,
        }
        predictions = {"original": before, "unlearned": winners[shown].verdict, "retrained": gold}
        yield run, Evidence(run, shown, masks, {name: verdict.predictions for name, verdict in predictions.items()})


def _digits(seed: int) -> tuple[list[Record], list[Record], list[Record]]:
    """Training, validation and test records: 60, 16 and 24 % of each class."""
    from sklearn.model_selection import train_test_split

    images, labels = load_digits()

    def divide(rows: Sequence[int], share: float) -> tuple[list[int], list[int]]:
        return train_test_split(rows, test_size=share, random_state=seed, stratify=labels[list(rows)].numpy())

    train, rest = divide(range(len(labels)), 0.4)
    validation, test = divide(rest, 0.6)
    return (
        digit_records(images, labels, train),
        digit_records(images, labels, validation),
        digit_records(images, labels, test),
    )


def _task(
    config: DemoConfig, setting: str, seed: int, train: list[Record], validation: list[Record], test: list[Record]
) -> _Task:
    if setting == "random":
        generator = torch.Generator().manual_seed(seed)
        count = max(1, round(config.forget_share * len(train)))
        chosen = set(torch.randperm(len(train), generator=generator)[:count].tolist())
        forget = [record for row, record in enumerate(train) if row in chosen]
        retain = [record for row, record in enumerate(train) if row not in chosen]
        forgotten = f"{count} random training images ({config.forget_share:.0%})"
        return _Task(setting, seed, config.random_lam, forgotten, forget, retain, validation, test)
    digit = seed % CLASSES if config.forget_class is None else config.forget_class
    parts = ([record for record in records if record["labels"] != digit] for records in (train, validation, test))
    forget = [record for record in train if record["labels"] == digit]
    forgotten = f"all {len(forget)} training images of the digit {digit}"
    return _Task(setting, seed, config.class_lam, forgotten, forget, *parts)


def _train(records: list[Record], seed: int, epochs: int) -> tuple[PreTrainedModel, float]:
    """Train a small ViT from the initial weights and in the order of the seed; returns it and the seconds it took."""
    started = time.perf_counter()
    model = small_vit(seed)
    images = torch.stack([record["pixel_values"] for record in records])
    labels = torch.stack([record["labels"] for record in records])
    steps = epochs * math.ceil(len(records) / _TRAIN_BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_TRAIN_LR, weight_decay=_TRAIN_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _TRAIN_LR, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(records), generator=generator).split(_TRAIN_BATCH):
            optimizer.zero_grad()
            model(pixel_values=images[rows], labels=labels[rows]).loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval(), time.perf_counter() - started


def _learn_masks(config: DemoConfig, task: _Task, model: PreTrainedModel) -> tuple[ModuleMasks, float]:
    started = time.perf_counter()
    forget, retain = (
        importance(model, records, batch_size=256, progress=False) for records in (task.forget, task.retain)
    )
    masks = search(forget=forget, retain=retain, budget=config.budget, lam=task.lam, seed=task.seed, model=model)
    return masks, time.perf_counter() - started


def _unlearn(
    config: DemoConfig, task: _Task, original: PreTrainedModel, before: _Verdict, objective: str,
    masks: ModuleMasks | None, lr: float,
) -> _Candidate:  # fmt: skip
    model = copy.deepcopy(original)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pymape-") as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, learning_rate=lr, max_steps=config.steps, seed=task.seed,
            per_device_train_batch_size=config.batch_size, lr_scheduler_type="constant", logging_strategy="no",
            save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = UnlearnTrainer(
            model, arguments, forget_dataset=task.forget, retain_dataset=task.retain, objective=objective, masks=masks
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.merge()
    seconds = time.perf_counter() - started
    verdict = task.judge(model)
    target = before.accuracy("validation") if task.setting == "random" else 0.0
    selection = abs(verdict.accuracy("forget") - target) + sum(
        abs(verdict.accuracy(name) - before.accuracy(name)) for name in ("retain", "validation")
    )
    return _Candidate(model, lr, verdict, selection, seconds)


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
    for name, (valid, expected) in ranges.items():
        if not valid:
            raise ValueError(f"{name} must be {expected}, got {getattr(config, name)}")
