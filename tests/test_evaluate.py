"""`run_evaluate` on small model folders: the summary, the scores it can be computed from again, and bad input."""

from __future__ import annotations

import csv
import dataclasses
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from model_zoo import tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from pymape.commands.evaluate import run_evaluate
from pymape.config import DataConfig, EvaluateConfig, QuestionsConfig, RelearnConfig
from pymape.metrics import AnswerScores, RecordScores, score_metrics, tofu_metrics

WORDS = [f"w{number}" for number in range(40)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models of several seeds, their tokenizer, records, ids and questions."""
    folder = tmp_path_factory.mktemp("files")
    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[BOS]", "[EOS]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]")
    for name, family, task in (("classifier", "bert", "sequence_classification"), ("language", "gpt2", "causal_lm")):
        for seed in range(4):
            tiny_model(family, task, seed=seed, max_position_embeddings=128).save_pretrained(folder / f"{name}-{seed}")
            fast.save_pretrained(folder / f"{name}-{seed}")
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 8)))

    for name, count in (("train", 24), ("test", 10)):
        with (folder / f"{name}.csv").open("w", newline="") as stream:
            rows = [(f"{name}-{row}", text(), row % 3) for row in range(count)]
            csv.writer(stream).writerows([("id", "text", "label"), *rows])
    (folder / "forget.txt").write_text("train-1\ntrain-5\ntrain-9\n")
    for name in ("forget", "retain", "real_authors", "world_facts"):
        rows = []
        for _ in range(4):
            rows.append({"question": text(), "answer": text(), "perturbed_answer": [text(), text()]})
            if name in ("forget", "retain"):
                rows[-1]["paraphrased_answer"] = text()
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config(files: Path, output: Path, kind: str = "classifier", **changes: Any) -> EvaluateConfig:
    data = DataConfig(str(files / "train.csv"), forget=str(files / "forget.txt"), test=str(files / "test.csv"))
    return EvaluateConfig(**({"model": str(files / f"{kind}-0"), "data": data, "output": str(output)} | changes))


def test_a_classifier_with_everything(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    folders = {name: str(files / f"classifier-{seed}") for seed, name in enumerate(("retrained", "original"), start=1)}
    shadows = [str(files / f"classifier-{seed}") for seed in (2, 3)]
    relearn = RelearnConfig(steps=2, lr=1e-3, share=0.5)
    options = {"shadows": shadows, "reference": shadows[0], "relearn": relearn, "gradients": True}
    returned = run_evaluate(config(files, output, **folders, **options))
    summary = json.loads((output / "summary.json").read_text())
    assert summary.keys() == {*returned, "files"}
    assert set(summary["metrics"]) <= summary.keys()
    assert summary["task"] == "classification"
    assert summary["records"] == {"forget": 3, "retain": 21, "test": 10}
    assert {"UA", "MIA", "gap", "privleak", "mia_lira", "mia_gradnorm", "mia_reference"} <= set(summary["metrics"])
    assert {"hidden_cka", "relearning_steps", "wall_seconds", "peak_cpu_mib"} <= set(summary["metrics"])
    assert summary["config"]["relearn"]["steps"] == 2
    assert summary["relearning"]["steps"] == [0, 1, 2]
    assert summary["relearning"]["records"] == 2
    assert summary["models"].keys() == {"retrained", "original"}
    assert summary["relearning"]["target"] == pytest.approx(100 - summary["models"]["original"]["UA"] - 5)
    assert "mia_lira" in capsys.readouterr().out

    names = ("model", "retrained", "original", "reference", "shadow-0", "shadow-1")
    stored = {
        name: {path.stem: RecordScores.load(path) for path in sorted((output / "scores" / name).iterdir())}
        for name in names
    }
    assert stored["shadow-1"].keys() == {"forget", "test"}
    assert stored["model"]["forget"].ids == ["train-1", "train-5", "train-9"]
    found = score_metrics(
        stored["model"],
        retrained=stored["retrained"],
        reference=stored["reference"],
        shadows=[stored["shadow-0"], stored["shadow-1"]],
    )
    assert {name: summary[name] for name in found} == pytest.approx(found)
    assert summary["models"]["retrained"] == pytest.approx(score_metrics(stored["retrained"]))
    assert (output / "distances-forget.safetensors").exists()


def test_a_language_model_with_questions(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    paths = {name: str(files / f"{name}.jsonl") for name in ("forget", "retain", "real_authors", "world_facts")}
    questions = QuestionsConfig(template="{question} w0 {answer}", max_new_tokens=6, **paths)
    summary = run_evaluate(
        config(files, output, "language", retrained=str(files / "language-1"), questions=questions, k=0.2)
    )
    assert summary["task"] == "causal language model"
    expected = {"mia_zlib", "mia_min_k", "mia_min_k_plus_plus", "forget_quality", "model_utility"}
    assert expected <= set(summary["metrics"])
    assert "forget_quality" not in summary["models"]["retrained"]
    own, gold = (output / "scores" / name for name in ("model", "retrained"))
    sets = {name: AnswerScores.load(own / f"questions-{name}") for name in ("forget", "retain", "ra", "wf")}
    found = tofu_metrics(sets, retrained=AnswerScores.load(gold / "questions-forget"), end_token=2)
    assert {name: summary[name] for name in found} == pytest.approx(found)
    scores = {name: RecordScores.load(own / f"{name}.safetensors") for name in ("forget", "retain", "test")}
    assert score_metrics(scores, end_token=2, k=0.2)["mia_min_k"] == summary["mia_min_k"]
    assert scores["test"].text_bytes is not None
    assert (scores["test"].text_bytes > 0).all()


def test_an_earlier_run_is_replaced_and_a_failed_one_leaves_it(files: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = run_evaluate(config(files, output))
    assert not {"gap", "privleak", "mia_lira", "relearning_steps"} & first.keys()
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="questions need a causal language model, got BertFor"):
        run_evaluate(config(files, output, questions=QuestionsConfig(forget=str(files / "forget.jsonl"))))
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    again = run_evaluate(config(files, output))
    assert {name: again[name] for name in ("UA", "MIA", "mia_loss")} == {n: first[n] for n in ("UA", "MIA", "mia_loss")}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_retrained_model_must_order_its_classes_as_the_model_does(files: Path, tmp_path: Path) -> None:
    other = shutil.copytree(files / "classifier-1", tmp_path / "other")
    facts = json.loads((other / "config.json").read_text())
    facts["label2id"] = {"LABEL_1": 0, "LABEL_0": 1, "LABEL_2": 2}
    facts["id2label"] = {index: name for name, index in facts["label2id"].items()}
    (other / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="retrained must order its classes as model does, got 'LABEL_0' as class 1"):
        run_evaluate(config(files, tmp_path / "run", retrained=other))
    run_evaluate(config(files, tmp_path / "run", reference=other))  # a path; its classes are compared by name
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["config"]["reference"] == str(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0.0}, r"k must be in \(0, 1\], got 0.0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"shadows": ["one"]}, "shadows must be none, or two or more, got 1"),
        ({"relearn": RelearnConfig(steps=3)}, "relearn.steps must come with original"),
        ({"relearn": RelearnConfig(share=2.0)}, r"relearn.share must be in \(0, 1\], got 2.0"),
        ({"questions": QuestionsConfig(max_new_tokens=-1)}, "questions.max_new_tokens must be not negative, got -1"),
        ({"questions": QuestionsConfig(forget="gone.jsonl")}, "questions.forget must be an existing file"),
        ({"retrained": "nowhere"}, "model must be a Hugging Face model folder with a config.json, got 'nowhere'"),
    ],
)
def test_bad_options(files: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_evaluate(config(files, tmp_path / "run", **changes))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ({"forget": None}, {}, "data.forget must be a file of the ids"),
        ({"test": None}, {"reference": "classifier-1"}, "reference must come with data.test"),
        ({"max_length": 1}, {}, "data.max_length must be at least 2, got 1"),
        ({"unseen": "x.csv"}, {}, r"data\.unseen must be left out of evaluate, which reads none of it, got 'x\.csv'"),
        ({"importance_samples": 5}, {}, r"data\.importance_samples must be left out of evaluate"),
        ({"text_column": "texts"}, {}, "data.text_column must be one of"),
    ],
)
def test_bad_data(files: Path, tmp_path: Path, data: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    options = config(files, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match=message):
        run_evaluate(dataclasses.replace(options, data=dataclasses.replace(options.data, **data)))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["retrained", "reference"])
def test_models_of_another_task_are_refused_by_their_option(files: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a model for classification, as model is, got one for causal"):
        run_evaluate(config(files, tmp_path / "run", **{name: str(files / "language-1")}))
    assert not any(tmp_path.iterdir())
