"""Unlearning with `transformers.Trainer`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from pymape.architectures import language_model
from pymape.data.batching import PaddingCollator
from pymape.data.positions import PositionCollator, counts_padding
from pymape.errors import NotFinite
from pymape.forward import LABELS, eval_mode, padding_token
from pymape.frozen_prefix import FrozenPrefix
from pymape.losses import check_labels
from pymape.masks import ModuleMasks
from pymape.objectives import Objective, OneShot, RecordGradients, Step, UnlearnBatch, get_objective
from pymape.objectives.sophia import Sophia, gauss_newton_bartlett
from pymape.objectives.step import count_tokens
from pymape.partial import PartialParameters
from pymape.prefix_cache import PrefixCache
from pymape.processes import rank, world_size
from pymape.storage.files import atomic_write
from pymape.trainer.checks import (
    check_choices,
    check_loss,
    check_weights,
    needed_sets,
    needed_unseen,
    reject_ignored,
    reject_wrapped,
)
from pymape.trainer.original import OriginalModel
from pymape.trainer.pairing import PairCollator, PairDataset, PairSampler, check_set
from pymape.trainer.preparation import embeddings_as_they_are, undo_preparation
from pymape.trainer.reference_cache import ReferenceCache, weights_digest
from pymape.trainer.stopping import StopWhenForgotten

__all__ = ["UnlearnTrainer"]

_SIDES = ("forget", "retain")
_ORIGIN = "unlearning.json"  # in each checkpoint


class UnlearnTrainer(Trainer):
    """Make a model forget records by an unlearning objective, on all of its parameters or on the selected ones only.

    Every batch pairs `per_device_train_batch_size` forget records with as many retain records; an epoch goes once
    through the longer of the sets that the objective reads, the shorter one is cycled in a new random order each time.
    Means are taken over the whole optimizer step, so that gradient accumulation changes nothing. What is needed of the
    original model is computed when `train` starts; no second model is held. `merge` then gives the plain model.

    Args:
        model: a supported Hugging Face model with a task head. It is changed in place.
        args: training arguments, with the Trainer's defaults (fused AdamW, fp32, no reports). `seed` (or `data_seed`)
            fixes order, pairing and random labels.
        forget_dataset: map-style data set of dicts with labels; None only for objectives that do not read it. `dpo` and
            `idk` read an alternative answer from a record's fields `alternative_*`: `alternative_labels`, another label
            of the same inputs, or `alternative_input_ids` and `alternative_labels`, as language models need them.
        retain_dataset: the same, of records to keep.
        unseen_dataset: the same, of records that the model has never seen, of the kind of the forget records: `match`
            gives the forget records the losses of these.
        objective: name of a registered objective.
        objective_options: values for its own options, for instance {"layer": 7} for `rmu`.
        masks: what to train, whatever its `requires_grad`; None trains every parameter that requires grad.
        train_task_head: with masks, train the task head too, whatever its `requires_grad`.
        fused: as in `PartialParameters`: whether norms and gated feed-forward blocks are fused; None: on a GPU.
        alpha: weight of the retain term, >= 0.
        retain: the retain term of objectives that leave the choice: "nll", or "kl" from the original model.
        beta: inverse temperature of `npo`, `simnpo` and `dpo`, > 0.
        gamma: damping of `influence`, > 0.
        dropout: False trains in eval mode. True is the Trainer's habit, and what gradient checkpointing needs; the
            original model is asked in eval mode in any case.
        reference_cache: folder that keeps for later runs what is computed of the original model record by record.
        prefix_cache: folder (or `PrefixCache`) for the hidden states below the lowest selected layer, which are then
            computed once for every record; None computes them in every step.
        trainer_options: further arguments of `transformers.Trainer`. A record's `id` is never given to the model.
            Without a `data_collator` records are padded on the right, with the token of `processing_class` if given.

    A one-shot objective takes no steps: it writes no checkpoints, whatever `save_strategy` says.

    Raises:
        ValueError: unknown objective, missing or empty data set, an id that comes twice, unseen records that are all
            in the other sets, masks of another model, nothing to train, a model that is wrapped by PEFT or
            `torch.compile` or of a task that the objective is not for, or an option that it would ignore.

    Source: MAPE-Unlearn (arXiv 2508.17233), section on unlearning with masks.
    """

    model: Any
    objective: Objective

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments | None = None,
        *,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        unseen_dataset: Any = None,
        objective: str = "gd",
        objective_options: Mapping[str, Any] | None = None,
        masks: ModuleMasks | None = None,
        train_task_head: bool = False,
        fused: bool | None = None,
        alpha: float = 1.0,
        retain: Literal["nll", "kl"] = "nll",
        beta: float = 0.1,
        gamma: float = 1e-3,
        dropout: bool = True,
        reference_cache: str | os.PathLike[str] | None = None,
        prefix_cache: str | os.PathLike[str] | PrefixCache | None = None,
        **trainer_options: Any,
    ) -> None:
        if args is None:
            args = TrainingArguments(output_dir="unlearned", save_strategy="no", report_to="none")
        reject_wrapped(model, args, masks)
        self.objective = get_objective(objective).with_options(objective_options or {})
        check_weights(alpha, beta, gamma)
        self.alpha, self.beta, self.gamma, self.dropout = alpha, beta, gamma, dropout
        self.retain, self.reference_cache, self.forget_dataset = retain, reference_cache, forget_dataset
        self.data, self._ids = needed_sets(self.objective, forget_dataset, retain_dataset)
        check_choices(self.objective, retain, self.data, model)
        self._references = self.objective.reference | ({"log_probs"} if retain == "kl" else set())
        self._unseen = needed_unseen(self.objective, unseen_dataset, self.data)
        reject_ignored(args, self.objective, masks, dropout, {**trainer_options, "prefix_cache": prefix_cache})
        if self.objective.optimizer is not None:
            options = {"lr": args.learning_rate, **self.objective.optimizer_options}
            trainer_options["optimizer_cls_and_kwargs"] = (self.objective.optimizer, options)
        if trainer_options.get("data_collator") is None:
            # Records as `importance` takes them: of any length, token labels too.
            own = getattr(trainer_options.get("processing_class"), "pad_token_id", None)
            trainer_options["data_collator"] = PaddingCollator(padding_token(model) if own is None else own)
        use_cache = getattr(model.config, "use_cache", None)
        partial = PartialParameters(model, masks, train_task_head=train_task_head, fused=fused)
        try:
            self._prefix = None if prefix_cache is None else _frozen_prefix(model, partial, prefix_cache)
            super().__init__(model, args, train_dataset=PairDataset(self.data), **trainer_options)
        except BaseException:
            partial.merge()
            raise
        self.label_names = self.label_names or ["labels"]  # of models whose forward takes none
        if counts_padding(model):
            self.data_collator = PositionCollator(self.data_collator)
        self.partial = partial
        layer = self.objective.options.get("layer")
        self.original = OriginalModel(model, partial, self._references, self.objective.alternative, layer)
        # Models whose forward takes **kwargs make the Trainer believe that the loss is divided already.
        self.model_accepts_loss_kwargs = False
        self._use_cache = use_cache
        self._merged = False
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, StopWhenForgotten):
                callback.trainer = self

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Unlearn; see `transformers.Trainer.train`. A one-shot objective is computed and applied instead.

        Raises:
            ValueError: the loss or a trained parameter became NaN or infinite; labels out of range; a collator that
                does not give one row per record; randomly augmented records with an objective that compares them with
                stored values of the original model; a checkpoint to resume from of another original model or of other
                masks, or with a one-shot objective.
        """
        if self._merged:
            raise ValueError("trainer must not be merged before train, got a merged one: make a new trainer")
        if self.objective.one_shot:
            if resume_from_checkpoint:
                raise ValueError(
                    f"resume_from_checkpoint must be None for {self.objective.name!r}, which takes no steps, "
                    f"got {resume_from_checkpoint!r}"
                )
            return self._train_once()
        if resume_from_checkpoint:
            self._check_checkpoint(resume_from_checkpoint)
        self._look_up_original()
        with embeddings_as_they_are(self.model):
            output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._require_finite(self.partial.parameters(), "parameters")
        return output

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Also note in a checkpoint what is trained, and from which values on."""
        if self.args.should_save:
            with atomic_write(Path(output_dir) / _ORIGIN) as path:
                path.write_text(json.dumps({"base": self.partial.base_digest}) + "\n", encoding="utf-8")
        super()._save_optimizer_and_scheduler(output_dir)

    def _check_checkpoint(self, checkpoint: str | bool) -> None:
        """Refuse a checkpoint of a training that began with other weights, or trained others."""
        if language_model(self.model) is not None:  # their weights have other names on disk, which it passes over
            raise ValueError(
                "resume_from_checkpoint must be None for a model of texts and images, whose checkpoints transformers' "
                f"Trainer does not load back, got {checkpoint!r}"
            )
        folder = get_last_checkpoint(self.args.output_dir) if isinstance(checkpoint, bool) else checkpoint
        if folder is None or not Path(folder).is_dir():
            return  # which the Trainer refuses
        path = Path(folder) / _ORIGIN
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint must be a checkpoint of an UnlearnTrainer, got {str(folder)!r}")
        if json.loads(path.read_text(encoding="utf-8"))["base"] != self.partial.base_digest:
            raise ValueError(
                "resume_from_checkpoint must be of a training that began with this model and these masks, got "
                f"{str(folder)!r}: give the original model, not the checkpoint's, and the masks of then"
            )

    def merge(self) -> nn.Module:
        """End the training: the plain model in eval mode, every parameter outside the masks bit-identical to before."""
        self._merged = True
        if self._use_cache is not None:
            self.model.config.use_cache = self._use_cache
        undo_preparation(self.model)
        return self.partial.merge().eval()

    def mean_loss(self, dataset: Any) -> float:
        """Mean negative log-likelihood per labelled token (per record for classifiers) of a data set, now.

        Args:
            dataset: map-style data set of dicts with labels.

        Raises:
            ValueError: a data set that is empty or not map-style; labels out of range.
        """
        check_set("dataset", dataset)
        total = tokens = 0.0
        with torch.no_grad(), eval_mode(self.model), self.accelerator.autocast():
            for batch in self._in_order(dataset, [f"row {row}" for row in range(len(dataset))]):
                total += float(batch.nll().sum())
                tokens += batch.tokens
        return total / tokens

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create the optimizer of the trained parameters, followed by their write-back after every step."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh:
            self.partial.attach(optimizer)
        return optimizer

    def get_train_dataloader(self) -> DataLoader:
        """Batches of paired forget and retain records."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = PairSampler([len(dataset) for dataset in self.data.values()], seed)
        loader: DataLoader = DataLoader(
            PairDataset(self.data, sampler),
            batch_size=self._train_batch_size,
            sampler=sampler,
            collate_fn=PairCollator(
                self._get_collator_with_removed_columns(self.data_collator, "Training"), self.objective.alternative
            ),
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collect the micro-batches of one optimizer step, and count what their means are to be taken over."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        alternative = {"alternative": self._ids["forget"]} if self.objective.alternative else {}
        for side, ids in {**self._ids, **alternative}.items():
            for batch in batches:
                check_labels(self.model, batch[side], [ids[index] for index in batch[f"{side}_index"].tolist()])
            counts = [count_tokens(self.model, batch[side]) for batch in batches]
            totals = torch.tensor([sum(map(len, counts)), sum(int(count.sum()) for count in counts)], device=device)
            if self.accelerator.num_processes > 1:
                # The processes' gradients are averaged, so the denominator is the mean of their counts.
                totals = self.accelerator.reduce(totals.double(), "mean")
            for batch in batches:
                batch[f"{side}_shares"] = tuple(count / len(batches) for count in totals.tolist())
        return batches, None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss on a paired batch; the model's own loss on a plain one (evaluation)."""
        if not any(f"{side}_index" in inputs for side in _SIDES):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.dropout:
            model.eval()
        self._update_hessian(inputs)
        # The retain set first: its reference may need the original weights, which must be gone before any forward pass.
        retain = self._batch("retain", inputs, model) if "retain_index" in inputs else None
        forget: Any = self._batch("forget", inputs, model) if "forget_index" in inputs else None
        if "alternative_index" in inputs:
            forget.alternative = self._alternative(forget, inputs, model)
        loss = self.objective.function(Step(forget, retain, self.alpha, self.beta, self.retain))
        check_loss(self.objective, loss)
        self._require_finite([loss], "loss")
        return (loss, {}) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate for both halves of a paired batch."""
        return sum(super(UnlearnTrainer, self).floating_point_ops(inputs[side]) for side in _SIDES if side in inputs)

    def _batch(self, side: str, inputs: Mapping[str, Any], call: Callable[..., Any]) -> UnlearnBatch:
        index = inputs[f"{side}_index"].cpu()
        original: Callable[..., Any] = self.model
        if self._prefix is not None:
            records = [self._ids[side][row] for row in index.tolist()]
            call, original = (self._from_cache(self._prefix, records, one) for one in (call, original))
        options = self._shares(side, inputs)
        if side == "forget":
            options |= self.original.of_forget(index)
        else:
            options |= self.original.of_retain(index, inputs[side], original)
        seeds = [(self.args.seed, record) for record in index.tolist()]
        return UnlearnBatch(self.model, inputs[side], call=call, seeds=seeds, **options)

    def _from_cache(self, prefix: FrozenPrefix, records: list[str], call: Callable[..., Any]) -> Callable[..., Any]:
        def run(**inputs: Any) -> Any:
            with self.accelerator.autocast():  # accelerate enters it inside the model, where the cache cannot see it
                return prefix.run(records, inputs, call)

        return run

    def _shares(self, side: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The denominators of a side's means, known once the step's micro-batches are counted."""
        return dict(zip(("samples", "tokens"), inputs.get(f"{side}_shares", ()), strict=False))

    def _alternative(self, forget: UnlearnBatch, inputs: Mapping[str, Any], call: Callable[..., Any]) -> UnlearnBatch:
        answers, options = inputs["alternative"], self._shares("alternative", inputs)
        options |= self.original.of_forget(inputs["alternative_index"].cpu(), "alternative")
        if answers.keys() <= set(LABELS):
            return forget.relabelled(answers, **options)
        return UnlearnBatch(self.model, answers, call=call, **options)

    def _look_up_original(self) -> None:
        """Learn what the objective needs of the original model, before a resumed run loads other weights."""

        data, ids = {**self.data, **self._unseen}, dict(self._ids)
        ids |= {side: [f"{side} row {row}" for row in range(len(records))] for side, records in self._unseen.items()}

        def batches(side: str, rows: Sequence[int], batch_size: int | None = None) -> Iterator[UnlearnBatch]:
            alternative = side == "forget" and self.objective.alternative
            options: Any = {"rows": rows, "batch_size": batch_size, "alternative": alternative}
            return self._in_order(data[side], ids[side], **options)

        cache = None
        if self.reference_cache is not None and self._references:
            precision = str(self.accelerator.mixed_precision)
            cache = ReferenceCache(self.reference_cache, weights_digest(self.model, precision))
        with self.accelerator.autocast():
            self.original.look_up(data, batches, cache, write=self.is_world_process_zero())

    def _in_order(
        self,
        dataset: Any,
        ids: Sequence[str],
        *,
        rows: Sequence[int] | None = None,
        batch_size: int | None = None,
        alternative: bool = False,
    ) -> Iterator[UnlearnBatch]:
        """The records of a data set (or some of its rows) in order."""
        collate = PairCollator(self._get_collator_with_removed_columns(self.data_collator, "Reference"), alternative)
        rows = range(len(ids)) if rows is None else rows
        size = batch_size or self.args.per_device_eval_batch_size
        for start in range(0, len(rows), size):
            places = rows[start : start + size]
            inputs: Any = self._prepare_inputs(collate([{"forget": (row, dataset[row])} for row in places]))
            check_labels(self.model, inputs["forget"], [ids[row] for row in places])
            batch = UnlearnBatch(self.model, inputs["forget"])
            if alternative:
                check_labels(self.model, inputs["alternative"], [ids[row] for row in places])
                batch.alternative = self._alternative(batch, inputs, self.model)
            yield batch

    def _update_hessian(self, inputs: Mapping[str, Any]) -> None:
        """Bring Sophia its estimate of the curvature, when one is due, from the records of this micro-batch."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if not isinstance(optimizer, Sophia) or not optimizer.hessian_due:
            return
        batches = [UnlearnBatch(self.model, inputs[side]) for side in _SIDES if f"{side}_index" in inputs]
        seed = self.args.seed + self.state.global_step
        generator = torch.Generator(self.args.device).manual_seed(seed)
        estimate = gauss_newton_bartlett(batches, optimizer.parameters, generator)
        if self.accelerator.num_processes > 1:
            estimate = [self.accelerator.reduce(entries, "mean") for entries in estimate]
        optimizer.update_hessian(estimate)

    def _record_gradients(self, side: str, parameters: list[nn.Parameter]) -> RecordGradients:
        """The gradients of the records' own losses; each process computes those of every n-th record."""
        ids = self._ids.get(side, [])
        rows = range(rank(), len(ids), world_size())

        def own() -> Iterator[Sequence[Tensor]]:
            for record in self._in_order(self.data.get(side), ids, rows=rows, batch_size=1):
                with self.accelerator.autocast():
                    loss = record.loss()
                self._require_finite([loss], "loss")
                yield torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)

        return RecordGradients(parameters, own, len(ids))

    def _train_once(self) -> TrainOutput:
        start = time.time()
        self.model.eval()
        parameters = list(self.partial.parameters())
        forget, retain = (self._record_gradients(side, parameters) for side in _SIDES)
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        step = OneShot(parameters, forget, retain, self.gamma)
        updates = self.objective.function(step)
        self._require_finite(updates, "update")
        with torch.no_grad():
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.add_(update.to(parameter.dtype))
        self.partial.sync()
        self.state.global_step = 1
        norm = float(torch.stack([update.double().square().sum() for update in updates]).sum().sqrt())
        metrics = {"train_runtime": time.time() - start, "update_norm": norm, **step.metrics}
        self.log(metrics)
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(1, 0.0, metrics)

    def _require_finite(self, values: Any, what: str) -> None:
        for value in values:
            if not value.isfinite().all():
                shown = value.item() if value.ndim == 0 else "NaN or infinite values"
                raise NotFinite(
                    f"{what} must stay finite, got {shown} at step {self.state.global_step} of objective "
                    f"{self.objective.name!r} with learning_rate {self.args.learning_rate}"
                )


def _frozen_prefix(model: nn.Module, partial: PartialParameters, cache: Any) -> FrozenPrefix:
    if not partial.lowest_layer:
        raise ValueError(f"prefix_cache needs masks that leave layer 0 alone, got lowest layer {partial.lowest_layer}")
    return FrozenPrefix(model, partial.lowest_layer, cache if isinstance(cache, PrefixCache) else PrefixCache(cache))
