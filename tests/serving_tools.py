"""Chains of stages with random values, and what PEFT makes of their export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import S3TConfig
from pymape.s3t.ensemble import Chain
from pymape.s3t.frozen_base import load_base


def make_chains(config: S3TConfig, depths: Sequence[int], *, seed: int = 0) -> dict[int, list[dict[str, Tensor]]]:
    """A chain for every shard, whose adapters and heads are all different and change the logits a lot."""
    generator = torch.Generator().manual_seed(seed)
    adapters = SlicedAdapters(load_base(config.model, config.labels), config)
    chains: dict[int, list[dict[str, Tensor]]] = {}
    for shard, depth in enumerate(depths):
        chains[shard] = []
        for stage in range(1, depth + 1):
            tensors = {
                name: 0.3 * torch.randn(parameter.shape, generator=generator)
                for name, parameter in adapters.trainable(stage).items()
            }
            chains[shard].append(tensors)
    return chains


def peft_logits(
    folder: Path, config: S3TConfig, chains: Mapping[int, Chain], inputs: Mapping[str, Tensor]
) -> dict[int, Tensor]:
    """Logits of every live shard by itself: a model of its own, loaded by PEFT from an export."""
    from peft import PeftModel

    from pymape.s3t.export import export_ensemble

    export_ensemble(folder, config, chains)
    found = {}
    for shard, chain in chains.items():
        if chain:
            model = PeftModel.from_pretrained(load_base(config.model, config.labels), folder / f"shard-{shard:02d}")
            with torch.no_grad():
                found[shard] = model(**inputs).logits
    return found
