"""PEFT's LoRA on a frozen base, in groups of layers that are switched on and off one by one."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymape.architectures import language_model
from pymape.losses import task_of
from pymape.model_layout import LayerModules, find_layers
from pymape.s3t.config import LoraConfig, S3TConfig
from pymape.s3t.frozen_base import base_facts, hash_stored, task_heads
from pymape.storage.tensors import tensor_digest

__all__ = ["PEFT_PREFIX", "SlicedAdapters", "layers_per_slice"]

_ADAPTER = "default"
PEFT_PREFIX = "base_model.model."  # of every name in PEFT's adapter_model.safetensors
_TARGETS = {
    "qv": ("query", "value", "qkv"),
    "attention": ("query", "key", "value", "qkv", "output"),
    "all": ("query", "key", "value", "qkv", "output", "ffn_in", "ffn_up", "ffn_out"),
}


class SlicedAdapters:
    """A frozen base with a LoRA group for every slice: group i lies in layers N - ig ... N - 1 - (i-1)g.

    At depth k groups 1 ... k act; the layers below hold the base's own modules, as if they had never been wrapped, so
    their outputs are the base's bit by bit. The model is wrapped once, when this object is made: wrapping it again
    would wipe what has been loaded. Everything is in eval mode and requires no grad, except what `grow` returns.

    Args:
        model: a Hugging Face model with a task head; it is changed in place.
        config: `lora`, `slices` and `layers_per_slice` count.

    Attributes:
        model: the PeftModel.
        base: the Hugging Face model inside, with the adapters of the present depth.
        layers: N.
        layers_per_slice: g.
        depth: k.
        heads: names of the modules that are trained beside LoRA: the task head of a classifier, nothing of a language
            model, whose head is often its embedding.

    Raises:
        ValueError: an unsupported family, more layers per slice than there are, BatchNorm, or a LoRA option that is out
            of range.

    Source: S3T (arXiv 2406.16257), section 3.2.
    """

    def __init__(self, model: Any, config: S3TConfig) -> None:
        from peft import get_peft_model

        found = find_layers(model)
        self.layers, self.layers_per_slice = len(found), layers_per_slice(config, len(found))
        self.slices, self.depth, self._lora = config.slices, 0, config.lora
        _check(model, config.lora)
        self.heads = task_heads(model)
        self._facts = base_facts(model)
        names = {module: name for name, module in model.named_modules()}
        modules = [_target_modules(layer, config.lora) for layer in found]
        self._targets = [
            [names[module] for layer in self.group(stage) for module in modules[layer]]
            for stage in range(1, self.slices + 1)
        ]
        top = names[found[-1].layer]
        self._pattern = top.split(".")[-2]
        self._names_in_layer = [names[module].removeprefix(f"{top}.") for module in modules[-1]]
        self._fan_in_fan_out = any(hasattr(module, "nf") for module in modules[-1])  # GPT-2's Conv1D
        everything = [name for group in self._targets for name in group]
        # PEFT draws beginnings that `grow` replaces, and calls what transformers is going to rename.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.model = get_peft_model(model, self._lora_config(target_modules=everything))
        self.base = self.model.get_base_model()
        self._lora_layers = {name: self.base.get_submodule(name) for name in everything}
        self._base_head = {name: value.clone() for name, value in self._head().items()}
        self._loaded_heads = [self._base_head]
        self.model.requires_grad_(False).eval()
        self.set_depth(0)

    def to(self, device: str) -> SlicedAdapters:
        """Move the base and all adapters, those that are bypassed too."""
        self.model.to(device)
        for lora in self._lora_layers.values():
            lora.to(device)
        return self

    def group(self, stage: int) -> list[int]:
        """Indices of the layers that stage 1 ... L trains, rising."""
        if not 1 <= stage <= self.slices:
            raise ValueError(f"stage must lie in [1, {self.slices}], got {stage}")
        first = self.first_layer(stage)
        return list(range(first, first + self.layers_per_slice))

    def first_layer(self, stage: int) -> int:
        """The lowest layer with an adapter at this depth, N - stage * g; everything below is the frozen base."""
        return self.layers - stage * self.layers_per_slice

    def set_depth(self, depth: int) -> None:
        """Let groups 1 ... depth act, with the head that was trained at this depth; the groups below are bypassed.

        Raises:
            ValueError: deeper than what is loaded.
        """
        if not 0 <= depth < len(self._loaded_heads):
            raise ValueError(f"depth must lie in [0, {len(self._loaded_heads) - 1}], the stages loaded, got {depth}")
        self._place(depth)
        with torch.no_grad():
            for name, parameter in self._head().items():
                parameter.copy_(self._loaded_heads[depth][name])

    def load(self, chain: Sequence[Mapping[str, Tensor]]) -> None:
        """Load the stages of a chain and let them act.

        Args:
            chain: `stage_tensors` of every stage, root first; none at all gives the base.

        Raises:
            ValueError: more stages than slices, or one that holds other tensors than its group and the head. What was
                loaded before stays then.
        """
        if len(chain) > self.slices:
            raise ValueError(f"chain must hold at most {self.slices} stages, got {len(chain)}")
        own = [self._lora_parameters(stage) for stage in range(1, len(chain) + 1)]
        for stage, (tensors, parameters) in enumerate(zip(chain, own, strict=True), start=1):
            _check_tensors(stage, tensors, parameters | self._head())
        with torch.no_grad():
            for tensors, parameters in zip(chain, own, strict=True):
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[name])
        self._loaded_heads = [
            self._base_head,
            *({name: tensors[name].clone() for name in self._base_head} for tensors in chain),
        ]
        self.set_depth(len(chain))

    def grow(self, generator: torch.Generator) -> dict[str, nn.Parameter]:
        """Add a fresh group below the loaded ones, to be trained together with the head, which starts as it is.

        Args:
            generator: draws A as PEFT does, Kaiming uniform with a = sqrt(5); B is zero.

        Returns:
            `trainable` of the new group; these parameters require grad until `freeze`.
        """
        stage = self.depth + 1
        if stage > self.slices:
            raise ValueError(f"chain must be shorter than {self.slices} stages to grow, got {self.depth}")
        with torch.no_grad():
            for name, parameter in self._lora_parameters(stage).items():
                if ".lora_A." in name:
                    drawn = torch.empty(parameter.shape)
                    nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
                    parameter.copy_(drawn)
                else:
                    parameter.zero_()
        self._place(stage)
        for name in self._targets[stage - 1]:
            self._lora_layers[name].lora_dropout.train()
        trainable = self.trainable(stage)
        for parameter in trainable.values():
            parameter.requires_grad_(True)
        return trainable

    def freeze(self) -> None:
        """End training: no parameter requires grad, and no dropout acts."""
        self.model.requires_grad_(False).eval()

    def trainable(self, stage: int) -> dict[str, nn.Parameter]:
        """The parameters that a stage trains: those of its group and the head, by their names in PEFT's files."""
        return self._lora_parameters(stage) | self._head()

    def stage_tensors(self, stage: int) -> dict[str, Tensor]:
        """A copy of what a stage trains, to be stored: its own group and its own head, nothing of another stage."""
        return {name: parameter.detach().cpu().clone() for name, parameter in self.trainable(stage).items()}

    def base_hash(self) -> str:
        """sha256 of the base, from the tensors as they are now; the same as the function's before it was wrapped."""
        return hash_stored(self._facts, self.base)

    def frozen_hash(self, stage: int) -> str:
        """sha256 of all else that must stay as it is while a stage is trained: earlier groups and computed buffers."""
        hasher = hashlib.sha256()
        for earlier in range(1, stage):
            for name, parameter in self._lora_parameters(earlier).items():
                tensor_digest(hasher, name, parameter)
        for name, buffer in self.base.named_buffers():
            tensor_digest(hasher, name, buffer)
        return hasher.hexdigest()

    def export_config(self, depth: int) -> Any:
        """PEFT's config (`adapter_config.json`) of an adapter that acts as this object at a depth of at least 1."""
        if not 1 <= depth <= self.slices:
            raise ValueError(f"depth must lie in [1, {self.slices}] to be exported, got {depth}")
        return self._lora_config(
            target_modules=self._names_in_layer,
            layers_to_transform=list(range(self.first_layer(depth), self.layers)),
            layers_pattern=[self._pattern],
            inference_mode=True,
        )

    def _lora_config(self, **options: Any) -> Any:
        from peft import LoraConfig as PeftConfig

        alpha: Any = self._lora.alpha  # PEFT says int, and takes any number
        return PeftConfig(
            r=self._lora.r,
            lora_alpha=int(alpha) if int(alpha) == alpha else alpha,
            use_rslora=self._lora.rslora,
            lora_dropout=self._lora.dropout,
            fan_in_fan_out=self._fan_in_fan_out,
            modules_to_save=self.heads or None,
            **options,
        )

    def _place(self, depth: int) -> None:
        """Put LoRA's modules into the layers of groups 1 ... depth and the base's own into all others."""
        for stage, names in enumerate(self._targets, start=1):
            for name in names:
                lora = self._lora_layers[name]
                parent, _, child = name.rpartition(".")
                setattr(self.base.get_submodule(parent), child, lora if stage <= depth else lora.base_layer)
        self.depth = depth

    def _lora_parameters(self, stage: int) -> dict[str, nn.Parameter]:
        return {
            f"{PEFT_PREFIX}{name}.{part}.weight": getattr(self._lora_layers[name], part)[_ADAPTER].weight
            for name in self._targets[stage - 1]
            for part in ("lora_A", "lora_B")
        }

    def _head(self) -> dict[str, nn.Parameter]:
        return {
            f"{PEFT_PREFIX}{head}.{name}": parameter
            for head in self.heads
            for name, parameter in self.base.get_submodule(head).modules_to_save[_ADAPTER].named_parameters()
        }


def layers_per_slice(config: S3TConfig, layers: int) -> int:
    """g, for a base with this many layers.

    Raises:
        ValueError: g * L is more than there are.
    """
    if layers < config.slices:
        raise ValueError(f"slices must be at most {layers}, the layers of the model, got {config.slices}")
    size = layers // config.slices if config.layers_per_slice is None else config.layers_per_slice
    if size < 1 or size * config.slices > layers:
        raise ValueError(
            f"layers_per_slice must lie in [1, {layers // config.slices}] for {config.slices} slices and {layers} "
            f"layers, got {size}"
        )
    return size


def _check(model: Any, lora: LoraConfig) -> None:
    if language_model(model) is not None:
        raise ValueError(f"model must take texts or images alone, got {type(model).__name__}")
    if model.config.model_type == "deberta-v2":
        raise ValueError(
            "model must have projections that see a batch's records alone, got DeBERTa, which also projects relative "
            "positions that all of them share"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"model must have no BatchNorm, whose outputs depend on the rest of the batch, got {name!r}"
            )
    if task_of(model) == "question answering":
        raise ValueError(f"model must give one tensor of logits, got a {type(model).__name__}")
    if hasattr(model, "score") and model.config.get_text_config().pad_token_id is None:  # it reads a text's last token
        raise ValueError(f"model must have a pad_token_id in its config.json, got {type(model).__name__} without one")
    if lora.targets not in _TARGETS:
        raise ValueError(f"lora.targets must be one of {', '.join(_TARGETS)}, got {lora.targets!r}")


def _target_modules(layer: LayerModules, lora: LoraConfig) -> list[nn.Module]:
    modules = [getattr(layer, name) for name in _TARGETS[lora.targets]]
    return [module for module in modules if module is not None]


def _check_tensors(stage: int, tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    missing, other = sorted(parameters.keys() - tensors.keys()), sorted(tensors.keys() - parameters.keys())
    if missing or other:
        found = f"none named {missing[0]}" if missing else f"one named {other[0]}"
        raise ValueError(f"stage {stage} must hold the tensors of its group and the head, got {found}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            expected, got = tuple(parameter.shape), tuple(tensors[name].shape)
            raise ValueError(f"stage {stage} must hold {name} of shape {expected}, got {got}")
