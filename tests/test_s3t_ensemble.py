"""Ensemble: the logits of separate PEFT models from one forward pass, their combination, and switching stages."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from model_zoo import FAMILIES, tiny_batch, tiny_model
from s3t_tools import LENGTH, make_records, options, write_base
from serving_tools import make_chains, peft_logits
from torch import Tensor

from pymape.metrics import evaluate, predict
from pymape.modules import instrument
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import LoraConfig
from pymape.s3t.ensemble import Ensemble
from pymape.s3t.frozen_base import load_base

DEPTHS = [2, 0, 4, 1, 2]  # of four layers and slices; shard 1 is dead
ALL = LoraConfig(r=2, alpha=4.0, targets="all")
pytest.importorskip("peft")


def batch_of(family: str, task: str | None = None, **changes) -> dict[str, Tensor]:
    return tiny_batch(family, task, **({"batch": 4, "length": LENGTH, "labels": False} | changes))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize(
    "family, task",
    [(family, None) for family in FAMILIES]
    + [("gpt2", "sequence_classification"), ("llama", "sequence_classification"), ("bert", "token_classification")],
)
def test_logits_of_separate_peft_models(family: str, task: str | None, tmp_path: Path) -> None:
    config = options(write_base(tmp_path / "base", family, task=task), lora=ALL)
    chains = make_chains(config, DEPTHS)
    ensemble = Ensemble(config.model, config, chains)
    assert ensemble.shards == (0, 2, 3, 4)
    for padding in (None, "right", "left"):
        inputs = batch_of(family, task, padding=padding)
        expected = peft_logits(tmp_path / f"export {padding}", config, chains, inputs)
        outputs = ensemble(**inputs)
        for shard, logits in zip(ensemble.shards, outputs.shard_logits, strict=True):
            torch.testing.assert_close(logits, expected[shard], rtol=1e-5, atol=2e-6)
        apart = torch.stack(list(expected.values())).std(0).mean()
        assert apart > 0.1  # the shards disagree, so that rows given to the wrong one would show


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("lora", [LoraConfig(r=3, alpha=7.0), LoraConfig(r=3, alpha=7.0, rslora=True, dropout=0.5)])
def test_same_bits_as_peft_at_the_same_number_of_rows(family: str, lora: LoraConfig, tmp_path: Path) -> None:
    config = options(write_base(tmp_path / "base", family), lora=lora)
    chains = make_chains(config, [3])
    inputs = batch_of(family, padding="right")
    expected = peft_logits(tmp_path / "export", config, chains, inputs)[0]
    assert torch.equal(Ensemble(config.model, config, chains)(**inputs).shard_logits[0], expected)


def test_half_precision_rounds_as_peft_does(tmp_path: Path) -> None:
    config = options(write_base(tmp_path / "base", "llama", dtype=torch.bfloat16), lora=ALL)
    chains = make_chains(config, [2])
    inputs = batch_of("llama")
    expected = peft_logits(tmp_path / "export", config, chains, inputs)[0]
    outputs = Ensemble(config.model, config, chains)(**inputs)
    assert outputs.shard_logits.dtype == torch.bfloat16
    assert torch.equal(outputs.shard_logits[0], expected)
    assert outputs.logits.dtype == torch.float32


def test_a_new_task_head(tmp_path: Path) -> None:
    config = options(write_base(tmp_path / "base", "bert", task="base"), labels=5)
    chains = make_chains(config, [1, 2])
    inputs = batch_of("bert")
    expected = peft_logits(tmp_path / "export", config, chains, inputs)
    outputs = Ensemble(config.model, config, chains)(**inputs)
    torch.testing.assert_close(outputs.shard_logits, torch.stack([expected[0], expected[1]]), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
@pytest.mark.parametrize(
    "depths, rows",
    [
        ([2, 2, 2], [1, 1, 3, 3]),  # the two lower layers once, the two upper ones for each shard
        ([2, 0, 4, 1, 2], [2, 2, 4, 4]),  # shard 2 has rows of its own from the start, shard 3 shares up to the top
        ([1], [1, 1, 1, 1]),
        ([4, 4], [2, 2, 2, 2]),
    ],
)
def test_what_shards_have_in_common_is_computed_once(
    family: str, depths: list[int], rows: list[int], tmp_path: Path
) -> None:
    config = options(write_base(tmp_path, family))
    ensemble = Ensemble(config.model, config, make_chains(config, depths))
    seen: list[list[int]] = [[] for _ in rows]
    for calls, layer in zip(seen, find(ensemble), strict=True):
        layer.attention.register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
    ensemble(**batch_of(family, batch=5))
    assert seen == [[5 * count] for count in rows]


def find(ensemble: Ensemble) -> list:
    from pymape.model_layout import find_layers

    return find_layers(ensemble.get_base_model())


def test_combinations_of_a_classifier(bert: str) -> None:
    config = options(bert)
    chains, inputs = make_chains(config, [2, 4, 1]), batch_of("bert", batch=16)
    mean = Ensemble(bert, config, chains)(**inputs)
    torch.testing.assert_close(mean.logits, mean.shard_logits.mean(0))
    size = Ensemble(bert, config, chains, combination="size", sizes={0: 5, 1: 30, 2: 15})
    assert size.weights == (0.1, 0.6, 0.3)
    expected = 0.1 * mean.shard_logits[0] + 0.6 * mean.shard_logits[1] + 0.3 * mean.shard_logits[2]
    torch.testing.assert_close(size(**inputs).logits, expected)
    assert not torch.equal(size(**inputs).logits.argmax(-1), mean.logits.argmax(-1))
    vote = Ensemble(bert, config, chains, combination="vote")(**inputs)
    choices = mean.shard_logits.argmax(-1).T.tolist()
    winners = [min(row, key=lambda label: (-row.count(label), label)) for row in choices]
    assert any(len(set(row)) == 3 for row in choices)  # a tie
    assert vote.logits.argmax(-1).tolist() == winners
    shares = [[(row.count(label) + 1) / 6 for label in range(3)] for row in choices]
    torch.testing.assert_close(vote.logits.softmax(-1), torch.tensor(shares))


def test_language_models_average_probabilities(llama: str) -> None:
    config = options(llama)
    chains, inputs = make_chains(config, [2, 3]), batch_of("llama", padding="right")
    outputs = Ensemble(llama, config, chains, combination="size", sizes={0: 3, 1: 1})(**inputs)
    probabilities = outputs.shard_logits.softmax(-1)
    expected = 0.75 * probabilities[0] + 0.25 * probabilities[1]
    torch.testing.assert_close(outputs.logits.exp(), expected)
    torch.testing.assert_close(outputs.logits.logsumexp(-1), torch.zeros(4, LENGTH), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_metrics_take_it_for_a_model(family: str, tmp_path: Path) -> None:
    config = options(write_base(tmp_path / "base", family))
    chains = make_chains(config, [2, 4, 0])
    ensemble = Ensemble(config.model, config, chains)
    records = make_records(family, 20)
    ours, theirs = ensemble.predict(records, batch_size=7, progress=False), predict(ensemble, records, batch_size=3)
    assert torch.equal(ours.correct, theirs.correct)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    figures = evaluate(ensemble, forget=records[:6], retain=records[6:14], test=records[14:])
    assert figures["TA"] == pytest.approx(ensemble.predict(records[14:]).accuracy)
    scores = ensemble.score(records, batch_size=6)
    assert scores["accuracy"] == pytest.approx(ours.accuracy)
    for shard in (0, 1):
        adapters = SlicedAdapters(load_base(config.model), config)
        adapters.load(chains[shard])
        assert scores["shard_accuracy"][shard] == pytest.approx(predict(adapters.base, records).accuracy)
    assert len(scores["shard_accuracy"]) == 2


def test_the_base_stays_as_it_is(bert: str) -> None:
    config = options(bert, lora=ALL)
    base, inputs = tiny_model("bert", num_hidden_layers=4, intermediate_size=32, dropout=0.5).train(), batch_of("bert")
    names = [name for name, _ in base.named_modules()]
    torch.manual_seed(0)
    before = base(**inputs).logits
    ensembles = [Ensemble(base, config, make_chains(config, [2, 1], seed=seed)) for seed in (0, 1)]
    answers = [ensemble(**inputs).logits for ensemble in ensembles]
    assert not torch.equal(*answers)
    assert torch.equal(ensembles[0].train()(**inputs).logits, answers[0])  # no dropout acts, whatever is asked for
    torch.manual_seed(0)
    assert torch.equal(base(**inputs).logits, before)
    assert [name for name, _ in base.named_modules()] == names
    assert all(module.training and "forward" not in vars(module) for module in base.modules())
    assert all(parameter.requires_grad for parameter in base.parameters())
    own = dict(ensembles[0].get_base_model().named_parameters())
    assert all(own[name].data_ptr() == parameter.data_ptr() for name, parameter in base.named_parameters())


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_switching_gives_what_a_new_ensemble_gives(family: str, tmp_path: Path) -> None:
    config = options(write_base(tmp_path, family), lora=ALL)
    chains, inputs = make_chains(config, DEPTHS), batch_of(family, padding="right")
    ensemble = Ensemble(config.model, config, chains)
    first = ensemble(**inputs)
    for shard, depth in [(2, 1), (0, 0), (4, 0), (3, 0)]:
        after = {**chains, shard: chains[shard][:depth]}
        ensemble.update(after)
        again, fresh = ensemble(**inputs), Ensemble(config.model, config, after)
        assert ensemble.shards == fresh.shards
        assert torch.equal(again.shard_logits, fresh(**inputs).shard_logits)
        assert torch.equal(again.logits, fresh(**inputs).logits)
    ensemble.update(chains)
    assert torch.equal(ensemble(**inputs).logits, first.logits)


def test_a_refused_switch_changes_nothing(bert: str) -> None:
    config = options(bert)
    chains, inputs = make_chains(config, [2, 1]), batch_of("bert")
    ensemble = Ensemble(bert, config, chains)
    before = ensemble(**inputs).logits
    wrong = [
        ({0: chains[0][1:]}, r"stage 1 of shard 0 must adapt layers \[3\], got \[2\]"),
        ({0: [chains[0][1], chains[0][0]]}, r"stage 1 of shard 0 must adapt layers \[3\], got \[2\]"),
        ({0: [without(chains[0][0], "classifier")]}, r"last stage of shard 0 must hold the task head .*, got {}"),
        ({0: [without(chains[0][0], "query.lora_B")]}, "adapters of .* must be an A and a B of one rank"),
        ({0: [renamed(chains[0][0], "query", "nothing")]}, "adapters must belong to modules in the base's layers"),
        ({0: [wider(chains[0][0])]}, "adapters of .* must fit its weight"),
        ({0: [longer(chains[0][0])], 1: chains[1]}, "adapters of .* must be an A and a B of one rank for all shards"),
    ]
    for others, message in wrong:
        with pytest.raises(ValueError, match=message):
            ensemble.update(others)
        assert ensemble.shards == (0, 1)
        assert torch.equal(ensemble(**inputs).logits, before)


@pytest.mark.parametrize("dead", [{}, {0: [], 1: []}])
def test_without_a_live_shard_nothing_is_served_or_held(bert: str, dead: dict[int, list]) -> None:
    config = options(bert)
    chains, inputs = make_chains(config, [2, 1]), batch_of("bert")
    with pytest.raises(ValueError, match=f"chains must hold a live shard, got {len(dead)}, all dead"):
        Ensemble(bert, config, dead)
    ensemble = Ensemble(bert, config, chains)
    before = ensemble(**inputs).logits
    held = [weakref.ref(part) for part in ensemble._shared.parts]
    ensemble.update(dead)
    assert (ensemble.shards, ensemble.weights) == ((), ())
    for call in (lambda: ensemble(**inputs), lambda: ensemble.score(make_records(count=4))):
        with pytest.raises(ValueError, match="ensemble must serve a live shard, got none: every shard is dead"):
            call()
    gc.collect()
    assert held
    assert all(part() is None for part in held)
    ensemble.update(chains)
    assert torch.equal(ensemble(**inputs).logits, before)


class Script:
    """A source that serves other chains from its nth answer on."""

    def __init__(self, later: dict[int, dict[int, list[dict[str, Tensor]]]]) -> None:
        self.later, self.asked, self.sizes = later, -1, {}

    def changed(self) -> bool:
        self.asked += 1
        return self.asked in self.later

    def read(self) -> Script:
        self.chains = self.later[self.asked]
        return self


@pytest.mark.parametrize("depth", [0, 1])
def test_a_shard_that_dies_or_loses_stages_while_records_are_scored(bert: str, depth: int) -> None:
    config, records = options(bert), make_records(count=12)
    chains = make_chains(config, [2, 3, 3])
    left = {shard: chain[:depth] if shard == 1 else chain for shard, chain in chains.items() if shard != 1 or depth}
    expected = Ensemble(bert, config, left).score(records, batch_size=4)
    for when in range(4):  # before the first batch, or between two
        ensemble = Ensemble(bert, config, chains, source=Script({when: left}))
        assert ensemble.score(records, batch_size=4) == expected
    assert Ensemble(bert, config, chains, source=Script({})).score(records, batch_size=4) != expected


def without(stage: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in stage.items() if part not in name}


def renamed(stage: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {name.replace(old, new): tensor for name, tensor in stage.items()}


def wider(stage: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(2, 17) if "lora_A" in name else tensor for name, tensor in stage.items()}


def longer(stage: dict[str, Tensor]) -> dict[str, Tensor]:
    grown = {"lora_A": torch.zeros(3, 16), "lora_B": torch.zeros(16, 3)}
    return {name: next((grown[part] for part in grown if part in name), tensor) for name, tensor in stage.items()}


def test_refuses_what_it_cannot_serve(bert: str) -> None:
    config = options(bert)
    chains = make_chains(config, [1, 2])
    with pytest.raises(ValueError, match="combination must be one of mean, vote, size, got 'median'"):
        Ensemble(bert, config, chains, combination="median")
    for sizes in (None, {0: 4}, {0: 4, 1: 0}):
        with pytest.raises(ValueError, match=r"sizes must hold the records of each live shard \[0, 1\], got"):
            Ensemble(bert, config, chains, combination="size", sizes=sizes)
    with pytest.raises(ValueError, match="model must be plain, got a BertForSequenceClassification"):
        Ensemble(instrument(load_base(bert)), config, chains)
    with pytest.raises(ValueError, match="model must be plain, got a BertForSequenceClassification"):
        Ensemble(SlicedAdapters(load_base(bert), config).base, config, chains)
    with pytest.raises(ValueError, match="model must give one tensor of logits, got a BertForQuestionAnswering"):
        Ensemble(tiny_model("bert", "question_answering", num_hidden_layers=4), config, chains)
    with pytest.raises(ValueError, match="inputs must hold tensors, got"):
        Ensemble(bert, config, chains)(input_ids=None)


def test_an_error_in_a_batch_does_not_spoil_the_next(bert: str) -> None:
    config = options(bert)
    ensemble, inputs = Ensemble(bert, config, make_chains(config, [1, 3])), batch_of("bert")
    expected = ensemble(**inputs).logits
    with pytest.raises(IndexError):
        ensemble(input_ids=torch.full((2, 4), 1000))
    assert torch.equal(ensemble(**inputs).logits, expected)
    assert ensemble(**inputs).logits.is_inference()
