"""Where heads and filters live in each supported model family.

One `Architecture` row per `config.model_type` names the submodules of a layer; everything else is read off them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "COMPACT",
    "Architecture",
    "LayerModules",
    "ModelLayout",
    "activation_name",
    "config_text",
    "find_layers",
    "find_prefix",
    "in_dim",
    "is_projection",
    "layout",
    "register_architecture",
]

ParameterSlice = tuple[nn.Module, str, int, Tensor]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Names of the submodules of one model family; all but `layers` are relative to a layer.

    Args:
        layers: path of the `nn.ModuleList` of layers, matched at the end of a module's qualified name.
        attention: the module that calls the Hugging Face attention interface; None where none does.
        query, key, value: projections of their own, or `qkv`: one projection with the three side by side.
        interleaved_qkv: `qkv` holds the three of one head (key/value group) after those of another; else all queries,
            then all keys, then all values.
        output: W_O.
        ffn: the module with the method to rebind; ffn_in, ffn_up, ffn_activation and ffn_tail lie inside it.
        ffn_in, ffn_up, ffn_out: W_in (W_gate of a gated FFN), W_up (gated FFN only), W_out.
        fused_gate_up: `ffn_in` is one projection with W_gate first and W_up after it; `ffn_up` is None.
        ffn_activation: the activation between them.
        ffn_tail: what the method applies after the filters, in order; without a tail it returns the filters.
        ffn_method: the method to rebind.
        embeddings: what runs before the layers or beside them, relative to the module that `layers` is relative to;
            a path with "?" behind it may be missing. Only `FrozenPrefix` needs it.
    """

    layers: str
    output: str
    ffn: str
    ffn_in: str
    ffn_out: str
    ffn_activation: str
    attention: str | None = None
    query: str | None = None
    key: str | None = None
    value: str | None = None
    qkv: str | None = None
    interleaved_qkv: bool = False
    ffn_up: str | None = None
    fused_gate_up: bool = False
    ffn_tail: tuple[str, ...] = ()
    ffn_method: str = "forward"
    embeddings: tuple[str, ...] = ()


_BERT = Architecture(
    layers="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    ffn="intermediate",
    ffn_in="intermediate.dense",
    ffn_activation="intermediate.intermediate_act_fn",
    ffn_out="output.dense",
    embeddings=("embeddings",),
)
_VIT = Architecture(
    layers="layers",
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    ffn="mlp",
    ffn_in="mlp.fc1",
    ffn_activation="mlp.activation_fn",
    ffn_out="mlp.fc2",
    ffn_tail=("mlp.fc2",),
    embeddings=("embeddings",),
)
_LLAMA = Architecture(
    layers="layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    ffn="mlp",
    ffn_in="mlp.gate_proj",
    ffn_up="mlp.up_proj",
    ffn_activation="mlp.act_fn",
    ffn_out="mlp.down_proj",
    ffn_tail=("mlp.down_proj",),
    embeddings=("embed_tokens", "rotary_emb"),
)
_PHI3 = replace(
    _LLAMA,
    query=None,
    key=None,
    value=None,
    qkv="self_attn.qkv_proj",
    ffn_in="mlp.gate_up_proj",
    ffn_up=None,
    fused_gate_up=True,
    ffn_activation="mlp.activation_fn",
)
_GLM = replace(
    _LLAMA,
    ffn_in="mlp.gate_up_proj",
    ffn_up=None,
    fused_gate_up=True,
    ffn_activation="mlp.activation_fn",
)

_ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": replace(_BERT, embeddings=("embeddings", "embeddings_project?")),
    "deberta-v2": replace(
        _BERT,
        attention=None,
        query="attention.self.query_proj",
        key="attention.self.key_proj",
        value="attention.self.value_proj",
        embeddings=("embeddings", "encoder.rel_embeddings?", "encoder.LayerNorm?", "encoder.conv?"),
    ),
    "modernbert": Architecture(
        layers="layers",
        attention="attn",
        qkv="attn.Wqkv",
        output="attn.Wo",
        ffn="mlp",
        ffn_in="mlp.Wi",
        fused_gate_up=True,
        ffn_activation="mlp.act",
        ffn_out="mlp.Wo",
        ffn_tail=("mlp.drop", "mlp.Wo"),
        embeddings=("embeddings", "rotary_emb"),
    ),
    "distilbert": Architecture(
        layers="transformer.layer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
        ffn="ffn",
        ffn_in="ffn.lin1",
        ffn_activation="ffn.activation",
        ffn_out="ffn.lin2",
        ffn_tail=("ffn.lin2", "ffn.dropout"),
        ffn_method="ff_chunk",
        embeddings=("embeddings",),
    ),
    "vit": _VIT,
    "deit": _VIT,
    "gpt2": Architecture(
        layers="h",
        attention="attn",
        qkv="attn.c_attn",
        output="attn.c_proj",
        ffn="mlp",
        ffn_in="mlp.c_fc",
        ffn_activation="mlp.act",
        ffn_out="mlp.c_proj",
        ffn_tail=("mlp.c_proj", "mlp.dropout"),
        embeddings=("wte", "wpe", "drop"),
    ),
    "gpt_neo": Architecture(
        layers="h",
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",
        output="attn.attention.out_proj",
        ffn="mlp",
        ffn_in="mlp.c_fc",
        ffn_activation="mlp.act",
        ffn_out="mlp.c_proj",
        ffn_tail=("mlp.c_proj", "mlp.dropout"),
        embeddings=("wte", "wpe", "drop"),
    ),
    "gptj": Architecture(
        layers="h",
        query="attn.q_proj",
        key="attn.k_proj",
        value="attn.v_proj",
        output="attn.out_proj",
        ffn="mlp",
        ffn_in="mlp.fc_in",
        ffn_activation="mlp.act",
        ffn_out="mlp.fc_out",
        ffn_tail=("mlp.fc_out", "mlp.dropout"),
        embeddings=("wte", "drop"),
    ),
    "gpt_neox": Architecture(
        layers="layers",
        attention="attention",
        qkv="attention.query_key_value",
        interleaved_qkv=True,
        output="attention.dense",
        ffn="mlp",
        ffn_in="mlp.dense_h_to_4h",
        ffn_activation="mlp.act",
        ffn_out="mlp.dense_4h_to_h",
        ffn_tail=("mlp.dense_4h_to_h",),
        embeddings=("embed_in", "emb_dropout", "rotary_emb"),
    ),
    "phi": Architecture(
        layers="layers",
        attention="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.dense",
        ffn="mlp",
        ffn_in="mlp.fc1",
        ffn_activation="mlp.activation_fn",
        ffn_out="mlp.fc2",
        ffn_tail=("mlp.fc2",),
        embeddings=("embed_tokens", "rotary_emb", "embed_dropout"),
    ),
    "phi3": _PHI3,
    "glm": _GLM,
    "glm4": _GLM,
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
            *("olmo", "olmo2", "olmo3", "granite", "smollm3", "stablelm", "cohere"),
        ),
        _LLAMA,
    ),
}

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


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Add (or replace) the row of a model family at run time.

    Args:
        model_type: the `config.model_type` of the family.
        architecture: names of its submodules.

    Raises:
        ValueError: paths are missing, contradict each other, or lie outside the module that is rebound.
    """
    if not isinstance(architecture, Architecture):
        raise ValueError(f"architecture must be an Architecture, got {type(architecture).__name__}")
    if (architecture.qkv is None) == (None in (architecture.query, architecture.key, architecture.value)):
        raise ValueError("architecture must name either qkv, or query, key and value")
    if architecture.interleaved_qkv and architecture.qkv is None:
        raise ValueError("architecture must name qkv where interleaved_qkv is True, got None")
    if architecture.fused_gate_up and architecture.ffn_up is not None:
        raise ValueError(f"architecture must have no ffn_up where fused_gate_up is True, got {architecture.ffn_up!r}")
    inner = (architecture.ffn_in, architecture.ffn_up, architecture.ffn_activation, *architecture.ffn_tail)
    for path in inner:
        if path is not None and not path.startswith(f"{architecture.ffn}."):
            raise ValueError(f"architecture must name submodules of ffn {architecture.ffn!r}, got {path!r}")
    _ARCHITECTURES[model_type] = architecture


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
    ffn_method: str
    interleaved_qkv: bool
    fused_gate_up: bool
    heads: int
    kv_heads: int

    @property
    def gated(self) -> bool:
        """Whether the activation is multiplied by a second projection."""
        return self.fused_gate_up or self.ffn_up is not None

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
        if self.interleaved_qkv:
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
        both = torch.stack([filters, self.filters + filters], dim=1).flatten() if self.fused_gate_up else filters
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
    config, row = _architecture(model)
    _, layers = _layer_list(model)

    def layer_modules(layer: nn.Module) -> LayerModules:
        modules: dict[str, Any] = {name: _submodule(layer, getattr(row, name)) for name in _SUBMODULES}
        tail = tuple(layer.get_submodule(path) for path in row.ffn_tail)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        return LayerModules(
            **modules,
            layer=layer,
            ffn_tail=tail,
            ffn_method=row.ffn_method,
            interleaved_qkv=row.interleaved_qkv,
            fused_gate_up=row.fused_gate_up,
            heads=config.num_attention_heads,
            kv_heads=kv_heads,
        )

    return [layer_modules(layer) for layer in layers.children()]


def find_prefix(model: nn.Module, layers: int) -> list[nn.Module]:
    """Find what computes the input of layer `layers`: the embeddings that the row names and every layer below it."""
    _, row = _architecture(model)
    name, found = _layer_list(model)
    root = model.get_submodule(name.removesuffix(row.layers).removesuffix("."))
    present = {path for path, _ in root.named_modules()}
    paths = [path.removesuffix("?") for path in row.embeddings if not path.endswith("?") or path[:-1] in present]
    return [*(root.get_submodule(path) for path in paths), *list(found.children())[:layers]]


def layout(model: nn.Module) -> ModelLayout:
    """Describe the heads and filters of a model.

    Raises:
        ValueError: the architecture has no row, its layers differ in size, or its weights are quantised.
    """
    config, _ = _architecture(model)
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


def _architecture(model: nn.Module) -> tuple[Any, Architecture]:
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise ValueError(f"model must be a Hugging Face model with config.model_type, got {type(model).__name__}")
    if model_type not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ValueError(
            f"architecture {model_type!r} is not supported (supported: {known}); add a row with "
            f"pymape.register_architecture({model_type!r}, pymape.Architecture(layers=..., attention=..., ...))"
        )
    return config, _ARCHITECTURES[model_type]


def _layer_list(model: nn.Module) -> tuple[str, nn.Module]:
    """The module list of the layers, with its qualified name."""
    config, row = _architecture(model)
    lists = [(name, module) for name, module in model.named_modules() if f".{name}".endswith(f".{row.layers}")]
    if len(lists) != 1:
        raise ValueError(f"{config.model_type} model must have one module list {row.layers!r}, found {len(lists)}")
    return lists[0]


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
