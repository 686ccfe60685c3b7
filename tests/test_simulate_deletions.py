"""simulate_deletions: the native core against its specification, bit by bit, its distribution, limits and bad input."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import threads

from pymape.ops import DeletionRuns, simulate_deletions, simulate_deletions_reference
from pymape.s3t.sequences import chain_cover, cyclic_sequences, random_sequences

PRIOR = [0.4, 0.3, 0.2, 0.1]


def assert_same(actual: DeletionRuns, expected: DeletionRuns) -> None:
    for name, ours, theirs in zip(DeletionRuns._fields, actual, expected):
        assert ours.dtype == theirs.dtype, name
        assert torch.equal(ours, theirs), name


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    ("sequences", "shards", "options"),
    [
        ([[0]], 1, {}),
        ([[0]], 4, {"curve": 9}),
        (cyclic_sequences(4, 4), 3, {}),
        (cyclic_sequences(4, 2), 3, {"curve": 30, "prior": PRIOR, "seed": 7}),
        (chain_cover(4), 2, {"curve": 5, "prior": [[1, 0, 0, 2], [3, 1, 5, 0]], "max_requests": 40}),
        (torch.tensor([random_sequences(4, 3, seed=s) for s in range(5)]), 5, {"curve": 25, "seed": 2**63 - 1}),
        (cyclic_sequences(4, 4), 3, {"curve": 6, "max_requests": 6}),
        ([tuple(range(70))], 2, {"max_requests": 500}),
    ],
)
def test_is_the_specification_bit_by_bit(sequences, shards: int, options: dict) -> None:
    actual = simulate_deletions(sequences, shards, runs=40, **options)
    assert_same(actual, simulate_deletions_reference(sequences, shards, runs=40, **options))


def test_a_run_depends_on_its_seed_and_index_only() -> None:
    sequences = chain_cover(5)
    runs = simulate_deletions(sequences, 3, runs=101, curve=20)
    with threads(3):
        assert_same(simulate_deletions(sequences, 3, runs=101, curve=20), runs)
    fewer, other = simulate_deletions(sequences, 3, runs=50), simulate_deletions(sequences, 3, runs=50, seed=1)
    assert torch.equal(fewer.all_dead, runs.all_dead[:50])
    assert not torch.equal(fewer.all_dead, other.all_dead)
    assert len(runs.all_dead.unique()) > 30


def test_one_shard_of_one_sequence_waits_geometrically() -> None:
    runs, share = 40_000, PRIOR[2]
    times = simulate_deletions([[2, 0, 1, 3]], 1, prior=PRIOR, runs=runs).all_dead
    for r in (1, 2, 3, 8, 20):
        expected = (1 - share) ** r
        assert abs((times > r).double().mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / runs)


def test_slices_are_hit_in_proportion_to_the_prior() -> None:
    """One request kills a shard if it hits the first slice: that shows the probabilities behind the alias tables."""
    prior = torch.tensor([[0.0, 3.0, 1e-3], [2.0, 0.5, 40.0]], dtype=torch.float64)
    runs = 60_000
    for slice_ in range(3):
        order = [slice_, *(s for s in range(3) if s != slice_)]
        dead = simulate_deletions([order], 2, prior=prior, runs=runs, max_requests=1).first_dead
        expected = float(prior[:, slice_].sum() / prior.sum())
        assert abs((dead == 1).double().mean() - expected) <= 4 * math.sqrt(expected * (1 - expected) / runs)


def test_what_does_not_happen_within_the_limit_is_minus_one() -> None:
    runs = simulate_deletions([[0, 1], [1, 0]], 2, prior=[1, 0], runs=5, max_requests=100)
    assert (runs.first_dead == -1).all()
    assert (runs.all_dead == -1).all()
    assert (runs.distinct == -1).all()
    some = simulate_deletions([[0, 1]], 2, prior=[[1, 1], [0, 1]], runs=5, max_requests=100)
    assert (some.first_dead > 0).all()
    assert (some.all_dead == -1).all()


def test_curves_begin_whole_and_end_dead() -> None:
    runs = simulate_deletions(chain_cover(4), 3, runs=200, curve=400)
    assert (runs.depth[0], runs.live[0]) == (4, 3)
    assert (runs.depth[1], runs.live[1]) == (pytest.approx((4 + 4 + 3) / 3), 3)
    assert (runs.depth[-1], runs.live[-1]) == (0, 0)
    assert (runs.depth.diff() <= 0).all()
    assert (runs.live.diff() <= 0).all()
    alone = simulate_deletions(chain_cover(4), 1, runs=200, curve=400)
    assert alone.live.sum().item() == pytest.approx(alone.all_dead.double().mean().item())
    assert alone.depth.sum() > alone.live.sum()


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([[0, 2]], 1), {}, r"sequences must be orders of 0 to 1, got \[0, 2\]"),
        (([[0, 1], [1, 1]], 1), {}, r"sequences must be orders of 0 to 1, got \[1, 1\]"),
        (([0, 1], 1), {}, r"sequences must be int64 of shape \(B, L\) or \(m, B, L\), got torch.int64 of shape \(2,\)"),
        (([[0.0, 1.0]], 1), {}, "sequences must be int64 .*, got torch.float32"),
        ((torch.zeros(2, 1, 1, dtype=torch.int64), 3), {}, "sequences must be for 3 shards, got 2"),
        (([[0, 1]], 0), {}, "shards must be at least 1, got 0"),
        (([[0, 1]], 1), {"runs": 0}, "runs must be at least 1, got 0"),
        (([[0, 1]], 1), {"max_requests": 0}, "max_requests must be at least 1, got 0"),
        (([[0, 1]], 1), {"curve": 11, "max_requests": 10}, "curve must be 0 to max_requests = 10, got 11"),
        (([[0, 1]], 1), {"seed": -1}, r"seed must be 0 to 2\^63 - 1, got -1"),
        (([[0, 1]], 2), {"prior": [1, 2, 3]}, r"prior must have shape \(2,\) or \(2, 2\), got \(3,\)"),
        (([[0, 1]], 1), {"prior": [1, -2]}, "prior must be finite and at least 0, got -2"),
        (([[0, 1]], 1), {"prior": [0, 0]}, "prior must have a weight above 0, got none"),
    ],
)
@pytest.mark.parametrize("function", [simulate_deletions, simulate_deletions_reference])
def test_bad_input(function, arguments, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)
