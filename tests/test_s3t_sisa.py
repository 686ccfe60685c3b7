"""The SISA baseline: what a deletion leaves, and that its checkpoints go on from each other."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from s3t_tools import make_job, make_records, options, same_tensors, write_base

from pymape.s3t.adapters import SlicedAdapters
from pymape.s3t.config import S3TConfig
from pymape.s3t.ensemble import Ensemble
from pymape.s3t.frozen_base import load_base
from pymape.s3t.sisa import SisaShard, one_group, split_rows, train_plain, train_sisa
from pymape.s3t.stages import StageKey, encode_row, unpack_stage
from pymape.s3t.training import Rows, train_stage

RECORDS = make_records(count=11)
ROWS: Rows = tuple((record["id"], encode_row(record)) for record in RECORDS)
SLICES = split_rows(ROWS, 4, seed=0)  # of 3, 3, 3 and 2 records


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> S3TConfig:
    return options(write_base(tmp_path_factory.mktemp("base") / "model", layers=5), layers_per_slice=1)


@pytest.fixture(scope="module")
def shard(config) -> SisaShard:
    return train_sisa(config, SLICES)


def test_every_record_is_in_one_slice() -> None:
    for slices in range(1, 12):
        parts = split_rows(ROWS, slices, seed=1)
        assert sorted(row for part in parts for row in part) == sorted(ROWS)
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert split_rows(ROWS, 4, seed=0) == SLICES != split_rows(ROWS, 4, seed=1)
    for slices in (0, 12):
        with pytest.raises(ValueError, match=rf"slices must lie in \[1, 11\], the number of records, got {slices}"):
            split_rows(ROWS, slices, seed=0)


def test_deleting_any_record_changes_what_is_served(shard: SisaShard) -> None:
    """The public code forgets the remainder of n / L, so that some deletions change nothing."""
    whole = shard.serve([])
    assert whole is not None
    for part, rows in enumerate(SLICES):
        for name, _ in rows:
            left = shard.serve([name])
            assert shard.depth([name]) == part
            if part == 0:
                assert left is None
            else:
                assert left is not None
                assert not same_tensors(left, whole)
                assert same_tensors(left, unpack_stage(shard.checkpoints[part - 1])[0])


def test_several_deletions_leave_what_none_has_touched(shard: SisaShard) -> None:
    names = [rows[0][0] for rows in SLICES]
    assert [shard.depth(names[first:]) for first in range(5)] == [0, 1, 2, 3, 4]
    assert shard.depth([names[3], names[1], names[2]]) == 1
    with pytest.raises(ValueError, match="deleted must name records of the shard, got 'other'"):
        shard.serve([names[0], "other"])


def test_what_is_served_never_saw_the_deleted_record(config: S3TConfig, shard: SisaShard, tmp_path: Path) -> None:
    gone = SLICES[2][1][0]
    remaining = [tuple(row for row in part if row[0] != gone) for part in SLICES]
    other = train_sisa(config, remaining, cache=str(tmp_path / "cache"))
    assert other.checkpoints[:2] == shard.checkpoints[:2]
    for number in (2, 3):
        one, another = (unpack_stage(files.checkpoints[number])[0] for files in (shard, other))
        assert not same_tensors(one, another)


def test_a_checkpoint_goes_on_from_the_one_before(config: S3TConfig) -> None:
    still = dataclasses.replace(config, stage=dataclasses.replace(config.stage, lr=1e-12))
    first, second = (unpack_stage(content)[0] for content in train_sisa(still, SLICES[:2]).checkpoints)
    other = unpack_stage(train_plain(dataclasses.replace(still, seed=1), SLICES[0]))[0]
    drawn = [name for name in first if ".lora_A." in name]
    assert drawn
    for name in drawn:
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=1e-9)
        assert not torch.allclose(other[name], first[name])


def test_plain_training_adapts_the_layers_of_all_slices(config: S3TConfig, shard: SisaShard) -> None:
    content = train_plain(config, SLICES[0])
    assert content == shard.checkpoints[0]
    tensors = unpack_stage(content)[0]
    layers = {int(found[1]) for name in tensors if (found := re.search(r"\.layer\.(\d+)\.", name))}
    assert layers == {1, 2, 3, 4}
    single = one_group(config)
    assert one_group(single) == single
    adapters = SlicedAdapters(load_base(config.model), single)
    adapters.load([tensors])
    inputs = {"input_ids": torch.tensor([record["input_ids"][:3] for record in RECORDS])}
    served = Ensemble(config.model, single, {0: [tensors]})(**inputs).logits
    torch.testing.assert_close(served, adapters.model(**inputs).logits)


def test_the_beginning_is_what_the_provenance_names(config: S3TConfig, shard: SisaShard) -> None:
    job = make_job(one_group(config), StageKey(0, (0,)), [RECORDS])
    with pytest.raises(ValueError, match="parent of stage shard00-0-g0 must be the file None, got"):
        train_stage(dataclasses.replace(job, begin=shard.checkpoints[0]))
