"""The examples of the pages in docs/ run, and the pages say what the code and the results do."""

from __future__ import annotations

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from model_zoo import tiny_model
from s3t_tools import make_records, write_base
from session_tools import WORDS, write_files
from trainer_tools import arguments, collate, records, some_masks
from transformers import AutoModelForCausalLM, ErnieConfig, ErnieModel

import pymape
from pymape import architectures
from pymape.experiments.claims import mean_gaps
from pymape.experiments.pictures import glance_figures
from pymape.objectives import objective_names
from pymape.objectives.registry import _OBJECTIVES
from pymape.s3t import S3T, S3TConfig

README = Path(__file__).parent.parent / "README.md"
DOCS = README.parent / "docs"
TEXT = (DOCS / "objectives.md").read_text()


def python_examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def test_the_tables_name_every_objective():
    assert sorted(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == objective_names()


def test_the_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = python_examples(DOCS / "objectives.md")
    assert len(examples) == 3
    assert max(len(example.strip().splitlines()) for example in examples) <= 10
    names: dict[str, Any] = {"pymape": pymape, "args": arguments(tmp_path), "unseen": records("language", 4, 3)}
    names |= {"forget": records("language", 4, 1), "retain": records("language", 4, 2), "collate": collate}
    try:
        for example in examples:
            names["model"] = tiny_model("llama")
            names["masks"] = some_masks(names["model"])
            exec(example.replace("forget_dataset=forget", "data_collator=collate, forget_dataset=forget"), names)
            names["trainer"].train()
            assert names["trainer"].state.global_step >= 1
    finally:
        _OBJECTIVES.pop("hinge", None)


def test_the_example_of_masks_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = python_examples(DOCS / "masks.md")
    names: dict[str, Any] = {"pymape": pymape, "model": tiny_model("llama")}
    names |= {"forget_records": records("language", 4, 1), "retain_records": records("language", 4, 2)}
    exec(example, names)
    assert names["masks"].summary() in capsys.readouterr().out
    assert pymape.ModuleMasks.load("masks.safetensors").cost() == names["masks"].cost() <= 0.1


def test_the_examples_with_own_data_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, "gpt2")
    Path("model").rename("my-model")
    texts = [" ".join(WORDS[row : row + 4]) for row in range(12)]
    rows = [[row, text, text, "A. Writer" if row < 3 else "B. Writer"] for row, text in enumerate(texts)]
    pd.DataFrame(rows, columns=["id", "question", "answer", "author"]).to_csv("questions.csv", index=False)
    pd.DataFrame({"id": ["17", "204", *"abcdef"], "text": texts[:8]}).to_csv("records.csv", index=False)
    own, session, _ = python_examples(DOCS / "unlearn.md")
    names: dict[str, Any] = {}
    exec(own.replace("max_steps=60", "max_steps=2, use_cpu=True"), names)
    original = AutoModelForCausalLM.from_pretrained("my-model")
    pymape.apply_delta(original, "delta.safetensors")
    merged = AutoModelForCausalLM.from_pretrained("my-model-unlearned").state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in original.state_dict().items())
    assert not list(Path("runs").rglob("checkpoint-*"))
    exec(session, names)
    assert names["receipt"]["metrics"]["after"]["forget_loss"] > names["receipt"]["metrics"]["before"]["forget_loss"]


def test_the_example_of_another_family_runs(monkeypatch):
    monkeypatch.setattr(architectures, "_ARCHITECTURES", dict(architectures._ARCHITECTURES))
    *_, example = python_examples(DOCS / "unlearn.md")
    exec(example, {})
    config = ErnieConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=25)
    model, tokens = ErnieModel(config).eval(), torch.arange(6)[None]
    before = model(tokens).last_hidden_state
    with pymape.modules.gates(pymape.instrument(model), torch.ones(2, 4), torch.ones(2, 25)):
        torch.testing.assert_close(model(tokens).last_hidden_state, before)


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_base(Path("my-model"))
    rows = [row | {"id": {"r0": "17", "r1": "204"}.get(row["id"], row["id"])} for row in make_records(count=96)]
    unlearn, exact = python_examples(README)
    names: dict[str, Any] = {"forget": rows[:4], "retain": rows[4:]}
    exec(unlearn.replace("max_steps=100", "max_steps=2, use_cpu=True"), names)
    assert names["masks"].summary() in capsys.readouterr().out
    assert Path("my-model-unlearned/model.safetensors").exists()
    for example in (exact, *python_examples(DOCS / "s3t.md")):
        names = {"records": rows}
        exec(example.replace("slices=4", "slices=2").replace("workers=2", "workers=1"), names)
        assert names["receipt"]["state"] == "verified"
        assert names["model"].shards
        shutil.rmtree("system")
    with S3T.create("system", S3TConfig("my-model", shards=2, slices=2)) as system:
        system.ingest(rows)
    exec(python_examples(DOCS / "s3t_workers.md")[0].replace("workers=4", "workers=1"))
    stages = S3T("system", read_only=True).status()["stages"]
    assert stages["trained"]
    assert not stages.get("planned")


def test_the_page_of_claims_is_that_of_the_results_beside_it():
    script = runpy.run_path(str(DOCS.parent / "experiments" / "claims_page.py"))
    found = script["outcomes"]()
    (figure,) = glance_figures(found)
    assert (DOCS / "results" / "claims.md").read_text() == script["page"](found, figure)
    picture = (DOCS / "results" / "claims.svg").read_text()
    for name in mean_gaps(found):
        assert f">{name}<" in picture
    assert "docs/results/claims.svg" in README.read_text()
