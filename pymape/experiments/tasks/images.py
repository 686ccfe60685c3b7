"""Images and a small ViT from scratch: scikit-learn's digits, an npz file, or folders of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig

from pymape.data.digits import load_digits, small_vit
from pymape.experiments.tasks.base import VALIDATION, Record, Split, Task, digest

__all__ = ["make_arrays", "make_digits", "make_folder"]

_ARRAYS = ("train_x", "train_y", "test_x", "test_y")


def make_digits(**options: Any) -> Task:
    """scikit-learn's digits: 60 % training, 16 % validation, 24 % test."""
    images, labels = load_digits()
    return _image_task(images, labels, None, None, **options)


def make_arrays(data: str, **options: Any) -> Task:
    """Images in an npz file: uint8 [N, H, W, C] `train_x` and `test_x`, integer [N] `train_y` and `test_y`.

    Raises:
        ValueError: arrays that are missing or of other types or shapes, labels that are not 0 to classes - 1.
    """
    parts = _arrays(data)
    for part in ("train", "test"):
        pixels, targets = parts[f"{part}_x"], parts[f"{part}_y"]
        if pixels.ndim != 4 or pixels.dtype != np.uint8:
            raise ValueError(f"{part}_x of task.data must be uint8 [N, H, W, C], got {pixels.dtype} {pixels.shape}")
        if targets.shape != pixels.shape[:1] or not np.issubdtype(targets.dtype, np.integer):
            raise ValueError(
                f"{part}_y of task.data must hold {len(pixels)} integers, got {targets.dtype} {targets.shape}"
            )
    classes = np.unique(parts["train_y"])
    if len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(f"train_y of task.data must have all of the labels 0 to classes - 1, got {classes.tolist()}")
    strange = np.setdiff1d(parts["test_y"], classes)
    if len(strange):
        raise ValueError(f"test_y of task.data must have labels that train_y has, got {strange.tolist()}")
    images = [_scaled(parts[name]) for name in ("train_x", "test_x")]
    labels = [torch.tensor(parts[name], dtype=torch.long) for name in ("train_y", "test_y")]
    return _image_task(images[0], labels[0], images[1], labels[1], **options)


def _arrays(path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in _ARRAYS if name in found}
    except (EOFError, OSError, TypeError, ValueError, BadZipFile) as error:  # TypeError: an npy file, one array alone
        raise ValueError(f"task.data must be an npz file of arrays, got {path!r}: {error}") from error
    missing = [name for name in _ARRAYS if name not in arrays]
    if missing:
        raise ValueError(f"task.data must hold the arrays {', '.join(_ARRAYS)}, got none named {missing[0]!r}")
    return arrays


def make_folder(data: str, size: int = 32, **options: Any) -> Task:
    """One folder of images a class, scaled to `size` x `size`: 60 % training, 16 % validation, 24 % test."""
    from PIL import Image

    names = sorted(path.name for path in Path(data).iterdir() if path.is_dir())
    if len(names) < 2:
        raise ValueError(f"task.data must hold a folder of images for each of at least two classes, got {names}")
    pixels, labels = [], []
    for label, name in enumerate(names):
        for path in sorted(path for path in (Path(data) / name).iterdir() if path.is_file()):
            with Image.open(path) as image:
                pixels.append(np.asarray(image.convert("RGB").resize((size, size))))
            labels.append(label)
    return _image_task(_scaled(np.stack(pixels)), torch.tensor(labels), None, None, **options)


def _scaled(pixels: np.ndarray) -> Tensor:
    """uint8 [N, H, W, C] -> fp32 [N, C, H, W] in [-1, 1]."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def _image_task(
    images: Tensor, labels: Tensor, test_images: Tensor | None, test_labels: Tensor | None, **model: Any
) -> Task:
    """A small ViT from scratch on images; without test images they are split off anew for each seed.

    Args:
        images: [N, C, H, H] fp32.
        labels: [N] in [0, classes).
        test_images: the same for the test.
        test_labels: theirs.
        model: options of `small_vit`.
    """
    from sklearn.model_selection import train_test_split

    classes = int(labels.max()) + 1
    shape = {"image_size": images.shape[-1], "num_channels": images.shape[1], "num_labels": classes}
    unknown = sorted(set(model) - set(ViTConfig().to_dict()))
    if unknown:
        raise ValueError(f"task.options must be arguments of ViTConfig, got {', '.join(unknown)}")

    def records(kind: str, rows: Sequence[int], source: Tensor, targets: Tensor) -> list[Record]:
        return [{"id": f"{kind}-{row:05}", "pixel_values": source[row], "labels": targets[row]} for row in rows]

    def split(seed: int) -> Split:
        def divide(rows: Sequence[int], share: float) -> tuple[list[int], list[int]]:
            return train_test_split(rows, test_size=share, random_state=seed, stratify=labels[list(rows)].numpy())

        everything = range(len(labels))
        if test_images is not None and test_labels is not None:
            kept, validation = divide(everything, VALIDATION)
            test = records("test", range(len(test_labels)), test_images, test_labels)
        else:
            kept, rest = divide(everything, 0.4)
            validation, last = divide(rest, 0.6)
            test = records("image", last, images, labels)
        return Split(records("image", kept, images, labels), records("image", validation, images, labels), test)

    def start(seed: int) -> PreTrainedModel:
        return small_vit(seed, **{**shape, **model})

    tensors = [tensor for tensor in (images, labels, test_images, test_labels) if tensor is not None]
    return Task(classes, digest(*(tensor.numpy().tobytes() for tensor in tensors)), split, start)
