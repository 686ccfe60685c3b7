"""Every objective against a value computed by hand from the model's logits."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from model_zoo import tiny_batch, tiny_model

from pymape.objectives import OneShot, RecordGradients, Step, UnlearnBatch, get_objective, objective, objective_names
from pymape.objectives.registry import _OBJECTIVES
from pymape.objectives.sophia import Sophia

NAMES = [
    "dpo", "ft", "ga", "gd", "idk", "influence", "kl", "l1_sparse", "match", "match_tokens", "npo",
    "rl", "rmu", "simnpo", "so", "ssd",
]  # fmt: skip
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


def evaluate(name: str, forget, retain=None, alpha: float = 0.7, beta: float = 0.4, retain_term="nll", **options):
    return get_objective(name).with_options(options).function(Step(forget, retain, alpha, beta, retain_term)).item()


def with_alternative(forget: UnlearnBatch) -> UnlearnBatch:
    """Give every record another answer: another label, or another text of another length."""
    if forget.inputs["labels"].ndim == 1:
        labels = (forget.inputs["labels"] + 1) % forget.outputs.logits.shape[-1]
        forget.alternative = forget.relabelled({"labels": labels})
    else:
        inputs = tiny_batch("llama", batch=len(forget.counts), seed=5, padding="right", length=9)
        forget.alternative = UnlearnBatch(forget.model, inputs)
    return forget


def set_reference(family: str, batch: UnlearnBatch, **options) -> list[float]:
    """Note and return the losses of another model."""
    original = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), batch.inputs)
    batch.reference_nll = original.nll().detach()
    return summed_nll(original)


def test_padding_makes_the_records_differ():
    lengths = {len(record) for record in scored(make("llama", 1))}
    assert len(lengths) == 3


@pytest.mark.parametrize("padding", ["left", "right"])
def test_labelled_padding_counts_for_nothing(padding):
    """Every value of a padded batch is that of its records alone, also where the labels are the padded inputs."""
    model = tiny_model("llama", dtype=torch.float64)
    inputs = tiny_batch("llama", padding=padding)
    inputs["labels"] = inputs["input_ids"]
    assert (inputs["labels"][inputs["attention_mask"] == 0] != -100).any()
    # The padded call reads positions from the mask, so that left padding changes nothing but the place.
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch = UnlearnBatch(model, inputs, call=lambda **given: model(**given, position_ids=places))
    own = [inputs["input_ids"][row][inputs["attention_mask"][row] == 1][None] for row in range(3)]
    alone = [UnlearnBatch(model, {"input_ids": tokens, "labels": tokens}) for tokens in own]
    assert batch.counts.tolist() == [tokens.shape[1] - 1 for tokens in own]
    torch.testing.assert_close(batch.nll(), torch.cat([one.nll() for one in alone]))
    torch.testing.assert_close(batch.scored_logits(), torch.cat([one.scored_logits() for one in alone]))
    assert batch.loss().item() == pytest.approx(sum(one.nll().item() for one in alone) / sum(batch.counts.tolist()))


def test_ga(family):
    forget = make(family, 1)
    assert evaluate("ga", forget) == pytest.approx(-mean_nll(forget), rel=1e-12)


def test_gd(family):
    forget, retain = make(family, 1), make(family, 2)
    expected = -mean_nll(forget) + 0.7 * mean_nll(retain)
    assert evaluate("gd", forget, retain) == pytest.approx(expected, rel=1e-12)


def test_match(family):
    """Off its target a record has the gradient of gd, up to its sign; a retain set is optional."""
    forget, retain = make(family, 1), make(family, 2)
    own = [nll / len(record) for nll, record in zip(summed_nll(forget), scored(forget), strict=True)]
    tokens = [len(record) for record in scored(forget)]
    targets = [own[0] + 0.5, own[1] - 0.25, own[2]]
    forget.targets = torch.tensor(targets)
    expected = (0.5 * tokens[0] + 0.25 * tokens[1]) / sum(tokens)
    assert evaluate("match", forget) == pytest.approx(expected, rel=1e-6)
    assert evaluate("match", forget, retain) == pytest.approx(expected + 0.7 * mean_nll(retain), rel=1e-6)
    forget.targets = torch.full((3,), 100.0)
    assert_ascent("match", forget)


def test_match_tokens(family):
    forget, retain = make(family, 1), make(family, 2)
    own = [[-math.log(p[label]) for p, label in record] for record in scored(forget)]
    tokens = [len(record) for record in own]
    forget.token_targets = torch.full((3, max(tokens) + 2), math.nan, dtype=torch.float64)
    for row, losses in enumerate(own):
        forget.token_targets[row, : len(losses)] = torch.tensor(losses, dtype=torch.float64)
    forget.token_targets[0, 0] += 0.5
    forget.token_targets[2, tokens[2] - 1] -= 0.25
    expected = 0.75 / sum(tokens)
    assert evaluate("match_tokens", forget) == pytest.approx(expected, rel=1e-6)
    assert evaluate("match_tokens", forget, retain) == pytest.approx(expected + 0.7 * mean_nll(retain), rel=1e-6)
    forget.token_targets = torch.full((3, max(tokens)), 100.0)
    assert_ascent("match_tokens", forget)


def assert_ascent(name: str, forget: UnlearnBatch) -> None:
    function = get_objective(name).with_options({}).function
    weight = next(iter(forget.model.parameters()))
    ascent = torch.autograd.grad(function(Step(forget, None, 1.0, 1.0)), weight, retain_graph=True)[0]
    torch.testing.assert_close(ascent, torch.autograd.grad(-forget.loss(), weight)[0])


def test_ft(family):
    retain = make(family, 2)
    assert evaluate("ft", None, retain) == pytest.approx(mean_nll(retain), rel=1e-12)


def test_l1_sparse(family):
    retain = make(family, 2)
    for parameter in list(retain.model.parameters())[::2]:
        parameter.requires_grad_(False)
    size = sum(entry.abs().sum().item() for entry in retain.model.parameters() if entry.requires_grad)
    assert evaluate("l1_sparse", None, retain, weight=0.5) == pytest.approx(mean_nll(retain) + 0.5 * size, rel=1e-12)


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
    assert evaluate("so", forget, retain) == evaluate("npo", forget, retain)


def test_simnpo(family):
    forget, retain = make(family, 1), make(family, 2)
    terms = []
    for record in scored(forget):
        likelihood = math.prod(p[label] for p, label in record) ** (1 / len(record))  # the geometric mean of its tokens
        terms.append(2 / 0.4 * math.log(1 + (likelihood * math.exp(0.3)) ** 0.4))
    expected = sum(terms) / 3
    assert evaluate("simnpo", forget, delta=0.3) == pytest.approx(expected, rel=1e-10)
    assert evaluate("simnpo", forget, retain, delta=0.3) == pytest.approx(expected + 0.7 * mean_nll(retain), rel=1e-10)
    with pytest.raises(ValueError, match=r"objective_options\.delta must be a finite number, got nan"):
        evaluate("simnpo", forget, delta=math.nan)


def test_dpo(family):
    forget, retain = with_alternative(make(family, 1)), make(family, 2)
    terms = []
    before, other_before = set_reference(family, forget), set_reference(family, forget.alternative)
    answers = zip(summed_nll(forget), before, summed_nll(forget.alternative), other_before, strict=True)
    for nll, old, other, other_old in answers:
        odds = math.exp(other_old - other) / math.exp(old - nll)  # of the alternative, against the original model's
        terms.append(-2 / 0.4 * math.log(odds**0.4 / (1 + odds**0.4)))
    expected = sum(terms) / 3
    assert evaluate("dpo", forget) == pytest.approx(expected, rel=1e-9)
    assert evaluate("dpo", forget, retain) == pytest.approx(expected + 0.7 * mean_nll(retain), rel=1e-9)


def test_idk(family):
    forget, retain = with_alternative(make(family, 1)), make(family, 2)
    expected = mean_nll(forget.alternative)
    assert expected != pytest.approx(mean_nll(forget))
    assert evaluate("idk", forget) == pytest.approx(expected, rel=1e-12)
    assert evaluate("idk", forget, retain) == pytest.approx(expected + 0.7 * mean_nll(retain), rel=1e-12)


def test_other_labels_of_the_same_inputs_need_no_second_forward_pass():
    forget = with_alternative(make("bert", 1))
    calls = []
    handle = forget.model.register_forward_hook(lambda *_: calls.append(1))
    evaluate("idk", forget)
    handle.remove()
    assert not calls  # `with_alternative` asked already


def block_output(batch: UnlearnBatch, layer: int) -> torch.Tensor:
    """The output of a block, by a hook on it."""
    model = batch.model
    blocks = model.bert.encoder.layer if hasattr(model, "bert") else model.model.layers
    found = []
    handle = blocks[layer].register_forward_hook(lambda _, __, output: found.append(output))
    model(**{name: value for name, value in batch.inputs.items() if name != "labels"})
    handle.remove()
    return (found[0] if isinstance(found[0], torch.Tensor) else found[0][0]).detach()


def own_mean_square(batch: UnlearnBatch, values: torch.Tensor) -> float:
    of_records = []
    for row, mask in zip(values, batch.inputs["attention_mask"], strict=True):
        squares = [float(x) ** 2 for token, own in zip(row, mask, strict=True) if own for x in token]
        of_records.append(sum(squares) / len(squares))
    return sum(of_records) / len(of_records)


def test_rmu(family):
    forget, retain = make(family, 1), make(family, 2)
    original = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), retain.inputs)
    retain.reference_activations = original.activations(0).detach()
    direction = np.random.default_rng(3).normal(size=16)
    target = torch.from_numpy(5 * direction / math.sqrt(sum(x * x for x in direction)))
    away = own_mean_square(forget, block_output(forget, 0) - target)
    drift = own_mean_square(retain, block_output(retain, 0) - block_output(original, 0))
    value = evaluate("rmu", forget, retain, layer=0, norm=5.0, seed=3)
    assert value == pytest.approx(away + 0.7 * drift, rel=1e-10)
    assert value != pytest.approx(evaluate("rmu", forget, retain, layer=0, norm=5.0, seed=4), rel=1e-3)
    with pytest.raises(ValueError, match=r"layer must be in \[0, 2\), got 2"):
        evaluate("rmu", forget, retain, layer=2)
    with pytest.raises(ValueError, match=r"objective_options\.norm must be > 0, got 0"):
        evaluate("rmu", forget, retain, layer=0, norm=0)
    forget.model.requires_grad_(False)
    with pytest.raises(ValueError, match="masks must select a module at or below layer 1 for rmu"):
        evaluate("rmu", UnlearnBatch(forget.model, forget.inputs), retain, layer=1)


@pytest.mark.parametrize("name", ["gd", "npo", "simnpo", "dpo", "idk", "rl", "so"])
def test_the_retain_term_can_be_the_divergence(name, family):
    forget, retain = with_alternative(make(family, 1)), make(family, 2)
    set_reference(family, forget), set_reference(family, forget.alternative)
    original = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), retain.inputs)
    retain.reference_log_probs = original.log_probs().detach()
    assert get_objective(name).retain_term
    alone = evaluate(name, forget, retain, alpha=0.0)
    value = evaluate(name, forget, retain, retain_term="kl")
    assert value == pytest.approx(alone + 0.7 * retain.kl().item(), rel=1e-10)
    assert evaluate(name, forget, retain) == pytest.approx(alone + 0.7 * mean_nll(retain), rel=1e-10)


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


def test_random_labels_do_not_depend_on_the_padding():
    model, found = tiny_model("llama"), []
    tokens = torch.tensor([[5, 9, 17, 4]])
    for left, right in ((0, 0), (2, 0), (0, 3)):
        padded = torch.nn.functional.pad(tokens, (left, right), value=1)
        labels = torch.nn.functional.pad(tokens, (left, right), value=-100)
        batch = UnlearnBatch(model, {"input_ids": padded, "labels": labels}, seeds=[(7, 3)])
        changed = batch.with_random_labels().inputs["labels"]
        assert (changed == -100).sum() == left + right
        found.append(changed[changed != -100].tolist())
    assert found[0] == found[1] == found[2]


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


def one_shot(parameters: list[torch.nn.Parameter], forget: list, retain: list, gamma: float) -> OneShot:
    """A step of records with these gradients."""
    sides = (RecordGradients(parameters, lambda rows=rows: rows, len(rows)) for rows in (forget, retain))
    return OneShot(parameters, *sides, gamma)


def test_influence():
    parameters = [torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))]
    forget = [[torch.tensor([1.0, 2.0])], [torch.tensor([3.0, -1.0])]]
    retain = [[torch.tensor([1.0, 0.0])], [torch.tensor([2.0, 0.0])], [torch.tensor([2.0, 3.0])]]
    (update,) = get_objective("influence").function(one_shot(parameters, forget, retain, gamma=0.5))
    fisher = [(1 + 4 + 4) / 3, 9 / 3]
    assert update.tolist() == pytest.approx([(4 / 3) / (fisher[0] + 0.5), (1 / 3) / (fisher[1] + 0.5)], rel=1e-14)
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        get_objective("influence").function(one_shot(parameters, forget, retain, gamma=0))


def rows_of(count: int, size: int, seed: int) -> list[list[torch.Tensor]]:
    """Gradients of records for two parameters of 2 and `size` - 2 entries."""
    values = torch.randn(count, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [[row[:2], row[2:]] for row in values]


def test_influence_with_conjugate_gradients_equals_a_dense_solve():
    parameters = [torch.nn.Parameter(torch.zeros(width)) for width in (2, 5)]
    forget, retain = rows_of(4, 7, 1), rows_of(5, 7, 2)
    g, r = (torch.stack([torch.cat(row) for row in rows]) for rows in (forget, retain))
    expected = torch.linalg.solve(r.T @ r / 5 + 0.1 * torch.eye(7, dtype=torch.float64), g.sum(0) / 5)

    def run(**options):
        step = one_shot(parameters, forget, retain, gamma=0.1)
        return torch.cat(get_objective("influence").with_options(options).function(step)), step.metrics

    exact, metrics = run(cg_steps=50, cg_tolerance=1e-13)
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-12)
    assert 1 < metrics["cg_steps"] <= 9
    assert metrics["cg_residual"] <= 1e-13
    errors = [float((run(cg_steps=steps)[0] - expected).norm()) for steps in (0, 1, 3, 6)]
    assert errors == sorted(errors, reverse=True)
    assert run(cg_steps=2)[1]["cg_steps"] == 2
    with pytest.raises(ValueError, match="cg_steps must be >= 0, got -1"):
        run(cg_steps=-1)


def test_ssd():
    parameters = [torch.nn.Parameter(torch.tensor([2.0, -4.0, 6.0], dtype=torch.float64))]
    forget = [[torch.tensor([3.0, 1.0, 0.0])], [torch.tensor([1.0, 1.0, 0.0])]]
    retain = [[torch.tensor([0.0, 2.0, 1.0])], [torch.tensor([1.0, 0.0, 1.0])]]
    step = one_shot(parameters, forget, retain, gamma=1.0)
    # I_f = [5, 1, 0], I_D = [(9 + 1 + 0 + 1) / 4, (1 + 1 + 4) / 4, 1/2] = [2.75, 1.5, 0.5]
    ssd = get_objective("ssd")
    (update,) = ssd.with_options({"selection": 1.5, "dampening": 0.5}).function(step)
    assert update.tolist() == pytest.approx([2 * 0.5 * 2.75 / 5 - 2, 0, 0], rel=1e-14)
    assert step.metrics == {"dampened_share": pytest.approx(1 / 3)}
    (update,) = ssd.with_options({"selection": 0.6, "dampening": 1.0}).function(step)
    assert update.tolist() == pytest.approx([2 * 2.75 / 5 - 2, 0, 0], rel=1e-14)  # never more than before
    (update,) = ssd.function(step)
    assert not update.any()  # a = 10 chooses none here
    with pytest.raises(ValueError, match="selection must be > 0, got 0"):
        ssd.with_options({"selection": 0}).function(step)


def test_micro_batches_add_up_to_the_batch(family):
    """Means over the step, by counts of the whole step; records of different lengths."""
    whole = {"forget": make(family, 1, size=4), "retain": make(family, 2, size=4)}
    old = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), whole["forget"].inputs).nll().detach()
    kept = UnlearnBatch(tiny_model(family, seed=9, dtype=torch.float64), whole["retain"].inputs)
    with_alternative(whole["forget"])
    set_reference(family, whole["forget"].alternative)
    whole["retain"].reference_activations = kept.activations(1).detach()
    for name in ("ga", "gd", "kl", "npo", "simnpo", "dpo", "idk", "rmu", "ft", "rl"):
        options = {"layer": 1} if name == "rmu" else {}
        whole["forget"].reference_nll = old
        whole["retain"].reference_log_probs = kept.log_probs().detach()
        expected = evaluate(name, whole["forget"], whole["retain"], **options)
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
                part.reference_activations = whole["retain"].reference_activations[rows]
                parts[side] = part
            other = whole["forget"].alternative
            inputs = {key: value[rows] for key, value in other.inputs.items()}
            parts["forget"].alternative = UnlearnBatch(
                other.model, inputs, samples=2, tokens=other.tokens / 2, reference_nll=other.reference_nll[rows]
            )
            losses.append(evaluate(name, parts["forget"], parts["retain"], **options))
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
    assert objective_names() == NAMES
    with pytest.raises(ValueError, match=rf"^objective must be one of {', '.join(NAMES)}, got 'nope'$"):
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


def test_options():
    rmu = get_objective("rmu")
    assert rmu.with_options({"layer": 1}).options == {"layer": 1, "norm": 6.5, "seed": 0}
    with pytest.raises(
        ValueError, match=r"^objective_options must have 'layer' for objective 'rmu', got \{'seed': 1\}$"
    ):
        rmu.with_options({"seed": 1})
    with pytest.raises(
        ValueError, match=r"^objective_options must be among layer, norm, seed for .* 'rmu', got depth$"
    ):
        rmu.with_options({"layer": 1, "depth": 2})
    with pytest.raises(ValueError, match=r"^objective_options must be empty for objective 'ga', got layer$"):
        get_objective("ga").with_options({"layer": 1})
    for name, options, message in (
        ("rmu", {"layer": "one"}, "objective_options.layer must be an integer, got 'one'"),
        ("rmu", {"layer": True}, "objective_options.layer must be an integer, got True"),
        ("rmu", {"layer": -1}, "objective_options.layer must be >= 0, got -1"),
        ("rmu", {"layer": 0, "norm": math.inf}, "objective_options.norm must be a finite number, got inf"),
        ("simnpo", {"delta": "x"}, "objective_options.delta must be a finite number, got 'x'"),
        ("influence", {"cg_tolerance": -0.5}, "objective_options.cg_tolerance must be >= 0, got -0.5"),
        ("l1_sparse", {"weight": -1}, "objective_options.weight must be >= 0, got -1"),
        ("so", {"rho": -1}, "rho must be > 0, got -1"),
        ("so", {"rho": None}, "objective_options.rho must be a finite number, got None"),
        ("so", {"loss": "rmu", "layer": 0.5}, "objective_options.layer must be an integer, got 0.5"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            get_objective(name).with_options(options)
    with pytest.raises(ValueError, match="objective 'deep' must have an option layer"):
        objective("deep", reference=["activations"])(lambda step: None)


def test_any_loss_can_be_stepped_in_second_order(family):
    so = get_objective("so").with_options({"loss": "rmu", "layer": 1, "rho": 0.5, "betas": (0.5, 0.5)})
    assert so.name == "so"
    assert so.optimizer is Sophia
    assert so.optimizer_options == {"rho": 0.5, "betas": (0.5, 0.5)}
    assert so.options["loss"] == "rmu"
    assert (so.retain, so.reference, so.retain_term) == ("required", {"activations"}, False)
    assert get_objective("so").with_options({}).reference == {"nll"}
    gd = get_objective("so").with_options({"loss": "gd"})
    forget, retain = make(family, 1), make(family, 2)
    assert gd.function(Step(forget, retain, 0.7, 0.4)).item() == evaluate("gd", forget, retain)
    for loss in ("ssd", "so"):
        with pytest.raises(ValueError, match=f"loss of objective 'so' must be one that is minimised, got '{loss}'"):
            get_objective("so").with_options({"loss": loss})
    with pytest.raises(ValueError, match=r"must be among loss, betas, rho, eps, every for objective 'so', got layer"):
        get_objective("so").with_options({"layer": 1})


def test_an_optimizer_of_an_objective_may_require_its_learning_rate():
    class Own(torch.optim.SGD):
        def __init__(self, params, *, lr: float, rho: float = 0.1):
            super().__init__(params, lr=lr)

    gd = get_objective("gd").function
    try:
        objective("own", optimizer=Own)(lambda step, *, loss=gd: loss(step))
        assert get_objective("own").with_options({"loss": "gd", "rho": 0.5}).optimizer_options == {"rho": 0.5}
    finally:
        _OBJECTIVES.pop("own", None)


@pytest.mark.parametrize("name", NAMES)
def test_docstrings_name_formula_and_source(name):
    text = get_objective(name).function.__doc__
    assert "Source:" in text
    assert "loss =" in text or "theta <-" in text


def test_undefined_cases_are_one_line_errors():
    answers = tiny_model("bert", "question_answering")
    batch = UnlearnBatch(answers, tiny_batch("bert", "question_answering"), seeds=[(0, 0)] * 3)
    message = "records must have class or token labels where probabilities are compared, got question answering without"
    with pytest.raises(ValueError, match=message):
        batch.log_probs()
    with pytest.raises(ValueError, match="random labels need class or token labels"):
        batch.with_random_labels()
    with pytest.raises(ValueError, match="reference_log_probs must be known"):
        make("bert", 1).kl()
    with pytest.raises(ValueError, match="targets must be known, got None"):
        evaluate("match", make("bert", 1))
    with pytest.raises(ValueError, match="token_targets must be known, got None"):
        evaluate("match_tokens", make("bert", 1))
    for name in ("npo", "dpo"):
        with pytest.raises(ValueError, match="reference_nll must be known"):
            evaluate(name, make("bert", 1))
    with pytest.raises(ValueError, match="forget records must have alternative_labels for idk, got none"):
        evaluate("idk", make("bert", 1))
    with pytest.raises(ValueError, match="reference_activations must be known for rmu"):
        evaluate("rmu", make("bert", 1), make("bert", 2), layer=0)
