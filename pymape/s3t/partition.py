"""Where a record belongs: keyed hashes of stable ids, never a position in a file."""

from __future__ import annotations

import hmac
import re
import unicodedata
from collections.abc import Collection
from typing import Any

__all__ = ["place", "read_identifier", "record_name", "subject_name"]

_SURROGATES = re.compile("[\ud800-\udfff]")
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # line separators among them


def read_identifier(value: Any, argument: str, *, normal: bool = True) -> str:
    """The id of a record or of a subject as text, the same for all ways of writing it.

    Args:
        value: a text, which is stripped and put into Unicode's normal form C; a number, also a tensor or an array of
            one without dimensions: 7, 7.0 and "7" are one id; anything else that `str` makes a name of.
        argument: what the value is, for the message.
        normal: False takes a text or a number as it is, as systems do that were made before there was a normal form.

    Returns:
        The id; empty where there is none, which tables say with NaN too.

    Raises:
        ValueError: a control character, a line separator, half a surrogate pair, or a collection.
    """
    if normal:
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        if isinstance(value, Collection) and not isinstance(value, str):
            raise ValueError(f"{argument} must be a text or a number, got a {type(value).__name__}")
        value = int(value) if isinstance(value, float) and value.is_integer() else value
    text = "" if value is None or value != value else str(value).strip()
    if (_CONTROLS if normal else _SURROGATES).search(text):
        wrong = "control character, line separator or half a surrogate pair" if normal else "half a surrogate pair"
        raise ValueError(f"{argument} must hold no {wrong}, got {text!r}")
    return unicodedata.normalize("NFC", text) if normal else text


def record_name(key: bytes, identifier: str) -> str:
    """Keyed hash of a record's id: the only form in which the ledger knows it.

    Without the key nobody can tell whose record it is, not even by trying ids.

    Args:
        key: the system's secret key.
        identifier: the record's id.

    Returns:
        64 hexadecimal digits.
    """
    return _keyed(key, "record", identifier).hex()


def subject_name(key: bytes, identifier: str) -> str:
    """Keyed hash of the id of the person (or other subject) that records are about; 64 hexadecimal digits."""
    return _keyed(key, "subject", identifier).hex()


def place(key: bytes, identifier: str, shards: int, slices: int) -> tuple[int, int]:
    """The shard and the slice of a record.

    Args:
        key: the system's secret key.
        identifier: the record's id, or its subject's, so that one person's records share a slice.
        shards: number of shards m, at least 1.
        slices: slices L of a shard, at least 1.

    Returns:
        (shard, slice), uniform over the m x L slices; the same for ever, whatever else the data set holds.

    Source: S3T (arXiv 2406.16257), section 3.1; SISA draws positions instead, which shift when records vanish.
    """
    cell = int.from_bytes(_keyed(key, "place", identifier)) % (shards * slices)
    return divmod(cell, slices)


def _keyed(key: bytes, purpose: str, identifier: str) -> bytes:
    return hmac.digest(key, f"{purpose}\0{identifier}".encode(), "sha256")
