"""A language model of known output, records of every task, and scores made up by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from model_zoo import tiny_batch
from torch import Tensor, nn

from pymape.metrics import RecordScores


class FixedForCausalLM(nn.Module):
    """Gives every token the same logits, whatever it reads: by default 3/4 for token 2, 1/8 for tokens 0 and 1."""

    def __init__(self, logits: Sequence[float] = (0.0, 0.0, math.log(6.0))) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(logits))
        text = SimpleNamespace(vocab_size=len(logits))
        self.config = SimpleNamespace(pad_token_id=0, get_text_config=lambda: text)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> Any:
        logits = self.bias.expand(*input_ids.shape, len(self.bias))
        return SimpleNamespace(logits=logits, hidden_states=(logits,) if output_hidden_states else None)


def records(family: str, task: str, count: int = 5, seed: int = 0, prefix: str = "r") -> list[dict[str, Any]]:
    """Records of a task, of different lengths, without the padding: the collator has to put it there."""
    padding = None if family == "vit" else "right"
    batch = tiny_batch(family, task, batch=count, seed=seed, padding=padding)
    rows = [{"id": f"{prefix}{row}", **{name: values[row] for name, values in batch.items()}} for row in range(count)]
    for row in rows if padding else ():
        own = int(row.pop("attention_mask").sum())
        for name in ("input_ids", "labels"):
            if name in row and row[name].ndim:
                row[name] = row[name][:own]
    return rows


def token_scores(
    log_probs: Sequence[Sequence[float]],
    *,
    hits: Sequence[Sequence[bool]] | None = None,
    prefix: str = "r",
    **optional: Tensor,
) -> RecordScores:
    """Scores of a language model that has these log-probabilities for the tokens of each record."""
    flat = torch.tensor([value for own in log_probs for value in own], dtype=torch.float64)
    right = torch.ones(len(flat)) if hits is None else torch.tensor([hit for own in hits for hit in own])
    labels = torch.full((len(flat),), 7)
    return RecordScores(
        ids=[f"{prefix}{row}" for row in range(len(log_probs))],
        task="causal language model",
        offsets=torch.tensor([0, *(len(own) for own in log_probs)]).cumsum(0),
        log_probs=flat,
        means=torch.full_like(flat, -2.0),
        stds=torch.full_like(flat, 0.5),
        predicted=torch.where(right.bool(), labels, 8),
        labels=labels,
        **optional,
    )
