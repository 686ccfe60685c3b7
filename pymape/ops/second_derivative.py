"""What differentiates a fused backward pass: an error instead of a gradient that lacks terms."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = ["refuse_second_derivative"]


def refuse_second_derivative(op: str) -> None:
    """Make the operator `{op}_backward` of pymape raise where a gradient is to pass through it.

    Without a formula, torch would take its results for constants under `create_graph=True`.
    """

    def refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(f"{op} has no second derivative; use backend='reference'")

    torch.library.register_autograd(f"pymape::{op}_backward", refuse)
