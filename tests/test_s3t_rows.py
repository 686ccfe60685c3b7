"""Records as the batches that stages are trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from model_zoo import tiny_model
from s3t_tools import setting

from pymape.s3t.config import StageConfig
from pymape.s3t.rows import RecordCheck, stack_rows
from pymape.s3t.stages import decode_row, encode_row


@pytest.mark.parametrize("family", ["bert", "vit", "llama"])
def test_records_are_checked_before_they_are_ingested(family: str, tmp_path: Path) -> None:
    config, slices = setting(tmp_path, family)
    check = RecordCheck(config)
    good = slices[0][0]
    assert check(good, "r0") == encode_row(good)
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {name: value for name, value in good.items() if name != "labels"},
            "fields must be those of the other records",
        ),
        ({**good, "more": 1}, "fields must be those of the other records"),
    ]
    if family == "vit":
        wrong += [({**good, "pixel_values": [[[0.0]]]}, "pixel_values must be .* as in the other records")]
        for value, read in ((float("nan"), "nan"), (float("-inf"), "-inf"), (1e39, "inf")):  # beyond fp32
            pixels = torch.tensor(good["pixel_values"], dtype=torch.float64)
            pixels[0, 1, 2] = value
            expected = f"pixel_values must be finite, got {read} among {pixels.numel()} values"
            wrong += [({**good, "pixel_values": pixels}, expected)]
    else:
        wrong += [
            ({**good, "input_ids": []}, "input_ids must be a list of at least one token"),
            ({**good, "input_ids": [1, 50]}, r"input_ids must lie in \[0, 50\), got values from 1 to 50"),
        ]
    for record, message in wrong:
        with pytest.raises(ValueError, match=f"record 'bad': {message}"):
            check(record, "bad")
    assert check(good, "r0") == encode_row(good)
    label = 7 if family != "llama" else [99] * len(good["labels"])
    with pytest.raises(ValueError, match=r"labels must be in \[0, .*\), got .* for id 'bad'"):
        check({**good, "labels": label}, "bad")
    if family == "llama":
        with pytest.raises(ValueError, match="labels must have a value for each of"):
            check({**good, "labels": 1}, "bad")
    if family == "bert":
        long = dataclasses.replace(config, stage=StageConfig(max_length=65))
        with pytest.raises(ValueError, match="max_length must be at most 64 for this model, got 65"):
            RecordCheck(long)(good, "r0")


def test_texts_are_cut_and_padded() -> None:
    model = tiny_model("llama")
    rows = [decode_row(encode_row({"input_ids": ids, "labels": ids})) for ids in ([3, 4, 5, 6], [7], [8, 9])]
    batch = stack_rows(model, rows, 3)
    assert batch["input_ids"].tolist() == [[3, 4, 5], [7, 0, 0], [8, 9, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert batch["labels"].tolist() == [[3, 4, 5], [7, -100, -100], [8, 9, -100]]
    # A label per class is no label per token, even where there are as many.
    model = tiny_model("bert", "multi_label")
    rows = [decode_row(encode_row({"input_ids": [3] * n, "labels": [1.0, 0.0, 1.0]})) for n in (3, 2)]
    assert stack_rows(model, rows, 4)["labels"].tolist() == [[1, 0, 1], [1, 0, 1]]
