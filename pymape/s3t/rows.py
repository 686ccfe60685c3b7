"""Encoded records as the batches of one shape that stages are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pymape.data.positions import most_tokens
from pymape.data.records import bare_record
from pymape.losses import IGNORED_LABEL, check_labels, task_of
from pymape.s3t.config import S3TConfig
from pymape.s3t.frozen_base import model_class
from pymape.s3t.stages import decode_row, encode_row

__all__ = ["RecordCheck", "model_fields", "stack_rows"]

_LABEL_PER_TOKEN = ("token classification", "masked language model", "causal language model")


def model_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the model is to see of a record, without its id and the subject that it is about."""
    return {name: value for name, value in bare_record(record).items() if name != "subject"}


def stack_rows(model: Any, rows: Sequence[Mapping[str, Tensor]], max_length: int) -> dict[str, Tensor]:
    """Stack records; what has one value per token is cut to `max_length` or padded to it on the right.

    Args:
        model: the Hugging Face model that they are for; its task tells whether labels belong to tokens.
        rows: fields of every record, as `decode_row` gives them.
        max_length: T, tokens of every text.

    Returns:
        [N, T] tensors of texts, with an attention mask; [N, ...] of everything else.

    Raises:
        ValueError: records of different forms, a text without tokens or with unknown ones, or a `max_length` that is
            more than the model can read.
    """
    padded = [_padded(model, row, max_length) for row in rows]
    form = _form(padded[0])
    for row in padded:
        _check_form(row, form)
    return {name: torch.stack([row[name] for row in padded]) for name in form}


class RecordCheck:
    """Refuses records that a system's model cannot be trained on, before they are ingested.

    Args:
        config: of the system; of the model only the configuration is read.

    Raises:
        ValueError: no model there.
    """

    def __init__(self, config: S3TConfig) -> None:
        kind, settings = model_class(config.model, config.labels)
        make = getattr(kind, "_from_config", None) or kind.from_config
        with torch.device("meta"):
            self._model = make(settings)
        self._max_length = config.stage.max_length
        self._form: dict[str, tuple[Any, ...]] | None = None

    def __call__(self, record: Mapping[str, Any], identifier: str) -> bytes:
        """Return the encoded record.

        Args:
            record: its fields.
            identifier: its id, for the message.

        Raises:
            ValueError: naming the record and what is wrong with it.
        """
        try:
            content = encode_row(record)
            row = _padded(self._model, decode_row(content), self._max_length)
            self._form = self._form or _form(row)
            _check_form(row, self._form)
            _check_finite(row)
        except ValueError as error:
            raise ValueError(f"record {identifier!r}: {error}") from error
        check_labels(self._model, {name: value[None] for name, value in row.items()}, [identifier])
        return content


def _padded(model: Any, row: Mapping[str, Tensor], max_length: int) -> dict[str, Tensor]:
    tokens = row.get("input_ids")
    if tokens is None:
        return dict(row)
    config = model.config.get_text_config()
    if tokens.dim() != 1 or len(tokens) == 0 or tokens.is_floating_point():
        raise ValueError(f"input_ids must be a list of at least one token, got {tokens.dtype} of {tuple(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= config.vocab_size:
        low, high = int(tokens.min()), int(tokens.max())
        raise ValueError(f"input_ids must lie in [0, {config.vocab_size}), got values from {low} to {high}")
    longest = most_tokens(model)
    if longest is not None and max_length > longest:
        raise ValueError(f"max_length must be at most {longest} for this model, got {max_length}")
    task, length = task_of(model), len(tokens)
    fill = {"input_ids": config.pad_token_id or 0, "labels": IGNORED_LABEL, "special_tokens_mask": 1}
    padded = {}
    for name, value in {"attention_mask": torch.ones_like(tokens), **row}.items():
        per_token = task in _LABEL_PER_TOKEN if name == "labels" else value.dim() == 1 and len(value) == length
        if per_token and value.shape != tokens.shape:
            raise ValueError(f"{name} must have a value for each of {length} tokens, got shape {tuple(value.shape)}")
        cut = value[:max_length] if per_token else value
        padded[name] = F.pad(cut, (0, max_length - len(cut)), value=fill.get(name, 0)) if per_token else cut
    return padded


def _form(row: Mapping[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (value.dtype, tuple(value.shape)) for name, value in row.items()}


def _check_form(row: Mapping[str, Tensor], form: Mapping[str, tuple[Any, ...]]) -> None:
    if _form(row) == form:
        return
    if row.keys() != form.keys():
        raise ValueError(f"fields must be those of the other records, {sorted(form)}, got {sorted(row)}")
    name = next(name for name, value in _form(row).items() if value != form[name])
    raise ValueError(f"{name} must be {form[name]} as in the other records, got {_form(row)[name]}")


def _check_finite(row: Mapping[str, Tensor]) -> None:
    for name, value in row.items():
        wrong = value[~value.isfinite()]
        if len(wrong):
            raise ValueError(f"{name} must be finite, got {wrong[0].item()} among {value.numel()} values")
