"""Work that the processes of `torch.distributed` share, and nothing at all where there is one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["add_up", "exchange", "rank", "require_equal", "share_rows", "together", "world_size"]

_ROWS = 1024  # rows sent at a time: bounds the memory of a message


class _PeerError(ValueError):
    """Another process failed; all have been told."""


def rank() -> int:
    """Number of this process; 0 where there is one."""
    return dist.get_rank() if _running() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if _running() else 1


@contextmanager
def together() -> Iterator[None]:
    """End a block in all processes or fail in all, so that none waits for one that has failed.

    Raises:
        ValueError: the block failed in another process.
    """
    try:
        yield
    except _PeerError:
        raise
    except BaseException as error:
        if world_size() > 1:
            _exchange(None, f"{type(error).__name__}: {error}")
        raise
    exchange(None)


def exchange(value: Any) -> list[Any]:
    """Every process's value, by rank.

    Raises:
        ValueError: another process failed in its block of `together`.
    """
    if world_size() == 1:
        return [value]
    answers = _exchange(value)
    failed = [(number, error) for number, (_, error) in enumerate(answers) if error is not None]
    if failed:
        raise _PeerError(f"process {failed[0][0]} failed: {failed[0][1]}")
    return [value for value, _ in answers]


def require_equal(value: Any, argument: str) -> None:
    """Refuse an argument that differs between the processes.

    Raises:
        ValueError: in all processes.
    """
    values = exchange(value)
    odd = [number for number, other in enumerate(values) if other != values[0]]
    if odd:
        raise _PeerError(f"{argument} must be the same in every process, got another in process {odd[0]} than in 0")


def share_rows(tensors: Sequence[Tensor], rows: Sequence[Sequence[int]]) -> None:
    """Fill in the rows that other processes have computed, bit by bit as they are.

    Args:
        tensors: [N, ...] on the CPU, alike in all processes; changed in place.
        rows: the rows of each process, by rank.
    """
    if world_size() == 1:
        return
    device = torch.device("cpu")
    if "gloo" not in dist.get_backend():
        device = torch.accelerator.current_accelerator() or device
    for source, own in enumerate(rows):
        for part in torch.tensor(own, dtype=torch.long).split(_ROWS):
            for tensor in tensors:
                # Bytes, because not every backend sends every dtype.
                message = tensor[part].contiguous().view(torch.uint8).to(device)
                dist.broadcast(message, source)
                if source != rank():
                    tensor[part] = message.cpu().view(tensor.dtype)


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over the processes, bit-identical on all of them."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def _exchange(value: Any, error: str | None = None) -> list[tuple[Any, str | None]]:
    answers: list[Any] = [None] * world_size()
    dist.all_gather_object(answers, (value, error))
    return answers


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()
