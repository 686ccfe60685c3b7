"""Instrumented Hugging Face models: the same outputs, gradients and abilities as the originals, plus gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from model_zoo import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    FILTERS,
    HEADS,
    LAYERS,
    MORE_DECODERS,
    MORE_ENCODERS,
    MORE_FAMILIES,
    VISION,
    of_every_kind,
    random_gates,
    tiny_batch,
    tiny_model,
    unit_gates,
)
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import pymape
from pymape import architectures
from pymape.architectures import register_architecture
from pymape.masks import ModuleMasks
from pymape.model_layout import find_layers, layout
from pymape.modules import apply_masks, gates, instrument, is_instrumented, restore, set_gates


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of the loss with respect to every parameter."""
    model.zero_grad(set_to_none=True)
    output = model(**batch)
    output.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), grads


def assert_same(
    actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], **tolerance: float
) -> None:
    tolerance = tolerance or {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(actual[0], expected[0], **tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(actual[1][name], grad, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per_sample"])
@pytest.mark.parametrize("family, implementation", of_every_kind(FAMILIES + MORE_FAMILIES))
def test_gates_of_one_change_nothing(family: str, implementation: str, per_sample: bool) -> None:
    batch = tiny_batch(family, padding=None if family in VISION else "left")
    model = tiny_model(family, attn_implementation=implementation)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    original = run(model, batch)
    for backend in ("reference", "auto"):
        instrument(model, backend=backend)
        assert_same(run(model, batch), original)
        set_gates(model, *unit_gates(3 if per_sample else None))
        assert_same(run(model, batch), original, **({} if backend == "reference" else {"rtol": 1e-4, "atol": 1e-5}))
        assert state.keys() == model.state_dict().keys()
        restore(model)
        assert_same(run(model, batch), original)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
        assert model.config._attn_implementation == implementation


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_a_gate_scales_the_columns_of_w_o_and_w_out(family: str, backend: str) -> None:
    batch = tiny_batch(family)
    model = tiny_model(family, dtype=torch.float64)
    heads, filters = random_gates(dtype=torch.float64)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(find_layers(scaled)):
            head_gate = heads[index].repeat_interleave(layer.head_dim)
            for linear, gate in ((layer.output, head_gate), (layer.ffn_out, filters[index])):
                linear.weight.mul_(gate if isinstance(linear, nn.Linear) else gate[:, None])
    instrument(model, backend=backend)
    with gates(model, heads, filters):
        torch.testing.assert_close(model(**batch).logits, scaled(**batch).logits, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_ablation_is_zeroing_the_selected_columns(family: str) -> None:
    batch = tiny_batch(family)
    model = tiny_model(family)
    masks = ModuleMasks.random(layout(model), budget=0.3, seed=1)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(find_layers(zeroed)):
            module, name, dim, columns = layer.head_slices(masks.head_groups[index].nonzero().flatten())[-1]
            getattr(module, name).index_fill_(dim, columns, 0.0)
            module, name, dim, columns = layer.filter_slices(masks.filters[index].nonzero().flatten())[-1]
            getattr(module, name).index_fill_(dim, columns, 0.0)
    plain = model(**batch).logits
    assert apply_masks(model, masks) is model
    ablated = model(**batch).logits
    torch.testing.assert_close(ablated, zeroed(**batch).logits)
    assert (ablated - plain).abs().max() > 1e-3
    assert torch.equal(restore(model)(**batch).logits, plain)


def test_apply_masks_refuses_other_masks() -> None:
    model = tiny_model("bert")
    masks = ModuleMasks.random(layout(tiny_model("bert", vocab_size=51)), budget=0.3)
    with pytest.raises(ValueError, match="masks must fit the model"):
        apply_masks(model, masks)
    assert not is_instrumented(model)


@pytest.mark.parametrize("as_list", [False, True], ids=["tensor", "list"])
@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "qwen3", "modernbert", "gpt_neox", "gemma2", "phi3"])
def test_per_sample_gates_and_their_gradients_equal_one_sample_at_a_time(family: str, as_list: bool) -> None:
    model = instrument(tiny_model(family, dtype=torch.float64)).requires_grad_(False)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(family, labels=False).items()}
    heads, filters = (gate.requires_grad_() for gate in random_gates(batch=3, dtype=torch.float64))
    if as_list:
        set_gates(model, list(heads.unbind(1)), list(filters.unbind(1)))
    else:
        set_gates(model, heads, filters)
    logits = model(**batch).logits
    grads = torch.autograd.grad(logits.sin().sum(), (heads, filters))
    for n in range(3):
        own = [gate[n].detach().requires_grad_() for gate in (heads, filters)]
        set_gates(model, *own)
        alone = model(**{k: v[n : n + 1] for k, v in batch.items()}).logits
        torch.testing.assert_close(alone[0], logits[n], rtol=1e-10, atol=1e-12)
        for together, single in zip(grads, torch.autograd.grad(alone.sin().sum(), own), strict=True):
            assert single.any()
            torch.testing.assert_close(together[n], single, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family, implementation", of_every_kind(ENCODERS + DECODERS + MORE_ENCODERS + MORE_DECODERS))
def test_padding_changes_nothing(family: str, implementation: str, side: str) -> None:
    # Eager attention of the Llama family computes its softmax in fp32, where the fp64 mask value overflows.
    dtype = torch.float64 if implementation == "sdpa" else torch.float32
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if implementation == "sdpa" else {"rtol": 1e-3, "atol": 1e-4}
    model = instrument(tiny_model(family, "base", dtype=dtype, attn_implementation=implementation))
    batch = tiny_batch(family, "base", padding=side)
    heads, filters = (gate.requires_grad_() for gate in random_gates(batch=3, dtype=dtype))
    set_gates(model, heads, filters)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    hidden = model(**batch, position_ids=positions).last_hidden_state
    assert hidden.isfinite().all()
    kept = batch["attention_mask"].bool()
    grads = torch.autograd.grad(hidden[kept].sin().sum(), (heads, filters))
    for n in range(3):
        own = [gate[n].detach().requires_grad_() for gate in (heads, filters)]
        set_gates(model, *own)
        ids = batch["input_ids"][n, kept[n]][None]
        alone = model(input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]).last_hidden_state[0]
        torch.testing.assert_close(hidden[n, kept[n]], alone, **tolerance)
        for together, single in zip(grads, torch.autograd.grad(alone.sin().sum(), own), strict=True):
            torch.testing.assert_close(together[n], single, **tolerance)


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_dropout_in_training_stays_what_it_was(family: str) -> None:
    """Under one seed, gates of one leave a training step with dropout as it was."""
    model = tiny_model(family, dropout=0.3).train()
    batch = tiny_batch(family)
    torch.manual_seed(5)
    original = run(model, batch)
    torch.manual_seed(6)
    assert not torch.equal(run(model, batch)[0], original[0])
    instrument(model, backend="reference")
    set_gates(model, *unit_gates())
    torch.manual_seed(5)
    assert_same(run(model, batch), original)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_bf16_gates_of_one_change_nothing(family: str) -> None:
    model = tiny_model(family, dtype=torch.bfloat16)
    batch = tiny_batch(family)
    original = run(model, batch)
    instrument(model, backend="reference")
    set_gates(model, *unit_gates(3))
    assert_same(run(model, batch), original)
    assert model(**batch).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "family, config",
    [
        ("gpt2", {"reorder_and_upcast_attn": True, "attn_implementation": "eager"}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("distilbert", {"chunk_size_feed_forward": 3}),
        ("bert", {"chunk_size_feed_forward": 1}),
        ("bert", {"hidden_act": "quick_gelu"}),
        ("bert", {"is_decoder": True, "add_cross_attention": True, "task": "causal_lm"}),
        ("mistral", {"sliding_window": 3}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 1}),
    ],
)
def test_unusual_configs(family: str, config: dict[str, Any]) -> None:
    model = tiny_model(family, **config)
    batch = tiny_batch(family, config.get("task"), length=6, padding="left")
    if "add_cross_attention" in config:
        batch["encoder_hidden_states"] = torch.randn(3, 5, 16)
    original = run(model, batch)
    instrument(model)
    set_gates(model, *unit_gates(3))
    assert_same(run(model, batch), original, rtol=1e-4, atol=1e-5)
    set_gates(model, *random_gates(3))
    assert (run(model, batch)[0] - original[0]).abs().max() > 1e-3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_registered_family_can_be_instrumented(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))
    config = transformers.ErnieConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    model = transformers.ErnieModel._from_config(config, attn_implementation=implementation).eval()
    register_architecture("ernie", architectures._ARCHITECTURES["bert"])
    batch = tiny_batch("bert", labels=False)
    plain = model(**batch).last_hidden_state
    instrument(model)
    set_gates(model, torch.ones(2, 4), torch.ones(2, config.intermediate_size))
    torch.testing.assert_close(model(**batch).last_hidden_state, plain)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_any_other_attention_is_gated_behind_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, same = tiny_model(family), instrument(tiny_model(family))
    batch, drawn = tiny_batch(family, padding="left"), random_gates(3)
    calls = []

    def attention(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return sdpa_attention_forward(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "another", attention)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "another", sdpa_mask)
    model.set_attn_implementation("another")
    plain = run(model, batch)
    set_gates(instrument(model), *drawn)
    set_gates(same, *drawn)
    assert_same(run(model, batch), run(same, batch), rtol=1e-4, atol=1e-5)
    assert len(calls) == 2 * LAYERS
    assert_same(run(restore(model), batch), plain)
    assert model.config._attn_implementation == "another"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gates_come_back_after_the_with_block() -> None:
    model = instrument(tiny_model("bert"))
    batch = tiny_batch("bert")
    plain = model(**batch).logits
    set_gates(model, *random_gates(seed=1))
    outer = model(**batch).logits
    with pytest.raises(ValueError, match="one row per row of the batch"), gates(model, *random_gates(batch=2)):
        model(**batch)
    assert torch.equal(model(**batch).logits, outer)
    set_gates(model)
    assert torch.equal(model(**batch).logits, plain)


def test_heads_and_filters_are_gated_apart() -> None:
    model = instrument(tiny_model("bert"))
    batch = tiny_batch("bert")
    heads, filters = random_gates()
    for kept, expected in (
        ({"heads": heads}, (heads, torch.ones(LAYERS, FILTERS))),
        ({"filters": filters}, (torch.ones(LAYERS, HEADS), filters)),
    ):
        set_gates(model, **kept)
        actual = model(**batch).logits
        set_gates(model, *expected)
        torch.testing.assert_close(actual, model(**batch).logits)


def test_a_model_that_shares_its_config_keeps_its_attention() -> None:
    config = tiny_model("bert").config
    one, other = type(tiny_model("bert"))(config).eval(), type(tiny_model("bert"))(config).eval()
    batch = tiny_batch("bert")
    expected = other(**batch).logits
    set_gates(instrument(one), *random_gates())
    assert torch.equal(other(**batch).logits, expected)
    instrument(other)
    set_gates(other, *random_gates())
    restore(one)
    with pytest.raises(ValueError, match=r"keep the attention implementation that pymape\.instrument set, got 'sdpa'"):
        set_gates(other, *random_gates())


class TestErrors:
    def test_instrument(self) -> None:
        model = tiny_model("bert")
        with pytest.raises(ValueError, match=r"backend must be one of auto, .*, got 'fast'"):
            instrument(model, backend="fast")
        model.config.model_type = "ernie"
        with pytest.raises(ValueError, match="'ernie' is not supported"):
            instrument(model)
        assert not is_instrumented(model)
        with pytest.raises(ValueError, match="model is not instrumented"):
            restore(model)
        model = instrument(tiny_model("bert"))
        with pytest.raises(ValueError, match=r"already instrumented; call pymape\.restore"):
            instrument(model)

    def test_instrument_refuses_what_it_cannot_gate(self) -> None:
        model = tiny_model("bert", hidden_act="quick_gelu")
        with pytest.raises(ValueError, match="for the activation QuickGELUActivation, got 'cpu'"):
            instrument(model, backend="cpu")
        model = tiny_model("bert")
        find_layers(model)[1].ffn.forward = lambda x: x
        with pytest.raises(ValueError, match="replaced forward in BertIntermediate"):
            instrument(model)
        assert not is_instrumented(model)

    @pytest.mark.parametrize(
        "heads, message",
        [
            (torch.ones(HEADS), r"heads must have shape \(2, 4\) or \(batch, 2, 4\), got \(4,\)"),
            (torch.ones(LAYERS, 5), r"heads must have shape \(2, 4\) or \(batch, 2, 4\), got \(2, 5\)"),
            ([torch.ones(HEADS)], "heads must have 2 layers, got 1"),
            ([torch.ones(HEADS), torch.ones(3)], r"shape \(4,\) or \(batch, 4\) per layer, got \(3,\)"),
            (torch.ones(LAYERS, HEADS, dtype=torch.bool), "heads must be floating point, got torch.bool"),
        ],
    )
    def test_set_gates(self, heads: Any, message: str) -> None:
        model = tiny_model("bert")
        with pytest.raises(ValueError, match="model must be instrumented"):
            set_gates(model, *unit_gates())
        instrument(model)
        with pytest.raises(ValueError, match=message) as error:
            set_gates(model, heads)
        assert "\n" not in str(error.value)

    def test_batch_of_another_size(self) -> None:
        model = instrument(tiny_model("bert"))
        set_gates(model, filters=unit_gates(2)[1])
        with pytest.raises(ValueError, match=r"one row per row of the batch \(3\), got 2"):
            model(**tiny_batch("bert"))


def test_public_names() -> None:
    assert pymape.instrument is instrument
    assert pymape.restore is restore
    assert pymape.apply_masks is apply_masks
