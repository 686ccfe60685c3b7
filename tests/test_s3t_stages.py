"""Stage files: names, provenance, checksums, encoded records."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
import torch
from s3t_tools import make_records, same_tensors

from pymape.s3t.stages import (
    Provenance,
    StageKey,
    decode_row,
    encode_row,
    pack_stage,
    row_digest,
    slice_digest,
    unpack_stage,
)

KEY = StageKey(2, (3, 0, 1), 1)
TENSORS = {"b": torch.randn(3, 2), "a": torch.randn(2, 4, dtype=torch.float64), "c": torch.randn(5).bfloat16()}


def provenance(**changes) -> Provenance:
    fields = {
        "key": KEY,
        "base": "base",
        "config": "config",
        "seed": 2**63 - 1,
        "parent": "parent",
        "records": {0: "zero", 1: "one", 3: "three"},
        "environment": {"torch": "2"},
    }
    return Provenance(**(fields | changes))


@pytest.mark.parametrize("key", [KEY, StageKey(0, (0,)), StageKey(123, (11, 1), 10)])
def test_names_are_read_back(key: StageKey) -> None:
    assert StageKey.parse(key.name) == key
    assert key.depth == len(key.prefix)


@pytest.mark.parametrize(
    "name", ["", "shard2-0-g0", "shard02-0.-g0", "shard02-g0", "../shard02-0-g0", "shard02-0-g0\n"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"name must be a stage's, for instance 'shard02-3.0.1-g0', got"):
        StageKey.parse(name)


def test_a_name_has_no_other_reading() -> None:
    keys = [StageKey(m, prefix, g) for m in (1, 11) for prefix in ((1,), (11,), (1, 11), (11, 1)) for g in (1, 11)]
    assert len({key.name for key in keys}) == len(keys)


@pytest.mark.parametrize("prefix", [(), (1, 1)])
def test_a_prefix_holds_slices_once(prefix: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="prefix must hold one or more different slices, got"):
        StageKey(0, prefix)


def test_provenance_survives_json() -> None:
    assert Provenance.from_json(provenance().to_json()) == provenance()
    assert Provenance.from_json(provenance(parent=None).to_json()).parent is None
    for text in ("[]", "{}", '{"key": {"shard": 0}}'):
        with pytest.raises(ValueError, match="provenance must be one that this version wrote"):
            Provenance.from_json(text)
    with pytest.raises(ValueError, match=r"records must cover the slices \[0, 1, 3\], got \[0, 1\]"):
        provenance(records={0: "zero", 1: "one"})


def test_a_stage_is_read_back_bit_by_bit() -> None:
    content = pack_stage(TENSORS, provenance())
    tensors, found = unpack_stage(content, hashlib.sha256(content).hexdigest(), provenance())
    assert same_tensors(tensors, TENSORS)
    assert found == provenance()
    again = pack_stage(dict(reversed(TENSORS.items())), provenance(records={3: "three", 1: "one", 0: "zero"}))
    assert again == content
    assert unpack_stage(content, provenance=provenance(environment={}))[1] == provenance()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", StageKey(2, (3, 1, 0), 1)),
        ("base", "other"),
        ("config", "other"),
        ("seed", 1),
        ("parent", None),
        ("records", {0: "zero", 1: "other", 3: "three"}),
        ("environment", {"torch": "3"}),
    ],
)
def test_another_provenance_is_named(field: str, value: object) -> None:
    content = pack_stage(TENSORS, dataclasses.replace(provenance(), **{field: value}))
    with pytest.raises(ValueError, match=rf"shard02-3.0.1-g1 must have been made from {field} "):
        unpack_stage(content, provenance=provenance(), name=KEY.name)


def test_every_damaged_byte_is_noticed() -> None:
    content = pack_stage(TENSORS, provenance())
    sha256 = hashlib.sha256(content).hexdigest()
    for place in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[place] ^= 1
        with pytest.raises(ValueError, match=rf"{KEY.name} must have sha256 {sha256[:12]}, got a damaged"):
            unpack_stage(bytes(damaged), sha256, name=KEY.name)
    for cut in (0, 7, 8, 100, len(content) - 1):
        with pytest.raises(ValueError, match=f"{KEY.name} must be a safetensors file, got a damaged one"):
            unpack_stage(content[:cut], name=KEY.name)
    from safetensors.torch import save

    with pytest.raises(ValueError, match=r"stage must have format 'pymape.stage.1', got None"):
        unpack_stage(save(TENSORS))
    with pytest.raises(ValueError, match="stage must hold its provenance"):
        unpack_stage(save(TENSORS, {"pymape": '{"format": "pymape.stage.1", "provenance": {}}'}))


def test_the_digest_of_a_slice_depends_on_its_records_only() -> None:
    rows = [("b", "1"), ("a", "2"), ("c", "1")]
    assert slice_digest(rows) == slice_digest(sorted(rows))
    others = [rows[:2], [*rows, ("d", "1")], [("b", "2"), ("a", "1"), ("c", "1")], []]
    assert len({slice_digest(other) for other in [rows, *others]}) == 5


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_rows_are_read_back(family: str) -> None:
    for record in make_records(family, 4):
        content = encode_row(record)
        row = decode_row(content)
        assert sorted(row) == sorted(record.keys() - {"id"})
        assert all(torch.equal(value, torch.tensor(record[name])) for name, value in row.items())
        # The same record in another form and order of its fields, under another id.
        other = {name: np.array(record[name]) for name in reversed(record)} | {"id": 7}
        assert encode_row(other) == content
        assert row_digest(encode_row(other)) == hashlib.sha256(content).hexdigest()
        assert encode_row(record | {"labels": 1 if family == "vit" else [1, 2, 1]}) != encode_row(
            record | {"labels": 0 if family == "vit" else [1, 2, 0]}
        )


def test_what_a_row_holds() -> None:
    record = {
        "label": True, "text": "words", "words": ["two", "words"], "nothing": None,
        "pixel_values": [[0.1, 1], [2, 3]], "half": torch.ones(2, dtype=torch.float16),
    }  # fmt: skip
    row = decode_row(encode_row(record))
    assert {name: value.dtype for name, value in row.items()} == {
        "half": torch.float16, "labels": torch.int64, "pixel_values": torch.float32,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"record must hold numbers to train on, got the fields \['id', 'text'\]"):
        encode_row({"id": 3, "text": "words"})
    with pytest.raises(ValueError, match="input_ids must be a number or an array, got a list of uneven length"):
        encode_row({"input_ids": [[1, 2], [3]]})
    with pytest.raises(ValueError, match="row must be an encoded record, got damaged bytes"):
        decode_row(encode_row(record)[:-1])
