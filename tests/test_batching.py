"""Records on their way into batches and pairs: ids of any kind, labels by any name, and records that do not fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from model_zoo import tiny_model
from torch.utils.data import IterableDataset

from pymape import importance
from pymape.data.batching import PaddingCollator, RecordBatches
from pymape.trainer.pairing import PairCollator, check_set, checked_sets, holds_all, record_ids


def texts(count: int = 3, **fields: Any) -> list[dict[str, Any]]:
    return [{"id": f"r{row}", "input_ids": [4, 5, 6 + row], "labels": row % 2, **fields} for row in range(count)]


@pytest.mark.parametrize("values", [[7, 8], torch.tensor([7, 8]), np.array([7, 8]), np.array(["7", "8"])])
def test_ids_of_any_kind_are_texts(values: Any) -> None:
    rows = [{**row, "id": value} for row, value in zip(texts(2), values, strict=True)]
    assert record_ids(rows) == ["7", "8"]
    assert [ids for _, ids, _ in RecordBatches(rows)] == [["7", "8"]]
    with pytest.raises(ValueError, match=r"must not overlap, got 1 ids in both: \['8'\]"):
        checked_sets(rows, [{**texts(1)[0], "id": "8"}])
    assert importance(tiny_model("bert"), texts(2), ids=values).ids == ["7", "8"]


@pytest.mark.parametrize("format", [None, "numpy", "torch"])
@pytest.mark.parametrize("columns", [None, ["input_ids", "labels"]])
def test_ids_of_a_data_set_are_known_in_every_format(format: str | None, columns: list[str] | None) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "id": number} for number, row in enumerate(texts())]
    data = datasets.Dataset.from_list(rows).with_format(format, columns=columns)
    assert ("id" in data[0]) == (columns is None)
    assert record_ids(data) == ["0", "1", "2"]
    with pytest.raises(ValueError, match="must not overlap, got 3 ids in both"):
        checked_sets(data, data)


class Sized(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Sized(), "forget_dataset must be a map-style data set, got Sized"),
        ([], "forget_dataset must hold at least one record, got an empty set"),
        ("abc", "forget_dataset must hold dicts as records, got str"),
        ([1, 2], "forget_dataset must hold dicts as records, got int"),
    ],
)
def test_what_is_no_set(dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_set("forget_dataset", dataset)


def test_ids_must_be_unique_and_everywhere_or_nowhere() -> None:
    with pytest.raises(ValueError, match=r"ids of retain_dataset must be unique, got \['r0'\] more than once"):
        checked_sets(None, [*texts(), texts()[0]])
    half = [texts()[0], {"input_ids": [1], "labels": 0}]
    message = r"records must have an id, all or none of them, got one with \['input_ids', 'labels'\]"
    for rows in (half, half[::-1]):
        with pytest.raises(ValueError, match=message):
            next(iter(RecordBatches(rows)))
    with pytest.raises(ValueError, match=message):
        checked_sets(half, None)


@pytest.mark.parametrize("names", [("label", "labels"), ("labels", "label"), ("labels", "label_ids", "label")])
def test_labels_come_before_label_as_in_transformers(names: tuple[str, ...]) -> None:
    values = {"labels": 2, "label": 1, "label_ids": 0}
    batch = PaddingCollator()([{"input_ids": [1], **{name: values[name] for name in names}}])
    assert batch["labels"].tolist() == [2]
    assert not {"label", "label_ids"} & batch.keys()
    assert PaddingCollator()([{"input_ids": [1], "label_ids": 0, "label": 1}])["labels"].tolist() == [1]
    assert PaddingCollator()([{"input_ids": [1], "labels": None, "label": 1}])["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": []}, r"input_ids must be numbers in every record, got \[\] for id 'r1'"),
        ({"input_ids": torch.empty(0, dtype=torch.long)}, r"input_ids must be numbers .* for id 'r1'"),
        ({"labels": None}, "labels must be numbers in every record, got None for id 'r1'"),
        ({"labels": "positive"}, "labels must be numbers in every record, got 'positive' for id 'r1'"),
        ({"weights": [1.0, None]}, r"weights must be numbers in every record, got \[1.0, None\] for id 'r1'"),
        ({"labels": [0, 1]}, r"labels must have shape \(\), got \(2,\) for id 'r1'"),
        ({"token_type_ids": [0, 0]}, r"token_type_ids must have shape \(3,\), got \(2,\) for id 'r1'"),
        ({"input_ids": [[4, 5, 6]]}, r"records must be single, .* got input_ids of shape \(1, 3\) for id 'r1'"),
    ],
)
def test_a_record_that_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    rows = texts(token_type_ids=[0, 0, 0], weights=[0.5, 0.5])
    rows[1] |= change
    with pytest.raises(ValueError, match=message) as error:
        PairCollator(PaddingCollator())([{"forget": (number, row)} for number, row in enumerate(rows)])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message):
        list(RecordBatches(rows, bucket=False))
    with pytest.raises(ValueError, match=message.replace("id 'r1'", "record 1 of the batch")):
        PaddingCollator()(rows)


@pytest.mark.parametrize("place", [0, 2])
def test_a_field_that_one_record_lacks(place: int) -> None:
    rows = texts(token_type_ids=[0, 0, 0])
    del rows[place]["token_type_ids"]
    with pytest.raises(ValueError, match=f"token_type_ids must be numbers in every record, got none for id 'r{place}'"):
        list(RecordBatches(rows))
    del rows[place]["input_ids"]
    with pytest.raises(ValueError, match=f"input_ids must be a list of tokens .*, got None for id 'r{place}'"):
        RecordBatches([rows[1], rows[place]])
    with pytest.raises(ValueError, match=f"input_ids must be numbers in every record, got none for id 'r{place}'"):
        list(RecordBatches([rows[place], rows[1]]))


def test_an_image_with_a_batch_dimension() -> None:
    with pytest.raises(ValueError, match=r"without a batch dimension, got pixel_values of shape \(1, 3, 8, 8\)"):
        PaddingCollator()([{"pixel_values": torch.zeros(1, 3, 8, 8), "labels": 0}])


def test_records_are_compared_by_their_inputs() -> None:
    rows = texts(4)
    others = [{**row, "id": "x", "labels": 1, "input_ids": torch.tensor(row["input_ids"])} for row in rows]
    assert holds_all(rows[:2], others[2:], others[:2])
    assert not holds_all(rows, others[:2])
    assert not holds_all([*rows, {"input_ids": [1, 2, 3]}], others)
