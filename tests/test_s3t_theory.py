"""Deletion theory: published figures, every formula against enumeration or the simulator, the docs, and bad input."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pymape.ops import simulate_deletions
from pymape.s3t.sequences import best_depth, chain_cover, cyclic_sequences, matching_sequences, random_sequences
from pymape.s3t.theory import (
    capacity,
    coverage_table,
    depth_distribution,
    expected_requests,
    forecast,
    mean_depth,
    retention,
    retention_closed_form,
)

PRIOR = [0.35, 0.25, 0.2, 0.1, 0.06, 0.04]


def assert_mean(samples, expected: float) -> None:
    """Check a sample mean of independent runs within four standard errors."""
    values = samples.double()
    assert abs(values.mean().item() - expected) < 4 * values.std().item() / math.sqrt(len(values)) + 1e-9


def test_the_figures_of_the_paper() -> None:
    found = [capacity(cyclic_sequences(6, budget), 5) for budget in range(1, 7)]
    assert [round(f.all_dead, 1) for f in found] == [68.5, 87.9, 99.5, 107.9, 114.5, 119.8]
    assert [round(found[i].first_dead, 1) for i in (0, 5)] == [6.0, 38.5]
    assert [round(found[i].distinct, 1) for i in (0, 5)] == [25.8, 30.0]
    assert round(found[5].all_dead / found[0].all_dead, 2) == 1.75
    assert round(found[5].first_dead / found[0].first_dead, 1) == 6.4
    assert expected_requests(5, 6) == found[0].all_dead  # SISA


@pytest.mark.parametrize(("shards", "slices", "budget"), [(1, 1, 1), (1, 4, 3), (2, 3, 2), (5, 6, 6), (40, 8, 8)])
def test_integrals_agree_with_the_closed_forms(shards: int, slices: int, budget: int) -> None:
    sequences = cyclic_sequences(slices, budget)
    closed, integrals = capacity(sequences, shards), capacity(sequences, shards, prior=[3.0] * slices)
    for name in ("first_dead", "all_dead", "distinct"):
        assert getattr(integrals, name) == pytest.approx(getattr(closed, name), rel=1e-9)


def expected_times(sequences, rates: list[list[Fraction]]) -> tuple[Fraction, Fraction, Fraction]:
    """Requests until the first and until all shards are dead, and distinct slices: by the Markov chain of hit sets."""
    cells = [(shard, s) for shard in range(len(rates)) for s in range(len(rates[0])) if rates[shard][s]]
    firsts = {order[0] for order in sequences}

    def alive(hit, shard) -> bool:
        return any((shard, s) not in hit for s in firsts)

    times: dict = {}
    for size in range(len(cells), -1, -1):
        for hit in map(frozenset, itertools.combinations(cells, size)):
            live = [alive(hit, shard) for shard in range(len(rates))]
            free = [cell for cell in cells if cell not in hit]
            total = sum((rates[shard][s] for shard, s in free), Fraction(0))
            result = []
            for k, over in enumerate((not all(live), not any(live), not any(live))):
                then = sum(rates[c[0]][c[1]] * times[hit | {c}][k] for c in free) if not over else 0
                result.append(Fraction(0) if over else ((1 if k == 2 else 1 / total) + then / total))
            times[hit] = result
    return tuple(times[frozenset()])


@pytest.mark.parametrize("weights", [[[5, 2, 1]] * 2, [[5, 2, 1], [1, 1, 4]], [[3, 1, 0]] * 2])
def test_capacity_under_a_prior_is_that_of_the_markov_chain(weights: list[list[int]]) -> None:
    sequences = [(0, 1, 2), (1, 2, 0)]
    total = sum(map(sum, weights))
    exact = expected_times(sequences, [[Fraction(w, total) for w in row] for row in weights])
    found = capacity(sequences, 2, prior=weights)
    assert (found.first_dead, found.all_dead, found.distinct) == pytest.approx(tuple(map(float, exact)), rel=1e-9)
    if weights[0] == weights[1]:
        assert capacity(sequences, 2, prior=weights[0]) == found


def test_a_first_slice_that_is_never_requested_keeps_its_shard_alive() -> None:
    sequences = [(0, 1), (1, 0)]
    assert capacity(sequences, 2, prior=[1, 0]).first_dead == math.inf
    one_mortal = capacity(sequences, 2, prior=[[1, 1], [2, 0]])
    assert (one_mortal.all_dead, one_mortal.distinct) == (math.inf, math.inf)
    assert one_mortal.first_dead == pytest.approx(2 + 4)  # either of two quarters, then the other


@pytest.mark.parametrize("prior", [None, PRIOR], ids=["uniform", "prior"])
def test_capacity_agrees_with_the_simulator(prior: list[float] | None) -> None:
    sequences = matching_sequences(6, 4, prior)
    found, runs = capacity(sequences, 5, prior=prior), simulate_deletions(sequences, 5, prior=prior, runs=20_000)
    assert_mean(runs.first_dead, found.first_dead)
    assert_mean(runs.all_dead, found.all_dead)
    assert_mean(runs.distinct, found.distinct)


def enumerated(sequences, requests: int, rates: list[float]) -> list[float]:
    """Probability of every depth, from all strings of requests; the last rate is of requests that hit nothing here."""
    slices = len(sequences[0])
    found = [0.0] * (slices + 1)
    for hits in itertools.product(range(len(rates)), repeat=requests):
        found[best_depth(sequences, set(hits) - {slices})] += math.prod(rates[hit] for hit in hits)
    return found


@pytest.mark.parametrize("sequences", [cyclic_sequences(4, 3), chain_cover(4), random_sequences(4, 2, seed=1)])
@pytest.mark.parametrize(("prior", "shards"), [(None, 1), ([0.5, 0.3, 0.2, 0.0], 1), ([1, 2, 3, 4], 3)])
def test_retention_by_enumeration(sequences, prior: list[float] | None, shards: int) -> None:
    weights = [1.0] * 4 if prior is None else prior
    rates = [weight / sum(weights) / shards for weight in weights] + [1 - 1 / shards]
    for requests in (0, 1, 2, 5):
        exact = enumerated(sequences, requests, rates)
        assert depth_distribution(sequences, requests, prior=prior, shards=shards) == pytest.approx(exact, abs=1e-12)
        mean = sum(depth * p for depth, p in enumerate(exact))
        assert mean_depth(sequences, requests, prior=prior, shards=shards) == pytest.approx(mean)
        for kept in range(5):
            found = retention(sequences, kept, requests, prior=prior, shards=shards)
            assert found == pytest.approx(sum(exact[kept:]), abs=1e-12)


def test_retention_is_precise_for_many_slices() -> None:
    """With a chain cover k slices are kept where at most L - k distinct ones were hit: Stirling numbers count that."""
    slices, requests = 12, 17
    distinct = [1] + [0] * slices  # number of strings of requests with d distinct slices
    for _ in range(requests):
        distinct = [(distinct[d] * d if d else 0) + (distinct[d - 1] * (slices - d + 1) if d else 0) for d in range(13)]
    cover = chain_cover(slices)
    for kept in range(slices + 1):
        exact = Fraction(sum(distinct[: slices - kept + 1]), slices**requests)
        assert retention(cover, kept, requests) == pytest.approx(float(exact), abs=1e-9)


def test_the_curves_of_the_simulator() -> None:
    sequences, requests = chain_cover(6, 6, PRIOR), 60
    runs = simulate_deletions(sequences, 3, prior=PRIOR, runs=20_000, curve=requests)
    for r in (0, 1, 7, 20, requests):
        depth = mean_depth(sequences, r, shards=3, prior=PRIOR)
        live = 3 * retention(sequences, 1, r, shards=3, prior=PRIOR)
        assert runs.depth[r].item() == pytest.approx(depth, abs=4 * 6 / math.sqrt(60_000))
        assert runs.live[r].item() == pytest.approx(live, abs=4 * 3 / math.sqrt(20_000))


def test_how_far_the_published_retention_is_off() -> None:
    rotations, cover = cyclic_sequences(6, 6), chain_cover(6)
    cells = [(kept, requests) for kept in range(1, 6) for requests in range(40)]
    errors = [retention_closed_form(6, *cell, 6) - retention(rotations, *cell) for cell in cells]
    assert (round(min(errors), 2), round(max(errors), 2)) == (-0.33, 0.02)
    errors = [retention_closed_form(6, *cell, 20) - retention(cover, *cell) for cell in cells]
    assert (round(min(errors), 2), round(max(errors), 2)) == (-0.09, 0.39)


def after(live: list[list[int]], total: int, every: bool, deletions: int) -> Fraction:
    """Probability that it is not over after deletions without replacement, by inclusion and exclusion."""

    def unhit(records: int) -> Fraction:
        return Fraction(math.comb(total - records, deletions), math.comb(total, deletions))

    cells = [(shard, n) for shard, row in enumerate(live) for n in row]
    result = Fraction(0)
    for pattern in itertools.product([False, True], repeat=len(cells)):  # which first slices are hit; others are not
        hit = [cell for cell, is_hit in zip(cells, pattern) if is_hit]
        others = sum(n for (_, n), is_hit in zip(cells, pattern) if not is_hit)
        dead = [all(p for (s, _), p in zip(cells, pattern) if s == shard) for shard in range(len(live))]
        if (all if every else any)(dead):
            continue
        for size in range(len(hit) + 1):
            for chosen in itertools.combinations(hit, size):
                result += (-1) ** size * unhit(others + sum(n for _, n in chosen))
    return result


@pytest.mark.parametrize(
    ("prefixes", "records"),
    [
        ([[(0, 1), (1,)], [(2, 0), (2, 1), ()]], [[4, 2, 3], [0, 5, 1]]),
        ([[(0,)], [], [(1, 0), (0, 1)]], [[7, 1], [3, 3], [2, 9]]),
        ([[(0,), (1,)]], [[1, 1]]),
        ([[(0, 1, 2), (2, 1, 0)], [(1,)]], [[300, 20, 150], [10, 90, 400]]),
    ],
)
def test_a_forecast_is_exact(prefixes, records) -> None:
    found = forecast(prefixes, records, rate=4.0)
    total = sum(map(sum, records))
    live = [
        [counts[s] for s in sorted({front[0] for front in shard if front})]
        for shard, counts in zip(prefixes, records)
        if any(shard)
    ]
    assert found["live_shards"] == len(live)
    assert found["dead_shards"] == len(prefixes) - len(live)
    assert found["records"] == total
    for name, every in (("next_shard_dead", False), ("all_shards_dead", True)):
        still = [float(after(live, total, every, deletions)) for deletions in range(total + 1)]
        deletions, days = found[name]["deletions"], found[name]["days"]
        assert deletions["mean"] == pytest.approx(sum(still), rel=1e-8)
        for key, share in (("p10", 0.9), ("p50", 0.5), ("p90", 0.1)):
            assert deletions[key] == next(r for r, p in enumerate(still) if p <= share + 1e-9)
        assert days == {key: value / 4 for key, value in deletions.items()}
    assert json.loads(json.dumps(found)) == found


def test_a_forecast_for_large_slices_is_that_of_independent_requests() -> None:
    sequences = cyclic_sequences(6, 6)
    found, runs = forecast([sequences] * 5, [[10**6] * 6] * 5), simulate_deletions(sequences, 5, runs=20_000)
    for name, times in (("next_shard_dead", runs.first_dead), ("all_shards_dead", runs.all_dead)):
        deletions = found[name]["deletions"]
        assert_mean(times, deletions["mean"])
        for key, q in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
            # The true quantile: at most q below it and at least q up to it, within four standard errors.
            error = 4 * math.sqrt(q * (1 - q) / 20_000)
            assert (times < deletions[key]).double().mean() < q + error
            assert (times <= deletions[key]).double().mean() > q - error
    assert "days" not in found["all_shards_dead"]


def test_a_forecast_of_what_cannot_happen_is_none() -> None:
    dead = forecast([[], [()]], [[1, 2], [3, 4]], rate=1.0)
    assert (dead["live_shards"], dead["dead_shards"]) == (0, 2)
    assert dead["next_shard_dead"] == dead["all_shards_dead"] == {"deletions": None, "days": None}
    immortal = forecast([[(0,)], [(0,), (1,)]], [[2, 0], [2, 0]])
    assert immortal["all_shards_dead"] == {"deletions": None}
    assert immortal["next_shard_dead"]["deletions"] == pytest.approx(
        {"mean": 1 + Fraction(1, 2) + Fraction(1, 6), "p10": 1, "p50": 1, "p90": 3}
    )


def test_a_forecast_keeps_its_digits_with_many_records() -> None:
    """A single live slice of n among N records: the waiting time has the mean (N + 1) / (n + 1)."""
    found = forecast([[(0,)]], [[1000, 10**7]])["all_shards_dead"]["deletions"]
    assert found["mean"] == pytest.approx((10**7 + 1001) / 1001, rel=1e-9)
    unhit = np.cumsum(np.log1p(-1000 / (10**7 + 1000 - np.arange(100_000))))
    assert found["p50"] == 1 + int((unhit > math.log(0.5)).sum())


def test_the_tables_of_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "docs" / "s3t_theory.md").read_text()
    assert coverage_table(range(3, 9)) in text
    for budget in range(1, 7):
        found = capacity(cyclic_sequences(6, budget), 5)
        assert f"| {budget} | {found.all_dead:.1f} | {found.first_dead:.1f} | {found.distinct:.1f} |\n" in text


SEQUENCES = [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expected_requests(0, 2), "shards must be at least 1, got 0"),
        (lambda: expected_requests(2, 3, 4), "first_slices must be 1 to 3, got 4"),
        (lambda: capacity([(0, 2)], 2), r"sequences must be orders of 0 to 1, got \(0, 2\)"),
        (lambda: capacity(SEQUENCES, 2, prior=[1, 2, 3]), r"prior must have shape \(2,\) or \(2, 2\), got \(3,\)"),
        (lambda: capacity(SEQUENCES, 2, prior=[0, 0]), r"prior must be finite, .* got \[0.0, 0.0\]"),
        (lambda: retention(SEQUENCES, 3, 1), "kept must be 0 to 2, got 3"),
        (lambda: mean_depth(SEQUENCES, -1), "requests must be at least 0, got -1"),
        (lambda: mean_depth(SEQUENCES, 1, shards=0), "shards must be at least 1, got 0"),
        (lambda: forecast([SEQUENCES], []), "records must be given for 1 shards, got 0"),
        (lambda: forecast([SEQUENCES], [[1]]), r"records must be given for slice 1 .*, got \[1\]"),
        (lambda: forecast([SEQUENCES], [[1, -2]]), r"records must be at least 0, got \[1, -2\]"),
        (lambda: forecast([SEQUENCES], [[1, 2]], rate=0), "rate must be above 0, got 0"),
        (lambda: forecast([SEQUENCES], [[1, 2]], quantiles=[1]), "quantiles must be above 0 and below 1, got 1"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
