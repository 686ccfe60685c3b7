"""A run that is looked at on its way gives the model of the best look, bit by bit what a shorter run gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import ViTForImageClassification

from pymape.experiments.config import MethodConfig, SelectionConfig, SettingConfig, TaskConfig
from pymape.experiments.methods import Chosen, Measured, choose, unlearn
from pymape.experiments.tasks import Forgetting, forgetting, make_task, train

SELECTIONS = {
    "everything": SelectionConfig(),
    "modules": SelectionConfig(kind="modules", objective="magnitude", budget=0.3),
    "saliency": SelectionConfig(kind="saliency", budget=0.1),
    "lora": SelectionConfig(kind="lora", rank=2),
}


@pytest.fixture(scope="module")
def trained() -> tuple[ViTForImageClassification, Forgetting]:
    config = TaskConfig(
        "digits", epochs=2, options={"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
    )
    task = make_task(config)
    split = task.split(0)
    data = forgetting(SettingConfig("random", share=0.05), 0, split, task.classes)
    model = task.start(0)
    train(model, split.train, config, 0)
    return model, data


def run(
    trained: tuple[ViTForImageClassification, Forgetting], chosen: Chosen, steps: int, **looks: Any
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    original, data = trained
    model, facts = unlearn(
        copy.deepcopy(original), chosen, MethodConfig("gd"), 1e-3, forget=data.forget, retain=data.retain, steps=steps,
        batch_size=8, seed=0, **looks,
    )  # fmt: skip
    assert not model.training
    return model.state_dict(), facts


@pytest.mark.parametrize("kind", list(SELECTIONS))
@pytest.mark.parametrize(("every", "wanted"), [(1, 3), (2, 2), (2, 5), (9, 5)])
def test_the_best_look_is_what_a_shorter_run_gives(
    trained: tuple[ViTForImageClassification, Forgetting], kind: str, every: int, wanted: int
) -> None:
    original, data = trained
    measured = Measured(original, {"forget": data.forget, "retain": data.retain}, 0)
    chosen = choose(SELECTIONS[kind], 1.0, measured)
    looked: list[int] = []
    at = [step for step in range(1, 6) if step % every == 0 or step == 5]

    def judge(model: torch.nn.Module) -> float:
        assert torch.isfinite(model(pixel_values=data.forget[0]["pixel_values"][None]).logits).all()
        looked.append(at[len(looked)])
        return abs(looked[-1] - wanted)

    found, facts = run(trained, chosen, 5, judge=judge, every=every)
    shorter, other = run(trained, chosen, wanted)
    assert looked == at
    assert facts["steps"] == wanted
    assert found.keys() == shorter.keys()
    assert all(torch.equal(found[name], shorter[name]) for name in found)
    assert "steps" not in other
    assert not all(torch.equal(value, original.state_dict()[name]) for name, value in found.items())


def test_the_first_of_equals_is_kept_and_looking_costs_no_time(
    trained: tuple[ViTForImageClassification, Forgetting], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0

    def clocks() -> tuple[float, float]:
        nonlocal now
        now += 1.0  # whatever happens between two readings takes a second
        return now, 2 * now

    monkeypatch.setattr("pymape.experiments.looks._clocks", clocks)
    # Beginning, before and after every look: a second of training before each look, a second of looking at each.
    scores = iter([5.0, 3.0, 3.0, 4.0])
    _, facts = run(trained, Chosen(), 4, judge=lambda _: next(scores), every=1)
    assert (facts["steps"], facts["seconds"], facts["cpu_seconds"]) == (2, 2.0, 4.0)


def test_one_shot_objectives_are_not_looked_at(trained: tuple[ViTForImageClassification, Forgetting]) -> None:
    original, data = trained
    _, facts = unlearn(
        copy.deepcopy(original), Chosen(), MethodConfig("influence", parameter="gamma"), 1e-2, forget=data.forget,
        retain=data.retain, steps=1, batch_size=8, seed=0, judge=lambda _: pytest.fail("it takes no steps"), every=1,
    )  # fmt: skip
    assert "steps" not in facts
