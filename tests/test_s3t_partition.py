"""Where records belong: stable, uniform, and unknown without the key."""

from __future__ import annotations

import hashlib
import math

import pytest

from pymape.s3t.partition import place, record_name, subject_name

KEY = bytes(range(32))
# The places of r0 ... r7 in 3 x 4: they must never change, or every system on disk would be read wrongly.
PLACES = [(1, 3), (0, 0), (0, 1), (0, 3), (1, 2), (1, 2), (0, 1), (1, 2)]
IDS = [f"record {number}" for number in range(6000)]


@pytest.mark.parametrize(("shards", "slices"), [(1, 1), (1, 4), (3, 1), (3, 4), (5, 6), (7, 11)])
def test_every_record_has_one_place(shards: int, slices: int) -> None:
    counts: dict[tuple[int, int], int] = {}
    for identifier in IDS:
        cell = place(KEY, identifier, shards, slices)
        counts[cell] = counts.get(cell, 0) + 1
    assert set(counts) == {(m, s) for m in range(shards) for s in range(slices)}
    assert sum(counts.values()) == len(IDS)  # the last slice has no remainder that belongs nowhere
    mean = len(IDS) / len(counts)
    chi_square = sum((count - mean) ** 2 / mean for count in counts.values())
    assert chi_square <= len(counts) - 1 + 4 * math.sqrt(2 * len(counts))


def test_a_place_depends_on_nothing_but_the_record() -> None:
    # The public reference cuts slices by percentage: when records vanish, the others shift to other slices.
    everything = {identifier: place(KEY, identifier, 3, 4) for identifier in IDS}
    rest = [identifier for number, identifier in enumerate(IDS) if number % 3]
    assert all(place(KEY, identifier, 3, 4) == everything[identifier] for identifier in reversed(rest))
    assert [place(KEY, f"r{number}", 3, 4) for number in range(8)] == PLACES
    moved = sum(place(b"another key", identifier, 3, 4) != everything[identifier] for identifier in IDS)
    assert 0.85 * len(IDS) < moved < 0.97 * len(IDS)  # 11 of 12 by chance


def test_names_tell_nothing_without_the_key() -> None:
    names = {record_name(KEY, identifier) for identifier in IDS}
    assert len(names) == len(IDS)
    assert all(len(name) == 64 and int(name, 16) >= 0 for name in names)
    assert record_name(b"another key", IDS[0]) not in names
    assert hashlib.sha256(IDS[0].encode()).hexdigest() not in names
    # A subject that is called as a record is, is not mistaken for it.
    assert subject_name(KEY, IDS[0]) not in names
    assert record_name(KEY, "é") != record_name(KEY, "e\u0301")
    assert record_name(KEY, "1") != record_name(KEY, "01") != record_name(KEY, "1 ")
