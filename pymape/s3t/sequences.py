"""Which orders of its slices a shard trains, and how deep its models stay under them when slices are deleted."""

from __future__ import annotations

import logging
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np

from pymape.s3t.assignment import best_assignment

__all__ = [
    "best_depth",
    "chain_cover",
    "choose_sequences",
    "conditional_sequences",
    "count_slices",
    "cyclic_sequences",
    "depth_table",
    "expected_depth",
    "matching_sequences",
    "members",
    "prefixes",
    "random_sequences",
    "worst_depth",
]

_logger = logging.getLogger(__name__)

_Order = tuple[int, ...]

_LARGEST_DENOMINATOR = 10**9  # of a prior's entries: floats become the fractions they stand for, and ties true ties
_MOST_SLICES = 20  # where all 2^L sets of slices are looked at
_MOST_CHOOSABLE = 12  # where chains are chosen: C(12, 6) of them, with a depth for each of 2^12 sets
_MOST_CHOICES = 20_000  # selections of chains that are compared one by one
_TOLERANCE = 1e-9  # a smaller difference of expected depths is rounding


def choose_sequences(
    method: str, slices: int, budget: int, *, prior: Sequence[float] | None = None, seed: int = 0
) -> list[_Order]:
    """Choose the orders in which a shard trains its slices.

    Args:
        method: `cyclic`, `matching`, `conditional`, `random` or `chain-cover`; each is a function of this module too.
        slices: L, at least 1.
        budget: B, the number of sequences, 1 to L!. `chain-cover` returns fewer where more would be useless.
        prior: how likely a request is to fall into each slice, L weights of any scale, at least 0; None is uniform.
            `cyclic` and `random` do not look at it.
        seed: of `conditional` and `random`; the other methods draw nothing.

    Returns:
        Distinct orders of 0 .. L - 1. Serving prefers an earlier one among equally deep ones.

    Raises:
        ValueError: an unknown method, a budget out of range, or a prior that is none.

    Source: S3T (arXiv 2406.16257), training under a budget, for all but `chain-cover`.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    return _METHODS[method](slices, budget, prior, seed)


def cyclic_sequences(slices: int, budget: int) -> list[_Order]:
    """The first B rotations of 0 .. L - 1; beyond L of them the slices behind each first slice are rotated in turn.

    For B > L every first slice gets B // L sequences, the first B mod L rotations one more, whose rest is chosen by the
    same rule; the result is then in lexicographic order.
    """
    _check_budget(slices, budget)
    return _rotations(tuple(range(slices)), budget)


def _rotations(items: _Order, budget: int) -> list[_Order]:
    rotations = [items[len(items) - i :] + items[: len(items) - i] for i in range(len(items))]
    if budget <= len(items):
        return rotations[:budget]
    share, extra = divmod(budget, len(items))
    return sorted(
        (first, *rest)
        for i, (first, *behind) in enumerate(rotations)
        for rest in _rotations(tuple(behind), share + (i < extra))
    )


def matching_sequences(
    slices: int, budget: int, prior: Sequence[float] | None = None, *, requests: int = 100
) -> list[_Order]:
    """Sequences that keep likely deletions late, of which every slice is at every place once (for B = L).

    L prefixes grow at once, one from each slice. At every step a maximum-weight perfect matching gives each prefix its
    next slice; the weight of slice j behind a prefix of prior mass c is (1 - c - p_j)^t, the probability that none of t
    requests hits the longer prefix. The result is a Latin square, and a sequence's weights add up to its expected depth
    after t requests, its score.

    Weights are compared in exact arithmetic and equal matchings lexicographically, so that rounding decides nothing.

    Args:
        slices: L, at least 1.
        budget: B. Below L, the B rows of the square with the highest scores. Above L, every first slice gets B // L
            sequences, the B mod L least likely ones one more, and the slices behind it are chosen by the same rule.
        prior: as for `choose_sequences`.
        requests: t, at least 1.

    Returns:
        The sequences by falling score, in lexicographic order among equals.

    Source: S3T (arXiv 2406.16257), bipartite matching selection (BMS).
    """
    _check_budget(slices, budget)
    if requests < 1:
        raise ValueError(f"requests must be at least 1, got {requests}")
    masses = _exact_prior(slices, prior)
    unit = math.lcm(*(mass.denominator for mass in masses))
    weights = [int(mass * unit) for mass in masses]

    def survival(prefix: _Order) -> int:  # times unit^t
        return max(unit - sum(weights[s] for s in prefix), 0) ** requests

    def score(order: _Order) -> int:
        return sum(survival(order[:depth]) for depth in range(1, slices + 1))

    def select(front: _Order, budget: int) -> list[_Order]:
        items = [s for s in range(slices) if s not in front]
        if budget <= len(items):
            rows = [(*front, s) for s in items]
            while len(rows[0]) < slices:
                table = [[None if s in row else survival((*row, s)) for s in items] for row in rows]
                rows = [(*row, items[column]) for row, column in zip(rows, best_assignment(table))]
            return sorted(rows, key=lambda row: (-score(row), row))[:budget]
        share, extra = divmod(budget, len(items))
        items.sort(key=lambda s: weights[s])
        return [row for i, s in enumerate(items) for row in select((*front, s), share + (i < extra))]

    return sorted(select((), budget), key=lambda order: (-score(order), order))


def conditional_sequences(
    slices: int, budget: int, prior: Sequence[float] | None = None, *, seed: int = 0
) -> list[_Order]:
    """Draw distinct sequences, slice by slice, with weights 1 - p.

    The next slice is drawn among those that still lead to a sequence not drawn yet; where all their weights are 0, they
    are equally likely.
    """
    _check_budget(slices, budget)
    weights = [float(1 - mass) for mass in _exact_prior(slices, prior)]
    generator = random.Random(seed)
    drawn: Counter[_Order] = Counter()  # prefix -> sequences that begin with it
    chosen = []
    for _ in range(budget):
        order: _Order = ()
        while len(order) < slices:
            behind = math.factorial(slices - len(order) - 1)
            free = [s for s in range(slices) if s not in order and drawn[(*order, s)] < behind]
            likely = [weights[s] for s in free]
            order += (generator.choices(free, likely if any(likely) else None)[0],)
        drawn.update(order[:depth] for depth in range(1, slices + 1))
        chosen.append(order)
    return chosen


def random_sequences(slices: int, budget: int, *, seed: int = 0) -> list[_Order]:
    """Draw B distinct sequences, all equally likely."""
    return conditional_sequences(slices, budget, seed=seed)


def chain_cover(slices: int, budget: int | None = None, prior: Sequence[float] | None = None) -> list[_Order]:
    """C(L, floor(L / 2)) sequences such that every set of slices is the set of some sequence's first slices.

    Whatever d slices are deleted, the best depth is L - d: no selection does better, and none with fewer sequences does
    it (the sets of floor(L / 2) slices must be prefixes of different ones). The subsets of 0 .. L - 1 are divided into
    symmetric chains, each of which grows by one slice at a time and is extended to a whole order: read the slices from
    left to right, one in the set as a closing bracket, any other as an opening one. A chain's smallest set has no
    unmatched closing bracket; the unmatched opening ones join from left to right.

    With a smaller budget, the B chains of largest expected depth: the mean of `expected_depth(chains, prior)` over
    d = 0 .. L. Where there are at most 20,000 selections (up to L = 5 always), all are compared; otherwise chains are
    added greedily, and then exchanged one by one while that gains. The expected depth is a monotone submodular function
    of the chains, so this reaches at least 1 - 1/e of the optimum. Differences below 1e-9 slices are ties, which the
    first chains win.

    Args:
        slices: L, at least 1; at most 20, and 12 where chains must be left out.
        budget: B; None is the whole cover, and so is a larger one, with a warning: further sequences add no depth.
        prior: as for `choose_sequences`.

    Returns:
        The chains by the size, and then the order, of their smallest sets.

    Source: de Bruijn, van Ebbenhorst Tengbergen and Kruyswijk 1951; brackets of Greene and Kleitman 1976.
    """
    _check_budget(slices, 1 if budget is None else budget)
    size = math.comb(slices, slices // 2)
    most = _MOST_SLICES if budget is None or budget >= size else _MOST_CHOOSABLE
    if slices > most:
        raise ValueError(f"slices must be at most {most} for a chain cover of {budget or size} sequences, got {slices}")
    chains = _symmetric_chains(slices)
    if budget is None or budget >= len(chains):
        if budget is not None and budget > len(chains):
            _logger.warning(
                "budget is %d, of which a chain cover of %d slices uses %d: more sequences would add no depth",
                budget,
                slices,
                len(chains),
            )
        return chains
    depths = np.stack([depth_table([chain]) for chain in chains])  # [chains, 2^L]
    weights = _survivors(slices, prior) / (slices + 1)
    if math.comb(len(chains), budget) <= _MOST_CHOICES:
        chosen = _best_choice(depths, weights, budget)
    else:
        chosen = _greedy_choice(depths, weights, budget)
    return [chains[i] for i in sorted(chosen)]


def _symmetric_chains(slices: int) -> list[_Order]:
    chains = []
    for size in range(slices // 2 + 1):
        for smallest in combinations(range(slices), size):
            opened: list[int] = []
            matched: list[int] = []
            for s in range(slices):
                if s not in smallest:
                    opened.append(s)
                elif opened:
                    matched.append(opened.pop())
            if len(matched) == size:
                chains.append((*smallest, *opened, *sorted(matched)))
    return chains


def _best_choice(depths: np.ndarray, weights: np.ndarray, budget: int) -> list[int]:
    best, chosen = -math.inf, []
    for choice in map(list, combinations(range(len(depths)), budget)):
        value = depths[choice].max(axis=0) @ weights
        if value > best + _TOLERANCE:
            best, chosen = value, choice
    return chosen


def _greedy_choice(depths: np.ndarray, weights: np.ndarray, budget: int) -> list[int]:
    def with_each(chosen: list[int]) -> np.ndarray:  # [chains], expected depth of the chosen ones and one more
        values = np.maximum(depths, depths[chosen].max(axis=0, initial=0)) @ weights
        values[chosen] = -math.inf
        return values

    def first_best(values: np.ndarray) -> int:
        return int(np.flatnonzero(values >= values.max() - _TOLERANCE)[0])

    chosen: list[int] = []
    for _ in range(budget):
        chosen.append(first_best(with_each(chosen)))
    exchanged = True
    while exchanged:
        exchanged = False
        for place in range(budget):
            values = with_each(chosen[:place] + chosen[place + 1 :])
            if values.max() > values[chosen[place]] + _TOLERANCE:
                chosen[place], exchanged = first_best(values), True
    return chosen


_METHODS: dict[str, Callable[[int, int, Sequence[float] | None, int], list[_Order]]] = {
    "cyclic": lambda slices, budget, prior, seed: cyclic_sequences(slices, budget),
    "matching": lambda slices, budget, prior, seed: matching_sequences(slices, budget, prior),
    "conditional": lambda slices, budget, prior, seed: conditional_sequences(slices, budget, prior, seed=seed),
    "random": lambda slices, budget, prior, seed: random_sequences(slices, budget, seed=seed),
    "chain-cover": lambda slices, budget, prior, seed: chain_cover(slices, budget, prior),
}


def prefixes(sequences: Sequence[_Order]) -> list[_Order]:
    """The distinct prefixes of the sequences, which are the stages to train.

    Returns:
        Shorter ones first, so that every prefix stands behind the one it extends; in the order of the sequences among
        equally long ones.
    """
    longest = max((len(order) for order in sequences), default=0)
    found = (order[:depth] for depth in range(1, longest + 1) for order in sequences if len(order) >= depth)
    return list(dict.fromkeys(found))


def best_depth(sequences: Sequence[_Order], deleted: Collection[int]) -> int:
    """Number of stages that the deepest sequence keeps when these slices are deleted; 0 is a dead shard."""
    gone = set(deleted)
    return max((next((i for i, s in enumerate(order) if s in gone), len(order)) for order in sequences), default=0)


def count_slices(sequences: Sequence[_Order]) -> int:
    """L, of sequences that are orders of 0 .. L - 1; ValueError where they are not."""
    if not sequences:
        raise ValueError("sequences must not be empty, got none")
    slices = len(sequences[0])
    for order in sequences:
        if not order or sorted(order) != list(range(slices)):
            raise ValueError(f"sequences must be orders of 0 to {slices - 1}, got {tuple(order)}")
    return slices


def depth_table(sequences: Sequence[_Order]) -> np.ndarray:
    """The best depth for every set of surviving slices.

    Args:
        sequences: orders of 0 .. L - 1, L at most 20.

    Returns:
        [2^L] int8: entry sum_s 2^s is for the surviving slices s.

    Raises:
        ValueError: no sequences, one that is not an order of the slices, or too many slices.
    """
    slices = count_slices(sequences)
    if slices > _MOST_SLICES:
        raise ValueError(f"sequences must be of at most {_MOST_SLICES} slices, got {slices}")
    table = np.zeros(2**slices, np.int8)
    for order in sequences:
        table[np.cumsum(2 ** np.array(order))] = np.arange(1, slices + 1)
    # A set keeps what any of its subsets keeps: pass the depths on, one slice at a time.
    for s in range(slices):
        without, within = table.reshape(-1, 2, 2**s).transpose(1, 0, 2)
        np.maximum(without, within, out=within)
    return table


def worst_depth(sequences: Sequence[_Order]) -> list[int]:
    """The best depth that is left when the worst d slices are deleted, for d = 0 .. L."""
    depths, slices = depth_table(sequences), count_slices(sequences)
    sizes = members(slices).sum(axis=1)
    return [int(depths[sizes == left].min()) for left in range(slices, -1, -1)]


def expected_depth(sequences: Sequence[_Order], prior: Sequence[float] | None = None) -> list[float]:
    """The expected best depth when d slices are deleted, for d = 0 .. L.

    The deleted slices are drawn one after the other, without replacement, in proportion to the prior: they are the
    first d distinct slices that independent requests hit.
    """
    slices = count_slices(sequences)
    values = depth_table(sequences) * _survivors(slices, prior)
    sizes = members(slices).sum(axis=1)
    return [float(values[sizes == left].sum()) for left in range(slices, -1, -1)]


def members(slices: int) -> np.ndarray:
    """[2^L, L] int8: 1 where set sum_s 2^s holds slice s."""
    return (np.arange(2**slices)[:, None] >> np.arange(slices) & 1).astype(np.int8)


def _survivors(slices: int, prior: Sequence[float] | None) -> np.ndarray:
    """[2^L] Probability that these slices survive when as many as are missing have been deleted."""
    masses = np.array([float(mass) for mass in _exact_prior(slices, prior)])
    holds = members(slices)
    sizes, held = holds.sum(axis=1), holds @ masses  # [2^L]
    probability = np.zeros(2**slices)
    probability[-1] = 1.0
    for left in range(slices, 0, -1):
        for s in range(slices):
            here = np.flatnonzero((sizes == left) & (holds[:, s] == 1))
            # Where no survivor is ever requested, any of them may be the next.
            share = np.divide(masses[s], held[here], out=np.full(len(here), 1 / left), where=held[here] > 0)
            probability[here - 2**s] += probability[here] * share
    return probability


def _exact_prior(slices: int, prior: Sequence[float] | None) -> list[Fraction]:
    """The prior as fractions that add up to 1, up to 1e-9."""
    if prior is None:
        return [Fraction(1, slices)] * slices
    if len(prior) != slices:
        raise ValueError(f"prior must have a weight for each of the {slices} slices, got {len(prior)}")
    for weight in prior:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"prior must be finite and at least 0, got {weight}")
    exact = [Fraction(weight) for weight in prior]
    if not any(exact):
        raise ValueError(f"prior must have a weight above 0, got {list(prior)}")
    return [(weight / sum(exact)).limit_denominator(_LARGEST_DENOMINATOR) for weight in exact]


def _check_budget(slices: int, budget: int) -> None:
    if slices < 1:
        raise ValueError(f"slices must be at least 1, got {slices}")
    if not 1 <= budget <= math.factorial(slices):
        raise ValueError(f"budget must be 1 to {slices}! = {math.factorial(slices)}, got {budget}")
