"""Sequence selection: the published outputs, Latin squares, exact ties, the chain cover's promise, and bad input."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations, permutations
from typing import get_args

import numpy as np
import pytest

from pymape.s3t.assignment import best_assignment
from pymape.s3t.config import SequenceMethod
from pymape.s3t.sequences import (
    best_depth,
    chain_cover,
    choose_sequences,
    conditional_sequences,
    cyclic_sequences,
    depth_table,
    expected_depth,
    matching_sequences,
    prefixes,
    random_sequences,
    worst_depth,
)

PRIORS = {
    "uniform": None,
    "rising": [1, 2, 3, 4, 5],
    "steep": [0.7, 0.2, 0.05, 0.03, 0.02],
    "ties": [0.3, 0.1, 0.3, 0.1, 0.2],
}


def digits(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, word)) for word in text.split()]


def is_latin_square(sequences: Sequence[Sequence[int]]) -> bool:
    slices = set(range(len(sequences)))
    return all(set(order) == slices for order in (*sequences, *zip(*sequences)))


def subsets(slices: int) -> list[tuple[int, ...]]:
    return [chosen for size in range(slices + 1) for chosen in combinations(range(slices), size)]


@pytest.mark.parametrize(
    ("method", "slices", "budget", "expected"),
    [
        ("cyclic", 4, 4, "0123 3012 2301 1230"),
        ("cyclic", 4, 13, "0123 0132 0231 0312 1023 1230 1302 2013 2130 2301 3012 3120 3201"),
        ("chain-cover", 4, 6, "0123 1230 2031 3012 1302 2301"),
        ("chain-cover", 1, 1, "0"),
        ("matching", 4, 4, "0123 1032 2301 3210"),
    ],
)
def test_worked_outputs(method: str, slices: int, budget: int, expected: str) -> None:
    assert choose_sequences(method, slices, budget) == digits(expected)


@pytest.mark.parametrize("method", get_args(SequenceMethod))
@pytest.mark.parametrize("slices", [1, 2, 3, 4])
def test_every_budget_gives_as_many_distinct_orders(method: str, slices: int) -> None:
    most = math.comb(slices, slices // 2) if method == "chain-cover" else math.factorial(slices)
    for budget in range(1, most + 1):
        sequences = choose_sequences(method, slices, budget, prior=[2.0**-s for s in range(slices)], seed=3)
        assert len(set(sequences)) == len(sequences) == budget
        assert all(sorted(order) == list(range(slices)) for order in sequences)


def test_the_configuration_knows_the_same_methods() -> None:
    assert set(get_args(SequenceMethod)) == set(get_args(SequenceMethod))


@pytest.mark.parametrize("slices", range(1, 9))
def test_rotations_are_a_latin_square(slices: int) -> None:
    assert is_latin_square(cyclic_sequences(slices, slices))


@pytest.mark.parametrize("budget", [7, 13, 20, 47, 120])
def test_cyclic_balances_the_slices_at_every_place_in_front(budget: int) -> None:
    sequences = cyclic_sequences(5, budget)
    for depth in (1, 2):
        counts = [sum(order[:depth] == front for order in sequences) for front in permutations(range(5), depth)]
        assert max(counts) - min(counts) <= 1


def test_matching_is_a_latin_square_for_any_prior() -> None:
    generator = np.random.default_rng(0)
    for slices in (2, 3, 5, 7, 8):
        for concentration in (0.05, 0.3, 3.0):
            prior = generator.dirichlet([concentration] * slices)
            assert is_latin_square(matching_sequences(slices, slices, prior))


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("requests", [1, 5, 100])
def test_every_step_of_matching_is_the_first_best_of_all_assignments(prior: list[float] | None, requests: int) -> None:
    masses = [Fraction(str(weight)) for weight in prior or [1] * 5]
    masses = [mass / sum(masses) for mass in masses]

    def survival(prefix: Sequence[int]) -> Fraction:
        return (1 - sum(masses[s] for s in prefix)) ** requests

    rows = [(s,) for s in range(5)]
    for _ in range(4):
        allowed = [next_ for next_ in permutations(range(5)) if all(s not in row for s, row in zip(next_, rows))]
        totals = [sum(survival((*row, s)) for s, row in zip(next_, rows)) for next_ in allowed]
        best = allowed[totals.index(max(totals))]  # permutations come in lexicographic order
        rows = [(*row, s) for row, s in zip(rows, best)]
    scores = {row: sum(survival(row[:depth]) for depth in range(1, 6)) for row in rows}
    ranked = sorted(rows, key=lambda row: (-scores[row], row))
    assert matching_sequences(5, 5, prior, requests=requests) == ranked
    assert matching_sequences(5, 3, prior, requests=requests) == ranked[:3]


def test_matching_sees_the_ties_behind_rounded_priors() -> None:
    counts = [1, 2, 4, 3, 7]
    exact = matching_sequences(5, 5, counts)
    assert matching_sequences(5, 5, [count / 17 for count in counts]) == exact
    assert matching_sequences(5, 5, [0.1 * count for count in counts]) == exact


def test_matching_beyond_the_square_gives_unlikely_first_slices_the_rest() -> None:
    sequences = matching_sequences(4, 10, [0.4, 0.3, 0.2, 0.1])
    assert [sum(order[0] == s for order in sequences) for s in range(4)] == [2, 2, 3, 3]
    behind_last = [[s for s in order if s != 3] for order in sequences if order[0] == 3]
    assert len({order[0] for order in behind_last}) == 3


def test_assignment_is_exact_where_fp64_is_not() -> None:
    generator = np.random.default_rng(1)
    for _ in range(200):
        size = int(generator.integers(1, 6))
        powers = generator.integers(1, 4, (size, size)), generator.integers(0, 200, (size, size))
        weights = [[int(a) ** int(b) for a, b in zip(*row)] for row in zip(*powers)]
        allowed = [[None if i == j and size > 1 else w for j, w in enumerate(row)] for i, row in enumerate(weights)]
        choices = [c for c in permutations(range(size)) if all(allowed[i][j] is not None for i, j in enumerate(c))]
        best = max(choices, key=lambda c: (sum(weights[i][j] for i, j in enumerate(c)), [-j for j in c]))
        assert best_assignment(allowed) == list(best)


def test_drawn_sequences_follow_their_weights_and_seed() -> None:
    prior = [0.6, 0.3, 0.1]
    first = [conditional_sequences(3, 1, prior, seed=seed)[0][0] for seed in range(4000)]
    for s in range(3):
        expected = (1 - prior[s]) / 2
        assert abs(first.count(s) / 4000 - expected) < 4 * math.sqrt(expected * (1 - expected) / 4000)
    assert conditional_sequences(6, 9, seed=5) == random_sequences(6, 9, seed=5) != random_sequences(6, 9, seed=6)
    assert conditional_sequences(3, 6, [1, 0, 0]) != conditional_sequences(3, 6, [0, 0, 1])


@pytest.mark.parametrize("slices", range(1, 9))
def test_every_set_is_a_prefix_set_of_the_chain_cover(slices: int) -> None:
    cover = chain_cover(slices)
    assert len(cover) == math.comb(slices, slices // 2)
    fronts = {frozenset(front) for front in prefixes(cover)}
    for survivors in subsets(slices)[1:]:
        assert frozenset(survivors) in fronts
        assert best_depth(cover, set(range(slices)) - set(survivors)) == len(survivors)
    assert worst_depth(cover) == [slices - d for d in range(slices + 1)]
    assert expected_depth(cover) == pytest.approx([slices - d for d in range(slices + 1)])


def test_no_chain_of_the_cover_can_be_left_out() -> None:
    cover = chain_cover(5)
    for i in range(len(cover)):
        assert worst_depth(cover[:i] + cover[i + 1 :]) != worst_depth(cover)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
@pytest.mark.parametrize("budget", range(1, 10))
def test_a_smaller_cover_is_the_best_choice_of_chains(budget: int, prior: list[float] | None) -> None:
    values = {choice: sum(expected_depth(choice, prior)) for choice in combinations(chain_cover(5), budget)}
    chosen = tuple(chain_cover(5, budget, prior))
    assert values[chosen] == pytest.approx(max(values.values()), abs=1e-8)
    assert chosen == next(choice for choice, value in values.items() if value > max(values.values()) - 1e-8)


def test_where_choices_are_too_many_no_exchange_improves_the_cover() -> None:
    cover, chosen = chain_cover(6), chain_cover(6, 8)
    best = sum(expected_depth(chosen))
    for i, chain in ((i, chain) for i in range(8) for chain in cover if chain not in chosen):
        assert sum(expected_depth([*chosen[:i], chain, *chosen[i + 1 :]])) < best + 1e-8
    assert best > sum(expected_depth(cyclic_sequences(6, 8)))


def test_a_larger_budget_than_the_cover_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_sequences("chain-cover", 4, 24) == chain_cover(4)
    assert "budget is 24, of which a chain cover of 4 slices uses 6" in caplog.text


def test_depths_by_their_definition() -> None:
    sequences = digits("02314 31402 40123")
    table = depth_table(sequences)
    for survivors in subsets(5):
        depth = best_depth(sequences, set(range(5)) - set(survivors))
        assert depth == max(
            len([s for i, s in enumerate(order) if set(order[: i + 1]) <= set(survivors)]) for order in sequences
        )
        assert table[sum(2**s for s in survivors)] == depth
    by_size = [[best_depth(sequences, gone) for gone in combinations(range(5), d)] for d in range(6)]
    assert worst_depth(sequences) == [min(depths) for depths in by_size]
    assert expected_depth(sequences) == pytest.approx([sum(depths) / len(depths) for depths in by_size])


def test_expected_depth_follows_the_prior() -> None:
    sequences, prior = digits("0231 3102"), [0.5, 0.25, 0.15, 0.1]
    expected = [0.0] * 5
    for order in permutations(range(4)):  # in which the slices are hit
        chance, left = 1.0, 1.0
        for s in order:
            chance, left = chance * prior[s] / left, left - prior[s]
        for d in range(5):
            expected[d] += chance * best_depth(sequences, order[:d])
    assert expected_depth(sequences, prior) == pytest.approx(expected)
    # Slices that are never requested go last, in any order.
    assert expected_depth(digits("012 102"), [0, 0, 1]) == pytest.approx([3, 2, 1, 0])


def test_best_depth_of_what_a_live_shard_has_left() -> None:
    assert best_depth([(0, 2), (1,), ()], {2}) == 1
    assert best_depth([(0, 2), (1,)], {0, 1}) == best_depth([], {0}) == 0


def test_prefixes_stand_behind_what_they_extend() -> None:
    assert prefixes(digits("012 021 120")) == digits("0 1 01 02 12 012 021 120")
    found = prefixes(chain_cover(6))
    assert len(set(found)) == len(found)
    assert all(front[:-1] in found[:i] for i, front in enumerate(found) if len(front) > 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: choose_sequences("cycle", 4, 4), "method must be one of cyclic, matching, .*, got 'cycle'"),
        (lambda: choose_sequences("cyclic", 4, 25), "budget must be 1 to 4! = 24, got 25"),
        (lambda: choose_sequences("random", 4, 0), "budget must be 1 to 4! = 24, got 0"),
        (lambda: choose_sequences("chain-cover", 0, 1), "slices must be at least 1, got 0"),
        (lambda: chain_cover(13, 13), "slices must be at most 12 for a chain cover of 13 sequences, got 13"),
        (lambda: chain_cover(40, 3), "slices must be at most 12 for a chain cover of 3 sequences, got 40"),
        (lambda: chain_cover(40), "slices must be at most 20 for a chain cover of 137846528820 sequences, got 40"),
        (lambda: matching_sequences(3, 3, [1, 2]), "prior must have a weight for each of the 3 slices, got 2"),
        (lambda: matching_sequences(2, 2, [1, -1]), "prior must be finite and at least 0, got -1"),
        (lambda: matching_sequences(2, 2, [1, math.nan]), "prior must be finite and at least 0, got nan"),
        (lambda: conditional_sequences(2, 2, [0, 0]), r"prior must have a weight above 0, got \[0, 0\]"),
        (lambda: matching_sequences(2, 2, requests=0), "requests must be at least 1, got 0"),
        (lambda: worst_depth([(0, 2)]), r"sequences must be orders of 0 to 1, got \(0, 2\)"),
        (lambda: depth_table([tuple(range(21))]), "sequences must be of at most 20 slices, got 21"),
        (lambda: worst_depth([]), "sequences must not be empty, got none"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
