"""What needs whole models: distances, the relearning attack, costs, and `evaluate` on every kind of model."""

from __future__ import annotations

import copy
import math
import mmap
import os
import time
from typing import Any

import pytest
import torch
from metrics_tools import FixedForCausalLM, records
from model_zoo import DECODERS, ENCODERS, MORE_DECODERS, MORE_ENCODERS, tiny_model
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch.utils.data import DataLoader, RandomSampler
from transformers import BertForTokenClassification, ResNetConfig, ResNetForImageClassification

from pymape.data.positions import most_tokens
from pymape.metrics import (
    RecordScores,
    evaluate,
    evaluation,
    linear_cka,
    mean_gap,
    measure_cost,
    membership_attack,
    model_distance,
    modified_entropies,
    predict,
    record_scores,
    relearning_attack,
    score_metrics,
)
from pymape.metrics import costs as costs_module
from pymape.metrics.scores import gradient_norms

KINDS = [("bert", "sequence_classification"), ("vit", "image_classification"), ("gpt2", "causal_lm")]


def sets(family: str, task: str) -> dict[str, list[dict[str, Any]]]:
    return {name: records(family, task, 6, seed, name) for seed, name in enumerate(("forget", "retain", "test"))}


@pytest.mark.parametrize("family", ENCODERS + DECODERS + MORE_ENCODERS + MORE_DECODERS)
def test_most_tokens_are_those_that_learned_positions_hold(family: str) -> None:
    model = tiny_model(family, "base", max_position_embeddings=12, pad_token_id=3)
    limit = most_tokens(model)
    if family in ("roberta", "xlm-roberta", "camembert"):
        assert limit == 8
    else:
        assert limit == (
            12 if family in ("bert", "distilbert", "gpt2", "electra", "deberta-v2", "gpt_neo", "gptj") else None
        )
    model(torch.full((1, limit or 40), 5))
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, limit + 1), 5))


def test_distance_of_known_distributions(tmp_path: Any) -> None:
    p, q = torch.tensor([1 / 8, 1 / 8, 3 / 4]), torch.tensor([1 / 4, 1 / 2, 1 / 4])
    model, other = FixedForCausalLM(p.log().tolist()), FixedForCausalLM(q.log().tolist())
    data = [
        {"id": "a", "input_ids": [0, 1, 2], "labels": [0, 1, 2]},
        {"id": "b", "input_ids": [0, 1], "labels": [0, 1]},
    ]
    found = model_distance(model, other, data)
    middle = (p + q) / 2
    expected = {
        "logit_kl": (q * (q / p).log()).sum().item(),
        "logit_js": ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()).item() / 2,
        "logit_l2": (p.log() - q.log()).norm().item(),
        "hidden_cosine": torch.nn.functional.cosine_similarity(p.log(), q.log(), dim=0).item(),
    }
    figures = found.figures()
    assert math.isnan(figures.pop("hidden_cka"))  # the same states for both records
    assert figures == pytest.approx(expected, rel=1e-5)
    found.save(tmp_path / "distances.safetensors")
    with safe_open(tmp_path / "distances.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("kl"), found.kl)


@pytest.mark.parametrize(("family", "task"), [*KINDS, ("distilbert", "question_answering")])
def test_a_model_is_at_no_distance_from_itself_however_it_is_batched(family: str, task: str) -> None:
    model, other, data = tiny_model(family, task), tiny_model(family, task, seed=1), records(family, task)
    figures = model_distance(model, copy.deepcopy(model), data).figures()
    assert figures == pytest.approx(
        {"logit_kl": 0, "logit_js": 0, "logit_l2": 0, "hidden_cosine": 1, "hidden_cka": 1}, abs=1e-6
    )
    whole, alone = (model_distance(model, other, data, batch_size=size) for size in (5, 1))
    assert (whole.kl > 0).all()
    assert (whole.js <= math.log(2)).all()
    for name in ("kl", "js", "logit_l2", "cosine"):
        torch.testing.assert_close(getattr(whole, name), getattr(alone, name), rtol=1e-4, atol=1e-5)
    assert whole.cka == pytest.approx(alone.cka, abs=1e-5)


def test_models_that_cannot_be_compared() -> None:
    data = records("bert", "sequence_classification")
    model = tiny_model("bert")
    with pytest.raises(ValueError, match="other must be a model for classification, got one for causal"):
        model_distance(model, tiny_model("gpt2"), data)
    with pytest.raises(ValueError, match="other must have 3 classes or tokens as model has, got 5"):
        model_distance(model, tiny_model("bert", num_labels=5), data)
    wider = model_distance(model, tiny_model("bert", hidden_size=32), data)
    assert wider.cosine.isnan().all()
    assert 0 <= wider.cka <= 1


def test_cka_knows_no_rotation_or_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    # Centred columns (-1, 1, 0)' and (1, 1, -2)' are orthogonal; with (-1, 0, 1)' the first has cosine 1/2.
    first = torch.tensor([[-1.0], [1.0], [0.0]])
    assert linear_cka(first, torch.tensor([[1.0], [1.0], [-2.0]])) == pytest.approx(0, abs=1e-12)
    assert linear_cka(first, torch.tensor([[-1.0], [0.0], [1.0]])) == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"representations must be \[N, D\] and \[N, E\]"):
        linear_cka(x, x[:3])


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_relearning_brings_the_forget_set_back(family: str, task: str) -> None:
    model, forget = tiny_model(family, task, dropout=0.5), records(family, task, 10)
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"original_accuracy": 100, "share": 1.0, "lr": 1e-2, "steps": 60, "every": 20}
    curve = relearning_attack(model, forget, batch_size=4, **options)
    assert curve.steps == [0, 20, 40, 60]
    assert curve.records == 10
    assert curve.target == 95
    scores = record_scores(model, forget)
    assert curve.accuracy[0] == scores.predictions().accuracy
    assert curve.loss[0] == pytest.approx(scores.loss.mean().item(), rel=1e-5)
    assert curve.loss[-1] < 0.2 * curve.loss[0]
    assert curve.steps_to_relearn == next(s for s, value in zip(curve.steps, curve.accuracy) if value >= 95)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    torch.manual_seed(123)
    assert relearning_attack(model, forget, batch_size=4, **options) == curve
    assert relearning_attack(model, forget, batch_size=4, seed=1, **options) != curve


def test_relearning_uses_a_share_and_may_not_succeed() -> None:
    model, forget = tiny_model("vit"), records("vit", "image_classification", 20)
    curve = relearning_attack(model, forget, original_accuracy=100, share=0.1, lr=1e-9, steps=3, every=2)
    assert curve.records == 2
    assert curve.steps == [0, 2, 3]
    assert curve.steps_to_relearn is None
    at_once = relearning_attack(model, forget, original_accuracy=curve.accuracy[0] + 5, steps=1)
    assert at_once.steps_to_relearn == 0
    assert relearning_attack(model, forget[:3], original_accuracy=50, steps=1).records == 1
    for option, value in {"share": 0, "steps": 0, "every": 0, "lr": 0.0, "batch_size": 0}.items():
        with pytest.raises(ValueError, match=f"^{option} must be .*, got {value}"):
            relearning_attack(model, forget, original_accuracy=50, **{option: value})
    with pytest.raises(ValueError, match="forget must be at least one record"):
        relearning_attack(model, [], original_accuracy=50)


def test_costs_are_those_of_the_block() -> None:
    with measure_cost() as outer:
        # Straight from the system: an allocator might take it from what earlier tests have freed.
        with measure_cost() as large, mmap.mmap(-1, 64 * 2**20) as block:
            block.write(b"1" * len(block))
        with measure_cost() as small:
            time.sleep(0.05)
    assert small.wall_seconds >= 0.05 > small.cpu_seconds
    assert outer.wall_seconds >= large.wall_seconds + small.wall_seconds
    assert outer.peak_cpu_mib >= large.peak_cpu_mib
    if not small.whole_process:
        assert large.peak_cpu_mib - small.peak_cpu_mib > 32
    names = {"wall_seconds", "cpu_seconds", "peak_cpu_mib"} | ({"peak_gpu_mib"} if torch.cuda.is_available() else set())
    assert small.figures().keys() == names


def test_costs_without_the_right_to_reset_the_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(costs_module, "_CLEAR", tmp_path / "absent" / "clear_refs")
    monkeypatch.setattr(costs_module, "_STATUS", tmp_path / "absent" / "status")
    with pytest.raises(RuntimeError), measure_cost() as cost:
        raise RuntimeError("the block fails, and its cost is known all the same")
    assert cost.whole_process
    assert 10 < cost.peak_cpu_mib < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    assert cost.wall_seconds > 0


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_evaluate_measures_every_kind_of_model(family: str, task: str) -> None:
    data = sets(family, task)
    model, retrained, reference, *shadows = (tiny_model(family, task, seed=seed) for seed in range(5))
    options = {"shadows": shadows} if task != "causal_lm" else {"decode": str, "end_token": 49}
    found = evaluate(model, **data, retrained=retrained, reference=reference, gradients=True, batch_size=4, **options)
    expected = {"UA", "RA", "TA", "MIA", "gap", "privleak", "forget_loss", "retain_loss", "test_loss"}
    expected |= {"mia_loss", "mia_reference", "mia_gradnorm", "wall_seconds", "cpu_seconds", "peak_cpu_mib"}
    expected |= {"logit_kl", "logit_js", "logit_l2", "hidden_cosine", "hidden_cka"}
    if task == "causal_lm":
        expected |= {"mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "extraction_strength", "exact_memorization"}
    else:
        expected |= {"mia_lira", "MIA_entropy", "MIA_modified_entropy"}
    assert found.keys() - {"peak_gpu_mib"} == expected
    gold = evaluate(retrained, **data)
    assert found["gap"] == pytest.approx(mean_gap(found, gold))
    attack = "mia_min_k" if task == "causal_lm" else "mia_loss"
    auc = evaluate(retrained, **data, end_token=49)[attack]
    assert found["privleak"] == pytest.approx(100 * (auc - found[attack]) / (1 - auc), nan_ok=True)
    itself = evaluate(model, **data, retrained=model)
    assert itself["gap"] == itself["privleak"] == 0


def test_evaluate_without_a_test_set_makes_no_attacks() -> None:
    data = sets("bert", "sequence_classification")
    found = evaluate(tiny_model("bert"), forget=data["forget"], retain=data["retain"], retrained=tiny_model("bert"))
    assert {"UA", "RA", "gap"} <= found.keys()
    assert not {name for name in found if name.lower().startswith(("mia", "ta", "privleak"))}


def test_figures_follow_from_saved_scores(tmp_path: Any) -> None:
    model, data = tiny_model("vit"), sets("vit", "image_classification")
    stored = {}
    for name, rows in data.items():
        record_scores(model, rows).save(tmp_path / name)
        stored[name] = RecordScores.load(tmp_path / name)
    figures = score_metrics(stored)
    assert figures.items() <= evaluate(model, **data).items()
    entropies = {name: modified_entropies(scores.logits, scores.labels) for name, scores in stored.items()}
    attack = membership_attack(entropies["retain"], entropies["test"], entropies["forget"])
    assert figures["MIA_modified_entropy"] == attack.non_member_share


def test_scores_that_do_not_belong_together_are_refused() -> None:
    model = tiny_model("vit")
    data = sets("vit", "image_classification")
    scores = {name: record_scores(model, rows) for name, rows in data.items()}
    with pytest.raises(ValueError, match="sets must hold scores of forget, retain"):
        score_metrics({"forget": scores["forget"]})
    with pytest.raises(ValueError, match="retrained must hold scores of forget, retain, test, got none of"):
        score_metrics(scores, retrained={"forget": scores["forget"], "retain": scores["retain"]})
    with pytest.raises(ValueError, match="reference must be of the same 6 records"):
        score_metrics(scores, reference={"forget": scores["test"], "test": scores["test"]})
    with pytest.raises(ValueError, match="shadows must be none, or two or more, got 1"):
        score_metrics(scores, shadows=[scores])


def test_attacks_that_cannot_be_made_are_refused_before_anything_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pymape.metrics.evaluation.record_scores", lambda *_, **__: pytest.fail("nothing is scored"))
    model, data = tiny_model("gpt2", "causal_lm"), sets("gpt2", "causal_lm")
    for options, message in (
        ({"shadows": [model, model]}, "shadows must be left out for a model for causal language model, got 2"),
        ({"shadows": [model]}, "shadows must be none, or two or more, got 1"),
        ({"reference": model, "test": None}, "reference must come with test"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(model, **{**data, **options})


def test_only_the_model_itself_is_attacked_by_gradient_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    real = evaluation.record_scores

    def scores(model: Any, data: Any, *, gradients: bool, **options: Any) -> RecordScores:
        asked.append((model, gradients))
        return real(model, data, gradients=gradients, **options)

    monkeypatch.setattr(evaluation, "record_scores", scores)
    data = sets("vit", "image_classification")
    model, retrained, reference = (tiny_model("vit", seed=seed) for seed in range(3))
    evaluate(model, **data, retrained=retrained, reference=reference, gradients=True)
    assert {one for one, gradients in asked if gradients} == {model}
    assert sum(gradients for _, gradients in asked) == 2  # forget and test


def test_the_norms_of_a_loader_are_those_of_its_records() -> None:
    model, data = tiny_model("bert"), sets("bert", "sequence_classification")["retain"]
    data = [{**record, "id": f"r{row}"} for row, record in enumerate(data)]
    expected = gradient_norms(model, data)
    torch.testing.assert_close(gradient_norms(model, DataLoader(data, batch_size=3)), expected)
    chosen = RandomSampler(data, num_samples=3, generator=torch.Generator().manual_seed(0))
    found = record_scores(model, DataLoader(data, batch_size=2, sampler=chosen), gradients=True)
    rows = [int(name.removeprefix("r")) for name in found.ids]
    torch.testing.assert_close(found.gradient_norms, expected[rows])
    with torch.inference_mode():
        torch.testing.assert_close(gradient_norms(model, data), expected)


def test_padding_on_the_left_changes_no_score_of_a_model_with_learned_positions() -> None:
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(1, 50, (length,), generator=draw).tolist() for length in (3, 7, 5)]
    data = [{"input_ids": text, "labels": text} for text in texts]

    def left(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(record["input_ids"]) for record in records)
        missing = [width - len(record["input_ids"]) for record in records]
        rows = list(zip(missing, records, strict=True))
        return {
            "input_ids": torch.tensor([[0] * n + record["input_ids"] for n, record in rows]),
            "labels": torch.tensor([[-100] * n + record["labels"] for n, record in rows]),
            "attention_mask": torch.tensor([[0] * n + [1] * (width - n) for n in missing]),
        }

    lora = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    for model in (tiny_model("gpt2"), tiny_model("llama"), lora):
        torch.testing.assert_close(record_scores(model, data, collate_fn=left).loss, record_scores(model, data).loss)
        found, expected = predict(model, data, collate_fn=left), predict(model, data)
        torch.testing.assert_close(found.loss, expected.loss)
        other = tiny_model("gpt2", seed=1)
        distance, expected_distance = (model_distance(model, other, data, collate_fn=fn) for fn in (left, None))
        torch.testing.assert_close(distance.kl, expected_distance.kl, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(distance.cosine, expected_distance.cosine, rtol=1e-4, atol=1e-5)
    options: dict[str, Any] = {"original_accuracy": 100.0, "share": 1.0, "lr": 1e-3, "steps": 4, "every": 4}
    curve, usual = (relearning_attack(tiny_model("gpt2"), data, collate_fn=fn, **options) for fn in (left, None))
    assert curve.loss == pytest.approx(usual.loss, rel=1e-4)


def test_what_predict_cannot_judge_is_refused() -> None:
    text = {"input_ids": [1, 2, 3], "labels": [-100, -100, -100], "id": "r7"}
    model = tiny_model("gpt2", "causal_lm")
    with pytest.raises(ValueError, match="r7"):
        predict(model, [text])
    with pytest.raises(ValueError, match="r7"):
        model_distance(model, model, [text])
    with pytest.raises(ValueError, match="labels"):
        predict(model, [{"input_ids": [1, 2, 3]}])
    other = BertForTokenClassification(tiny_model("bert").config)
    with pytest.raises(ValueError, match="model must be a classifier or a causal language model, got one for token"):
        predict(other, [{"input_ids": [1, 2, 3], "labels": [0, 1, 0]}])


def test_a_model_in_half_precision_relearns_as_one_in_full() -> None:
    data = sets("gpt2", "causal_lm")["forget"]
    model = tiny_model("gpt2", "causal_lm").to(torch.bfloat16)
    options: dict[str, Any] = {"original_accuracy": 100.0, "steps": 6, "lr": 1e-4, "share": 1.0, "every": 3}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = relearning_attack(model, data, **options)
    assert found == relearning_attack(copy.deepcopy(model).float(), data, **options)
    assert found.loss[-1] < found.loss[0]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        assert relearning_attack(model, data, **options) == found
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic", "num_labels": 3}
    normed = ResNetForImageClassification(ResNetConfig(**sizes)).to(torch.bfloat16)  # buffers count too
    pictures, options = records("vit", "image_classification"), options | {"steps": 1}
    found = relearning_attack(normed, pictures, **options)
    assert found == relearning_attack(copy.deepcopy(normed).float(), pictures, **options)
