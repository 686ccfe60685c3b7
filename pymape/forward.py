"""What every pass of a model over records needs: what it may see, what pads its texts, eval mode, the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from pymape.architectures import language_model
from pymape.data.positions import with_positions

__all__ = ["LABELS", "eval_mode", "input_fields", "on_device", "padding_token", "unlabelled"]

# Inputs that are answers, which the model is not to see.
LABELS = ("labels", "start_positions", "end_positions")


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a block in eval mode; afterwards every module has its own training flag back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def on_device(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a batch, where the model is; texts padded on the left get their positions, where these count."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in with_positions(model, batch).items() if isinstance(value, Tensor)}


def padding_token(model: nn.Module) -> int:
    """What `input_ids` are padded with: the model's own token, 0 where it names none (some name -1)."""
    config: Any = getattr(language_model(model) or model, "config", None)
    return max(getattr(config, "pad_token_id", None) or 0, 0)


def input_fields(model: nn.Module) -> frozenset[str] | None:
    """What a model's forward names, so that other columns are not for it; None of a wrapper that passes all on."""
    named = {name for name, taken in signature(model.forward).parameters.items() if taken.kind is not taken.VAR_KEYWORD}
    return frozenset(named) if named & {"input_ids", "pixel_values"} else None


def unlabelled(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs without the answers, so that the model computes no loss of its own."""
    return {name: value for name, value in inputs.items() if name not in LABELS}
