"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["aligned"]


def aligned(table: Sequence[Sequence[str]], labels: int = 1) -> list[str]:
    """Lines of a table in columns two spaces apart: the first `labels` left, the others, numbers, right."""
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    lines = []
    for line in table:
        cells = zip(line, widths, strict=True)
        lines.append(
            "  ".join(f"{cell:<{width}}" if i < labels else f"{cell:>{width}}" for i, (cell, width) in enumerate(cells))
        )
    return [line.rstrip() for line in lines]
