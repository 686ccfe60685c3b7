"""Per-record scores: what they are on models of known output, on every task, and that nothing is lost on disk."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import pytest
import torch
from metrics_tools import FixedForCausalLM, records
from model_zoo import tiny_batch, tiny_model
from safetensors.torch import save_file

from pymape.losses import per_sample_loss
from pymape.metrics import Predictions, RecordScores, gradient_norms, predict, record_scores

TASKS = [
    ("bert", "sequence_classification"),
    ("vit", "image_classification"),
    ("bert", "token_classification"),
    ("bert", "masked_lm"),
    ("distilbert", "question_answering"),
    ("gpt2", "causal_lm"),
    ("llama", "causal_lm"),
]


def test_terms_of_a_language_model_by_hand() -> None:
    data = [
        {"id": "long", "input_ids": [0, 2, 2, 1, 0], "labels": [0, 2, 2, 1, 0]},
        {"id": "one", "input_ids": [0, 1, 2], "labels": [-100, -100, 2]},
    ]
    scores = record_scores(FixedForCausalLM(), data, decode=lambda tokens: "word " * len(tokens))
    assert scores.ids == ["long", "one"]
    assert scores.offsets.tolist() == [0, 4, 5]
    assert scores.labels.tolist() == [2, 2, 1, 0, 2]
    assert scores.predicted.tolist() == [2, 2, 2, 2, 2]
    likely, unlikely = math.log(3 / 4), math.log(1 / 8)
    expected = torch.tensor([likely, likely, unlikely, unlikely, likely]).double()
    torch.testing.assert_close(scores.log_probs, expected, rtol=0, atol=1e-6)
    mean = 0.75 * likely + 0.25 * unlikely
    std = math.sqrt(0.75 * likely**2 + 0.25 * unlikely**2 - mean**2)
    torch.testing.assert_close(scores.means, torch.full((5,), mean).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.stds, torch.full((5,), std).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(scores.loss, torch.tensor([-(likely + unlikely) / 2, -likely]).double())
    torch.testing.assert_close(scores.probability, torch.tensor([math.sqrt(3 / 32), 0.75]).double())
    assert scores.correct.tolist() == [0.5, 1.0]
    assert scores.text_bytes is not None
    assert scores.text_bytes.tolist() == [len(zlib.compress(b"word " * 4)), len(zlib.compress(b"word "))]


@pytest.mark.parametrize(("family", "task"), TASKS)
def test_losses_are_those_of_the_library_however_records_are_batched(family: str, task: str) -> None:
    model, data = tiny_model(family, task), records(family, task)
    scores = record_scores(model, data, batch_size=2)
    batch = tiny_batch(family, task, batch=5, padding=None if family == "vit" else "right")
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if not name.endswith(("labels", "positions"))}
        expected = per_sample_loss(model, batch, model(**inputs))
    torch.testing.assert_close(scores.loss.float(), expected, rtol=1e-5, atol=1e-6)
    assert scores.ids == [f"r{row}" for row in range(5)]
    assert (scores.stds >= 0).all()
    alone = record_scores(model, data, batch_size=1)
    torch.testing.assert_close(alone.means, scores.means, rtol=1e-5, atol=1e-6)
    assert torch.equal(alone.predicted, scores.predicted)


@pytest.mark.parametrize(("family", "task"), [("bert", "sequence_classification"), ("gpt2", "causal_lm")])
def test_predictions_are_those_of_predict(family: str, task: str) -> None:
    model, data = tiny_model(family, task), records(family, task)
    found, expected = record_scores(model, data).predictions(), predict(model, data)
    assert isinstance(found, Predictions)
    torch.testing.assert_close(found.correct, expected.correct)
    torch.testing.assert_close(found.confidence, expected.confidence, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)


def test_an_answer_span_is_right_only_at_both_ends() -> None:
    def scores(predicted: list[int]) -> RecordScores:
        terms = torch.zeros(4).double()
        labels = torch.tensor([3, 5, 3, 5])
        offsets = torch.tensor([0, 2, 4])
        return RecordScores(
            ["a", "b"], "question answering", offsets, terms, terms, terms, torch.tensor(predicted), labels
        )

    assert scores([3, 5, 3, 4]).correct.tolist() == [1, 0]


def test_saved_scores_are_the_same_and_need_no_model(tmp_path: Path) -> None:
    model, data = tiny_model("gpt2"), records("gpt2", "causal_lm")
    scores = record_scores(model, data, gradients=True, decode=str)
    scores.save(tmp_path / "folder" / "scores.safetensors")
    loaded = RecordScores.load(tmp_path / "folder" / "scores.safetensors")
    assert (loaded.ids, loaded.task, loaded.logits) == (scores.ids, scores.task, None)
    for name in ("offsets", "log_probs", "means", "stds", "predicted", "labels", "gradient_norms", "text_bytes"):
        assert torch.equal(getattr(loaded, name), getattr(scores, name)), name
    classifier = record_scores(tiny_model("vit"), records("vit", "image_classification"))
    classifier.save(tmp_path / "classifier.safetensors")
    logits = RecordScores.load(tmp_path / "classifier.safetensors").logits
    assert logits is not None
    assert torch.equal(logits, classifier.logits)


@pytest.mark.parametrize("damage", ["cut", "kind", "missing"])
def test_a_file_that_is_not_intact_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "scores.safetensors"
    record_scores(tiny_model("vit"), records("vit", "image_classification")).save(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "kind":
        save_file({"labels": torch.zeros(1)}, path, {"format": "something else"})
    else:
        save_file({"labels": torch.zeros(1)}, path, {"format": "pymape.scores.1", "ids": "[]", "task": "t"})
    with pytest.raises(ValueError, match=r"path must be an intact .*scores\.safetensors"):
        RecordScores.load(path)


def test_records_are_selected_by_id_in_any_order() -> None:
    scores = record_scores(tiny_model("gpt2"), records("gpt2", "causal_lm"), gradients=True)
    chosen = scores.select(["r3", "r0"])
    assert chosen.ids == ["r3", "r0"]
    assert torch.equal(chosen.loss, scores.loss[[3, 0]])
    assert torch.equal(chosen.by_record(chosen.labels)[1], scores.by_record(scores.labels)[0])
    assert chosen.gradient_norms is not None
    assert scores.gradient_norms is not None
    assert torch.equal(chosen.gradient_norms, scores.gradient_norms[[3, 0]])
    with pytest.raises(ValueError, match=r"ids must be among the 5 records, got \['x'\]"):
        scores.select(["r1", "x"])
    with pytest.raises(ValueError, match="ids must name at least one record"):
        scores.select([])
    with pytest.raises(ValueError, match="ids must be unique"):
        scores.select(["r1", "r1"])


def test_the_end_of_a_text_is_dropped_once_and_never_the_only_token() -> None:
    data = [
        {"id": "a", "input_ids": [0, 1, 2, 2], "labels": [0, 1, 2, 2]},
        {"id": "b", "input_ids": [0, 2], "labels": [-100, 2]},
        {"id": "c", "input_ids": [0, 2, 1], "labels": [0, 2, 1]},
    ]
    scores = record_scores(FixedForCausalLM(), data)
    shorter = scores.without_final(2)
    assert [own.tolist() for own in shorter.by_record(shorter.labels)] == [[1, 2], [2], [2, 1]]
    assert torch.equal(scores.without_final(None).labels, scores.labels)


def test_gradient_norms_are_the_mean_norm_over_tensors() -> None:
    data = [
        {"id": "a", "input_ids": [0, 2], "labels": [-100, 2]},
        {"id": "b", "input_ids": [0, 1], "labels": [-100, 1]},
    ]
    # d loss / d bias = p - one_hot(label) for the only parameter.
    expected = [math.sqrt(2 / 64 + 1 / 16), math.sqrt(1 / 64 + 49 / 64 + 9 / 16)]
    model = FixedForCausalLM()
    norms = gradient_norms(model, data)
    torch.testing.assert_close(norms, torch.tensor(expected).double(), rtol=1e-6, atol=0)
    assert model.bias.grad is None
    model = tiny_model("bert")
    rows = records("bert", "sequence_classification")
    model.zero_grad()
    batch = {name: torch.as_tensor(value)[None] for name, value in rows[2].items() if name != "id"}
    model(**batch).loss.backward()
    alone = torch.stack([parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None])
    torch.testing.assert_close(gradient_norms(model, rows)[2].float(), alone.mean(), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="model must have trainable parameters"):
        gradient_norms(model.requires_grad_(False), rows)


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model("bert", dropout=0.5).train()
    frozen = model.bert.embeddings.eval()
    first, second = (record_scores(model, records("bert", "sequence_classification")) for _ in range(2))
    assert torch.equal(first.log_probs, second.log_probs)
    assert model.training
    assert not frozen.training


def test_bad_records_are_refused() -> None:
    model = tiny_model("bert")
    rows = records("bert", "sequence_classification")
    with pytest.raises(ValueError, match="at least one record"):
        record_scores(model, [])
    with pytest.raises(ValueError, match="ids must be unique, got 1 repetitions"):
        record_scores(model, [rows[0], rows[0]])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 3 for id 'r0'"):
        record_scores(model, [rows[0] | {"labels": 3}])
    with torch.no_grad():
        model.classifier.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"log-probabilities must be finite, .* ids \['r"):
        record_scores(model, rows)
    with pytest.raises(ValueError, match="labels must be one class a record, got torch"):
        record_scores(tiny_model("bert", "regression"), records("bert", "regression"))
    span = tiny_model("bert", "question_answering")
    far = [row | {"end_positions": torch.tensor(60)} for row in records("bert", "question_answering")]
    with pytest.raises(ValueError, match="answers must start and end at a record's own tokens"):
        record_scores(span, far)
