"""S3T: exact unlearning by construction. A deletion switches off every adapter that learned from the record."""

from __future__ import annotations

import importlib
from typing import Any

# Public name -> module that defines it; nothing is imported before it is used.
_EXPORTS = {
    "S3T": "system",
    "Ensemble": "ensemble",
    "LoraConfig": "config",
    "S3TConfig": "config",
    "StageConfig": "config",
    "choose_sequences": "sequences",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pymape.s3t' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pymape.s3t.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
