"""The heads and filters of a model: how many, what each costs, and which parameters they own."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymape.architectures import Architecture, architecture_of, language_model

__all__ = [
    "COMPACT",
    "LayerModules",
    "ModelLayout",
    "activation_name",
    "config_text",
    "find_layers",
    "find_prefix",
    "in_dim",
    "is_projection",
    "layout",
]

ParameterSlice = tuple[nn.Module, str, int, Tensor]

# The rows' paths that are optional or single; `layers` and `ffn_tail` are resolved apart.
_SUBMODULES = (
    "attention",
    "query",
    "key",
    "value",
    "qkv",
    "output",
    "ffn",
    "ffn_in",
    "ffn_up",
    "ffn_activation",
    "ffn_out",
)

# Parameters that partial training adds beside those of a projection.
COMPACT = {"weight": "selected_weight", "bias": "selected_bias"}
_COMPILED = "_orig_mod."  # before the names of what `torch.compile` has wrapped

# Class names of activation modules -> what `masked_ffn` calls the same function.
_ACTIVATIONS = {
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


@dataclass(frozen=True)
class ModelLayout:
    """How many heads and filters a model has, and what each costs.

    `head_cost` is the number of parameters that one key/value group owns (its query heads' rows of W_Q, its rows of
    W_K and W_V, their biases, and its columns of W_O); `filter_cost` those of one filter. `fingerprint` is the sha256
    over the model type and all parameter names and shapes, so that masks of another model are recognised.
    """

    model_type: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    filters: int
    head_cost: int
    filter_cost: int
    fingerprint: str

    @property
    def group_size(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def total_cost(self) -> int:
        """Number of parameters owned by heads and filters together."""
        return self.layers * (self.kv_heads * self.head_cost + self.filters * self.filter_cost)


@dataclass(frozen=True, eq=False)
class LayerModules:
    """The submodules of one layer that heads and filters live in."""

    layer: nn.Module
    attention: nn.Module | None
    query: nn.Module | None
    key: nn.Module | None
    value: nn.Module | None
    qkv: nn.Module | None
    output: nn.Module
    ffn: nn.Module
    ffn_in: nn.Module
    ffn_up: nn.Module | None
    ffn_activation: nn.Module
    ffn_out: nn.Module
    ffn_tail: tuple[nn.Module, ...]
    row: Architecture
    heads: int
    kv_heads: int

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied by a second projection."""
        return self.row.fused_gate_up or self.ffn_up is not None

    @property
    def activation(self) -> str | None:
        """`masked_ffn`'s name of the activation, or None where it has none."""
        return activation_name(self.ffn_activation)

    @property
    def head_dim(self) -> int:
        return _parameter(self.output, "weight").shape[in_dim(self.output)] // self.heads

    @property
    def filters(self) -> int:
        return _parameter(self.ffn_out, "weight").shape[in_dim(self.ffn_out)]

    def head_slices(self, groups: Tensor) -> list[ParameterSlice]:
        """The parameters that key/value groups own.

        Args:
            groups: indices of key/value groups (of heads, without grouped-query attention), int64 [n].

        Returns:
            (module, "weight" or "bias", dim, indices along dim) in each parameter's own layout, once per parameter.
            What one group owns is one stretch of the indices, and the stretches are of one length.
        """
        size = self.heads // self.kv_heads
        queries = _blocks(groups, size * self.head_dim)  # [n, group size * D]
        keys = _blocks(groups, self.head_dim)  # [n, D]
        projections = [(self.query, queries), (self.key, keys), (self.value, keys)]
        if self.row.interleaved_qkv:
            projections = [(self.qkv, _blocks(groups, (size + 2) * self.head_dim))]
        elif self.qkv is not None:
            key_start, value_start = self.heads * self.head_dim, (self.heads + self.kv_heads) * self.head_dim
            projections = [(self.qkv, torch.cat([queries, key_start + keys, value_start + keys], dim=1))]
        slices = [part for linear, rows in projections if linear is not None for part in _rows(linear, rows.flatten())]
        return [*slices, (self.output, "weight", in_dim(self.output), queries.flatten())]

    def filter_slices(self, filters: Tensor) -> list[ParameterSlice]:
        """The parameters that filters own.

        Args:
            filters: indices of filters, int64 [n].

        Returns:
            (module, "weight" or "bias", dim, indices along dim) in each parameter's own layout, once per parameter.
        """
        both = torch.stack([filters, self.filters + filters], dim=1).flatten() if self.row.fused_gate_up else filters
        slices = _rows(self.ffn_in, both)
        if self.ffn_up is not None:
            slices += _rows(self.ffn_up, filters)
        return [*slices, (self.ffn_out, "weight", in_dim(self.ffn_out), filters)]


def activation_name(module: nn.Module) -> str | None:
    """What `masked_ffn` calls an activation, or None where it has no such."""
    if isinstance(module, nn.GELU) and module.approximate == "tanh":
        return "gelu_tanh"
    return _ACTIVATIONS.get(type(module).__name__)


def config_text(model: nn.Module) -> str:
    """All that a Hugging Face model computes by beside its weights, as JSON; not where these were loaded from."""
    config: Any = model.config
    content = {**config.to_dict(), "attention": getattr(config, "_attn_implementation", None)}
    content.pop("_name_or_path", None)
    return json.dumps(content, sort_keys=True, default=str)


def find_layers(model: nn.Module) -> list[LayerModules]:
    """Find the submodules of every layer; wrappers around the model (PEFT, torch.compile) are looked through.

    Raises:
        ValueError: the architecture has no row, or a row that does not fit the model.
    """
    config, row = architecture_of(model)
    _, layers = _layer_list(model)

    def layer_modules(layer: nn.Module) -> LayerModules:
        modules: dict[str, Any] = {name: _submodule(layer, getattr(row, name)) for name in _SUBMODULES}
        tail = tuple(layer.get_submodule(path) for path in row.ffn_tail)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return LayerModules(
            **modules,
            layer=layer,
            ffn_tail=tail,
            row=row,
            heads=config.num_attention_heads,
            kv_heads=kv_heads,
        )

    return [layer_modules(layer) for layer in layers.children()]


def find_prefix(model: nn.Module, layers: int) -> list[nn.Module]:
    """Find what computes the input of layer `layers`: the embeddings that the row names and every layer below it.

    In a model of texts and images also what stands beside the language model, which makes tokens of the images.
    """
    _, row = architecture_of(model)
    root, found = _layer_list(model)
    present = {path for path, _ in root.named_modules()}
    paths = [path.removesuffix("?") for path in row.embeddings if not path.endswith("?") or path[:-1] in present]
    inner = language_model(model)
    beside: list[nn.Module] = []
    if inner is not None:
        parent = next(module for module in model.modules() if inner in module.children())
        beside = [module for module in parent.children() if module is not inner]
    return [*beside, *(root.get_submodule(path) for path in paths), *list(found.children())[:layers]]


def layout(model: nn.Module) -> ModelLayout:
    """Describe the heads and filters of a model.

    Raises:
        ValueError: the architecture has no row, its layers differ in size, or its weights are quantised.
    """
    config, _ = architecture_of(model)
    layers = find_layers(model)
    sizes = {(layer.head_dim, layer.filters) for layer in layers}
    if len(sizes) != 1:
        raise ValueError(f"model must have layers of one size, got (head_dim, filters) {sorted(sizes)}")
    first, one = layers[0], torch.zeros(1, dtype=torch.int64)
    return ModelLayout(
        model_type=config.model_type,
        layers=len(layers),
        heads=first.heads,
        kv_heads=first.kv_heads,
        head_dim=first.head_dim,
        filters=first.filters,
        head_cost=_cost(first.head_slices(one)),
        filter_cost=_cost(first.filter_slices(one)),
        fingerprint=_fingerprint(config.model_type, model),
    )


def _layer_list(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The module that a row's `layers` and `embeddings` are relative to, and the module list of the layers."""
    config, row = architecture_of(model)
    within = language_model(model) or model
    lists = [(name, module) for name, module in within.named_modules() if f".{name}".endswith(f".{row.layers}")]
    if len(lists) != 1:
        raise ValueError(f"{config.model_type} model must have one module list {row.layers!r}, found {len(lists)}")
    name, layers = lists[0]
    return within.get_submodule(name.removesuffix(row.layers).removesuffix(".")), layers


def _submodule(layer: nn.Module, path: str | None) -> nn.Module | None:
    if path is None:
        return None
    try:
        return layer.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"architecture row names {path!r}, which {type(layer).__name__} does not have") from error


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        raise ValueError(f"{type(module).__name__} must have a {name} tensor, got {type(parameter).__name__}")
    if not parameter.is_floating_point():
        raise ValueError(f"model must have floating-point weights, got {parameter.dtype} in {type(module).__name__}")
    return parameter


def is_projection(module: nn.Module) -> bool:
    """Whether it is torch's Linear or GPT-2's Conv1D itself, no quantised, wrapped or otherwise derived one."""
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


def in_dim(linear: nn.Module) -> int:
    """Dimension of the weight that holds inputs: 1, but 0 for GPT-2's Conv1D, which stores the transpose."""
    return 0 if hasattr(getattr(linear, "base_layer", linear), "nf") else 1  # LoRA wraps a base_layer


def _blocks(index: Tensor, size: int) -> Tensor:
    """Indices of whole blocks of `size` consecutive rows, [n, size]."""
    return index[:, None] * size + torch.arange(size, device=index.device)


def _rows(linear: nn.Module, index: Tensor) -> list[ParameterSlice]:
    slices: list[ParameterSlice] = [(linear, "weight", 1 - in_dim(linear), index)]
    if linear.bias is not None:
        slices.append((linear, "bias", 0, index))
    return slices


def _cost(slices: list[ParameterSlice]) -> int:
    shapes = [(_parameter(module, name).shape, dim, len(index)) for module, name, dim, index in slices]
    return sum(shape.numel() // shape[dim] * count for shape, dim, count in shapes)


def _fingerprint(model_type: str, model: nn.Module) -> str:
    shapes = {
        name.removeprefix(_COMPILED): tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if not name.endswith(tuple(COMPACT.values()))  # of a model in partial training, which is the same model
    }
    lines = sorted(f"{name} {shape}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join([model_type, *lines]).encode()).hexdigest()
