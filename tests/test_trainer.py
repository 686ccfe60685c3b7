"""UnlearnTrainer: what trains, what stays, and that accumulation, resuming and bad input behave."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import LABELS, tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from trainer_tools import NAMES, arguments, build, collate, make, mean_loss, outside, records, some_masks
from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from pymape.data.records import bare_record
from pymape.model_layout import find_layers
from pymape.trainer import UnlearnTrainer
from pymape.trainer.pairing import PairSampler


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("name", NAMES)
def test_every_objective_trains_what_it_should(name, family, masked, tmp_path):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    cache = model.config.use_cache
    args = arguments(tmp_path, weight_decay=0.1)
    assert args.optim == "adamw_torch_fused"
    trainer = make(family, tmp_path, model=model, masked=masked, args=args, objective=name)
    forget, retain = (trainer.data.get(side) for side in ("forget", "retain"))
    loss = {side: mean_loss(model, rows) for side, rows in trainer.data.items()}
    output = trainer.train()
    assert trainer.merge() is model
    assert output.global_step == {"ga": 1, "influence": 1, "ssd": 1}.get(name, 2)
    after = model.state_dict()
    assert list(after) == list(before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training
    assert model.config.use_cache == cache
    changed = {key: after[key] != before[key] for key in before}
    if masked:
        for key, frozen in outside(model, some_masks(model)).items():
            assert not changed[key][frozen].any(), key
    assert sum(int(change.sum()) for change in changed.values()) > 100
    if name in ("ga", "gd", "kl", "npo", "simnpo", "dpo", "so", "influence"):
        assert mean_loss(model, forget) > loss["forget"]
    if name == "ft":
        assert mean_loss(model, retain) < loss["retain"]


def test_default_arguments_and_a_vision_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model("vit")
    trainer = UnlearnTrainer(
        model,
        forget_dataset=records("image", 2, 1),
        retain_dataset=records("image", 3, 2),
        masks=some_masks(model),
        objective="gd",
    )
    assert trainer.train().global_step == 3
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("family", "masked"), [("bert", False), ("llama", True)])
@pytest.mark.parametrize("name", ["gd", "kl", "npo", "rl", "dpo", "idk", "rmu"])
def test_accumulating_4_x_2_equals_a_batch_of_8(name, family, masked, tmp_path):
    """Also for records of different lengths and for a last step that is not full."""
    results = []
    for batch, steps in ((8, 1), (2, 4)):
        args = arguments(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_grad_norm=0.5,
            learning_rate=0.1, optim="sgd", lr_scheduler_type="constant",
        )  # fmt: skip
        model = tiny_model(family, dtype=torch.float64)
        trainer = make(family, tmp_path, model=model, masked=masked, forget=5, retain=13, args=args, objective=name)
        output = trainer.train()
        assert output.global_step == 2
        results.append((trainer.merge().state_dict(), output.training_loss))
    (whole, loss), (parts, other) = results
    assert loss == pytest.approx(other, rel=1e-6)
    for key, value in whole.items():
        torch.testing.assert_close(parts[key], value, rtol=1e-9, atol=1e-11, msg=lambda text, key=key: f"{key}: {text}")
    start = tiny_model(family, dtype=torch.float64).state_dict()
    assert max(float((whole[key] - start[key]).abs().max()) for key in start) > 1e-4


DISTRIBUTED: dict[str, dict[str, Any]] = {
    "kl": {"objective": "kl"},
    "dpo": {"objective": "dpo"},
    "rmu": {"objective": "rmu"},
    "ssd": {"objective": "ssd", "forget": 5, "retain": 7},
    "influence": {"objective": "influence", "forget": 5, "retain": 7},
    "conjugate gradients": {"objective": "influence", "objective_options": {"cg_steps": 5}, "forget": 1, "retain": 7},
}
TWO_PROCESSES = """
import json, os, sys, torch
from pathlib import Path
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[1])
import test_trainer
folder = Path(sys.argv[2])
rank = None
found = {}
save_file(test_trainer.resumed_in_batches_of(1, folder), folder / f"resumed-{os.environ['RANK']}.safetensors")
for name in test_trainer.DISTRIBUTED:
    trainer, found[name] = test_trainer.train_in_batches_of(2, folder, name)
    rank = torch.distributed.get_rank()
    save_file(trainer.merge().state_dict(), folder / f"{name}-{rank}.safetensors")
trainer = test_trainer.make("llama", folder, objective="influence")
trainer.data["retain"][3]["labels"] = trainer.data["retain"][3]["labels"] + 1000
try:
    trainer.train()
except ValueError as error:
    found["error"] = str(error)
(folder / f"found-{rank}.json").write_text(json.dumps(found))
torch.distributed.destroy_process_group()
"""


def train_in_batches_of(size: int, path: Path, name: str) -> tuple[UnlearnTrainer, int]:
    """The trainer, and how often its model ran."""
    args = arguments(path, per_device_train_batch_size=size, optim="sgd", lr_scheduler_type="constant")
    model = tiny_model("llama", dtype=torch.float64)
    trainer = make("llama", path, model=model, args=args, **DISTRIBUTED[name])
    runs: list[None] = []
    model.register_forward_pre_hook(lambda *_: runs.append(None))
    trainer.train()
    return trainer, len(runs)


def resumed_in_batches_of(size: int, path: Path) -> dict[str, Tensor]:
    """Weights after two epochs of four steps, of which the last two were resumed."""
    options = {"per_device_train_batch_size": size, "optim": "sgd", "save_strategy": "steps", "save_steps": 6}
    for folder, checkpoint in (("whole", None), ("resumed", str(path / "whole" / "checkpoint-6"))):
        args = arguments(path / folder, num_train_epochs=2, **options)
        trainer = make("llama", path, model=tiny_model("llama", dtype=torch.float64), args=args, objective="gd")
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 8
    return trainer.merge().state_dict()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, str(Path(__file__).parent), str(folder)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_two_processes_resume_where_one_does(two_processes, tmp_path):
    """Within the second epoch, whose order differs from that of the first."""
    one = resumed_in_batches_of(2, tmp_path)
    for rank in range(2):
        two = load_file(two_processes / f"resumed-{rank}.safetensors")
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-10, atol=1e-12)


def test_two_processes_give_the_model_of_one(two_processes, tmp_path):
    found = [json.loads((two_processes / f"found-{rank}.json").read_text()) for rank in range(2)]
    for name in DISTRIBUTED:
        trainer, runs = train_in_batches_of(4, tmp_path, name)
        one = trainer.merge().state_dict()
        two, other = (load_file(two_processes / f"{name}-{rank}.safetensors") for rank in range(2))
        assert two.keys() == one.keys()
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, rtol=1e-10, atol=1e-12)
            assert torch.equal(two[key], other[key])
        if trainer.objective.one_shot:
            assert found[0][name] + found[1][name] == runs  # each record is gone through by one process only
    assert re.search("labels must .* got 1", found[1]["error"])
    assert "process 1 failed: ValueError: labels must" in found[0]["error"]


@pytest.mark.parametrize("name", ["gd", "kl"])
def test_resuming_equals_an_uninterrupted_run(name, tmp_path):
    def run(folder: str, model=None, **options):
        args = arguments(tmp_path / folder, num_train_epochs=2, save_strategy="steps", save_steps=3, seed=3)
        trainer = make("gpt2", tmp_path, model=model or tiny_model("gpt2", dropout=0.1), args=args, objective=name)
        trainer.train(**options)
        return trainer.merge().state_dict()

    whole = run("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    saved = type(tiny_model("gpt2")).from_pretrained(checkpoint)  # a checkpoint is a plain model
    assert not any(torch.equal(saved.state_dict()[key], whole[key]) for key in whole if "c_attn.weight" in key)
    resumed = run("resumed", resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_what_is_resumed_began_with_the_same_model_and_masks(tmp_path):
    args = arguments(tmp_path / "run", num_train_epochs=2, save_strategy="steps", save_steps=2)
    trainer = make("bert", tmp_path, args=args)
    trainer.train()
    saved = type(trainer.model).from_pretrained(tmp_path / "run" / "checkpoint-2")
    for changes in ({"model": saved}, {"masked": False}):
        other = make("bert", tmp_path, args=args, **changes)
        for checkpoint in (True, str(tmp_path / "run" / "checkpoint-2")):
            with pytest.raises(ValueError, match="of a training that began with this model and these masks, got"):
                other.train(resume_from_checkpoint=checkpoint)
        assert other.state.global_step == 0
    (tmp_path / "run" / "checkpoint-2" / "unlearning.json").unlink()
    with pytest.raises(ValueError, match="resume_from_checkpoint must be a checkpoint of an UnlearnTrainer, got"):
        make("bert", tmp_path, args=args).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_a_model_can_be_pickled_while_it_is_trained(tmp_path):
    class Pickle(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            pickle.dumps(model.enable_input_require_grads)

    make("bert", tmp_path, masked=False, callbacks=[Pickle()]).train()


def test_a_saved_model_is_the_plain_one(tmp_path):
    trainer = make("llama", tmp_path, objective="ga")
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    merged = trainer.merge().state_dict()
    loaded, report = type(trainer.model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert not report["missing_keys"]
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in merged.items())


def test_the_same_seed_gives_the_same_model(tmp_path):
    def run(seed: int) -> Tensor:
        args = arguments(tmp_path, seed=seed, per_device_train_batch_size=2)
        trainer = make("bert", tmp_path, model=tiny_model("bert", dropout=0.1), args=args, objective="rl")
        trainer.train()
        return torch.cat([p.detach().flatten() for p in trainer.merge().parameters()])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_pairs_cycle_the_shorter_set():
    sampler = PairSampler([3, 10], seed=0)
    first = list(sampler)
    assert list(sampler) == first
    forget, retain = zip(*first, strict=True)
    assert sorted(retain) == list(range(10))
    assert [sorted(forget[start : start + 3]) for start in (0, 3, 6)] == [[0, 1, 2]] * 3
    assert len({forget[:3], forget[3:6], forget[6:9]}) > 1
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(PairSampler([3, 10], seed=1)) != first


def test_bf16_autocast_checkpointing_and_clipping(tmp_path):
    args = arguments(tmp_path, bf16=True, gradient_checkpointing=True, max_grad_norm=0.1, gradient_accumulation_steps=2)
    trainer = make("llama", tmp_path, args=args, objective="kl")
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    after = trainer.merge().state_dict()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in after.values())
    assert any(not torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("own_forward", [False, True])
def test_no_autocast_is_left_after_merging(family, own_forward, tmp_path):
    model = tiny_model(family)
    if own_forward:
        model.forward = functools.partial(type(model).forward, model)
    before, mine = set(vars(model)), vars(model).get("forward")
    trainer = make(family, tmp_path, model=model, args=arguments(tmp_path, bf16=True))
    trainer.train()
    assert {"forward", "_is_accelerate_prepared"} <= vars(model).keys()
    assert trainer.merge() is model
    assert set(vars(model)) == before
    assert vars(model).get("forward") is mine
    fresh = tiny_model(family, seed=1)
    fresh.load_state_dict(model.state_dict())
    inputs = collate([bare_record(row) for row in trainer.data["forget"]])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)
        assert isinstance(model(**inputs, return_dict=False), tuple)  # its own decorators are still there


@pytest.mark.parametrize("masked", [True, False])
def test_checkpointing_makes_no_graph_below_the_masks_and_leaves_no_hook(masked, tmp_path):
    results = []
    for checkpointing in (False, True):
        model = tiny_model("llama")
        mine = model.get_input_embeddings().register_forward_hook(lambda *_: None)
        masks = some_masks(model) if masked else None
        if masks is not None:
            masks.heads[0], masks.filters[0] = False, False
        traced = []
        for module in (model.get_input_embeddings(), find_layers(model)[0].layer):
            module.register_forward_hook(lambda _, __, output, traced=traced: traced.append(output[0].requires_grad))
        args = arguments(tmp_path, gradient_checkpointing=checkpointing)
        sets = {"forget_dataset": records("language", 4, 1), "retain_dataset": records("language", 4, 2)}
        trainer = build(tmp_path, model=model, args=args, masks=masks, data_collator=collate, **sets)
        trainer.train()
        results.append(trainer.merge().state_dict())
        assert any(traced) != masked
        hooks = model.get_input_embeddings()._forward_hooks
        assert len(hooks) == 2
        assert mine.id in hooks
        assert "enable_input_require_grads" not in vars(model)
    assert all(torch.equal(value, results[1][key]) for key, value in results[0].items())


def test_dropout_can_be_off(tmp_path):
    trainer = make("bert", tmp_path, model=tiny_model("bert", dropout=0.5), objective="npo", dropout=False, retain=4)
    trainer.train()
    assert not trainer.model.training


def test_evaluation_uses_the_models_own_loss(tmp_path):
    rows = records("text", 6, 3)
    trainer = make("bert", tmp_path, eval_dataset=rows, objective="gd")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_loss(trainer.model, rows), rel=1e-5)


def test_task_head_trains_if_asked(tmp_path):
    trainer = make("bert", tmp_path, objective="ga", train_task_head=True)
    before = trainer.model.classifier.weight.detach().clone()
    trainer.train()
    assert not torch.equal(trainer.merge().classifier.weight, before)


def test_a_diverging_run_is_a_one_line_error_and_writes_nothing(tmp_path):
    args = arguments(tmp_path / "run", learning_rate=1e38, optim="sgd", save_strategy="steps", save_steps=2)
    trainer = make("bert", tmp_path, args=args, objective="gd", retain=40)
    with pytest.raises(ValueError, match=r"must stay finite, got .* learning_rate 1e\+38$") as caught:
        trainer.train()
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="loss must stay finite, got nan"):
        make("bert", tmp_path, model=model, objective="influence").train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "nope"}, "objective must be one of dpo, ft, ga, .*, got 'nope'"),
        ({"objective": "rmu"}, "objective_options must have 'layer' for objective 'rmu'"),
        ({"objective_options": {"layer": 1}}, "objective_options must be empty for objective 'gd', got layer"),
        ({"retain": "mse"}, "retain must be 'nll' or 'kl', got 'mse'"),
        ({"objective": "ga", "retain": "kl"}, "retain must be 'nll' for objective 'ga', which has no such retain term"),
        ({"objective": "npo", "retain": "kl", "retain_dataset": None}, "retain_dataset must be given for retain='kl'"),
        ({"objective": "so", "optimizer_cls_and_kwargs": (torch.optim.SGD, {})},
         "no optimizer may be given with objective 'so', which brings its own"),
        ({"objective": "dpo", "forget_dataset": [{"input_ids": torch.ones(3), "labels": 1}]},
         r"forget records must have alternative_labels for this objective, got \['input_ids', 'labels'\]"),
        ({"objective": "idk", "model": tiny_model("gpt2")}, "forget records must have alternative_input_ids beside"),
        ({"objective": "match"}, "unseen_dataset must be given for objective 'match', got None"),
        ({"objective": "match", "unseen_dataset": []}, "unseen_dataset must hold at least one record"),
        ({"unseen_dataset": records("text", 3, 3)}, "unseen_dataset must be None for objective 'gd', got one"),
        ({"forget_dataset": []}, "forget_dataset must hold at least one record"),
        ({"retain_dataset": []}, "retain_dataset must hold at least one record"),
        ({"objective": "ga", "retain_dataset": []}, "retain_dataset must hold at least one record"),
        ({"forget_dataset": None}, "forget_dataset must be given for objective 'gd', got None"),
        ({"retain_dataset": None}, "retain_dataset must be given for objective 'gd', got None"),
        ({"forget_dataset": iter(())}, "forget_dataset must be a map-style data set"),
        ({"forget_dataset": records("text", 5, 1), "retain_dataset": records("text", 3, 2, prefix="1")},
         r"must not overlap, got 3 ids in both: \['1-0', '1-1', '1-2'\]"),
        ({"alpha": -1.0}, "alpha must be finite and >= 0, got -1.0"),
        ({"beta": 0.0}, "beta must be finite and > 0, got 0.0"),
        ({"gamma": float("nan")}, "gamma must be finite and > 0, got nan"),
        ({"objective": "ssd", "prefix_cache": "cache"}, "prefix_cache must be None for 'ssd', which takes no steps"),
        ({"masks": some_masks(tiny_model("gpt2"))}, "masks must fit the model"),
        ({"compute_loss_func": print}, "compute_loss_func must be None"),
        ({"masks": some_masks(tiny_model("bert")), "optimizers": (1, None)}, "optimizers must hold no optimizer"),
        ({"model": tiny_model("bert", "base")}, "model must have a task head"),
    ],
)  # fmt: skip
def test_bad_input_is_a_one_line_error(options, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        build(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor must be 0"):
        build(tmp_path, args=arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(ValueError, match="dropout must be True with gradient checkpointing"):
        build(tmp_path, args=arguments(tmp_path, gradient_checkpointing=True), dropout=False)
    for options in ({"use_reentrant": True}, {"preserve_rng_state": True}):  # torch's default is reentrant
        args = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)
        model = tiny_model("bert")
        with pytest.raises(ValueError, match="activation_checkpointing_kwargs must have use_reentrant=False with mask"):
            build(tmp_path, model=model, args=args, masks=some_masks(model))
        with pytest.raises(ValueError, match="must have use_reentrant=False with objective 'so'"):
            build(tmp_path, args=args, objective="so")
        build(tmp_path, args=args)
    rows = records("text", 3, 1)
    rows[1]["labels"] = torch.tensor(LABELS)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 3 for id '1-1'"):
        build(tmp_path, forget_dataset=rows, data_collator=collate, objective="ga").train()


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_peft_model_is_refused_until_it_is_merged(wrapped, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query"])
    model: Any = tiny_model("bert")
    if wrapped:
        model = peft.get_peft_model(model, config)
    else:
        model.add_adapter(config)
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="model must be plain, got a PEFT model, whose checkpoints") as caught:
        build(tmp_path, model=model)
    assert "\n" not in str(caught.value)
    assert [p.requires_grad for p in model.parameters()] == flags
    if wrapped:
        build(tmp_path, model=model.merge_and_unload().requires_grad_(True))  # PEFT leaves it frozen


def test_a_failed_construction_leaves_the_model_plain(tmp_path):
    model = tiny_model("bert")
    with pytest.raises(TypeError):
        build(tmp_path, model=model, masks=some_masks(model), no_such_option=1)
    assert all(p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_training_after_merging_is_refused(tmp_path):
    trainer = make("bert", tmp_path)
    trainer.merge()
    with pytest.raises(ValueError, match="must not be merged"):
        trainer.train()


def test_nothing_is_reported_or_written_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = build(tmp_path, args=None, objective="ga", data_collator=collate)
    assert json.dumps(trainer.args.to_dict()["report_to"]) in ("[]", '"none"')
    assert trainer.args.optim == "adamw_torch_fused"


def test_records_of_any_length_need_no_collator(tmp_path: Path) -> None:
    sets = [
        [{"id": f"{name}{n}", "input_ids": list(range(1, 4 + n)), "labels": n % 2} for n in range(4)] for name in "fr"
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, save_strategy="no", report_to=[]
    )
    trainer = UnlearnTrainer(
        tiny_model("bert"), arguments, forget_dataset=sets[0], retain_dataset=sets[1], objective="gd"
    )
    assert trainer.train().global_step == 2


def test_checkpoints_have_the_tokenizer_of_the_collator(tmp_path: Path) -> None:
    vocabulary = Tokenizer(WordLevel({f"w{row}": row for row in range(50)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w0")
    collator = DataCollatorForTokenClassification(tokenizer)
    trainer = make("gpt2", tmp_path, data_collator=collator)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["gd", "kl", "npo"])
def test_padding_on_the_left_changes_nothing(name: str, tmp_path: Path) -> None:
    def left(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        turned = [{field: value.flip(0) for field, value in row.items()} for row in rows]
        return {field: value.flip(1) for field, value in collate(turned).items()}

    args = arguments(tmp_path, optim="sgd")  # Adam would blow up the rounding of gradients that are 0, of key biases
    found, expected = (
        make("gpt2", tmp_path, objective=name, data_collator=collator, dropout=False, args=args)
        for collator in (left, collate)
    )
    assert len({len(row["input_ids"]) for row in records("language", 5, 1)}) > 1
    for trainer in (found, expected):
        trainer.train()
    for got, want in zip(found.merge().parameters(), expected.merge().parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
