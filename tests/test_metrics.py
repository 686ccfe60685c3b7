"""Accuracies, confidences, the membership attack and the mean gap."""

from __future__ import annotations

import math

import pytest
import torch
from metrics_tools import FixedForCausalLM, records
from model_zoo import tiny_batch, tiny_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from pymape.metrics import (
    Predictions,
    accuracy,
    confidences,
    entropies,
    evaluate,
    mean_gap,
    membership_attack,
    predict,
    summarise,
)


def test_accuracy_is_the_percentage_of_right_classes() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [5.0, 0.0, 1.0]])
    assert accuracy(logits, torch.tensor([0, 2, 2, 0])) == 75.0


def test_confidence_and_entropy_have_their_closed_form() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    torch.testing.assert_close(confidences(logits, torch.tensor([1, 0])), torch.tensor([0.75, 0.5]).double())
    expected = [-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), math.log(2)]
    torch.testing.assert_close(entropies(logits), torch.tensor(expected).double())


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 3], r"labels must be in \[0, 3\), got 0 to 3"), ([-1, 0], "got -1 to 0"), ([0], "shapes"), ([], "shapes")],
)
def test_accuracy_rejects_labels_that_do_not_fit(labels: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(torch.zeros(2, 3), torch.tensor(labels, dtype=torch.long))


def test_predict_gives_the_same_for_every_batch_size_and_puts_the_mode_back() -> None:
    model = tiny_model("bert", dropout=0.5).train()
    batch = tiny_batch("bert", batch=5, padding="right")
    data = [{"id": f"r{row}", **{name: values[row] for name, values in batch.items()}} for row in range(5)]
    frozen = model.bert.embeddings.eval()
    one, whole = predict(model, data, batch_size=1), predict(model, data, batch_size=5)
    torch.testing.assert_close(one.confidence, whole.confidence)
    assert torch.equal(one.correct, whole.correct)
    assert model.training
    assert not frozen.training
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    torch.testing.assert_close(whole.confidence, confidences(logits, batch["labels"]), rtol=1e-5, atol=1e-6)
    assert whole.accuracy == accuracy(logits, batch["labels"])


def test_predict_of_a_language_model_counts_its_own_tokens_only() -> None:
    data = [
        {"input_ids": [0, 2, 2, 1, 0], "labels": [0, 2, 2, 1, 0]},
        {"input_ids": [0, 2, 2], "labels": [-100, -100, 2]},
    ]
    found = predict(FixedForCausalLM(), data)
    torch.testing.assert_close(found.correct, torch.tensor([0.5, 1.0]).double())
    expected = [(0.75**2 * 0.125**2) ** 0.25, 0.75]
    torch.testing.assert_close(found.confidence, torch.tensor(expected).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_predict_of_a_language_model_leaves_labelled_padding_out(padding: str) -> None:
    text, mask = [2, 0, 2, 0, 0, 0], [1, 1, 1, 0, 0, 0]
    if padding == "left":
        text, mask = [0, 0, 0, 2, 0, 2], [0, 0, 0, 1, 1, 1]
    found = predict(FixedForCausalLM(), [{"input_ids": text, "attention_mask": mask, "labels": text}])
    assert found.correct.item() == 0.5
    assert found.loss.item() == pytest.approx(-math.log(0.75 * 0.125) / 2)


def test_predict_rejects_empty_data() -> None:
    with pytest.raises(ValueError, match="data must hold at least one record"):
        predict(nn.Linear(1, 1), [])


class Plain(nn.Module):
    """A classifier whose class says nothing of its task: logits are the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: torch.Tensor) -> object:
        return type("Output", (), {"logits": self.scale * inputs})


def test_predict_takes_a_plain_classifier() -> None:
    found = predict(Plain(), [{"inputs": [0.0, math.log(3)], "labels": 1}, {"inputs": [1.0, 0.0], "labels": 1}])
    assert found.correct.tolist() == [1, 0]
    assert found.confidence[0].item() == pytest.approx(0.75)
    with pytest.raises(ValueError, match=r"data must have labels, got \['inputs'\]"):
        predict(Plain(), [{"inputs": [0.0, 1.0]}])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\), got -100"):
        predict(Plain(), [{"inputs": [0.0, 1.0], "labels": -100}])


def test_predict_refuses_logits_of_another_task() -> None:
    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 1, "num_heads": 4, "vocab_size": 50}
    translator = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    message = "must be a classifier's, .* or a causal language model's, .* of T5ForConditionalGeneration"
    with pytest.raises(ValueError, match=message):
        predict(translator, [{"input_ids": [3, 4], "decoder_input_ids": [0, 3], "labels": [3, 4]}])
    with pytest.raises(ValueError, match=r"got \(5, 1\) and torch.float32 \(5,\) of BertForSequenceClassification"):
        predict(tiny_model("bert", "regression"), records("bert", "regression"))


def test_attack_tells_non_members_from_members() -> None:
    generator = torch.Generator().manual_seed(0)
    members = 0.95 + 0.05 * torch.rand(400, generator=generator)
    strangers = 0.6 * torch.rand(90, generator=generator)
    forgotten = membership_attack(members, strangers, 0.5 * torch.rand(50, generator=generator))
    remembered = membership_attack(members, strangers, 0.97 + 0.03 * torch.rand(50, generator=generator))
    assert forgotten.non_member_share == 100
    assert remembered.non_member_share == 0
    assert forgotten.members_recognised == forgotten.non_members_recognised == 100


def test_attack_has_no_prior_for_the_larger_class() -> None:
    generator = torch.Generator().manual_seed(0)
    members, strangers, target = (torch.rand(size, generator=generator) for size in (2000, 100, 200))
    found = membership_attack(members, strangers, target, seed=1)
    assert 15 < found.non_member_share < 85
    assert found == membership_attack(members, strangers, target, seed=1)


@pytest.mark.parametrize("name", ["members", "non_members", "target"])
@pytest.mark.parametrize("scores", [torch.tensor([]), torch.tensor([0.5, torch.nan])])
def test_attack_rejects_scores_it_cannot_use(name: str, scores: torch.Tensor) -> None:
    columns = dict.fromkeys(("members", "non_members", "target"), torch.rand(4)) | {name: scores}
    with pytest.raises(ValueError, match=f"^{name} must"):
        membership_attack(**columns)


def test_figures_follow_from_predictions() -> None:
    def known(share: float, confidence: float) -> Predictions:
        correct = (torch.arange(20) < 20 * share).double()
        return Predictions(correct, torch.full((20,), confidence).double(), correct)

    found = summarise(forget=known(0.25, 0.3), retain=known(1.0, 0.99), test=known(0.8, 0.3))
    assert found == {"UA": 75.0, "RA": 100.0, "TA": 80.0, "MIA": 100.0}


def test_evaluate_holds_what_predict_and_summarise_give() -> None:
    model = tiny_model("vit")
    sets = {}
    for seed, name in enumerate(("forget", "retain", "test")):
        batch = tiny_batch("vit", batch=6, seed=seed)
        sets[name] = [{key: values[row] for key, values in batch.items()} for row in range(6)]
    expected = summarise(*(predict(model, records) for records in sets.values()))
    found = evaluate(model, **sets, batch_size=4)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_mean_gap_is_the_mean_distance() -> None:
    retrained = {"UA": 100.0, "RA": 99.0, "TA": 90.0, "MIA": 80.0}
    assert mean_gap(retrained, retrained) == 0
    assert mean_gap({"UA": 98.0, "RA": 100.0, "TA": 85.0, "MIA": 80.0}, retrained) == 2.0
    assert mean_gap({"UA": 98.0, "RA": 100.0}, retrained, ["UA", "RA"]) == 1.5
    with pytest.raises(ValueError, match=r"with \['TA', 'MIA'\] absent"):
        mean_gap({"UA": 98.0, "RA": 100.0}, retrained)
