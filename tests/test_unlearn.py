"""`pymape unlearn` on a small model and data set of files, and every bad input it must refuse."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_zoo import tiny_model
from safetensors.torch import load_file
from session_tools import upper_masks, write_files
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainingArguments

from pymape.cli import main
from pymape.commands import unlearn as unlearn_command
from pymape.commands.steps import fine_tune
from pymape.config import TrainConfig
from pymape.data.batching import PaddingCollator
from pymape.masks import ModuleMasks
from pymape.prefix_cache import PrefixCache

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models, tokenizers, records and ids."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("files")
    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    for name, family, task in (
        ("classifier", "bert", "sequence_classification"),
        ("encoder", "bert", "base"),
        ("language-model", "gpt2", "causal_lm"),
    ):
        tiny_model(family, task, max_position_embeddings=128).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    draw = random.Random(0)
    for name, count in (("train", 24), ("test", 10)):
        rows = [(f"{name}-{row}", " ".join(draw.choices(WORDS, k=draw.randint(3, 8))), row % 3) for row in range(count)]
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([("id", "text", "label"), *rows])
    (folder / "forget.txt").write_text("train-1\ntrain-5\ntrain-9\n")
    return folder


def _config(files: Path, output: Path, **changes: Any) -> list[str]:
    config: dict[str, Any] = {
        "model": str(files / "classifier"),
        "output": str(output),
        "lr": 1e-2,
        "epochs": 1,
        "batch_size": 4,
        "masks": {"budget": 0.5},
        "data": {
            "path": str(files / "train.csv"),
            "forget": str(files / "forget.txt"),
            "test": str(files / "test.csv"),
        },
    }
    for name, value in changes.items():
        section, _, option = name.partition("__")
        if option:
            config.setdefault(section, {})[option] = value
        else:
            config[name] = value
    path = output.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return ["unlearn", str(path)]


def _run(arguments: list[str], output: Path) -> dict[str, Any]:
    assert main(arguments) == 0
    return json.loads((output / "summary.json").read_text())


def test_main_job_changes_the_selected_modules_only(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs" / "one"
    output.parent.mkdir()
    summary = _run([*_config(files, output), "--objective", "ga"], output)
    assert {path.name for path in output.iterdir()} == {"model", "masks.safetensors", "report.html", "summary.json"}
    assert summary["config"]["objective"] == "ga"  # a flag after the file overrides it
    assert summary["records"] == {"forget": 3, "retain": 21, "test": 10}
    assert {"UA", "RA", "TA", "MIA", "forget_loss"} <= summary["models"]["unlearned"].keys()
    assert summary["models"]["unlearned"]["forget_loss"] > summary["models"]["original"]["forget_loss"]
    assert summary["masks"]["cost"] <= 0.5
    assert {"importance", "search", "unlearn"} <= summary["seconds"].keys()
    assert 10 < summary["peak_memory_mib"] < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20
    assert "forget loss" in capsys.readouterr().out

    masks = ModuleMasks.load(
        output / "masks.safetensors", AutoModelForSequenceClassification.from_pretrained(output / "model")
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (files / "classifier", output / "model"))
    assert before.keys() == after.keys()
    filters = "bert.encoder.layer.{}.intermediate.dense.weight"
    for layer, chosen in enumerate(masks.filters):
        name = filters.format(layer)
        changed = (before[name] != after[name]).any(1)
        assert torch.equal(changed, chosen)
    for name in before:
        if ".layer." not in name:
            assert torch.equal(before[name], after[name]), name


def test_same_seed_gives_the_same_model(files: Path, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("one", "two")]
    for output in outputs:
        _run(_config(files, output, objective="npo"), output)
    first, second = (load_file(output / "model" / "model.safetensors") for output in outputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_encoder_is_fine_tuned_first_and_compared_with_retraining(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train = {"epochs": 1, "lr": 1e-3, "batch_size": 8}
    options = {"train_first": True, "compare_retrain": True, "train": train, "masks__objective": "everything"}
    summary = _run(_config(files, output, model=str(files / "encoder"), **options), output)
    models = summary["models"]
    assert models["retrained"]["gap"] == 0
    assert models["unlearned"]["gap"] >= 0
    assert summary["masks"] is None
    assert not (output / "masks.safetensors").exists()
    saved = AutoModelForSequenceClassification.from_pretrained(output / "model")
    assert saved.config.num_labels == 3


def test_a_language_model_forgets_texts(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = {"model": str(files / "language-model"), "objective": "gd", "lr": 1e-2, "epochs": 2}
    summary = _run(_config(files, output, **options), output)
    assert summary["task"] == "causal language model"
    models = summary["models"]
    assert models["unlearned"]["forget_loss"] > models["original"]["forget_loss"]
    AutoModelForCausalLM.from_pretrained(output / "model")


@pytest.mark.parametrize("objective", ["kl", "ft", "rl", "influence", "match"])
def test_every_objective_changes_the_model(files: Path, tmp_path: Path, objective: str) -> None:
    output = tmp_path / "run"
    unseen = {"data__unseen": str(files / "test.csv")} if objective == "match" else {}
    _run(_config(files, output, objective=objective, **unseen), output)
    before, after = (load_file(folder / "model.safetensors") for folder in (files / "classifier", output / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_masks_of_an_earlier_run_are_used_again(files: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    _run(_config(files, first), first)
    summary = _run(_config(files, second, masks__file=str(first / "masks.safetensors")), second)
    assert "importance" not in summary["seconds"]
    masks = [ModuleMasks.load(folder / "masks.safetensors") for folder in (first, second)]
    assert torch.equal(masks[0].filters, masks[1].filters)


def test_a_prefix_cache_changes_no_weight_and_keeps_nothing_of_the_forget_records(files: Path, tmp_path: Path) -> None:
    masks, folder = tmp_path / "masks.safetensors", tmp_path / "cache"
    upper_masks().save(masks)
    outputs = [tmp_path / name for name in ("without", "with", "again")]
    for output in outputs:
        changes = {} if output.name == "without" else {"prefix_cache": str(folder)}
        _run(_config(files, output, masks__file=str(masks), epochs=2, **changes), output)
    before, plain, *cached = (
        load_file(model / "model.safetensors") for model in (files / "classifier", *(out / "model" for out in outputs))
    )
    assert any(not torch.equal(plain[name], before[name]) for name in plain)
    for found in cached:
        for name, value in plain.items():
            if not name.endswith("key.bias"):  # it has no gradient but rounding, which AdamW scales up
                torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    cache = PrefixCache(folder)
    assert cache.erase(["train-1", "train-5", "train-9"]) == 0
    assert cache.erase(f"train-{row}" for row in range(24)) == 21


def test_unlearning_ends_once_the_records_are_forgotten(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    changes = {"objective": "ga", "epochs": 60, "lr": 1e-3}
    stop = {"stop_when_forgotten": True, "data__unseen": str(files / "test.csv")}
    summary = _run(_config(files, output, **changes, **stop), output)
    assert re.fullmatch(
        r"forget loss [\d.]+ reached the loss on unseen data, [\d.]+, at step [1-5]0", summary["stopped"]
    )
    assert summary["stopped"] in capsys.readouterr().out
    whole = _run(_config(files, tmp_path / "whole", **changes), tmp_path / "whole")
    assert whole["stopped"] is None
    losses = [run["models"]["unlearned"]["forget_loss"] for run in (summary, whole)]
    assert losses[0] < losses[1]


def test_records_of_one_length_share_a_batch(tmp_path: Path) -> None:
    records = [{"input_ids": [5] * (3 if row % 2 else 30), "labels": row % 3} for row in range(160)]
    tokens = {}
    for grouped in (False, True):
        tokens[grouped] = 0

        def collate(rows: list[dict[str, Any]], grouped: bool = grouped) -> dict[str, torch.Tensor]:
            batch = PaddingCollator(0)(rows)
            tokens[grouped] += batch["input_ids"].numel()
            return batch

        train = TrainConfig(lr=1e-3, epochs=1, batch_size=4, group_by_length=grouped)
        fine_tune(tiny_model("bert"), records, train, 0, collate, str(tmp_path))
    assert tokens[True] < 0.75 * tokens[False]


def test_without_a_test_set_there_is_no_attack(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    row = _run(_config(files, output, data__test=None), output)["models"]["unlearned"]
    assert {"UA", "RA"} <= row.keys()
    assert not {"TA", "MIA"} & row.keys()


def _refused(arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with one line and leave nothing; returns that line."""
    before = {path.name for path in output.parent.iterdir()}
    capsys.readouterr()
    assert main(arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("pymape: error: ")
    assert {path.name for path in output.parent.iterdir()} == before
    return lines[0]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ("train-1\nnobody\n", "data.forget|forget must name ids of the data, got 'nobody' not among 24 records"),
        ("train-1\ntrain-1\n", "must not repeat an id, got 'train-1' more than once"),
        ("\n", "data.forget must name at least one id, got none"),
        ("\n".join(f"train-{row}" for row in range(24)), "retain must keep at least one record"),
    ],
)
def test_bad_forget_ids(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ids: str, message: str
) -> None:
    (tmp_path / "ids.txt").write_text(ids)
    output = tmp_path / "run"
    line = _refused(_config(files, output, data__forget=str(tmp_path / "ids.txt")), output, capsys)
    assert any(part in line for part in message.split("|"))


@pytest.mark.parametrize(
    ("retain", "message"),
    [
        ("train-0\ntrain-5\n", "forget and retain must not overlap, got 'train-5' in both"),
        ("", "data.retain must name at least one id, got none"),
    ],
)
def test_bad_retain_ids(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], retain: str, message: str
) -> None:
    (tmp_path / "retain.txt").write_text(retain)
    output = tmp_path / "run"
    arguments = _config(files, output, data__retain=str(tmp_path / "retain.txt"))
    assert message in _refused(arguments, output, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"masks__budget": 0}, "masks.budget must be in (0, 1], got 0"),
        ({"masks__budget": 1.5}, "masks.budget must be in (0, 1], got 1.5"),
        ({"masks__budget": float("nan")}, "masks.budget must be in (0, 1], got nan"),
        ({"lr": -1.0}, "lr must be positive and finite, got -1.0"),
        ({"lr": 1e30, "objective": "ga", "epochs": 3}, "must stay finite, got "),
        ({"compare_retrain": True}, "compare_retrain must come with train_first: true"),
        ({"data__label_column": "text"}, "text of data.path must be in [0, 3), got 'w"),
        (
            {"data__text_column": "sentence"},
            "data.text_column must be one of ['id', 'label', 'text'] in data.path, got",
        ),
        ({"model": "nowhere"}, "model must be a Hugging Face model folder with a config.json, got 'nowhere'"),
        ({"masks__file": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"prefix_cache": "cache"}, "prefix_cache needs masks that leave layer 0 alone, got lowest layer 0"),
        (
            {"prefix_cache": "cache", "objective": "ssd"},
            "prefix_cache must be left out with 'ssd', which takes no steps",
        ),
        ({"stop_when_forgotten": True, "objective": "influence"}, "stop_when_forgotten must be left out with"),
        (
            {"stop_when_forgotten": True},
            "data.unseen must be a file of records the model has never seen, for stop_when",
        ),
        (
            {"objective": "match"},
            "data.unseen must be a file of records the model has never seen, for objective 'match'",
        ),
        ({"data__unseen": "x.csv"}, "data.unseen must be left out with objective 'gd', which reads none of it, got"),
        ({"stop_when_forgotten": True, "data__unseen": "nowhere.csv"}, "nowhere.csv"),
        ({"objective": "nothing"}, "objective"),
        ({"masks__bugdet": 0.1}, "bugdet"),
        ({"data__max_length": 129}, "data.max_length must be at most 128 for this model, got 129"),
    ],
)
def test_bad_options(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    output = tmp_path / "run"
    assert message in _refused(_config(files, output, **changes), output, capsys)


def test_training_records_are_no_unseen_ones(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, unseen = tmp_path / "run", tmp_path / "unseen.csv"
    header, *rows = (files / "train.csv").read_text().splitlines()
    config = _config(files, output, objective="match", data__unseen=str(unseen))
    unseen.write_text("\n".join([header, *rows[5:9]]))
    message = "data.unseen must hold records of its own, got 4 that are all in data.path too"
    assert message in _refused(config, output, capsys)
    # Texts that stand in both are no reason to refuse all.
    unseen.write_text("\n".join([header, *rows[5:9], "new,w1 w2 w3 w4 w5 w6 w7 w8 w9,1"]))
    _run(config, output)


def test_an_encoder_without_a_head_is_explained(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    line = _refused(_config(files, output, model=str(files / "encoder")), output, capsys)
    assert "must have a sequence-classification or causal-LM head, got BertModel" in line
    assert "train_first: true" in line


def test_labels_out_of_range(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (files / "train.csv").read_text().replace(",2", ",7")
    (tmp_path / "train.csv").write_text(text)
    output = tmp_path / "run"
    line = _refused(_config(files, output, data__path=str(tmp_path / "train.csv")), output, capsys)
    assert "label of data.path must be in [0, 3), got '7' in data row 3" in line


@pytest.mark.parametrize(
    ("option", "name", "row", "message"),
    [
        ("path", "train", ",1,w1 w2", "text of data.path must have at least 2 tokens for this model, got 0"),
        ("path", "train", "w1,1,w1 w2", "text of data.path must have at least 2 tokens for this model, got 1"),
        ("path", "train", "w1 w2,1,w1", "other of data.path must have at least 2 tokens for this model, got 1"),
        ("test", "test", " ,1,", "text of data.test must have at least 2 tokens for this model, got 0"),
    ],
)
def test_texts_without_anything_to_predict(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, name: str, row: str, message: str
) -> None:
    header, *lines = (files / f"{name}.csv").read_text().splitlines()
    lines = [f"{line}," for line in lines]  # an alternative may be missing
    lines[5] = f"{name}-5,{row}"
    (tmp_path / "texts.csv").write_text("\n".join([f"{header},other", *lines]))
    output = tmp_path / "run"
    changes = {f"data__{option}": str(tmp_path / "texts.csv")}
    if option == "path":
        changes["data__alternative_column"] = "other"
    line = _refused(_config(files, output, model=str(files / "language-model"), **changes), output, capsys)
    assert f"{message} with id '{name}-5'" in line


def _words(folder: Path, model: Path, output: Path) -> list[str]:
    (folder / "ids.txt").write_text("r1\nr5\n")
    data = ["--data.path", folder / "train.csv", "--data.forget", folder / "ids.txt"]
    return [str(word) for word in ("--model", model, *data, "--output", output)]


def test_an_empty_text_of_a_classifier_whose_tokenizer_adds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path)
    lines = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([*lines[:4], "r3,,0", *lines[5:]]))
    assert main(["unlearn", *_words(tmp_path, tmp_path / "model", tmp_path / "run")]) == 2
    message = "text of data.path must have at least 1 token for this model, got 0 with id 'r3'"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_model_folder_without_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    """transformers would make one that knows no word."""
    write_files(tmp_path, family)
    bare = tmp_path / "bare"
    tiny_model(family, max_position_embeddings=128).save_pretrained(bare)
    for command in ("unlearn", "evaluate"):
        assert main([command, *_words(tmp_path, bare, tmp_path / "run")]) == 2
        message = f"model must be a folder with its tokenizer, got '{bare}' without vocab"
        assert message in capsys.readouterr().err


def test_a_run_whose_model_is_read_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_files(tmp_path)
    run = tmp_path / "run"
    assert main(["unlearn", *_words(tmp_path, tmp_path / "model", run), "--epochs", "1"]) == 0
    before = sorted(run.rglob("*"))
    for command, message in (
        ("evaluate", "a run of another kind, unlearn"),
        ("unlearn", "output must not hold what the run reads"),
    ):
        assert main([command, *_words(tmp_path, run / "model", run)]) == 2
        assert message in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_a_new_head_needs_two_names(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [line.rpartition(",")[0] + ",sports" for line in (files / "train.csv").read_text().splitlines()[1:]]
    (tmp_path / "train.csv").write_text("\n".join(["id,text,label", *rows]))
    output = tmp_path / "run"
    options = {"model": str(files / "encoder"), "train_first": True, "data__path": str(tmp_path / "train.csv")}
    line = _refused(_config(files, output, **options), output, capsys)
    assert "label of data.path must hold at least two names of classes with train_first, got 'sports' only" in line
    rows[2] = rows[2].removesuffix("sports")
    (tmp_path / "train.csv").write_text("\n".join(["id,text,label", *rows]))
    line = _refused(_config(files, output, **options), output, capsys)
    assert "label of data.path must not be empty, got an empty label in data row 3" in line


def test_masks_of_another_model_and_cut_off_masks(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, output = tmp_path / "first", tmp_path / "run"
    _run(_config(files, first), first)
    masks = first / "masks.safetensors"
    language_model = str(files / "language-model")
    line = _refused(_config(files, output, model=language_model, masks__file=str(masks)), output, capsys)
    assert "masks must fit the model, got masks of bert" in line
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(masks.read_bytes()[:-5])
    assert "cut.safetensors" in _refused(_config(files, output, masks__file=str(cut)), output, capsys)


def test_an_output_folder_that_cannot_be_written_is_found_before_any_work(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    arguments = [*_config(files, tmp_path / "run", model="nowhere"), "--output", str(tmp_path / "file" / "run")]
    assert "output must be a writable folder" in _refused(arguments, tmp_path / "run", capsys)


def test_a_failed_run_leaves_the_earlier_one(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    _run(_config(files, output), output)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    _refused(_config(files, output, lr=1e30, objective="ga", epochs=3), output, capsys)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    shutil.rmtree(output)


def test_a_checkpoint_in_half_precision_is_trained_in_full(files: Path, tmp_path: Path) -> None:
    """The same steps as from fp32, rounded once at the end; in bfloat16 alone, small ones would be lost one by one."""
    found = {}
    model = AutoModelForSequenceClassification.from_pretrained(files / "classifier", dtype=torch.bfloat16)
    upper_masks().save(tmp_path / "masks.safetensors")
    for dtype in (torch.bfloat16, torch.float32):
        folder, output = tmp_path / str(dtype), tmp_path / f"run-{dtype}"
        shutil.copytree(files / "classifier", folder)
        model.to(dtype).save_pretrained(folder)
        changes = {"model": str(folder), "lr": 1e-4, "masks__file": str(tmp_path / "masks.safetensors")}
        _run(_config(files, output, **changes), output)
        found[dtype] = load_file(output / "model" / "model.safetensors")
    before = load_file(tmp_path / "torch.bfloat16" / "model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 for tensor in found[torch.bfloat16].values())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in found[torch.bfloat16].items())
    for name, tensor in found[torch.float32].items():
        assert torch.equal(tensor.to(torch.bfloat16), found[torch.bfloat16][name]), name


def test_what_cannot_work_is_refused_before_anything_is_trained(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unlearn_command, "fine_tune", lambda *_: pytest.fail("nothing must be trained"))
    monkeypatch.setattr(unlearn_command, "judge", lambda *_: pytest.fail("nothing must be judged"))
    output = tmp_path / "run"
    for changes, message in (
        ({"objective": "rmu"}, "objective_options must have 'layer'"),
        ({"objective": "rmu", "objective_options": {"layer": 7}}, "objective_options.layer must be in [0, 2), got 7"),
        ({"objective": "npo", "objective_options": {"x": 1}}, "objective_options must be empty"),
        (
            {"objective": "rmu", "objective_options": {"layer": "one"}},
            "objective_options.layer must be an integer",
        ),
        ({"prefix_cache": "cache", "masks__objective": "everything"}, "prefix_cache must come with masks that leave"),
        ({"objective": "ga", "retain": "kl"}, "retain must be 'nll' for objective 'ga'"),
        ({"objective": "dpo"}, "must have an answer for every forgotten record with objective 'dpo', got none with"),
    ):
        assert message in _refused(_config(files, output, train_first=True, **changes), output, capsys)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    assert "one process must use one GPU" in _refused(_config(files, output, train_first=True), output, capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "must be run by one process" in _refused(_config(files, output, train_first=True), output, capsys)
