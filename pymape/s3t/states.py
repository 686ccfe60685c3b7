"""Hidden states that enter a stage's lowest layer: computed once for every record, with the bits of the plain pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pymape.frozen_prefix import FrozenPrefix
from pymape.prefix_cache import PrefixCache
from pymape.s3t.adapters import SlicedAdapters

__all__ = ["MEMORY", "StageStates", "full_batch"]

MEMORY = 2**30  # bytes of states that a stage keeps in memory; those beyond are read from the files in every epoch


class StageStates:
    """The forward pass of a stage, from cached states of the frozen layers below it.

    Nothing is ever computed at another batch shape than that of training, since bits depend on it: records that have no
    states yet are put into batches of their own. On its way up such a batch leaves its states at the entry of every
    deeper stage too, which will ask for them next.

    Args:
        adapters: at the depth of the stage.
        folder: of a `PrefixCache`; whatever it holds or loses, results stay the same.
        records: the name of every record.
        inputs: what the model is given for them, [N, ...] tensors, and options that are the same for all.
        batch_size: of every pass.
        memory: bytes of states to keep in memory.
    """

    def __init__(
        self,
        adapters: SlicedAdapters,
        folder: str,
        records: Sequence[str],
        inputs: dict[str, Any],
        batch_size: int,
        memory: int = MEMORY,
    ) -> None:
        self._base, self._records, self._inputs, self._batch_size = adapters.base, records, inputs, batch_size
        self._checked = False
        entries = [adapters.first_layer(stage) for stage in range(adapters.slices, adapters.depth - 1, -1)]
        entries = [entry for entry in entries if entry > 0]  # from the lowest to the stage's own
        # Those of deeper stages are kept in memory for one batch at a time.
        self._caches = [_Kept(folder, memory if entry == entries[-1] else None) for entry in entries]
        self._levels = [FrozenPrefix(adapters.base, *level) for level in zip(entries, self._caches, strict=True)]

    def prepare(self) -> None:
        """Compute the states of all records that have none yet."""
        missing: list[int] = []
        for batch in torch.arange(len(self._records)).split(self._batch_size):
            if not self._has(batch):  # one look is enough where nothing is missing
                missing += [int(row) for row in batch if not self._has(row[None])]
        for start in range(0, len(missing), self._batch_size):
            records, inputs = self.batch(
                full_batch(torch.tensor(missing[start : start + self._batch_size]), self._batch_size)
            )
            with self._caches[0].computing():
                self._levels[0].states(records, inputs)
            for place in range(1, len(self._levels)):
                upper = partial(self._levels[place].states, records)
                with self._caches[place].computing():
                    self._levels[place - 1].run(records, inputs, lambda upper=upper, **same: upper(same))
            for cache in self._caches[:-1]:
                cache.forget()

    def run(self, rows: Tensor) -> Any:
        """The model's outputs for some records, [B] rows.

        Raises:
            ValueError: cached states have other bits than the plain pass, which the first batch is tested for.
        """
        records, inputs = self.batch(rows)
        if not self._checked:
            self._check(records, inputs)
        try:
            return self._levels[-1].run(records, inputs)
        except _MissingError:  # too many for the memory, and the files are gone
            return self._base(**inputs)

    def batch(self, rows: Tensor) -> tuple[list[str], dict[str, Any]]:
        """Names and inputs of some records."""
        inputs = {name: value[rows] if isinstance(value, Tensor) else value for name, value in self._inputs.items()}
        return [self._records[row] for row in rows.tolist()], inputs

    def _check(self, records: list[str], inputs: dict[str, Any]) -> None:
        """Compare cached states with those of the plain pass."""
        self._checked = True
        try:
            kept = self._levels[-1].states(records, inputs)
        except _MissingError:
            return
        with self._caches[-1].computing(store=False):
            plain = self._levels[-1].states(records, inputs)
        if not torch.equal(kept, plain):
            raise ValueError(
                "cache must be None for this model on this machine, whose kernels round a record by its place in the "
                "batch, got cached states with other bits than the plain pass"
            )

    def _has(self, rows: Tensor) -> bool:
        try:
            self._levels[-1].states(*self.batch(rows))
        except _MissingError:
            return False
        return True


def full_batch(rows: Tensor, size: int) -> Tensor:
    """Fill rows up to a whole batch by repeating them."""
    return rows[torch.arange(size) % len(rows)]


class _MissingError(Exception):
    """A record's states are neither in memory nor on disk."""


class _Kept(PrefixCache):
    """A cache whose states are held in memory too; what it does not have, `FrozenPrefix` must not compute by itself.

    Args:
        folder: of the cache.
        memory: bytes to hold; None: no limit.
    """

    def __init__(self, folder: str, memory: int | None) -> None:
        super().__init__(folder)
        self._memory = memory
        self._computing, self._storing = False, True
        self.forget()

    def get(self, prefix: str, record: str, inputs: str) -> Tensor | None:
        if self._computing:
            return None
        states = self._states.get((record, inputs))
        if states is None:
            states = super().get(prefix, record, inputs)
            if states is None:
                raise _MissingError(record)
            self._keep(record, inputs, states)
        return states

    def put(self, prefix: str, record: str, inputs: str, states: Tensor) -> bool:
        if not self._storing:
            return False
        self._keep(record, inputs, states)
        with contextlib.suppress(OSError):  # a full disk costs time only
            return super().put(prefix, record, inputs, states)
        return False

    def forget(self) -> None:
        """Let go of what is in memory."""
        self._states: dict[tuple[str, str], Tensor] = {}
        self._used = 0

    @contextlib.contextmanager
    def computing(self, *, store: bool = True) -> Iterator[None]:
        """Have everything computed, whatever is stored."""
        self._computing, self._storing = True, store
        try:
            yield
        finally:
            self._computing, self._storing = False, True

    def _keep(self, record: str, inputs: str, states: Tensor) -> None:
        if (record, inputs) in self._states or (self._memory is not None and self._used + states.nbytes > self._memory):
            return
        # A copy: what was read lies in a file that may be erased, what was computed is a part of its batch.
        self._states[record, inputs] = states.clone()
        self._used += states.nbytes
