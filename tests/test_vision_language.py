"""Models of texts and images: what is masked and trained is the language model inside them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from model_zoo import FILTERS, HEADS, LAYERS, random_gates, unit_gates
from torch import Tensor, nn
from transformers import TrainingArguments

import pymape
from pymape.data.positions import with_positions
from pymape.frozen_prefix import FrozenPrefix
from pymape.masks import ModuleMasks
from pymape.model_layout import find_layers, layout
from pymape.modules import gates, instrument, restore, set_gates
from pymape.partial import PartialParameters
from pymape.prefix_cache import PrefixCache
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import S3TConfig

HEAD_DIM = {"llava": 8, "gemma3": 8, "qwen2_vl": 4, "qwen2_5_vl": 4, "qwen3_vl": 8}
KINDS = tuple(HEAD_DIM)
IMAGE, IMAGE_TOKENS = 45, 4
TEXT = {
    "hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": FILTERS, "vocab_size": 50, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20, "image_size": 8,
    "patch_size": 4, "initializer_range": 0.2,
}  # fmt: skip


def tiny(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    if kind == "llava":
        config = transformers.LlavaConfig(
            text_config={**TEXT, "model_type": "llama"},
            vision_config={**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
            image_token_index=IMAGE,
        )
    elif kind == "gemma3":
        config = transformers.Gemma3Config(
            text_config=TEXT, vision_config=VISION, mm_tokens_per_image=IMAGE_TOKENS, image_token_index=IMAGE
        )
    else:
        head_dim = HEAD_DIM[kind]
        sections = [1, 1, head_dim // 2 - 2]
        rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4}
        vision = {"depth": 2, "num_heads": 4, "patch_size": 4, "intermediate_size": 20, "hidden_size": 16}
        if kind == "qwen2_vl":
            vision |= {"embed_dim": 16, "mlp_ratio": 1}
        else:
            vision |= {"out_hidden_size": 16}
        if kind == "qwen3_vl":
            vision["deepstack_visual_indexes"] = [0]
        config = transformers.AutoConfig.for_model(
            kind,
            text_config={**TEXT, "head_dim": head_dim, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            vision_start_token_id=46,
            vision_end_token_id=47,
            video_token_id=44,
        )
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def make_records(kind: str, count: int = 6) -> list[dict[str, Any]]:
    """One image each, its tokens between others; texts of one length."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for row in range(count):
        tokens = torch.randint(3, 40, (4 + IMAGE_TOKENS,), generator=generator)
        tokens[1 : 1 + IMAGE_TOKENS] = IMAGE
        record = {"id": f"r{row}", "input_ids": tokens, "labels": tokens.where(tokens != IMAGE, -100)}
        record["attention_mask"] = torch.ones_like(tokens)
        if kind.startswith("qwen"):  # four by four patches, of which four make a token
            record["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
            record["image_grid_thw"] = torch.tensor([1, 4, 4])
        else:
            record["pixel_values"] = torch.randn(3, 8, 8, generator=generator)
        if kind != "llava":
            name = "token_type_ids" if kind == "gemma3" else "mm_token_type_ids"
            record[name] = (tokens == IMAGE).long()
        made.append(record)
    return made


def collate(records: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = {name: torch.stack([record[name] for record in records]) for name in records[0] if name != "id"}
    if "image_grid_thw" in batch:
        batch["pixel_values"] = batch["pixel_values"].flatten(0, 1)
    return batch


def batch_of(kind: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch = collate(make_records(kind, 3))
    return batch | {"pixel_values": batch["pixel_values"].to(dtype)}


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_is_that_of_the_language_model(kind: str) -> None:
    found = layout(tiny(kind))
    expected = (2, 4, 2, HEAD_DIM[kind], FILTERS)
    assert (found.layers, found.heads, found.kv_heads, found.head_dim, found.filters) == expected
    names = {module: name for name, module in tiny(kind).named_modules()}
    assert not any("vision" in name or "visual" in name for name in names.values() if name.endswith("language_model"))
    model = tiny(kind)
    layers = [layer.layer for layer in find_layers(model)]
    assert layers == list(model.get_decoder().layers)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_scale_the_language_model_alone(kind: str) -> None:
    model, batch = tiny(kind, torch.float64), batch_of(kind, torch.float64)
    heads, filters = random_gates(dtype=torch.float64)
    plain, scaled = model(**batch).logits, copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(find_layers(scaled)):
            layer.output.weight.mul_(heads[index].repeat_interleave(layer.head_dim))
            layer.ffn_out.weight.mul_(filters[index])
    instrument(model, backend="reference")
    with gates(model, *(gate.double() for gate in unit_gates(3))):
        assert torch.equal(model(**batch).logits, plain)
    with gates(model, heads, filters):
        torch.testing.assert_close(model(**batch).logits, scaled(**batch).logits, rtol=1e-12, atol=1e-12)
    assert torch.equal(restore(model)(**batch).logits, plain)
    assert not any("pymape" in str(getattr(part.config, "_attn_implementation", "")) for part in parts(model))


def parts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_every_records_own_gradient(kind: str) -> None:
    model, records = tiny(kind), make_records(kind, 4)
    found = pymape.importance(model, records, batch_size=4, collate_fn=collate)
    instrument(model, backend="reference")
    for row, record in enumerate(records):
        own = [gate.requires_grad_() for gate in unit_gates()]
        set_gates(model, *own)
        grads = torch.autograd.grad(model(**collate([record])).loss, own)
        for got, expected in zip((found.heads[row], found.filters[row]), grads, strict=True):
            torch.testing.assert_close(got.view_as(expected), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [False, True])
def test_unlearning_changes_what_the_masks_select_alone(kind: str, fused: bool, tmp_path: Path) -> None:
    model, records = tiny(kind), make_records(kind)
    before = copy.deepcopy(model.state_dict())
    masks = ModuleMasks.random(layout(model), budget=0.3, seed=1)
    args = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = pymape.UnlearnTrainer(
        model, args, forget_dataset=records[:3], retain_dataset=records[3:], objective="npo", masks=masks,
        data_collator=collate, fused=fused,
    )  # fmt: skip
    with pytest.raises(ValueError, match="resume_from_checkpoint must be None for a model of texts and images"):
        trainer.train(resume_from_checkpoint=str(tmp_path))
    trainer.train()
    after = trainer.merge().state_dict()
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed
    assert all(".language_model.layers." in name for name in changed)
    total = sum(int((after[name] != before[name]).sum()) for name in changed)
    assert 0 < total <= masks.cost() * masks.layout.total_cost


def test_positions_are_left_to_the_model() -> None:
    model, batch = tiny("qwen3_vl"), batch_of("qwen3_vl")
    batch["attention_mask"][0, 0] = 0
    assert with_positions(model, batch) is batch


def test_what_makes_tokens_of_images_stays_in_eval_mode_below_what_trains() -> None:
    model, batch = tiny("llava"), batch_of("llava")
    masks = ModuleMasks.random(layout(model), budget=0.3, seed=1)
    masks.heads[0], masks.filters[0] = False, False
    for part in model.model.vision_tower.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.5
    partial = PartialParameters(model, masks)
    model.train()
    assert not any(part.training for part in model.model.vision_tower.modules())
    assert not any(part.training for part in model.model.multi_modal_projector.modules())
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert partial.merge().train().model.vision_tower.training


def test_what_reads_texts_alone_says_so(tmp_path: Path) -> None:
    model = tiny("llava")
    with pytest.raises(ValueError, match="texts or images alone for a prefix cache, got LlavaForConditionalGeneration"):
        FrozenPrefix(model, 1, PrefixCache(tmp_path))
    with pytest.raises(ValueError, match="texts or images alone, got LlavaForConditionalGeneration"):
        SlicedAdapters(model, S3TConfig("model", slices=2))


def test_encoder_decoders_are_no_language_models() -> None:
    config = transformers.T5Config(d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16, vocab_size=50)
    with pytest.raises(ValueError, match="'t5' is not supported"):
        layout(transformers.T5ForConditionalGeneration(config))
    with pytest.raises(ValueError, match=r"task head among .*, got T5ForConditionalGeneration"):
        pymape.losses.task_of(transformers.T5ForConditionalGeneration(config))
