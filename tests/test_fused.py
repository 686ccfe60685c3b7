"""Fused norms and gated feed-forward blocks against the original code, in models whose selected parameters train."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from model_zoo import FAMILIES, FUSED_NORMS, GATED, MORE_FAMILIES, tiny_batch, tiny_model
from partial_tools import some_masks
from torch import nn
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from transformers import TrainingArguments

from pymape.fused import _RMSNorm
from pymape.masks import ModuleMasks
from pymape.modules import gates, instrument, is_instrumented, restore
from pymape.partial import PartialParameters
from pymape.trainer import UnlearnTrainer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def partial_gradients(model: nn.Module, batch: dict, fused: bool | None) -> list[torch.Tensor]:
    partial = PartialParameters(model, some_masks(model), fused=fused)
    found = torch.autograd.grad(model(**batch).loss, list(partial.parameters()))
    partial.merge()
    return list(found)


def kept_bytes(model: nn.Module, batch: dict) -> int:
    """Bytes of all tensors that a forward pass keeps for its backward pass, the parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss  # held, so that no storage is reused
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("device", DEVICES, ids=["cpu", "gpu"])
@pytest.mark.parametrize("family", GATED)
def test_outputs_and_gradients_are_the_same_but_for_rounding(family: str, device: str) -> None:
    model = tiny_model(family).to(device)
    batch = {name: value.to(device) for name, value in tiny_batch(family).items()}
    exact = partial_gradients(copy.deepcopy(model).double(), batch, fused=False)
    plain, fused = (partial_gradients(model, batch, fused=choice) for choice in (False, True))
    for one, own, other in zip(exact, plain, fused, strict=True):
        least = 1e-6 * one.abs().max()
        assert (other - one).abs().max() <= 2 * (own - one).abs().max() + least


@pytest.mark.parametrize("family", FUSED_NORMS)
def test_in_half_precision_less_is_kept(family: str) -> None:
    model, batch = tiny_model(family).bfloat16(), tiny_batch(family)
    kept = {}
    for choice in (False, True):
        partial = PartialParameters(model, some_masks(model), fused=choice)
        kept[choice] = kept_bytes(model, batch)
        partial.merge()
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    tokens, config = batch["input_ids"].numel(), model.config
    layers = config.num_hidden_layers
    # act(gate) of every layer, and half of the fp32 input of every norm of hidden states but the first, which needs no
    # gradient, as the embeddings are frozen.
    saved = 2 * tokens * layers * config.intermediate_size
    saved += 2 * tokens * config.hidden_size * (sum(norm.weight.numel() == config.hidden_size for norm in norms) - 1)
    assert kept[False] - kept[True] >= saved


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_on_a_cpu_the_original_code_runs_unless_asked(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    before = model(**batch).logits
    for choice in (None, False, True):
        partial = PartialParameters(model, some_masks(model), fused=choice)
        logits = model(**batch).logits
        assert torch.equal(logits, before) == (choice is not True or family not in GATED)
        torch.testing.assert_close(logits, before)
        partial.merge()
        assert not any({"forward", "_pymape"} & vars(module).keys() for module in model.modules())
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("first", ["instrument", "partial"])
@pytest.mark.parametrize("last", ["restore", "merge"])
def test_together_with_gates(first: str, last: str) -> None:
    model, batch = tiny_model("llama"), tiny_batch("llama")
    before, masks = model(**batch).logits, some_masks(model)
    if first == "instrument":
        instrument(model)
    partial = PartialParameters(model, masks, fused=True)
    assert is_instrumented(model) == (first == "instrument")
    if first == "partial":
        instrument(model)
    fused = model(**batch).logits
    assert not torch.equal(fused, before)
    ones = {"heads": torch.ones(masks.heads.shape), "filters": torch.ones(masks.filters.shape)}
    with gates(model, **ones):
        torch.testing.assert_close(model(**batch).logits, before)
    assert torch.equal(model(**batch).logits, fused)
    if last == "merge":
        restore(model)
        assert not is_instrumented(model)
        assert torch.equal(model(**batch).logits, fused)
        partial.merge()
    else:
        partial.merge()
        assert is_instrumented(model)
        assert torch.equal(model(**batch).logits, before)
        restore(model)
    assert torch.equal(model(**batch).logits, before)
    assert not any({"forward", "_pymape"} & vars(module).keys() for module in model.modules())


def test_a_copy_has_parts_of_its_own() -> None:
    model, batch = tiny_model("qwen3"), tiny_batch("qwen3")
    PartialParameters(model, some_masks(model), fused=True)
    before, other = model(**batch).logits, copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(**batch).logits.any()
    assert torch.equal(model(**batch).logits, before)


def test_what_is_hooked_is_left_alone() -> None:
    model, batch = tiny_model("llama"), tiny_batch("llama")
    calls = []
    layer = model.model.layers[0]
    for module in (layer.mlp.act_fn, layer.input_layernorm):
        module.register_forward_hook(lambda module, *_: calls.append(module))
    partial = PartialParameters(model, some_masks(model), fused=True)
    model(**batch)
    assert calls == [layer.input_layernorm, layer.mlp.act_fn]
    partial.merge()
    assert not any({"forward", "_pymape"} & vars(module).keys() for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, batch = tiny_model("mistral"), tiny_batch("mistral")
    plain = partial_gradients(model, batch, fused=True)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    partial = PartialParameters(model, some_masks(model), fused=True)
    model(**batch).loss.backward()
    for one, parameter in zip(plain, partial.parameters(), strict=True):
        torch.testing.assert_close(one, parameter.grad)


def test_gradient_of_the_norm() -> None:
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.rand(5, dtype=torch.float64)
    assert gradcheck(lambda x: _RMSNorm.apply(x, weight, 1e-6), (x,))
    torch.testing.assert_close(_RMSNorm.apply(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (5,), weight, 1e-6))


@pytest.mark.parametrize("what", ["subclass", "patched class", "foreign norm", "hooked since", "replaced since"])
def test_what_computes_something_else_is_left_alone(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_model("llama"), tiny_batch("llama")
    mlp = model.model.layers[1].mlp
    if what == "subclass":
        other = {"forward": lambda self, x: self.down_proj(x @ x.mT @ self.up_proj(x))}
        mlp.__class__ = type("LlamaMLP", (type(mlp),), other)
    elif what == "patched class":
        monkeypatch.setattr(type(mlp), "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    elif what == "foreign norm":
        own = type(model.model.norm)
        model.model.norm.__class__ = type("LlamaRMSNorm", (own,), {"forward": lambda self, x: own.forward(self, x) + 1})
    partial = PartialParameters(model, some_masks(model), fused=True)
    if what == "hooked since":
        mlp.act_fn.register_forward_hook(lambda *_: torch.zeros(()))
    elif what == "replaced since":
        mlp.act_fn = nn.Tanh()
    fused = model(**batch).logits
    torch.testing.assert_close(partial.merge()(**batch).logits, fused)


def test_below_the_lowest_layer_nothing_changes() -> None:
    model = tiny_model("llama")
    masks = some_masks(model)
    masks = ModuleMasks(*(mask.clone() for mask in (masks.heads, masks.filters)), masks.layout)
    masks.heads[0] = masks.filters[0] = False
    PartialParameters(model, masks, fused=True)
    replaced = {name for name, module in model.named_modules() if {"_pymape", "_pymape_fused_on"} & vars(module).keys()}
    assert replaced
    assert not any(name.startswith("model.layers.0") for name in replaced)


def test_forwards_of_somebody_else_stay() -> None:
    model, batch = tiny_model("llama"), tiny_batch("llama")
    partial = PartialParameters(model, some_masks(model), fused=True)
    mlp, norm = model.model.layers[0].mlp, model.model.norm
    mlp.forward = lambda x: x
    norm.forward = lambda x: 2 * x
    after = model(**batch).logits
    torch.testing.assert_close(partial.merge()(**batch).logits, after)
    assert not any("_pymape" in name for module in model.modules() for name in vars(module))


def test_the_trainer_passes_it_on(tmp_path: Path) -> None:
    model = tiny_model("llama")
    records = [{"input_ids": [5, 6, 7], "attention_mask": [1] * 3, "labels": [5, 6, 7]}] * 2
    args = TrainingArguments(str(tmp_path), save_strategy="no", report_to="none", max_steps=1, learning_rate=0.1)
    trainer = UnlearnTrainer(model, args, forget_dataset=records, objective="ga", masks=some_masks(model), fused=True)
    assert "_pymape_fused_on" in vars(model.model.norm)
    trainer.train()
    trainer.merge()
    assert "_pymape_fused_on" not in vars(model.model.norm)
