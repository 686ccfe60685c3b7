"""The steps of an unlearning run: fine-tune, learn the masks, unlearn, judge. Runs and sessions are made of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from pymape.checkpoint import full_precision
from pymape.config import TrainConfig, UnlearnConfig
from pymape.data.batching import PaddingCollator
from pymape.data.records import ALTERNATIVE
from pymape.importance import Importance, importance
from pymape.masks import ModuleMasks
from pymape.metrics import METRICS, Predictions, mean_gap, measure_cost, predict, summarise
from pymape.model_layout import find_layers
from pymape.objectives import get_objective
from pymape.prefix_cache import PrefixCache
from pymape.search import search
from pymape.trainer import UnlearnTrainer
from pymape.trainer.pairing import holds_all
from pymape.trainer.stopping import StopWhenForgotten

__all__ = [
    "Clock",
    "Data",
    "check_objective",
    "fine_tune",
    "judge",
    "learn_masks",
    "model_figures",
    "unlearn",
]

Record = dict[str, Any]


@dataclass
class Clock:
    """Wall time of each phase, and the processor time of all threads, in seconds."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with measure_cost() as cost:
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + cost.wall_seconds
        self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + cost.cpu_seconds


@dataclass(frozen=True)
class Data:
    """Tokenised records."""

    forget: list[Record]
    retain: list[Record]
    test: list[Record]
    unseen: list[Record]  # what the forget records are held against

    def __post_init__(self) -> None:
        """Refuse the training records as unseen ones; some texts may well stand in both."""
        if self.unseen and holds_all(self.unseen, self.forget, self.retain):
            count = len(self.unseen)
            raise ValueError(f"data.unseen must hold records of its own, got {count} that are all in data.path too")

    @property
    def sets(self) -> dict[str, list[Record]]:
        return {"forget": self.forget, "retain": self.retain} | ({"test": self.test} if self.test else {})


def check_objective(config: UnlearnConfig, model: PreTrainedModel, forget: list[Record]) -> None:
    """Refuse now what the trainer would refuse once everything before it has been computed.

    Raises:
        ValueError: several GPUs for one process, a layer that the model lacks, a forgotten record without an answer.
    """
    if (count := _arguments("", config.seed).n_gpu) > 1:
        raise ValueError(f"one process must use one GPU (CUDA_VISIBLE_DEVICES=0), got {count}")
    objective = get_objective(config.objective).with_options(config.objective_options)
    layer, layers = objective.options.get("layer"), len(find_layers(model))
    if layer is not None and not 0 <= layer < layers:
        raise ValueError(f"objective_options.layer must be in [0, {layers}), got {layer}")
    for record in forget if objective.alternative else ():
        if not any(name.startswith(ALTERNATIVE) for name in record):
            raise ValueError(
                f"data.alternative_column must have an answer for every forgotten record with objective "
                f"{config.objective!r}, got none with id {record['id']!r}"
            )


def fine_tune(
    model: PreTrainedModel,
    records: list[Record],
    config: TrainConfig,
    seed: int,
    collate: PaddingCollator,
    scratch: str,
) -> None:
    options: dict[str, Any] = {
        "learning_rate": config.lr,
        "num_train_epochs": config.epochs,
        "weight_decay": config.weight_decay,
        "train_sampling_strategy": "group_by_length" if config.group_by_length else "random",
    }
    arguments = _arguments(scratch, seed, per_device_train_batch_size=config.batch_size, **options)
    with full_precision(model):
        trainer = Trainer(model, arguments, train_dataset=records, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"loss must stay finite, got NaN while fine-tuning with train.lr {config.lr:g}")
    model.eval()


def learn_masks(
    config: UnlearnConfig, model: PreTrainedModel, data: Data, collate: PaddingCollator, clock: Clock,
    known: Importance | None = None,
) -> tuple[ModuleMasks | None, Importance | None]:  # fmt: skip
    """The masks (None: everything) and the retain importance that they were learned from.

    What is `known` of the retain set is taken first, and only what is missing to the sample is measured.
    """
    options = config.masks
    if options.file is not None:
        return ModuleMasks.load(options.file, model), known
    if options.objective == "everything":
        return None, known
    generator = torch.Generator().manual_seed(config.seed)
    names, stored = [record["id"] for record in data.retain], set(known.ids if known else ())
    order = torch.randperm(len(names), generator=generator).tolist()
    order.sort(key=lambda row: names[row] not in stored)
    rows = sorted(order[: config.data.importance_samples or len(names)])
    missing = [data.retain[row] for row in rows if names[row] not in stored]

    def measure(records: list[Record]) -> Importance:
        return importance(model, records, batch_size=config.eval_batch_size, collate_fn=collate)

    with clock.phase("importance"):
        forget = measure(data.forget)
        parts = [known.select([names[row] for row in rows if names[row] in stored])] if known else []
        retain = Importance.concat([*parts, measure(missing)] if missing else parts)
    with clock.phase("search"):
        masks = search(forget=forget, retain=retain, seed=config.seed, model=model, **options.search_options())
    return masks, retain


def unlearn(
    config: UnlearnConfig, model: PreTrainedModel, data: Data, masks: ModuleMasks | None, collate: PaddingCollator,
    scratch: str,
) -> str | None:  # fmt: skip
    """Unlearn in place; why that ended early, if it did."""
    cache = None if config.prefix_cache is None else PrefixCache(config.prefix_cache)
    stop = StopWhenForgotten(data.unseen) if config.stop_when_forgotten else None
    objective = get_objective(config.objective).with_options(config.objective_options)
    options = {"learning_rate": config.lr, "num_train_epochs": config.epochs, "weight_decay": config.weight_decay}
    with full_precision(model):
        trainer = UnlearnTrainer(
            model,
            _arguments(scratch, config.seed, per_device_train_batch_size=config.batch_size, **options),
            forget_dataset=data.forget,
            retain_dataset=data.retain,
            unseen_dataset=data.unseen if objective.needs_unseen else None,
            objective=config.objective,
            objective_options=config.objective_options,
            masks=masks,
            train_task_head=config.train_task_head,
            alpha=config.alpha,
            retain=config.retain,
            beta=config.beta,
            gamma=config.gamma,
            prefix_cache=cache,
            data_collator=collate,
            callbacks=[stop] if stop else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trainer.merge()
    if cache is not None:
        cache.erase(record["id"] for record in data.forget)
    return None if stop is None else stop.reason


def _arguments(scratch: str, seed: int, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
        **options,
    )


def judge(
    model: PreTrainedModel, data: Data, config: UnlearnConfig, collate: PaddingCollator
) -> dict[str, Predictions]:
    return {
        name: predict(model, records, batch_size=config.eval_batch_size, collate_fn=collate)
        for name, records in data.sets.items()
    }


def model_figures(models: dict[str, dict[str, Predictions]], seed: int) -> dict[str, dict[str, float]]:
    """UA and RA, with a test set TA and MIA too, losses, and the gap where there is a retrained model."""
    figures = {}
    for name, sets in models.items():
        row = summarise(sets["forget"], sets["retain"], sets.get("test"), seed=seed)
        figures[name] = row | {f"{part}_loss": found.loss.mean().item() for part, found in sets.items()}
    if "retrained" in figures:
        metrics = [name for name in METRICS if name in figures["retrained"]]
        for row in figures.values():
            row["gap"] = mean_gap(row, figures["retrained"], metrics)
    return figures
