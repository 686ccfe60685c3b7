"""simulate_deletions: random deletion requests to an S3T system, until every shard is dead.

A plain function and no torch operator: it draws numbers, and no gradient or compiler has a use for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pymape.backends import native

__all__ = ["DeletionRuns", "simulate_deletions", "simulate_deletions_reference"]

_WORD = 2**64
_STEP = 0x9E3779B97F4A7C15


class DeletionRuns(NamedTuple):
    """What happened in every run, and on average after every request. R runs, C = `curve`."""

    first_dead: Tensor  # [R] int64, requests until the first shard was dead; -1 if none was within max_requests
    all_dead: Tensor  # [R] int64, requests until all shards were; -1 likewise
    distinct: Tensor  # [R] int64, distinct slices hit until all shards were dead; -1 likewise
    depth: Tensor  # [C + 1] float64, mean best depth of a shard after 0 .. C requests; a dead shard has depth 0
    live: Tensor  # [C + 1] float64, mean number of live shards


def simulate_deletions(
    sequences: Tensor | Sequence[Sequence[int]],
    shards: int,
    *,
    prior: Tensor | Sequence[float] | None = None,
    runs: int = 1000,
    max_requests: int = 1_000_000,
    curve: int = 0,
    seed: int = 0,
) -> DeletionRuns:
    """Send random deletion requests to an S3T system until every shard is dead, many times over.

    Requests are independent and hit one slice each, which may have been hit before. A sequence keeps the stages in
    front of its first hit slice; a shard's best depth is that of its deepest sequence, and with depth 0 it is dead.

    Args:
        sequences: orders of the slices 0 .. L - 1, [B, L] for all shards or [m, B, L], int64.
        shards: m, at least 1.
        prior: weights of any scale of the slices, [L] for all shards or [m, L], at least 0; None is uniform.
        runs: R, at least 1.
        max_requests: where a run stops in any case, at least 1.
        curve: C, number of requests up to which depth and live shards are averaged over the runs, at most max_requests.
        seed: 0 to 2^63 - 1. A run's numbers depend on the seed and its index only (SplitMix64): neither the number of
            threads nor `runs` changes them.

    Returns:
        `DeletionRuns`, the same to the last bit as that of `simulate_deletions_reference`.

    Raises:
        ValueError: sequences that are not orders of the slices, a weight or a number out of range.
    """
    orders, weights = _check(sequences, shards, prior, runs, max_requests, curve, seed)
    alias, threshold = _alias_table(weights)
    signed = [value - _WORD if value >= _WORD // 2 else value for value in threshold]
    first_dead, all_dead, distinct = (torch.empty(runs, dtype=torch.int64) for _ in range(3))
    depth, live = (torch.empty(curve + 1, dtype=torch.int64) for _ in range(2))
    outputs = (first_dead, all_dead, distinct, depth, live)
    tables = (torch.tensor(alias), torch.tensor(signed))
    native().simulate_deletions(orders, *tables, max_requests, seed, *outputs, torch.get_num_threads())
    return DeletionRuns(first_dead, all_dead, distinct, depth.double() / (runs * shards), live.double() / runs)


def simulate_deletions_reference(
    sequences: Tensor | Sequence[Sequence[int]],
    shards: int,
    *,
    prior: Tensor | Sequence[float] | None = None,
    runs: int = 1000,
    max_requests: int = 1_000_000,
    curve: int = 0,
    seed: int = 0,
) -> DeletionRuns:
    """Plain Python specification of `simulate_deletions`."""
    checked, weights = _check(sequences, shards, prior, runs, max_requests, curve, seed)
    orders, slices = checked.tolist(), checked.shape[2]
    alias, threshold = _alias_table(weights)
    per_run: list[tuple[int, int, int]] = []
    depth_sum, live_sum = [0] * (curve + 1), [0] * (curve + 1)
    for run in range(runs):
        hit: list[set[int]] = [set() for _ in range(shards)]
        depths = [slices] * shards
        depth_sum[0] += shards * slices
        live_sum[0] += shards
        first, request, words = -1, 0, _random_words(seed, run)
        while any(depths) and request < max_requests:
            request += 1
            column, within = divmod(next(words) * len(alias), _WORD)
            shard, hit_slice = divmod(column if within < threshold[column] else alias[column], slices)
            hit[shard].add(hit_slice)
            depths[shard] = max(
                next((i for i, s in enumerate(order) if s in hit[shard]), slices) for order in orders[shard]
            )
            if first < 0 and 0 in depths:
                first = request
            if request <= curve:
                depth_sum[request] += sum(depths)
                live_sum[request] += sum(depth > 0 for depth in depths)
        distinct_hit = sum(len(slices_hit) for slices_hit in hit)
        per_run.append((first, -1, -1) if any(depths) else (first, request, distinct_hit))
    first_dead, all_dead, distinct = torch.tensor(per_run).unbind(dim=1)
    depth, live = torch.tensor([depth_sum, live_sum], dtype=torch.float64)
    return DeletionRuns(first_dead, all_dead, distinct, depth / (runs * shards), live / runs)


def _random_words(seed: int, run: int) -> Iterator[int]:
    """SplitMix64 (Steele, Lea and Flood 2014), 64 bits each, from a start that depends on the seed and the run."""
    state = _mix((_mix((seed + _STEP) % _WORD) + run) % _WORD)
    while True:
        state = (state + _STEP) % _WORD
        yield _mix(state)


def _mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % _WORD
    return x ^ x >> 31


def _alias_table(weights: list[float]) -> tuple[list[int], list[int]]:
    """Walker's tables: draw a column uniformly, keep it with probability threshold / 2^64, take its alias otherwise."""
    share = [weight * len(weights) / math.fsum(weights) for weight in weights]
    alias, threshold = list(range(len(weights))), [_WORD - 1] * len(weights)
    small = [cell for cell, value in enumerate(share) if value < 1]
    large = [cell for cell, value in enumerate(share) if value >= 1]
    while small and large:
        cell, donor = small.pop(), large[-1]
        alias[cell], threshold[cell] = donor, int(share[cell] * _WORD)
        share[donor] -= 1 - share[cell]
        if share[donor] < 1:
            small.append(large.pop())
    return alias, threshold


def _check(
    sequences: Tensor | Sequence[Sequence[int]],
    shards: int,
    prior: Tensor | Sequence[float] | None,
    runs: int,
    max_requests: int,
    curve: int,
    seed: int,
) -> tuple[Tensor, list[float]]:
    """Return the sequences as a contiguous [m, B, L] tensor and the weights of all m L slices."""
    for name, value in (("shards", shards), ("runs", runs), ("max_requests", max_requests)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= curve <= max_requests:
        raise ValueError(f"curve must be 0 to max_requests = {max_requests}, got {curve}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be 0 to 2^63 - 1, got {seed}")
    orders = torch.as_tensor(sequences)
    if orders.dtype != torch.int64 or orders.dim() not in (2, 3) or orders.numel() == 0:
        raise ValueError(
            f"sequences must be int64 of shape (B, L) or (m, B, L), got {orders.dtype} of shape {tuple(orders.shape)}"
        )
    if orders.dim() == 3 and orders.shape[0] != shards:
        raise ValueError(f"sequences must be for {shards} shards, got {orders.shape[0]}")
    slices = orders.shape[-1]
    wrong = (orders.sort(dim=-1).values != torch.arange(slices)).any(dim=-1)
    if wrong.any():
        raise ValueError(f"sequences must be orders of 0 to {slices - 1}, got {orders[wrong][0].tolist()}")
    if prior is None:
        weights = torch.ones(slices, dtype=torch.float64)
    else:
        weights = torch.as_tensor(prior, dtype=torch.float64)
    if weights.shape not in ((slices,), (shards, slices)):
        raise ValueError(f"prior must have shape ({slices},) or ({shards}, {slices}), got {tuple(weights.shape)}")
    out_of_range = ~(weights.isfinite() & (weights >= 0))
    if out_of_range.any():
        raise ValueError(f"prior must be finite and at least 0, got {weights[out_of_range][0].item()}")
    if not weights.sum() > 0:
        raise ValueError("prior must have a weight above 0, got none")
    return orders.expand(shards, *orders.shape[-2:]).contiguous(), weights.expand(shards, slices).flatten().tolist()
