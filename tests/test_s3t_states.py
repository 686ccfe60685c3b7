"""Stages from cached states of the frozen layers below them: the bits of the plain pass, in less work."""

from __future__ import annotations

import dataclasses
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from s3t_tools import FAMILIES, LENGTH, SEQUENCE, make_job, setting, train_chain
from safetensors.torch import load_file
from torch import Tensor

from pymape.model_layout import find_layers
from pymape.prefix_cache import PrefixCache
from pymape.s3t import states, training
from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import LoraConfig, StageConfig
from pymape.s3t.stages import StageKey
from pymape.s3t.training import train_stage


def stored(cache: Path) -> dict[Path, bytes]:
    """The states in every file of a prefix cache."""
    return {file: load_file(file)["states"].numpy().tobytes() for file in cache.rglob("*.safetensors")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_prefix_cache_changes_no_bit(family: str, dropout: float, tmp_path: Path) -> None:
    lora = LoraConfig(r=2, alpha=4.0, targets="all", dropout=dropout)
    config, slices = setting(tmp_path, family, lora=lora)
    cache = tmp_path / "cache"
    plain = train_chain(config, SEQUENCE, slices)
    assert train_chain(config, SEQUENCE, slices, cache=cache) == plain  # empty
    written = stored(cache)
    assert train_chain(config, SEQUENCE, slices, cache=cache) == plain  # full
    assert stored(cache) == written
    draw = random.Random(0)
    for file in written:
        fate = draw.random()
        if fate < 0.4:
            file.unlink()
        elif fate < 0.5:
            file.write_bytes(file.read_bytes()[:-3])
    assert train_chain(config, SEQUENCE, slices, cache=cache) == plain  # half full, and damaged
    assert stored(cache) == written


def test_no_states_are_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that fill a batch, and batches of which some are missing, are computed again, but stored once."""
    config, slices = setting(tmp_path)
    begun, make = [], tempfile.mkstemp

    def count(**options: Any) -> Any:
        begun.append(options)
        return make(**options)

    monkeypatch.setattr(tempfile, "mkstemp", count)
    train_chain(config, SEQUENCE, slices, cache=tmp_path / "cache")
    assert len(begun) == len(stored(tmp_path / "cache")) > 0


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"threads": 2}, {"max_length": LENGTH + 3}])
def test_states_of_another_batch_shape_or_thread_count_are_not_used(change: dict[str, int], tmp_path: Path) -> None:
    config, slices = setting(tmp_path)
    cache = tmp_path / "cache"
    train_chain(config, SEQUENCE, slices, cache=cache)
    before = stored(cache)
    other = dataclasses.replace(config, stage=dataclasses.replace(config.stage, **change))
    assert train_chain(other, SEQUENCE, slices, cache=cache) == train_chain(other, SEQUENCE, slices)
    after = stored(cache)
    assert before.items() < after.items()
    assert len(after) == 2 * len(before)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_layers_below_run_once_for_a_record(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, slices = setting(tmp_path, family, stage=StageConfig(epochs=4, batch_size=4, max_length=LENGTH))
    cache = tmp_path / "cache"
    training._loaded = None
    runs: list[tuple[int, int]] = []

    def count(self: SlicedAdapters, *arguments: Any) -> None:
        build(self, *arguments)
        for number, layer in enumerate(find_layers(self.base)):
            layer.output.register_forward_hook(lambda m, args, o, number=number: runs.append((number, len(args[0]))))

    build = SlicedAdapters.__init__
    monkeypatch.setattr(SlicedAdapters, "__init__", count)
    train_chain(config, SEQUENCE[:1], slices, cache=cache)  # 4 records: one batch
    # Layers 0 to 2: once for the states of all deeper stages, and once for the comparison of the first batch.
    assert [sum(number == layer for number, _ in runs) for layer in range(4)] == [2, 2, 2, 4]
    runs.clear()
    train_chain(config, SEQUENCE[:2], slices, cache=cache)
    # Stage 1 again: what layers return is learnt from one record, then the comparison. Stage 2: 5 new records.
    below = [sum(number == layer for number, _ in runs) for layer in range(4)]
    assert below[:2] == [2 + 1 + 2 + 1, 2 + 1 + 2 + 1]
    # Never at another batch shape than that of training, but to learn the form, whose result is not used.
    assert {size for _, size in runs} == {1, 4}
    assert sum(size == 1 for _, size in runs) <= 2 * 3
    training._loaded = None


def test_more_records_than_memory(tmp_path: Path, monkeypatch: Any) -> None:
    config, slices = setting(tmp_path)
    expected = train_chain(config, SEQUENCE, slices)
    for memory in (0, 1000):
        make = states.StageStates.__init__.__defaults__
        monkeypatch.setattr(states.StageStates.__init__, "__defaults__", (memory,))
        assert train_chain(config, SEQUENCE, slices, cache=tmp_path / "cache") == expected
        # Nor room on the disk.
        with monkeypatch.context() as full:
            full.setattr(PrefixCache, "put", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left")))
            assert train_chain(config, SEQUENCE, slices, cache=tmp_path / f"full {memory}") == expected
        monkeypatch.setattr(states.StageStates.__init__, "__defaults__", make)
    # Files that vanish while a stage is trained.
    key = StageKey(0, SEQUENCE[:1])
    monkeypatch.setattr(states.StageStates.__init__, "__defaults__", (0,))
    cache = tmp_path / "vanishing"
    job = make_job(config, key, slices, cache=cache)
    assert train_stage(job, progress=lambda done, total: shutil.rmtree(cache, ignore_errors=True)) == expected[0]


def test_cached_states_with_other_bits_are_refused(tmp_path: Path) -> None:
    config, slices = setting(tmp_path)
    job = make_job(config, StageKey(0, (0,)), slices, cache=tmp_path / "cache")
    put = states._Strict.put

    def off(self: Any, prefix: str, record: str, inputs: str, values: Tensor) -> bool:
        return put(self, prefix, record, inputs, torch.nextafter(values, values + 1))

    with pytest.MonkeyPatch.context() as patch:  # written by a machine that rounds otherwise
        patch.setattr(states._Strict, "put", off)
        expected = train_stage(job)
    with pytest.raises(ValueError, match="cache must be None for this model on this machine"):
        train_stage(job)
    shutil.rmtree(tmp_path / "cache")
    assert train_stage(job) == train_stage(dataclasses.replace(job, cache=None)) == expected
