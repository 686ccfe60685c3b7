"""Model folders: loading them with their tokenizer, and training what they hold in full precision."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from pymape.config import UnlearnConfig
from pymape.data.tables import Records
from pymape.losses import LANGUAGE_MODEL

__all__ = ["CLASSIFIER", "full_precision", "head_task", "load_model", "load_tokenizer"]

CLASSIFIER = "sequence classification"  # beside `LANGUAGE_MODEL`
_HEADS = {"ForSequenceClassification": CLASSIFIER, "ForCausalLM": LANGUAGE_MODEL, "LMHeadModel": LANGUAGE_MODEL}


def load_model(config: UnlearnConfig, source: Records) -> tuple[PreTrainedModel, Any]:
    """Load the model that the options name, and its tokenizer, onto the GPU where there is one.

    Args:
        config: the options; with `train_first` a model without a task head gets one.
        source: the records, whose labels are the new head's classes.

    Raises:
        ValueError: no model folder, no task head, weights or a tokenizer that are missing.
    """
    folder = Path(config.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be a Hugging Face model folder with a config.json, got {config.model!r}")
    settings = AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = (settings.architectures or [settings.model_type])[0]
    task = head_task(architecture)
    if task is None and not config.train_first:
        raise ValueError(
            f"model must have a sequence-classification or causal-LM head, got {architecture} in {config.model!r}: "
            "give a fine-tuned model, or set train_first: true to fine-tune this one on the data before unlearning"
        )
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    if task is None:
        column = config.data.label_column
        options |= _new_head(source.column(column, "data.label_column"), f"{column} of data.path")
    loader: Any = AutoModelForCausalLM if task == LANGUAGE_MODEL else AutoModelForSequenceClassification
    model, info = loader.from_pretrained(folder, **options)
    missing = sorted(info["missing_keys"])
    if missing and not config.train_first:
        raise ValueError(
            f"model must hold all weights of {architecture}, got a folder without {', '.join(missing[:3])}"
        )
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), load_tokenizer(folder)


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """Load the tokenizer that lies in a model folder.

    Where none of its files is there, transformers makes one of the model's kind with an empty vocabulary, to which
    every word is unknown.

    Args:
        folder: Hugging Face model folder.

    Raises:
        ValueError: no tokenizer there.
    """
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model must be a folder with its tokenizer, got {str(folder)!r}: {error}") from error
    files = tuple(getattr(tokenizer, "vocab_files_names", {}).values())  # none for those that read bytes
    if files and not any((Path(folder) / name).is_file() for name in files):
        raise ValueError(f"model must be a folder with its tokenizer, got {str(folder)!r} without {' or '.join(files)}")
    return tokenizer


@contextmanager
def full_precision(model: torch.nn.Module) -> Iterator[None]:
    """A block that trains a model whose weights are in half precision: they are fp32 in it, and rounded at its end.

    In bfloat16 and float16, steps that are small beside a weight round to nothing, or to far more. What the block does
    not change comes back bit for bit.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    half = {name: tensor.dtype for name, tensor in tensors if tensor.is_floating_point() and tensor.dtype.itemsize < 4}

    def cast(dtype: torch.dtype | None) -> None:
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            if name in half:
                tensor.data = tensor.data.to(dtype or half[name])

    cast(torch.float32)
    try:
        yield
    finally:
        cast(None)


def head_task(architecture: str) -> str | None:
    """The task of a model class by its name; None where it is neither a classifier nor a language model."""
    return next((task for ending, task in _HEADS.items() if architecture.endswith(ending)), None)


def _new_head(values: Sequence[Any], argument: str) -> dict[str, Any]:
    """Size of a new classification head and, where labels are names, what its outputs mean."""
    texts = ["" if value is None else str(value).strip() for value in values]
    if "" in texts:
        raise ValueError(f"{argument} must not be empty, got an empty label in data row {texts.index('') + 1}")
    if all(text.removesuffix(".0").isdigit() for text in texts):
        return {"num_labels": max(2, 1 + max(int(float(text)) for text in texts))}
    names = sorted(set(texts))
    if len(names) < 2:  # transformers takes a single output for a regression
        raise ValueError(f"{argument} must hold at least two names of classes with train_first, got {names[0]!r} only")
    return {"label2id": {name: row for row, name in enumerate(names)}, "id2label": dict(enumerate(names))}
