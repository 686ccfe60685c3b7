"""MaskedMultiheadAttention and MaskedFeedForward against torch's own modules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pymape.layers import MaskedFeedForward, MaskedMultiheadAttention

BATCH, TARGETS, SOURCES, WIDTH, HEADS = 3, 5, 7, 12, 3


def pair(backend: str = "auto", **options: Any) -> tuple[nn.MultiheadAttention, MaskedMultiheadAttention]:
    """torch's module with random biases too, and ours with its state_dict."""
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-0.5, 0.5)
    ours = MaskedMultiheadAttention(WIDTH, HEADS, backend=backend, **options).double()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(batch_first: bool, kdim: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    shapes = [(BATCH, TARGETS, WIDTH), (BATCH, SOURCES, kdim), (BATCH, SOURCES, kdim)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    query, key, value = tensors if batch_first else [x.transpose(0, 1) for x in tensors]
    return query, key, value


def masks(kind: str) -> dict[str, Any]:
    causal = torch.ones(TARGETS, SOURCES, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, SOURCES, dtype=torch.bool)
    padding[1, 5:] = True
    additive = torch.randn(BATCH * HEADS, TARGETS, SOURCES, dtype=torch.float64)
    return {
        "none": {},
        "causal": {"attn_mask": causal},
        "is_causal": {"attn_mask": causal, "is_causal": True},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
        "additive": {"attn_mask": additive},
    }[kind]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", ["none", "causal", "is_causal", "padding", "both", "additive"])
def test_gates_of_one_equal_torch(kind: str, batch_first: bool, need_weights: bool, backend: str) -> None:
    theirs, ours = pair(backend, batch_first=batch_first)
    query, key, value = inputs(batch_first)
    options = {**masks(kind), "need_weights": need_weights}
    expected, expected_weights = theirs(query, key, value, **options)
    actual, weights = ours(query, key, value, **options, head_gate=torch.ones(BATCH, HEADS, dtype=torch.float64))
    torch.testing.assert_close(actual, expected)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights)
    grads = [
        torch.autograd.grad(output.sin().sum(), list(m.parameters()))
        for m, output in ((theirs, expected), (ours, actual))
    ]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("per_sample", [False, True])
def test_a_gate_scales_the_columns_of_the_output_projection(per_sample: bool, need_weights: bool) -> None:
    theirs, ours = pair(batch_first=True)
    x = torch.randn(BATCH, TARGETS, WIDTH, dtype=torch.float64)
    gate = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 2.0], [0.5, 0.5, 0.5]], dtype=torch.float64)
    actual, _ = ours(x, x, x, need_weights=need_weights, head_gate=gate if per_sample else gate[0])
    for n in range(BATCH):
        scaled = copy.deepcopy(theirs)
        with torch.no_grad():
            scaled.out_proj.weight.mul_(gate[n if per_sample else 0].repeat_interleave(WIDTH // HEADS))
        sample = x[n : n + 1]
        torch.testing.assert_close(actual[n : n + 1], scaled(sample, sample, sample)[0])


def test_gradient_of_the_gate_is_checked_numerically() -> None:
    _, ours = pair(batch_first=True)
    x = torch.randn(BATCH, TARGETS, WIDTH, dtype=torch.float64)
    gate = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).expand(BATCH, -1).clone().requires_grad_()
    for need_weights in (False, True):
        assert torch.autograd.gradcheck(
            lambda g, w=need_weights: ours(x, x, x, need_weights=w, head_gate=g)[0], (gate,)
        )


def test_without_a_gate_it_is_torch_bit_for_bit() -> None:
    theirs, ours = pair(batch_first=True)
    theirs.eval()
    ours.eval()
    x = torch.randn(BATCH, TARGETS, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for actual, expected in zip(ours(x, x, x), theirs(x, x, x), strict=True):
            assert torch.equal(actual, expected)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("options", [{"kdim": 9, "vdim": 9}, {"bias": False}, {"kdim": 9, "vdim": 9, "bias": False}])
def test_other_projections(options: dict[str, Any]) -> None:
    theirs, ours = pair(batch_first=True, **options)
    query, key, value = inputs(True, options.get("kdim", WIDTH))
    actual, weights = ours(query, key, value, average_attn_weights=False, head_gate=torch.ones(HEADS))
    expected = theirs(query, key, value, average_attn_weights=False)
    torch.testing.assert_close((actual, weights), expected)


@pytest.mark.parametrize("batch_first", [False, True])
def test_unbatched_inputs(batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first)
    query, key, value = (x[0] for x in inputs(True))
    padding = masks("padding")["key_padding_mask"][1]
    actual = ours(query, key, value, key_padding_mask=padding, head_gate=torch.ones(HEADS))
    torch.testing.assert_close(actual, theirs(query, key, value, key_padding_mask=padding))


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_draws_what_torch_draws(need_weights: bool) -> None:
    theirs, ours = pair(dropout=0.4, batch_first=True)
    x = torch.randn(BATCH, TARGETS, WIDTH, dtype=torch.float64)
    torch.manual_seed(3)
    expected, _ = theirs(x, x, x, need_weights=need_weights)
    torch.manual_seed(3)
    actual, _ = ours(x, x, x, need_weights=need_weights, head_gate=torch.ones(HEADS))
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("grad", [False, True])
def test_inside_an_encoder_layer_the_gate_is_seen(grad: bool) -> None:
    """Its fused inference path reads the weights directly and would skip the gate."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS + 1, 20, batch_first=True).double().eval()
    attention = MaskedMultiheadAttention(WIDTH, HEADS + 1, batch_first=True).double()
    attention.load_state_dict(layer.self_attn.state_dict())
    x = torch.randn(BATCH, TARGETS, WIDTH, dtype=torch.float64)
    padding = torch.zeros(BATCH, TARGETS, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.set_grad_enabled(grad):
        expected = layer(x, src_key_padding_mask=padding)
        layer.self_attn = attention.eval()
        encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        attention = encoder.layers[0].self_attn
        for gate in (None, torch.ones(HEADS + 1)):
            attention.head_gate = gate
            actual = encoder(x, src_key_padding_mask=padding)
            torch.testing.assert_close(actual[~padding], expected[~padding])
        attention.head_gate = torch.zeros(HEADS + 1)
        assert (encoder(x, src_key_padding_mask=padding) - expected)[~padding].abs().max() > 1e-2
        encoder.use_nested_tensor = True
        if not grad:
            with pytest.raises(ValueError, match="enable_nested_tensor=False"):
                encoder(x, src_key_padding_mask=padding)


def test_attention_errors() -> None:
    _, ours = pair()
    x = torch.randn(TARGETS, BATCH, WIDTH, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gate must have shape \(3,\) or \(3, 3\), got \(4,\)"):
        ours(x, x, x, head_gate=torch.ones(4))
    with pytest.raises(ValueError, match="attn_mask must be given with is_causal=True"):
        ours(x, x, x, is_causal=True, head_gate=torch.ones(HEADS))
    _, with_bias = pair(add_bias_kv=True)
    with pytest.raises(ValueError, match="head_gate must be None with add_bias_kv"):
        with_bias(x, x, x, head_gate=torch.ones(HEADS))


ACTIVATIONS = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_feed_forward_equals_a_sequential(activation: str, bias: bool, backend: str) -> None:
    theirs = nn.Sequential(nn.Linear(WIDTH, 25, bias), ACTIVATIONS[activation], nn.Linear(25, WIDTH, bias)).double()
    ours = MaskedFeedForward(WIDTH, 25, activation, bias=bias, backend=backend).double()
    ours.linear1.load_state_dict(theirs[0].state_dict())
    ours.linear2.load_state_dict(theirs[2].state_dict())
    x = torch.randn(BATCH, TARGETS, WIDTH, dtype=torch.float64)
    expected = theirs(x)
    tolerance: dict[str, Any] = {"rtol": 0, "atol": 0} if backend == "reference" else {}
    for gate in (None, torch.ones(25, dtype=torch.float64), torch.ones(BATCH, 25, dtype=torch.float64)):
        actual = ours(x, gate)
        torch.testing.assert_close(actual, expected, **tolerance)
        grads = [
            torch.autograd.grad(y.sin().sum(), list(m.parameters()), retain_graph=True)
            for m, y in ((ours, actual), (theirs, expected))
        ]
        torch.testing.assert_close(grads[0], grads[1], **tolerance)


@pytest.mark.parametrize("gated", [False, True])
def test_filters_are_gated_per_sample_with_checked_gradients(gated: bool) -> None:
    ours = MaskedFeedForward(4, 5, "silu", gated=gated).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([[0.0, 0.5, 1.0, 2.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.5]], dtype=torch.float64, requires_grad=True)
    hidden = nn.functional.silu(ours.linear1(x)) * (ours.linear_up(x) if ours.linear_up is not None else 1)
    torch.testing.assert_close(ours(x, gate), ours.linear2(hidden * gate[:, None]))
    assert torch.autograd.gradcheck(ours, (x, gate))


def test_filter_gate_as_attribute_and_hooks() -> None:
    ours = MaskedFeedForward(4, 5)
    x = torch.randn(2, 3, 4)
    ours.filter_gate = torch.zeros(5)
    assert torch.equal(ours(x), ours.linear2.bias.expand(2, 3, 4))
    ours.filter_gate = torch.ones(5)
    expected, seen = ours(x), []
    ours.linear1.register_forward_hook(lambda *_: seen.append(True))
    torch.testing.assert_close(ours(x), expected)
    assert seen == [True]


def test_feed_forward_errors() -> None:
    with pytest.raises(ValueError, match="activation must be one of gelu, gelu_tanh, relu, silu, got 'tanh'"):
        MaskedFeedForward(4, 5, "tanh")
    with pytest.raises(ValueError, match=r"gate must have shape \(5,\)"):
        MaskedFeedForward(4, 5)(torch.randn(2, 3, 4), torch.ones(4))
