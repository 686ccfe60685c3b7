"""What UnlearnTrainer refuses: models that would be saved broken, options without an effect, data of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import IMAGE_SIZE, LABELS, tiny_config, tiny_model
from torch import Tensor, nn
from trainer_tools import arguments, build, make, records, some_masks
from transformers import DataCollatorWithFlattening, DeiTForImageClassificationWithTeacher

from pymape import importance
from pymape.learned_gates import learn_gates
from pymape.objectives.registry import _OBJECTIVES, objective
from pymape.trainer import UnlearnTrainer


def test_a_model_with_peft_layers_left_in_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model("bert")
    wrapper = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    message = "model must be plain, got one with PEFT's layers in it, whose checkpoints no plain model could load"
    for options in ({"masks": some_masks(tiny_model("bert"))}, {"args": arguments(tmp_path, save_strategy="steps")}):
        with pytest.raises(ValueError, match=message):
            build(tmp_path, model=model, **options)
    assert not caplog.messages
    trainer = build(tmp_path, model=model)
    assert "model has PEFT's layers in it: merge_and_unload()" in caplog.text
    assert all("lora_" in name for name, _ in trainer.partial.named_parameters())
    trainer.merge()
    build(tmp_path, model=wrapper.merge_and_unload(), masks=some_masks(tiny_model("bert")))


def test_a_compiled_model(tmp_path: Path) -> None:
    model, rows = tiny_model("bert"), records("text", 3, 1)
    compiled: Any = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"model must be plain, got one that torch\.compile has wrapped"):
        UnlearnTrainer(compiled, arguments(tmp_path), forget_dataset=rows, objective="ga")
    measured, expected = importance(compiled, rows), importance(model, rows)
    torch.testing.assert_close(measured.heads, expected.heads, rtol=1e-4, atol=1e-7)
    assert measured.layout == expected.layout  # masks of the one fit the other
    batches = [{"input_ids": torch.tensor([[4, 5]]), "labels": torch.tensor([1])}]
    learn_gates(compiled, batches, batches, steps=1, lr=10.0, progress=False)


@pytest.mark.parametrize(
    ("chosen", "options", "message"),
    [
        ({"neftune_noise_alpha": 5.0}, {"dropout": False}, "neftune_noise_alpha must be None where"),
        ({"neftune_noise_alpha": 5.0}, {"objective": "ssd"}, "neftune_noise_alpha must be None .* got 5.0"),
        ({"eval_strategy": "epoch"}, {"objective": "ssd"}, "eval_strategy must be no for 'ssd', which takes no steps, "
         "got epoch"),
        ({"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True},
         {"objective": "influence"}, "eval_strategy must be no for 'influence'"),
    ],
)  # fmt: skip
def test_options_without_an_effect(chosen: Any, options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build(tmp_path, args=arguments(tmp_path, **chosen), eval_dataset=records("text", 2, 5), **options)


def test_noise_on_embeddings_below_the_masks(tmp_path: Path) -> None:
    args, model = arguments(tmp_path, neftune_noise_alpha=5.0), tiny_model("bert")
    masks = some_masks(model)
    build(tmp_path, model=model, args=args, masks=masks).merge()
    masks.heads[0], masks.filters[0] = False, False
    with pytest.raises(ValueError, match=r"masks that leave layer 0 alone"):
        build(tmp_path, model=model, args=args, masks=masks)


def test_a_one_shot_objective_is_not_resumed(tmp_path: Path) -> None:
    trainer = build(tmp_path, objective="ssd")
    with pytest.raises(ValueError, match=r"resume_from_checkpoint must be None for 'ssd', .* got 'somewhere'"):
        trainer.train(resume_from_checkpoint="somewhere")
    trainer.train(resume_from_checkpoint=False)


@pytest.mark.parametrize("task", ["regression", "multi_label", "question_answering"])
@pytest.mark.parametrize("options", [{"objective": "kl"}, {"objective": "so"}, {"objective": "npo", "retain": "kl"}])
def test_objectives_that_compare_probabilities(task: str, options: dict[str, str], tmp_path: Path) -> None:
    kind = {"multi_label": "multi_label_classification", "question_answering": "question answering"}.get(task, task)
    what = r"retain='kl'" if "retain" in options else f"objective '{options['objective']}'"
    with pytest.raises(ValueError, match=f"model must tell classes or tokens apart for {what}, got one for {kind}"):
        build(tmp_path, model=tiny_model("bert", task), **options)


@pytest.mark.parametrize("objective", ["npo", "simnpo", "match", "rl", "gd"])
def test_a_collator_that_joins_records(objective: str, tmp_path: Path) -> None:
    trainer = make("llama", tmp_path, objective=objective, data_collator=DataCollatorWithFlattening())
    with pytest.raises(ValueError, match="collator must give one row per record, got 1 for 4"):
        trainer.train()


def test_importance_of_a_collator_that_joins_records() -> None:
    rows = [{**row, "input_ids": row["input_ids"].tolist()} for row in records("language", 4, 1)]
    with pytest.raises(ValueError, match="collator must give one row per record, got 1 for 4"):
        importance(tiny_model("llama"), rows, collate_fn=DataCollatorWithFlattening())


@pytest.mark.parametrize("which", [1, 2])
def test_training_records_are_no_unseen_ones(which: int, tmp_path: Path) -> None:
    """Told by their content, whatever their ids; some may well stand in both."""
    known = [{**row, "id": f"u{row['id']}"} for row in records("text", 3, which)]
    with pytest.raises(ValueError, match="unseen_dataset must hold records of its own, got 3 to forget or retain"):
        build(tmp_path, objective="match", unseen_dataset=known)
    build(tmp_path, objective="match", unseen_dataset=[*known, *records("text", 1, 9)])


def test_repeated_ids(tmp_path: Path) -> None:
    rows = records("text", 3, 1)
    with pytest.raises(ValueError, match=r"ids of forget_dataset must be unique, got \['1-2'\] more than once"):
        build(tmp_path, forget_dataset=[*rows, rows[2]])


def test_an_objective_must_return_a_loss(tmp_path: Path) -> None:
    try:

        @objective("number")
        def number(step: Any) -> float:
            return float(step.forget.loss())

        @objective("detached")
        def detached(step: Any) -> Tensor:
            return step.forget.loss().detach()

        for name, message in (
            ("number", "objective 'number' must return a scalar tensor, got float"),
            ("detached", "objective 'detached' must return a loss with a gradient, got a constant"),
        ):
            with pytest.raises(ValueError, match=message):
                make("bert", tmp_path, objective=name).train()
    finally:
        for name in ("number", "detached"):
            _OBJECTIVES.pop(name, None)


def test_a_model_whose_forward_takes_no_labels(tmp_path: Path) -> None:
    model = DeiTForImageClassificationWithTeacher(tiny_config("deit")).eval()
    rows = [{"pixel_values": torch.randn(3, IMAGE_SIZE, IMAGE_SIZE), "labels": row % LABELS} for row in range(8)]
    trainer = UnlearnTrainer(model, arguments(tmp_path), forget_dataset=rows[:4], retain_dataset=rows[4:])
    trainer.train()
    assert trainer.state.global_step == 1


class Tokenizer:
    """What the trainer reads of one."""

    pad_token_id = 7


def test_a_tokenizer_leaves_the_padding_to_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = {"forget_dataset": records("language", 4, 1), "retain_dataset": records("language", 4, 2)}
    trainer = build(tmp_path, "llama", processing_class=Tokenizer(), **sets)
    seen: list[dict[str, Tensor]] = []
    model: nn.Module = trainer.model
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs), with_kwargs=True)
    trainer.train()
    padded = seen[0]["attention_mask"] == 0
    assert padded.any()
    assert (seen[0]["input_ids"][padded] == Tokenizer.pad_token_id).all()


def test_frozen_parameters_stay_without_masks(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.bert.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = build(tmp_path, model=model)
    trainer.train()
    after = trainer.merge().state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match="model must have parameters that require grad"):
        build(tmp_path, model=model.requires_grad_(False))
