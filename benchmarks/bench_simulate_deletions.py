"""simulate_deletions on one thread against a plain Python loop over the same kind of requests."""

from __future__ import annotations

import argparse
import math
import random

import torch

from benchmarks.harness import Case, Report, alternate
from pymape.ops import simulate_deletions, simulate_deletions_reference
from pymape.s3t.sequences import chain_cover, cyclic_sequences
from pymape.s3t.theory import capacity

DEVICE = "cpu"
_Orders = list[tuple[int, ...]]


def run(report: Report, options: argparse.Namespace) -> None:
    report.notes.append("one thread; the loop counts until all shards are dead, no more")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rising = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    report.add(_compare("m=5 L=6, 6 rotations", cyclic_sequences(6, 6), 5, None))
    report.add(_compare("m=20 L=8, chain cover, prior", chain_cover(8), 20, rising))
    torch.set_num_threads(threads)


def _compare(name: str, sequences: _Orders, shards: int, prior: list[float] | None) -> list[Case]:
    expected = capacity(sequences, shards, prior=prior).all_dead
    runs = math.ceil(1e6 / expected)  # one million requests
    simulated = simulate_deletions(sequences, shards, prior=prior, runs=runs)
    few, reference = (
        f(sequences, shards, prior=prior, runs=20) for f in (simulate_deletions, simulate_deletions_reference)
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(few, reference))
    for times in (simulated.all_dead.double(), torch.tensor(_loop(sequences, shards, prior, runs)).double()):
        assert abs(times.mean() - expected) < 4 * times.std() / math.sqrt(runs)
    requests = int(simulated.all_dead.sum())
    ours, curves, loop = alternate(
        f"{name}, {requests} requests",
        {
            "pymape": lambda: simulate_deletions(sequences, shards, prior=prior, runs=runs),
            "pymape, with curves": lambda: simulate_deletions(
                sequences, shards, prior=prior, runs=runs, curve=math.ceil(2 * expected)
            ),
            "Python loop": lambda: _loop(sequences, shards, prior, runs),
        },
    )
    for case in (ours, curves, loop):
        case.figures["ns/request"] = 1e9 * case.median_s / requests
    ours.figures["speed-up"] = loop.median_s / ours.median_s
    return [ours, curves, loop]


def _loop(sequences: _Orders, shards: int, prior: list[float] | None, runs: int) -> list[int]:
    """Requests until all shards are dead, in every run; drawing many numbers at a time is the fastest in Python."""
    slices = len(sequences[0])
    ends = {shard * slices + order[0] for shard in range(shards) for order in sequences}
    weights = None if prior is None else [weight for _ in range(shards) for weight in prior]
    generator = random.Random(0)
    drawn = iter(())
    times = []
    for _ in range(runs):
        left = set(ends)
        requests = 0
        while left:
            cell = next(drawn, None)
            if cell is None:
                drawn = iter(generator.choices(range(shards * slices), weights, k=10_000))
                continue
            requests += 1
            left.discard(cell)
        times.append(requests)
    return times
