"""What a record is: a dict of what the model sees, perhaps with an id and an alternative answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import IterableDataset

__all__ = [
    "ALTERNATIVE",
    "bare_record",
    "check_unique",
    "id_list",
    "is_map_style",
    "is_numeric",
    "listed",
    "plain",
    "record_id",
    "sample_of",
    "tensor_of",
]

# Fields of a record that hold another answer to the same question: `alternative_input_ids`, `alternative_labels`.
ALTERNATIVE = "alternative_"


def bare_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is to see of a record: not its `id`, nor an alternative answer."""
    return {name: value for name, value in record.items() if name != "id" and not name.startswith(ALTERNATIVE)}


def record_id(record: Mapping[str, Any]) -> str:
    """The `id` of a record, as text.

    Raises:
        ValueError: it has none.
    """
    if "id" not in record:
        raise ValueError(f"records must have an id, all or none of them, got one with {sorted(record)}")
    return str(plain(record["id"]))


def listed(values: Iterable[Any], name: str) -> list[Any]:
    """A list of what is given. A single text is refused: it would be read letter by letter."""
    if isinstance(values, str | bytes):
        raise ValueError(f"{name} must be a list, got the single {type(values).__name__} {values!r}")
    return list(values)


def id_list(ids: Iterable[Any], name: str) -> list[str]:
    """Ids as texts; a single text is refused."""
    return [str(identifier).strip() for identifier in listed(ids, name)]


def plain(value: Any) -> Any:
    """The Python value of a tensor, array or number of numpy without dimensions; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def tensor_of(value: Any) -> Any:
    """Numbers as a tensor; anything else as it is."""
    return torch.as_tensor(value) if is_numeric(value) else value


def is_map_style(data: Any) -> bool:
    """Whether a data set has a length and can be indexed."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def check_unique(ids: Sequence[str], taken: set[str] | None = None, *, name: str = "ids") -> None:
    """Refuse ids that repeat each other or those in `taken`, and add them to it.

    Raises:
        ValueError: naming what they are, and those that repeat.
    """
    taken = set() if taken is None else taken
    twice: list[str] = []
    for one in ids:
        (twice.append if one in taken else taken.add)(one)
    if twice:
        raise ValueError(f"{name} must be unique, got {sample_of(twice)} more than once")


def sample_of(ids: Sequence[str]) -> str:
    """The first few of some ids, for a message."""
    return f"{list(ids[:5])}" + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def is_numeric(value: Any) -> bool:
    """Whether a value is a number, or a tensor, array or list of numbers; a list is judged by its first entry."""
    while isinstance(value, list | tuple):
        if not value:
            return False
        value = value[0]
    return not isinstance(value, str | bytes) and (hasattr(value, "dtype") or isinstance(value, int | float))
