"""Texts, or pairs of texts, with a label, in csv and tsv files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pymape.checkpoint import load_tokenizer
from pymape.data.tables import read_delimited
from pymape.experiments.tasks.base import VALIDATION, Record, Split, Task, check_max_length, digest, read_bytes

__all__ = ["make_table"]


def make_table(
    data: str,
    model: str,
    train: str = "train.tsv",
    test: str = "dev.tsv",
    text: str | int = "text",
    pair: str | int | None = None,
    label: str | int = "label",
    header: bool = True,
    max_length: int = 64,
    records: int | None = None,
    test_records: int | None = None,
) -> Task:
    """Texts, or pairs of texts, with a label, and a pretrained encoder that gets a new task head.

    Args:
        data: folder of the files.
        model: folder of the encoder and its tokenizer.
        train: csv or tsv file (gzipped with .gz); a fifth of it, drawn by the seed, is for validation.
        test: the same for the test.
        text: name of the column, or its number where there is no header.
        pair: column of the second text.
        label: column of the label; names are numbered in alphabetical order.
        header: whether the first line names the columns.
        max_length: tokens to cut texts to.
        records: draw so many of the training file, by the seed, before anything else; None takes all.
        test_records: the same of the test file.

    Raises:
        ValueError: files or rows that cannot be used, or a `max_length` beyond the model's learned positions.
    """
    from sklearn.model_selection import train_test_split

    tokenizer = load_tokenizer(model)
    check_max_length(AutoModelForSequenceClassification, model, max_length)
    tables = [_read(Path(data) / name, header) for name in (train, test)]
    columns = [name for name in (text, pair, label) if name is not None]
    for name, table in zip((train, test), tables, strict=True):
        missing = [column for column in columns if column not in table]
        if missing:
            raise ValueError(f"{name} must have the columns {columns}, got none named {missing[0]!r}")
        if not table[label]:
            raise ValueError(f"{name} must hold at least one row, got none")
        if "" in table[label]:
            raise ValueError(f"{name} must have a label in every row, got none in row {table[label].index('') + 1}")
    names = sorted(set(tables[0][label]))
    if len(names) < 2:
        raise ValueError(f"{train} must hold at least two labels, got {', '.join(names)!r} only")
    places = {name: place for place, name in enumerate(names)}

    def read(kind: str, table: Any) -> list[Record]:
        unknown = sorted(set(table[label]) - set(names))
        if unknown:
            raise ValueError(f"{kind} labels must be among {names}, got {unknown[0]!r}")
        second = None if pair is None else list(table[pair])
        encoded = tokenizer(list(table[text]), second, truncation=True, max_length=max_length)
        return [
            {"id": f"{kind}-{row:06}", **{key: encoded[key][row] for key in encoded}, "labels": places[name]}
            for row, name in enumerate(table[label])
        ]

    source, judged = read("train", tables[0]), read("test", tables[1])

    def split(seed: int) -> Split:
        def divide(rows: list[Record], size: int | float) -> tuple[list[Record], list[Record]]:
            classes = [row["labels"] for row in rows]
            try:
                return train_test_split(rows, test_size=size, random_state=seed, stratify=classes)
            except ValueError as error:
                counts = {name: classes.count(place) for name, place in places.items()}
                raise ValueError(f"records must suffice to be divided label by label, got {counts}: {error}") from error

        def drawn(rows: list[Record], count: int | None) -> list[Record]:
            return rows if count is None or count >= len(rows) else divide(rows, len(rows) - count)[0]

        return Split(*divide(drawn(source, records), VALIDATION), drawn(judged, test_records))

    def start(seed: int) -> PreTrainedModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            # The head of a classifier of other classes gives way to a new one too.
            return AutoModelForSequenceClassification.from_pretrained(
                model, local_files_only=True, num_labels=len(names), ignore_mismatched_sizes=True
            )

    files = [Path(data) / train, Path(data) / test, *sorted(path for path in Path(model).iterdir() if path.is_file())]
    return Task(len(names), digest(*(path.read_bytes() for path in files)), split, start)


def _read(path: Path, header: bool) -> dict[Any, list[str]]:
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"task.data must hold text files, got {str(path)!r}: {error}") from error
    return read_delimited(io.StringIO(text, newline=""), path, "task.data", header=header)
