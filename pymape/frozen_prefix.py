"""Starting a model's forward pass at a layer, from cached hidden states of everything below it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from pymape.architectures import language_model
from pymape.feed_forward import STATE
from pymape.forward import LABELS
from pymape.model_layout import config_text, find_layers, find_prefix
from pymape.prefix_cache import PrefixCache
from pymape.storage.tensors import tensor_digest

__all__ = ["FrozenPrefix"]

_ALL_LAYERS = ("output_hidden_states", "output_attentions")  # what asks for the states of the layers left out
_STATES = "_pymape_prefix_states"
_BY_LENGTH = ("longrope", "dynamic")  # types of rotary positions with other frequencies for longer batches


class FrozenPrefix:
    """The embeddings and the layers below `layers` of a frozen model; their output is computed once for every record.

    `run` gives the outputs of the whole model, from states that lie in the cache or are computed and put there. A
    record's states are stored without the padding after it, under a digest of the prefix (weights, configuration,
    autocast, device, versions) and one of the record's inputs. They keep the bits with which they were first computed:
    those of the plain forward pass of that batch. Where torch's kernels round a row by its place or padding, those of
    another batch may differ in the last bits.

    It knows nothing of masks: any use of a model whose lower layers stay as they are may share one cache.

    Args:
        model: a supported Hugging Face model, not compiled or wrapped. It is not changed.
        layers: number of layers in the prefix, at least 1.
        cache: where the states are kept.

    Raises:
        ValueError: no such number of layers, an architecture row without its embeddings, a model of texts and
            images, or rotary positions that depend on a batch's length.
    """

    def __init__(self, model: Any, layers: int, cache: PrefixCache) -> None:
        if language_model(model) is not None:
            raise ValueError(f"model must take texts or images alone for a prefix cache, got {type(model).__name__}")
        rope = next((kind for kind in _rope_types(model.config) if kind in _BY_LENGTH), None)
        if rope is not None:
            raise ValueError(
                f"model must have rotary positions that no other record changes for a prefix cache, got {rope!r}, "
                "which depends on the longest record of a batch"
            )
        total = len(find_layers(model))
        if not 1 <= layers <= total:
            raise ValueError(f"layers must lie in [1, {total}], got {layers}")
        self.model, self.cache = model, cache
        self._modules = find_prefix(model, layers)
        self._layers = self._modules[-layers:]
        if len(self._modules) == layers:
            raise ValueError(f"architecture row of {model.config.model_type!r} must name its embeddings, got none")
        self._takes_use_cache = "use_cache" in signature(model.forward).parameters
        self._seen: dict[str, str] = {}
        self._stamp: tuple[Any, ...] = ()
        self._fingerprint = ""
        self._tuple_length: int | None = None
        self._form_known = False

    def run(self, records: Sequence[str], inputs: Mapping[str, Any], call: Callable[..., Any] | None = None) -> Any:
        """Return `call(**inputs)`, with the prefix taken from the cache.

        Args:
            records: the id of every row.
            inputs: keyword arguments of the model's forward.
            call: what to call, for instance a DDP wrapper of the model; the model itself by default. A call that asks
                for the states of all layers, or brings or wants a key/value cache, runs as it is.

        Raises:
            ValueError: as `states`.
        """
        call = self.model if call is None else call
        if _wants_all_layers(self.model, inputs):
            return call(**inputs)
        states = self.states(records, inputs)
        if self._takes_use_cache:
            inputs = {**inputs, "use_cache": False}  # the layers that are left out would leave gaps in it
        with self._replaced(states):
            return call(**inputs)

    @torch.no_grad()
    def states(self, records: Sequence[str], inputs: Mapping[str, Any]) -> Tensor:
        """Return the hidden states that enter layer `layers`, [B, T, H], zero after a record's last token.

        Raises:
            ValueError: not one id per row; a prefix that is in train mode, has gates or may be trained; or a record
                with other inputs than before (random augmentation of the data).
        """
        self._check_frozen()
        rows, device = _rows(inputs)
        if len(records) != rows:
            raise ValueError(f"records must hold one id for each of {rows} rows, got {len(records)}")
        prefix = self.fingerprint(device)
        keys = [self._key(record, inputs, row, rows) for row, record in enumerate(records)]
        found = [self.cache.get(prefix, record, key.digest) for record, key in zip(records, keys, strict=True)]
        missing = [row for row, states in enumerate(found) if states is None]
        if not missing and not self._form_known:
            missing = [0]  # what a layer returns differs between versions of transformers
        if missing:
            subset = inputs if len(missing) == rows else _take(inputs, torch.tensor(missing, device=device), rows)
            computed = self._compute(subset, device)
            for row, states in zip(missing, computed, strict=True):
                kept = states[: keys[row].length]
                if found[row] is None:
                    self.cache.put(prefix, records[row], keys[row].digest, kept)
                    found[row] = kept
        return _padded([states for states in found if states is not None], keys, device)

    def fingerprint(self, device: torch.device) -> str:
        """sha256 over all that the states depend on, beside the record's inputs."""
        autocast = _autocast(device)
        tensors = [tensor for module in self._modules for tensor in (*module.parameters(), *module.buffers())]
        stamp = (device.type, autocast, *((tensor.data_ptr(), tensor._version) for tensor in tensors))
        if stamp != self._stamp:
            hasher = hashlib.sha256()
            facts = [config_text(self.model), str(autocast), device.type, len(self._layers), torch.__version__]
            hasher.update(json.dumps([*facts, version("transformers")]).encode())
            for number, module in enumerate(self._modules):
                for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                    tensor_digest(hasher, f"{number} {name}", tensor)
            self._fingerprint, self._stamp = hasher.hexdigest(), stamp
        return self._fingerprint

    def _check_frozen(self) -> None:
        for module in self._modules:
            for name, part in module.named_modules():
                where = f"{type(module).__name__} {name}".strip()
                if part.training:
                    raise ValueError(f"prefix must be in eval mode, where no dropout acts, got {where} in train mode")
                if getattr(vars(part).get(STATE), "gate", None) is not None:
                    raise ValueError(f"prefix must have no gates, got some in {where}")
            if any(parameter.requires_grad for parameter in module.parameters()):
                raise ValueError(f"prefix must be frozen, got parameters of {type(module).__name__} that require grad")

    def _key(self, record: str, inputs: Mapping[str, Any], row: int, rows: int) -> _Key:
        key = _record_key(inputs, row, rows)
        if self._seen.setdefault(record, key.content) != key.content:
            raise ValueError(
                f"inputs of record {record!r} must stay the same, got others than before: a prefix cache cannot serve "
                "randomly augmented data"
            )
        return key

    def _compute(self, inputs: Mapping[str, Any], device: torch.device) -> Tensor:
        """Run the prefix and nothing above it."""

        def stop(module: nn.Module, arguments: Any, output: Any) -> None:
            if _autocast(device) != outside:
                raise ValueError("autocast must be entered around the call, got a model that enters it by itself")
            raise _Reached(output)

        outside = _autocast(device)
        handle = self._layers[-1].register_forward_hook(stop)
        try:
            self.model(**inputs)
        except _Reached as reached:
            output = reached.output
        finally:
            handle.remove()
        self._form_known = True
        self._tuple_length = len(output) if isinstance(output, tuple) else None
        return output if self._tuple_length is None else output[0]

    @contextmanager
    def _replaced(self, states: Tensor) -> Iterator[None]:
        """Let every layer of the prefix return the states at once."""
        length = self._tuple_length
        value = states if length is None else (states, *(None for _ in range(length - 1)))
        for layer in self._layers:
            if "forward" in vars(layer):
                raise ValueError(
                    f"prefix must have layers of its own, got a replaced forward in {type(layer).__name__}"
                )
        try:
            for layer in self._layers:
                setattr(layer, _STATES, value)
                layer.forward = MethodType(_return_states, layer)
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop(_STATES, None)
                vars(layer).pop("forward", None)


class _Reached(Exception):
    """Carries the output of the prefix out of the model."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@dataclass(frozen=True)
class _Key:
    """What a record's states depend on.

    Args:
        content: digest of the record's own inputs, without any padding.
        digest: of all up to its last token. Padding before that counts: models may read what stands at place 0.
        length: number of tokens up to the last one that is no padding; None: all.
        tokens: T, with padding.
    """

    content: str
    digest: str
    length: int | None
    tokens: int | None


def _rope_types(config: Any) -> list[str]:
    """Types of a model's rotary positions; some have several, for layers of different kinds."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return [
        str(part["rope_type"])
        for part in (parameters, *parameters.values())
        if isinstance(part, Mapping) and "rope_type" in part
    ]


def _return_states(module: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(module, _STATES)


def _rows(inputs: Mapping[str, Any]) -> tuple[int, torch.device]:
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value), value.device
    raise ValueError(f"inputs must hold tensors, got {sorted(inputs)}")


def _take(inputs: Mapping[str, Any], index: Tensor, rows: int) -> dict[str, Any]:
    """Some rows of every input that has one for each record."""
    return {
        name: value[index] if isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows else value
        for name, value in inputs.items()
    }


def _record_key(inputs: Mapping[str, Any], row: int, rows: int) -> _Key:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if mask is None and isinstance(ids, Tensor) and ids.dim() == 2:  # as where another record of the batch is padded
        mask = torch.ones_like(ids)
        inputs = {**inputs, "attention_mask": mask}
    if not isinstance(mask, Tensor) or mask.dim() != 2 or len(mask) != rows:
        digest = _digest(inputs, row, rows, None, slice(None))
        return _Key(digest, digest, None, None)
    valid = mask[row] != 0
    length = int(valid.nonzero()[-1]) + 1 if valid.any() else 0
    content, digest = (
        _digest(_without_plain_positions(inputs, row, part), row, rows, len(valid), part)
        for part in (valid, slice(length))
    )
    return _Key(content, digest, length, len(valid))


def _without_plain_positions(inputs: Mapping[str, Any], row: int, part: Tensor | slice) -> Mapping[str, Any]:
    """Without positions that count from 0, as a model does by itself: a batch has them where another row needs them."""
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return inputs
    own = positions[row if len(positions) > 1 else 0][part]
    if not torch.equal(own, torch.arange(len(own), device=own.device, dtype=own.dtype)):
        return inputs
    return {name: value for name, value in inputs.items() if name != "position_ids"}


def _digest(inputs: Mapping[str, Any], row: int, rows: int, tokens: int | None, part: Tensor | slice) -> str:
    """sha256 over all that the model is given for a row, but of inputs of one value per token only a part."""
    hasher = hashlib.sha256()
    for name, value in sorted(inputs.items()):
        if name in LABELS:
            continue
        if not isinstance(value, Tensor):
            hasher.update(f"{name}\0{value!r}\0".encode())
            continue
        own = value[row] if value.dim() > 0 and len(value) == rows else value
        tensor_digest(hasher, name, own[part] if tuple(value.shape[:2]) == (rows, tokens) else own)
    return hasher.hexdigest()


def _padded(states: list[Tensor], keys: list[_Key], device: torch.device) -> Tensor:
    """Put every record's states back to their places, [B, T, H]."""
    tokens = keys[0].tokens
    if tokens is None:
        return torch.stack([one.to(device) for one in states])
    padded = states[0].new_zeros((len(keys), tokens, states[0].shape[-1]), device=device)
    for row, one in enumerate(states):
        padded[row, : len(one)] = one.to(device)
    return padded


def _wants_all_layers(model: Any, inputs: Mapping[str, Any]) -> bool:
    asked = (inputs.get(name, getattr(model.config, name, None)) for name in _ALL_LAYERS)
    return any(asked) or inputs.get("past_key_values") is not None or bool(inputs.get("use_cache"))


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
