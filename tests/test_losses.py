"""per_sample_loss: Hugging Face's own loss of every sample alone, and clear refusals of labels that cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from model_zoo import DECODERS, ENCODERS, LABELS, VISION, VOCABULARY, tiny_batch, tiny_model
from torch import Tensor

from pymape import losses as losses_module
from pymape.losses import IGNORED_LABEL, check_labels, per_sample_loss, sum_by_part, task_of, token_losses

TEXT = ("sequence_classification", "regression", "multi_label", "token_classification", "question_answering")
CASES = [
    *((family, task) for family in ENCODERS for task in (*TEXT, "masked_lm")),
    *((family, task) for family in ("gpt2", "llama") for task in (*TEXT, "causal_lm")),
    *((family, "causal_lm") for family in DECODERS[2:]),
    *((family, task) for family in VISION for task in ("image_classification",)),
]


def one(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Row `row` by itself, without its padding."""
    if "attention_mask" not in batch:
        return {name: value[row : row + 1] for name, value in batch.items()}
    kept = batch["attention_mask"][row].bool()
    width = len(kept)
    return {
        name: value[row : row + 1, kept] if value.shape[1:] == (width,) else value[row : row + 1]
        for name, value in batch.items()
    }


def losses_of(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions")}
    return per_sample_loss(model, batch, model(**inputs))


@pytest.mark.parametrize("family, task", CASES)
def test_equals_the_models_own_loss_of_each_sample_alone(family: str, task: str) -> None:
    model = tiny_model(family, task)
    batch = tiny_batch(family, task, batch=3, padding=None if family in VISION else "right")
    problem_type = model.config.problem_type
    losses = losses_of(model, batch)
    assert model.config.problem_type == problem_type
    assert losses.shape == (3,)
    alone = [model(**one(batch, row)).loss for row in range(3)]
    torch.testing.assert_close(losses, torch.stack(alone), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "causal_lm", "question_answering"])
def test_fp64_stays_fp64_and_half_precision_is_raised(task: str) -> None:
    model = tiny_model("llama", task)
    batch = tiny_batch("llama", task)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        assert losses_of(model.to(dtype), batch).dtype == expected


def test_a_model_without_a_problem_type_is_told_by_its_labels() -> None:
    model = tiny_model("bert")
    model.config.problem_type = None
    outputs = SimpleNamespace(logits=torch.randn(2, LABELS))
    classes, several = torch.tensor([0, 2]), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    single = per_sample_loss(model, {"labels": classes}, outputs)
    multi = per_sample_loss(model, {"labels": several}, outputs)
    torch.testing.assert_close(single, -outputs.logits.log_softmax(1)[[0, 1], classes])
    own = -(several * outputs.logits.sigmoid().log() + (1 - several) * (1 - outputs.logits.sigmoid()).log()).mean(1)
    torch.testing.assert_close(multi, own)
    assert model.config.problem_type is None


def test_several_regression_targets() -> None:
    model = tiny_model("bert", "regression", num_labels=2)
    batch = tiny_batch("bert", "regression") | {"labels": torch.randn(3, 2)}
    alone = [model(**one(batch, row)).loss for row in range(3)]
    torch.testing.assert_close(losses_of(model, batch), torch.stack(alone))


def test_a_sample_without_labelled_tokens_has_loss_zero_and_no_gradient() -> None:
    model = tiny_model("bert", "masked_lm")
    batch = tiny_batch("bert", "masked_lm")
    batch["labels"][1] = -100
    losses = losses_of(model, batch)
    assert losses[1] == 0
    assert (losses[[0, 2]] > 0).all()
    losses.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("start", [6, 7, 40])
def test_a_span_beyond_the_samples_tokens_is_not_labelled(start: int) -> None:
    model = tiny_model("bert", "question_answering")
    batch = tiny_batch("bert", "question_answering", padding="right")
    batch["start_positions"][2] = start  # sample 2 has 5 tokens, the batch 7
    inputs = {k: v for k, v in batch.items() if not k.endswith("positions")}
    outputs = model(**inputs)
    losses = per_sample_loss(model, batch, outputs)
    end = torch.nn.functional.cross_entropy(outputs.end_logits[2, :5], batch["end_positions"][2])
    torch.testing.assert_close(losses[2], end / 2)
    losses.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "family, task, name, value, message",
    [
        ("bert", "sequence_classification", "labels", torch.tensor([0, LABELS, 1]), "in [0, 3), got 3 for id 'b'"),
        ("vit", "image_classification", "labels", torch.tensor([0, 1, -1]), "in [0, 3), got -1 for id 'c'"),
        ("bert", "sequence_classification", "labels", torch.tensor([0, -100, 1]), "in [0, 3), got -100 for id 'b'"),
        ("llama", "causal_lm", "labels", torch.full((3, 7), VOCABULARY), f"in [0, {VOCABULARY}), got 50 for id 'a'"),
        ("bert", "masked_lm", "labels", torch.full((3, 7), -1), "got -1 for id 'a'"),
        ("bert", "token_classification", "labels", torch.full((3, 7), 7), "in [0, 3), got 7 for id 'a'"),
        ("bert", "masked_lm", "labels", torch.full((3, 7), -100), "got none for ids ['a', 'b', 'c']"),
        ("llama", "causal_lm", "labels", torch.tensor([[1] + [-100] * 6] * 3), "got none for ids ['a', 'b', 'c']"),
        ("bert", "multi_label", "labels", torch.rand(3, 4), "must have shape (3, 3)"),
        ("bert", "sequence_classification", "labels", torch.ones(3, dtype=torch.bool), "got torch.bool for id 'a'"),
        ("llama", "causal_lm", "labels", torch.ones(3, 7), "labels must be integers, got torch.float32 for id 'a'"),
        ("llama", "causal_lm", "labels", torch.ones(3, 5), "labels must have shape (3, 7), as input_ids, got (3, 5)"),
        ("llama", "causal_lm", "labels", torch.ones(1, 21), "collator must give one row per record, got 1 for 3"),
        ("bert", "question_answering", "start_positions", torch.ones(1), "one row per record, got 1 for 3"),
        ("bert", "sequence_classification", "input_ids", torch.ones(3, 1, 7),
         "records must be single, without a batch dimension, got input_ids of shape (1, 7)"),
        ("bert", "sequence_classification", "labels", None, "data must have labels"),
        ("bert", "question_answering", "end_positions", None, "data must have end_positions"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_right(family: str, task: str, name: str, value: Tensor | None, message: str) -> None:
    model, batch = tiny_model(family, task), tiny_batch(family, task)
    check_labels(model, batch, ["a", "b", "c"])
    batch[name] = value
    with pytest.raises(ValueError) as error:
        check_labels(model, batch, ["a", "b", "c"])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_model_without_a_known_task_head() -> None:
    with pytest.raises(ValueError, match="got BertModel; pass your own loss function"):
        task_of(tiny_model("bert", "base"))


def test_a_class_of_ones_own_has_the_task_of_its_base() -> None:
    kind = type(tiny_model("distilbert", "question_answering"))
    mine = type("Mine", (kind,), {})
    model = mine.__new__(mine)
    assert task_of(model) == "question answering"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
def test_a_part_of_the_tokens_at_a_time_gives_the_same_bits(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(7, 1000, generator=generator)).to(dtype)
    labels = torch.tensor([3, 999, IGNORED_LABEL, 0, 17, IGNORED_LABEL, 500])
    weights = torch.randn(7, generator=generator).to(torch.promote_types(dtype, torch.float32))
    raised = torch.promote_types(dtype, torch.float32)

    def results(losses: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        leaf = logits.clone().requires_grad_()
        found = losses(leaf)
        (gradient,) = torch.autograd.grad(found @ weights, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.double().square().sum(), leaf)
        return found, gradient, second

    expected = results(lambda x: F.cross_entropy(x.to(raised), labels, reduction="none"))
    monkeypatch.setattr(losses_module, "LOGITS_AT_A_TIME", 1000 * rows)
    for one, other in zip(results(lambda x: token_losses(x, labels)), expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_large_vocabulary_keeps_no_copy_of_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses_module, "LOGITS_AT_A_TIME", 2**16)
    model = tiny_model("llama", "causal_lm")
    batch = {"labels": torch.randint(0, 4096, (2, 64)), "attention_mask": torch.ones(2, 64, dtype=torch.int64)}
    logits = torch.randn(2, 64, 4096, dtype=torch.bfloat16, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = per_sample_loss(model, batch, SimpleNamespace(logits=logits))
    copies = {address: size for address, size in kept.items() if address != logits.untyped_storage().data_ptr()}
    assert sum(copies.values()) < 0.1 * logits.nbytes
    losses.sum().backward()
    assert logits.grad is not None
    assert logits.grad.count_nonzero() > 0


def test_a_sum_by_part_is_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(11, 50, dtype=torch.float64, generator=generator) for _ in range(2))
    monkeypatch.setattr(losses_module, "LOGITS_AT_A_TIME", 50 * 4)
    leaf = logits.clone().requires_grad_()
    total = sum_by_part(lambda x, y: (x.sin() * y).sum(), leaf, other)
    total.backward()
    torch.testing.assert_close(total.detach(), (logits.sin() * other).sum())
    torch.testing.assert_close(leaf.grad, logits.cos() * other)
