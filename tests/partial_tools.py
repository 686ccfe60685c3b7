"""Masks for tests of partial training and of deltas."""

from __future__ import annotations

import torch
from torch import nn

from pymape.masks import ModuleMasks
from pymape.model_layout import layout


def some_masks(model: nn.Module) -> ModuleMasks:
    """Some heads and some filters of both layers, not neighbours."""
    shape = layout(model)
    groups = torch.zeros(shape.layers, shape.kv_heads, dtype=torch.bool)
    groups[0, -1] = groups[1, 0] = groups[1, 2:3] = True
    filters = torch.rand(shape.layers, shape.filters, generator=torch.Generator().manual_seed(1)) < 0.3
    return ModuleMasks(groups.repeat_interleave(shape.group_size, 1), filters, shape)
