"""S3T's stages on a GPU: the same bits again, wherever and however they are trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from s3t_tools import SEQUENCE, Slices, make_job, make_records, setting, tensors_of, train_chain, write_base

from pymape.s3t import S3T, LoraConfig, S3TConfig, StageConfig
from pymape.s3t.engines import LocalEngine
from pymape.s3t.stages import StageKey, unpack_stage

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(folder: Path, family: str) -> tuple[S3TConfig, Slices]:
    config, slices = setting(folder, family, lora=LoraConfig(r=2, dropout=0.2))
    return dataclasses.replace(config, stage=dataclasses.replace(config.stage, device="cuda")), slices


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "gpt2"])
def test_stages_have_the_same_bits_again(family: str, tmp_path: Path) -> None:
    config, slices = on_gpu(tmp_path, family)
    before = torch.cuda.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    files = train_chain(config, SEQUENCE, slices)
    assert torch.equal(torch.cuda.get_rng_state(), before[0])
    assert torch.are_deterministic_algorithms_enabled() == before[1]
    assert all(unpack_stage(file)[1].environment["device"] == torch.cuda.get_device_name() for file in files)
    assert train_chain(config, SEQUENCE, slices) == files
    for _ in range(2):  # states are computed, then read
        assert train_chain(config, SEQUENCE, slices, cache=tmp_path / "cache") == files
    jobs = [make_job(config, StageKey(0, SEQUENCE[:n]), slices, files[: n - 1]) for n in range(4, 0, -1)]
    with LocalEngine() as engine:  # another process
        for job in jobs:
            engine.submit(job)
        assert [engine.wait()[1] for _ in jobs] == files[::-1]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_stages_are_those_of_a_cpu_up_to_rounding(family: str, tmp_path: Path) -> None:
    config, slices = on_gpu(tmp_path, family)
    config = dataclasses.replace(config, lora=LoraConfig(r=2))  # dropout draws otherwise on a GPU
    on_cpu = dataclasses.replace(config, stage=dataclasses.replace(config.stage, device="cpu"))
    (one,), (other,) = (tensors_of(train_chain(each, SEQUENCE[:1], slices)) for each in (config, on_cpu))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-2, atol=1e-3)


def test_a_system_deletes_repairs_and_trains_again_what_it_serves(tmp_path: Path) -> None:
    model = write_base(tmp_path / "base", "bert")
    stage = StageConfig(epochs=2, lr=1e-2, batch_size=4, max_length=12, device="cuda")
    records = make_records("bert", 24)
    with S3T.create(tmp_path / "system", S3TConfig(model, shards=1, slices=2, stage=stage)) as system:
        system.ingest(records)
        system.train(workers=1)
        system.delete([str(records[0]["id"])], "first")
        assert system.verify(replay=True)["problems"] == []
        assert system.repair(workers=1)["trained"] > 0
        assert system.verify(replay=True)["problems"] == []
        logits = system.ensemble().to("cuda")(**_batch(records[1:5])).logits
        assert logits.is_cuda
        assert 0 <= system.evaluate(make_records("bert", 8, seed=1))["accuracy"] <= 100


def _batch(records: list) -> dict[str, torch.Tensor]:
    rows = [record["input_ids"][:3] for record in records]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
