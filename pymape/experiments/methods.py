"""What is trained and how it is unlearned: every method behind two functions, `choose` and `unlearn`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainingArguments

from pymape.data.batching import PaddingCollator, collated, record_lengths
from pymape.errors import NothingSelected
from pymape.experiments.config import ExperimentConfig, MethodConfig, SelectionConfig
from pymape.experiments.kinds import KINDS
from pymape.experiments.looks import KeepBest
from pymape.forward import padding_token
from pymape.importance import Importance, importance
from pymape.learned_gates import learn_gates
from pymape.losses import per_sample_loss
from pymape.masks import ModuleMasks
from pymape.model_layout import layout
from pymape.objectives import get_objective
from pymape.search import search
from pymape.trainer import UnlearnTrainer

__all__ = ["Chosen", "Measured", "check_methods", "choose", "pass_size", "unlearn"]

Record = dict[str, Any]

_BATCH = 256  # most records per pass where nothing is trained
_GATE_BATCH = 64
# Most tokens per pass, with padding. On a core, larger passes only pad more and fall out of its caches.
_CPU_TOKENS, _TOKENS = 2**11, 2**16


@dataclass(frozen=True)
class Chosen:
    """What a selection comes to on one model; without masks, entries and rank it is everything.

    Args:
        masks: the heads and filters to train.
        entries: of each parameter, bool of its shape: the entries to train.
        rank: of LoRA adapters, to train instead of the model's own parameters.
        seconds: that finding it took.
    """

    masks: ModuleMasks | None = None
    entries: Sequence[Tensor] | None = None
    rank: int | None = None
    seconds: float = 0.0


class Measured:
    """Importance of the records of one model, measured once for all selections that ask for as many of them.

    Args:
        model: the model.
        sets: its "forget" and "retain" records.
        seed: of what is chosen where not all records are asked for.
        first: of the same model and records before some moved from "retain" to "forget", which then are known already.
    """

    def __init__(
        self, model: PreTrainedModel, sets: Mapping[str, list[Record]], seed: int, first: Measured | None = None
    ) -> None:
        self.model, self.sets, self.seed, self.first = model, sets, seed, first
        self._found: dict[tuple[str, int], tuple[Importance, float]] = {}

    def sample(self, name: str, count: int | None) -> list[Record]:
        """All records of a set in their order, or `count` random ones of them."""
        records = self.sets[name]
        if count is None or count >= len(records):
            return records
        generator = torch.Generator().manual_seed(self.seed)
        return [records[row] for row in torch.randperm(len(records), generator=generator)[:count].sort().values]

    def __call__(self, name: str, count: int | None) -> tuple[Importance, float]:
        """Importance of a set and the seconds that it took when it was measured."""
        records = self.sample(name, count)
        if self.first is not None:
            return self.first._everything.select([record["id"] for record in records]), 0.0
        if (name, len(records)) not in self._found:
            started = time.perf_counter()
            found = importance(self.model, records, batch_size=pass_size(self.model, records), progress=False)
            self._found[name, len(records)] = found, time.perf_counter() - started
        return self._found[name, len(records)]

    @cached_property
    def _everything(self) -> Importance:
        return Importance.concat([self(name, None)[0] for name in self.sets])


def check_methods(config: ExperimentConfig) -> None:
    """Refuse what cannot run before anything does.

    Raises:
        ValueError: an unknown objective, one that needs alternative answers or unseen records where there are none, or
            a one-shot objective on entries or adapters.
    """
    for method in config.all_methods:
        found = get_objective(method.objective)
        if "loss" in method.options:  # of an objective that steps another one, whose needs it has
            found = found.with_options(method.options)
        whole = [name for name in method.settings if config.settings[name].forget == "class"]
        if found.needs_unseen and whole:
            raise ValueError(
                f"objectives must need no unseen records of what is forgotten for setting {whole[0]!r}, where a whole "
                f"class is, got {method.objective!r}"
            )
        if found.alternative and not KINDS[config.task.name].alternatives:
            raise ValueError(
                f"objectives must need no alternative answers for task {config.task.name!r}, got {method.objective!r}"
            )
        for name in method.selections:
            kind = config.selections[name].kind
            if found.one_shot and kind in ("saliency", "lora"):
                raise ValueError(
                    f"{method.objective!r} must be given everything or heads and filters, got selection {name!r} of "
                    f"kind {kind!r}"
                )


def choose(config: SelectionConfig, lam: float, measured: Measured) -> Chosen:
    """Find what a selection trains in a model.

    Args:
        config: the selection.
        lam: weight of the retain set, where the selection has none of its own.
        measured: importance of the model's forget and retain records.

    Raises:
        ValueError: more layers than the model has, or masks that select nothing.
    """
    model, started, shared = measured.model, time.perf_counter(), 0.0
    lam = lam if config.lam is None else config.lam
    masks, entries = None, None
    if config.kind == "modules":
        before = time.perf_counter()
        (forget, forget_seconds), (retain, retain_seconds) = (
            measured(name, config.samples) for name in ("forget", "retain")
        )
        # Whoever came first measured it; random and magnitude masks need none of it.
        shared = -(time.perf_counter() - before)
        if config.objective not in ("random", "magnitude"):
            shared += forget_seconds + retain_seconds
        forget, retain = (_averaged(each, config.average) for each in (forget, retain))
        masks = search(
            forget=forget, retain=retain, budget=config.budget, objective=config.objective, lam=lam, mode=config.mode,
            normalize=config.normalize, across_layers=config.across_layers, seed=measured.seed, model=model,
        )  # fmt: skip
    elif config.kind == "gates":
        forget_batches, retain_batches = (
            _batches(model, measured.sample(name, config.samples), _GATE_BATCH) for name in ("forget", "retain")
        )
        masks = learn_gates(
            model, forget_batches, retain_batches, config.budget, lam=lam, seed=measured.seed, progress=False
        )
    elif config.kind == "last_layers":
        masks = _last_layers(model, config.layers)
    elif config.kind == "saliency":
        entries = _salient(model, measured.sample("forget", config.samples), config.budget)
    if masks is not None and not (masks.heads.any() or masks.filters.any()):
        raise NothingSelected(f"masks must select at least one head or filter, got none with {config}")
    rank = config.rank if config.kind == "lora" else None
    return Chosen(masks, entries, rank, time.perf_counter() - started + shared)


def _averaged(found: Importance, count: int) -> Importance:
    """Means of the gradients of `count` records at a time, the last ones fewer; each bears its first record's id."""
    if count == 1:
        return found
    heads, filters = (
        torch.stack([part.double().mean(0) for part in each.split(count)]).to(each.dtype)
        for each in (found.heads, found.filters)
    )
    return Importance(heads, filters, found.ids[::count], found.layout, found.provenance)


def unlearn(
    model: PreTrainedModel,
    chosen: Chosen,
    method: MethodConfig,
    value: float,
    *,
    forget: list[Record],
    retain: list[Record],
    unseen: list[Record] | None = None,
    steps: int,
    batch_size: int,
    seed: int,
    judge: Callable[[Any], float] | None = None,
    every: int | None = None,
) -> tuple[PreTrainedModel, dict[str, float]]:
    """Unlearn in place.

    Args:
        model: the original model.
        chosen: what to train.
        method: the objective, and which parameter has `value`.
        value: of the tuned parameter.
        forget: records to forget.
        retain: records to keep.
        unseen: records that the model has never seen, for objectives that need some.
        steps: optimizer steps, where the objective takes any.
        batch_size: forget records per step, and as many retain records.
        seed: of order, pairing and random labels.
        judge: of a model: of those that it is shown, the one that it finds lowest is given back.
        every: steps between two models that `judge` is shown; None gives the model of the last step.

    Returns:
        The plain model, and {"seconds", "trained": number of trained values as a share of the model's parameters}.
        Where `judge` decided, also "steps", those of the model, and "cpu_seconds"; both times leave out the looking.

    Raises:
        ValueError: as `UnlearnTrainer` does, for instance if the loss is no longer finite.
    """
    started = time.perf_counter()
    total = sum(parameter.numel() for parameter in model.parameters())
    options: dict[str, Any] = dict(method.options)
    arguments: dict[str, Any] = {}
    trainer_options: dict[str, Any] = {}
    if method.parameter == "lr":
        arguments["learning_rate"] = value
    elif method.parameter == "gamma":
        trainer_options["gamma"] = value
    else:
        options[method.parameter] = value
    objective = get_objective(method.objective).with_options(options)
    with tempfile.TemporaryDirectory(prefix="pymape-") as scratch, _adapters(model, chosen.rank, seed) as merge:
        trainer = UnlearnTrainer(
            model,
            TrainingArguments(
                output_dir=scratch, max_steps=steps, seed=seed, per_device_train_batch_size=batch_size,
                lr_scheduler_type="constant", logging_strategy="no", save_strategy="no", report_to="none",
                disable_tqdm=True, dataloader_pin_memory=False, **arguments,
            ),
            forget_dataset=forget, retain_dataset=retain, objective=method.objective, objective_options=options,
            unseen_dataset=unseen if objective.needs_unseen else None,
            masks=chosen.masks, **trainer_options,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if chosen.rank is not None:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        trained = trainer.partial.numel()
        best = None if judge is None or every is None else KeepBest(trainer.partial, judge, every)
        if best is not None:
            trainer.add_callback(best)
        with _only(model, chosen.entries):
            trainer.train()
        if best is not None and best.steps:  # one-shot objectives take none
            best.restore()
        trainer.merge()
        if chosen.entries is not None:
            trained = sum(int(entries.sum()) for entries in chosen.entries)
        merge()
    facts = {"seconds": time.perf_counter() - started, "trained": trained / total}
    if best is not None and best.steps:
        facts |= {name: getattr(best, name) for name in ("steps", "seconds", "cpu_seconds")}
    return model, facts


def pass_size(model: Any, records: list[Record], most: int = _BATCH) -> int:
    """How many records to run a model on at a time where nothing is trained: fewer than `most` where they are long."""
    lengths = record_lengths(records)
    tokens = _CPU_TOKENS if model.device.type == "cpu" else _TOKENS
    return most if lengths is None else max(1, min(most, tokens // max(lengths)))


@contextmanager
def _only(model: nn.Module, entries: Sequence[Tensor] | None) -> Iterator[None]:
    """Zero the gradients of all other entries of the parameters.

    AdamW without weight decay leaves them untouched then. All gradients and moments are computed and held all the same:
    that is what a dense mask costs.
    """
    if entries is None:
        yield
        return
    handles = [
        parameter.register_hook(lambda gradient, keep=keep: gradient * keep)
        for parameter, keep in zip(model.parameters(), entries, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _adapters(model: Any, rank: int | None, seed: int) -> Iterator[Callable[[], None]]:
    """LoRA adapters on all linear layers of the body; yields what folds them into the model's own weights."""
    if rank is None:
        yield lambda: None
        return
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    linear = [name for name, module in model.base_model.named_modules() if isinstance(module, nn.Linear)]
    prefix = model.base_model_prefix
    names = [f"{prefix}.{name}" for name in linear]
    # peft rewrites the modules of the model that it is given, so that the model stays what it was for everyone else.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner = LoraModel(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), "default")

    def fold() -> None:
        tuner.merge_and_unload()
        model.requires_grad_(True)

    yield fold


def _batches(model: Any, records: list[Record], most: int) -> list[dict[str, Tensor]]:
    collate = PaddingCollator(padding_token(model))
    size = pass_size(model, records, most)
    batches = (collated(collate, records[start : start + size]) for start in range(0, len(records), size))
    return [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]


def _last_layers(model: nn.Module, count: int) -> ModuleMasks:
    shape = layout(model)
    if count > shape.layers:
        raise ValueError(f"layers must be at most the model's {shape.layers}, got {count}")
    masks = ModuleMasks.everything(shape)
    masks.heads[: shape.layers - count] = False
    masks.filters[: shape.layers - count] = False
    masks.provenance = {"objective": "last layers", "layers": count}
    return masks


def _salient(model: nn.Module, forget: list[Record], share: float) -> list[Tensor]:
    """The share of all entries of all parameters with the largest |gradient of the mean forget loss|.

    Source: Fan et al. 2024 (SalUn, arXiv 2310.12508), equation 4; its threshold, the median, is share 1/2.
    """
    parameters = list(model.parameters())
    totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    model.eval()
    for batch in _batches(model, forget, _BATCH):
        loss = per_sample_loss(model, batch, model(**batch)).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        for total, gradient in zip(totals, gradients, strict=True):
            total += gradient
    flat = torch.cat([total.abs().flatten() for total in totals])
    keep = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    keep[flat.argsort(descending=True, stable=True)[: round(share * len(flat))]] = True
    parts = keep.split([total.numel() for total in totals])
    return [part.view_as(total) for part, total in zip(parts, totals, strict=True)]
