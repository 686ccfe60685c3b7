"""Where a record belongs: keyed hashes of stable ids, never a position in a file."""

from __future__ import annotations

import hmac

__all__ = ["place", "record_name", "subject_name"]


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
