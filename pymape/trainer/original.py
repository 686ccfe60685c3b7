"""What objectives need of the model as it was before unlearning, without a second model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymape.forward import eval_mode
from pymape.losses import CLASSIFICATION, task_of
from pymape.objectives.match import matched_losses
from pymape.objectives.step import UnlearnBatch
from pymape.partial import PartialParameters
from pymape.trainer.reference_cache import ReferenceCache, record_digest, stack_rows

__all__ = ["OriginalModel"]


_LOOKED_AT_TWICE = 8  # records of a set: random flips of images escape in 1 of 256 runs


class OriginalModel:
    """Reference values of the original model: stored for every record where they are small, computed at each step else.

    Losses and the log-probabilities of classifiers are computed once. Tokens x vocabulary, and activations, would be
    too much to store: for those the same model runs with its original parameters swapped in.

    Args:
        model: the model that is to be trained.
        partial: its trained parameters.
        needs: as in `Objective.reference`.
        alternative: whether "nll" is needed of alternative answers too.
        layer: of the activations.
    """

    def __init__(
        self, model: nn.Module, partial: PartialParameters, needs: Iterable[str], alternative: bool, layer: int | None
    ) -> None:
        self.model, self.partial = model, partial
        self.alternative, self.layer = alternative, layer
        self._asked = set(needs)  # what is asked step by step, once `look_up` has taken out what it stores
        self._known: dict[str, Tensor] = {}
        self._parameters: list[Tensor] | None = None

    def look_up(
        self,
        data: Mapping[str, Any],
        batches: Callable[..., Iterator[UnlearnBatch]],
        cache: ReferenceCache | None,
        write: bool,
    ) -> None:
        """Compute what is stored, and note the original parameters if the model is to be asked later; once.

        Args:
            data: the forget and the retain set, and the unseen one where its losses are needed.
            batches: side, rows, batch size (optional) -> those records in order, with their alternative answers where
                they are needed.
            cache: where values may be known already, and are kept.
            write: whether to add new values to the cache.

        Raises:
            ValueError: records whose inputs differ from one time to the next (random augmentation of the data).
        """
        if self._known or self._parameters is not None:
            return

        def digests(side: str, rows: Sequence[int]) -> list[bytes]:
            # One by one, as a record's padding depends on the others of its batch.
            return [_digest(batch) for batch in batches(side, rows, 1)]

        def of_every_record(kind: str, side: str, read: Callable[[Any], Tensor]) -> Tensor:
            first = range(min(_LOOKED_AT_TWICE, len(data[side])))
            if digests(side, first) != digests(side, first):
                raise ValueError(
                    f"inputs of {side} records must stay the same, got others the second time: values of the original "
                    "model, which are computed once, cannot serve randomly augmented data"
                )

            def compute(rows: Sequence[int]) -> Tensor:
                return stack_rows([row for batch in batches(side, rows) for row in read(batch).cpu()])

            rows = range(len(data[side]))
            if cache is None:
                return compute(rows)
            return cache.values(kind, digests(side, rows), compute, write=write)

        with torch.no_grad(), eval_mode(self.model):
            if "nll" in self._asked and self.alternative:
                pairs = of_every_record("preference", "forget", _both_losses)
                self._known["forget"], self._known["alternative"] = pairs.unbind(1)
            elif "nll" in self._asked:
                self._known["forget"] = of_every_record("nll", "forget", UnlearnBatch.nll)
            self._asked.discard("nll")
            for need, target, kind, read in _UNSEEN:
                if need in self._asked:
                    own, unseen = (of_every_record(kind, side, read) for side in ("forget", "unseen"))
                    self._known[target] = matched_losses(own, unseen)
                    self._asked.discard(need)
            if "log_probs" in self._asked and task_of(self.model) == CLASSIFICATION:
                self._known["retain"] = of_every_record("log_probs", "retain", UnlearnBatch.log_probs)
                self._asked.discard("log_probs")
        if self._asked:
            self._parameters = self.partial.snapshot()

    def of_forget(self, index: Tensor, side: str = "forget") -> dict[str, Tensor]:
        """Options of `UnlearnBatch` for forget records (or their alternative answers), by row [B]."""
        found = {"reference_nll": self._known[side][index]} if side in self._known else {}
        if side == "forget":
            found |= {name: self._known[name][index] for _, name, _, _ in _UNSEEN if name in self._known}
        return found

    def of_retain(
        self, index: Tensor, inputs: Mapping[str, Tensor], call: Callable[..., Any] | None = None
    ) -> dict[str, Tensor]:
        """Options of `UnlearnBatch` for retain records; only before the forward passes of a step."""
        found = {"reference_log_probs": self._known["retain"][index]} if "retain" in self._known else {}
        if self._parameters is None:
            return found
        with self.partial.swapped(self._parameters), torch.no_grad(), eval_mode(self.model):
            batch = UnlearnBatch(self.model, inputs, call=call)
            if "activations" in self._asked:
                found["reference_activations"] = batch.activations(self.layer or 0)
            if "log_probs" in self._asked:
                found["reference_log_probs"] = batch.log_probs()
        return found


def _digest(batch: UnlearnBatch) -> bytes:
    """The digest of a record from a batch of its own."""
    return record_digest(batch.inputs, *([] if batch.alternative is None else [batch.alternative.inputs]))


def _by_record(batch: UnlearnBatch) -> Tensor:
    """[B, W] losses of each record's labelled tokens."""
    return stack_rows(batch.token_losses().split(batch.counts.tolist()))


def _both_losses(batch: UnlearnBatch) -> Tensor:
    """[B, 2] summed NLL of the records' own answers and of the alternative ones."""
    return torch.stack([batch.nll(), batch.required_alternative("preference").nll()], 1)


# What may be needed of unseen records: its name, that of what `UnlearnBatch` is given, and what is read of each record.
_UNSEEN: list[tuple[str, str, str, Callable[[UnlearnBatch], Tensor]]] = [
    ("unseen", "targets", "loss", UnlearnBatch.losses),
    ("unseen_tokens", "token_targets", "token_losses", _by_record),
]
