"""What an objective sees: the forget and retain records of a step, and what is computed from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pymape.forward import unlabelled
from pymape.losses import (
    CLASSIFICATION,
    IGNORED_LABEL,
    QUESTION_ANSWERING,
    per_sample_loss,
    sum_by_part,
    task_of,
    token_labels,
    token_losses,
)

__all__ = ["Step", "UnlearnBatch"]

_SINGLE_LOSS = (CLASSIFICATION, QUESTION_ANSWERING)  # tasks whose records have one loss and no labelled tokens


class UnlearnBatch:
    """Forget or retain records of one micro-batch; the model runs on them once, when first asked.

    A mean is taken over the optimizer step, not over the micro-batch: sums are divided by `samples` or `tokens`, the
    step's count divided by its number of micro-batches. With that, 4 micro-batches of 2 are one batch of 8 also where
    records differ in length.

    Args:
        model: Hugging Face model with a task head.
        inputs: tensors of the batch, with labels.
        call: what to call instead of `model`, for instance its DDP wrapper.
        samples, tokens: denominators of means; None stands for this batch's own.
        alternative: the same records with their alternative answers.
        reference_nll: [B] summed NLL under the original model.
        targets: [B] losses that the records are to have.
        token_targets: [B, W] losses that the labelled tokens of each record are to have, in order (W = 1 for
            classifiers); what is behind a record's own tokens is not read.
        reference_log_probs: [n, C] log-probabilities of the original model, rows as in `scored_logits`.
        reference_activations: [B, T, D] activations of the original model.
        seeds: [B] one seed per record, for random labels.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Tensor],
        *,
        call: Callable[..., Any] | None = None,
        samples: float | None = None,
        tokens: float | None = None,
        alternative: UnlearnBatch | None = None,
        reference_nll: Tensor | None = None,
        targets: Tensor | None = None,
        token_targets: Tensor | None = None,
        reference_log_probs: Tensor | None = None,
        reference_activations: Tensor | None = None,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.model = model
        self.inputs = inputs
        self.counts = count_tokens(model, inputs)  # [B]
        self.samples = len(self.counts) if samples is None else samples
        self.tokens = float(self.counts.sum()) if tokens is None else tokens
        self.alternative = alternative
        self.reference_nll = reference_nll
        self.targets = targets
        self.token_targets = token_targets
        self.reference_log_probs = reference_log_probs
        self.reference_activations = reference_activations
        self._call = model if call is None else call
        self._seeds = seeds

    @cached_property
    def outputs(self) -> Any:
        """What the model returns; without labels, so that it computes no loss of its own."""
        return self._call(**unlabelled(self.inputs))

    def activations(self, layer: int) -> Tensor:
        """[B, T, D] output of a layer, 0 being the first, as the model's `output_hidden_states` reports it."""
        if getattr(vars(self).get("outputs"), "hidden_states", None) is None:
            self.outputs = self._call(**unlabelled(self.inputs), output_hidden_states=True)
        hidden = self.outputs.hidden_states  # the embeddings, then one per layer
        if not 0 <= layer < len(hidden) - 1:
            raise ValueError(f"layer must be in [0, {len(hidden) - 1}), got {layer}")
        return hidden[layer + 1]

    def losses(self) -> Tensor:
        """[B] negative log-likelihood per labelled token of each record (a classifier's cross-entropy)."""
        return per_sample_loss(self.model, self.inputs, self.outputs)

    def token_losses(self) -> Tensor:
        """[n] negative log-likelihood of every labelled token, record by record, n = sum of `counts`.

        Where a record has a single loss (classifiers, question answering) these are `losses`.
        """
        task = task_of(self.model)
        if task in _SINGLE_LOSS:
            return self.losses()
        labels = token_labels(task, self.inputs)
        return token_losses(self._labelled_logits(), labels[labels != IGNORED_LABEL])

    def nll(self) -> Tensor:
        """[B] negative log-likelihood, summed over a record's labelled tokens (a classifier's cross-entropy)."""
        return self.losses() * self.counts

    def nll_ratio(self) -> Tensor:
        """[B] summed negative log-likelihood, less the original model's."""
        if self.reference_nll is None:
            raise ValueError("reference_nll must be known, got None: register reference=['nll']")
        nll = self.nll()
        return nll - self.reference_nll.to(nll)

    def loss(self) -> Tensor:
        """Mean negative log-likelihood per labelled token (per record for classifiers)."""
        return self.nll().sum() / self.tokens

    def mean(self, values: Tensor) -> Tensor:
        """Mean of one value per record, [B]."""
        return values.sum() / self.samples

    def mean_square(self, values: Tensor) -> Tensor:
        """Mean of [B, T, D] squares over dimensions and a record's own tokens (no padding), then over records."""
        squares = values.square().mean(-1)  # [B, T]
        mask = self.inputs.get("attention_mask")
        if mask is None or mask.shape != squares.shape:
            return self.mean(squares.mean(1))
        own = mask != 0
        return self.mean(squares.where(own, 0.0).sum(1) / own.sum(1))

    def scored_logits(self) -> Tensor:
        """[n, C] logits at the labelled tokens of the batch (at its records for classifiers), fp32 or fp64."""
        logits = self._labelled_logits()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _labelled_logits(self) -> Tensor:
        """The same in the model's dtype."""
        task, labels = task_of(self.model), self.inputs.get("labels")
        if labels is None or labels.is_floating_point():
            got = f"{task} without such" if labels is None else f"{labels.dtype} labels"
            raise ValueError(f"records must have class or token labels where probabilities are compared, got {got}")
        logits = self.outputs.logits
        if task != CLASSIFICATION:
            logits = logits[token_labels(task, self.inputs) != IGNORED_LABEL]
        return logits

    def log_probs(self) -> Tensor:
        """[n, C] log-softmax of `scored_logits`."""
        return self.scored_logits().log_softmax(-1)

    def kl(self) -> Tensor:
        """Mean of KL(p_ref || p) per labelled token (per record for classifiers); padding has no part in it."""
        if self.reference_log_probs is None:
            raise ValueError("reference_log_probs must be known for kl, got None: register reference=['log_probs']")
        logits = self._labelled_logits()
        return sum_by_part(_kl, logits, self.reference_log_probs.to(logits.device)) / self.tokens

    def with_random_labels(self) -> UnlearnBatch:
        """The same records and outputs with random wrong labels, uniform and fixed for every record by its seed."""
        labels = self.inputs.get("labels")
        if labels is None or labels.is_floating_point() or self._seeds is None:
            raise ValueError("random labels need class or token labels, got a task without")
        classes = self.outputs.logits.shape[-1]
        if classes < 2:
            raise ValueError(f"random labels need at least 2 classes, got {classes}")
        labelled = labels != IGNORED_LABEL
        counts = labelled.view(len(labels), -1).sum(1).tolist()  # a record's draws do not depend on its padding
        shifts = torch.cat([_draw(seed, classes, count) for seed, count in zip(self._seeds, counts, strict=True)])
        changed = labels.masked_scatter(labelled, (labels[labelled] + shifts.to(labels.device)) % classes)
        return self.relabelled({"labels": changed}, samples=self.samples, tokens=self.tokens)

    def relabelled(self, labels: Mapping[str, Tensor], **options: Any) -> UnlearnBatch:
        """The same records and outputs with other labels; options as for `UnlearnBatch`."""
        return UnlearnBatch(self.model, {**self.inputs, **labels}, call=lambda **_: self.outputs, **options)

    def required_targets(self) -> Tensor:
        """[B] losses that the records are to have."""
        if self.targets is None:
            raise ValueError("targets must be known, got None: register reference=['unseen']")
        return self.targets.to(self.losses())

    def required_token_targets(self) -> Tensor:
        """[n] losses that the labelled tokens are to have, places as in `token_losses`."""
        if self.token_targets is None:
            raise ValueError("token_targets must be known, got None: register reference=['unseen_tokens']")
        places = torch.arange(self.token_targets.shape[1], device=self.counts.device)
        own = places < self.counts[:, None]
        return self.token_targets.to(own.device)[own].to(self.token_losses())

    def required_alternative(self, name: str) -> UnlearnBatch:
        """The records' alternative answers, for the objective of that name."""
        if self.alternative is None:
            raise ValueError(f"forget records must have alternative_labels for {name}, got none")
        return self.alternative


@dataclass(frozen=True)
class Step:
    """One micro-batch of an objective.

    Args:
        forget, retain: its records; only what the objective registered for may be used.
        alpha: weight of the retain term.
        beta: inverse temperature of preference objectives.
        retain_term: what the retain term is, "nll" or "kl".
    """

    forget: UnlearnBatch
    retain: UnlearnBatch | None
    alpha: float
    beta: float
    retain_term: Literal["nll", "kl"] = "nll"

    def required_retain(self) -> UnlearnBatch:
        """The retain records of an objective that needs them."""
        if self.retain is None:
            raise ValueError("retain records must be given for this objective, got none")
        return self.retain

    def retain_loss(self) -> Tensor | float:
        """alpha NLL_r, or alpha KL(p_ref || p) on the retain records if that was chosen; 0 without a retain set."""
        if self.retain is None:
            return 0.0
        return self.alpha * (self.retain.kl() if self.retain_term == "kl" else self.retain.loss())


def count_tokens(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[B] number of tokens that a record's loss is a mean over; 1 where it has a single loss (classifiers, QA)."""
    task = task_of(model)
    if task in _SINGLE_LOSS:
        labels = inputs["labels" if task == CLASSIFICATION else "start_positions"]
        return torch.ones(len(labels), dtype=torch.int64, device=labels.device)
    return (token_labels(task, inputs) != IGNORED_LABEL).sum(1)


def _kl(logits: Tensor, reference: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), reference.to(logits), reduction="sum", log_target=True)


def _draw(seed: Sequence[int], classes: int, count: int) -> Tensor:
    """[count] in [1, classes), so that adding them to a label modulo `classes` gives every other label alike."""
    return torch.from_numpy(np.random.default_rng(seed).integers(1, classes, size=count))
