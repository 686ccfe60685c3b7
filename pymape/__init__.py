"""Machine unlearning for Transformers: MAPE-Unlearn masks and S3T exact deletion."""

from __future__ import annotations

import importlib
from typing import Any

# These two functions share their names with the modules that define them, so they are bound here, before anything can
# import the submodules first. Both modules need torch alone.
from pymape.importance import importance
from pymape.search import search
from pymape.version import __version__

# Public name -> module that defines it. Nothing here is imported before it is used: `import pymape` stays cheap and
# needs neither transformers nor triton.
_EXPORTS = {
    "Architecture": "architectures",
    "FrozenPrefix": "frozen_prefix",
    "Importance": "importance",
    "MaskedFeedForward": "layers",
    "MaskedMultiheadAttention": "layers",
    "ModelLayout": "model_layout",
    "ModuleMasks": "masks",
    "PartialParameters": "partial",
    "Sophia": "objectives.sophia",
    "StopWhenForgotten": "trainer.stopping",
    "PrefixCache": "prefix_cache",
    "UnlearnSession": "session",
    "UnlearnTrainer": "trainer",
    "apply_delta": "delta",
    "apply_masks": "modules",
    "evaluate_candidates": "learned_gates",
    "gates": "modules",
    "instrument": "modules",
    "is_instrumented": "modules",
    "layout": "model_layout",
    "learn_gates": "learned_gates",
    "register_architecture": "architectures",
    "restore": "modules",
    "selected_weight_grad": "ops",
    "set_gates": "modules",
}

__all__ = ["__version__", "importance", "search", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pymape' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pymape.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
