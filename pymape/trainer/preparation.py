"""What the Trainer and accelerate put on a model for training, kept off it or taken back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["embeddings_as_they_are", "undo_preparation"]


def undo_preparation(model: nn.Module) -> None:
    """Take back what accelerate has put on the model: autocast around `forward`, and the mark that it is there.

    Its own `extract_model_from_parallel` strips the decorators of transformers' `forward` as well.
    """
    own = vars(model)
    own.pop("_is_accelerate_prepared", None)
    original = own.pop("_original_forward", None)
    if original is not None:
        own.pop("forward", None)
        if original != model.forward:  # the user had set another one than the class's
            model.forward = original


def _no_hooks() -> None:
    """A function of the module, not a lambda: the model can be pickled while it is trained."""


@contextmanager
def embeddings_as_they_are(model: Any) -> Iterator[None]:
    """Keep the Trainer's checkpointing from hooks that make the embeddings' outputs require gradients.

    The frozen layers below the masks would build a graph, and the hooks would outlast the training. They are for frozen
    embeddings under reentrant checkpointing, which is refused with masks.
    """
    model.enable_input_require_grads = _no_hooks
    try:
        yield
    finally:
        del model.enable_input_require_grads
