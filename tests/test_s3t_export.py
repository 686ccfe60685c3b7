"""export_ensemble: adapters that load without pymape and answer alike; whole, or not there at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny_batch
from s3t_tools import LENGTH, options, write_base
from safetensors.torch import load_file, save_file
from serving_tools import make_chains
from torch import Tensor

from pymape.s3t.config import LoraConfig
from pymape.s3t.ensemble import Ensemble
from pymape.s3t.export import export_ensemble
from pymape.s3t.frozen_base import base_hash

pytest.importorskip("peft")

# Runs the README's lines in every folder that it is given, where pymape cannot be imported.
_READER = """
import os, sys
sys.modules["pymape"] = None
from safetensors.torch import load_file, save_file
for folder in sys.argv[1:]:
    os.chdir(folder)
    space = {}
    exec(open("README.md").read().split("```python")[1].split("```")[0], space)
    found = space["predict"](**load_file("../inputs.safetensors"))
    save_file({"logits": found.float().contiguous()}, "../found.safetensors")
assert not [name for name in sys.modules if name.startswith("pymape.")]
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("bert"))


def files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_the_lines_of_the_readme_need_no_pymape(tmp_path: Path) -> None:
    cases: dict[str, tuple[str, dict[str, Any], str]] = {
        "bert": ("bert", {"lora": LoraConfig(r=2, alpha=5.0, rslora=True)}, "mean"),
        "votes": ("bert", {}, "vote"),
        "new head": ("bert", {"labels": 5}, "mean"),
        "llama": ("llama", {"lora": LoraConfig(r=2, alpha=4.0, targets="all")}, "size"),
        "gpt2": ("gpt2", {}, "mean"),
        "vit": ("vit", {"lora": LoraConfig(r=2, alpha=4.0, targets="attention")}, "size"),
    }
    expected: dict[str, Tensor] = {}
    for name, (family, changes, combination) in cases.items():
        task = "base" if name == "new head" else None
        config = options(write_base(tmp_path / name / "base", family, task=task), **changes)
        chains = make_chains(config, [2, 0, 4, 1])
        choice: dict[str, Any] = {"combination": combination, "sizes": {0: 9, 2: 3, 3: 4}}
        export_ensemble(tmp_path / name / "export", config, chains, **choice)
        inputs = tiny_batch(family, batch=4, length=LENGTH, padding=None if family == "vit" else "right", labels=False)
        save_file(inputs, tmp_path / name / "inputs.safetensors")
        expected[name] = Ensemble(config.model, config, chains, **choice)(**inputs).logits
    folders = [str(tmp_path / name / "export") for name in cases]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-P", "-c", _READER, *folders], check=True, cwd=tmp_path, env=environment)
    for name, logits in expected.items():
        found = load_file(tmp_path / name / "found.safetensors")["logits"]
        if name == "votes":
            votes = logits.softmax(-1) * (3 + 3) - 1
            torch.testing.assert_close(found, votes, rtol=0, atol=1e-5)
        else:
            torch.testing.assert_close(found, logits, rtol=1e-5, atol=5e-6)


def test_what_is_written(bert: str, tmp_path: Path) -> None:
    config = options(bert, lora=LoraConfig(r=2, targets="all"))
    chains = make_chains(config, [2, 0, 1])
    sizes = {0: 6, 2: 2}
    found = export_ensemble(tmp_path / "new" / "export", config, chains, combination="size", sizes=sizes)
    folder = tmp_path / "new" / "export"
    assert {entry["file"]: entry["sha256"] for entry in found} == files(folder)
    adapters = ("adapter_config.json", "adapter_model.safetensors")
    assert set(files(folder)) == {
        "README.md", "ensemble.json", *(f"shard-{shard:02d}/{name}" for shard in (0, 2) for name in adapters)
    }  # fmt: skip
    index = json.loads((folder / "ensemble.json").read_text())
    assert index["base"] == {"folder": bert, "class": "BertForSequenceClassification", "sha256": base_hash(bert)}
    assert index["combination"] == "size"
    assert index["shards"] == [
        {"folder": "shard-00", "shard": 0, "depth": 2, "layers": [2, 3], "weight": 0.75},
        {"folder": "shard-02", "shard": 2, "depth": 1, "layers": [3], "weight": 0.25},
    ]
    settings = json.loads((folder / "shard-00" / "adapter_config.json").read_text())
    assert settings["layers_to_transform"] == [2, 3]
    attention = [f"attention.self.{name}" for name in ("key", "query", "value")]
    assert settings["target_modules"] == ["attention.output.dense", *attention, "intermediate.dense", "output.dense"]
    assert settings["modules_to_save"] == ["classifier"]
    tensors = load_file(folder / "shard-00" / "adapter_model.safetensors")
    for name, tensor in {**chains[0][0], **chains[0][1]}.items():  # both groups, and the head of the last stage alone
        assert torch.equal(tensors.pop(name), tensor)
    assert not tensors
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["export"]


def test_the_same_bytes_every_time(bert: str, tmp_path: Path) -> None:
    config = options(bert)
    first, second = (export_ensemble(tmp_path / name, config, make_chains(config, [2, 1])) for name in "ab")
    other = [entry["file"] for entry, same in zip(first, second, strict=True) if entry != same]
    assert other == ["ensemble.json"]  # which names the export
    names = [json.loads((tmp_path / name / "ensemble.json").read_text())["export"] for name in "ab"]
    assert names == [entry["export"] for entry in (*first, *second) if "export" in entry]
    assert names[0] != names[1]


def test_an_error_leaves_nothing(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options(bert)
    chains = make_chains(config, [1, 2])
    seen: list[Any] = []

    def refuse(written: list[dict[str, str]]) -> contextlib.AbstractContextManager[None]:
        seen.append(written)
        assert not (tmp_path / "export").exists()
        raise ValueError("stages of an export must be live, got shard00-0-g0")

    with pytest.raises(ValueError, match="stages of an export must be live"):
        export_ensemble(tmp_path / "export", config, chains, place=refuse)
    assert len(seen[0]) == 6
    bad = {**chains, 1: chains[1][1:]}
    with pytest.raises(ValueError, match="stage 1 must hold the tensors of its group and the head"):
        export_ensemble(tmp_path / "export", config, bad)
    with pytest.raises(ValueError, match="stage 1 must hold"):
        export_ensemble(tmp_path / "new" / "export", config, bad)
    with pytest.raises(ValueError, match="chains must hold a live shard, got 1, all dead"):
        export_ensemble(tmp_path / "export", config, {0: []})
    with pytest.raises(ValueError, match="sizes must hold the records of each live shard"):
        export_ensemble(tmp_path / "export", config, chains, combination="size")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pymape.s3t.export.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_ensemble(tmp_path / "export", config, chains)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["before", "after"])
def test_a_refused_export_is_overwritten(bert: str, tmp_path: Path, step: str) -> None:
    places: list[Path] = []

    @contextlib.contextmanager
    def begin(folder: Path) -> Iterator[None]:
        places.append(folder)
        assert list(folder.iterdir()) == []
        yield
        assert not folder.exists()

    @contextlib.contextmanager
    def refuse(*_: Any) -> Iterator[None]:
        if step == "after":
            yield
        written = {"before": places[0], "after": tmp_path / "export"}[step]
        os.link(written / "shard-00" / "adapter_model.safetensors", tmp_path / "link")
        raise ValueError("stages of an export must be live")

    config = options(bert)
    with pytest.raises(ValueError, match="must be live"):
        export_ensemble(tmp_path / "export", config, make_chains(config, [1]), begin=begin, place=refuse)
    assert list(tmp_path.iterdir()) == [tmp_path / "link"]
    assert not any((tmp_path / "link").read_bytes())


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"shard-00/.hidden": "mine"}])
def test_a_folder_with_files_is_left_alone(bert: str, content: Mapping[str, str], tmp_path: Path) -> None:
    config, target = options(bert), tmp_path / "export"
    for name, text in content.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    before = files(target)
    with pytest.raises(ValueError, match=r"folder must be new or without files, got .* with '(notes.txt|.hidden)'"):
        export_ensemble(target, config, make_chains(config, [1]))
    with pytest.raises(ValueError, match="folder must be new or without files, got"):
        export_ensemble(target / next(iter(content)), config, make_chains(config, [1]))
    with pytest.raises(ValueError, match="folder must be one that can be replaced, got the mount point '/proc'"):
        export_ensemble("/proc", config, make_chains(config, [1]))
    assert files(target) == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_place_that_is_taken_meanwhile_is_left_alone(bert: str, tmp_path: Path) -> None:
    config, target, failed = options(bert), tmp_path / "export", []

    @contextlib.contextmanager
    def place(*_: Any) -> Iterator[None]:
        target.mkdir()
        (target / "adapter").write_bytes(b"another export")
        try:
            yield
        except ValueError as error:
            failed.append(error)
            raise

    with pytest.raises(ValueError, match=r"folder must be new or without files, got .* with 'adapter'"):
        export_ensemble(target, config, make_chains(config, [1]), place=place)
    assert len(failed) == 1  # so that what was noted is forgotten
    assert [path.read_bytes() for path in target.iterdir()] == [b"another export"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_an_erased_export_left_is_reused(bert: str, tmp_path: Path) -> None:
    config, target = options(bert), tmp_path / "export"
    first = export_ensemble(target, config, make_chains(config, [2, 1]))
    for entry in first:
        (target / entry["file"]).unlink()
    second = export_ensemble(target, config, make_chains(config, [0, 1]))
    assert {entry["file"]: entry["sha256"] for entry in second} == files(target)
    assert not (target / "shard-00").exists()


def test_a_place_that_cannot_be_written(bert: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = options(bert)
    with pytest.raises(ValueError, match=r"folder must be one that can be written, got .*: Not a directory"):
        export_ensemble(tmp_path / "file" / "export", config, make_chains(config, [1]))
