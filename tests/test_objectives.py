"""Every objective against a value computed by hand from the model's logits."""

from __future__ import annotations

import math

import pytest
import torch
from model_zoo import tiny_batch, tiny_model

from pymape.objectives import OneShot, Step, UnlearnBatch, get_objective, objective, objective_names
from pymape.objectives.registry import _OBJECTIVES

KINDS = {"classifier": "bert", "language model": "llama"}


@pytest.fixture(params=KINDS)
def family(request) -> str:
    return KINDS[request.param]


def make(family: str, seed: int, size: int = 3, **options) -> UnlearnBatch:
    model = tiny_model(family, dtype=torch.float64)
    inputs = tiny_batch(family, batch=size, seed=seed, padding="right")
    return UnlearnBatch(model, inputs, seeds=[(7, row) for row in range(size)], **options)


def scored(batch: UnlearnBatch) -> list[list[tuple[list[float], int]]]:
    """For every record, (probabilities, label) of what its loss is summed over; by loops."""
    with torch.no_grad():
        model_inputs = {name: value for name, value in batch.inputs.items() if name != "labels"}
        probabilities = batch.model(**model_inputs).logits.softmax(-1)
    labels = batch.inputs["labels"]
    if labels.ndim == 1:
        return [[(probabilities[row].tolist(), int(labels[row]))] for row in range(len(labels))]
    return [
        [
            (probabilities[row, place - 1].tolist(), int(labels[row, place]))
            for place in range(1, labels.shape[1])
            if labels[row, place] != -100
        ]
        for row in range(len(labels))
    ]


def summed_nll(batch: UnlearnBatch) -> list[float]:
    return [-sum(math.log(p[label]) for p, label in record) for record in scored(batch)]


def mean_nll(batch: UnlearnBatch) -> float:
    return sum(summed_nll(batch)) / sum(len(record) for record in scored(batch))


def evaluate(name: str, forget, retain=None, alpha: float = 0.7, beta: float = 0.4) -> float:
    return get_objective(name).function(Step(forget, retain, alpha, beta)).item()


def test_padding_makes_the_records_differ():
    lengths = {len(record) for record in scored(make("llama", 1))}
    assert len(lengths) == 3


def test_ga(family):
    forget = make(family, 1)
    assert evaluate("ga", forget) == pytest.approx(-mean_nll(forget), rel=1e-12)


def test_gd(family):
    forget, retain = make(family, 1), make(family, 2)
    expected = -mean_nll(forget) + 0.7 * mean_nll(retain)
    assert evaluate("gd", forget, retain) == pytest.approx(expected, rel=1e-12)


def test_ft(family):
    retain = make(family, 2)
    assert evaluate("ft", None, retain) == pytest.approx(mean_nll(retain), rel=1e-12)


def test_kl(family):
    forget, retain = make(family, 1), make(family, 2)
    original = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), retain.inputs)
    retain.reference_log_probs = original.log_probs().detach()
    divergences = [
        sum(q * math.log(q / p) for q, p in zip(before, after, strict=True))
        for old, new in zip(scored(original), scored(retain), strict=True)
        for (before, _), (after, _) in zip(old, new, strict=True)
    ]
    assert len(divergences) == sum(len(record) for record in scored(retain))
    expected = -mean_nll(forget) + 0.7 * sum(divergences) / len(divergences)
    assert evaluate("kl", forget, retain) == pytest.approx(expected, rel=1e-10)
    retain.reference_log_probs = retain.log_probs().detach()
    assert retain.kl().item() == pytest.approx(0, abs=1e-14)


def test_npo(family):
    forget, retain = make(family, 1), make(family, 2)
    original = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), forget.inputs)
    forget.reference_nll = original.nll().detach()
    terms = []
    for new, old in zip(summed_nll(forget), summed_nll(original), strict=True):
        ratio = math.exp(-new) / math.exp(-old)  # of the record's probability now to that before
        terms.append(2 / 0.4 * math.log(1 + ratio**0.4))
    expected = sum(terms) / 3
    assert evaluate("npo", forget) == pytest.approx(expected, rel=1e-10)
    assert evaluate("npo", forget, retain) == pytest.approx(expected + 0.7 * mean_nll(retain), rel=1e-10)


def test_npo_starts_as_gradient_ascent_on_the_summed_nll(family):
    forget = make(family, 1)
    forget.reference_nll = forget.nll().detach()
    parameters = list(forget.model.parameters())
    npo = torch.autograd.grad(
        get_objective("npo").function(Step(forget, None, 1.0, 0.1)), parameters, retain_graph=True, allow_unused=True
    )
    ga = torch.autograd.grad(-forget.mean(forget.nll()), parameters, allow_unused=True)
    for one, other in zip(npo, ga, strict=True):
        torch.testing.assert_close(one, other)


def test_rl(family):
    forget, retain = make(family, 1), make(family, 2)
    wrong = forget.with_random_labels()
    labels, changed = forget.inputs["labels"], wrong.inputs["labels"]
    labelled = labels != -100
    assert (changed[labelled] != labels[labelled]).all()
    assert torch.equal(changed[~labelled], labels[~labelled])
    assert ((changed[labelled] >= 0) & (changed[labelled] < forget.outputs.logits.shape[-1])).all()
    assert evaluate("rl", forget) == pytest.approx(mean_nll(wrong), rel=1e-12)
    assert evaluate("rl", forget, retain) == pytest.approx(mean_nll(wrong) + 0.7 * mean_nll(retain), rel=1e-12)


def test_random_labels_belong_to_the_record_and_are_uniform():
    model = tiny_model("bert")
    inputs = {name: value[:1].expand(300, -1) for name, value in tiny_batch("bert").items() if name != "labels"}
    inputs["labels"] = torch.ones(300, dtype=torch.int64)
    seeds = [(0, row) for row in range(300)]
    batch = UnlearnBatch(model, inputs, seeds=seeds)
    drawn = batch.with_random_labels().inputs["labels"]
    counts = drawn.bincount(minlength=3).tolist()
    assert counts[1] == 0
    assert min(counts[0], counts[2]) > 110
    some = UnlearnBatch(model, {name: value[5:9] for name, value in inputs.items()}, seeds=seeds[5:9])
    assert torch.equal(some.with_random_labels().inputs["labels"], drawn[5:9])
    other = UnlearnBatch(model, inputs, seeds=[(1, row) for row in range(300)])
    assert not torch.equal(other.with_random_labels().inputs["labels"], drawn)


def test_influence():
    parameters = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    forget = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]]
    retain = [[torch.tensor([1.0, 0.0])], [torch.tensor([2.0, 0.0])], [torch.tensor([2.0, 3.0])]]
    (update,) = get_objective("influence").function(OneShot(parameters, forget, retain, 3, gamma=0.5))
    fisher = [(1 + 4 + 4) / 3, 9 / 3]
    assert update.tolist() == pytest.approx([(4 / 3) / (fisher[0] + 0.5), (1 / 3) / (fisher[1] + 0.5)], rel=1e-14)
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        get_objective("influence").function(OneShot(parameters, forget, retain, 3, gamma=0))


def test_micro_batches_add_up_to_the_batch(family):
    """Means over the step, by counts of the whole step; records of different lengths."""
    whole = {"forget": make(family, 1, size=4), "retain": make(family, 2, size=4)}
    old = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), whole["forget"].inputs).nll().detach()
    kept = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), whole["retain"].inputs)
    for name in ("ga", "gd", "kl", "npo", "ft", "rl"):
        whole["forget"].reference_nll = old
        whole["retain"].reference_log_probs = kept.log_probs().detach()
        expected = evaluate(name, whole["forget"], whole["retain"])
        losses = []
        for rows in (slice(0, 1), slice(1, 4)):
            parts = {}
            for side, batch in whole.items():
                inputs = {key: value[rows] for key, value in batch.inputs.items()}
                part = UnlearnBatch(
                    batch.model, inputs, samples=2, tokens=batch.tokens / 2, reference_nll=old[rows],
                    seeds=[(7, row) for row in range(4)][rows],
                )  # fmt: skip
                part.reference_log_probs = UnlearnBatch(kept.model, inputs).log_probs().detach()
                parts[side] = part
            losses.append(evaluate(name, parts["forget"], parts["retain"]))
        assert sum(losses) / 2 == pytest.approx(expected, rel=1e-11), name


def test_the_model_runs_once_and_computes_no_loss():
    batch = make("llama", 1)
    calls = []
    handle = batch.model.register_forward_hook(lambda *_: calls.append(1))
    batch.loss(), batch.nll(), batch.log_probs(), batch.with_random_labels().loss()
    handle.remove()
    assert len(calls) == 1
    assert batch.outputs.loss is None


def test_registry():
    assert objective_names() == ["ft", "ga", "gd", "influence", "kl", "npo", "rl"]
    with pytest.raises(ValueError, match=r"^objective must be one of ft, ga, gd, influence, kl, npo, rl, got 'nope'$"):
        get_objective("nope")
    with pytest.raises(ValueError, match="objective name must be new, got 'ga'"):
        objective("ga")(lambda step: None)

    def capped(step):
        return (4 - step.forget.loss()).relu()

    try:
        for _ in range(2):  # as when a notebook cell is run again
            assert objective("capped", retain="optional")(capped) is capped
        assert get_objective("capped").retain == "optional"
        assert "capped" in objective_names()
    finally:
        _OBJECTIVES.pop("capped", None)


@pytest.mark.parametrize("name", ["ft", "ga", "gd", "influence", "kl", "npo", "rl"])
def test_docstrings_name_formula_and_source(name):
    text = get_objective(name).function.__doc__
    assert "Source:" in text
    assert "loss =" in text or "theta <-" in text


def test_undefined_cases_are_one_line_errors():
    answers = tiny_model("bert", "question_answering")
    batch = UnlearnBatch(answers, tiny_batch("bert", "question_answering"), seeds=[(0, 0)] * 3)
    with pytest.raises(ValueError, match="question answering"):
        batch.log_probs()
    with pytest.raises(ValueError, match="random labels need class or token labels"):
        batch.with_random_labels()
    with pytest.raises(ValueError, match="reference_log_probs must be known"):
        make("bert", 1).kl()
    with pytest.raises(ValueError, match="reference_nll must be known"):
        evaluate("npo", make("bert", 1))
