"""Hidden states that enter a stage's lowest layer: computed once for every record, with the bits of the plain pass."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pymape.frozen_prefix import FrozenPrefix
from pymape.prefix_cache import PrefixCache
from pymape.s3t.adapters import SlicedAdapters

__all__ = ["MEMORY", "StageStates", "full_batch"]

MEMORY = 2**30  # bytes of states that a stage may hold in memory; if there are more, every epoch reads the files


class StageStates:
    """The forward pass of a stage, from cached states of the frozen layers below it.

    Nothing is ever computed at another batch shape than that of training, since bits depend on it: of a batch of
    records some of which have no states yet, all are computed. On its way up such a batch leaves its states at the
    entry of every deeper stage too, which will ask for them next.

    Args:
        adapters: at the depth of the stage, whose lowest layer is not layer 0.
        folder: of a `PrefixCache`; whatever it holds or loses, results stay the same.
        records: the name of every record.
        inputs: what the model is given for them, [N, ...] tensors, and options that are the same for all.
        batch_size: of every pass.
        facts: what the bits of the states depend on beside the model and the inputs: states computed under other facts
            are not used.
        memory: bytes of states to hold at most.
    """

    def __init__(
        self,
        adapters: SlicedAdapters,
        folder: str,
        records: Sequence[str],
        inputs: dict[str, Any],
        batch_size: int,
        facts: str,
        memory: int = MEMORY,
    ) -> None:
        self._base, self._records, self._inputs, self._memory = adapters.base, records, inputs, memory
        entries = [adapters.first_layer(stage) for stage in range(adapters.slices, adapters.depth - 1, -1)]
        # From the lowest entry to the stage's own.
        self._levels = [_Level(adapters.base, entry, _Strict(folder, facts)) for entry in entries if entry > 0]
        self._own = self._levels[-1]
        self._held: Tensor | None = None
        for rows in torch.arange(len(records)).split(batch_size):
            states = self._find(*self._batch(full_batch(rows, batch_size)))
            self._hold(rows, states[: len(rows)])
        self._checked = False

    def run(self, rows: Tensor) -> Any:
        """The model's outputs for some records, [B] rows.

        Raises:
            ValueError: cached states have other bits than the plain pass; the first batch is tested.
        """
        records, inputs = self._batch(rows)
        if not self._checked:
            self._check(rows, records, inputs)
        self._own.given = None if self._held is None else self._held[rows]
        try:
            return self._own.run(records, inputs)
        except _MissingError:  # not held, and the files are gone
            return self._base(**inputs)
        finally:
            self._own.given = None

    def _batch(self, rows: Tensor) -> tuple[list[str], dict[str, Any]]:
        """Names and inputs of some records."""
        inputs = {name: value[rows] if isinstance(value, Tensor) else value for name, value in self._inputs.items()}
        return [self._records[row] for row in rows.tolist()], inputs

    def _find(self, records: list[str], inputs: dict[str, Any]) -> Tensor:
        """The states of a batch, stored or computed."""
        with contextlib.suppress(_MissingError):
            return self._own.states(records, inputs)
        states = self._levels[0].compute(records, inputs)
        for lower, upper in zip(self._levels, self._levels[1:], strict=False):
            lower.given = states
            states = lower.run(records, inputs, lambda upper=upper, **same: upper.compute(records, same))
            lower.given = None
        return states

    def _hold(self, rows: Tensor, states: Tensor) -> None:
        if self._held is None and states[0].nbytes * len(self._records) <= self._memory:
            self._held = states.new_empty((len(self._records), *states.shape[1:]))
        if self._held is not None:
            self._held[rows] = states

    def _check(self, rows: Tensor, records: list[str], inputs: dict[str, Any]) -> None:
        """Compare the states of a batch with those of the plain pass."""
        self._checked = True
        try:
            found = self._own.states(records, inputs) if self._held is None else self._held[rows]
        except _MissingError:
            return
        if not torch.equal(found, self._own.compute(records, inputs, store=False)):
            raise ValueError(
                "cache must be None for this model on this machine, whose kernels round a record by its place in the "
                "batch, got cached states with other bits than the plain pass"
            )


def full_batch(rows: Tensor, size: int) -> Tensor:
    """Fill rows up to a whole batch by repeating them."""
    return rows[torch.arange(size) % len(rows)]


class _Level(FrozenPrefix):
    """The frozen layers below the entry of a stage; `given` states are used as they are."""

    given: Tensor | None = None
    cache: _Strict

    def states(self, records: Sequence[str], inputs: Mapping[str, Any]) -> Tensor:
        return super().states(records, inputs) if self.given is None else self.given

    def compute(self, records: Sequence[str], inputs: Mapping[str, Any], *, store: bool = True) -> Tensor:
        """Compute the states of all rows, whatever is stored."""
        with self.cache.bypassed(store):
            return super().states(records, inputs)


class _MissingError(Exception):
    """A record has no states on disk."""


class _Strict(PrefixCache):
    """A cache on disk. What it does not have, `FrozenPrefix` must not compute by itself, at a batch size of its own."""

    def __init__(self, folder: str, facts: str) -> None:
        super().__init__(folder)
        self._facts = facts
        self._bypassed, self._storing = False, True

    def get(self, prefix: str, record: str, inputs: str) -> Tensor | None:
        if self._bypassed:
            return None
        states = super().get(self._key(prefix), record, inputs)
        if states is None:
            raise _MissingError(record)
        return states

    def put(self, prefix: str, record: str, inputs: str, states: Tensor) -> bool:
        with contextlib.suppress(OSError):  # a full disk costs time only
            return self._storing and super().put(self._key(prefix), record, inputs, states)
        return False

    def _key(self, prefix: str) -> str:
        return hashlib.sha256(f"{prefix} {self._facts}".encode()).hexdigest()

    @contextlib.contextmanager
    def bypassed(self, store: bool) -> Iterator[None]:
        """Read nothing, and write only with `store`."""
        self._bypassed, self._storing = True, store
        try:
            yield
        finally:
            self._bypassed, self._storing = False, True
