"""PartialParameters against the same training with full gradients."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from model_zoo import FAMILIES, GROUPED, MORE_FAMILIES, tiny_batch, tiny_model
from partial_tools import some_masks
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pymape.partial as partial_module
from pymape.delta import DeltaPart
from pymape.masks import ModuleMasks
from pymape.model_layout import find_layers, layout
from pymape.modules import gates, instrument, restore
from pymape.partial import PartialParameters


def empty_masks(model: nn.Module) -> ModuleMasks:
    shape = layout(model)
    heads, filters = (torch.zeros(shape.layers, width, dtype=torch.bool) for width in (shape.heads, shape.filters))
    return ModuleMasks(heads, filters, shape)


def owned(model: nn.Module, masks: ModuleMasks) -> dict[str, Tensor]:
    """Bool mask per parameter name of what the selected heads and filters own, from the slices directly."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    inside = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for layer, groups, filters in zip(find_layers(model), masks.head_groups, masks.filters, strict=True):
        for module, name, dim, index in [
            *layer.head_slices(groups.nonzero()[:, 0]),
            *layer.filter_slices(filters.nonzero()[:, 0]),
        ]:
            inside[names[id(getattr(module, name))]].index_fill_(dim, index, True)
    return inside


def double_batch(family: str, **options) -> dict[str, Tensor]:
    batch = tiny_batch(family, **options)
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def train_masked(model: nn.Module, inside: dict[str, Tensor], batches, optimizer: str, **options) -> dict[str, Tensor]:
    """The usual way: full gradients, zeroed outside, and the old values put back outside after every step."""
    model.requires_grad_(True)
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepper = getattr(torch.optim, optimizer)(model.parameters(), **options)
    for batch in batches:
        stepper.zero_grad()
        model(**batch).loss.backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                p.grad.mul_(inside[name])
        stepper.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(torch.where(inside[name], p, old[name]))
    return model.state_dict()


def train_partial(partial: PartialParameters, batches, optimizer: str, **options) -> dict[str, Tensor]:
    stepper = getattr(torch.optim, optimizer)(partial.parameters(), **options)
    partial.attach(stepper)
    for batch in batches:
        stepper.zero_grad()
        partial.model(**batch).loss.backward()
        stepper.step()
    return partial.merge().state_dict()


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_training_equals_masked_gradients_and_leaves_the_rest_alone(family):
    model = tiny_model(family, dtype=torch.float64)
    masks = some_masks(model)
    before = copy.deepcopy(model.state_dict())
    inside = owned(model, masks)
    batches = [double_batch(family, seed=seed) for seed in range(20)]
    # A key bias has no gradient (softmax is invariant to it): the larger eps keeps AdamW from scaling its rounding up.
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4}
    expected = train_masked(copy.deepcopy(model), inside, batches, "AdamW", **options)

    actual = train_partial(PartialParameters(model, masks), batches, "AdamW", fused=True, **options)

    assert list(actual) == list(before)
    for name, old in before.items():
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-11)
        changed = actual[name] != old
        assert not (changed & ~inside.get(name, torch.zeros_like(changed))).any()
    weights = [name for name, mask in inside.items() if mask.any() and not name.endswith("bias")]
    assert all((actual[name] != before[name])[inside[name]].all() for name in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_sgd_in_fp32_equals_masked_gradients(family):
    model = tiny_model(family)
    masks = some_masks(model)
    batches = [tiny_batch(family, seed=seed, padding="right") for seed in range(20)]
    options = {"lr": 0.05, "momentum": 0.9}
    expected = train_masked(copy.deepcopy(model), owned(model, masks), batches, "SGD", **options)
    actual = train_partial(PartialParameters(model, masks), batches, "SGD", **options)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_compact_parameters_are_contiguous_and_cost_what_the_masks_say(family):
    model = tiny_model(family)
    masks = some_masks(model)
    cost = masks.cost() * masks.layout.total_cost
    plain = dict(model.named_parameters())
    partial = PartialParameters(model, masks)
    compact = dict(partial.named_parameters())
    assert partial.numel() == round(cost)
    storages = {p.untyped_storage().data_ptr() for p in plain.values()}
    for name, parameter in compact.items():
        assert parameter.is_contiguous(), name
        assert parameter.untyped_storage().data_ptr() not in storages, name
    assert partial.merge() is model
    assert dict(model.named_parameters()).keys() == plain.keys()
    assert all(p.requires_grad and p is plain[name] for name, p in model.named_parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_forward_is_bit_identical(family):
    model = tiny_model(family)
    batch = tiny_batch(family)
    before = model(**batch).logits
    PartialParameters(model, some_masks(model))
    assert torch.equal(model(**batch).logits, before)


def test_two_forwards_before_one_backward():
    model = tiny_model("bert", dtype=torch.float64)
    masks = some_masks(model)
    first, second = double_batch("bert", seed=1), double_batch("bert", seed=2)
    separate = []
    partial = PartialParameters(model, masks)
    for batch, sign in ((first, -1), (second, 1)):
        separate.append(torch.autograd.grad(sign * model(**batch).loss, list(partial.parameters())))
    loss_first, loss_second = model(**first).loss, model(**second).loss
    together = torch.autograd.grad(loss_second - loss_first, list(partial.parameters()))
    for total, one, other in zip(together, *separate, strict=True):
        torch.testing.assert_close(total, one + other)


def test_writing_back_between_forward_and_backward_is_refused():
    model = tiny_model("bert")
    partial = PartialParameters(model, some_masks(model))
    loss = model(**tiny_batch("bert")).loss
    partial.sync()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_layers_below_the_lowest_selected_one_run_without_autograd():
    model = tiny_model("bert")
    masks = some_masks(model)
    masks.heads[0], masks.filters[0] = False, False
    partial = PartialParameters(model, masks)
    assert partial.lowest_layer == 1
    outputs = model(**tiny_batch("bert"), output_hidden_states=True)
    assert [state.requires_grad for state in outputs.hidden_states] == [False, False, True]


def test_what_lies_below_the_lowest_selected_layer_stays_in_eval_mode():
    model = tiny_model("bert", dropout=0.5).train()
    masks = some_masks(model)
    masks.heads[0], masks.filters[0] = False, False
    partial = PartialParameters(model, masks)
    model.train()
    first, second = find_layers(model)
    assert not any(module.training for below in (model.bert.embeddings, first.layer) for module in below.modules())
    assert all(module.training for module in second.layer.modules())
    states = [model(**tiny_batch("bert"), output_hidden_states=True).hidden_states for _ in range(2)]
    assert [torch.equal(*pair) for pair in zip(*states, strict=True)] == [True, True, False]
    copied = copy.deepcopy(model).train()
    assert not copied.bert.embeddings.training
    partial.merge()
    assert all(module.training for module in model.modules())
    assert not any("train" in vars(module) for module in model.modules())
    copied.bert.embeddings.train()
    assert not copied.bert.embeddings.training  # its own method, not the original's


def test_a_column_selection_keeps_only_the_selected_inputs():
    model = tiny_model("bert")
    masks = empty_masks(model)
    masks.filters[1, :5] = True
    PartialParameters(model, masks)
    batch = tiny_batch("bert", batch=2, length=6)
    kept: list[tuple[int, ...]] = []
    down = find_layers(model)[1].ffn_out

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        down(torch.randn(2, 6, 25))
    assert kept == [(2, 6, 5), (16, 25), (5,)]
    model(**batch).loss.backward()
    assert down.selected_weight.grad.shape == (5, 16)


def test_bf16_autocast_gives_the_gradients_of_dense_autocast():
    model, batch = tiny_model("llama"), tiny_batch("llama")
    masks = some_masks(model)
    exact, dense = copy.deepcopy(model).double(), copy.deepcopy(model)
    exact(**batch).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        dense(**batch).loss.backward()
    PartialParameters(model, masks)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    pairs = []
    for module, other, reference in zip(model.modules(), dense.modules(), exact.modules(), strict=True):
        if getattr(module, "selected_weight", None) is not None:
            index, columns = module.selected_index, module.selected_axis == "columns"
            full, truth = (m.weight.grad.t() if columns else m.weight.grad for m in (other, reference))
            assert module.selected_weight.grad.dtype == torch.float32
            pairs.append((module.selected_weight.grad, full[index], truth[index]))
    assert len(pairs) == 14
    error, allowed = ([(g[i].double() - g[2]).norm() for g in pairs] for i in (0, 1))
    assert sum(error) <= 2 * sum(allowed)


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3"])
def test_gradient_checkpointing(family):
    model, batch = tiny_model(family, dtype=torch.float64), double_batch(family)
    partial = PartialParameters(model, some_masks(model))
    plain = torch.autograd.grad(model(**batch).loss, list(partial.parameters()))
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()  # renamed within transformers 5
    model.train()
    recomputed = torch.autograd.grad(model(**batch).loss, list(partial.parameters()))
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("first", ["instrument", "partial"])
def test_gates_and_compact_parameters_work_together(family, first):
    model, batch = tiny_model(family, dtype=torch.float64), double_batch(family)
    before = model(**batch).logits
    masks = some_masks(model)
    if first == "instrument":
        instrument(model)
    partial = PartialParameters(model, masks)
    plain = torch.autograd.grad(model(**batch).loss, list(partial.parameters()))
    if first == "partial":
        instrument(model)
    ones = {"heads": torch.ones(masks.heads.shape), "filters": torch.ones(masks.filters.shape)}
    with gates(model, **{name: gate.double() for name, gate in ones.items()}):
        gated = torch.autograd.grad(model(**batch).loss, list(partial.parameters()))
    for one, other in zip(plain, gated, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(restore(partial.merge())(**batch).logits, before)


@pytest.mark.parametrize("fused", [False, True])
def test_torch_compile(fused):
    model, batch = tiny_model("llama"), tiny_batch("llama")
    partial = PartialParameters(model, some_masks(model), fused=fused)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with sdpa_kernel(SDPBackend.MATH):
        plain = torch.autograd.grad(model(**batch).loss, list(partial.parameters()))
        graph = torch.autograd.grad(compiled(**batch).loss, list(partial.parameters()))
    for one, other in zip(plain, graph, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_state_dicts(family):
    model = tiny_model(family)
    masks = some_masks(model)
    other = tiny_model(family, seed=5)
    plain = {name: value.clone() for name, value in other.state_dict().items()}
    partial = PartialParameters(model, masks)
    assert list(model.state_dict()) == list(plain)
    batch = tiny_batch(family)

    assert not model.load_state_dict(plain).missing_keys
    partial.sync()  # writes compact values that were read off the loaded weights: nothing changes
    assert all(torch.equal(value, plain[name]) for name, value in model.state_dict().items())

    state = {name: value.clone() for name, value in partial.state_dict().items()}
    assert sum(value.numel() for value in state.values()) == partial.numel()
    for parameter in partial.parameters():
        parameter.data.add_(1.0)
    partial.sync()
    assert not torch.equal(model(**batch).logits, other(**batch).logits)
    partial.load_state_dict(state)
    assert torch.equal(model(**batch).logits, other(**batch).logits)
    name, value = state.popitem()
    with pytest.raises(ValueError, match="state must name"):
        partial.load_state_dict(state)
    with pytest.raises(ValueError, match="must have shape"):
        partial.load_state_dict({**state, name: value[:-1]})


@pytest.mark.parametrize("masked", [True, False])
def test_swapped_runs_the_original_model(masked):
    model, batch = tiny_model("gpt2"), tiny_batch("gpt2")
    original = copy.deepcopy(model)
    partial = PartialParameters(model, some_masks(model) if masked else None)
    snapshot = partial.snapshot()
    optimizer = torch.optim.AdamW(partial.parameters(), lr=0.1, fused=True)
    partial.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        with partial.swapped(snapshot), torch.no_grad():
            assert torch.equal(model(**batch).logits, original(**batch).logits)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
    assert loss < original(**batch).loss
    trained = model(**batch).logits
    with partial.swapped(snapshot), torch.no_grad():
        model(**batch)
    assert torch.equal(model(**batch).logits, trained)


def test_without_masks_every_parameter_trains_that_requires_grad():
    model = tiny_model("bert")
    whole = PartialParameters(model)
    assert whole.numel() == sum(p.numel() for p in model.parameters())
    assert whole.lowest_layer is None
    whole.merge()
    model.bert.embeddings.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    partial = PartialParameters(model)
    assert partial.state_dict().keys() == {name for name in whole.state_dict() if not name.startswith("bert.embed")}
    partial.merge()
    assert [p.requires_grad for p in model.parameters()] == flags
    with pytest.raises(ValueError, match="model must have parameters that require grad where masks are None, got none"):
        PartialParameters(model.requires_grad_(False))


def test_masks_train_what_they_select_and_the_head_that_is_asked_for_frozen_or_not():
    model = tiny_model("bert").requires_grad_(False)
    partial = PartialParameters(model, some_masks(model), train_task_head=True)
    assert {"classifier.weight", "bert.encoder.layer.0.attention.self.query.selected_weight"} <= set(
        partial.state_dict()
    )
    partial.merge()
    assert not any(p.requires_grad for p in model.parameters())


def test_task_head():
    model = tiny_model("bert")
    masks = some_masks(model)
    compact = PartialParameters(model, masks)
    number = compact.numel()
    compact.merge()
    partial = PartialParameters(model, masks, train_task_head=True)
    names = {name for name, _ in partial.named_parameters()}
    assert {"classifier.weight", "classifier.bias"} <= names
    assert partial.numel() == number + sum(p.numel() for p in model.classifier.parameters())
    tied = tiny_model("gpt2")
    with pytest.raises(ValueError, match="GPT2LMHeadModel without one"):
        PartialParameters(tied, some_masks(tied), train_task_head=True)


@pytest.mark.parametrize("family", GROUPED)
def test_grouped_queries_train_with_their_keys(family):
    model = tiny_model(family)
    masks = empty_masks(model)
    masks.heads[1, 2:] = True  # the second of two key/value groups
    PartialParameters(model, masks)
    layer = find_layers(model)[1]
    size = layer.head_dim
    assert layer.query.selected_index.tolist() == list(range(2 * size, 4 * size))
    assert layer.key.selected_index.tolist() == layer.value.selected_index.tolist() == list(range(size, 2 * size))
    assert layer.output.selected_index.tolist() == layer.query.selected_index.tolist()


def test_bad_input():
    model = tiny_model("bert")
    before = [p.requires_grad for p in model.parameters()]
    masks = some_masks(model)
    with pytest.raises(ValueError, match="masks must fit the model"):
        PartialParameters(model, some_masks(tiny_model("gpt2")))
    with pytest.raises(ValueError, match="select at least one"):
        PartialParameters(model, empty_masks(model))
    find_layers(model)[0].query.forward = lambda x: x
    with pytest.raises(ValueError, match="forward is replaced"):
        PartialParameters(model, ModuleMasks.everything(masks.layout))
    del find_layers(model)[0].query.forward
    find_layers(model)[0].query.__class__ = type("Linear", (torch.nn.Linear,), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"projections of torch\.nn\.Linear .*, got elsewhere\.Linear"):
        PartialParameters(model, ModuleMasks.everything(masks.layout))
    find_layers(model)[0].query.__class__ = torch.nn.Linear
    assert [p.requires_grad for p in model.parameters()] == before
    PartialParameters(model, masks)
    for again in (masks, None):
        with pytest.raises(ValueError, match="compact parameters already"):
            PartialParameters(model, again)
    assert layout(model) == masks.layout  # what is measured during training is of the same model


@pytest.mark.parametrize("place", ["_gather", "find_prefix", "inside_digest"])
def test_an_error_leaves_the_model_as_it_was(place, monkeypatch):
    model = tiny_model("bert").train()
    model.bert.embeddings.requires_grad_(False)
    masks = some_masks(model)
    masks.heads[0], masks.filters[0] = False, False

    def state() -> list:
        own = [(sorted(vars(module)), module.training, list(module._state_dict_hooks)) for module in model.modules()]
        return own + [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]

    before, calls = state(), []
    original = getattr(partial_module, place)

    def fail(*args):
        calls.append(args)
        if place != "_gather" or len(calls) == 4:  # after some compact parameters
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(partial_module, place, fail)
    with pytest.raises(KeyboardInterrupt):
        PartialParameters(model, masks)
    assert state() == before
    monkeypatch.undo()
    PartialParameters(model, masks)


def test_the_digest_holds_one_part_at_a_time(monkeypatch):
    model = tiny_model("bert")
    gathered: list[weakref.ref] = []
    original = DeltaPart.of

    def of(part: DeltaPart, full: Tensor) -> Tensor:
        assert not any(value() is not None for value in gathered)
        gathered.append(weakref.ref(value := original(part, full)))
        return value

    monkeypatch.setattr(DeltaPart, "of", of)
    PartialParameters(model, some_masks(model))
    assert len(gathered) == 20
