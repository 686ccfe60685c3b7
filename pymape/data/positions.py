"""Positions of tokens: how many a model has learned, and where a text begins that is padded on the left."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pymape.architectures import language_model
from pymape.losses import base_model

__all__ = ["PositionCollator", "counts_padding", "most_tokens", "with_positions"]

# What families call their tables of learned positions.
_TABLES = ("position_embeddings", "positions_embed", "wpe", "embed_positions")


class PositionCollator:
    """A collator whose batches bring the positions of texts that are padded on the left.

    Args:
        collate: list of records -> dict of tensors.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate
        self.tokenizer = getattr(collate, "tokenizer", None)  # which the Trainer saves with its checkpoints

    def __call__(self, records: list[Any]) -> Any:
        return _positioned(self.collate(records))


def with_positions(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A batch with the `position_ids` of each text's own tokens, where a model would count the padding on its left."""
    positioned = _positioned(batch)
    return positioned if positioned is batch or counts_padding(model) else batch


def counts_padding(model: nn.Module) -> bool:
    """Whether a model counts positions from the first token on, padding or not, unless it is told them.

    Models of texts and images count by themselves: some give an image's tokens positions in three dimensions.
    """
    if language_model(model) is not None:
        return False
    skips_padding = any(table.padding_idx is not None for table in _learned_positions(model))  # as RoBERTa does
    return not skips_padding and "position_ids" in inspect.signature(base_model(model).forward).parameters


def most_tokens(model: nn.Module) -> int | None:
    """Tokens of the longest text that a model's table of positions holds; None where there is none, as in Llama."""
    computed = ((name.rpartition(".")[2], table) for name, table in model.named_buffers())  # GPT-J's
    found = [len(table) for name, table in computed if name in _TABLES]
    for table in _learned_positions(model):
        unused = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from behind it
        found.append(table.num_embeddings - unused - int(getattr(table, "offset", 0)))
    return min(found, default=None)


def _positioned(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch itself where no text is padded on the left, or it brings its positions."""
    mask = batch.get("attention_mask")
    if "position_ids" in batch or not isinstance(mask, Tensor) or mask.ndim != 2 or not (mask[:, 0] == 0).any():
        return batch
    return {**batch, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


def _learned_positions(model: nn.Module) -> list[nn.Embedding]:
    """A model's tables of learned positions."""
    named = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
    return [module for name, module in named if name in _TABLES and isinstance(module, nn.Embedding)]
