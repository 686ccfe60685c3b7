"""From the rows of a table to the records of one model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from pymape.checkpoint import CLASSIFIER, head_task
from pymape.config import UnlearnConfig
from pymape.data.batching import PaddingCollator
from pymape.data.positions import most_tokens
from pymape.data.records import ALTERNATIVE
from pymape.data.tables import Records, read_table, validate_labels

__all__ = ["Encoder"]

Record = dict[str, Any]


class Encoder:
    """Turns table rows into the records of one model: tokens and labels.

    Raises:
        ValueError: `data.max_length` beyond the model's learned positions; of a call, rows that cannot be used.
    """

    def __init__(self, config: UnlearnConfig, model: PreTrainedModel, tokenizer: Any) -> None:
        self.data, self.tokenizer, self.model = config.data, tokenizer, model
        self._others = {"data.test": config.data.test, "data.unseen": config.data.unseen}
        self.task = head_task(type(model).__name__)
        known = (token for token in (model.config.pad_token_id, tokenizer.pad_token_id) if token is not None)
        self.collate = PaddingCollator(next((token for token in known if token >= 0), 0))
        most = most_tokens(model)
        if most is not None and self.data.max_length > most:
            raise ValueError(f"data.max_length must be at most {most} for this model, got {self.data.max_length}")

    def __call__(self, columns: dict[str, list[Any]], argument: str, ids: Sequence[str] | None = None) -> list[Record]:
        table = Records(list(ids or ()), columns, argument)
        texts = [_text(value) for value in table.column(self.data.text_column, "data.text_column")]
        if not texts:
            raise ValueError(f"{argument} must hold at least one record, got none")
        pair = self.data.text_pair_column
        pairs = None if pair is None else [_text(value) for value in table.column(pair, "data.text_pair_column")]
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.data.max_length)
        labels: Sequence[Any] = encoded["input_ids"]
        if self.task == CLASSIFIER:
            values = table.column(self.data.label_column, "data.label_column")
            config: Any = self.model.config
            name = f"{self.data.label_column} of {argument}"
            labels = validate_labels(values, config.num_labels, config.label2id, argument=name)
        names = ids or [str(row) for row in range(len(texts))]
        shown = ids or columns.get(self.data.id_column) or names
        least = 1 if self.task == CLASSIFIER else 2  # a language model needs one to predict, and one before it
        _check_tokens(f"{self.data.text_column} of {argument}", shown, encoded["input_ids"], least)
        others = self._alternatives(table) if self.data.alternative_column and argument == "data.path" else {}
        return [
            {"id": names[row], **{key: encoded[key][row] for key in encoded}, "labels": labels[row]}
            | {ALTERNATIVE + key: value for key, value in others.get(row, {}).items()}
            for row in range(len(texts))
        ]

    def others(self) -> list[list[Record]]:
        """The test records and the unseen ones; none where the options name no file."""
        return [[] if path is None else self(read_table(path, name), name) for name, path in self._others.items()]

    def _alternatives(self, table: Records) -> dict[int, Record]:
        """The alternative answers of the rows that have one."""
        column = str(self.data.alternative_column)
        values = {row: _text(value) for row, value in enumerate(table.column(column, "data.alternative_column"))}
        values = {row: value for row, value in values.items() if value.strip()}
        if self.task == CLASSIFIER:
            config: Any = self.model.config
            labels = validate_labels([*values.values()], config.num_labels, config.label2id, argument=column)
            return {row: {"labels": label} for row, label in zip(values, labels, strict=True)}
        answers: dict[int, Record] = {}
        for row, value in values.items():
            encoded = self.tokenizer(value, truncation=True, max_length=self.data.max_length)
            _check_tokens(f"{column} of {table.source}", [table.ids[row]], [encoded["input_ids"]], 2)
            answers[row] = {**encoded, "labels": encoded["input_ids"]}
        return answers


def _check_tokens(argument: str, ids: Sequence[Any], rows: Sequence[Sequence[int]], least: int) -> None:
    """Refuse a text that is too short for the model."""
    for name, tokens in zip(ids, rows, strict=True):
        if len(tokens) < least:
            count = "1 token" if least == 1 else f"{least} tokens"
            found = f"{len(tokens)} with id {str(name)!r}"
            raise ValueError(f"{argument} must have at least {count} for this model, got {found}")


def _text(value: Any) -> str:
    return "" if value is None else str(value)
