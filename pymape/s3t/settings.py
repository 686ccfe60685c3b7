"""How the ledger of a system keeps its options."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pymape.s3t.config import LoraConfig, S3TConfig, StageConfig

__all__ = ["placed", "read_settings", "settings_of"]

_IDS, _NORMAL = "ids", "NFC"  # noted in the folder: what ids are hashed, those that `read_identifier` makes normal


def settings_of(config: S3TConfig) -> dict[str, Any]:
    """What a new ledger keeps of a system's options."""
    return dataclasses.asdict(config) | {_IDS: _NORMAL}


def read_settings(settings: Mapping[str, Any], folder: Path) -> tuple[S3TConfig, bool]:
    """The options of the system in a folder, and whether its ids are hashed in their normal form.

    Raises:
        KeyError, TypeError: they are those of another version.
    """
    kept = dict(settings)
    normal = kept.pop(_IDS, None) == _NORMAL
    folders = (folder, os.path.realpath(folder))  # a link's own neighbours, or those of what it leads to
    places = [os.path.normpath(os.path.join(folder, kept["model"])) for folder in folders]
    kept["model"] = next((place for place in places if os.path.isdir(place)), places[0])
    lora, stage = LoraConfig(**kept.pop("lora")), StageConfig(**kept.pop("stage"))
    return S3TConfig(**kept, lora=lora, stage=stage), normal


def placed(model: str, folder: str | os.PathLike[str]) -> str:
    """The path of a base as the ledger keeps it: relative where it lies beside the system, to be moved with it."""
    path, system = os.path.abspath(model), os.path.abspath(folder)
    beside = os.path.commonpath([path, system]) == os.path.dirname(system)
    return os.path.relpath(path, system) if beside else path
