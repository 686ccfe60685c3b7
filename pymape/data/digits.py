"""scikit-learn's digits and a small Vision Transformer: data and a model that every installation has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

__all__ = ["CLASSES", "digit_records", "load_digits", "small_vit"]

CLASSES = 10
_VIT: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": CLASSES,
}


def load_digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8], fp32 in [-1, 1], and labels [1797], int64."""
    from sklearn import datasets

    source = datasets.load_digits()
    return torch.tensor(source.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(source.target)


def digit_records(images: Tensor, labels: Tensor, rows: Sequence[int]) -> list[dict[str, Any]]:
    """Some rows of `load_digits` as records, with the row in their ids."""
    return [{"id": f"digit-{row:04}", "pixel_values": images[row], "labels": labels[row]} for row in rows]


def small_vit(seed: int, **options: Any) -> ViTForImageClassification:
    """A ViT of 4 layers, 64 wide, with the initial weights of a seed.

    Args:
        seed: of the weights.
        options: what replaces arguments of `ViTConfig` that fit the digits.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(**(_VIT | options)))
