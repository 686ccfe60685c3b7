"""Where a crash could come between two durable steps. Tests kill the process there."""

from __future__ import annotations

__all__ = ["checkpoint"]


def checkpoint(name: str) -> None:
    """Do nothing; the kill harness puts a function in this one's place.

    Args:
        name: the step that begins or has just ended here, for instance "tombstone: committed".
    """
