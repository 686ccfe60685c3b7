"""What deletion requests do to an S3T system, in exact formulas: capacity, retention, and a forecast for a live system.

A shard is dead once the first slices of all its sequences have been hit. docs/s3t_theory.md derives the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np

from pymape.s3t.sequences import (
    chain_cover,
    count_slices,
    cyclic_sequences,
    depth_table,
    expected_depth,
    members,
    worst_depth,
)

__all__ = [
    "Capacity",
    "capacity",
    "coverage_table",
    "depth_distribution",
    "expected_requests",
    "forecast",
    "mean_depth",
    "retention",
    "retention_closed_form",
]

_Orders = Sequence[tuple[int, ...]]
_Prior = Sequence[float] | Sequence[Sequence[float]] | np.ndarray

_LAST = 45.0  # mean waiting times, after which a slice is still unhit with probability e^-45
_SLACK = 1e-9  # of a probability, for rounding


@dataclass(frozen=True)
class Capacity:
    """Expected numbers of independent requests to a new system; infinite where it cannot happen."""

    first_dead: float  # requests until the first shard is dead
    all_dead: float  # requests until every shard is dead
    distinct: float  # distinct slices hit until every shard is dead


def expected_requests(shards: int, slices: int, first_slices: int = 1) -> float:
    """Expected number of uniform requests until every shard is dead: m L H(m B'), H the harmonic number.

    Args:
        shards: m, at least 1.
        slices: L, at least 1.
        first_slices: B', distinct first slices of a shard's sequences, 1 to L; SISA has 1, `cyclic` min(B, L).

    Source: S3T (arXiv 2406.16257), deletion rate.
    """
    _check_counts(shards=shards, slices=slices)
    if not 1 <= first_slices <= slices:
        raise ValueError(f"first_slices must be 1 to {slices}, got {first_slices}")
    return shards * slices * math.fsum(1 / k for k in range(1, shards * first_slices + 1))


def capacity(sequences: _Orders, shards: int, *, prior: _Prior | None = None) -> Capacity:
    """Expected requests until the first, and until every, shard of a new system is dead.

    Requests are independent; one that hits a slice again counts and changes nothing.

    Args:
        sequences: orders of the slices 0 .. L - 1, the same in every shard.
        shards: m, at least 1.
        prior: weights of any scale of the slices, [L] for all shards or [m, L], at least 0; None is uniform.

    Returns:
        Closed forms for a uniform prior, one-dimensional integrals (to about ten digits) otherwise.
    """
    slices, first = count_slices(sequences), sorted({order[0] for order in sequences})
    _check_counts(shards=shards)
    if prior is None:
        cells, ends = shards * slices, shards * len(first)
        return Capacity(
            _requests_until_first_dead(shards, slices, len(first)),
            expected_requests(shards, slices, len(first)),
            ends * (cells + 1) / (ends + 1),
        )
    rates = _rates(prior, shards, slices)
    others = np.delete(rates, first, axis=1).ravel()
    live = [row for row in rates[:, first] if row.all()]
    first_dead = _integral(lambda t: _unfinished(live, False, t)[0], live) if live else math.inf
    if len(live) < shards:  # a first slice that is never requested keeps its shard alive
        return Capacity(first_dead, math.inf, math.inf)
    all_dead = _integral(lambda t: _unfinished(live, True, t)[0], live)
    # Other slices that are hit for the first time while a shard is alive.
    further = _integral(lambda t: _unfinished(live, True, t)[0] * float(others @ np.exp(-others * t)), live)
    return Capacity(first_dead, all_dead, shards * len(first) + further)


def _requests_until_first_dead(shards: int, slices: int, first_slices: int) -> float:
    """(m L / B') times the sum of Beta(i / B', m) over i = 1 .. B'."""

    def beta(a: float, b: float) -> float:
        return math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))

    return (
        shards * slices / first_slices * math.fsum(beta(i / first_slices, shards) for i in range(1, first_slices + 1))
    )


def retention(sequences: _Orders, kept: int, requests: int, *, shards: int = 1, prior: _Prior | None = None) -> float:
    """Probability that a shard keeps a best depth of at least `kept` after independent requests.

    By inclusion and exclusion over the sets of slices: exact but for rounding, which stays below 1e-9 up to L = 16.

    Args:
        sequences: orders of the slices 0 .. L - 1, L at most 20.
        kept: k, 0 to L.
        requests: r, at least 0, to the whole system.
        shards: m, each of which gets the same share of the requests; with 1, r counts those to the shard itself.
        prior: weights of any scale of the slices, [L], at least 0; None is uniform.
    """
    slices = count_slices(sequences)
    if not 0 <= kept <= slices:
        raise ValueError(f"kept must be 0 to {slices}, got {kept}")
    return _expectation(depth_table(sequences) >= kept, slices, requests, shards, prior)


def retention_closed_form(slices: int, kept: int, requests: int, first_slices: int) -> float:
    """The published estimate of `retention`, 1 - (1 - (1 - k / L)^r)^B', to compare with.

    It takes the first k slices of B' sequences to be hit independently. Sets that do not meet survive together less
    often than that and overlapping ones more often, so it errs both ways: for L = 6 and six rotations from -0.33 to
    +0.02, and for the 20 sequences of the chain cover, counted as B' = 20, from -0.09 to +0.39.
    """
    return 1 - (1 - (1 - kept / slices) ** requests) ** first_slices


def depth_distribution(
    sequences: _Orders, requests: int, *, shards: int = 1, prior: _Prior | None = None
) -> list[float]:
    """Probability of every best depth 0 .. L of a shard after independent requests; arguments as for `retention`."""
    at_least = [
        retention(sequences, kept, requests, shards=shards, prior=prior) for kept in range(count_slices(sequences) + 1)
    ]
    return [max(here - deeper, 0.0) for here, deeper in zip(at_least, [*at_least[1:], 0.0])]


def mean_depth(sequences: _Orders, requests: int, *, shards: int = 1, prior: _Prior | None = None) -> float:
    """Expected best depth of a shard after independent requests; arguments as for `retention`."""
    return _expectation(depth_table(sequences), count_slices(sequences), requests, shards, prior)


def forecast(
    prefixes: Sequence[Sequence[tuple[int, ...]]],
    records: Sequence[Sequence[int]],
    *,
    rate: float | None = None,
    quantiles: Sequence[float] = (0.1, 0.5, 0.9),
) -> dict[str, Any]:
    """How many more records can be deleted from a live system until a shard is dead, and until all are.

    The model: every deletion takes one of the records that are left, all of them equally likely, those in slices that
    are switched off already included. Nothing is trained meanwhile. Under it, all numbers are exact.

    Args:
        prefixes: for every shard the slices of the stages that each sequence has left; shards without any are dead.
        records: number of records that are left in every slice of every shard, [m, L].
        rate: records deleted a day, above 0, or None.
        quantiles: probabilities above 0 and below 1.

    Returns:
        `live_shards`, `dead_shards`, `records`, `rate`, and for `next_shard_dead` and `all_shards_dead` a dict of
        `deletions` and, with a rate, of `days` (deletions / rate): each the `mean` and the quantiles `p10` and so on:
        the number of deletions by which it has happened with that probability. None where it cannot happen: no shard is
        live, or a live first slice has no record to delete.

    Raises:
        ValueError: shards that do not match, a slice without a count, or a rate or quantile out of range.
    """
    _check_live(prefixes, records, rate, quantiles)
    total = sum(map(sum, records))
    firsts = [sorted({front[0] for front in shard if front}) for shard in prefixes]
    live = [np.array([counts[s] for s in first], float) for first, counts in zip(firsts, records) if first]
    mortal = [shard for shard in live if shard.all()]

    def outlook(every: bool) -> dict[str, Any]:
        if not mortal or (every and len(mortal) < len(live)):
            return dict.fromkeys(["deletions"] if rate is None else ["deletions", "days"])
        after = cache(partial(_still_unfinished, mortal, total, every))
        # The sum over r of the probability that it is not over after r deletions.
        mean = (total + 1) * _integral(lambda t: _unfinished(mortal, every, t)[0] * math.exp(-t), mortal)
        deletions = {"mean": mean} | {f"p{100 * q:g}": _smallest(after, total, 1 - q) for q in quantiles}
        if rate is None:
            return {"deletions": deletions}
        return {"deletions": deletions, "days": {name: value / rate for name, value in deletions.items()}}

    return {
        "live_shards": len(live),
        "dead_shards": len(prefixes) - len(live),
        "records": total,
        "rate": rate,
        "next_shard_dead": outlook(every=False),
        "all_shards_dead": outlook(every=True),
    }


def coverage_table(slices: Iterable[int]) -> str:
    """Markdown: the best depth of `chain-cover` and of `cyclic` with as many sequences, after d deleted slices."""
    numbers = list(slices)
    deepest = max(numbers)
    lines = [
        f"| L | B | sequences | {' | '.join(f'd = {d}' for d in range(1, deepest))} |",
        f"| --- | --- | --- | {' | '.join(['---'] * (deepest - 1))} |",
    ]
    for number in numbers:
        cover = chain_cover(number)
        for name, chosen in (("chain-cover", cover), ("cyclic", cyclic_sequences(number, len(cover)))):
            depths = list(zip(worst_depth(chosen), expected_depth(chosen)))[1:-1]
            cells = [f"{worst} / {mean:.2f}" for worst, mean in depths] + [""] * (deepest - number)
            lines.append(f"| {number} | {len(cover)} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _unfinished(
    live: Sequence[np.ndarray], every: bool, t: float, log_z: np.ndarray | None = None, rest: float = 0.0
) -> np.ndarray:
    """Probability that some shard (with `every`), or that all of them (without), are alive at time t.

    Args:
        live: for every shard the rates n_j of its first slices, each of which is hit at an exponential time.
        every: whether it is over when every shard is dead; otherwise, when one is.
        t: time.
        log_z: [M], weighs outcomes as `_still_unfinished` needs it; None is z = 1, which leaves the probability.
        rest: sum of the rates of all other slices; only needed for z.

    Returns:
        [M], [1] for None.
    """
    log_z = np.zeros(1) if log_z is None else log_z
    whole = np.array([np.exp(shard.sum() * log_z) for shard in live])  # [m, M]
    dead = np.array([(np.exp(np.outer(shard, log_z)) - np.exp(-shard * t)[:, None]).prod(axis=0) for shard in live])
    return np.exp(rest * log_z) * (whole.prod(axis=0) - dead.prod(axis=0) if every else (whole - dead).prod(axis=0))


def _integral(function: Callable[[float], float], live: Sequence[np.ndarray]) -> float:
    """Integral over t > 0, on a logarithmic axis, of a function that is 0 once every live slice has been hit."""
    from scipy.integrate import quad

    rates = np.concatenate(live)
    low, high = 1e-14 / rates.sum(), (_LAST + math.log(len(rates))) / rates.min()
    ends = math.log(low), math.log(high)
    return quad(lambda y: function(math.exp(y)) * math.exp(y), *ends, epsabs=0, epsrel=1e-10, limit=500)[0]


def _still_unfinished(live: Sequence[np.ndarray], total: int, every: bool, deletions: int) -> float:
    """Probability P_r that it is not over after r of N records have been deleted in random order.

    Let every record be deleted at an exponential time. By t, when a share u = 1 - exp(-t) is, `_unfinished` is the sum
    over r of C(N, r) u^r (1 - u)^(N - r) P_r, and with x = u / (1 - u), C(N, r) P_r is the coefficient of x^r in
    (1 + x)^N unfinished. A mean over a circle of x yields it; on the one through u = r / N almost all the weight is on
    the terms next to r, so that a few points are enough.
    """
    if not 0 < deletions < total:
        return float(deletions <= 0)
    share = deletions / total
    points = min(total + 1, math.ceil(10 * math.sqrt(total * share * (1 - share))) + 64)
    turn = 2j * np.pi * np.arange(points) / points
    log_z = np.log1p(share * np.expm1(turn))  # z = (1 + x) / (1 + |x|)
    rest = total - float(sum(shard.sum() for shard in live))
    terms = _unfinished(live, every, -math.log1p(-share), log_z, rest)
    certain = np.exp(total * log_z)  # the same with all P_r = 1
    return float((terms * np.exp(-deletions * turn)).sum().real / (certain * np.exp(-deletions * turn)).sum().real)


def _smallest(after: Callable[[int], float], most: int, probability: float) -> int:
    """The smallest number of deletions, at most `most`, after which it goes on with at most this probability."""
    low, high = 0, 1
    while high < most and after(high) > probability + _SLACK:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        if after(middle) > probability + _SLACK:
            low = middle
        else:
            high = middle
    return high


def _expectation(values: np.ndarray, slices: int, requests: int, shards: int, prior: _Prior | None) -> float:
    """Expected value, after independent requests, of a function of the set of slices that none has hit."""
    _check_counts(shards=shards)
    if requests < 0:
        raise ValueError(f"requests must be at least 0, got {requests}")
    # Moebius inversion: values[S] is the sum of coefficients[A] over the subsets A of S, and A is unhit as a whole with
    # a simple probability.
    coefficients = values.astype(np.int64)
    for s in range(slices):
        pairs = coefficients.reshape(-1, 2, 2**s)
        pairs[:, 1] -= pairs[:, 0]
    rates = np.full(slices, 1 / slices) if prior is None else _rates(prior, 1, slices)[0]
    unhit = np.maximum(1 - members(slices) @ rates / shards, 0.0)
    return float(coefficients @ unhit**requests)


def _rates(prior: _Prior, shards: int, slices: int) -> np.ndarray:
    """[m, L], adding up to 1."""
    weights = np.asarray(prior, float)
    if weights.shape not in ((slices,), (shards, slices)):
        raise ValueError(f"prior must have shape ({slices},) or ({shards}, {slices}), got {weights.shape}")
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise ValueError(f"prior must be finite, at least 0 and somewhere above 0, got {weights.tolist()}")
    rates = np.broadcast_to(weights, (shards, slices))
    return rates / rates.sum()


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_live(
    prefixes: Sequence[Sequence[tuple[int, ...]]],
    records: Sequence[Sequence[int]],
    rate: float | None,
    quantiles: Sequence[float],
) -> None:
    if len(prefixes) != len(records):
        raise ValueError(f"records must be given for {len(prefixes)} shards, got {len(records)}")
    for shard, counts in zip(prefixes, records):
        for s in {s for front in shard for s in front}:
            if not 0 <= s < len(counts):
                raise ValueError(f"records must be given for slice {s} of every shard that has it, got {list(counts)}")
        if min(counts, default=0) < 0:
            raise ValueError(f"records must be at least 0, got {list(counts)}")
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise ValueError(f"rate must be above 0, got {rate}")
    for q in quantiles:
        if not 0 < q < 1:
            raise ValueError(f"quantiles must be above 0 and below 1, got {q}")
