"""Evidence on chosen models: what is kept recomputes every figure, and is made once."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experiments import YAML as SMALL
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pymape.cli import main
from pymape.experiments import evidence as evidence_module
from pymape.experiments.cells import cell_file, cells_of
from pymape.experiments.config import EvidenceConfig, ExperimentConfig, SettingConfig, TaskConfig, read_experiment
from pymape.experiments.evidence import Evidence, subjects
from pymape.experiments.runner import run_experiment
from pymape.experiments.summaries import choose_cells, read_cells
from pymape.experiments.tasks import Forgetting, Split, Task, make_task
from pymape.experiments.unit import Unit
from pymape.masks import ModuleMasks
from pymape.metrics import (
    METRICS,
    AnswerScores,
    QuestionSet,
    RecordScores,
    answer_records,
    score_metrics,
    tofu_metrics,
)

YAML = (
    SMALL.replace("epochs: 2", "epochs: 2, options: {num_hidden_layers: 2, hidden_size: 32, intermediate_size: 64}")
    .replace("steps: 2", "steps: 3\nevery: 1")
    .replace("evidence: null", "evidence: {relearn_steps: 6, relearn_every: 3, relearn_lr: 1.0e-2, shadows: 2}")
)
SETS = ("forget", "retain", "test")

Row = dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Row]:
    """File, folder and summary of a small experiment."""
    folder = tmp_path_factory.mktemp("experiment")
    file = folder / "small.yaml"
    file.write_text(YAML)
    return file, folder / "run", run_experiment(str(file), output=str(folder / "run"), workers=1)


def by_place(rows: list[Row]) -> dict[tuple[str, int, str, str], Row]:
    return {(row["setting"], row["seed"], row["objective"], row["selection"]): row for row in rows}


def load(folder: Path, row: Row) -> dict[str, RecordScores]:
    return {name: RecordScores.load(folder / row["scores"] / f"{name}.safetensors") for name in SETS}


def test_every_chosen_model_is_made_again_as_it_was(finished: tuple[Path, Path, Row]) -> None:
    _, folder, summary = finished
    rows = by_place(read_cells(folder / "evidence.jsonl"))
    chosen = by_place(choose_cells(read_cells(folder / "results.jsonl")))
    assert rows.keys() == chosen.keys()
    assert (summary["evidence"]["models"], summary["evidence"]["computed"]) == (10, 10)
    for place, row in rows.items():
        assert row["value"] == chosen[place]["value"]
        assert row["differs"] == {}
        assert {name: row["metrics"][name] for name in METRICS} == {name: chosen[place][name] for name in METRICS}


def test_scores_give_the_metrics_without_a_model(finished: tuple[Path, Path, Row]) -> None:
    _, folder, _ = finished
    rows = by_place(read_cells(folder / "evidence.jsonl"))
    for (setting, seed, *_), row in rows.items():
        gold = load(folder, rows[setting, seed, "retrained", ""])
        again = score_metrics(load(folder, row), retrained=gold, reference=gold, seed=seed)
        assert again == {name: row["metrics"][name] for name in again}
        assert row["metrics"].keys() - again.keys() >= {"mia_lira", "logit_kl", "hidden_cka", "relearning_distance"}
        assert 0 <= row["metrics"]["mia_lira"] <= 1


def test_masks_lie_beside_the_scores(finished: tuple[Path, Path, Row]) -> None:
    _, folder, _ = finished
    masked = {row["selection"] for row in read_cells(folder / "evidence.jsonl") if _masks(folder, row).exists()}
    assert masked == {"learned"}
    for row in read_cells(folder / "evidence.jsonl"):
        if row["selection"] == "learned":
            (cell,) = (
                c for c in read_cells(folder / "results.jsonl")
                if all(c[name] == row[name] for name in ("setting", "selection", "value"))
            )  # fmt: skip
            assert ModuleMasks.load(_masks(folder, row)).cost() == cell["mask_cost"]


def _masks(folder: Path, row: Row) -> Path:
    return folder / row["scores"] / "masks.safetensors"


def test_curves_are_held_against_the_retrained_models(finished: tuple[Path, Path, Row]) -> None:
    _, folder, _ = finished
    rows = by_place(read_cells(folder / "evidence.jsonl"))
    for (setting, seed, *_), row in rows.items():
        curve, gold = row["relearning"], rows[setting, seed, "retrained", ""]["relearning"]
        assert curve["steps"] == [0, 3, 6]
        original = rows[setting, seed, "original", ""]["metrics"]["UA"]
        assert curve["target"] == pytest.approx(100 - original - 5)
        assert curve["accuracy"][0] == pytest.approx(100 - row["metrics"]["UA"])
        apart = sum(abs(a - b) for a, b in zip(curve["accuracy"], gold["accuracy"], strict=True)) / 3
        assert row["metrics"]["relearning_distance"] == pytest.approx(apart)
        reached = [
            step for step, value in zip(curve["steps"], curve["accuracy"], strict=True) if value >= curve["target"]
        ]
        assert row["metrics"]["relearning_steps"] == (reached[0] if reached else None)
    assert any(row["metrics"]["relearning_distance"] > 0 for row in rows.values())
    assert rows["class", 1, "retrained", ""]["metrics"]["relearning_distance"] == 0


def test_what_is_done_is_not_done_again(
    finished: tuple[Path, Path, Row], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, folder, _ = finished
    before = (folder / "evidence.jsonl").read_text()
    last = json.loads(before.splitlines()[-1])
    (folder / f"{last['scores']}.json").unlink()
    again = run_experiment(str(file), output=str(folder))
    assert (again["computed"], again["evidence"]["computed"]) == (0, 1)

    def facts(text: str) -> list[Row]:
        rows = [json.loads(line) for line in text.splitlines()]
        for row in rows:
            row.pop("seconds")
            row["metrics"].pop("added_mib", None)
        return rows

    assert facts((folder / "evidence.jsonl").read_text()) == facts(before)
    monkeypatch.setattr(evidence_module, "record_scores", lambda *_, **__: pytest.fail("all is on disk"))
    less = tmp_path / "less.yaml"
    less.write_text(YAML.replace("shadows: 2", "shadows: 2, selections: [learned]"))
    assert run_experiment(str(less), output=str(folder))["evidence"] == {
        "models": 8, "computed": 0, "seconds": pytest.approx(0, abs=60)
    }  # fmt: skip
    assert {row["selection"] for row in read_cells(folder / "evidence.jsonl")} == {"", "learned"}
    run_experiment(str(file), output=str(folder))
    assert facts((folder / "evidence.jsonl").read_text()) == facts(before)


def test_a_model_that_is_no_longer_the_same_is_told(finished: tuple[Path, Path, Row]) -> None:
    file, folder, _ = finished
    config = read_experiment(file)
    task = make_task(config.task)
    options = EvidenceConfig(relearn_steps=0)
    found = subjects(folder, cells_of(config, task), options)
    (subject,) = (s for s in found if (s.cell.setting, s.cell.selection) == ("random", "learned"))
    subject.row["UA"] -= 2.5  # type: ignore[index]
    subject.row["test_loss"] *= 1 + 1e-9  # type: ignore[index]
    seen = Evidence(Unit(config, task, folder, ("random", 1)), options).of(subject)
    assert seen["differs"] == {"UA": pytest.approx(2.5)}
    assert seen["relearning"] is None
    assert "relearning_distance" not in seen["metrics"]


def test_options_make_other_files_and_failed_grids_none(finished: tuple[Path, Path, Row], tmp_path: Path) -> None:
    file, folder, _ = finished
    config = read_experiment(file)
    cells = cells_of(config, make_task(config.task))
    paths = [
        {subject.path for subject in subjects(folder, cells, options)}
        for options in (EvidenceConfig(), EvidenceConfig(relearn_lr=1e-3), EvidenceConfig(selections=["learned"]))
    ]
    assert not paths[0] & paths[1]
    assert paths[2] < paths[0]
    for cell in cells:
        (tmp_path / "cells").mkdir(exist_ok=True)
        content = {"selection_score": 0.0} if cell.selection != "learned" else {"failed": "loss must stay finite"}
        (tmp_path / "cells" / f"{cell.key}.jsonl").write_text(json.dumps(content))
    assert {s.cell.selection for s in subjects(tmp_path, cells, EvidenceConfig())} == {"", "everything"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shadows": 1}, "evidence.shadows must be 0, or 2 or more, got 1"),
        ({"relearn_every": 0}, "evidence.relearn_every must be at least 1, got 0"),
        ({"relearn_steps": -1}, "evidence.relearn_steps must be not negative, got -1"),
        ({"relearn_lr": math.inf}, "evidence.relearn_lr must be positive and finite, got inf"),
        ({"max_new_tokens": -1}, "evidence.max_new_tokens must be not negative"),
        ({"selections": ["everything", "x"]}, "evidence.selections must be among everything, learned, got x"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvidenceConfig(**options).check(["everything", "learned"])


def test_options_come_from_the_file_and_may_be_left_out(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    for line, found in (("", EvidenceConfig()), ("evidence: null", None)):
        file.write_text(f"{YAML.partition('evidence')[0]}{line}\n")
        assert read_experiment(file).evidence == found
    file.write_text(YAML.replace("shadows: 2", "shadows: 1"))
    with pytest.raises(ValueError, match=r"evidence\.shadows must be"):
        read_experiment(file)


def test_page_and_tables_show_the_evidence(finished: tuple[Path, Path, Row], tmp_path: Path) -> None:
    _, folder, _ = finished
    page, tables = tmp_path / "page.html", (folder / "tables.md").read_text()
    assert main(["report", str(folder), "--output", str(page)]) == 0
    text = page.read_text()
    rows = by_place(read_cells(folder / "evidence.jsonl"))
    lira = f"{rows['class', 1, 'gd', 'learned']['metrics']['mia_lira']:.2f}"
    distance = f"{rows['random', 1, 'gd', 'everything']['metrics']['relearning_distance']:.1f}"
    for figure in (lira, distance):
        assert f"| {figure} |" in tables
        assert f"<td class=n>{figure}</td>" in text
    for shown in ("Claim 1, closer to retraining: cannot be judged", "Claim 2,", "Claim 3,", "Claim 5,"):
        assert f"## {shown}" in tables
        assert shown in text
    for shown in ("AUC LiRA", "The relearning attack", "A closer look: class", "A closer look: random", "loss (nats)"):
        assert shown in text
    assert len(text) < 3_000_000
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("summary.json", "results.jsonl", "evidence.jsonl"):
        shutil.copy(folder / name, moved)
    assert main(["report", str(moved), "--output", str(page)]) == 0
    assert "A closer look" not in page.read_text()
    assert "The relearning attack" in page.read_text()


QUESTIONS = [f"who is number {name}" for name in ("one", "two", "three", "four", "five", "six", "seven", "eight")]
ANSWERS = ["red red", "blue red", "green blue", "blue blue", "red green", "green red", "green green", "red blue"]


def language_task() -> Task:
    """Six questions to train on, and two to test; wrong answers are those of others."""
    words = sorted({word for text in [*QUESTIONS, *ANSWERS, "Question:", "Answer:"] for word in text.split()})
    plain = Tokenizer(WordLevel({word: place for place, word in enumerate(["[PAD]", "[END]", *words])}))
    plain.pre_tokenizer = WhitespaceSplit()
    plain.post_processor = TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="[PAD]", eos_token="[END]")
    ids = [f"r{row}" for row in range(len(QUESTIONS))]
    records = answer_records(tokenizer, QUESTIONS, ANSWERS, ids=ids)

    def ask(data: Forgetting) -> dict[str, QuestionSet]:
        sets = {}
        for name in ("forget", "retain"):
            rows = [ids.index(record["id"]) for record in data.sets[name]]
            columns = [[texts[row] for row in rows] for texts in (QUESTIONS, ANSWERS)]
            wrong = [[ANSWERS[row - 1], ANSWERS[row - 2]] for row in rows]
            sets[name] = QuestionSet([ids[row] for row in rows], *columns, wrong, columns[1])
        return sets

    def start(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, **shape))

    split = Split(records[:6], records[6:7], records[6:])
    return Task(0, "words", lambda _: split, start, tokenizer, ask)


def test_language_models_are_asked(tmp_path: Path) -> None:
    config = ExperimentConfig(
        TaskConfig("tofu", epochs=30, lr=1e-2, batch_size=4), {"s": SettingConfig(share=0.34)}, [0],
        objectives=["ga"], lrs=[1e-3], steps=2, batch_size=2,
        evidence=EvidenceConfig(relearn_steps=2, gradients=True, max_new_tokens=3),
    )  # fmt: skip
    task = language_task()
    cells = cells_of(config, task)
    unit = Unit(config, task, tmp_path, ("s", 0))
    for cell in cells:
        cell_file(tmp_path, cell).parent.mkdir(exist_ok=True)
        cell_file(tmp_path, cell).write_text(json.dumps(unit.result(cell)))
    assert config.evidence is not None
    found = subjects(tmp_path, cells, config.evidence)
    evidence = Evidence(unit, config.evidence)
    seen = {subject.cell.objective: evidence.of(subject)["metrics"] for subject in found}
    assert seen.keys() == {"original", "retrained", "retrained again", "ga"}
    answers = {
        subject.cell.objective: {
            name: AnswerScores.load(subject.folder / f"questions-{name}") for name in ("forget", "retain")
        }
        for subject in found
    }
    for name, metrics in seen.items():
        again = tofu_metrics(answers[name], retrained=answers["retrained"]["forget"], end_token=1)
        assert again == {figure: metrics[figure] for figure in again}
        assert {"forget_quality", "retain_utility", "forget_Q_A_ROUGE", "mia_zlib", "mia_gradnorm"} <= metrics.keys()
        assert "mia_lira" not in metrics
    assert seen["retrained"]["forget_quality"] == pytest.approx(1)
    assert seen["original"]["retain_Q_A_Prob"] > 0.5
    assert seen["original"]["forget_Q_A_Prob"] > seen["retrained"]["forget_Q_A_Prob"] + 0.2
