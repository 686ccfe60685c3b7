"""Records, arguments, masks and trainers for the tests of UnlearnTrainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from model_zoo import IMAGE_SIZE, LABELS, PAD, VOCABULARY, tiny_model
from torch import Tensor
from transformers import TrainingArguments

from pymape.data.records import bare_record
from pymape.losses import per_sample_loss
from pymape.masks import ModuleMasks
from pymape.model_layout import find_layers, layout
from pymape.trainer import UnlearnTrainer

NAMES = [
    "dpo",
    "ft",
    "ga",
    "gd",
    "idk",
    "influence",
    "kl",
    "l1_sparse",
    "match",
    "match_tokens",
    "npo",
    "rl",
    "rmu",
    "simnpo",
    "so",
    "ssd",
]
OPTIONS: dict[str, dict[str, Any]] = {"rmu": {"layer": 1}, "ssd": {"selection": 1.5}}
KINDS = {"bert": "text", "vit": "image", "gpt2": "language", "llama": "language"}


def records(kind: str, count: int, seed: int, prefix: str = "") -> list[dict[str, Any]]:
    """Records with ids; texts of different lengths, images, or token sequences with their own labels."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(count):
        name = {"id": f"{prefix or seed}-{row}"}
        if kind == "image":
            pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
            labels = {"labels": row % LABELS, "alternative_labels": (row + 1) % LABELS}
            rows.append({**name, "pixel_values": pixels, **labels})
            continue
        length = int(torch.randint(3, 8, (), generator=generator))
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        if kind == "language":
            other = tokens.flip(0)[:-1]  # of a length of its own
            rows.append({**name, "input_ids": tokens, "labels": tokens})
            rows[-1] |= {"alternative_input_ids": other, "alternative_labels": other}
        else:
            labels = {"labels": torch.tensor(row % LABELS), "alternative_labels": torch.tensor((row + 1) % LABELS)}
            rows.append({**name, "input_ids": tokens, **labels})
    return rows


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    if "pixel_values" in rows[0]:
        pixels = torch.stack([row["pixel_values"] for row in rows])
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [row["input_ids"] for row in rows]
    batch = {"input_ids": pad(ids, True, PAD), "attention_mask": pad([torch.ones_like(x) for x in ids], True, 0)}
    labels = [row["labels"] for row in rows]
    batch["labels"] = pad(labels, True, -100) if labels[0].ndim else torch.stack(labels)
    return batch


def arguments(path: Path, **options: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(path), "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1,
    }  # fmt: skip
    return TrainingArguments(**defaults | options)


def some_masks(model: torch.nn.Module) -> ModuleMasks:
    shape = layout(model)
    groups = torch.zeros(shape.layers, shape.kv_heads, dtype=torch.bool)
    groups[:, 1] = True
    filters = torch.rand(shape.layers, shape.filters, generator=torch.Generator().manual_seed(1)) < 0.3
    return ModuleMasks(groups.repeat_interleave(shape.group_size, 1), filters, shape)


def make(family: str, path: Path, *, masked: bool = True, forget: int = 4, retain: int = 8, **options: Any):
    model = options.pop("model", None) or tiny_model(family)
    return UnlearnTrainer(
        model,
        options.pop("args", None) or arguments(path),
        forget_dataset=records(KINDS[family], forget, 1),
        retain_dataset=records(KINDS[family], retain, 2),
        unseen_dataset=records(KINDS[family], 5, 3) if "match" in options.get("objective", "") else None,
        masks=some_masks(model) if masked else None,
        **{"data_collator": collate, "objective_options": OPTIONS.get(options.get("objective", "gd")), **options},
    )


def build(path: Path, family: str = "bert", **options: Any) -> UnlearnTrainer:
    """A trainer on three records of each set, with the library's own collator."""
    model = options.pop("model", None) or tiny_model(family)
    defaults = {"forget_dataset": records("text", 3, 1), "retain_dataset": records("text", 3, 2)}
    return UnlearnTrainer(model, options.pop("args", None) or arguments(path), **defaults | options)


def outside(model: torch.nn.Module, masks: ModuleMasks) -> dict[str, Tensor]:
    """Bool mask per state dict entry of what must not change."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    frozen = {name: torch.ones_like(value, dtype=torch.bool) for name, value in model.state_dict().items()}
    for layer, groups, filters in zip(find_layers(model), masks.head_groups, masks.filters, strict=True):
        slices = layer.head_slices(groups.nonzero()[:, 0]) + layer.filter_slices(filters.nonzero()[:, 0])
        for module, name, dim, index in slices:
            frozen[names[id(getattr(module, name))]].index_fill_(dim, index, False)
    return frozen


def mean_loss(model: torch.nn.Module, rows: list[dict[str, Any]]) -> float:
    inputs = collate([bare_record(row) for row in rows])
    with torch.no_grad():
        return float(per_sample_loss(model, inputs, model(**inputs)).mean())
