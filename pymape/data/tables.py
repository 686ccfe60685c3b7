"""Local data sets with an id for every record, and the split of such a set into what is forgotten and what is kept."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

__all__ = [
    "Records",
    "Split",
    "load_ids",
    "load_records",
    "read_delimited",
    "read_table",
    "split_forget",
    "validate_labels",
]

_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Records:
    """Rows of a local data set, in file order, each with a unique id."""

    ids: list[str]
    columns: dict[str, list[Any]]
    source: str

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str, argument: str = "column") -> list[Any]:
        """Values of one column; `argument` is how an error names the option that asked for it."""
        if name not in self.columns:
            raise ValueError(f"{argument} must be one of {sorted(self.columns)} in {self.source}, got {name!r}")
        return self.columns[name]

    def select(self, rows: Sequence[int]) -> Records:
        """The given rows, in the given order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Records([self.ids[row] for row in rows], columns, self.source)

    def fingerprint(self) -> str:
        """sha256 over ids and values: two record sets with one fingerprint are the same data in the same order."""
        return _fingerprint([self.ids, self.columns])


@dataclass(frozen=True)
class Split:
    """Row numbers of the forget set and of the retain set, both ascending and disjoint."""

    forget: list[int]
    retain: list[int]


def read_table(path: str | Path, argument: str = "path") -> dict[str, list[Any]]:
    """Read a csv, tsv, json, jsonl or parquet file into columns of equal length.

    Args:
        path: the file; its suffix names the format. A json file holds a list of objects or an object of columns.
        argument: the option's name in error messages.

    Returns:
        Column name to values. csv and tsv values are strings.

    Raises:
        ValueError: missing file, unknown suffix, malformed content or rows without the same columns.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in _FORMATS:
        raise ValueError(f"{argument} must end in one of {', '.join(_FORMATS)}, got {str(path)!r}")
    if not path.is_file():
        raise ValueError(f"{argument} must be an existing file, got {str(path)!r}")
    if suffix == ".parquet":
        return _read_parquet(path, argument)
    try:
        if suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, Mapping):
                return _checked_columns({str(name): values for name, values in content.items()}, path, argument)
            return _columns_of(iter(content), path, argument)
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if suffix == ".jsonl":
                return _columns_of((json.loads(line) for line in stream if line.strip()), path, argument)
            return read_delimited(stream, path, argument)
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{argument} must be readable as {suffix[1:]}, got {str(path)!r}: {error}") from error


def read_delimited(stream: Iterable[str], path: Path, argument: str, *, header: bool = True) -> dict[Any, list[Any]]:
    """Read the lines of a csv or tsv file into columns of equal length.

    Args:
        stream: its lines, with their ends.
        path: of the file; .tsv among its suffixes says that tabs divide the fields.
        argument: the option's name in error messages.
        header: whether the first line names the columns; otherwise they are numbered from 0.

    Returns:
        Column name or number to strings.

    Raises:
        ValueError: malformed content, or rows without the same columns.
    """
    # Tab-separated text is commonly written without quoting: a stray quote there is a character, not a field's border.
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes]
    quoting: Literal[0, 3] = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    reader = csv.reader(stream, delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    try:
        first = next(reader, None)
        if first is None:
            raise ValueError(f"{argument} must start with a header line, got the empty file {str(path)!r}")
        if header and len(set(first)) != len(first):
            raise ValueError(f"{argument} must have distinct column names, got {first} in {str(path)!r}")
        columns: dict[Any, list[Any]] = {name: [] for name in (first if header else range(len(first)))}
        for row in reader if header else chain([first], reader):
            if not row:
                continue
            if len(row) != len(columns):
                raise ValueError(
                    f"{argument} must have {len(columns)} fields in every row, got {len(row)} in line "
                    f"{reader.line_num} of {str(path)!r}"
                )
            for values, value in zip(columns.values(), row, strict=True):
                values.append(value)
    except csv.Error as error:
        kind = "tsv" if tabs else "csv"
        raise ValueError(f"{argument} must be readable as {kind}, got {str(path)!r}: {error}") from error
    return columns


def load_records(path: str | Path, id_column: str = "id", *, argument: str = "data") -> Records:
    """Read a local data set whose `id_column` names every record.

    Args:
        path: csv, tsv, json, jsonl or parquet file.
        id_column: column of unique ids; compared as stripped strings, so 7 and "7" are one id.
        argument: the option's name in error messages.

    Returns:
        The records in file order.

    Raises:
        ValueError: unreadable file, missing id column, no record, or an empty or repeated id.
    """
    columns = read_table(path, argument)
    if id_column not in columns:
        raise ValueError(f"id_column must be one of {sorted(columns)} in {str(path)!r}, got {id_column!r}")
    ids = [_as_id(value) for value in columns[id_column]]
    if not ids:
        raise ValueError(f"{argument} must hold at least one record, got none in {str(path)!r}")
    if "" in ids:
        raise ValueError(
            f"{id_column} must not be empty, got an empty id in data row {ids.index('') + 1} of {str(path)!r}"
        )
    _reject_duplicates(ids, f"{id_column} of {str(path)!r}")
    return Records(ids, columns, str(path))


def load_ids(path: str | Path, id_column: str = "id", *, argument: str = "forget") -> list[str]:
    """Read ids from a text file, one per line, or from the id column of a table.

    Args:
        path: csv, tsv, json, jsonl and parquet are read as tables, anything else as text, one id per line; lines end
            in \\n or \\r\\n.
        id_column: the table's id column.
        argument: the option's name in error messages.

    Returns:
        The ids in file order; blank lines are skipped.

    Raises:
        ValueError: missing file, no id in it, or an id that occurs twice.
    """
    path = Path(path)
    if path.suffix.lower() in _FORMATS:
        columns = read_table(path, argument)
        if id_column not in columns:
            raise ValueError(f"id_column must be one of {sorted(columns)} in {str(path)!r}, got {id_column!r}")
        ids = [_as_id(value) for value in columns[id_column]]
    else:
        if not path.is_file():
            raise ValueError(f"{argument} must be an existing file of ids, got {str(path)!r}")
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:  # no other character ends a line
                ids = [line.strip() for line in stream.read().split("\n")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{argument} must be a text file of ids, got {str(path)!r}: {error}") from error
    ids = [identifier for identifier in ids if identifier]
    if not ids:
        raise ValueError(f"{argument} must name at least one id, got none in {str(path)!r}")
    _reject_duplicates(ids, f"{argument} {str(path)!r}")
    return ids


def split_forget(ids: Sequence[str], forget: Sequence[str], retain: Sequence[str] | None = None) -> Split:
    """Split records into the forget set and the retain set.

    Args:
        ids: unique ids of all records, in row order.
        forget: ids to forget.
        retain: ids to keep; None keeps every record that is not forgotten.

    Returns:
        Row numbers of both sets.

    Raises:
        ValueError: an id that is unknown, repeated or in both sets, or an empty set.
    """
    rows = {identifier: row for row, identifier in enumerate(ids)}
    _reject_duplicates(ids, "ids")
    wanted = {"forget": forget} if retain is None else {"forget": forget, "retain": retain}
    for argument, chosen in wanted.items():
        if not chosen:
            raise ValueError(f"{argument} must name at least one record, got an empty {argument} set")
        _reject_duplicates(chosen, argument)
        missing = [identifier for identifier in chosen if identifier not in rows]
        if missing:
            raise ValueError(
                f"{argument} must name ids of the data, got {_some(missing)} not among {len(rows)} records"
            )
    forgotten = set(forget)
    kept = [identifier for identifier in ids if identifier not in forgotten] if retain is None else list(retain)
    overlap = [identifier for identifier in kept if identifier in forgotten]
    if overlap:
        raise ValueError(f"forget and retain must not overlap, got {_some(overlap)} in both")
    if not kept:
        raise ValueError(f"retain must keep at least one record, got forget ids that name all {len(rows)} records")
    return Split(sorted(rows[identifier] for identifier in forget), sorted(rows[identifier] for identifier in kept))


def validate_labels(
    values: Sequence[Any], num_labels: int, label2id: Mapping[str, int] | None = None, *, argument: str = "labels"
) -> list[int]:
    """Class indices of a label column that holds integers or names.

    Args:
        values: integers, strings of integers, or names known to `label2id`; names only where some of these are integers
            that stand for others, as with classes called 1 to 5.
        num_labels: number of classes C of the model.
        label2id: the model's names for its classes.
        argument: the option's name in error messages.

    Returns:
        Labels in [0, C).

    Raises:
        ValueError: a label that is neither in range nor a known name.
    """
    named = {name: int(index) for name, index in (label2id or {}).items()}
    by_name = any(_integer(name) not in (None, index) for name, index in named.items())
    expected = f"one of {', '.join(named)}" if by_name else f"in [0, {num_labels})"
    labels = []
    for row, value in enumerate(values):
        text = str(value).strip()
        number = _integer(text)
        if by_name and number is not None:
            text = str(number)
        label = named.get(text, None if by_name else number)
        if label is None or not 0 <= label < num_labels:
            raise ValueError(f"{argument} must be {expected}, got {value!r} in data row {row + 1}")
        labels.append(label)
    return labels


def _integer(text: str) -> int | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _read_parquet(path: Path, argument: str) -> dict[str, list[Any]]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{argument} {str(path)!r} needs pyarrow to be read: pip install pyarrow") from error
    try:
        return dict(pyarrow.parquet.read_table(path).to_pydict())
    except pyarrow.lib.ArrowException as error:
        raise ValueError(f"{argument} must be readable as parquet, got {str(path)!r}: {error}") from error


def _columns_of(rows: Iterator[Any], path: Path, argument: str) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(f"{argument} must hold objects, got {type(row).__name__} in row {number} of {str(path)!r}")
        if number == 1:
            columns = {str(name): [] for name in row}
        if row.keys() != columns.keys():
            raise ValueError(
                f"{argument} must have columns {sorted(columns)} in every row, got {sorted(row)} in row {number} "
                f"of {str(path)!r}"
            )
        for name, value in row.items():
            columns[name].append(value)
    return columns


def _checked_columns(columns: dict[str, list[Any]], path: Path, argument: str) -> dict[str, list[Any]]:
    for name, values in columns.items():
        if not isinstance(values, list):  # pandas' to_json gives objects, unless orient="records"
            kind = type(values).__name__
            raise ValueError(f"{argument} must hold lists as columns, got {kind} in column {name!r} of {str(path)!r}")
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{argument} must have columns of one length, got {lengths} in {str(path)!r}")
    return columns


def _as_id(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():  # as tables hold ids where some are missing
        value = int(value)
    return "" if value is None else str(value).strip()


def _reject_duplicates(ids: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    repeated = [identifier for identifier in ids if identifier in seen or seen.add(identifier)]  # type: ignore[func-returns-value]
    if repeated:
        raise ValueError(f"{what} must not repeat an id, got {_some(repeated)} more than once")


def _some(values: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(repr(value) for value in values[:most])
    return shown if len(values) <= most else f"{shown} and {len(values) - most} more"


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
