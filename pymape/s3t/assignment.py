"""Assignment in exact integers, ties broken lexicographically."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np

__all__ = ["best_assignment"]


def best_assignment(weights: list[list[int | None]]) -> list[int]:
    """Column of every row in the perfect matching of largest total weight, the lexicographically first among equals.

    SciPy finds the best matching as far as fp64 can see; exchanges that gain in exact integers lead on from there,
    since the weights may differ by more orders of magnitude than a float has digits.

    Args:
        weights: [n, n] integers of at least 0, of any size; None where the row must not take the column.

    Returns:
        n columns, one for each row.

    Raises:
        ValueError: there is no perfect matching.
    """
    from scipy.optimize import linear_sum_assignment

    size = len(weights)
    scale = max(w for row in weights for w in row if w is not None) or 1
    rounded = [[-math.inf if w is None else w / scale for w in row] for row in weights]
    columns = [int(column) for column in linear_sum_assignment(np.array(rounded), maximize=True)[1]]
    # Of the size^size numbers whose digits are the columns, the order is the lexicographic one: they break the ties.
    exact = [
        [None if w is None else w * size**size - column * size ** (size - 1 - i) for column, w in enumerate(row)]
        for i, row in enumerate(weights)
    ]
    while cycle := _gaining_cycle(exact, columns):
        taken = [columns[row] for row in cycle]
        for row, column in zip(cycle, taken[1:] + taken[:1]):
            columns[row] = column
    return columns


def _gaining_cycle(weights: list[list[int | None]], columns: list[int]) -> list[int]:
    """Rows such that it gains when each takes the column of the next, round in a circle; none if nothing gains."""
    size = len(columns)
    gain, before, last = [0] * size, [-1] * size, -1  # of the best path that ends in a row; Bellman and Ford
    for _ in range(size):
        last = -1
        for row, other in permutations(range(size), 2):
            taken, given = weights[row][columns[other]], weights[row][columns[row]]
            if taken is not None and given is not None and gain[row] + taken - given > gain[other]:
                gain[other], before[other], last = gain[row] + taken - given, row, other
        if last < 0:
            return []
    for _ in range(size):  # from a row that still gains back into the cycle that feeds it
        last = before[last]
    cycle = [last]
    while before[cycle[-1]] != last:
        cycle.append(before[cycle[-1]])
    return cycle[::-1]
