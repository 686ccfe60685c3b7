"""What an instrumented model keeps: generation, compilation, checkpointing, copies, LoRA, saving; and every backend."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import (
    DECODERS,
    FAMILIES,
    FILTERS,
    HEADS,
    LAYERS,
    MORE_DECODERS,
    MORE_FAMILIES,
    VISION,
    of_every_kind,
    random_gates,
    tiny_batch,
    tiny_model,
    unit_gates,
)
from torch._dynamo.testing import CompileCounterWithBackend
from triton_tools import interpreted

from pymape.model_layout import find_layers
from pymape.modules import gates, instrument, is_instrumented, restore, set_gates


@pytest.mark.parametrize("family", DECODERS + MORE_DECODERS)
def test_generation_with_a_cache_gives_the_same_tokens(family: str) -> None:
    model = tiny_model(family)
    batch = tiny_batch(family, padding="left", labels=False)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    original, beams = model.generate(**batch, **options), model.generate(**batch, **options, num_beams=2)
    instrument(model)
    with gates(model, *unit_gates()):
        assert torch.equal(model.generate(**batch, **options), original)
        assert torch.equal(model.generate(**batch, **options, num_beams=2), beams)
    for lead in (None, 3):
        with gates(model, *random_gates(batch=lead)):
            cached = model.generate(**batch, **options)
            assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    with gates(model, *unit_gates(3)), pytest.raises(ValueError, match=r"one row per row of the batch \(6\), got 3"):
        model.generate(**batch, **options, num_beams=2)


def test_gates_reach_decoding_steps() -> None:
    """With every module off, a model predicts from the last token alone."""
    model = instrument(tiny_model("llama"))
    batch = tiny_batch("llama", labels=False)
    with gates(model, torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, FILTERS)):
        tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)
        last = tokens[:, -2:-1]
        assert torch.equal(model(last).logits[:, -1].argmax(-1), tokens[:, -1])


@pytest.mark.parametrize(
    "family, implementation", [*of_every_kind(("bert", "llama", "gptj")), ("modernbert", "sdpa"), ("phi3", "sdpa")]
)
def test_compiles_to_one_graph(family: str, implementation: str) -> None:
    model = instrument(tiny_model(family, attn_implementation=implementation))
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    batch = tiny_batch(family)
    for seed in (0, 1):  # gates of the same shape need no second graph
        heads, filters = (gate.requires_grad_() for gate in random_gates(batch=3, seed=seed))
        set_gates(model, heads, filters)
        expected, actual = model(**batch), compiled(**batch)
        torch.testing.assert_close(actual.logits, expected.logits)
        expected_grads = torch.autograd.grad(expected.loss, (heads, filters))
        torch.testing.assert_close(torch.autograd.grad(actual.loss, (heads, filters)), expected_grads)
    assert graphs.frame_count == 1


def test_compiles_with_inductor() -> None:
    model = instrument(tiny_model("bert", num_hidden_layers=1)).requires_grad_(False)
    batch = tiny_batch("bert", labels=False)
    with gates(model, *(gate[:1] for gate in random_gates())), torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_gradient_checkpointing(family: str) -> None:
    model = instrument(tiny_model(family))
    batch = tiny_batch(family)
    learned = [gate.requires_grad_() for gate in random_gates()]
    set_gates(model, *learned)
    expected = torch.autograd.grad(model(**batch).loss, learned)
    model.train()
    # transformers 5.17 knows the older name only.
    checkpoint = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    checkpoint({"use_reentrant": False})
    set_gates(model, *learned)
    torch.testing.assert_close(torch.autograd.grad(model(**batch).loss, learned), expected)
    checkpoint({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False, got True"):
        set_gates(model, *learned)
    set_gates(model, *random_gates())
    if family != "deberta-v2":  # its layers share one graph of relative positions, which that variant frees
        model(**batch).loss.backward()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert", "gpt_neo"])
def test_a_deep_copy_has_gates_of_its_own(family: str) -> None:
    model = instrument(tiny_model(family))
    batch = tiny_batch(family)
    set_gates(model, *(gate.requires_grad_() for gate in random_gates()))
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, expected)
    set_gates(twin, *random_gates(seed=1))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.allclose(twin(**batch).logits, expected)
    restore(twin)
    assert torch.equal(model(**batch).logits, expected)
    assert is_instrumented(model)
    assert not is_instrumented(twin)


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "qwen2"])
def test_attention_weights_are_still_there(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    batch = tiny_batch(family)
    expected = model(**batch, output_attentions=True).attentions
    set_gates(instrument(model), *unit_gates())
    for actual, weights in zip(model(**batch, output_attentions=True).attentions, expected, strict=True):
        torch.testing.assert_close(actual, weights)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_lora_layers_are_called(family: str, when: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    batch = tiny_batch(family)
    plain = tiny_model(family)(**batch).logits
    torch.manual_seed(0)
    expected = peft.get_peft_model(tiny_model(family), config)(**batch)
    expected.loss.backward()
    torch.manual_seed(0)
    if when == "before":
        model = instrument(peft.get_peft_model(tiny_model(family), config))
    else:
        model = peft.get_peft_model(instrument(tiny_model(family)), config)
    set_gates(model, *unit_gates())
    output = model(**batch)
    assert (output.logits - plain).abs().max() > 1e-3
    torch.testing.assert_close(output.logits, expected.logits)
    restore(model)
    torch.testing.assert_close(model(**batch).logits, expected.logits, rtol=0, atol=0)


def test_a_model_without_the_interface_is_wrapped_before_it_gets_gates() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model("gpt_neo"), config)
    batch, (heads, filters) = tiny_batch("gpt_neo"), random_gates()
    plain, merged = model(**batch).logits, copy.deepcopy(model).merge_and_unload()
    with gates(instrument(model), heads, filters):
        gated = model(**batch).logits
    with gates(instrument(merged), heads, filters):
        torch.testing.assert_close(gated, merged(**batch).logits)
    assert torch.equal(restore(model)(**batch).logits, plain)
    wrapped = instrument(peft.get_peft_model(tiny_model("gpt_neo"), config))
    set_gates(wrapped, heads, filters)
    left = wrapped.merge_and_unload()
    with pytest.raises(ValueError, match="got another W_O: restore it"):
        set_gates(left, heads, filters)
    merged = peft.get_peft_model(tiny_model("gpt_neo"), config).merge_and_unload()
    merged.load_state_dict(left.state_dict())
    assert torch.equal(restore(left)(**batch).logits, merged(**batch).logits)
    model = peft.get_peft_model(instrument(tiny_model("gpt_neo")), config)
    with pytest.raises(ValueError, match="got another W_O: restore it, wrap, instrument"):
        set_gates(model, heads, filters)
    assert not any(module._forward_pre_hooks for module in restore(model).modules())


def test_hooks_on_linear_layers_are_called() -> None:
    model = instrument(tiny_model("bert"))
    set_gates(model, *unit_gates())
    seen = []
    find_layers(model)[0].ffn_in.register_forward_hook(lambda *_: seen.append(True))
    model(**tiny_batch("bert"))
    assert seen == [True]


def test_saving_an_instrumented_model_saves_the_plain_model(tmp_path: Path) -> None:
    model = tiny_model("bert")
    batch = tiny_batch("bert")
    expected = model(**batch).logits
    set_gates(instrument(model), *random_gates())
    model.save_pretrained(tmp_path)
    assert "pymape" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert not is_instrumented(loaded)
    assert torch.equal(loaded(**batch).logits, expected)


def assert_backend_agrees(family: str, backend: str, device: str, padding: str | None) -> None:
    model = tiny_model(family).to(device)
    batch = {k: v.to(device) for k, v in tiny_batch(family, padding=padding).items()}
    results = []
    for chosen in ("reference", backend):
        learned = [gate.to(device).requires_grad_() for gate in random_gates(batch=3)]
        set_gates(instrument(model, backend=chosen), *learned)
        loss = model(**batch).loss
        results.append((loss, *torch.autograd.grad(loss, learned)))
        restore(model)
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family, padding", [("vit", None), ("gpt2", None), ("llama", "left"), ("phi3", "left")])
@interpreted
def test_triton_backend_agrees_with_the_reference(family: str, padding: str | None) -> None:
    assert_backend_agrees(family, "triton", "cpu", padding)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
@pytest.mark.parametrize("family", [*FAMILIES, "deberta-v2", "modernbert", "gpt_neox", "gemma2", "phi3"])
def test_gpu_backends_agree_with_the_reference(family: str, backend: str) -> None:
    assert_backend_agrees(family, backend, "cuda", None if family in VISION else "left")
