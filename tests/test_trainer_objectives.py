"""What UnlearnTrainer's objectives compute, against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_zoo import tiny_model
from torch import Tensor
from trainer_tools import KINDS, NAMES, arguments, collate, make, outside, records, some_masks
from transformers import TrainerCallback

from pymape.data.records import bare_record
from pymape.objectives import objective_names
from pymape.objectives.match import matched_losses
from pymape.objectives.registry import _OBJECTIVES, objective
from pymape.objectives.sophia import Sophia
from pymape.trainer import UnlearnTrainer


@pytest.mark.parametrize("name", ["kl", "npo"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_the_reference_is_the_original_model(name, family, tmp_path):
    """At the first step the divergence from the original is exactly zero, later it is not."""
    log: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            log.extend([logs["loss"]] if "loss" in logs else [])

    model = tiny_model(family)
    args = arguments(tmp_path, num_train_epochs=3, per_device_train_batch_size=8)
    trainer = make(family, tmp_path, model=model, args=args, objective=name, beta=0.5, callbacks=[Watch()], forget=8)
    inputs = collate(trainer.data["forget"])
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy
        logits, labels = model(**inputs).logits, inputs["labels"]
        if family == "gpt2":
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        forget = float(nll(logits, labels))
    retain = float(token_losses(model, trainer.data["retain"]).mean())
    first = -forget if name == "kl" else 2 / 0.5 * torch.tensor(2.0).log().item() + retain
    trainer.train()
    assert log[0] == pytest.approx(first, rel=2e-4)
    assert len(log) == 3
    assert log[2] < log[0]


def token_losses(model: torch.nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """[n] losses of the labelled tokens of records, one after the other; of the records for classifiers."""
    found = []
    with torch.no_grad():
        for row in rows:
            inputs = collate([row])
            logits, labels = model(**inputs).logits, inputs["labels"]
            if labels.ndim == 2:
                logits, labels = logits[0, :-1], labels[0, 1:]
            found.append(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none"))
    return torch.cat(found)


def test_influence_equals_the_formula_per_record(tmp_path):
    model = tiny_model("bert", dtype=torch.float64)
    masks = some_masks(model)
    frozen = outside(model, masks)
    forget, retain = records("text", 4, 1), records("text", 8, 2)
    parameters = dict(model.named_parameters())

    def gradients(rows: list[dict[str, Any]]) -> list[tuple[Tensor, ...]]:
        return [
            torch.autograd.grad(model(**collate([row])).loss, list(parameters.values()), allow_unused=True)
            for row in rows
        ]

    of_forget, of_retain = gradients(forget), gradients(retain)
    expected = {}
    for place, (name, parameter) in enumerate(parameters.items()):
        fisher = sum(gradient[place] ** 2 for gradient in of_retain) / 8
        step = sum(gradient[place] for gradient in of_forget) / 8 / (fisher + 0.01)
        expected[name] = torch.where(frozen[name], parameter.detach(), parameter.detach() + step)
    trainer = make("bert", tmp_path, model=model, objective="influence", gamma=0.01)
    output = trainer.train()
    trainer.merge()
    assert output.metrics["update_norm"] > 0
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_dpo_starts_at_the_original_model(family, tmp_path):
    """At the first step both ratios are one; alternative answers are paired with their records."""
    log: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            log.extend([logs["loss"]] if "loss" in logs else [])

    args = arguments(tmp_path, num_train_epochs=3, per_device_train_batch_size=8)
    model = tiny_model(family)
    data = {"forget_dataset": records(KINDS[family], 8, 1), "data_collator": collate}
    trainer = UnlearnTrainer(model, args, objective="dpo", beta=0.5, callbacks=[Watch()], **data)
    trainer.train()
    assert log[0] == pytest.approx(2 / 0.5 * math.log(2), rel=1e-5)
    assert log[2] < log[1] < log[0]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("name", ["match", "match_tokens"])
def test_what_is_forgotten_gets_the_losses_of_unseen_records(name, family, tmp_path):
    args = arguments(tmp_path, num_train_epochs=60, learning_rate=5e-3, lr_scheduler_type="linear")
    forget, unseen = records(KINDS[family], 8, 1), records(KINDS[family], 5, 3)
    model = tiny_model(family).eval()

    def losses(rows: list[dict[str, Any]]) -> Tensor:
        if name == "match_tokens":
            return token_losses(model, rows)
        return torch.stack([token_losses(model, [row]).mean() for row in rows])

    before = losses(forget)
    expected = matched_losses(before, losses(unseen))
    assert (expected - before).abs().max() > 0.05
    trainer = UnlearnTrainer(
        model, args, objective=name, forget_dataset=forget, unseen_dataset=unseen, data_collator=collate,
        dropout=False,
    )  # fmt: skip
    trainer.train()
    model = trainer.merge()
    torch.testing.assert_close(losses(forget), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", ["npo", "gd"])
def test_the_retain_term_can_be_held_to_the_original_model(name, family, tmp_path):
    """The divergence is zero at the start, so alpha does not matter to the first loss."""
    losses = {}
    for retain, alpha in (("kl", 1.0), ("kl", 9.0), ("nll", 9.0)):
        args = arguments(tmp_path, per_device_train_batch_size=8, num_train_epochs=3)
        trainer = UnlearnTrainer(
            tiny_model(family), args, objective=name, alpha=alpha, retain=retain, data_collator=collate,
            forget_dataset=records(KINDS[family], 8, 1), retain_dataset=records(KINDS[family], 8, 2),
        )  # fmt: skip
        trainer.train()
        losses[retain, alpha] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["kl", 1.0][0] == pytest.approx(losses["kl", 9.0][0], rel=1e-5)
    assert losses["kl", 1.0][1] != pytest.approx(losses["kl", 9.0][1], rel=1e-5)
    assert losses["nll", 9.0][0] > losses["kl", 9.0][0] + 1


def test_second_order_steps_have_their_curvature_and_are_bounded(tmp_path):
    args = arguments(tmp_path, num_train_epochs=6, learning_rate=1e-3, lr_scheduler_type="constant", max_grad_norm=0.0)
    options = {"loss": "gd", "every": 3, "rho": 0.5}
    args.gradient_accumulation_steps = 2
    seen: list[tuple[int, Tensor]] = []
    trainer = make("gpt2", tmp_path, args=args, objective="so", objective_options=options, retain=16)
    original = {name: value.clone() for name, value in trainer.partial.state_dict().items()}

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            inner = optimizer.optimizer
            seen.append((state.global_step, inner.state[inner.parameters[0]]["hessian"].clone()))

    trainer.add_callback(Watch())
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, Sophia)
    assert trainer.optimizer.optimizer.param_groups[0]["rho"] == 0.5
    steps = len(seen)
    assert steps == 12
    renewed = [step for (step, now), (_, before) in zip(seen[1:], seen, strict=False) if not torch.equal(now, before)]
    assert renewed == [3, 6, 9]
    assert seen[0][1].gt(0).any()
    moved = max(float((value - original[name]).abs().max()) for name, value in trainer.partial.state_dict().items())
    assert 1e-3 < moved <= steps * 1e-3 * (1 + 1e-3)


def test_influence_with_conjugate_gradients_equals_a_dense_solve(tmp_path):
    model = tiny_model("bert", dtype=torch.float64)
    masks = some_masks(model)
    trainer = make("bert", tmp_path, model=model, objective="influence", gamma=0.01,
                   objective_options={"cg_steps": 200, "cg_tolerance": 1e-12})  # fmt: skip
    parameters = list(trainer.partial.parameters())
    start = torch.cat([p.detach().flatten() for p in parameters])

    def gradients(rows: list[dict[str, Any]]) -> Tensor:
        batches = [collate([bare_record(row)]) for row in rows]
        found = [torch.autograd.grad(model(**batch).loss, parameters) for batch in batches]
        return torch.stack([torch.cat([entries.flatten() for entries in row]) for row in found])

    forget, retain = (gradients(trainer.data[side]) for side in ("forget", "retain"))
    # (R^T R / N + gamma)^-1 b, by the Woodbury identity, N x N
    b, n = forget.sum(0) / 8, len(retain)
    inner = torch.linalg.solve(0.01 * n * torch.eye(n, dtype=b.dtype) + retain @ retain.T, retain @ b)
    expected = start + (b - retain.T @ inner) / 0.01
    output = trainer.train()
    after = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(after, expected, rtol=1e-8, atol=1e-10)
    assert output.metrics["cg_residual"] <= 1e-12
    assert float((after - start).abs().max()) > 1e-3
    trainer.merge()
    assert masks.cost() < 1


def test_a_users_objective(tmp_path):
    try:

        @objective("capped", retain="required")
        def capped(step):
            return (4 - step.forget.loss()).relu() + step.alpha * step.retain.loss()

        make("bert", tmp_path, objective="capped").train()

        @objective("vector")
        def vector(step):
            return step.forget.nll()

        with pytest.raises(ValueError, match="'vector' must return a scalar"):
            make("bert", tmp_path, objective="vector").train()
    finally:
        _OBJECTIVES.pop("capped", None)
        _OBJECTIVES.pop("vector", None)
    assert objective_names() == NAMES
