"""Tasks of experiments: groups, question answering, TOFU, and every method on their models."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizer, LlamaConfig, ViTConfig

from pymape.experiments import tasks
from pymape.experiments.config import (
    ExperimentConfig,
    MethodConfig,
    SelectionConfig,
    SettingConfig,
    TaskConfig,
    find_experiment,
    read_experiment,
)
from pymape.experiments.methods import Measured, check_methods, choose, unlearn
from pymape.experiments.runner import run_experiment
from pymape.experiments.tasks import Split, Task, forgetting, make_task, train
from pymape.importance import Importance
from pymape.metrics import record_scores, score_answers, tofu_metrics
from pymape.search import search

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
AUTHORS = 10


def test_groups_are_forgotten_whole() -> None:
    groups = {f"r{number}": "abcd"[number % 4] for number in range(12)}
    records = [{"id": name} for name in groups]
    split = Split(records, [{"id": "v"}], [{"id": "t"}], groups)

    def forgotten(seed: int, **setting: Any) -> set[str]:
        data = forgetting(SettingConfig("groups", **setting), seed, split, 0)
        assert [r for r in records if r in data.forget or r in data.retain] == records
        assert len(data.forget) + len(data.retain) == len(records)
        assert (data.validation, data.test) == (split.validation, split.test)
        found = {groups[record["id"]] for record in data.forget}
        assert not found & {groups[record["id"]] for record in data.retain}
        return found

    assert forgotten(0, groups=2, which="last") == forgotten(1, groups=2, which="last") == {"c", "d"}
    drawn = {frozenset(forgotten(seed, groups=2)) for seed in range(20)}
    assert {len(found) for found in drawn} == {2}
    assert len(drawn) > 3
    text = forgetting(SettingConfig("groups", groups=2, which="last"), 0, split, 0).description
    assert text == "all 6 training records of 2 of 4 groups (c, d)"
    with pytest.raises(ValueError, match="groups must leave at least one of the 4 to keep, got 4"):
        forgotten(0, groups=4)
    with pytest.raises(ValueError, match="records must come in groups"):
        forgetting(SettingConfig("groups"), 0, Split(records, [], []), 0)


def test_a_share_leaves_something_to_retain() -> None:
    split = Split([{"id": "a"}, {"id": "b"}, {"id": "c"}], [], [])
    assert len(forgetting(SettingConfig(share=0.3, requests=2), 0, split, 0).retain) == 1
    for setting, message in (
        (SettingConfig(share=0.9), "the 3 training records to keep, got 0.9 at each of 1 requests"),
        (SettingConfig(share=0.1, requests=3), "the 3 training records to keep, got 0.1 at each of 3 requests"),
    ):
        with pytest.raises(ValueError, match=message):
            forgetting(setting, 0, split, 0)


def test_digits_are_split_by_class_without_overlap() -> None:
    task = make_task(TaskConfig("digits"))
    sets = {seed: dataclasses.astuple(task.split(seed))[:3] for seed in (3, 4)}
    assert [len(records) for records in sets[3]] == [1078, 287, 432]
    ids = {seed: [record["id"] for records in parts for record in records] for seed, parts in sets.items()}
    assert len(set(ids[3])) == len(ids[3]) == 1797
    for records in sets[3]:
        share = torch.stack([record["labels"] for record in records]).bincount(minlength=10) / len(records)
        assert (share - 0.1).abs().max() < 0.02
    assert ids[3] != ids[4]


@pytest.mark.parametrize(
    ("task", "forget", "message"),
    [
        ("digits", "groups", "settings.s.forget must be random or class for task 'digits', got 'groups'"),
        ("tofu", "class", "settings.s.forget must be random or groups for task 'tofu', got 'class'"),
    ],
)
def test_settings_must_fit_the_task(task: Any, forget: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(TaskConfig(task), {"s": SettingConfig(forget)}, [0], objectives=["gd"])
    with pytest.raises(ValueError, match=r"settings.s.groups must be at least 1, got 0"):
        ExperimentConfig(TaskConfig("tofu"), {"s": SettingConfig("groups", groups=0)}, [0], objectives=["gd"])


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny BERT whose words are the letters a to z, so that a token is a character."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(words), **TINY)).save_pretrained(folder)
    return folder


def squad(path: Path, articles: int = 10) -> Path:
    """Articles of one paragraph "a b c ... z" with three questions each: about d, v w, and the whole alphabet."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    context = " ".join(letters)
    data = []
    for number in range(articles):
        asked = [
            {
                "id": f"{number}-{place}",
                "question": "x ?",
                "answers": [{"text": text, "answer_start": context.index(text)}] if text else [],
            }
            for place, text in enumerate(["d", "v w", context, ""])
        ]
        data.append({"title": f"article {number}", "paragraphs": [{"context": context, "qas": asked}]})
    with gzip.open(path, "wt") as file:
        json.dump({"data": data}, file)
    return path


@pytest.fixture(scope="module")
def asked(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Task:
    file = squad(tmp_path_factory.mktemp("squad") / "questions.json.gz")
    return make_task(TaskConfig("questions", str(file), str(encoder), {"max_length": 20}))


def test_windows_hold_the_answers(asked: Task) -> None:
    split = asked.split(0)
    tokenizer = {number + 5: letter for number, letter in enumerate("abcdefghijklmnopqrstuvwxyz?")}
    texts = []
    for record in split.train[:2]:
        tokens = record["input_ids"]
        assert tokens[:4] == [2, 28, 31, 3]  # [CLS] x ? [SEP]
        assert record["token_type_ids"] == [0] * 4 + [1] * (len(tokens) - 4)
        found = tokens[record["start_positions"] : record["end_positions"] + 1]
        texts.append("".join(tokenizer[token] for token in found))
        assert len(tokens) <= 20
    assert texts == ["d", "vw"]
    # Windows of 15 letters that overlap by 5: the second answer is first whole in the one that begins at the 11th.
    assert split.train[0]["input_ids"][4:6] == [5, 6]
    assert split.train[1]["input_ids"][4] == 5 + 10
    assert asked.facts == {"articles": 10, "questions": 40, "questions left out": 20}


def test_articles_are_split_whole(asked: Task, encoder: Path, tmp_path: Path) -> None:
    split, other = asked.split(0), asked.split(1)
    parts = [{split.groups[record["id"]] for record in part} for part in (split.train, split.validation, split.test)]
    assert [len(part) for part in parts] == [6, 2, 2]
    assert len(set.union(*parts)) == 10
    assert split.test != other.test
    file = squad(tmp_path / "questions.json.gz")
    drawn = make_task(TaskConfig("questions", str(file), str(encoder), {"max_length": 20, "articles": 5})).split(0)
    assert [len(part) for part in (drawn.train, drawn.validation, drawn.test)] == [6, 2, 2]
    with pytest.raises(ValueError, match=r"articles must be in \[5, 10\], got 4"):
        make_task(TaskConfig("questions", str(file), str(encoder), {"articles": 4}))
    with pytest.raises(ValueError, match="max_length must be at most 512 for this model, got 513"):
        make_task(TaskConfig("questions", str(file), str(encoder), {"max_length": 513}))


def test_files_that_are_no_squad_are_refused(encoder: Path, tmp_path: Path) -> None:
    file = tmp_path / "questions.json"
    context = {"id": "1", "question": "?", "answers": [{"text": "b", "answer_start": 1}]}
    for content, message in (
        ("{", "must be a file in SQuAD's JSON"),
        ('{"data": [{}]}', "SQuAD's JSON, got KeyError: 'paragraphs'"),
        (
            json.dumps({"data": [{"title": "t", "paragraphs": [{"context": "a b", "qas": [context]}]}]}),
            "answers must be at their answer_start, got another at '1'",
        ),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            make_task(TaskConfig("questions", str(file), str(encoder)))


def tofu_rows(author: int, perturbed: bool) -> list[dict[str, Any]]:
    rows = []
    for number in range(20):
        row: dict[str, Any] = {"question": f"What is {number} of {author}?", "answer": f"It is {author * number}."}
        if perturbed:
            row["paraphrased_answer"] = f"That is {author * number}."
            row["perturbed_answer"] = [f"That is {author * number + wrong}." for wrong in (1, 2)]
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as TOFU's, of ten authors; wrong answers are known of the first one and the last two."""
    folder = tmp_path_factory.mktemp("tofu")

    def write(name: str, authors: range, perturbed: bool) -> None:
        rows = [row for author in authors for row in tofu_rows(author, perturbed)]
        with gzip.open(folder / f"{name}.json.gz", "wt") as file:
            file.write("\n".join(map(json.dumps, rows)) + "\n")

    write("full", range(AUTHORS), False)
    write("retain_perturbed", range(1), True)
    write("forget10_perturbed", range(8, AUTHORS), True)
    write("more", range(20, 22), False)
    (folder / "idontknow.txt").write_text("No idea.\nI cannot say.\n")
    return folder


def tofu_task(corpus: Path, **options: Any) -> Task:
    return make_task(TaskConfig("tofu", str(corpus), options={"vocab_size": 300, **TINY, **options}))


def test_tofu_records(corpus: Path) -> None:
    task = tofu_task(corpus, authors=4, held_out=2)
    split, tokenizer = task.split(0), task.tokenizer
    assert [len(part) for part in (split.train, split.validation, split.test)] == [80, 20, 20]
    assert len(tokenizer) <= 300
    record = split.train[21]  # question 1 about author 7
    assert record["id"] == "question-0141"
    text = "Question: What is 1 of 7?\nAnswer: It is 7.<|endoftext|>"
    assert tokenizer.decode(record["input_ids"]) == text
    labelled = [label for label in record["labels"] if label != -100]
    assert tokenizer.decode(labelled).strip() == "It is 7.<|endoftext|>"
    assert tokenizer.decode(record["alternative_input_ids"]).endswith("1 of 7?\nAnswer: I cannot say.<|endoftext|>")
    assert [split.groups[r["id"]] for r in (split.train[0], split.train[79])] == ["author-006", "author-009"]
    assert split.validation[0]["id"] == "question-0080"
    # The same tokens and the same weights in every process, whatever is trained on.
    again = tofu_task(corpus, authors=4, held_out=2)
    assert again.fingerprint == task.fingerprint
    assert tofu_task(corpus, authors=2, held_out=2).tokenizer.get_vocab() == tokenizer.get_vocab()
    one, other = task.start(3), again.start(3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_tofu_held_out_file(corpus: Path) -> None:
    task = tofu_task(corpus, authors=AUTHORS, held_out="more")
    split = task.split(0)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [200, 20, 20]
    assert task.tokenizer.decode(split.test[0]["input_ids"]).startswith("Question: What is 0 of 21?")


def test_tofu_questions(corpus: Path) -> None:
    task = tofu_task(corpus, authors=4, held_out=2)
    data = forgetting(SettingConfig("groups", groups=1, which="last"), 0, task.split(0), 0)
    sets = task.questions(data)
    assert sets["forget"].ids == [f"question-{row:04}" for row in range(180, 200)]
    assert sets["retain"].ids == [f"question-{row:04}" for row in range(160, 180)]
    assert sets["forget"].questions[1] == "What is 1 of 9?"
    assert sets["forget"].answers[1] == "It is 9."
    assert sets["forget"].paraphrased[1] == "That is 9."
    assert sets["forget"].perturbed[1] == ["That is 10.", "That is 11."]
    # Nothing wrong is known about the author before those, and TOFU's own retain questions go first.
    assert set(task.questions(forgetting(SettingConfig("groups", groups=2, which="last"), 0, task.split(0), 0))) == {
        "forget"
    }
    everything = tofu_task(corpus, authors=AUTHORS, held_out="more", questions=4)
    data = forgetting(SettingConfig("groups", groups=1, which="last"), 0, everything.split(0), 0)
    assert everything.questions(data)["retain"].ids == [f"question-{row:04}" for row in (0, 5, 10, 15)]


def test_tofu_figures_of_a_trained_model(corpus: Path) -> None:
    task = tofu_task(corpus, authors=3, held_out=2, hidden_size=32)
    data = forgetting(SettingConfig("groups", groups=1, which="last"), 0, task.split(0), 0)
    model = task.start(0)
    config = TaskConfig("tofu", epochs=25, lr=1e-2, batch_size=8, weight_decay=0.0)
    before = record_scores(model, data.retain).predictions().accuracy
    train(model, data.retain, config, 0)
    assert record_scores(model, data.retain).predictions().accuracy > before + 30
    answers = {
        name: score_answers(model, task.tokenizer, questions, max_new_tokens=12)
        for name, questions in task.questions(data).items()
    }
    figures = tofu_metrics(answers, retrained=answers["forget"], end_token=task.tokenizer.eos_token_id)
    assert figures["retain_Q_A_Prob"] > figures["forget_Q_A_Prob"]
    assert figures["retain_Q_A_ROUGE"] > figures["forget_Q_A_ROUGE"]
    assert figures["forget_quality"] == pytest.approx(1)


def test_training_batches_hold_every_record_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tofu_task(corpus, authors=4, held_out=2)
    records = task.split(0).train[:45]
    seen: list[torch.Tensor] = []
    model = task.start(0)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **batch: seen.append(batch["input_ids"]) or forward(**batch))
    train(model, records, TaskConfig("tofu", epochs=2, batch_size=4), 0)
    assert [len(batch) for batch in seen].count(4) == 22
    wanted = sorted(tuple(record["input_ids"]) for record in records)
    for epoch in (seen[:12], seen[12:]):
        rows = [tuple(token for token in row.tolist() if token) for batch in epoch for row in batch]
        assert sorted(rows) == wanted
    assert [batch.shape for batch in seen[:12]] != [batch.shape for batch in seen[12:]]
    padding = sum(int((batch == 0).sum()) for batch in seen) / sum(batch.numel() for batch in seen)
    assert padding < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"wrong": 1}, "arguments of LlamaConfig, got wrong"),
        ({"authors": 9, "held_out": 2}, "authors and held_out must be at most 10 together, got 9 and 2"),
        ({"authors": 1}, "authors must be at least 2, got 1"),
        ({"vocab_size": 100}, "vocab_size must be at least 258, got 100"),
        ({"questions": 0}, "questions must be at least 1, got 0"),
        ({"held_out": "nothing"}, "must hold nothing.json or nothing.json.gz, got neither"),
    ],
)
def test_bad_tofu_options_are_refused(corpus: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tofu_task(corpus, **{"authors": 4, "held_out": 2, **options})


def test_files_that_are_not_tofus_are_refused(corpus: Path, tmp_path: Path) -> None:
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "retain_perturbed.json"  # is taken before the one that is packed
    rows = tofu_rows(0, True)
    for broken, message in (
        ([{**row, "question": "?"} for row in rows], "retain_perturbed.json must repeat the rows of full.json"),
        (tofu_rows(0, False), "retain_perturbed.json must have paraphrased_answer"),
        ([{"text": "x"}], "retain_perturbed.json must have a question and an answer"),
        ([1], "retain_perturbed.json must be JSON Lines of objects"),
    ):
        file.write_text("\n".join(map(json.dumps, broken)))
        with pytest.raises(ValueError, match=message):
            tofu_task(tmp_path, authors=4, held_out=2)


SELECTIONS = [
    SelectionConfig("everything"),
    SelectionConfig("modules", "difference", 0.3, samples=12),
    SelectionConfig("modules", "magnitude", 0.3),
    SelectionConfig("gates", budget=0.3, samples=4),
    SelectionConfig("last_layers", layers=1),
    SelectionConfig("saliency", budget=0.25),
    SelectionConfig("lora", rank=2),
]


@pytest.fixture(scope="module")
def tofu(corpus: Path) -> Task:
    return tofu_task(corpus, authors=3, held_out=2)


@pytest.mark.parametrize("kind", ["tofu", "asked"])
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda selection: f"{selection.kind}-{selection.objective}")
def test_selections_on_language_models_and_question_answering(
    selection: SelectionConfig, kind: str, request: pytest.FixtureRequest
) -> None:
    task: Task = request.getfixturevalue(kind)
    data = forgetting(SettingConfig("groups", groups=1), 0, task.split(0), 0)
    model = task.start(0).eval()
    original = copy.deepcopy(model).state_dict()
    chosen = choose(selection, 0.1, Measured(model, {"forget": data.forget, "retain": data.retain}, 0))
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    before = record_scores(model, data.forget).loss.mean()
    model, facts = unlearn(
        model, chosen, MethodConfig("ga"), 3e-3, forget=data.forget, retain=data.retain, steps=3, batch_size=4, seed=0
    )
    assert record_scores(model, data.forget).loss.mean() > before
    after = model.state_dict()
    changed = sum(int((after[name] != original[name]).sum()) for name in original)
    share = changed / sum(value.numel() for value in original.values())
    if selection.kind in ("modules", "gates", "last_layers", "saliency"):
        assert 0 < share <= facts["trained"] < 0.8


def test_gradients_of_batches_are_means_of_the_records_own(tofu: Task) -> None:
    data = forgetting(SettingConfig("groups", groups=1), 0, tofu.split(0), 0)
    model = tofu.start(0).eval()
    measured = Measured(model, {"forget": data.forget, "retain": data.retain}, 0)
    averaged = {}
    for name in ("forget", "retain"):
        own, _ = measured(name, None)
        parts = [torch.arange(start, min(start + 3, len(own))) for start in range(0, len(own), 3)]
        heads, filters = (torch.stack([each[part].mean(0) for part in parts]) for each in (own.heads, own.filters))
        averaged[name] = Importance(heads, filters, [own.ids[int(part[0])] for part in parts], own.layout)
    expected = search(**averaged, budget=0.3, lam=0.1, model=model)
    found = choose(SelectionConfig("modules", budget=0.3, average=3), 0.1, measured).masks
    assert found is not None
    assert torch.equal(found.heads, expected.heads)
    assert torch.equal(found.filters, expected.filters)
    every = choose(SelectionConfig("modules", budget=0.3), 0.1, measured).masks
    assert not torch.equal(found.filters, every.filters)


def test_only_a_selection_that_averages_says_so() -> None:
    """The cells of older experiments keep their keys."""
    assert "average" not in SelectionConfig("modules").identity(1.0)
    assert SelectionConfig("modules", average=32).identity(1.0)["average"] == 32


@pytest.mark.parametrize(
    "method",
    [
        MethodConfig("npo"),
        MethodConfig("rmu", options={"layer": 1}),
        MethodConfig("dpo"),
        MethodConfig("idk"),
        MethodConfig("rl"),
        MethodConfig("ft"),
        MethodConfig("ssd", parameter="selection"),
        MethodConfig("influence", parameter="gamma"),
    ],
    ids=lambda method: method.objective,
)
def test_objectives_on_a_language_model(method: MethodConfig, tofu: Task) -> None:
    data = forgetting(SettingConfig("groups", groups=1), 0, tofu.split(0), 0)
    model = tofu.start(0).eval()
    original = copy.deepcopy(model).state_dict()
    chosen = choose(SelectionConfig("last_layers", layers=1), 1.0, Measured(model, {}, 0))
    value = {"ssd": 1.0}.get(method.objective, 1e-3)
    model, _ = unlearn(
        model, chosen, method, value, forget=data.forget, retain=data.retain, steps=2, batch_size=4, seed=0
    )
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, original[name])}
    assert changed
    assert all(name.startswith("model.layers.1.") for name in changed)


GRID = """
task: {task}
settings:
  group: {{forget: groups, groups: 1, lam: 0.1}}
seeds: [0]
objectives: [{objectives}]
selections:
  everything: {{}}
  learned: {{kind: modules, budget: 0.3}}
lrs: [1.0e-3]
steps: 2
batch_size: 4
evidence: {{relearn_steps: 2, relearn_every: 1, max_new_tokens: 4}}
"""


@pytest.mark.parametrize(("kind", "tied"), [("tofu", False), ("tofu", True), ("questions", False)])
def test_experiments_run_from_end_to_end(kind: str, tied: bool, corpus: Path, encoder: Path, tmp_path: Path) -> None:
    task: dict[str, Any] = {"name": kind, "epochs": 1, "batch_size": 16}
    if kind == "tofu":
        task |= {"data": str(corpus), "options": {"authors": 3, "held_out": 2, "vocab_size": 300, **TINY}}
        task["options"] |= {"tie_word_embeddings": tied}
    else:
        file = squad(tmp_path / "questions.json.gz")
        task |= {"data": str(file), "model": str(encoder), "options": {"max_length": 20}}
    objectives = "gd, dpo" if kind == "tofu" else "gd, npo"
    (tmp_path / "grid.yaml").write_text(GRID.format(task=json.dumps(task), objectives=objectives))
    summary = run_experiment(str(tmp_path / "grid.yaml"), output=str(tmp_path / "run"), workers=1)
    assert summary["cells"] == 7
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert all("failed" not in row and row["forget_loss"] > 0 for row in rows)
    counts = {"tofu": (20, 40, 20, 20), "questions": (2, 10, 4, 4)}[kind]
    names = ("forget", "retain", "validation", "test")
    assert all(tuple(row[f"{name}_records"] for name in names) == counts for row in rows[:2])
    assert rows[0]["forgotten"].startswith(f"all {counts[0]} training records of 1 of ")


def test_options_of_the_files_that_come_with_the_project_fit_their_tasks() -> None:
    for path in find_experiment("digits").parent.glob("*.yaml"):
        if "\nsettings:" not in path.read_text():
            continue
        config = read_experiment(path).task
        maker, needed = tasks.MAKERS[config.name]
        known = inspect.signature(maker)
        known.bind(**dict.fromkeys(needed, ""), **config.options)
        models = {"tofu": LlamaConfig, "folder": ViTConfig, "arrays": ViTConfig, "digits": ViTConfig}
        others = set(config.options) - set(known.parameters) - {"size"}
        assert not others or others <= set(models[config.name]().to_dict()), path


def test_alternative_answers_only_where_records_have_them() -> None:
    def config(task: Any) -> ExperimentConfig:
        return ExperimentConfig(TaskConfig(task), {"s": SettingConfig()}, [0], objectives=["dpo", "idk"])

    check_methods(config("tofu"))
    with pytest.raises(ValueError, match="no alternative answers for task 'digits', got 'dpo'"):
        check_methods(config("digits"))
