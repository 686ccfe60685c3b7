"""Records of a local table, encoded for the base model of an S3T system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymape.checkpoint import load_tokenizer
from pymape.data.tables import Records, load_records, read_table, validate_labels
from pymape.s3t.config import S3TConfig
from pymape.s3t.frozen_base import model_class

__all__ = ["Columns", "read_records"]

_IMAGE = "pixel_values"


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns.

    Args:
        text: of the text; image models read `pixel_values` instead.
        text_pair: of a second text.
        label: of the labels of a classifier.
        id: of unique ids; None: the records get none.
        subject: of the person or other subject that a record is about.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    id: str | None = None
    subject: str | None = None


def read_records(path: str | Path, config: S3TConfig, columns: Columns) -> list[dict[str, Any]]:
    """Read a table and encode its rows as the model takes them.

    Args:
        path: csv, tsv, json, jsonl or parquet file.
        config: of the system: names the model and the length of texts.
        columns: where to find what.

    Returns:
        Dicts with what the model takes, `labels`, and `id` and `subject` where there are such columns.

    Raises:
        ValueError: an unreadable file, a missing column, or a label that the model does not know.
    """
    if columns.id is None:
        table = Records([], read_table(path, "data"), str(path))
    else:
        table = load_records(path, columns.id)
    kind, settings = model_class(config.model, config.labels)
    fields: dict[str, Sequence[Any]]
    if kind.__name__.endswith("ForImageClassification"):
        fields = {_IMAGE: table.column(_IMAGE)}
    else:
        tokenizer = load_tokenizer(config.model)
        texts = _texts(table, columns.text, "text_column")
        if not texts:  # `load_records` says so where there are ids
            raise ValueError(f"data must hold at least one record, got none in {str(path)!r}")
        pairs = None if columns.text_pair is None else _texts(table, columns.text_pair, "text_pair_column")
        fields = dict(tokenizer(texts, pairs, truncation=True, max_length=config.stage.max_length))
    if kind.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        fields["labels"] = fields["input_ids"]
    else:
        values, name = table.column(columns.label, "label_column"), f"{columns.label} of {str(path)!r}"
        fields["labels"] = validate_labels(values, settings.num_labels, settings.label2id, argument=name)
    if columns.id is not None:
        fields["id"] = table.column(columns.id)
    if columns.subject is not None:
        fields["subject"] = table.column(columns.subject, "subject_column")
    return [dict(zip(fields, row, strict=True)) for row in zip(*fields.values(), strict=True)]


def _texts(table: Records, column: str, argument: str) -> list[str]:
    return ["" if value is None else str(value) for value in table.column(column, argument)]
