"""Errors that a caller may want to tell from others, and the check of options against their ranges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["NotFinite", "NothingSelected", "check_ranges"]


class NotFinite(ValueError):
    """A loss, a parameter or a model's output became NaN or infinite, as by too large a learning rate."""


class NothingSelected(ValueError):
    """Masks, or the search for them, leave nothing to train."""


def check_ranges(ranges: Mapping[str, tuple[Any, bool, str]], prefix: str = "") -> None:
    """Refuse the first option that is out of range.

    Args:
        ranges: name -> value, whether it is valid, what is expected.
        prefix: of the names.

    Raises:
        ValueError: naming it, the expectation and the value.
    """
    for name, (value, valid, expected) in ranges.items():
        if not valid:
            raise ValueError(f"{prefix}{name} must be {expected}, got {value}")
