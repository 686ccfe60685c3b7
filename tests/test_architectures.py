"""The table of architectures: every family is found, and a unit owns what is said to be its own."""

from __future__ import annotations

import pytest
import torch
import transformers
from model_zoo import FAMILIES as CORE_FAMILIES
from model_zoo import GATED, GROUPED, HEAD_DIM, MORE_FAMILIES, MORE_GROUPED, VISION, tiny_model
from torch import nn

from pymape import architectures
from pymape.architectures import Architecture, register_architecture
from pymape.model_layout import find_layers, layout

FAMILIES = CORE_FAMILIES + MORE_FAMILIES
HIDDEN = 16
BIAS_FREE = (
    "gpt_neo",
    "gptj",
    "llama",
    "mistral",
    "qwen3",
    "modernbert",
    *(set(MORE_GROUPED) - {"phi", "glm", "glm4"}),
)
ERNIE = Architecture(
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
)


def tiny_ernie() -> nn.Module:
    config = transformers.ErnieConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=25,
    )
    return transformers.ErnieModel(config)


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))


@pytest.mark.parametrize("family", FAMILIES)
def test_layout_reads_the_sizes_off_the_model(family: str) -> None:
    found = layout(tiny_model(family))
    kv_heads = 2 if family in GROUPED + MORE_GROUPED else 4
    head_dim = HEAD_DIM.get(family, 4)
    assert (found.model_type, found.layers, found.heads, found.filters) == (family, 2, 4, 25)
    assert (found.kv_heads, found.head_dim, found.group_size) == (kv_heads, head_dim, 4 // kv_heads)
    matrices = 3 if family in GATED else 2
    biases = 0 if family in GATED else 1
    assert found.filter_cost == matrices * HIDDEN + biases
    biases = 0 if family in BIAS_FREE else head_dim * (found.group_size + 2)
    assert found.head_cost == (2 * found.group_size + 2) * head_dim * HIDDEN + biases


@pytest.mark.parametrize("family", FAMILIES)
def test_units_own_disjoint_parameters_that_add_up_to_the_total_cost(family: str) -> None:
    model = tiny_model(family)
    found = layout(model)
    counts = {parameter: torch.zeros_like(parameter, dtype=torch.int64) for parameter in model.parameters()}
    for layer in find_layers(model):
        for slices in (
            [layer.head_slices(torch.tensor([unit])) for unit in range(found.kv_heads)],
            [layer.filter_slices(torch.tensor([unit])) for unit in range(found.filters)],
        ):
            for module, name, dim, index in (part for unit in slices for part in unit):
                counts[getattr(module, name)].index_add_(
                    dim, index, torch.ones_like(counts[getattr(module, name)]).index_select(dim, index)
                )
    assert max(int(count.max()) for count in counts.values()) == 1
    assert sum(int(count.sum()) for count in counts.values()) == found.total_cost


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_of_several_units_list_one_unit_after_the_other(family: str) -> None:
    layer = find_layers(tiny_model(family))[0]
    together = layer.head_slices(torch.tensor([1, 0]))
    first, second = layer.head_slices(torch.tensor([1])), layer.head_slices(torch.tensor([0]))
    assert len({(module, name) for module, name, _, _ in together}) == len(together)
    for whole, one, other in zip(together, first, second, strict=True):
        assert whole[:3] == one[:3] == other[:3]
        assert torch.equal(whole[3], torch.cat([one[3], other[3]]))
    none = torch.zeros(0, dtype=torch.int64)
    assert not any(len(index) for *_, index in layer.head_slices(none) + layer.filter_slices(none))


@pytest.mark.parametrize("family", FAMILIES)
def test_head_slices_hold_what_the_head_computes_with(family: str) -> None:
    """Zeroing the parameters of all groups but one leaves the query, key and value of that group alone."""
    model = tiny_model(family)
    found, layer = layout(model), find_layers(model)[0]
    x = torch.randn(1, 5, HIDDEN)

    def projected() -> list[torch.Tensor]:
        if layer.row.interleaved_qkv:
            return list(layer.qkv(x).unflatten(-1, (found.heads, 3, found.head_dim)).unbind(-2))
        parts = [layer.qkv(x)] if layer.qkv is not None else [layer.query(x), layer.key(x), layer.value(x)]
        heads = torch.cat(parts, dim=-1).unflatten(-1, (-1, found.head_dim))  # [1, T, H + 2 Hkv, D]
        return list(heads.split([found.heads, found.kv_heads, found.kv_heads], dim=2))

    before = projected()
    others = torch.arange(1, found.kv_heads)
    with torch.no_grad():
        for module, name, dim, index in layer.head_slices(others):
            getattr(module, name).index_fill_(dim, index, 0.0)
    for old, new, own in zip(before, projected(), (found.group_size, 1, 1), strict=True):
        assert torch.equal(old[:, :, :own], new[:, :, :own])
        assert not new[:, :, own:].any()
        assert old[:, :, own:].all()


@pytest.mark.parametrize("family", GATED)
def test_filter_slices_hold_what_the_filter_computes_with(family: str) -> None:
    """Zeroing the parameters of all filters but one leaves that filter's own gate and up value alone."""
    model = tiny_model(family)
    layer = find_layers(model)[0]
    x = torch.randn(1, 5, HIDDEN)

    def projected() -> tuple[torch.Tensor, torch.Tensor]:
        return layer.ffn_in(x).chunk(2, dim=-1) if layer.row.fused_gate_up else (layer.ffn_in(x), layer.ffn_up(x))

    before = projected()
    with torch.no_grad():
        for module, name, dim, index in layer.filter_slices(torch.arange(1, layer.filters)):
            getattr(module, name).index_fill_(dim, index, 0.0)
    for old, new in zip(before, projected(), strict=True):
        assert torch.equal(old[..., 0], new[..., 0])
        assert old.all()
        assert not new[..., 1:].any()


def test_fingerprint_depends_on_shapes_and_names_but_not_on_values() -> None:
    reference = layout(tiny_model("bert")).fingerprint
    assert layout(tiny_model("bert", seed=1)).fingerprint == reference
    assert layout(tiny_model("bert", vocab_size=51)).fingerprint != reference
    assert layout(tiny_model("bert", task="base")).fingerprint != reference
    assert layout(tiny_model("roberta")).fingerprint != reference


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in VISION])
def test_layers_are_found_in_bare_models_too(family: str) -> None:
    assert len(find_layers(tiny_model(family, task="base"))) == 2


@pytest.mark.parametrize(
    "activation, name",
    [
        ("gelu", "gelu"),
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("quick_gelu", None),
    ],
)
def test_activation_names(activation: str, name: str | None) -> None:
    layer = find_layers(tiny_model("bert", hidden_act=activation))[0]
    assert layer.activation == name
    x = torch.linspace(-4, 4, 99)
    if name is not None:
        function = {"gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}[name]
        torch.testing.assert_close(layer.ffn_activation(x), function(x))


def test_unknown_architecture_says_how_to_add_a_row() -> None:
    with pytest.raises(ValueError, match=r"'ernie' is not supported .*register_architecture\('ernie'"):
        find_layers(tiny_ernie())
    with pytest.raises(ValueError, match=r"config\.model_type, got Linear"):
        layout(nn.Linear(2, 2))


def test_quantised_weights_are_refused() -> None:
    model = tiny_model("llama")
    for layer in find_layers(model):
        packed = torch.zeros(layer.output.weight.numel() // 2, 1, dtype=torch.uint8)
        layer.output.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(ValueError, match=r"model must have floating-point weights, got torch.uint8 in Linear"):
        layout(model)


@pytest.mark.usefixtures("own_table")
def test_a_registered_architecture_is_found() -> None:
    register_architecture("ernie", ERNIE)
    assert layout(tiny_ernie()).total_cost == layout(tiny_model("bert")).total_cost


@pytest.mark.usefixtures("own_table")
def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="either qkv, or query, key and value"):
        register_architecture("ernie", Architecture(**{**vars(ERNIE), "qkv": "attention.self.qkv"}))
    with pytest.raises(ValueError, match=r"submodules of ffn 'intermediate', got 'output\.dense'"):
        register_architecture("ernie", Architecture(**{**vars(ERNIE), "ffn_tail": ("output.dense",)}))
    with pytest.raises(ValueError, match="must name qkv where interleaved_qkv is True"):
        register_architecture("ernie", Architecture(**{**vars(ERNIE), "interleaved_qkv": True}))
    fused = {"ffn_up": "intermediate.up", "fused_gate_up": True}
    with pytest.raises(ValueError, match=r"no ffn_up where fused_gate_up is True, got 'intermediate\.up'"):
        register_architecture("ernie", Architecture(**{**vars(ERNIE), **fused}))
    with pytest.raises(ValueError, match="must be an Architecture, got dict"):
        register_architecture("ernie", vars(ERNIE))
    register_architecture("ernie", Architecture(**{**vars(ERNIE), "output": "attention.out"}))
    with pytest.raises(ValueError, match=r"'attention\.out', which ErnieLayer does not have"):
        find_layers(tiny_ernie())
    register_architecture("ernie", Architecture(**{**vars(ERNIE), "layers": "blocks"}))
    with pytest.raises(ValueError, match="one module list 'blocks', found 0"):
        find_layers(tiny_ernie())
