"""Batches of records of similar length, so that padding costs little, with the place of every record kept."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    default_collate,
)

from pymape.data.records import bare_record, is_map_style, is_numeric, record_id
from pymape.losses import IGNORED_LABEL

__all__ = [
    "LengthBucketSampler",
    "PaddingCollator",
    "RecordBatches",
    "collated",
    "record_lengths",
]

_PADDING = {"labels": IGNORED_LABEL, "special_tokens_mask": 1}
_LABELS = ("labels", "label", "label_ids")  # the first that a record has counts, as in transformers' own collator
_DIMENSIONS = {"input_ids": 1, "pixel_values": 3}  # of one record


class LengthBucketSampler(Sampler[list[int]]):
    """Batches of positions in order of falling length; records of one length keep their order.

    The longest batch comes first, so that a shortage of memory shows at once and later batches reuse its buffers.

    Args:
        lengths: [N] number of tokens of each record.
        batch_size: records per batch; the last batch may be smaller.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int) -> None:
        order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
        self.batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class PaddingCollator:
    """Stacks records into a batch and pads what has one value per token on the right.

    Unlike `DataCollatorWithPadding` it needs no tokenizer and pads token labels too (with -100). Columns that are not
    numbers (texts) are left out, `label` and `label_ids` become `labels` where there are none of that name.

    Args:
        pad_token_id: fills `input_ids`; the model's own padding token where it has one.
        fields: what the model takes beside labels, so that other columns are left out too; None: every column.

    Raises:
        ValueError: a record that lacks numbers which another has, is a batch of its own, or has a field of another
            shape than the others or than its tokens.
    """

    def __init__(self, pad_token_id: int = 0, fields: Container[str] | None = None) -> None:
        self.padding, self.fields = {"input_ids": pad_token_id, **_PADDING}, fields

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        fields = [(name, value) for record in records for name, value in record.items()]
        names = dict.fromkeys(name for name, value in fields if name == "input_ids" or is_numeric(value))
        inputs = [name for name in names if name not in _LABELS and (self.fields is None or name in self.fields)]
        columns = {name: _column(name, records) for name in inputs}
        label = next((name for name in _LABELS if name in names), None)
        if label is not None:
            columns["labels"] = _column(label, records)
        lengths = [len(value) for value in columns.get("input_ids", ())]
        if lengths and "attention_mask" not in columns and len(set(lengths)) > 1:
            columns["attention_mask"] = [torch.ones(length, dtype=torch.long) for length in lengths]
        return {name: self._joined(name, values, lengths) for name, values in columns.items()}

    def _joined(self, name: str, values: list[Tensor], lengths: list[int]) -> Tensor:
        """A column of the batch, padded where it has one value for each of the records' `lengths` tokens."""
        shapes, tokens = [tuple(value.shape) for value in values], [(length,) for length in lengths]
        if shapes == tokens:
            fill = self.padding.get(name, 0)
            return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        by_token = any(shape == own for shape, own in zip(shapes, tokens, strict=False))
        expected = tokens if by_token and len(set(shapes)) > 1 else shapes[:1] * len(shapes)
        for place, (shape, own) in enumerate(zip(shapes, expected, strict=True)):
            if shape != own:
                raise _UnfitRecord(f"{name} must have shape {own}, got {shape}", place)
        return torch.stack(values)


class RecordBatches:
    """Iterates over a data set batch by batch and tells which records each batch holds.

    Args:
        data: map-style data set of dicts, or a DataLoader over one. Of a DataLoader with an ordinary sampler the batch
            size, the collate function and the workers are kept and the order is free; a batch sampler of the user's
            own is followed.
        batch_size: records per batch (a DataLoader brings its own).
        collate_fn: list of records -> dict of tensors; default `PaddingCollator` (or the DataLoader's own).
        bucket: group records of similar length where `input_ids` vary in length.
        pad_token_id: padding token of the default collate function.
        fields: as `PaddingCollator`, of the default collate function.
        share: (n, of): iterate over every `of`-th batch from the n-th on, for processes that divide the work.

    Attributes:
        data: the data set itself.
        positions: [N] int64 places in `data` of the records, rising: row n of a result is record positions[n].
        shares: the rows of every share.

    Iterating yields `(rows [B], names [B], batch)`: names are the records' `id` fields, or their places in `data`.

    Raises:
        ValueError: `data` is empty, cannot be indexed, or a sampler draws a record twice.
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int = 32,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        bucket: bool = True,
        pad_token_id: int = 0,
        fields: Container[str] | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        records: Any = data
        own_batches: list[list[int]] | None = None
        options: dict[str, Any] = {}
        if isinstance(data, DataLoader):
            records, options = data.dataset, {"num_workers": data.num_workers, "pin_memory": data.pin_memory}
            if collate_fn is None and data.collate_fn is not default_collate:
                collate_fn = data.collate_fn
        if not is_map_style(records):
            raise ValueError(f"data must be a map-style data set with a length, got {type(records).__name__}")
        if len(records) == 0:
            raise ValueError("data must hold at least one record, got an empty data set")
        places = list(range(len(records)))
        if isinstance(data, DataLoader):
            if type(data.batch_sampler) is BatchSampler:
                batch_size = data.batch_sampler.batch_size
            elif data.batch_sampler is not None:
                own_batches = [list(batch) for batch in data.batch_sampler]
                places = sorted(place for batch in own_batches for place in batch)
            if own_batches is None and not _takes_all(data.sampler, len(records)):
                places = sorted(data.sampler)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if len(set(places)) != len(places):
            raise ValueError(f"data must give every record once, got {len(places) - len(set(places))} repetitions")
        if own_batches is None:
            # With equal lengths the sampler keeps the order of the data set.
            lengths = (record_lengths(records, places) if bucket else None) or [0] * len(places)
            own_batches = [[places[index] for index in batch] for batch in LengthBucketSampler(lengths, batch_size)]
        self.data = records
        self.positions = places
        self._rows = {place: row for row, place in enumerate(places)}
        self._batches = own_batches[share[0] :: share[1]]
        self.shares = [
            [self._rows[place] for batch in own_batches[number :: share[1]] for place in batch]
            for number in range(share[1])
        ]
        collate = self._collate = _WithIds(collate_fn or PaddingCollator(pad_token_id, fields))
        # A generator of its own: a DataLoader draws a seed from the global one, which is the user's.
        generator = torch.Generator()
        self._loader: DataLoader[Any] = DataLoader(
            records, batch_sampler=self._batches, collate_fn=collate, generator=generator, **options
        )

    def __len__(self) -> int:
        return len(self._batches)

    def alone(self, row: int) -> Any:
        """The batch that the record of one row of the results makes by itself."""
        return self._collate([self.data[self.positions[row]]])[1]

    def __iter__(self) -> Iterator[tuple[Tensor, list[str], Any]]:
        for places, (ids, batch) in zip(self._batches, self._loader, strict=True):
            names = [str(place) for place in places] if ids is None else ids
            yield torch.tensor([self._rows[place] for place in places]), names, batch


def record_lengths(data: Any, positions: Sequence[int] | None = None) -> list[int] | None:
    """Number of tokens of each record, read from `input_ids`.

    Args:
        data: map-style data set of dicts; of a `datasets.Dataset` only the one column is read.
        positions: places to look at; default all.

    Returns:
        [N] lengths, or None where records have no `input_ids`.
    """
    places = range(len(data)) if positions is None else positions
    first = data[places[0]]
    if not isinstance(first, Mapping):
        raise ValueError(f"data must give dicts as records, got {type(first).__name__}")
    if "input_ids" not in first:
        return None
    columns = data.select_columns(["input_ids"]) if hasattr(data, "select_columns") else data
    return [_length(columns[place], place) for place in places]


def collated(collate: Callable[[list[Any]], Any], records: Sequence[Mapping[str, Any]]) -> Any:
    """A batch of what the model is to see of records.

    Raises:
        ValueError: as `collate` does, with the id of a record that does not fit.
    """
    try:
        return collate([bare_record(record) for record in records])
    except _UnfitRecord as error:
        if "id" not in records[error.place]:
            raise
        raise ValueError(f"{error.what} for id {record_id(records[error.place])!r}") from None


class _UnfitRecord(ValueError):
    """What is wrong with the record at a place of a batch."""

    def __init__(self, what: str, place: int) -> None:
        super().__init__(f"{what} for record {place} of the batch")
        self.what, self.place = what, place


class _WithIds:
    """Takes the `id` field off the records before they are collated (a class, so that worker processes can load it)."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, records: list[Mapping[str, Any]]) -> tuple[list[str] | None, Any]:
        if not isinstance(records[0], Mapping):
            raise ValueError(f"data must give dicts as records, got {type(records[0]).__name__}")
        ids = [record_id(record) for record in records] if any("id" in record for record in records) else None
        return ids, collated(self.collate_fn, records)


def _takes_all(sampler: Any, count: int) -> bool:
    """Whether a sampler draws every record once, known without drawing from its generator."""
    if isinstance(sampler, RandomSampler):
        return not sampler.replacement and sampler.num_samples == count
    return type(sampler) is SequentialSampler


def _column(name: str, records: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """A field of every record, as tensors."""
    values = []
    for place, record in enumerate(records):
        try:
            value = torch.as_tensor(record[name]) if is_numeric(record[name]) else None
        except (KeyError, TypeError, ValueError, RuntimeError):
            value = None
        if value is None or value.numel() == 0:
            got = reprlib.repr(record[name]) if name in record else "none"
            raise _UnfitRecord(f"{name} must be numbers in every record, got {got}", place)
        if value.ndim > _DIMENSIONS.get(name, value.ndim):
            shape = tuple(value.shape)
            what = f"records must be single, without a batch dimension, got {name} of shape {shape}"
            raise _UnfitRecord(what, place)
        values.append(value)
    return values


def _length(record: Mapping[str, Any], place: int) -> int:
    tokens: Any = record.get("input_ids")
    if not hasattr(tokens, "__len__"):
        name = record_id(record) if "id" in record else str(place)
        raise ValueError(f"input_ids must be a list of tokens in every record, got {tokens!r} for id {name!r}")
    return len(tokens)
