"""Where records belong: stable, uniform, and unknown without the key."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from pymape.s3t.partition import place, read_identifier, record_name, subject_name

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


@pytest.mark.parametrize(
    ("values", "identifier"),
    [
        ((7, 7.0, "7", " 7\n", np.int64(7), np.float32(7), np.array(7.0), torch.tensor(7), torch.tensor(7.0)), "7"),
        (("Jos\u00e9", "Jose\u0301", "\u2028Jose\u0301 "), "Jos\u00e9"),
        ((-0.0, 0), "0"),
        ((1.5, "1.5", torch.tensor(1.5)), "1.5"),
        (("1.0",), "1.0"),  # a text is no number
        (("\u06cc\u200c\u06a9", ), "\u06cc\u200c\u06a9"),  # what joins letters is a part of the spelling
        ((None, float("nan"), "", " ", torch.tensor(float("nan")), np.float32("nan")), ""),
    ],
)  # fmt: skip
def test_an_id_is_one_however_it_is_written(values: tuple[object, ...], identifier: str) -> None:
    assert {read_identifier(value, "id") for value in values} == {identifier}


@pytest.mark.parametrize("text", ["n1\nn2", "n1\rn2", "a\tb", "n\0", "a\x85b", "a\u2028b", "a\u2029b", "a\ud800"])
def test_an_id_is_one_line_of_text(text: str) -> None:
    with pytest.raises(ValueError, match="id of record 3 must hold no control character, line separator or half a sur"):
        read_identifier(text, "id of record 3")
    if text != "a\ud800":
        assert read_identifier(text, "id", normal=False) == text


@pytest.mark.parametrize("value", [torch.tensor([7]), np.array([7, 8]), [7], ("a", "b"), {"a": 1}, b"7"])
def test_an_id_is_no_collection(value: object) -> None:
    with pytest.raises(ValueError, match=f"ids must be a text or a number, got a {type(value).__name__}"):
        read_identifier(value, "ids")


def test_systems_of_before_take_ids_as_they_are() -> None:
    for value, text in ((1.0, "1.0"), (" Jose\u0301 ", "Jose\u0301"), (7, "7"), (None, ""), (float("nan"), "")):
        assert read_identifier(value, "ids", normal=False) == text
    with pytest.raises(ValueError, match=r"ids must hold no half a surrogate pair, got 'a\\ud800'"):
        read_identifier("a\ud800", "ids", normal=False)
