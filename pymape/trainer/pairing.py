"""Batches that pair forget records with retain records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from pymape.data.batching import collated
from pymape.data.records import ALTERNATIVE, bare_record, check_unique, is_map_style, plain, record_id, tensor_of
from pymape.forward import LABELS, unlabelled
from pymape.trainer.reference_cache import record_digest

__all__ = [
    "PairCollator",
    "PairDataset",
    "PairSampler",
    "alternative_answer",
    "check_set",
    "checked_sets",
    "holds_all",
    "record_ids",
]


class PairDataset(Dataset):
    """Several map-style data sets, indexed by one row number for each.

    Args:
        data: data set by name ("forget", "retain").
        sampler: what draws the row numbers, if it is to be told the epoch.
    """

    def __init__(self, data: Mapping[str, Any], sampler: PairSampler | None = None) -> None:
        self.data = data
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """What accelerate calls where it finds no sampler: several processes that resume within an epoch hide it."""
        if self.sampler is not None:
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return max(len(dataset) for dataset in self.data.values())

    def __getitem__(self, rows: tuple[int, ...]) -> dict[str, tuple[int, Any]]:
        return {side: (row, dataset[row]) for (side, dataset), row in zip(self.data.items(), rows, strict=True)}


class PairSampler(Sampler):
    """Row numbers for `PairDataset`: every set in a random order, the shorter ones repeated in new orders.

    Args:
        lengths: length of every set.
        seed: with the epoch it fixes all orders.
    """

    def __init__(self, lengths: Sequence[int], seed: int) -> None:
        self.lengths = lengths
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """What the Trainer calls before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return max(self.lengths)

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        generator = np.random.default_rng([self.seed, self.epoch])
        orders = []
        for length in self.lengths:
            passes = -(-len(self) // length)
            order = np.concatenate([generator.permutation(length) for _ in range(passes)])
            orders.append(order[: len(self)].tolist())
        return iter(zip(*orders, strict=True))


class PairCollator:
    """Collate each set by itself: {"forget": inputs, "forget_index": row numbers [B], "retain": ...}.

    Args:
        collate: collator of plain records; it never sees their `id`.
        alternative: whether to collate the forget records' alternative answers too, as "alternative": inputs with
            labels, or labels alone where they are other labels of the same inputs.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], alternative: bool = False) -> None:
        self.collate = collate
        self.alternative = alternative

    def __call__(self, pairs: Sequence[Mapping[str, tuple[int, Any]]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for side in pairs[0]:
            records = [pair[side][1] for pair in pairs]
            batch[side] = collated(self.collate, records)
            batch[f"{side}_index"] = torch.tensor([pair[side][0] for pair in pairs])
            if self.alternative and side == "forget":
                batch["alternative"] = self._alternatives(records)
                batch["alternative_index"] = batch["forget_index"]
        return batch

    def _alternatives(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        answers = [alternative_answer(record) for record in records]
        if not answers[0].keys() <= set(LABELS):
            return self.collate(answers)
        # The same inputs: only their labels are needed, in the form that the collator gives them.
        batch = self.collate([bare_record(record) | answer for record, answer in zip(records, answers, strict=True)])
        return {name: batch[name] for name in answers[0]}


def alternative_answer(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record's alternative answer: its fields `alternative_*` without that prefix.

    Raises:
        ValueError: it has none.
    """
    answer = {name.removeprefix(ALTERNATIVE): record[name] for name in record if name.startswith(ALTERNATIVE)}
    if not answer.keys() & set(LABELS):
        raise ValueError(f"forget records must have alternative_labels for this objective, got {sorted(record)}")
    return answer


def checked_sets(forget: Any, retain: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The given sets and their records' ids, after the checks that any objective needs.

    Raises:
        ValueError: a set that is empty or not map-style, or a record id that comes twice.
    """
    data = {side: dataset for side, dataset in (("forget", forget), ("retain", retain)) if dataset is not None}
    for side, dataset in data.items():
        check_set(f"{side}_dataset", dataset)
    known = {side: record_ids(dataset) for side, dataset in data.items()}
    for side, names in known.items():
        check_unique(names or [], name=f"ids of {side}_dataset")
    shared = sorted(set(known.get("forget") or ()) & set(known.get("retain") or ()))
    if shared:
        raise ValueError(
            f"forget_dataset and retain_dataset must not overlap, got {len(shared)} ids in both: {shared[:3]}"
        )
    ids = {side: known[side] or [f"{side} row {row}" for row in range(len(data[side]))] for side in data}
    return data, ids


def check_set(name: str, dataset: Any) -> None:
    """Refuse a set that is empty, not map-style, or not of dicts.

    Raises:
        ValueError: naming it.
    """
    if not is_map_style(dataset):
        raise ValueError(f"{name} must be a map-style data set, got {type(dataset).__name__}")
    if len(dataset) == 0:
        raise ValueError(f"{name} must hold at least one record, got an empty set")
    if not isinstance(dataset[0], Mapping):
        raise ValueError(f"{name} must hold dicts as records, got {type(dataset[0]).__name__}")


def record_ids(dataset: Any) -> list[str] | None:
    """The `id` of every record, or None where the first has none."""
    if hasattr(dataset, "with_format") and "id" in dataset.column_names:  # whether or not its format shows it
        return [str(plain(value)) for value in dataset.with_format(None)["id"]]
    return [record_id(dataset[row]) for row in range(len(dataset))] if "id" in dataset[0] else None


def holds_all(records: Any, *sets: Any) -> bool:
    """Whether every one of some records has the inputs of one in `sets`."""
    missing = {_inputs_digest(records[row]) for row in range(len(records))}
    for dataset in sets:
        for row in range(len(dataset)):
            missing.discard(_inputs_digest(dataset[row]))
            if not missing:
                return True
    return not missing


def _inputs_digest(record: Mapping[str, Any]) -> bytes:
    """What a model reads of a record, to compare it by."""
    return record_digest({name: tensor_of(value) for name, value in unlabelled(bare_record(record)).items()})
