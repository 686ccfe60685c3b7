"""Where heads and filters live in each supported model family: one row per `config.model_type`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

__all__ = ["Architecture", "architecture_of", "language_model", "register_architecture"]


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
_GPT2 = Architecture(
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
    "gpt2": _GPT2,
    "gpt_neo": replace(
        _GPT2,
        attention=None,
        query="attn.attention.q_proj",
        key="attn.attention.k_proj",
        value="attn.attention.v_proj",
        qkv=None,
        output="attn.attention.out_proj",
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
    "phi": replace(
        _LLAMA,
        output="self_attn.dense",
        ffn_in="mlp.fc1",
        ffn_up=None,
        ffn_activation="mlp.activation_fn",
        ffn_out="mlp.fc2",
        ffn_tail=("mlp.fc2",),
        embeddings=("embed_tokens", "rotary_emb", "embed_dropout"),
    ),
    "phi3": replace(_GLM, query=None, key=None, value=None, qkv="self_attn.qkv_proj"),
    "glm": _GLM,
    "glm4": _GLM,
    **dict.fromkeys(
        (
            *("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"),
            *("olmo", "olmo2", "olmo3", "granite", "smollm3", "stablelm", "cohere"),
            *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
        ),
        _LLAMA,
    ),
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


def language_model(model: Any) -> nn.Module | None:
    """The language model inside a model of texts and images, which has layers of its own; None in other models."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", True) or config.get_text_config() is config:
        return None
    return model.get_decoder()


def architecture_of(model: nn.Module) -> tuple[Any, Architecture]:
    """The config and the row of a model's layers, which may be those of the language model inside.

    Raises:
        ValueError: no Hugging Face model, or one whose family has no row.
    """
    config: Any = getattr(language_model(model) or model, "config", None)
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
