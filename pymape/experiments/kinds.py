"""The kinds of task, and what is known of each without loading its data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["KINDS", "TaskKind"]


@dataclass(frozen=True)
class TaskKind:
    """Traits of a kind of task.

    Args:
        grouped: records come in groups (articles, authors) and not in classes.
        alternatives: records have alternative answers.
        bucketed: training batches hold records of similar length; the others' stay what published results were
            computed with.
        accuracy: what accuracy means, where it is not that of classes.
    """

    grouped: bool = False
    alternatives: bool = False
    bucketed: bool = False
    accuracy: str = ""


KINDS = {
    "digits": TaskKind(),
    "arrays": TaskKind(),
    "folder": TaskKind(),
    "table": TaskKind(),
    "questions": TaskKind(
        grouped=True, bucketed=True,
        accuracy="share of the questions whose answer is found from its first to its last token",
    ),
    "tofu": TaskKind(
        grouped=True, alternatives=True, bucketed=True,
        accuracy="share of an answer's tokens that are the likeliest after those before them",
    ),
}  # fmt: skip
