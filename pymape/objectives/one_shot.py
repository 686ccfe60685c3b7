"""What an objective sees that is computed once, over the whole sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pymape.processes import add_up, together

__all__ = ["OneShot", "RecordGradients", "fisher_diagonal"]


class RecordGradients:
    """The gradient of every record's own loss for each of some parameters; what can be had of them is sums.

    The records may be divided among processes. Each goes through its own, one record at a time, and all get the sum
    over all of them.

    Args:
        parameters: what the gradients are taken for.
        own: goes through this process's records; called for every sum anew.
        size: number of records of all processes.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], own: Callable[[], Iterable[Sequence[Tensor]]], size: int
    ) -> None:
        self._parameters, self._own, self._size = parameters, own, size

    def __len__(self) -> int:
        return self._size

    def sum(self, term: Callable[[Sequence[Tensor]], Iterable[Tensor]]) -> list[Tensor]:
        """Return sum_n term(g_n) in fp64, one tensor for each parameter and of its shape.

        Args:
            term: what a record adds, from its gradients.

        Raises:
            ValueError: as computing a gradient does, in every process.
        """
        totals = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in self._parameters]
        with together():
            for gradients in self._own():
                for total, entries in zip(totals, term(gradients), strict=True):
                    total += entries
        add_up(totals)
        return totals


@dataclass(frozen=True)
class OneShot:
    """The whole forget and retain sets, for an objective that is computed once.

    Args:
        parameters: the trained parameters.
        forget_gradients, retain_gradients: for every record, the gradient of its own loss for each of `parameters`.
        gamma: damping.
        metrics: figures that the objective wants logged.
    """

    parameters: list[nn.Parameter]
    forget_gradients: RecordGradients
    retain_gradients: RecordGradients
    gamma: float
    metrics: dict[str, float] = field(default_factory=dict)


def fisher_diagonal(gradients: RecordGradients) -> list[Tensor]:
    """Diagonal of the empirical Fisher, (1 / N) sum_n g_n^2, in fp64 for each parameter."""
    totals = gradients.sum(lambda of_record: (gradient.double().square() for gradient in of_record))
    return [total / len(gradients) for total in totals]
