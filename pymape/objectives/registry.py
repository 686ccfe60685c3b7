"""The registry of unlearning objectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Objective", "get_objective", "objective", "objective_names"]

Need = Literal["required", "optional", "unused"]
Reference = Literal["nll", "log_probs"]


@dataclass(frozen=True)
class Objective:
    """An unlearning objective and what it needs.

    Args:
        name: its name in the registry.
        function: `Step` -> scalar loss; or, if `one_shot`, `OneShot` -> one update per trained parameter.
        forget: whether it reads the forget set.
        retain: whether it reads the retain set.
        reference: what it needs of the original model: "nll" (summed NLL of each forget record), "log_probs" (of the
            retain records' labelled tokens).
        one_shot: computed once over the whole sets instead of being minimised step by step.
    """

    name: str
    function: Callable[[Any], Any]
    forget: bool
    retain: Need
    reference: frozenset[Reference]
    one_shot: bool


_OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str,
    *,
    forget: bool = True,
    retain: Need = "unused",
    reference: Iterable[Reference] = (),
    one_shot: bool = False,
) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Register the decorated function as an unlearning objective.

    Example:
        @objective("hinge", retain="required")
        def hinge(step):
            return (4 - step.forget.loss()).relu() + step.alpha * step.retain.loss()

    Args:
        name: what `UnlearnTrainer(objective=...)` is to call it.
        forget, retain, reference, one_shot: see `Objective`.

    Raises:
        ValueError: another function has that name.
    """

    def register(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
        known = _OBJECTIVES.get(name)
        # The same function again is a module that was reloaded, or a notebook cell that was run twice.
        if known is not None and _origin(known.function) != _origin(function):
            raise ValueError(f"objective name must be new, got {name!r} of {'.'.join(_origin(known.function))}")
        _OBJECTIVES[name] = Objective(name, function, forget, retain, frozenset(reference), one_shot)
        return function

    return register


def get_objective(name: str) -> Objective:
    """Look an objective up by its name.

    Raises:
        ValueError: no objective has that name.
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(objective_names())}, got {name!r}")
    return _OBJECTIVES[name]


def objective_names() -> list[str]:
    """The names of all registered objectives."""
    return sorted(_OBJECTIVES)


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, function.__qualname__
