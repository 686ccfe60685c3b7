"""The registry of unlearning objectives."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

import torch

__all__ = ["Objective", "get_objective", "objective", "objective_names"]

Need = Literal["required", "optional", "unused"]
Reference = Literal["nll", "unseen", "unseen_tokens", "log_probs", "activations"]


@dataclass(frozen=True)
class Objective:
    """An unlearning objective and what it needs.

    Args:
        name: its name in the registry.
        function: `Step` -> scalar loss; or, if `one_shot`, `OneShot` -> one update per trained parameter. Its
            keyword-only parameters are its options.
        forget: whether it reads the forget set.
        retain: whether it reads the retain set.
        retain_term: whether it weighs the retain set by `Step.retain_loss`, so that "nll" or "kl" may be chosen.
        reference: what it needs of the original model: "nll" (summed NLL of each forget record, and of its
            alternative), "unseen" or "unseen_tokens" (the losses that forget records or their tokens are to have, by
            those of unseen ones), "log_probs" (of the retain records' labelled tokens), "activations" (of the retain
            records, at the layer that its option `layer` names).
        alternative: whether forget records must give an alternative answer.
        one_shot: computed once over the whole sets instead of being minimised step by step.
        optimizer: what it is stepped with, where the user names no optimizer; such an objective has an option `loss`,
            the objective that is minimised.
        options: values of its options, and of its optimizer's.
        positive, not_negative: its options that must be.
    """

    name: str
    function: Callable[..., Any]
    forget: bool
    retain: Need
    retain_term: bool
    reference: frozenset[Reference]
    alternative: bool
    one_shot: bool
    optimizer: type[torch.optim.Optimizer] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    positive: frozenset[str] = frozenset()
    not_negative: frozenset[str] = frozenset()

    def with_options(self, options: Mapping[str, Any]) -> Objective:
        """The same objective with values for its options.

        Raises:
            ValueError: an option that it does not have, one without a default that is not given, or a value that is no
                number of the annotated type or out of range.
        """
        if self.optimizer is not None:
            return self._with_loss(options, self.optimizer)
        known = _options(self.function)
        _check_known(self.name, options, known)
        missing = [
            name for name, default in known.items() if default is inspect.Parameter.empty and name not in options
        ]
        if missing:
            raise ValueError(
                f"objective_options must have {missing[0]!r} for objective {self.name!r}, got {dict(options)}"
            )
        _check_numbers(self.function, options)
        for name in options.keys() & (self.positive | self.not_negative):
            value, positive = options[name], name in self.positive
            if value < 0 or (positive and value == 0):
                expected = "> 0" if positive else ">= 0"
                raise ValueError(f"objective_options.{name} must be {expected}, got {value}")
        return replace(self, function=partial(self.function, **options), options={**known, **options})

    @property
    def needs_unseen(self) -> bool:
        """Whether it reads records that the model has never seen."""
        return not self.reference.isdisjoint({"unseen", "unseen_tokens"})

    def check_retain(self, retain: str) -> None:
        """Refuse a retain term that the objective would ignore.

        Raises:
            ValueError: neither "nll" nor "kl", or "kl" for an objective that leaves no choice.
        """
        if retain not in ("nll", "kl"):
            raise ValueError(f"retain must be 'nll' or 'kl', got {retain!r}")
        if retain == "kl" and not self.retain_term:
            raise ValueError(
                f"retain must be 'nll' for objective {self.name!r}, which has no such retain term, got 'kl'"
            )

    def _with_loss(self, options: Mapping[str, Any], optimizer: type[torch.optim.Optimizer]) -> Objective:
        """Sort the options of a loss that is stepped with an optimizer of its own: whose is which?"""
        inner = get_objective(options.get("loss", _options(self.function)["loss"].__name__))
        if inner.one_shot or inner.optimizer is not None:
            raise ValueError(f"loss of objective {self.name!r} must be one that is minimised, got {inner.name!r}")
        tunable: dict[str, Any] = {
            name: default for name, default in _options(optimizer).items() if name not in ("lr", "weight_decay")
        }
        _check_known(self.name, options, {"loss": None, **tunable, **_options(inner.function)})
        of_optimizer = {name: options[name] for name in tunable if name in options}
        _check_numbers(optimizer, of_optimizer)
        optimizer([torch.nn.Parameter(torch.zeros(1))], **{"lr": 0.0, **of_optimizer})  # refuses what is out of range
        inner = inner.with_options({k: v for k, v in options.items() if k != "loss" and k not in tunable})
        return replace(
            inner,
            name=self.name,
            function=partial(self.function, loss=inner.function),
            optimizer=optimizer,
            options={"loss": inner.name, **inner.options},
            optimizer_options=of_optimizer,
        )


_OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str,
    *,
    forget: bool = True,
    retain: Need = "unused",
    retain_term: bool = False,
    reference: Iterable[Reference] = (),
    alternative: bool = False,
    one_shot: bool = False,
    optimizer: type[torch.optim.Optimizer] | None = None,
    positive: Iterable[str] = (),
    not_negative: Iterable[str] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as an unlearning objective.

    Example:
        @objective("hinge", retain="required", retain_term=True)
        def hinge(step, *, ceiling=4.0):
            return (ceiling - step.forget.loss()).relu() + step.retain_loss()

    Args:
        name: what `UnlearnTrainer(objective=...)` is to call it.
        forget, retain, retain_term, reference, alternative, one_shot, optimizer, positive, not_negative: see
            `Objective`.

    Raises:
        ValueError: another function has that name, or reference activations are needed but there is no option `layer`.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        known = _OBJECTIVES.get(name)
        # The same function again is a module that was reloaded, or a notebook cell that was run twice.
        if known is not None and _origin(known.function) != _origin(function):
            raise ValueError(f"objective name must be new, got {name!r} of {'.'.join(_origin(known.function))}")
        needed = frozenset(reference)
        if "activations" in needed and "layer" not in _options(function):
            raise ValueError(f"objective {name!r} must have an option layer to get reference activations, got none")
        _OBJECTIVES[name] = Objective(
            name, function, forget, retain, retain_term, needed, alternative, one_shot, optimizer,
            positive=frozenset(positive), not_negative=frozenset(not_negative),
        )  # fmt: skip
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


def _options(function: Any) -> dict[str, Any]:
    """Keyword-only parameters of a function or class, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def _check_numbers(function: Any, options: Mapping[str, Any]) -> None:
    """Refuse values that are not what a function's or class's annotations `int` and `float` say."""
    parameters = inspect.signature(function).parameters
    for name, value in options.items():
        kind = getattr(parameters[name].annotation, "__name__", parameters[name].annotation)
        number = isinstance(value, Real) and not isinstance(value, bool)
        if kind == "int" and not (number and isinstance(value, Integral)):
            raise ValueError(f"objective_options.{name} must be an integer, got {value!r}")
        if kind == "float" and not (number and math.isfinite(value)):
            raise ValueError(f"objective_options.{name} must be a finite number, got {value!r}")


def _check_known(name: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    unknown = sorted(set(options) - set(known))
    if unknown:
        expected = f"be among {', '.join(known)}" if known else "be empty"
        raise ValueError(f"objective_options must {expected} for objective {name!r}, got {', '.join(unknown)}")
