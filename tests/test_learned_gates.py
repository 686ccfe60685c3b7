"""evaluate_candidates and learn_gates: true losses under masks."""

from __future__ import annotations

import pytest
import torch
from model_zoo import tiny_batch, tiny_model
from torch import Tensor

from pymape import learned_gates
from pymape.learned_gates import evaluate_candidates, learn_gates
from pymape.losses import per_sample_loss
from pymape.masks import ModuleMasks
from pymape.model_layout import layout
from pymape.modules import apply_masks, is_instrumented, restore


def batch_of(family: str, size: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    batch = tiny_batch(family, batch=size, seed=seed, padding=None if family == "vit" else "right")
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in batch.items()}


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2", "qwen2"])
def test_candidates_equal_separate_forwards(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    batch = batch_of(family, dtype=torch.float64)
    shape = layout(model)
    candidates = [ModuleMasks.random(shape, 0.4, seed) for seed in range(4)]
    candidates += [ModuleMasks.everything(shape), ModuleMasks.from_scores(*empty_scores(shape), shape, 0.5)]
    losses = evaluate_candidates(model, candidates, batch, per_sample=True)
    assert losses.shape == (6, 3)
    assert not is_instrumented(model)
    with torch.no_grad():
        expected = []
        for masks in candidates:
            apply_masks(model, masks)
            expected.append(per_sample_loss(model, batch, model(**batch)))
            restore(model)
        torch.testing.assert_close(losses, torch.stack(expected), rtol=0, atol=1e-10)
        torch.testing.assert_close(losses[-1], per_sample_loss(model, batch, model(**batch)), rtol=0, atol=1e-10)
    assert losses.std(0).min() > 1e-4
    means = evaluate_candidates(model, candidates, batch, chunk_size=4)
    torch.testing.assert_close(means, losses.mean(1), rtol=0, atol=1e-10)


def test_padding_on_the_left_changes_no_loss() -> None:
    model = tiny_model("gpt2", dtype=torch.float64)
    right = batch_of("gpt2")
    own = right["attention_mask"].sum(1)
    left = {
        name: torch.stack([row.roll(row.numel() - int(count)) for row, count in zip(value, own, strict=True)])
        for name, value in right.items()
    }
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    candidates = [ModuleMasks.random(layout(model), 0.4, seed) for seed in range(2)]
    found, expected = (evaluate_candidates(model, candidates, batch, per_sample=True) for batch in (left, right))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def empty_scores(shape) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape.layers, shape.kv_heads), torch.zeros(shape.layers, shape.filters)


def test_candidates_with_a_loss_of_ones_own() -> None:
    model, batch = tiny_model("vit"), batch_of("vit")
    shape = layout(model)
    masks = [ModuleMasks.random(shape, 0.4, seed) for seed in range(2)]
    losses = evaluate_candidates(model, masks, batch, loss=lambda outputs, inputs: 2 * outputs.logits.logsumexp(1))
    expected = evaluate_candidates(model, masks, batch, loss=lambda outputs, inputs: outputs.logits.logsumexp(1))
    torch.testing.assert_close(losses, 2 * expected)


def test_candidates_bad_input() -> None:
    model, batch = tiny_model("vit"), batch_of("vit")
    masks = ModuleMasks.random(layout(model), 0.4)
    with pytest.raises(ValueError, match="masks must hold at least one candidate, got none"):
        evaluate_candidates(model, [], batch)
    with pytest.raises(ValueError, match="chunk_size must be >= 1, got 0"):
        evaluate_candidates(model, [masks], batch, chunk_size=0)
    with pytest.raises(ValueError, match="masks must fit the model"):
        evaluate_candidates(model, [ModuleMasks.random(layout(tiny_model("bert")), 0.4)], batch)
    batch["labels"] = batch["labels"][:2]
    with pytest.raises(ValueError, match=r"batch must hold tensors of one batch size, got sizes \[2, 3\]"):
        evaluate_candidates(model, [masks], batch)


@pytest.mark.parametrize("family", ["vit", "llama"])
@pytest.mark.parametrize("method", learned_gates.METHODS)
def test_learned_masks_beat_random_ones(family: str, method: str) -> None:
    model, budget = tiny_model(family), 0.3
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    forget, retain = batch_of(family, 16, seed=1), batch_of(family, 16, seed=2)

    def objective(*candidates: ModuleMasks) -> Tensor:
        return evaluate_candidates(model, candidates, forget) - evaluate_candidates(model, candidates, retain)

    learned = learn_gates(model, [forget], [retain], budget, method=method, steps=60)
    others = objective(*(ModuleMasks.random(layout(model), budget, seed) for seed in range(50)))
    assert objective(learned).item() > others.max().item()
    assert 0 < learned.cost() <= budget
    assert abs(learned.provenance["expected_cost"] - budget) < 0.1
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not is_instrumented(model)


@pytest.mark.parametrize("method", learned_gates.METHODS)
def test_learning_repeats_with_its_seed(method: str) -> None:
    model, batch, other = tiny_model("vit"), batch_of("vit", 4, seed=1), batch_of("vit", 5, seed=2)
    first, second = (
        learn_gates(model, [batch, other], [other], 0.2, method=method, steps=5, lr=0.5, seed=3) for _ in range(2)
    )
    assert torch.equal(first.filters, second.filters)
    assert first.provenance == second.provenance
    different = learn_gates(model, [batch, other], [other], 0.2, method=method, steps=5, lr=0.5, seed=4)
    assert different.provenance["expected_cost"] != first.provenance["expected_cost"]


@pytest.mark.parametrize("method", learned_gates.METHODS)
def test_gates_are_drawn_as_the_cost_expects(method: str) -> None:
    logits = torch.tensor([[-3.0, -1.0, 0.0], [0.5, 2.0, 9.0]], requires_grad=True)
    drawn = learned_gates._draw(logits, method, 4000, torch.Generator().manual_seed(0))
    share = (drawn > 0).double().mean(0)
    torch.testing.assert_close(share, learned_gates._probability(logits, method).double(), rtol=0, atol=0.03)
    assert ((drawn >= 0) & (drawn <= 1)).all()
    (gradient,) = torch.autograd.grad(drawn.sum(), logits)
    assert (gradient > 0)[:, :2].all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"budget": 0.0}, r"budget must lie in \(0, 1\], got 0\.0"),
        ({"method": "soft"}, "method must be one of hard_concrete, straight_through, got 'soft'"),
        ({"lam": -1.0}, r"lam must be finite and >= 0, got -1\.0"),
        ({"steps": 0}, "steps must be finite and > 0, got 0"),
        ({"penalty": 0.0}, r"penalty must be finite and > 0, got 0\.0"),
        ({}, r"at least one head or filter, got none after 2 steps at lr=0\.1 with lam=1\.0: try more steps"),
        ({"forget": []}, "forget must give at least one batch"),
        ({"loss": lambda outputs, inputs: outputs.logits.sum(1) * torch.nan}, "loss must be finite, got nan at step 0"),
    ],
)
def test_learning_bad_input(options: dict, message: str) -> None:
    model, batch = tiny_model("vit"), batch_of("vit")
    with pytest.raises(ValueError, match=message):
        learn_gates(model, **({"forget": [batch], "retain": [batch], "steps": 2} | options))
    assert not is_instrumented(model)
