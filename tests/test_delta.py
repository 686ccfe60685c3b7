"""Deltas: the same bits in a copy, and refused where they do not belong."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from model_zoo import FAMILIES, tiny_batch, tiny_model
from partial_tools import some_masks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from pymape.delta import DeltaPart, apply_delta, inside_digest
from pymape.model_layout import find_layers
from pymape.partial import PartialParameters


def test_the_digest_of_parts_is_that_of_released_deltas():
    parts = [DeltaPart("b", 1, torch.tensor([0, 2])), DeltaPart("a", 0, None)]
    digest = inside_digest(parts, lambda part: torch.arange(3.0) if part.name == "a" else torch.ones(2, 2))
    assert digest == "d9c7859b0ba3798c4bcb86ae7afe8184fc5a83dd46b9dda2b41f4a871b9e96df"


def trained(
    family: str, path, task_head: bool = False, task: str | None = None
) -> tuple[nn.Module, nn.Module, PartialParameters]:
    """The original model, the unlearned one, and what trained it; the change lies in `path`."""
    original = tiny_model(family, task)
    model = copy.deepcopy(original)
    partial = PartialParameters(model, some_masks(model), train_task_head=task_head)
    optimizer = torch.optim.AdamW(partial.parameters(), lr=0.1)
    partial.attach(optimizer)
    model(**tiny_batch(family, task)).loss.backward()
    optimizer.step()
    partial.export_delta(path, {"request": "r1"})
    return original, model, partial


@pytest.mark.parametrize("family", FAMILIES)
def test_a_delta_brings_a_copy_to_the_same_bits(family, tmp_path):
    path = tmp_path / "delta.safetensors"
    original, _, partial = trained(family, path)
    number = partial.numel()
    merged = partial.merge().state_dict()
    assert apply_delta(original, path) is original
    assert all(torch.equal(value, merged[name]) for name, value in original.state_dict().items())
    apply_delta(original, path)  # once more changes nothing
    assert all(torch.equal(value, merged[name]) for name, value in original.state_dict().items())
    again = tmp_path / "again.safetensors"
    partial.export_delta(again, {"request": "r1"})  # after merge
    before, after = load_file(path), load_file(again)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert sum(value.numel() for name, value in before.items() if not name.endswith(":index")) == number


def test_a_delta_holds_the_task_head_and_provenance(tmp_path):
    path = tmp_path / "delta.safetensors"
    original, model, _ = trained("bert", path, task_head=True)
    assert not torch.equal(original.classifier.weight, model.classifier.weight)
    apply_delta(original, path)
    assert torch.equal(original.classifier.weight, model.classifier.weight)
    with safe_open(path, framework="pt") as file:
        provenance = json.loads(file.metadata()["provenance"])
    assert provenance["request"] == "r1"
    assert provenance["versions"]["torch"] == torch.__version__


def test_a_delta_of_a_head_with_tied_parameters(tmp_path):
    path = tmp_path / "delta.safetensors"
    original, _, partial = trained("bert", path, task_head=True, task="masked_lm")
    before = original.state_dict()["cls.predictions.decoder.bias"].clone()  # another name of cls.predictions.bias
    merged = partial.merge().state_dict()
    apply_delta(original, path)
    assert all(torch.equal(value, merged[name]) for name, value in original.state_dict().items())
    assert not torch.equal(merged["cls.predictions.decoder.bias"], before)


def test_a_copy_in_another_dtype_is_told_how_to_be_loaded(tmp_path):
    path, model = tmp_path / "delta.safetensors", tiny_model("bert").bfloat16()
    deployed = copy.deepcopy(model)
    partial = PartialParameters(model.float(), some_masks(model))
    partial.export_delta(path)
    with pytest.raises(ValueError, match=r"model must have the dtype .* load the copy with dtype=torch.float32$"):
        apply_delta(deployed, path)
    apply_delta(deployed.float(), path)


def test_a_delta_is_refused_where_it_does_not_belong(tmp_path):
    path = tmp_path / "delta.safetensors"
    original, _, partial = trained("bert", path)
    before = copy.deepcopy(original.state_dict())
    with pytest.raises(ValueError, match="delta must fit the model"):
        apply_delta(tiny_model("gpt2"), path)
    for layer in (original.bert.embeddings.LayerNorm, find_layers(original)[1].query):  # outside the masks, inside
        with torch.no_grad():
            layer.bias[-1 if layer is original.bert.embeddings.LayerNorm else 0] += 1
        with pytest.raises(ValueError, match=r"model must hold the weights \w+ that training began with"):
            apply_delta(original, path)
        original.load_state_dict(before)
    content = path.read_bytes()
    for damaged in (content[:-3], content[:-3] + bytes([content[-3] ^ 1]) + content[-2:], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged file|must be a safetensors file"):
            apply_delta(original, path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"delta must have format 'pymape.delta.1', got None"):
        apply_delta(original, path)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    partial.merge()
    dense = PartialParameters(original)
    with pytest.raises(ValueError, match="export_delta needs masks"):
        dense.export_delta(path)
