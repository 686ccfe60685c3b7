"""Training of original and retrained models."""

from __future__ import annotations

import math
import time

import torch
from transformers import PreTrainedModel

from pymape.batching import PaddingCollator, bare_record
from pymape.experiments.config import TaskConfig
from pymape.experiments.tasks.base import Record

__all__ = ["train"]


def train(model: PreTrainedModel, records: list[Record], config: TaskConfig, seed: int) -> float:
    """Train in place on one thread of control, in the order of the seed; returns the seconds that it took.

    AdamW with a one-cycle learning rate.
    """
    started = time.perf_counter()
    collate = PaddingCollator(getattr(model.config, "pad_token_id", None) or 0)
    rows = [bare_record(record) for record in records]
    steps = config.epochs * math.ceil(len(rows) / config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout
        model.train()
        for _ in range(config.epochs):
            for chosen in torch.randperm(len(rows), generator=order).split(config.batch_size):
                optimizer.zero_grad()
                model(**collate([rows[row] for row in chosen.tolist()])).loss.backward()
                optimizer.step()
                schedule.step()
    model.eval()
    return time.perf_counter() - started
