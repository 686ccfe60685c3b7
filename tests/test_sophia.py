"""Sophia: the step by hand, and the curvature estimate against the exact Gauss-Newton diagonal."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from model_zoo import tiny_batch, tiny_model

from pymape.objectives import UnlearnBatch
from pymape.objectives.sophia import Sophia, gauss_newton_bartlett


def test_the_step_by_hand():
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64))
    options = {"lr": 0.1, "betas": (0.5, 0.75), "rho": 2.0, "eps": 0.25, "weight_decay": 0.5, "every": 2}
    sophia = Sophia([parameter], **options)
    assert sophia.hessian_due
    sophia.update_hessian([torch.tensor([8.0, 0.0, 4.0])])  # h = estimate / 4
    assert not sophia.hessian_due
    parameter.grad = torch.tensor([4.0, -0.25, -20.0], dtype=torch.float64)
    sophia.step()
    # m = g / 2; max(rho h, eps) = 4, 0.25, 2; clipped at one for the last
    after = [0.95 - 0.1 * 2 / 4, -1.9 + 0.1 * 0.125 / 0.25, 2.85 + 0.1]
    assert parameter.tolist() == pytest.approx(after, rel=1e-14)
    assert not sophia.hessian_due
    parameter.grad = torch.zeros(3, dtype=torch.float64)
    sophia.step()
    # m halves, h stays
    after = [0.95 * after[0] - 0.1 * 1 / 4, 0.95 * after[1] + 0.1 * 0.0625 / 0.25, 0.95 * after[2] + 0.1]
    assert parameter.tolist() == pytest.approx(after, rel=1e-14)
    assert sophia.hessian_due
    sophia.update_hessian([torch.tensor([1.0, 1.0, 1.0])])
    assert sophia.state[parameter]["hessian"].tolist() == pytest.approx([1.75, 0.25, 1.0], rel=1e-14)


def test_state_and_groups_survive_saving():
    def make() -> tuple[list[torch.nn.Parameter], Sophia]:
        parameters = [torch.nn.Parameter(torch.ones(n)) for n in (2, 3)]
        groups = [{"params": parameters[1:], "weight_decay": 0.1}, {"params": parameters[:1]}]
        return parameters, Sophia(groups, lr=0.1, every=2)

    def run(parameters: list[torch.nn.Parameter], sophia: Sophia, steps: range) -> None:
        for step in steps:
            if sophia.hessian_due:
                assert step % 2 == 0
                sophia.update_hessian([torch.full_like(p, step + len(p)) for p in sophia.parameters])
            for parameter in parameters:
                parameter.grad = parameter.detach() * (step + 1)
            sophia.step()

    whole = make()
    run(*whole, range(5))
    first, second = make(), make()
    run(*first, range(3))
    with torch.no_grad():
        for new, old in zip(second[0], first[0], strict=True):
            new.copy_(old)
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    run(*second, range(3, 5))
    for one, other in zip(whole[0], second[0], strict=True):
        assert torch.equal(one, other)
    assert whole[1].state[whole[0][0]]["hessian"].tolist() != whole[1].state[whole[0][1]]["hessian"].tolist()[:2]


def test_a_parameter_without_gradient_stays():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    sophia = Sophia(parameters, lr=0.1, weight_decay=0.5)
    parameters[0].grad = torch.ones(1)
    assert sophia.step(lambda: 3.0) == 3.0
    assert parameters[0] < 1
    assert parameters[1] == 1
    assert not sophia.hessian_due  # ten steps on, not at the second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be >= 0, got -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), got 0.9"),
        ({"betas": ("a", "b")}, r"betas must be two numbers in \[0, 1\), got \('a', 'b'\)"),
        ({"rho": 0.0}, "rho must be > 0, got 0.0"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"every": 0}, "every must be >= 1, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Sophia([torch.nn.Parameter(torch.ones(1))], **options)


def exact_diagonal(batches: list[UnlearnBatch], parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    """(1 / n) sum_i diag(J_i^T (diag p_i - p_i p_i^T) J_i), by the Jacobian of every logit."""
    logits = torch.cat([batch.scored_logits() for batch in batches])  # [n, C]
    diagonal = [torch.zeros_like(parameter) for parameter in parameters]
    for row in logits:
        jacobian = [torch.autograd.grad(logit, parameters, retain_graph=True, allow_unused=True) for logit in row]
        p = row.detach().softmax(0)
        curvature = p.diag() - p.outer(p)
        for place, total in enumerate(diagonal):
            columns = torch.stack([entries[place].flatten() for entries in jacobian])  # [C, entries]
            total += (columns * (curvature @ columns)).sum(0).view_as(total) / len(logits)
    return diagonal


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    inner = model.bert.encoder.layer[1].intermediate.dense
    return [inner.weight, inner.bias]


def test_the_estimate_has_the_exact_gauss_newton_diagonal_as_its_mean(monkeypatch):
    """Over all 27 drawings of labels, each with its probability; two pooled batches of one and of two records."""
    model = tiny_model("bert", dtype=torch.float64)
    batches = [UnlearnBatch(model, tiny_batch("bert", batch=size, seed=size, padding="right")) for size in (1, 2)]
    parameters = trained(model)
    exact = exact_diagonal(batches, parameters)
    probabilities = torch.cat([batch.log_probs() for batch in batches]).detach().exp()
    mean = [torch.zeros_like(parameter) for parameter in parameters]
    total = 0.0
    for labels in itertools.product(range(3), repeat=3):
        drawn = torch.tensor(labels)[:, None]
        monkeypatch.setattr(torch, "multinomial", lambda *_, drawn=drawn, **__: drawn)
        for batch in batches:
            del batch.outputs
        weight = float(probabilities.gather(1, drawn).prod())
        total += weight
        for entries, estimate in zip(mean, gauss_newton_bartlett(batches, parameters), strict=True):
            entries += weight * estimate
    assert total == pytest.approx(1, rel=1e-12)
    assert min(float(entries.abs().max()) for entries in exact) > 1e-4
    for one, other in zip(mean, exact, strict=True):
        torch.testing.assert_close(one.detach(), other, rtol=1e-10, atol=1e-14)


def test_drawn_labels_follow_the_models_predictions():
    """For a language model: the mean of many estimates, within five standard errors."""
    model = tiny_model("gpt2", dtype=torch.float64, vocab_size=5, bos_token_id=1, eos_token_id=2)
    inputs = tiny_batch("gpt2", batch=2, length=4, padding="right")
    inputs = {name: value.clamp(max=4) if name != "attention_mask" else value for name, value in inputs.items()}
    batch = UnlearnBatch(model, inputs)
    parameters = [model.transformer.h[1].mlp.c_fc.bias]
    (exact,) = exact_diagonal([batch], parameters)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(400):
        del batch.outputs
        found += gauss_newton_bartlett([batch], parameters, generator)
    estimates = torch.stack(found)
    assert (estimates >= 0).all()
    error = estimates.std(0) / len(found) ** 0.5
    assert ((estimates.mean(0) - exact).abs() <= 5 * error + 1e-15).all()


def test_a_parameter_that_takes_no_part_has_no_curvature():
    model = tiny_model("bert")
    batch = UnlearnBatch(model, tiny_batch("bert"))
    apart = torch.nn.Parameter(torch.ones(2))
    of_head, of_apart = gauss_newton_bartlett([batch], [model.classifier.bias, apart])
    assert of_head.any()
    assert not of_apart.any()


def test_a_task_without_class_probabilities_is_a_one_line_error():
    model = tiny_model("bert", "regression")
    batch = UnlearnBatch(model, tiny_batch("bert", "regression"))
    with pytest.raises(ValueError, match=r"records must have class or token labels .* got torch.float32 labels"):
        gauss_newton_bartlett([batch], list(model.parameters()))
