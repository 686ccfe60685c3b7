"""Experiments' own data: images in arrays and folders, texts in tables."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from session_tools import write_files
from transformers import BertConfig, BertModel, BertTokenizer

from pymape.experiments.config import (
    TaskConfig,
)
from pymape.experiments.tasks import make_task, train


def test_arrays_and_image_folders(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8), np.arange(40) % 2
    np.savez(tmp_path / "a.npz", train_x=pixels[:30], train_y=labels[:30], test_x=pixels[30:], test_y=labels[30:])
    for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        (tmp_path / "images" / f"class{label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "images" / f"class{label}" / f"{row:02}.png")
    arrays = make_task(TaskConfig("arrays", data=str(tmp_path / "a.npz"), options={"num_hidden_layers": 1}))
    folder = make_task(TaskConfig("folder", data=str(tmp_path / "images"), options={"size": 8}))
    split = arrays.split(0)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [24, 6, 10]
    assert torch.equal(split.test[0]["pixel_values"], torch.tensor(pixels[30]).permute(2, 0, 1) / 127.5 - 1)
    others = folder.split(0)
    assert [len(part) for part in (others.train, others.validation, others.test)] == [24, 6, 10]
    found = {bytes((((r["pixel_values"] + 1) * 127.5).round().byte()).numpy().tobytes()) for r in others.test}
    assert found <= {image.transpose(2, 0, 1).tobytes() for image in pixels}
    model = arrays.start(0)
    assert train(model, split.train, TaskConfig("arrays", epochs=1, batch_size=8), 0) > 0
    assert arrays.fingerprint != folder.fingerprint
    with pytest.raises(ValueError, match="arguments of ViTConfig, got wrong"):
        make_task(TaskConfig("folder", data=str(tmp_path / "images"), options={"wrong": 1}))
    with pytest.raises(ValueError, match="must be an existing path for task 'arrays', got None"):
        make_task(TaskConfig("arrays"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_y": None}, "must hold the arrays train_x, train_y, test_x, test_y, got none named 'test_y'"),
        (
            {"train_x": np.zeros((6, 8, 8), np.uint8)},
            "train_x of task.data must be uint8 [N, H, W, C], got uint8 (6, 8, 8)",
        ),
        (
            {"test_x": np.zeros((4, 8, 8, 3))},
            "test_x of task.data must be uint8 [N, H, W, C], got float64 (4, 8, 8, 3)",
        ),
        ({"test_y": np.arange(3)}, "test_y of task.data must hold 4 integers, got int64 (3,)"),
        ({"test_y": np.arange(4) / 2}, "test_y of task.data must hold 4 integers, got float64 (4,)"),
        (
            {"train_y": np.arange(6) % 2 * 2},
            "train_y of task.data must have all of the labels 0 to classes - 1, got [0, 2]",
        ),
        (
            {"train_y": np.zeros(6, np.int64)},
            "train_y of task.data must have all of the labels 0 to classes - 1, got [0]",
        ),
        ({"test_y": np.arange(4)}, "test_y of task.data must have labels that train_y has, got [2, 3]"),
    ],
)
def test_arrays_that_cannot_be_used_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {f"{part}_x": np.zeros((count, 8, 8, 3), np.uint8) for part, count in (("train", 6), ("test", 4))}
    arrays |= {"train_y": np.arange(6) % 2, "test_y": np.arange(4) % 2, **change}
    np.savez(tmp_path / "a.npz", **{name: values for name, values in arrays.items() if values is not None})
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task(TaskConfig("arrays", data=str(tmp_path / "a.npz")))


def test_files_that_hold_no_arrays_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, train_x=np.zeros(100))
    whole = path.read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    for content in (b"", whole[:-30], b"text", (tmp_path / "one.npy").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^task\.data must be an npz file of arrays, got '.*a\.npz': "):
            make_task(TaskConfig("arrays", data=str(path)))


def test_texts_with_a_pretrained_encoder(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", '"']
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "encoder")
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    BertModel(BertConfig(vocab_size=len(words), **tiny)).save_pretrained(tmp_path / "encoder")
    for name, count in (("train.tsv.gz", 20), ("dev.tsv.gz", 4)):
        with gzip.open(tmp_path / name, "wt") as file:
            file.writelines(f'"{word} film\t{label}\n' for word, label in [("good", 1), ("bad", 0)] * (count // 2))
    files = {"train": "train.tsv.gz", "test": "dev.tsv.gz", "text": 0, "label": 1, "header": False, "records": 10}
    few = make_task(TaskConfig("table", str(tmp_path), str(tmp_path / "encoder"), {**files, "test_records": 2})).split(
        0
    )
    assert [record["labels"] for record in few.test] in ([1, 0], [0, 1])
    config = TaskConfig("table", str(tmp_path), str(tmp_path / "encoder"), files, epochs=1, batch_size=4)
    task = make_task(config)
    split = task.split(0)
    assert [len(part) for part in (split.train, split.validation, split.test)] == [8, 2, 4]
    assert split.test[0]["input_ids"] == [2, 8, 5, 7, 3]  # [CLS] " good film [SEP]
    assert [record["labels"] for record in split.test] == [1, 0, 1, 0]
    one, other = task.start(0), task.start(0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for model in (one, other):
        train(model, split.train, config, 0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("text,label\n", None, "train.csv must hold at least one row, got none"),
        (None, "text,label\n", "test.csv must hold at least one row, got none"),
        ("text,label\nw1,a\nw2,\n", None, "train.csv must have a label in every row, got none in row 2"),
        ("text,label\nwell, w1,a\n", None, "task.data must have 2 fields in every row, got 3 in line 2 of"),
        ("text,label\nw1\n", None, "task.data must have 2 fields in every row, got 1 in line 2 of"),
        ('text,label\n"w1,a\n', None, "task.data must be readable as csv, got "),
        (b"text,label\nw\xe9,a\n", None, "task.data must hold text files, got "),
        ("", None, "task.data must start with a header line, got the empty file"),
        ("text,label\nw1,a\nw2,a\n", None, "train.csv must hold at least two labels, got 'a' only"),
        ("text,label\nw1,a\nw2,a\nw3,b\n", None, "got {'a': 2, 'b': 1}: "),
    ],
)
def test_tables_that_cannot_be_used_are_named(
    tmp_path: Path, train: str | bytes | None, test: str | None, message: str
) -> None:
    write_files(tmp_path)
    rows = "text,label\n" + "w1 w2,a\nw3,b\n" * 10
    for name, content in (("train", train), ("test", test)):
        text = rows if content is None else content
        (tmp_path / f"{name}.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    options = {"train": "train.csv", "test": "test.csv"}
    with pytest.raises(ValueError, match=re.escape(message)):
        make_task(TaskConfig("table", str(tmp_path), str(tmp_path / "model"), options)).split(0)


def test_a_classifier_of_other_classes_gets_a_new_head(tmp_path: Path) -> None:
    write_files(tmp_path)  # its model has three
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "w1 w2,a\nw3,b\n" * 10)
    options = {"train": "train.csv", "test": "test.csv"}
    task = make_task(TaskConfig("table", str(tmp_path), str(tmp_path / "model"), options))
    assert task.start(0).config.num_labels == task.classes == 2
    state = torch.get_rng_state()
    make_task(TaskConfig("table", str(tmp_path), str(tmp_path / "model"), {**options, "max_length": 128}))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="max_length must be at most 128 for this model, got 129"):
        make_task(TaskConfig("table", str(tmp_path), str(tmp_path / "model"), {**options, "max_length": 129}))
