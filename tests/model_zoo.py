"""Small random models of every supported family, and batches that fit them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

ENCODERS = ("bert", "roberta", "distilbert")
VISION = ("vit", "deit")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
GROUPED = ("llama", "mistral", "qwen2", "qwen3")
FAMILIES = ENCODERS + VISION + DECODERS  # every test of families takes these

# What has the structure of one of those, or differs in few things; the tests of what depends on it take them too.
MORE_ENCODERS = ("xlm-roberta", "camembert", "electra", "deberta-v2", "modernbert")
MORE_GROUPED = (
    *("ministral", "gemma", "gemma2", "gemma3_text", "olmo", "olmo2", "olmo3", "granite", "smollm3", "stablelm"),
    *("cohere", "glm", "glm4", "phi", "phi3"),
)
MORE_DECODERS = ("gpt_neo", "gptj", "gpt_neox", *MORE_GROUPED)
MORE_FAMILIES = MORE_ENCODERS + MORE_DECODERS
GATED = ("modernbert", *GROUPED, *(family for family in MORE_GROUPED if family != "phi"))
FUSED_NORMS = (*GROUPED, "ministral", "olmo2", "olmo3", "granite", "smollm3", "glm", "glm4", "phi3")

LABELS, VOCABULARY, IMAGE_SIZE, PAD = 3, 50, 8, 0
LAYERS, HEADS, FILTERS = 2, 4, 25

_TASKS = {
    "base": "AutoModel",
    "sequence_classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "multi_label": "AutoModelForSequenceClassification",
    "image_classification": "AutoModelForImageClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "masked_lm": "AutoModelForMaskedLM",
    "causal_lm": "AutoModelForCausalLM",
}
_TASK_CONFIG = {
    "regression": {"problem_type": "regression", "num_labels": 1},
    "multi_label": {"problem_type": "multi_label_classification"},
    "question_answering": {"num_labels": 2},
}


def default_task(family: str) -> str:
    if family in VISION:
        return "image_classification"
    return "causal_lm" if family in DECODERS + MORE_DECODERS else "sequence_classification"


# Sizes of heads other than hidden size / heads, where the config lets them be.
HEAD_DIM = dict.fromkeys(("qwen3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "ministral"), 8)

_BERT_DROPOUTS = ("attention_probs_dropout_prob", "hidden_dropout_prob")
_DROPOUTS = dict.fromkeys(GROUPED + MORE_GROUPED, ("attention_dropout",)) | {
    "modernbert": ("attention_dropout", "mlp_dropout", "embedding_dropout"),
    "gpt_neo": ("attention_dropout", "resid_dropout", "embed_dropout"),
    "gpt_neox": ("attention_dropout", "hidden_dropout"),
    "stablelm": ("attention_dropout", "hidden_dropout"),
    "phi": ("attention_dropout", "resid_pdrop", "embd_pdrop"),
    "phi3": ("attention_dropout", "resid_pdrop", "embd_pdrop"),
}
_MIXED = ("gemma3_text", "olmo3")
_PARTIAL_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_OWN = {
    "electra": {"embedding_size": 8},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 4,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "gpt_neo": {"window_size": 4},
    "gptj": {"rotary_dim": 2},
    "gpt_neox": _PARTIAL_ROTARY,
    "phi": _PARTIAL_ROTARY,
    "phi3": {"original_max_position_embeddings": 64},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 4},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 4},
    "olmo3": {"sliding_window": 4},
    "ministral": {"sliding_window": 4},
    "glm": _PARTIAL_ROTARY,
    "glm4": _PARTIAL_ROTARY,
    "stablelm": _PARTIAL_ROTARY,
}


def implementations(family: str) -> tuple[str, ...]:
    """Attention implementations that the family has; Gemma 2 caps its logits, which SDPA does not, others are older."""
    return ("eager",) if family in ("gemma2", "gptj", "gpt_neo", "deberta-v2") else ("sdpa", "eager")


def of_every_kind(families: tuple[str, ...]) -> list[tuple[str, str]]:
    """(family, attention implementation) of all families that are named."""
    return [(family, implementation) for family in families for implementation in implementations(family)]


def tiny_config(family: str, dropout: float = 0.0, **config: Any) -> transformers.PretrainedConfig:
    """A two-layer config whose sizes are all different, so that a mixed-up dimension shows."""
    options: dict[str, Any] = {"num_labels": LABELS, "initializer_range": 0.2, "architectures": []}
    if family == "distilbert":
        options |= {"dim": 16, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": FILTERS, "dropout": dropout}
        options |= {"attention_dropout": dropout, "seq_classif_dropout": dropout, "max_position_embeddings": 64}
    elif family in ("gpt2", "gptj"):
        options |= {"n_embd": 16, "n_layer": LAYERS, "n_head": HEADS, "n_inner": FILTERS, "n_positions": 64}
        options |= {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout, "summary_first_dropout": 0.0}
    else:
        options |= {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
        options |= {"intermediate_size": FILTERS} | dict.fromkeys(_DROPOUTS.get(family, _BERT_DROPOUTS), dropout)
    if family in GROUPED + MORE_GROUPED:
        options |= {"num_key_value_heads": 2, "head_dim": HEAD_DIM.get(family, 4)}
    if family in VISION:
        options |= {"image_size": IMAGE_SIZE, "patch_size": 4, "num_channels": 3}
    else:
        options |= {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    if family not in (*VISION, "distilbert", "gpt2"):
        options |= {"max_position_embeddings": 64, "classifier_dropout": 0.0}
    options |= _OWN.get(family, {})
    layers = config.get("num_hidden_layers", LAYERS)
    if family == "gpt_neo":
        options["attention_types"] = [[[("global", "local")[layer % 2]], 1] for layer in range(layers)]
    if family in _MIXED:
        options["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    return transformers.AutoConfig.for_model(family, **(options | config))


def tiny_model(
    family: str,
    task: str | None = None,
    *,
    seed: int = 0,
    dropout: float = 0.0,
    attn_implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> transformers.PreTrainedModel:
    """A seeded two-layer model (hidden 16, 4 heads, 25 filters) in eval mode, biases and norms random too."""
    task = task or default_task(family)
    config = _TASK_CONFIG.get(task, {}) | config
    auto = getattr(transformers, _TASKS[task])
    attn_implementation = attn_implementation or implementations(family)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(tiny_config(family, dropout, **config), attn_implementation=attn_implementation)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1 or not parameter.any():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def tiny_batch(
    family: str,
    task: str | None = None,
    batch: int = 3,
    seed: int = 0,
    padding: str | None = None,
    length: int = 7,
    labels: bool = True,
) -> dict[str, Tensor]:
    """Random inputs with labels; `padding` ("right" or "left") gives every sample a length of its own."""
    task = task or default_task(family)
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if family in VISION:
        inputs = {"pixel_values": torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
        if labels and task != "base":
            inputs["labels"] = integers(LABELS, batch)
        return inputs
    ids = integers(VOCABULARY, batch, length, low=3)
    mask = torch.ones(batch, length, dtype=torch.int64)
    if padding is not None:
        for row in range(batch):
            padded = min(row, length - 3)
            mask[row, length - padded :] = 0
        if padding == "left":
            mask = mask.flip(1)
        elif padding != "right":
            raise ValueError(f"padding must be None, 'right' or 'left', got {padding!r}")
        ids = ids.masked_fill(mask == 0, PAD)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if not labels or task == "base":
        return inputs
    if task == "sequence_classification":
        inputs["labels"] = integers(LABELS, batch)
    elif task == "regression":
        inputs["labels"] = torch.randn(batch, generator=generator)
    elif task == "multi_label":
        inputs["labels"] = integers(2, batch, LABELS).float()
    elif task == "question_answering":
        first = mask.argmax(1)
        inputs["start_positions"] = first + integers(2, batch)
        inputs["end_positions"] = inputs["start_positions"] + 1
    else:
        targets = integers(LABELS, batch, length) if task == "token_classification" else ids.clone()
        if task == "masked_lm":
            targets[:, 1::2] = -100
        inputs["labels"] = targets.masked_fill(mask == 0, -100)
    return inputs


def random_gates(batch: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gates between 0 and 1 with zeros among them: [L, H] and [L, F], or [B, L, H] and [B, L, F]."""
    generator = torch.Generator().manual_seed(seed)
    lead = () if batch is None else (batch,)
    drawn = [torch.rand(*lead, LAYERS, width, generator=generator, dtype=dtype) for width in (HEADS, FILTERS)]
    heads, filters = (torch.where(gate < 0.2, 0.0, gate) for gate in drawn)
    return heads, filters


def unit_gates(batch: int | None = None) -> tuple[Tensor, Tensor]:
    """Gates of one, which change nothing."""
    lead = () if batch is None else (batch,)
    return torch.ones(*lead, LAYERS, HEADS), torch.ones(*lead, LAYERS, FILTERS)
