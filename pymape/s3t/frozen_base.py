"""The frozen base of an S3T system: loaded with the same bits in every process, and hashed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pymape.losses import task_of
from pymape.storage.runs import quiet_transformers
from pymape.storage.tensors import tensor_digest

__all__ = ["base_facts", "base_hash", "hash_stored", "load_base", "model_class", "task_heads"]

_ALIGNMENT = 64  # bytes; kernels may round otherwise where an operand begins elsewhere
_VOLATILE = ("_name_or_path", "transformers_version")


def load_base(folder: str | os.PathLike[str], labels: int | None = None, sha256: str | None = None) -> Any:
    """Load a frozen base model: the same bits in every process.

    Args:
        folder: Hugging Face model folder.
        labels: classes of a new task head, drawn from a fixed seed; None: the model brings its own.
        sha256: the `base_hash` that it must have.

    Returns:
        The model in eval mode on the CPU.

    Raises:
        ValueError: no model folder, no task head, weights that are missing, or another hash.
    """
    kind, settings = model_class(folder, labels)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model, info = kind.from_pretrained(
            folder,
            config=settings,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=labels is not None,
        )
    new = tuple(f"{name}." for name in task_heads(model)) if labels is not None else ()
    lost = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    missing = sorted(name for name in lost if not name.startswith(new))
    if missing:
        raise ValueError(
            f"model must hold all weights of {type(model).__name__}, got {str(folder)!r} without "
            f"{', '.join(missing[:3])}"
        )
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % _ALIGNMENT:  # a view into the file, placed by the length of its header
            tensor.data = tensor.data.clone()
    model.eval()
    if sha256 is not None and (found := base_hash(model)) != sha256:
        raise ValueError(
            f"model must be the base {sha256[:12]} that the system was made with, got {found[:12]} in {str(folder)!r}"
        )
    return model


def model_class(folder: str | os.PathLike[str], labels: int | None = None) -> tuple[Any, Any]:
    """The class and the configuration of the model that `load_base` loads.

    Raises:
        ValueError: no model folder, or no task head.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

    if not (Path(folder) / "config.json").is_file():
        raise ValueError(f"model must be a Hugging Face model folder with a config.json, got {str(folder)!r}")
    if labels is not None:
        with quiet_transformers():  # it warns of the names that the old head's classes had
            settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, num_labels=labels)
        if settings.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            return transformers.AutoModelForImageClassification, settings
        return transformers.AutoModelForSequenceClassification, settings
    settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    architecture = (settings.architectures or [settings.model_type])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None or not ("For" in architecture or "LMHead" in architecture):
        raise ValueError(
            f"model must have a task head, got {architecture} in {str(folder)!r}: set labels to give it a new one"
        )
    return kind, settings


def base_hash(model: Any, labels: int | None = None) -> str:
    """sha256 of a frozen base: its configuration and the name, dtype, shape and bytes of every tensor that it stores.

    Args:
        model: a model that is not wrapped, as `load_base` returns it, or the folder of one.
        labels: as `load_base`.
    """
    if not isinstance(model, nn.Module):
        model = load_base(model, labels)
    return hash_stored(base_facts(model), model)


def task_heads(model: Any) -> list[str]:
    """Names of the modules outside the base model that have weights; none of a language model."""
    if task_of(model) in ("causal language model", "masked language model"):
        return []
    return [
        name
        for name, module in model.named_children()
        if module is not model.base_model and any(True for _ in module.parameters())
    ]


def base_facts(model: Any) -> str:
    """What the outputs depend on beside the weights."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _VOLATILE}
    facts = {"class": type(model).__name__, "attention": model.config._attn_implementation, "config": config}
    return json.dumps(facts, sort_keys=True, default=str)


def hash_stored(facts: str, model: nn.Module) -> str:
    """sha256 over the facts and all that a base model stores, whether it is wrapped or not."""
    hasher, seen = hashlib.sha256(facts.encode()), set()
    for name, tensor in model.state_dict().items():
        if ".lora_" in name or ".modules_to_save." in name:
            continue
        place = (tensor.data_ptr(), tensor.shape)
        if place not in seen:  # tied weights once
            tensor_digest(hasher, name.replace(".base_layer.", ".").replace(".original_module.", "."), tensor)
            seen.add(place)
    return hasher.hexdigest()
