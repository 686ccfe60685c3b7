"""Reference values on disk: reused when they belong, computed anew when stale or damaged; and stopping in time."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from model_zoo import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from trainer_tools import arguments, collate, records, some_masks
from transformers import TrainerControl, TrainerState

from pymape.objectives.match import matched_losses
from pymape.trainer import UnlearnTrainer
from pymape.trainer.reference_cache import ReferenceCache, record_digest, weights_digest
from pymape.trainer.stopping import StopWhenForgotten


def rows_of(digests: list[bytes], asked: list[list[int]]):
    def compute(rows: list[int]) -> Tensor:
        asked.append(list(rows))
        return torch.tensor([[float(digests[row][0]), row] for row in rows])

    return compute


def test_only_unknown_records_are_computed(tmp_path):
    digests = [bytes([row] * 32) for row in range(4)]
    asked: list[list[int]] = []
    cache = ReferenceCache(tmp_path / "cache", "a" * 64)
    first = cache.values("nll", digests[:3], rows_of(digests, asked))
    assert first.tolist() == [[0, 0], [1, 1], [2, 2]]
    order = [digests[3], digests[2], digests[0]]
    found = ReferenceCache(tmp_path / "cache", "a" * 64).values("nll", order, rows_of(order, asked))
    assert found.tolist() == [[3, 0], [2, 2], [0, 0]]
    assert asked == [[0, 1, 2], [0]]
    ReferenceCache(tmp_path / "cache", "b" * 64).values("nll", digests[:1], rows_of(digests, asked))
    cache.values("log_probs", digests[:1], rows_of(digests, asked))
    assert asked[2:] == [[0], [0]]
    assert len(list((tmp_path / "cache").iterdir())) == 3
    cache.values("other", digests[:1], rows_of(digests, asked), write=False)
    assert not cache.path("other").exists()


@pytest.mark.parametrize("damage", ["truncated", "flipped", "renamed", "exchanged"])
def test_a_damaged_or_foreign_file_is_computed_anew(damage, tmp_path, caplog):
    digests = [bytes([row] * 32) for row in range(3)]
    asked: list[list[int]] = []
    cache = ReferenceCache(tmp_path, "a" * 64)
    before = cache.values("nll", digests, rows_of(digests, asked))
    path = cache.path("nll")
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-5])
    elif damage == "flipped":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "renamed":  # another model's file under this one's name
        other = ReferenceCache(tmp_path, "b" * 64)
        other.values("nll", digests, lambda rows: torch.zeros(len(rows), 2))
        other.path("nll").replace(path)
    else:
        tensors = load_file(path)
        save_file({**tensors, "records": tensors["records"].flip(0)}, path)
    with caplog.at_level(logging.WARNING):
        after = cache.values("nll", digests, rows_of(digests, asked))
    assert torch.equal(after, before)
    assert asked == [[0, 1, 2]] * 2
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    assert "computed anew" in caplog.text
    cache.values("nll", digests, rows_of(digests, asked))
    assert len(asked) == 2


def test_digests_tell_weights_and_records_apart():
    model = tiny_model("bert")
    digest = weights_digest(model)
    assert weights_digest(tiny_model("bert")) == digest
    assert weights_digest(model, "bf16") != digest
    other = copy.deepcopy(model)
    other.config.hidden_act = "relu"  # the same weights compute other losses
    assert weights_digest(other) != digest
    assert weights_digest(copy.deepcopy(model).to(torch.bfloat16)) != digest
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1e-6
    assert weights_digest(model) != digest
    record = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([1])}
    others = [{**record, "labels": torch.tensor([2])}, {**record, "input_ids": torch.tensor([[1, 2, 3]])}]
    others += [{**record, "labels": torch.tensor([1], dtype=torch.int32)}, {**record, "labels": torch.tensor([[1]])}]
    others += [{**record, "scale": 1.0}, {**record, "scale": 2.0}, {**record, "scale": torch.zeros(2000).numpy()}]
    others += [{**record, "scale": torch.arange(2000) == 1000}, {**record, "scale": (torch.arange(2000) == 9).numpy()}]
    digests = {record_digest(*rows) for row in [record, *others] for rows in ([row], [record, row], [row, record])}
    assert len(digests) == 3 * len(others) + 2
    assert record_digest(dict(reversed(record.items()))) == record_digest(record)


def build(kind: str, family: str, path: Path, **options: Any) -> UnlearnTrainer:
    model = options.pop("model", None) or tiny_model(family)
    defaults: dict[str, Any] = {
        "forget_dataset": records(kind, 4, 1), "retain_dataset": records(kind, 4, 2), "data_collator": collate,
        "masks": some_masks(model),
    }  # fmt: skip
    args = options.pop("args", None) or arguments(path)
    return UnlearnTrainer(model, args, **defaults | options)


@pytest.mark.parametrize(
    ("family", "options", "kinds"),
    [
        ("bert", {"objective": "npo", "retain": "kl"}, ["log_probs", "nll"]),
        ("llama", {"objective": "npo", "retain": "kl"}, ["nll"]),
        ("llama", {"objective": "dpo"}, ["preference"]),
        ("llama", {"objective": "ga"}, []),
    ],
)
def test_a_second_run_reads_what_the_first_computed(family, options, kinds, tmp_path, monkeypatch):
    kind = "text" if family == "bert" else "language"
    folder = tmp_path / "cache"

    def run(**more: Any) -> tuple[dict[str, Tensor], int]:
        trainer = build(kind, family, tmp_path, **options, **more)
        looked_up = []
        in_order = trainer._in_order

        def counted(*args: Any, **kw: Any) -> Any:
            if kw["batch_size"] is None:  # else only their digests are asked for
                looked_up.append(kw["rows"])
            return in_order(*args, **kw)

        monkeypatch.setattr(trainer, "_in_order", counted)
        trainer.train()
        return trainer.merge().state_dict(), sum(map(len, looked_up))

    plain, computed = run()
    first, again = run(reference_cache=folder)
    assert computed == again == 4 * len(kinds)
    assert sorted(path.name.split("-")[0] for path in folder.glob("*")) == kinds
    second, none = run(reference_cache=folder)
    assert none == 0
    for key, value in plain.items():
        assert torch.equal(first[key], value)
        assert torch.equal(second[key], value)
    assert run(reference_cache=folder, model=tiny_model(family, seed=1))[1] == computed
    more = records(kind, 6, 1)
    assert run(reference_cache=folder, forget_dataset=more)[1] == 2 * any(name != "log_probs" for name in kinds)


@pytest.mark.parametrize("objective", ["npo", "dpo"])
def test_values_of_another_collator_are_not_used(objective, tmp_path):
    def original(most: int, folder: str) -> Tensor:
        def cut(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
            return collate([{name: tokens[:most] for name, tokens in row.items()} for row in rows])

        trainer = build(
            "language", "llama", tmp_path, objective=objective, data_collator=cut, reference_cache=tmp_path / folder
        )
        trainer.train()
        return trainer.original._known["forget"]

    short, whole = original(3, "shared"), original(99, "shared")
    assert torch.equal(whole, original(99, "fresh"))
    assert not torch.equal(short, whole)


@pytest.mark.parametrize("objective", ["npo", "dpo", "match", "match_tokens", "so", "kl", "gd", "rmu"])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_random_data_are_refused_where_stored_values_belong_to_them(family, objective, tmp_path):
    kind = "text" if family == "bert" else "language"

    def shaken(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        return {**batch, "input_ids": torch.where(torch.rand(batch["input_ids"].shape) < 0.3, 1, batch["input_ids"])}

    options: dict[str, Any] = {"objective_options": {"layer": 0} if objective == "rmu" else None}
    if "match" in objective:
        options["unseen_dataset"] = records(kind, 5, 3)
    trainer = build(kind, family, tmp_path, objective=objective, data_collator=shaken, **options)
    if objective in ("gd", "rmu") or (objective == "kl" and family == "gpt2"):  # asked step by step, or not at all
        trainer.train()
        return
    side = "retain" if objective == "kl" else "forget"
    message = f"inputs of {side} records must stay the same, got others .* cannot serve randomly augmented data"
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_resuming_reads_the_original_model_not_the_checkpoint(tmp_path):
    args = arguments(tmp_path / "run", save_strategy="steps", save_steps=1, num_train_epochs=2, optim="sgd")
    whole = build("text", "bert", tmp_path, objective="npo", args=args, reference_cache=tmp_path / "cache")
    whole.train()
    resumed = build("text", "bert", tmp_path, objective="npo", args=args, reference_cache=tmp_path / "cache")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for key, value in whole.merge().state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], value)


def train_until(path: Path, target: Any, **options: Any) -> tuple[UnlearnTrainer, StopWhenForgotten]:
    stop = StopWhenForgotten(target, every=options.pop("every", 2))
    args = arguments(path, num_train_epochs=30, learning_rate=2e-3, lr_scheduler_type="constant")
    trainer = build("language", "llama", path, objective="ga", args=args, callbacks=[stop], **options)
    trainer.train()
    return trainer, stop


def test_training_stops_when_the_forget_loss_reaches_a_number(tmp_path):
    start = build("language", "llama", tmp_path, objective="ga")
    target = start.mean_loss(start.forget_dataset) + 0.3
    trainer, stop = train_until(tmp_path, target)
    steps = trainer.state.global_step
    checks = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert 4 <= steps < 30
    assert steps % 2 == 0
    assert [entry["step"] for entry in checks] == list(range(2, steps + 1, 2))
    assert [entry["forget_loss"] >= target for entry in checks] == [False] * (len(checks) - 1) + [True]
    assert {entry["target_loss"] for entry in checks} == {target}
    assert checks[-1]["forget_loss"] == pytest.approx(trainer.mean_loss(trainer.forget_dataset))
    reason = f"forget loss {checks[-1]['forget_loss']:.4g} reached the target, {target:.4g}, at step {steps}"
    assert stop.reason == reason
    assert [e["stop_reason"] for e in trainer.state.log_history if "stop_reason" in e] == [reason]
    path = tmp_path / "state.json"
    trainer.state.save_to_json(str(path))
    assert TrainerState.load_from_json(str(path)).log_history[-2:] == trainer.state.log_history[-2:]


def test_training_stops_when_the_forget_loss_reaches_that_on_unseen_data(tmp_path):
    """Unseen records are those of another seed; the model is first fitted to the forget set."""
    model = tiny_model("llama")
    fitted = records("language", 4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(15):
        model(**collate([{k: row[k] for k in ("input_ids", "labels")} for row in fitted])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    unseen = records("language", 5, 7)
    trainer, stop = train_until(tmp_path, unseen, model=model, masks=None, every=1)
    checks = [entry for entry in trainer.state.log_history if "forget_loss" in entry]
    assert len(checks) > 1
    assert len({entry["target_loss"] for entry in checks}) == len(checks)  # it is the model's of that step
    assert all(entry["forget_loss"] < entry["target_loss"] for entry in checks[:-1])
    assert trainer.mean_loss(fitted) >= trainer.mean_loss(unseen) == pytest.approx(checks[-1]["target_loss"])
    assert "reached the loss on unseen data" in stop.reason
    assert trainer.state.global_step < 30


def test_a_run_that_does_not_get_there_ends_as_planned(tmp_path):
    trainer, stop = train_until(tmp_path, 1e9, every=7)
    assert trainer.state.global_step == 30
    assert stop.reason is None
    checks = [entry["step"] for entry in trainer.state.log_history if "forget_loss" in entry]
    assert checks == [7, 14, 21, 28, 30]


def test_mean_loss_weighs_tokens_and_keeps_the_mode(tmp_path):
    trainer = build("language", "llama", tmp_path, objective="ga")
    rows = records("language", 3, 4)
    model = trainer.model
    parts = []
    for row in rows:
        length = len(row["labels"]) - 1
        with torch.no_grad():
            parts.append((float(model(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss), length))
    expected = sum(loss * length for loss, length in parts) / sum(length for _, length in parts)
    model.train()
    assert trainer.mean_loss(rows) == pytest.approx(expected, rel=1e-5)
    assert model.training


def test_bad_stopping_is_a_one_line_error(tmp_path):
    for target in (float("nan"), np.float32("inf"), torch.tensor(math.nan), None, iter(())):
        with pytest.raises(ValueError, match="target must be a map-style data set or a finite number"):
            StopWhenForgotten(target)
    for target, expected in (([], "at least one record, got an empty set"), ("3", "dicts as records, got str")):
        with pytest.raises(ValueError, match=f"target must hold {expected}"):
            StopWhenForgotten(target)
    assert [StopWhenForgotten(kind(3.0)).target for kind in (np.float32, torch.tensor)] == [3.0, 3.0]
    with pytest.raises(ValueError, match="dataset must hold at least one record, got an empty set"):
        build("text", "bert", tmp_path).mean_loss([])
    with pytest.raises(ValueError, match="every must be >= 1, got 0"):
        StopWhenForgotten(1.0, every=0)
    with pytest.raises(ValueError, match="must be in the callbacks that an UnlearnTrainer is made with"):
        StopWhenForgotten(1.0).on_train_begin(arguments(tmp_path), TrainerState(), TrainerControl())
    for options, message in (
        ({"objective": "ft", "forget_dataset": None}, "forget_dataset must be given for StopWhenForgotten, got None"),
        ({"objective": "influence"}, "objective must take steps for StopWhenForgotten, got 'influence'"),
    ):
        with pytest.raises(ValueError, match=message):
            build("text", "bert", tmp_path, callbacks=[StopWhenForgotten(1.0)], **options).train()


def test_matched_losses_are_those_of_unseen_records_by_rank():
    own = torch.tensor([0.3, 0.1, 0.2, 0.4])
    assert matched_losses(own, torch.tensor([5.0, 1.0, 7.0, 3.0])).tolist() == [4.75, 1.75, 3.25, 6.25]
    assert matched_losses(own, torch.tensor([2.0])).tolist() == [2.0] * 4
    draw = torch.Generator().manual_seed(0)
    unseen = torch.empty(300).exponential_(generator=draw)
    found = matched_losses(torch.rand(1000, generator=draw), unseen)
    assert scipy.stats.ks_2samp(found, unseen).statistic < 0.005


def test_matched_losses_leave_out_what_fills_up_the_rows():
    nan = float("nan")
    own = torch.tensor([[0.3, 0.1, nan], [nan, nan, nan], [0.2, 0.4, 0.0]])
    unseen = torch.tensor([[5.0, 1.0], [7.0, nan], [3.0, 9.0]])
    found = matched_losses(own, unseen)
    assert torch.equal(found.isnan(), own.isnan())
    assert found[~own.isnan()].tolist() == pytest.approx([6.6, 3.4, 5.0, 8.2, 1.8])


def test_rows_of_different_lengths_are_kept(tmp_path):
    digests = [bytes([row] * 32) for row in range(3)]
    cache = ReferenceCache(tmp_path, "a" * 64)
    cache.values("token_losses", digests[:1], lambda rows: torch.tensor([[1.0, 2.0]]))
    found = cache.values("token_losses", digests, lambda rows: torch.tensor([[3.0, 4.0, 5.0], [6.0, math.nan, 7.0]]))
    assert found[0, :2].tolist() == [1, 2]
    assert found[0, 2].isnan()
    again = cache.values("token_losses", digests[::-1], lambda rows: pytest.fail("nothing is unknown"))
    assert torch.equal(again.nan_to_num(-1), found.flip(0).nan_to_num(-1))
