"""Training of original and retrained models."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pymape.data.batching import PaddingCollator, collated, record_lengths
from pymape.experiments.config import TaskConfig
from pymape.experiments.kinds import KINDS
from pymape.experiments.tasks.base import Record
from pymape.forward import padding_token

__all__ = ["train"]

_POOL = 8  # batches that are sorted by length together


def train(model: PreTrainedModel, records: list[Record], config: TaskConfig, seed: int) -> float:
    """Train in place, where the model is, in the order of the seed; returns the seconds that it took.

    AdamW with a one-cycle learning rate.
    """
    started = time.perf_counter()
    collate = PaddingCollator(padding_token(model))
    lengths = record_lengths(records) if KINDS[config.name].bucketed else None
    steps = config.epochs * math.ceil(len(records) / config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        model.train()
        for _ in range(config.epochs):
            batches = torch.randperm(len(records), generator=order).split(config.batch_size)
            for chosen in batches if lengths is None else _bucketed(batches, lengths, order):
                optimizer.zero_grad()
                batch = collated(collate, [records[row] for row in chosen.tolist()])
                model(**{name: value.to(model.device) for name, value in batch.items()}).loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()
    return time.perf_counter() - started


def _bucketed(batches: Sequence[Tensor], lengths: Sequence[int], order: torch.Generator) -> list[Tensor]:
    """As many batches of the same records, each of similar lengths, in a random order."""
    size, of = len(batches[0]), torch.tensor(lengths)
    sorted_batches = []
    for start in range(0, len(batches), _POOL):
        pool = torch.cat(list(batches[start : start + _POOL]))
        sorted_batches += pool[of[pool].argsort(stable=True)].split(size)
    return [sorted_batches[place] for place in torch.randperm(len(sorted_batches), generator=order)]
