"""The change that partial training made, as a file of its own: `PartialParameters.export_delta` and `apply_delta`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pymape.model_layout import layout
from pymape.storage.files import atomic_write
from pymape.storage.tensors import tensor_digest

__all__ = ["DeltaPart", "apply_delta", "inside_digest", "write_delta"]

FORMAT = "pymape.delta.1"
_INDEX = ":index"

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class DeltaPart:
    """The part of one parameter that a delta replaces.

    Args:
        name: of the parameter in the plain model.
        dim: dimension along which `index` selects.
        index: ascending int64; None stands for the whole parameter.
    """

    name: str
    dim: int
    index: Tensor | None

    def of(self, full: Tensor) -> Tensor:
        """The part's values in a full parameter."""
        return full if self.index is None else full.index_select(self.dim, self.index.to(full.device))

    def present(self, model: nn.Module) -> Tensor:
        """The part's values in a model now."""
        return self.of(model.get_parameter(self.name).detach())

    def without(self, full: Tensor) -> Tensor:
        """A full parameter with zeros in the part's place."""
        if self.index is None:
            return full[:0]
        return full.index_fill(self.dim, self.index.to(full.device), 0)


@torch.no_grad()
def write_delta(
    model: nn.Module,
    parts: Sequence[DeltaPart],
    path: str | os.PathLike[str],
    *,
    fingerprint: str,
    base: str,
    provenance: Mapping[str, Any],
) -> None:
    """Write the present values of `parts`.

    Args:
        model: the trained model.
        parts: what training may have changed.
        path: of the safetensors file.
        fingerprint: of the model's layout.
        base: `inside_digest` of the values before training.
        provenance: JSON-able.
    """
    values = {part.name: part.present(model) for part in parts}
    outside = _outside_digest(model, parts)
    metadata = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "dims": json.dumps({part.name: part.dim for part in parts}),
        "base": _joined(outside, base),
        "result": _joined(outside, inside_digest(parts, lambda part: values[part.name])),
        "provenance": json.dumps(provenance, sort_keys=True),
    }
    tensors = {name: value.cpu().contiguous().clone() for name, value in values.items()}
    tensors |= {part.name + _INDEX: part.index.cpu().clone() for part in parts if part.index is not None}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata)


@torch.no_grad()
def apply_delta(model: Model, path: str | os.PathLike[str]) -> Model:
    """Bring a deployed copy of the original model to the unlearned weights, bit for bit.

    Args:
        model: a plain model with the weights that training started from, in the dtype that was trained (a bf16
            checkpoint that was trained in fp32 is loaded with `dtype=torch.float32`). It is changed in place, and left
            as it is if it holds the unlearned weights already.
        path: what `PartialParameters.export_delta` wrote.

    Returns:
        The same model.

    Raises:
        ValueError: no delta, a damaged one, or one made for another model, other weights or another dtype; nothing is
            changed then.
    """
    metadata, tensors = _read(path)
    fingerprint = layout(model).fingerprint
    if metadata["fingerprint"] != fingerprint:
        raise ValueError(f"delta must fit the model {fingerprint[:12]}, got one for {metadata['fingerprint'][:12]}")
    parameters = dict(model.named_parameters())
    parts, values = _checked_parts(json.loads(metadata["dims"]), tensors, parameters, path)
    outside = _outside_digest(model, parts)
    present = _joined(outside, inside_digest(parts, lambda part: part.present(model)))
    if present == metadata["result"]:
        return model
    if present != metadata["base"]:
        base = metadata["base"]
        raise ValueError(f"model must hold the weights {base[:12]} that training began with, got {present[:12]}")
    if _joined(outside, inside_digest(parts, lambda part: values[part.name])) != metadata["result"]:
        raise ValueError(f"delta must give the weights {metadata['result'][:12]}, got a damaged file: {path}")
    for part in parts:
        parameter, value = parameters[part.name], values[part.name]
        value = value.to(parameter.device)
        if part.index is None:
            parameter.copy_(value)
        else:
            parameter.index_copy_(part.dim, part.index.to(parameter.device), value)
    return model


def inside_digest(parts: Sequence[DeltaPart], values: Callable[[DeltaPart], Tensor]) -> str:
    """sha256 over where the parts are and what they hold, which is asked for part by part."""
    hasher = hashlib.sha256()
    for part in sorted(parts, key=lambda part: part.name):
        if part.index is not None:
            tensor_digest(hasher, f"{part.name} {part.dim}", part.index)
        tensor_digest(hasher, part.name, values(part))
    return hasher.hexdigest()


def _outside_digest(model: nn.Module, parts: Sequence[DeltaPart]) -> str:
    """sha256 over every other entry of the model's state dict, but for other names of a part's parameter."""
    hasher, by_name = hashlib.sha256(), {part.name: part for part in parts}
    replaced = {id(model.get_parameter(part.name)) for part in parts}
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        if name in by_name:
            tensor_digest(hasher, name, by_name[name].without(tensor.detach()))
        elif id(tensor) not in replaced:
            tensor_digest(hasher, name, tensor)
    return hasher.hexdigest()


def _joined(outside: str, inside: str) -> str:
    return hashlib.sha256(f"{outside} {inside}".encode()).hexdigest()


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise ValueError(f"delta must be a safetensors file, got {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"delta must have format {FORMAT!r}, got {metadata.get('format')!r} in {path}")
    return metadata, tensors


def _checked_parts(
    dims: Mapping[str, int], tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], path: Any
) -> tuple[list[DeltaPart], dict[str, Tensor]]:
    """The parts that a file names and their values, once they are known to fit the model's parameters."""
    parts = [DeltaPart(name, dim, tensors.get(name + _INDEX)) for name, dim in dims.items()]
    for part in parts:
        value, parameter = tensors.get(part.name), parameters.get(part.name)
        if value is None or parameter is None:
            raise ValueError(f"delta must hold and replace the parameter {part.name}, got a damaged file: {path}")
        shape = list(parameter.shape)
        if part.index is not None:
            size, index = shape[part.dim], part.index
            if index.dtype != torch.int64 or index.dim() != 1 or not ((index >= 0) & (index < size)).all():
                raise ValueError(f"index of {part.name} must be int64 in [0, {size}), got a damaged file: {path}")
            shape[part.dim] = len(index)
        if list(value.shape) != shape:
            raise ValueError(f"delta of {part.name} must have shape {tuple(shape)}, got {tuple(value.shape)}")
        if value.dtype != parameter.dtype:
            raise ValueError(
                f"model must have the dtype of the training, {value.dtype}, got {parameter.dtype} in {part.name}: "
                f"load the copy with dtype={value.dtype}"
            )
    return parts, {part.name: tensors[part.name] for part in parts}
